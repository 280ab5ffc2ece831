// SPDX-License-Identifier: Apache-2.0
// Folders with one fault each, and folders of methods that cannot be read.
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <regex>
#include <set>

#include "mole/io/peft.hpp"
#include "support/catch.hpp"

namespace {

namespace fs = std::filesystem;
using mole::HostModule;
using mole::ModuleKind;

const fs::path kCases = fs::path(MOLE_TEST_DATA) / "golden/cases/peft_adapters";

std::string text_of(const fs::path& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::vector<HostModule> base_model() {
  std::vector<HostModule> modules;
  const auto base = nlohmann::json::parse(text_of(kCases / "bad/BASE.json"));
  for (const auto& [path, module] : base.items()) {
    const bool linear = module.at("type") == "linear";
    modules.push_back({path, linear ? ModuleKind::linear : ModuleKind::embedding, module.at("d_in"),
                       module.at("d_out")});
  }
  return modules;
}

/// One line of EXPECT.txt: `category: reason`, and what a message must contain of the reason.
struct Expected {
  std::string category;
  std::vector<std::string> names, numbers;

  explicit Expected(const std::string& line) {
    const std::size_t colon = line.find(':');
    category = line.substr(0, colon);
    category.erase(category.find_last_not_of(" \n") + 1);
    std::string reason = colon == std::string::npos ? "" : line.substr(colon + 1);
    const std::regex quoted("\"([^\"]*)\""), number("-?[0-9]+([.][0-9]+)?");
    for (std::sregex_iterator i(reason.begin(), reason.end(), quoted), end; i != end; ++i) {
      names.push_back((*i)[1]);
    }
    reason = std::regex_replace(reason, quoted, "");
    for (std::sregex_iterator i(reason.begin(), reason.end(), number), end; i != end; ++i) {
      numbers.push_back(i->str());
    }
  }
};

bool holds_number(const std::string& message, const std::string& number) {
  const auto in_number = [](char c) { return (c >= '0' && c <= '9') || c == '.'; };
  for (std::size_t at = message.find(number); at != std::string::npos;
       at = message.find(number, at + 1)) {
    const std::size_t end = at + number.size();
    const bool starts = at == 0 || !in_number(message[at - 1]);
    if (starts && (end == message.size() || !in_number(message[end]))) return true;
  }
  return false;
}

/// Category and message of what loading the folder throws; "ok" if it loads.
std::pair<std::string, std::string> outcome(const fs::path& folder,
                                            const std::vector<HostModule>& modules) {
  try {
    mole::load_peft(folder.string(), modules);
    return {"ok", ""};
  } catch (const mole::Error& error) {
    return {std::string(name(error.code())), error.what()};
  }
}

}  // namespace

TEST_CASE("peft: every broken folder is refused for its fault", "[io][golden]") {
  // Of methods that cannot be read, which the message names instead.
  const std::map<std::string, std::string> unreadable = {
      {"dora_without_magnitude", "\"use_dora\""},
      {"vera_without_projection", "\"VERA\""},
      {"xlora_classifier_layer_lost", "\"XLORA\""},
      {"xlora_expert_missing", "\"XLORA\""},
      {"xlora_width", "\"XLORA\""}};
  const std::vector<HostModule> modules = base_model();
  std::set<std::string> folders;
  for (const auto& item : fs::directory_iterator(kCases / "bad")) {
    if (!item.is_directory()) continue;
    const std::string folder = item.path().filename().string();
    folders.insert(folder);
    const auto [category, message] = outcome(item.path(), modules);
    INFO(folder << ": " << category << ": " << message);
    const auto method = unreadable.find(folder);
    if (method != unreadable.end()) {
      CHECK(category == "unsupported");
      CHECK(message.find(method->second) != std::string::npos);
      continue;
    }
    const Expected expected(text_of(item.path() / "EXPECT.txt"));
    CHECK(category == expected.category);
    for (const std::string& name : expected.names) {
      INFO(name);
      CHECK(message.find(name) != std::string::npos);
    }
    for (const std::string& number : expected.numbers) {
      INFO(number);
      CHECK(holds_number(message, number));
    }
  }
  CHECK(folders.size() == 71);
  CHECK(folders.count("control_good") == 1);
}

TEST_CASE("peft: what a missing setting means is an option", "[io][golden]") {
  mole::PeftOptions options;
  options.peft_defaults = true;
  for (const char* folder : {"missing_r", "missing_alpha"}) {
    INFO(folder);
    const auto adapter = mole::load_peft((kCases / "bad" / folder).string(), base_model(), options);
    CHECK(adapter.modules().size() == 2);
  }
}

TEST_CASE("peft: folders of other methods are refused by the method's name", "[io][golden]") {
  const std::map<std::string, std::string> words = {
      {"lora_dora", "DoRA"},
      {"lora_dora_conv1d", "DoRA"},
      {"lora_conv1d", "LoRA on an embedding"},
      {"lora_embedding", "LoRA on an embedding"},
      {"lora_hf_embedding", "LoRA on an embedding"},
      {"lora_target_parameters", "target_parameters"},
      {"lora_trainable_tokens", "trainable_token_indices"},
      {"lora_pissa", "residual_base"},
      {"lora_olora", "residual_base"},
      {"adalora", "AdaLoRA"},
      {"adalora_pruned", "AdaLoRA"},
      {"adalora_zero_rank", "AdaLoRA"},
      {"ia3", "(IA)3"},
      {"randlora", "RandLoRA"},
      {"vblora", "VB-LoRA"},
      {"vblora_topk", "VB-LoRA"},
      {"vera", "VeRA"},
      {"xlora", "X-LoRA"},
      {"xlora_layerwise_topk", "X-LoRA"},
      {"xlora_named", "X-LoRA"},
      {"xlora_pass_value", "X-LoRA"},
      {"xlora_pass_value_softmax_topk", "X-LoRA"},
      {"xlora_pass_value_topk", "X-LoRA"},
  };
  int loaded = 0;
  for (const auto& item : fs::directory_iterator(kCases / "checkpoints")) {
    const std::string folder = item.path().filename().string();
    const auto [category, message] = outcome(item.path(), {});
    INFO(folder << ": " << category << ": " << message);
    const auto word = words.find(folder);
    if (folder == "lora_named_adapter") {
      CHECK(category == "config_error");
      CHECK(message.find("adapter_name can be \"style\"") != std::string::npos);
    } else if (word == words.end()) {
      CHECK(category == "ok");
      ++loaded;
    } else {
      CHECK(category == "unsupported");
      CHECK(message.find(word->second) != std::string::npos);
    }
  }
  CHECK(loaded == 18);
}
