// SPDX-License-Identifier: Apache-2.0
// A small adapter and its base model, to be changed by one thing and loaded.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "io/file_builder.hpp"
#include "mole/io/peft.hpp"
#include "support/catch.hpp"

namespace mole::test {

using Json = nlohmann::ordered_json;

inline const std::string kQ = "base_model.model.model.layers.0.self_attn.q_proj";
inline const std::string kV = "base_model.model.model.layers.0.self_attn.v_proj";

// A small adapter with rank 2 on q_proj [6 -> 6] and v_proj [6 -> 4], and its base model.
struct Adapter {
  Json config = Json::parse(R"({"peft_type":"LORA","r":2,"lora_alpha":4,
                                "target_modules":["q_proj","v_proj"]})");
  std::vector<TestTensor> tensors = {
      {kQ + ".lora_A.weight", "F32", "[2,6]", floats(12)},
      {kQ + ".lora_B.weight", "F32", "[6,2]", floats(12)},
      {kV + ".lora_A.weight", "F32", "[2,6]", floats(12)},
      {kV + ".lora_B.weight", "F32", "[4,2]", floats(8)},
  };
  std::vector<HostModule> base = {
      {"model.embed_tokens", ModuleKind::embedding, 5, 6},
      {"model.layers.0.self_attn.q_proj", ModuleKind::linear, 6, 6},
      {"model.layers.0.self_attn.v_proj", ModuleKind::linear, 6, 4},
      {"model.layers.0.mlp.up_proj", ModuleKind::linear, 6, 7},
  };
  PeftOptions options;

  static std::string floats(std::size_t count) {
    std::vector<float> values(count);
    for (std::size_t i = 0; i < count; ++i) values[i] = 0.25f * static_cast<float>(i + 1);
    return raw(values);
  }
  TestTensor& q_down() { return tensors[0]; }
  TestTensor& q_up() { return tensors[1]; }
  TestTensor& v_up() { return tensors[3]; }

  void write(const TemporaryFolder& folder) const {
    folder.write("adapter_config.json", config.dump());
    folder.write("adapter_model.safetensors", container(tensors));
  }
  PeftAdapter load() const {
    const TemporaryFolder folder;
    write(folder);
    return load_peft(folder.path(), base, options);
  }
  PeftAdapter load_without_base() const {
    const TemporaryFolder folder;
    write(folder);
    return load_peft(folder.path(), {}, options);
  }
};

/// Checks that `load` throws this, and names the words, in one line.
template <class F>
void refused(Errc code, const std::vector<std::string>& words, F load) {
  try {
    load();
    FAIL_CHECK("accepted");
  } catch (const mole::Error& error) {
    const std::string message = error.what();
    INFO(message);
    CHECK(name(error.code()) == name(code));
    for (const std::string& word : words) {
      INFO(word);
      CHECK(message.find(word) != std::string::npos);
    }
    CHECK(message.find('\n') == std::string::npos);
  }
}

}  // namespace mole::test
