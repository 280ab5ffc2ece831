// SPDX-License-Identifier: Apache-2.0
#include "mole/io/peft_writer.hpp"

#include <algorithm>
#include <cmath>
#include <set>
#include <vector>

#include "io/file.hpp"
#include "io/new_folder.hpp"
#include "io/peft_folder.hpp"
#include "io/peft_keys.hpp"
#include "io/peft_settings.hpp"
#include "io/text.hpp"
#include "mole/io/safetensors_writer.hpp"

namespace mole::inline MOLE_ABI {
namespace {

using io::in_quotes;

void write_folder(const std::string& root, const PeftSaveOptions& options,
                  const std::string& settings, SafeTensorsWriter& tensors) {
  tensors.set_metadata("format", "pt");
  io::NewFolder folder(io::adapter_folder(root, options.adapter_name), options.overwrite);
  tensors.save(folder.path() + "/" + io::kWeightsFile);
  io::write_atomically(folder.path() + "/" + io::kConfigFile, std::string_view(settings));
  folder.commit({io::kWeightsFile, io::kConfigFile});
}

template <class T>
void check_finite(const std::string& what, const char* part, MatView<const T> matrix) {
  for (Index r = 0; r < matrix.rows; ++r) {
    for (Index c = 0; c < matrix.cols; ++c) {
      require(std::isfinite(widen<double>(matrix(r, c))), Errc::numeric_error, what, ": ", part,
              " [", r, ", ", c, "] is not finite");
    }
  }
}

template <class T>
void check_layer(const LoraWeights<T>& layer, bool with_bias) {
  const std::string what = in_quotes(layer.path);
  const bool plain = !layer.path.empty() && layer.path.find('\0') == std::string::npos &&
                     io::first_invalid_utf8(layer.path) == std::string::npos;
  require(plain, Errc::invalid_argument, "layers: the path ", what,
          " must be UTF-8, not empty and without NUL");
  require(layer.kind == ModuleKind::linear || layer.kind == ModuleKind::conv1d, Errc::unsupported,
          what, ": only linear and conv1d layers can be written");
  require(!layer.down.empty() && !layer.up.empty(), Errc::shape_mismatch, what, ": down is ",
          layer.down.rows, " x ", layer.down.cols, " and up is ", layer.up.rows, " x ",
          layer.up.cols, ", both must hold something");
  require_shape(what + ": down", layer.down, layer.down.rows, layer.down.cols);
  require_shape(what + ": up", layer.up, layer.up.rows, layer.down.rows);
  check_finite(what, "down", layer.down);
  check_finite(what, "up", layer.up);
  require((layer.bias.data != nullptr) == with_bias, Errc::invalid_argument, what,
          ": every layer has a bias or none, this one is unlike the first");
  if (!with_bias) return;
  require_shape(what + ": bias", layer.bias, 1, layer.up.rows);
  check_finite(what, "bias", layer.bias);
}

// The paths that modules_to_save must name.
std::vector<std::string> saved_paths(const PeftAdapter& adapter) {
  std::set<std::string> paths;
  for (const Replacement& replacement : adapter.replacements()) {
    if (replacement.from.starts_with("modules_to_save")) paths.insert(replacement.path);
  }
  return {paths.begin(), paths.end()};
}

}  // namespace

template <class T>
void save_peft(const std::string& folder,
               std::type_identity_t<std::span<const LoraWeights<T>>> layers,
               const PeftSaveOptions& options) {
  require(!layers.empty(), Errc::invalid_argument, "layers: an adapter needs at least one");
  PeftConfig config;
  config.use_rslora = options.use_rslora;
  config.base_model = options.base_model;
  config.task_type = options.task_type;
  config.lora_bias = layers.front().bias.data != nullptr;
  config.fan_in_fan_out = std::all_of(layers.begin(), layers.end(), [](const auto& layer) {
    return layer.kind == ModuleKind::conv1d;
  });
  SafeTensorsWriter tensors;
  std::set<std::string> paths;
  std::vector<io::LayerSettings> settings;
  for (const LoraWeights<T>& layer : layers) {
    check_layer(layer, config.lora_bias);
    require(paths.insert(layer.path).second, Errc::invalid_argument,
            "layers: ", in_quotes(layer.path), " comes twice");
    const double alpha = io::alpha_for_scale(layer.scale, layer.down.rows, options.use_rslora,
                                             in_quotes(layer.path));
    settings.push_back({layer.path, layer.down.rows, alpha, layer.scale});
    tensors.add<T>(io::peft_key(layer.path, io::kDownSuffix), layer.down);
    tensors.add<T>(io::peft_key(layer.path, io::kUpSuffix), layer.up);
    if (config.lora_bias) {
      tensors.add<T>(io::peft_key(layer.path, io::kBiasSuffix), layer.bias, {layer.bias.cols});
    }
  }
  write_folder(folder, options, io::settings_text(config, settings), tensors);
}

void save_peft(const std::string& folder, const PeftAdapter& adapter,
               const PeftSaveOptions& options) {
  require(!adapter.modules().empty(), Errc::invalid_argument,
          io::shown_path(adapter.report().folder), ": no layer was loaded, so none can be written");
  PeftConfig config = adapter.config();
  config.modules_to_save = saved_paths(adapter);
  SafeTensorsWriter tensors;
  std::vector<io::LayerSettings> settings;
  for (const LoraModule& module : adapter.modules()) {
    settings.push_back({module.path, module.rank, module.alpha, module.scale});
    tensors.add(adapter.file().at(module.down_tensor));
    tensors.add(adapter.file().at(module.up_tensor));
    if (!module.bias_tensor.empty()) tensors.add(adapter.file().at(module.bias_tensor));
  }
  for (const Replacement& replacement : adapter.replacements()) {
    tensors.add(adapter.file().at(replacement.tensor));
  }
  write_folder(folder, options, io::settings_text(config, settings), tensors);
}

#define MOLE_SAVE_AS(T)                                                           \
  template void save_peft<T>(const std::string&, std::span<const LoraWeights<T>>, \
                             const PeftSaveOptions&);
MOLE_SAVE_AS(float)
MOLE_SAVE_AS(double)
MOLE_SAVE_AS(bf16)
MOLE_SAVE_AS(f16)
#undef MOLE_SAVE_AS

}  // namespace mole::inline MOLE_ABI
