// SPDX-License-Identifier: Apache-2.0
// What PEFT can save and this reader does not follow: the one place that lists it. A method that
// becomes readable leaves its line here and enters the reader.
#pragma once

#include <string>
#include <string_view>

#include "io/json.hpp"

namespace mole::inline MOLE_ABI {
namespace io {

/// False, empty, null: a setting that is off.
bool is_off(const Json& value);

/// A JSON value for messages: text in quotes, everything else as JSON.
std::string value_text(const Json& value);

/// Throws unsupported if peft_type, or a setting that is on, belongs to a method that cannot be
/// read; config_error without peft_type. `file` starts the messages.
void refuse_methods(const Json& root, const std::string& file);

/// Whether `refuse_methods` knows the setting.
bool is_method_setting(std::string_view setting);

/// What a tensor is if it belongs to such a method, else nullptr.
const char* method_of_tensor(std::string_view name);

}  // namespace io
}  // namespace mole::inline MOLE_ABI
