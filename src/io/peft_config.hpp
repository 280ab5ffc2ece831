// SPDX-License-Identifier: Apache-2.0
// adapter_config.json: which settings count, which are refused, which are ignored.
#pragma once

#include <string>
#include <string_view>

#include "mole/io/peft.hpp"

namespace mole::inline MOLE_ABI {
namespace io {

/// `file` starts the messages. Throws format_error, config_error, unsupported.
PeftConfig parse_peft_config(std::string_view text, const std::string& file,
                             const PeftOptions& options);

}  // namespace io
}  // namespace mole::inline MOLE_ABI
