// SPDX-License-Identifier: Apache-2.0
#include "io/peft_refused.hpp"

#include <algorithm>
#include <iterator>

#include "io/text.hpp"
#include "mole/core/error.hpp"

namespace mole::inline MOLE_ABI {
namespace io {
namespace {

struct Method {
  const char* name;  // of a setting, or the end of a tensor's name
  const char* meaning;
};

constexpr Method kTypes[] = {
    {"ADALORA", "AdaLoRA"}, {"IA3", "(IA)3"}, {"RANDLORA", "RandLoRA"},
    {"VBLORA", "VB-LoRA"},  {"VERA", "VeRA"}, {"XLORA", "X-LoRA"},
};

constexpr Method kSettings[] = {
    {"use_dora", "a magnitude per output (DoRA)"},
    {"trainable_token_indices", "embedding rows that replace the base model's"},
    {"layer_replication", "repeated layers"},
    {"target_parameters", "LoRA on a parameter that is no module"},
    {"use_qalora", "pooled inputs (QALoRA)"},
    {"use_bdlora", "block-diagonal factors"},
    {"arrow_config", "Arrow routing"},
    {"alora_invocation_tokens", "an adapter that starts at a token (aLoRA)"},
    {"kasa_config", "KaSA"},
    {"monteclora_config", "MonteCLoRA"},
    {"velora_config", "VeLoRA"},
    {"megatron_config", "Megatron layers"},
};

constexpr Method kTensors[] = {
    {".lora_embedding_A", "LoRA on an embedding"},
    {".lora_embedding_B", "LoRA on an embedding"},
};

void refuse_type(const Json& root, const std::string& file) {
  const auto place = root.find("peft_type");
  require(place != nullptr && !place->is_null(), Errc::config_error, file,
          ": \"peft_type\" is missing");
  if (*place == "LORA") return;
  const auto same = [&place](const Method& method) { return *place == method.name; };
  const auto* method = std::find_if(std::begin(kTypes), std::end(kTypes), same);
  fail(Errc::unsupported, file, ": peft_type ", value_text(*place),
       method == std::end(kTypes) ? std::string() : " (" + std::string(method->meaning) + ")",
       " cannot be read, only \"LORA\" can");
}

}  // namespace

bool is_off(const Json& value) {
  return value.is_null() || value == false || value == "" ||
         (value.is_structured() && value.empty());
}

std::string value_text(const Json& value) {
  return value.is_string() ? in_quotes(value.get<std::string>()) : escaped(value.dump());
}

void refuse_methods(const Json& root, const std::string& file) {
  refuse_type(root, file);
  for (const Method& method : kSettings) {
    const auto place = root.find(method.name);
    if (place == nullptr || is_off(*place)) continue;
    fail(Errc::unsupported, file, ": \"", method.name, "\" is ", value_text(*place), ": ",
         method.meaning, " cannot be read");
  }
}

bool is_method_setting(std::string_view setting) {
  const auto same = [setting](const Method& method) { return setting == method.name; };
  return std::any_of(std::begin(kSettings), std::end(kSettings), same);
}

const char* method_of_tensor(std::string_view name) {
  for (const Method& method : kTensors) {
    if (name.ends_with(method.name)) return method.meaning;
  }
  return nullptr;
}

}  // namespace io
}  // namespace mole::inline MOLE_ABI
