// SPDX-License-Identifier: Apache-2.0
// Writing LoRA adapters as PEFT reads them: adapter_config.json and adapter_model.safetensors.
//
//   std::vector<mole::LoraWeights<float>> layers;
//   layers.push_back({.path = "model.layers.0.mlp.down_proj", .scale = 2.0, .down = a, .up = b});
//   mole::save_peft<float>("adapters/style", layers);
//
// The settings name every layer by its full path: target_modules lists the paths, and a rank or
// alpha that differs from the most common one has a pattern of its own, anchored to the path. So
// the result depends neither on the order of the patterns nor on layers that were not written.
//
// Needs the compiled library.
#pragma once

#include <span>
#include <string>
#include <type_traits>

#include "mole/core/config.hpp"
#include "mole/core/view.hpp"
#include "mole/io/peft.hpp"

namespace mole::inline MOLE_ABI {

/// One adapted layer, in the caller's memory: delta y = scale * (B (A x) + beta).
template <class T>
struct LoraWeights {
  std::string path;                      ///< in the model, "model.layers.0.mlp.down_proj"
  ModuleKind kind = ModuleKind::linear;  ///< or conv1d
  double scale = 1;                      ///< above 0
  MatView<const T> down = {}, up = {};   ///< A [rank, d_in], B [d_out, rank]
  MatView<const T> bias = {};            ///< beta [1, d_out]: of every layer, or of none
};

struct PeftSaveOptions {
  std::string adapter_name;  ///< not empty and not "default": the subfolder of this name
  bool overwrite = false;    ///< an adapter in the folder is replaced; its other files stay
  /// Of new layers; a loaded adapter keeps its own.
  bool use_rslora = false;  ///< alpha = scale * sqrt(rank) instead of scale * rank
  std::string base_model, task_type;
};

/// Writes new layers; T is float, double, f16 or bf16 and becomes the stored type.
///
/// The file holds alpha, not the scale. Where no double gives exactly this scale, the nearest alpha
/// is written if its scale is the same as a float.
///
/// The folder is complete or untouched: everything is written to a new folder beside it, flushed,
/// checked by reading the settings back, and renamed. A folder that is replaced is exchanged in one
/// step where the file system can; elsewhere there is a moment without one. Its other files follow
/// one by one: a process that is killed then leaves the rest in a hidden folder beside it,
/// `.NAME.new-…`. A mount point cannot be exchanged, nor can the current directory.
///
/// Throws invalid_argument (no layers, a path that is empty, not UTF-8 or given twice, a scale that
/// cannot be written, some biases missing), shape_mismatch, numeric_error (a weight that is not
/// finite), unsupported (another kind of layer), state_error (the folder is not empty: option
/// overwrite; the current directory), io_error.
template <class T>
void save_peft(const std::string& folder,
               std::type_identity_t<std::span<const LoraWeights<T>>> layers,
               const PeftSaveOptions& options = {});

/// Writes a loaded adapter: the same tensors bit by bit, the same ranks, alphas and scales, saved
/// modules and biases. Layers that a partial load left out are not written. Throws as above.
void save_peft(const std::string& folder, const PeftAdapter& adapter,
               const PeftSaveOptions& options = {});

}  // namespace mole::inline MOLE_ABI
