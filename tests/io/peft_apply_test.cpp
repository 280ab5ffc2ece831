// SPDX-License-Identifier: Apache-2.0
// Saved parts of the base model, biases, residual bases, and what a host does with them.
#include "mole/io/peft_apply.hpp"

#include <filesystem>
#include <limits>
#include <span>
#include <vector>

#include "io/peft_fixture.hpp"
#include "mole/io/peft_bank.hpp"

namespace {

using mole::BaseChange;
using mole::Errc;
using mole::Index;
using mole::LoraModule;
using mole::MatView;
using mole::ModuleKind;
using mole::PeftAdapter;
using mole::Replacement;
using mole::test::Adapter;
using mole::test::Json;
using mole::test::kQ;
using mole::test::kV;
using mole::test::raw;
using mole::test::refused;

const std::string kQPath = "model.layers.0.self_attn.q_proj";
const std::string kVPath = "model.layers.0.self_attn.v_proj";
const std::string kUpPath = "model.layers.0.mlp.up_proj";

void add(Adapter& adapter, const std::string& name, const std::string& shape, std::size_t count) {
  adapter.tensors.push_back({"base_model.model." + name, "F32", shape, Adapter::floats(count)});
}

Adapter with_lora_bias() {
  Adapter adapter;
  adapter.config["lora_bias"] = true;
  add(adapter, kQPath + ".lora_B.bias", "[6]", 6);
  add(adapter, kVPath + ".lora_B.bias", "[4]", 4);
  return adapter;
}

Adapter with_saved_modules() {
  Adapter adapter;
  adapter.config["modules_to_save"] = {"up_proj", "embed_tokens"};
  add(adapter, kUpPath + ".weight", "[7,6]", 42);
  add(adapter, "model.embed_tokens.weight", "[5,6]", 30);
  return adapter;
}

template <class T>
struct Layer {
  std::vector<T> weight, bias;
  MatView<T> w, b;

  Layer(Index rows, Index cols, Index outputs)
      : weight(static_cast<std::size_t>(rows * cols), T(1)),
        bias(static_cast<std::size_t>(outputs), T(-2)),
        w(weight.data(), rows, cols),
        b(bias.data(), 1, outputs) {}
};

}  // namespace

TEST_CASE("peft: a lora_bias is read, and its absence is an error", "[io]") {
  Adapter adapter = with_lora_bias();
  const PeftAdapter loaded = adapter.load();
  const LoraModule& v = loaded.at(kVPath);
  CHECK(v.bias_tensor == kV + ".lora_B.bias");
  std::vector<double> bias(4);
  loaded.read_bias(v, MatView<double>(bias.data(), 1, 4));
  CHECK(bias == std::vector<double>{0.25, 0.5, 0.75, 1});
  CHECK(loaded.report().to_text().find("6 -> 4, F32/F32/F32\n") != std::string::npos);
  CHECK_THROWS_AS(loaded.read_bias(v, MatView<double>(bias.data(), 1, 3)), mole::Error);

  adapter.tensors.back().shape = "[2,2]";
  refused(Errc::shape_mismatch, {"v_proj.lora_B.bias", "2 dimensions", "expected 1"},
          [&] { adapter.load(); });
  adapter.tensors.back() = {kV + ".lora_B.bias", "F32", "[3]", Adapter::floats(3)};
  refused(Errc::shape_mismatch, {"v_proj.lora_B.bias", "3 elements", "height 4"},
          [&] { adapter.load(); });
  adapter.tensors.pop_back();
  refused(Errc::config_error, {"\"" + kV + ".lora_B.bias\" is missing"}, [&] { adapter.load(); });
  Adapter plain;
  refused(Errc::not_found, {kQPath, "no lora_bias"}, [&] {
    plain.load().read_bias(plain.load().modules()[0], MatView<double>(bias.data(), 1, 4));
  });
}

TEST_CASE("peft: a bank carries every adapter's lora_bias", "[io]") {
  std::vector<PeftAdapter> adapters;
  adapters.push_back(Adapter().load());
  adapters.push_back(with_lora_bias().load());
  const mole::AdapterBank<float> bank(adapters, kVPath);
  REQUIRE(bank.bank().config().bias);
  const auto values = [&bank](Index e) {
    const MatView<const float> bias = bank.weights().bias_of(e);
    return std::vector<float>(bias.data, bias.data + bias.cols);
  };
  CHECK(values(0) == std::vector<float>{0, 0, 0, 0});
  CHECK(values(1) == std::vector<float>{0.25f, 0.5f, 0.75f, 1.0f});
  const std::span<const PeftAdapter> one(adapters.data(), 1);
  const mole::AdapterBank<float> plain(one, kVPath);
  CHECK_FALSE(plain.bank().config().bias);
}

TEST_CASE("peft: modules to save replace the base model's", "[io]") {
  Adapter adapter = with_saved_modules();
  const PeftAdapter loaded = adapter.load();
  REQUIRE(loaded.replacements().size() == 2);
  const Replacement* up = loaded.find_replacement(kUpPath, "weight");
  REQUIRE(up != nullptr);
  CHECK(up->from == "modules_to_save \"up_proj\"");
  CHECK(up->shape == std::vector<Index>{7, 6});
  CHECK(loaded.find_replacement(kUpPath, "bias") == nullptr);
  CHECK(loaded.find_replacement("model.embed_tokens", "weight") != nullptr);
  CHECK(loaded.report().to_text().find(kUpPath + ".weight: F32 [7, 6] (modules_to_save") !=
        std::string::npos);
  CHECK(adapter.load_without_base().replacements().size() == 2);

  Layer<float> layer(7, 6, 7);
  mole::apply_base_changes(loaded, kUpPath, layer.w, layer.b);
  CHECK(layer.weight[41] == 10.5f);
  CHECK(layer.bias == std::vector<float>(7, -2.0f));
  Layer<float> other(6, 6, 6);
  mole::apply_base_changes(loaded, kQPath, other.w, other.b);
  CHECK(other.weight == std::vector<float>(36, 1.0f));
  Layer<float> wrong(6, 7, 7);
  CHECK_THROWS_AS(mole::apply_base_changes(loaded, kUpPath, wrong.w, wrong.b), mole::Error);
  CHECK(wrong.weight == std::vector<float>(42, 1.0f));
}

TEST_CASE("peft: saved modules must fit the base model", "[io]") {
  Adapter adapter = with_saved_modules();
  adapter.tensors.back().shape = "[6,5]";
  refused(Errc::shape_mismatch, {"embed_tokens.weight\" is [6, 5]", "base model has [5, 6]"},
          [&] { adapter.load(); });
  adapter.tensors.pop_back();
  refused(Errc::config_error, {"module to save \"model.embed_tokens\" has no tensors"},
          [&] { adapter.load(); });
  adapter.options.allow_partial = true;
  CHECK(adapter.load().report().missing == std::vector<std::string>{"model.embed_tokens"});
  adapter.options.allow_partial = false;
  add(adapter, "model.layers.7.up_proj.weight", "[7,6]", 42);
  refused(Errc::config_error, {"layers.7.up_proj.weight\" matches no module"},
          [&] { adapter.load(); });
  adapter = with_saved_modules();
  adapter.tensors.back().bytes =
      raw(std::vector<float>(30, std::numeric_limits<float>::infinity()));
  refused(Errc::numeric_error, {"embed_tokens.weight\" holds 30 non-finite"},
          [&] { adapter.load(); });
  adapter.tensors.back().dtype = "I32";
  refused(Errc::unsupported, {"embed_tokens.weight", "\"I32\""}, [&] { adapter.load(); });
}

TEST_CASE("peft: a saved module makes an adapter with zero lora_B effective", "[io]") {
  Adapter adapter = with_saved_modules();
  adapter.q_up().bytes = std::string(48, '\0');
  adapter.v_up().bytes = std::string(32, '\0');
  CHECK(adapter.load().modules().size() == 2);
}

TEST_CASE("peft: trained biases are read as the setting bias says", "[io]") {
  Adapter adapter;
  adapter.config["bias"] = "lora_only";
  add(adapter, kQPath + ".base_layer.bias", "[6]", 6);
  const PeftAdapter loaded = adapter.load();
  REQUIRE(loaded.find_replacement(kQPath, "bias") != nullptr);
  CHECK(loaded.find_replacement(kQPath, "bias")->from == "bias \"lora_only\"");
  Layer<double> layer(6, 6, 6);
  mole::apply_base_changes(loaded, kQPath, layer.w, layer.b);
  CHECK(layer.bias == std::vector<double>{0.25, 0.5, 0.75, 1, 1.25, 1.5});
  CHECK(layer.weight == std::vector<double>(36, 1.0));
  refused(Errc::shape_mismatch, {kQPath, "saved bias", "no bias was given"},
          [&] { mole::apply_base_changes(loaded, kQPath, layer.w); });

  adapter.config["bias"] = "none";
  refused(Errc::config_error, {"unused tensor", "base_layer.bias"}, [&] { adapter.load(); });
  adapter.config["bias"] = "lora_only";
  add(adapter, kUpPath + ".bias", "[7]", 7);
  refused(Errc::config_error, {"unused tensor", "up_proj.bias"}, [&] { adapter.load(); });
  adapter.config["bias"] = "all";
  CHECK(adapter.load().replacements().size() == 2);
  add(adapter, kQPath + ".bias", "[6]", 6);
  refused(Errc::config_error, {"unused tensor", "q_proj.bias"}, [&] { adapter.load(); });
}

TEST_CASE("peft: second copies of saved biases are passed over and reported", "[io]") {
  Adapter adapter = with_saved_modules();
  adapter.config["bias"] = "all";
  add(adapter, kUpPath + ".bias", "[7]", 7);
  add(adapter, kUpPath + ".modules_to_save.bias", "[7]", 7);
  add(adapter, kUpPath + ".original_module.bias", "[7]", 7);
  const PeftAdapter loaded = adapter.load();
  CHECK(loaded.replacements().size() == 3);
  CHECK(loaded.report().redundant.size() == 2);
  adapter.config["bias"] = "none";
  refused(Errc::config_error, {"matches no module", "modules_to_save.bias"},
          [&] { adapter.load(); });
}

TEST_CASE("peft: a saved output head is taken unasked, as PEFT writes it", "[io]") {
  Adapter adapter;
  adapter.base.push_back({"lm_head", ModuleKind::linear, 6, 5});
  add(adapter, "lm_head.weight", "[5,6]", 30);
  CHECK(adapter.load().find_replacement("lm_head", "weight")->from == "saved embedding");
  add(adapter, kQPath + ".base_layer.weight", "[6,6]", 36);
  CHECK(adapter.load().find_replacement(kQPath, "weight")->from == "base_layer");
  add(adapter, kUpPath + ".weight", "[7,6]", 42);
  refused(Errc::config_error, {"unused tensor", "up_proj.weight"}, [&] { adapter.load(); });
}

TEST_CASE("peft: only takes saved modules by name as well", "[io]") {
  Adapter adapter = with_saved_modules();
  adapter.options.only = {kUpPath};
  const PeftAdapter loaded = adapter.load();
  CHECK(loaded.modules().empty());
  CHECK(loaded.replacements().size() == 1);
  CHECK(loaded.report().skipped == std::vector<std::string>{"model.embed_tokens", kQPath, kVPath});
}

TEST_CASE("peft: PiSSA and OLoRA need the caller's word that the base changes", "[io]") {
  Adapter adapter;
  for (const char* start : {"pissa", "olora", "pissa_niter_16"}) {
    adapter.config["init_lora_weights"] = start;
    adapter.options = {};
    refused(Errc::unsupported, {start, "residual_base"}, [&] { adapter.load(); });
    adapter.options.residual_base = true;
    if (std::string(start) == "pissa_niter_16") {
      refused(Errc::unsupported, {start, "exact_svd"}, [&] { adapter.load(); });
      adapter.options.exact_svd = true;
    }
    const PeftAdapter loaded = adapter.load();
    CHECK(loaded.modules()[0].base_change ==
          (std::string(start) == "olora" ? BaseChange::olora : BaseChange::pissa));
    CHECK(mole::changes_base(loaded, kQPath));
    CHECK(loaded.report().checks_off.size() == 1);
  }
  for (const char* start : {"corda", "loftq", "lora_ga", "pissa_niter_", "pissa_niter_x"}) {
    adapter.config["init_lora_weights"] = start;
    refused(Errc::unsupported, {start, "changes the base weights"}, [&] { adapter.load(); });
  }
}

TEST_CASE("peft: a base weight in the file is what the adapter belongs to", "[io]") {
  Adapter adapter;
  adapter.config["init_lora_weights"] = "pissa";
  adapter.options.residual_base = true;
  add(adapter, kQPath + ".base_layer.weight", "[6,6]", 36);
  const PeftAdapter loaded = adapter.load();
  CHECK(loaded.at(kQPath).base_change == BaseChange::none);
  CHECK(loaded.at(kVPath).base_change == BaseChange::pissa);
  Layer<double> layer(6, 6, 6);
  mole::apply_base_changes(loaded, kQPath, layer.w, layer.b);
  CHECK(layer.weight[35] == 9.0);
}

TEST_CASE("peft: adapters with different base layers cannot share a bank", "[io]") {
  Adapter adapter;
  adapter.config["bias"] = "lora_only";
  add(adapter, kQPath + ".base_layer.bias", "[6]", 6);
  std::vector<PeftAdapter> adapters;
  adapters.push_back(adapter.load());
  CHECK(mole::AdapterBank<float>(adapters, kQPath).bank().experts() == 1);
  adapters.push_back(Adapter().load());
  refused(Errc::unsupported, {kQPath, "changes the base layer"},
          [&] { mole::AdapterBank<float>(adapters, kQPath); });
  CHECK(mole::AdapterBank<float>(adapters, kVPath).bank().experts() == 2);
}

TEST_CASE("peft: a merged layer holds the base, the product and the bias", "[io]") {
  Adapter adapter = with_lora_bias();
  adapter.base[2] = {kVPath, ModuleKind::conv1d, 6, 4};
  const PeftAdapter loaded = adapter.load();
  Layer<double> turned(6, 4, 4);
  mole::merge_adapter(loaded, kVPath, turned.w, turned.b);
  // A = 0.25 (1..6; 7..12), B = 0.25 (1 2; 3 4; 5 6; 7 8), scale 2.
  CHECK(turned.w(0, 0) == 1 + 2 * 0.0625 * (1 * 1 + 2 * 7));
  CHECK(turned.w(5, 2) == 1 + 2 * 0.0625 * (5 * 6 + 6 * 12));
  CHECK(turned.bias == std::vector<double>{-1.5, -1, -0.5, 0});
  Layer<double> again(6, 4, 4);
  refused(Errc::shape_mismatch, {kVPath, "lora_bias", "no bias"},
          [&] { mole::merge_adapter(loaded, kVPath, again.w); });
  CHECK(again.weight == std::vector<double>(24, 1.0));
  mole::merge_adapter(loaded, kUpPath, again.w);
  CHECK(again.weight == std::vector<double>(24, 1.0));
}

TEST_CASE("peft: the report is one JSON object with stable keys", "[io]") {
  Adapter adapter = with_saved_modules();
  adapter.config["author"] = "somebody";
  const Json report = Json::parse(adapter.load().report().to_json());
  std::vector<std::string> keys;
  for (const auto& item : report.items()) keys.push_back(item.key());
  CHECK(keys == std::vector<std::string>{"folder", "applied", "replaced", "redundant", "unused",
                                         "missing", "skipped", "unknown_fields", "checks_off"});
  const Json& v = report.at("applied").at(1);
  CHECK(v.at("path") == kVPath);
  CHECK(v.at("scale") == 2.0);
  CHECK(v.at("rank_from") == "r");
  CHECK(v.at("d_out") == 4);
  CHECK(v.at("up") == Json({{"name", kV + ".lora_B.weight"}, {"dtype", "F32"}}));
  CHECK(v.at("bias").is_null());
  CHECK(report.at("replaced").at(1).at("shape") == Json({7, 6}));
  CHECK(report.at("unknown_fields") == Json({"author"}));
}

TEST_CASE("peft: an adapter of another name lies in its subfolder", "[io]") {
  const mole::test::TemporaryFolder folder;
  std::filesystem::create_directory(folder.path() + "/style");
  Adapter adapter;
  folder.write("style/adapter_config.json", adapter.config.dump());
  folder.write("style/adapter_model.safetensors", mole::test::container(adapter.tensors));
  mole::PeftOptions options;
  options.adapter_name = "style";
  CHECK(mole::load_peft(folder.path(), {}, options).modules().size() == 2);
  options.adapter_name = "tone";
  refused(Errc::not_found, {"no adapter \"tone\"", "\"style\""},
          [&] { mole::load_peft(folder.path(), {}, options); });
  options.adapter_name = "../style";
  refused(Errc::invalid_argument, {"adapter_name", "../style"},
          [&] { mole::load_peft(folder.path(), {}, options); });
  options.adapter_name = "default";
  refused(Errc::config_error, {"adapter_config.json", "can be \"style\""},
          [&] { mole::load_peft(folder.path(), {}, options); });
}
