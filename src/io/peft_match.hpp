// SPDX-License-Identifier: Apache-2.0
// Which modules an adapter's settings name, and with which rank, alpha and scale.
//
// In this order, the first rule that decides wins:
//   1. exclude_modules: a pattern must match the whole path; a list entry must be the path or its
//      end after a dot.
//   2. modules_to_save: an entry m excludes what `(^|.*\.)m($|\..*)` matches from the start.
//   3. target_modules as text: all-linear (in any case) takes every linear and conv1d module;
//      anything else is a pattern for the whole path.
//   4. target_modules as a list: the path itself is taken whatever its layer; its end after a dot
//      is taken subject to 5.
//   5. layers_to_transform: the layer is the first all-digit element with two elements before it
//      and one after; with layers_pattern P it is the number in the first `P.<number>.` that starts
//      at an element's border. No number, or one that is not listed: not taken.
//   6. rank and alpha, each on its own: the first pattern k for which `(.*\.)?(k)$` matches from
//      the start, else r and lora_alpha.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "io/pattern.hpp"
#include "mole/io/peft.hpp"

namespace mole::inline MOLE_ABI {
namespace io {

struct PeftMatch {
  bool matched = false;
  Index rank = 0;
  double alpha = 0, scale = 0;
  int rank_pattern = -1, alpha_pattern = -1;  ///< which pattern decided; -1: none
};

/// The settings with their patterns compiled; looks at `config`, which must outlive it.
class PeftMatcher {
 public:
  /// `file` starts the messages. Throws config_error and unsupported, naming the pattern.
  PeftMatcher(const PeftConfig& config, const std::string& file);

  /// Throws config_error if the scale does not fit a float.
  PeftMatch match(std::string_view path, ModuleKind kind) const;

  /// Whether target_modules and exclude_modules take the module; no rank or scale is looked up.
  bool matches(std::string_view path, ModuleKind kind) const {
    return !excluded(path) && targeted(path, kind);
  }

  /// The first entry of modules_to_save that covers the module; -1: none.
  int saved_by(std::string_view path) const;

  /// Which rank or alpha pattern matches none of the paths; empty if every one does.
  std::string useless_pattern(const std::vector<HostModule>& modules) const;

 private:
  bool excluded(std::string_view path) const;
  bool targeted(std::string_view path, ModuleKind kind) const;
  bool layer_wanted(std::string_view path) const;

  const PeftConfig& config_;
  std::string file_;
  std::optional<Pattern> exclude_, target_;
  bool all_linear_ = false;
  std::vector<Pattern> saved_, layers_, ranks_, alphas_;
};

}  // namespace io
}  // namespace mole::inline MOLE_ABI
