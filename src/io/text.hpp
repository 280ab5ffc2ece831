// SPDX-License-Identifier: Apache-2.0
// Names that come from files, made safe for a one-line message.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "mole/core/config.hpp"

namespace mole::inline MOLE_ABI {
namespace io {

/// Printable ASCII stays, every other byte becomes \xNN; cut after `limit` bytes.
std::string escaped(std::string_view text, std::size_t limit = 120);

/// The escaped text in double quotes.
std::string in_quotes(std::string_view text);

/// A path for messages: escaped, and long enough to be found again.
std::string shown_path(std::string_view path);

/// "[2, 6]".
std::string shape_text(const std::vector<Index>& shape);

/// Shortest decimal form that reads back as the same number.
std::string number_text(double value);

/// ` (nearest: "a", "b", "c")`: up to three names by edit distance, or nothing if there are none.
std::string nearest_text(std::string_view wanted, const std::vector<std::string_view>& names);

/// Position of the first byte that is not valid UTF-8, or npos.
std::size_t first_invalid_utf8(std::string_view text) noexcept;

}  // namespace io
}  // namespace mole::inline MOLE_ABI
