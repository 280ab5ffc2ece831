// SPDX-License-Identifier: Apache-2.0
// Descriptions as JSON: an object with "kind", the fields, and an object for every part.
//
//   {"kind": "mixture", "router": {"kind": "top_k", "width": 512, "experts": 8, "k": 2},
//    "experts": {"kind": "lora_bank", "in": 512, "out": 512, "rank": [8, 8], "scale": [2.0, 2.0]}}
//
// Needs the compiled library.
#pragma once

#include <string>
#include <string_view>

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"

namespace mole::inline MOLE_ABI {

/// One line of UTF-8. Numbers read back with the same bits. Throws numeric_error for a number that
/// is not finite, format_error for a text that is not UTF-8, config_error for a name that is there
/// twice or is "kind".
std::string to_json(const Description& description);

/// `source` starts the messages. Throws format_error (not UTF-8, not JSON, a repeated key, nested
/// too deeply, not an object) and config_error (no "kind", a value that no field can have).
Description description_from_json(std::string_view json, const std::string& source);

}  // namespace mole::inline MOLE_ABI
