// SPDX-License-Identifier: Apache-2.0
// Descriptions as parts of larger JSON documents.
#pragma once

#include <string>

#include "io/json.hpp"
#include "mole/core/description.hpp"

namespace mole::inline MOLE_ABI {
namespace io {

/// Throws what to_json(description) throws.
Json json_of(const Description& description);

/// Throws config_error; `where` starts the messages.
Description description_of(const Json& object, const std::string& where);

}  // namespace io
}  // namespace mole::inline MOLE_ABI
