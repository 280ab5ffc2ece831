// SPDX-License-Identifier: Apache-2.0
// JSON documents: read strictly where parsers differ, and bounded; kept as a tree whose members
// stay in the order of the file and whose destruction never allocates, so that no lack of memory
// can end the process. The grammar is nlohmann-json's, through its events.
#pragma once

#include <concepts>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "mole/core/config.hpp"

namespace mole::inline MOLE_ABI {
namespace io {

struct JsonMember;

/// A value. Elements of a list are its range; an object has items() and find().
class Json {
 public:
  // NOLINTBEGIN(google-explicit-constructor)
  Json(std::nullptr_t = nullptr) noexcept;
  Json(std::same_as<bool> auto value) noexcept : Json(Value(value)) {}
  Json(double value) noexcept;
  Json(std::string value) noexcept;
  Json(const char* value);
  template <std::integral I>
  requires(!std::same_as<I, bool>) Json(I value)
  noexcept;
  template <class V>
  Json(const std::vector<V>& list);
  // NOLINTEND(google-explicit-constructor)
  // Moved only: a variant of vectors does not survive a copy that runs out of memory
  // (libstdc++ 12 takes it for valid).
  Json(Json&& other) noexcept;
  Json& operator=(Json&& other) noexcept;
  ~Json();

  static Json array();
  static Json object();

  bool is_null() const noexcept { return std::holds_alternative<std::monostate>(value_); }
  bool is_boolean() const noexcept { return std::holds_alternative<bool>(value_); }
  bool is_string() const noexcept { return std::holds_alternative<std::string>(value_); }
  bool is_array() const noexcept { return std::holds_alternative<Array>(value_); }
  bool is_object() const noexcept { return std::holds_alternative<Object>(value_); }
  bool is_structured() const noexcept { return is_array() || is_object(); }
  bool is_number_unsigned() const noexcept { return std::holds_alternative<std::uint64_t>(value_); }
  bool is_number_integer() const noexcept {
    return is_number_unsigned() || std::holds_alternative<std::int64_t>(value_);
  }
  bool is_number() const noexcept {
    return is_number_integer() || std::holds_alternative<double>(value_);
  }

  /// The value as bool, std::string, an integer or a double; the caller has looked at the kind.
  template <class T>
  T get() const;

  /// Elements of a list or members of an object.
  std::size_t size() const noexcept;
  bool empty() const noexcept { return size() == 0; }
  /// The elements of a list; none for anything else.
  const Json* begin() const noexcept;
  const Json* end() const noexcept;
  /// Returns the new element.
  Json& push_back(Json element);

  /// The members of an object in their order.
  const std::vector<JsonMember>& items() const;
  /// nullptr if there is none.
  const Json* find(std::string_view key) const noexcept;
  bool contains(std::string_view key) const noexcept { return find(key) != nullptr; }
  /// The member, added as null if there is none; null becomes an object.
  Json& operator[](std::string_view key);
  /// Adds a member that is not there yet, without looking.
  Json& add(std::string key, Json member);

  bool operator==(std::string_view text) const noexcept;
  bool operator==(std::same_as<bool> auto value) const noexcept {
    return is_boolean() && get<bool>() == value;
  }

  /// JSON text: on one line, or indented; non-ASCII characters as they are, or escaped. Bytes that
  /// are not UTF-8 become U+FFFD.
  std::string dump(int indent = -1, bool ascii = false) const;
  /// Orders the members of all objects by name.
  void sort();

 private:
  using Array = std::vector<Json>;
  using Object = std::vector<JsonMember>;
  using Value = std::variant<std::monostate, bool, std::int64_t, std::uint64_t, double, std::string,
                             Array, Object>;
  explicit Json(Value value) noexcept;
  void write(std::string& text, int indent, int depth, bool ascii) const;

  Value value_;
};

struct JsonMember {
  std::string name;
  Json data;

  const std::string& key() const noexcept { return name; }
  const Json& value() const noexcept { return data; }
};

template <std::integral I>
requires(!std::same_as<I, bool>) Json::Json(I value)
noexcept {
  if constexpr (std::is_signed_v<I>) {
    value_ = static_cast<std::int64_t>(value);
  } else {
    value_ = static_cast<std::uint64_t>(value);
  }
}

template <class V>
Json::Json(const std::vector<V>& list) : value_(Array(list.begin(), list.end())) {}

template <class T>
T Json::get() const {
  if constexpr (std::is_same_v<T, bool> || std::is_same_v<T, std::string>) {
    return std::get<T>(value_);
  } else {
    if (const auto* i = std::get_if<std::int64_t>(&value_)) return static_cast<T>(*i);
    if (const auto* u = std::get_if<std::uint64_t>(&value_)) return static_cast<T>(*u);
    return static_cast<T>(std::get<double>(value_));
  }
}

/// Parses a file that holds one object. `file` starts the messages. Throws format_error: not UTF-8,
/// NUL, not JSON (NaN and infinity by name), not an object, a repeated key, nested too deeply.
Json parse_json_object(std::string_view text, const std::string& file);

/// "a string", "a list": what a message calls a value of the wrong type; numbers as written.
std::string json_kind(const Json& value);

}  // namespace io
}  // namespace mole::inline MOLE_ABI
