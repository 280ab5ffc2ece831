// SPDX-License-Identifier: Apache-2.0
// The settings of an adapter, from its layers to the text of adapter_config.json.
#pragma once

#include <span>
#include <string>

#include "mole/io/peft.hpp"

namespace mole::inline MOLE_ABI {
namespace io {

/// What the settings must say about one layer.
struct LayerSettings {
  std::string path;
  Index rank = 0;
  double alpha = 0, scale = 0;
};

/// The alpha whose scale, as a reader computes it, is `scale`; the nearest one if there is none and
/// the scales are equal as floats. `what` starts the messages. Throws invalid_argument.
double alpha_for_scale(double scale, Index rank, bool use_rslora, const std::string& what);

/// Gives `config` the target modules, ranks, alphas and patterns of the layers, and returns it as
/// JSON with sorted keys. `config` settles the rest. Throws invalid_argument if a reader would not
/// find the same scales.
std::string settings_text(PeftConfig config, std::span<const LayerSettings> layers);

}  // namespace io
}  // namespace mole::inline MOLE_ABI
