// SPDX-License-Identifier: Apache-2.0
// Results without exceptions: a value, or what went wrong.
//
//   const mole::Expected<mole::SafeTensors> file = mole::SafeTensors::try_open(path);
//   if (!file) return report(file.error().code(), file.error().message());
//   use(*file);
#pragma once

#include <new>
#include <optional>
#include <type_traits>
#include <utility>
#include <variant>

#include "mole/core/config.hpp"
#include "mole/core/error.hpp"

namespace mole::inline MOLE_ABI {

/// What went wrong: category and message, as `Error` says it. Copies share the text and never fail.
class Failure {
 public:
  explicit Failure(const Error& error) noexcept : code_(error.code()), error_(error) {}
  /// The text is a literal: nothing is allocated.
  Failure(Errc code, const char* literal) noexcept : code_(code), literal_(literal) {}

  Errc code() const noexcept { return code_; }
  const char* message() const noexcept { return error_ ? error_->what() : literal_; }

 private:
  Errc code_;
  std::optional<Error> error_;
  const char* literal_ = "";
};

/// A T or a Failure; `Expected<void>` holds nothing or a Failure.
template <class T>
class [[nodiscard]] Expected {
 public:
  using Value = std::conditional_t<std::is_void_v<T>, std::monostate, T>;
  static_assert(std::is_nothrow_move_constructible_v<Value>);

  Expected() noexcept requires(std::is_void_v<T>) {}
  Expected(Value value) noexcept  // NOLINT(google-explicit-constructor)
      : state_(std::in_place_index<0>, std::move(value)) {}
  Expected(Failure failure) noexcept  // NOLINT(google-explicit-constructor)
      : state_(std::in_place_index<1>, std::move(failure)) {}

  bool has_value() const noexcept { return state_.index() == 0; }
  explicit operator bool() const noexcept { return has_value(); }

  /// Only with a value.
  Value& operator*() & noexcept { return *std::get_if<0>(&state_); }
  const Value& operator*() const& noexcept { return *std::get_if<0>(&state_); }
  Value&& operator*() && noexcept { return std::move(*std::get_if<0>(&state_)); }
  Value* operator->() noexcept { return std::get_if<0>(&state_); }
  const Value* operator->() const noexcept { return std::get_if<0>(&state_); }

  /// Only without a value.
  const Failure& error() const noexcept { return *std::get_if<1>(&state_); }

 private:
  std::variant<Value, Failure> state_;
};

/// Calls f and turns what it throws into a Failure: an Error as it is, std::bad_alloc into
/// out_of_memory, anything else into internal.
template <class F>
Expected<std::invoke_result_t<F>> attempt(F&& f) noexcept {
  try {
    if constexpr (std::is_void_v<std::invoke_result_t<F>>) {
      std::forward<F>(f)();
      return {};
    } else {
      return std::forward<F>(f)();
    }
  } catch (const Error& error) {
    return Failure(error);
  } catch (const std::bad_alloc&) {
    return Failure(Errc::out_of_memory, "out of memory");
  } catch (...) {
    return Failure(Errc::internal, "unexpected exception");
  }
}

}  // namespace mole::inline MOLE_ABI
