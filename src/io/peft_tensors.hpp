// SPDX-License-Identifier: Apache-2.0
// Shapes, types and values of an adapter's tensors, checked against settings and base model.
#pragma once

#include <string>

#include "io/peft_keys.hpp"
#include "io/peft_match.hpp"
#include "mole/io/peft.hpp"

namespace mole::inline MOLE_ABI {
namespace io {

/// The tensors of one layer; `host` is its base layer, or nullptr. True if they add anything (B or
/// beta is not all zero). Throws unsupported (dtype), shape_mismatch, numeric_error; `file` starts
/// the messages.
bool check_lora(const LoraTensors& tensors, const PeftMatch& match, const HostModule* host,
                const std::string& file);

/// A replacement against the base module, or nullptr. Throws as `check_lora`.
void check_saved(const SavedTensor& saved, const HostModule* host, const std::string& file);

}  // namespace io
}  // namespace mole::inline MOLE_ABI
