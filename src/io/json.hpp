// SPDX-License-Identifier: Apache-2.0
// JSON documents from files: strict where parsers differ, and bounded.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "mole/core/config.hpp"

namespace mole::inline MOLE_ABI {
namespace io {

using Json = nlohmann::ordered_json;

/// Parses a file that holds one object. `file` starts the messages. Throws format_error: not UTF-8,
/// NUL, not JSON (NaN and infinity by name), not an object, a repeated key, nested too deeply.
Json parse_json_object(std::string_view text, const std::string& file);

/// "a string", "a list": what a message calls a value of the wrong type; numbers as written.
std::string json_kind(const Json& value);

}  // namespace io
}  // namespace mole::inline MOLE_ABI
