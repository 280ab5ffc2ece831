// SPDX-License-Identifier: Apache-2.0
// Where an adapter's files lie.
#pragma once

#include <cstdint>
#include <string>

#include "mole/io/safetensors.hpp"

namespace mole::inline MOLE_ABI {
namespace io {

inline constexpr const char* kConfigFile = "adapter_config.json";
inline constexpr const char* kWeightsFile = "adapter_model.safetensors";

/// The folder of one adapter: PEFT keeps the adapter called default in the root, any other in a
/// subfolder of its name. Throws invalid_argument if the name is no name of a folder.
std::string adapter_folder(const std::string& root, const std::string& adapter_name);

/// The same for an adapter that must be there. Throws not_found, naming those that are.
std::string find_adapter(const std::string& root, const std::string& adapter_name);

/// Throws io_error (no folder), config_error (no configuration in it), limit_exceeded.
std::string read_config_text(const std::string& folder, std::uint64_t limit);

/// Throws not_found, unsupported (weights as a pickle, or in several files), config_error (no
/// tensors), and what SafeTensors::open throws.
SafeTensors open_weights(const std::string& folder, const SafeTensorsLimits& limits);

}  // namespace io
}  // namespace mole::inline MOLE_ABI
