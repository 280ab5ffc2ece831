// SPDX-License-Identifier: Apache-2.0
// Reading LoRA adapters as PEFT saves them: a folder with adapter_config.json and
// adapter_model.safetensors. A linear layer's adapter is
//
//   delta y = scale * (B (A x) + beta)    A [rank, d_in] ("down")   B [d_out, rank] ("up")
//   scale = alpha / rank, with rsLoRA alpha / sqrt(rank)            beta [d_out], with lora_bias
//
// A folder may also replace parts of the base model (modules_to_save, trained biases), and an
// adapter may belong to the base weight less its leading part (PiSSA, OLoRA): see peft_apply.hpp.
//
// Everything is checked before an adapter is returned: a folder loads whole or not at all. What a
// setting would change and this reader cannot follow is refused by the setting's name.
//
// Needs the compiled library.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "mole/core/config.hpp"
#include "mole/core/view.hpp"
#include "mole/io/safetensors.hpp"

namespace mole::inline MOLE_ABI {

/// conv1d is a linear layer whose base weight is stored [d_in, d_out]; A and B are the same.
enum class ModuleKind { linear, conv1d, embedding, other };

/// A module of the host's model, with the path it has there ("model.layers.0.mlp.down_proj").
/// The weight of an embedding is [d_in, d_out]: d_in rows of width d_out.
struct HostModule {
  std::string path;
  ModuleKind kind = ModuleKind::linear;
  Index d_in = 0, d_out = 0;
};

/// Modules named by a list (a name or its end after a dot) or by one regular expression.
struct ModuleNames {
  enum class Form { none, list, pattern };
  Form form = Form::none;
  std::vector<std::string> names;  ///< the pattern is the only entry
};

/// Which base weight an adapter belongs to.
enum class BaseChange {
  none,   ///< W itself
  pissa,  ///< W less its best approximation of the adapter's rank
  olora,  ///< W less scale * Q R, the first columns and rows of W = Q R
};

/// Trained biases of the base model: none, of every module, or of adapted modules.
enum class SavedBiases { none, all, lora_only };

/// The settings of adapter_config.json that this reader follows.
struct PeftConfig {
  Index rank = 8;
  double alpha = 8;
  std::string rank_from = "r", alpha_from = "lora_alpha";  ///< setting or option
  bool use_rslora = false;
  bool fan_in_fan_out = false;
  bool lora_bias = false;
  SavedBiases bias = SavedBiases::none;
  BaseChange base_change = BaseChange::none;
  ModuleNames target_modules, exclude_modules;
  std::vector<std::string> modules_to_save;
  std::vector<std::int64_t> layers_to_transform;  ///< empty: every layer
  std::vector<std::string> layers_pattern;
  std::vector<std::pair<std::string, Index>> rank_pattern;  ///< in file order: the first match wins
  std::vector<std::pair<std::string, double>> alpha_pattern;
  std::string base_model, task_type;        ///< remarks that a copy of the adapter keeps
  std::vector<std::string> unknown_fields;  ///< set in the file, unknown here, ignored
};

struct PeftOptions {
  std::vector<std::string> only;     ///< load these modules and look at no other; empty: all
  std::string adapter_name;          ///< of a folder with several; empty or "default": its root
  std::optional<double> lora_alpha;  ///< for a file without lora_alpha
  bool peft_defaults = false;        ///< a missing r or lora_alpha is 8, as in PEFT
  bool residual_base = false;  ///< the caller applies PiSSA's and OLoRA's change of the base weight
  bool exact_svd = false;      ///< pissa_niter_N may be undone by the exact decomposition
  bool allow_partial = false;  ///< unused tensors and missing modules are only reported
  bool allow_no_effect = false;  ///< no module applied, or every B is zero
  std::uint64_t max_config_bytes = 1'000'000;
  SafeTensorsLimits limits;
};

/// One adapted linear layer.
struct LoraModule {
  std::string path;
  ModuleKind kind = ModuleKind::linear;
  Index rank = 0, d_in = 0, d_out = 0;
  double alpha = 0;
  double scale = 0;                    ///< alpha / rank or alpha / sqrt(rank)
  std::string rank_from, alpha_from;   ///< for example `r`, `alpha_pattern "down_proj"`
  std::string down_tensor, up_tensor;  ///< names in the file
  std::string bias_tensor;             ///< of beta; empty: none
  Dtype stored_down = Dtype::f32, stored_up = Dtype::f32, stored_bias = Dtype::f32;
  BaseChange base_change = BaseChange::none;
};

/// A parameter of the base model that the adapter brings along.
struct Replacement {
  std::string path;       ///< of the module
  std::string parameter;  ///< its own name there: "weight", "bias"
  std::string tensor;     ///< name in the file
  Dtype stored = Dtype::f32;
  std::vector<Index> shape;
  std::string from;  ///< the setting that asks for it, for example `modules_to_save "lm_head"`
};

/// What a load did and did not do.
struct LoadReport {
  std::string folder;
  std::vector<LoraModule> applied;          ///< sorted by path
  std::vector<Replacement> replaced;        ///< sorted by path and parameter
  std::vector<std::string> redundant;       ///< second copies of saved biases, ignored
  std::vector<std::string> unused;          ///< tensors without use (allow_partial)
  std::vector<std::string> missing;         ///< modules without tensors (allow_partial)
  std::vector<std::string> skipped;         ///< modules of the file that `only` left out
  std::vector<std::string> unknown_fields;  ///< settings that were ignored
  std::vector<std::string> checks_off;      ///< what could not be checked, and why

  std::string to_text() const;
  /// One object of JSON with the members above as keys; docs/peft.md lists them.
  std::string to_json() const;
};

/// One adapter. A value: copies share the tensors' memory.
class PeftAdapter {
 public:
  PeftAdapter(PeftConfig config, LoadReport report, SafeTensors file)
      : config_(std::move(config)), report_(std::move(report)), file_(std::move(file)) {}

  const PeftConfig& config() const noexcept { return config_; }
  const LoadReport& report() const noexcept { return report_; }
  const SafeTensors& file() const noexcept { return file_; }
  const std::vector<LoraModule>& modules() const noexcept { return report_.applied; }
  const std::vector<Replacement>& replacements() const noexcept { return report_.replaced; }

  /// nullptr if the adapter does not touch the module.
  const LoraModule* find(std::string_view path) const noexcept;
  /// Throws not_found with the nearest paths.
  const LoraModule& at(std::string_view path) const;
  /// nullptr if the base model keeps its own.
  const Replacement* find_replacement(std::string_view path,
                                      std::string_view parameter) const noexcept;

  /// Copies A into [rank, d_in], B into [d_out, rank] or beta into [1, d_out], converted to float,
  /// double, f16 or bf16 with one rounding. Throws shape_mismatch; not_found if the module has no
  /// beta; numeric_error if a finite weight overflows T.
  template <class T>
  void read_down(const LoraModule& module, MatView<T> down) const;
  template <class T>
  void read_up(const LoraModule& module, MatView<T> up) const;
  template <class T>
  void read_bias(const LoraModule& module, MatView<T> bias) const;

  /// The same for a replacement: a vector is [1, n], more than two dimensions are [first, rest].
  template <class T>
  void read_replacement(const Replacement& replacement, MatView<T> out) const;

 private:
  PeftConfig config_;
  LoadReport report_;
  SafeTensors file_;
};

/// Loads an adapter. With the host's modules, paths and shapes are checked against them; without,
/// shapes come from the file and the report says which checks were off.
///
/// Throws config_error (a setting, or tensors that do not fit the settings), unsupported (a method
/// or storage this reader does not know, by name), shape_mismatch, numeric_error (NaN or infinity),
/// not_found, io_error, and what SafeTensors::open throws.
PeftAdapter load_peft(const std::string& folder, const std::vector<HostModule>& modules = {},
                      const PeftOptions& options = {});

}  // namespace mole::inline MOLE_ABI
