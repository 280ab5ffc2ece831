// SPDX-License-Identifier: Apache-2.0
// A small good adapter in a folder of its own, whose parts can be changed one by one.
#pragma once

#include <string>
#include <vector>

#include "io/file_builder.hpp"
#include "mole/io/peft.hpp"

namespace test::bad_inputs {

inline const std::string kQ = "model.layers.0.self_attn.q_proj";
inline const std::string kV = "model.layers.0.self_attn.v_proj";

inline std::string down_name(const std::string& path) {
  return "base_model.model." + path + ".lora_A.weight";
}
inline std::string up_name(const std::string& path) {
  return "base_model.model." + path + ".lora_B.weight";
}

/// `count` floats that are not zero.
inline std::string floats(std::size_t count) {
  std::vector<float> values(count);
  for (std::size_t i = 0; i < count; ++i) values[i] = 0.25f * static_cast<float>(i + 1);
  return mole::test::raw(values);
}

/// One setting of adapter_config.json as JSON text.
struct Setting {
  std::string field, value;
};

/// Rank 2 on q_proj [6 -> 6] and v_proj [6 -> 4].
struct AdapterCase {
  std::vector<Setting> settings = {{"peft_type", "\"LORA\""},
                                   {"r", "2"},
                                   {"lora_alpha", "4"},
                                   {"target_modules", "[\"q_proj\",\"v_proj\"]"}};
  std::vector<mole::test::TestTensor> tensors = {
      {down_name(kQ), "F32", "[2,6]", floats(12)},
      {up_name(kQ), "F32", "[6,2]", floats(12)},
      {down_name(kV), "F32", "[2,6]", floats(12)},
      {up_name(kV), "F32", "[4,2]", floats(8)},
  };
  std::vector<mole::HostModule> base = {
      {"model.embed_tokens", mole::ModuleKind::embedding, 5, 6},
      {kQ, mole::ModuleKind::linear, 6, 6},
      {kV, mole::ModuleKind::linear, 6, 4},
      {"model.layers.0.mlp.up_proj", mole::ModuleKind::linear, 6, 7},
  };
  mole::PeftOptions options;

  /// Changes a setting or adds it; without a value it is taken away.
  void set(const std::string& field, const std::string& value) {
    std::erase_if(settings, [&](const Setting& one) { return one.field == field; });
    if (!value.empty()) settings.push_back({field, value});
  }
  std::string config() const {
    std::string text;
    for (const Setting& one : settings) {
      text.append(text.empty() ? "{" : ",").append("\"" + one.field + "\":" + one.value);
    }
    return text + "}";
  }
  void write(const mole::test::TemporaryFolder& folder) const {
    folder.write("adapter_config.json", config());
    folder.write("adapter_model.safetensors", mole::test::container(tensors));
  }
  mole::PeftAdapter load(const mole::test::TemporaryFolder& folder) const {
    return mole::load_peft(folder.path(), base, options);
  }
};

}  // namespace test::bad_inputs
