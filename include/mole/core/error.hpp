// SPDX-License-Identifier: Apache-2.0
// What goes wrong and how it is said. Setup and the checked front door throw `Error`; kernels are
// noexcept and never see bad input.
#pragma once

#include <charconv>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

#include "mole/core/config.hpp"

namespace mole::inline MOLE_ABI {

/// Category of an error. The values are stable: the C interface returns them.
enum class Errc : int {
  invalid_argument = 1,  ///< an argument is outside its documented range
  shape_mismatch = 2,    ///< a matrix has other rows or columns than expected
  format_error = 3,      ///< a file breaks a rule of its format
  limit_exceeded = 4,    ///< a size is above a limit that an option can raise
  config_error = 5,      ///< a field of a configuration file is wrong
  unsupported = 6,       ///< well-formed, but this library cannot do it
  not_found = 7,         ///< a name is not there
  io_error = 8,          ///< the operating system refused
  numeric_error = 9,     ///< NaN or infinity where none is allowed
  out_of_memory = 10,    ///< the caller's memory is too small for the call
  state_error = 11,      ///< the call is not allowed now
  internal = 12,         ///< a defect of this library
};

/// Name of a category, for example "shape_mismatch".
constexpr std::string_view name(Errc code) noexcept {
  constexpr std::string_view kNames[] = {"",
                                         "invalid_argument",
                                         "shape_mismatch",
                                         "format_error",
                                         "limit_exceeded",
                                         "config_error",
                                         "unsupported",
                                         "not_found",
                                         "io_error",
                                         "numeric_error",
                                         "out_of_memory",
                                         "state_error",
                                         "internal"};
  return kNames[static_cast<int>(code)];
}

/// The one exception type of the library: a category and one line of text that names the argument,
/// what was expected and what came.
class Error : public std::runtime_error {
 public:
  Error(Errc code, const std::string& message) : std::runtime_error(message), code_(code) {}
  Errc code() const noexcept { return code_; }

 private:
  Errc code_;
};

namespace detail {

/// One word of a message: text as it is, numbers in the fewest digits that read back the same.
template <class T>
std::string text(const T& part) {
  if constexpr (std::is_convertible_v<const T&, std::string_view>) {
    return std::string(std::string_view(part));
  } else if constexpr (std::is_floating_point_v<T>) {
    char digits[64];
    return std::string(digits, std::to_chars(digits, digits + sizeof digits, part).ptr);
  } else {
    return std::to_string(part);
  }
}

}  // namespace detail

/// Throws `Error` with the parts joined into one message.
template <class... Parts>
[[noreturn]] void fail(Errc code, const Parts&... parts) {
  std::string message;
  (message.append(detail::text(parts)), ...);
  throw Error(code, message);
}

/// Throws unless `condition` holds. The parts are joined only when it fails.
template <class... Parts>
void require(bool condition, Errc code, const Parts&... parts) {
  if (!condition) fail(code, parts...);
}

}  // namespace mole::inline MOLE_ABI
