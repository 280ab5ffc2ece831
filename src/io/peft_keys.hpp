// SPDX-License-Identifier: Apache-2.0
// The names of an adapter's tensors: `base_model.model.` + module path + what it is.
//
//   .lora_A.weight  .lora_B.weight   a target's A and B;  .lora_B.bias with lora_bias
//   .base_layer.bias                 a target's trained bias (bias: all, lora_only)
//   .base_layer.weight               a target's saved base weight (a resized output head)
//   .<parameter>                     of a module in modules_to_save; .bias of any other (bias:
//   all);
//                                    .weight of a saved embedding or output head
//   ... .modules_to_save. ... .bias, ... .original_module. ... .bias    second copies (bias: all)
//
// Module names may end like a tensor's name, so names are read from the right.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "io/peft_match.hpp"
#include "mole/io/peft.hpp"

namespace mole::inline MOLE_ABI {
namespace io {

inline constexpr std::string_view kPeftPrefix = "base_model.model.";
inline constexpr std::string_view kDownSuffix = ".lora_A.weight";
inline constexpr std::string_view kUpSuffix = ".lora_B.weight";
inline constexpr std::string_view kBiasSuffix = ".lora_B.bias";

/// The full name of a module's tensor.
std::string peft_key(std::string_view path, std::string_view suffix);

/// The tensors of one adapted layer.
struct LoraTensors {
  const StoredTensor* down = nullptr;
  const StoredTensor* up = nullptr;
  const StoredTensor* bias = nullptr;
};

/// A tensor that replaces a parameter of the base model.
struct SavedTensor {
  std::string path, parameter, from;
  const StoredTensor* tensor = nullptr;
};

/// A file's tensors by use. Everything points into the file.
struct PeftTensors {
  std::map<std::string, LoraTensors, std::less<>> lora;
  std::vector<SavedTensor> saved;
  std::vector<const StoredTensor*> redundant, refused, unused;
  bool has_prefix = false;  ///< of any name
};

/// Gives every tensor of `file` its place. Kinds of modules come from `modules`; an unknown module
/// is taken as `kind`.
PeftTensors sort_peft_tensors(const SafeTensors& file, const PeftConfig& config,
                              const PeftMatcher& matcher,
                              const std::map<std::string_view, const HostModule*>& modules,
                              ModuleKind kind);

}  // namespace io
}  // namespace mole::inline MOLE_ABI
