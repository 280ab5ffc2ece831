// SPDX-License-Identifier: Apache-2.0
#include "io/description_json.hpp"

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "io/text.hpp"
#include "mole/core/error.hpp"
#include "mole/io/description_json.hpp"

namespace mole::inline MOLE_ABI {
namespace io {
namespace {

constexpr const char* kKind = "kind";

void require_text(const std::string& text) {
  require(first_invalid_utf8(text) == std::string_view::npos, Errc::format_error, in_quotes(text),
          " is not UTF-8");
}

void require_finite(const std::string& name, double value) {
  require(std::isfinite(value), Errc::numeric_error, "field ", in_quotes(name),
          ": expected a finite number, got ", number_text(value));
}

Json json_of(const Description::Entry& entry) {
  return std::visit(
      [&]<class V>(const V& value) {
        if constexpr (std::is_same_v<V, std::string>) require_text(value);
        if constexpr (std::is_same_v<V, double>) require_finite(entry.name, value);
        if constexpr (std::is_same_v<V, std::vector<double>>) {
          for (const double number : value) require_finite(entry.name, number);
        }
        return Json(value);
      },
      entry.value);
}

void add(Json& object, const std::string& name, Json value) {
  require_text(name);
  require(!object.contains(name), Errc::config_error, "the name ", in_quotes(name),
          " is there twice");
  object[name] = std::move(value);
}

// Reads the values of one object.
class ValueReader {
 public:
  explicit ValueReader(std::string what) : what_(std::move(what)) {}

  Description::Value read(const Json& value) const {
    if (value.is_boolean()) return value.get<bool>();
    if (value.is_string()) return value.get<std::string>();
    if (value.is_number_integer()) return integer(value);
    if (value.is_number()) return value.get<double>();
    if (!value.is_array()) wrong("true, false, a number, a string or a list", value);
    return list(value);
  }

 private:
  [[noreturn]] void wrong(const char* expected, const Json& value) const {
    fail(Errc::config_error, what_, ": expected ", expected, ", found ", escaped(json_kind(value)));
  }

  std::int64_t integer(const Json& value) const {
    const bool too_large =
        value.is_number_unsigned() &&
        value.get<std::uint64_t>() > std::uint64_t{std::numeric_limits<std::int64_t>::max()};
    if (too_large) wrong("an integer of 64 bits with sign", value);
    return value.get<std::int64_t>();
  }

  Description::Value list(const Json& value) const {
    bool all_integers = true;
    for (const Json& element : value) {
      if (!element.is_number()) wrong("a list of numbers", element);
      all_integers = all_integers && element.is_number_integer();
    }
    if (!all_integers) {
      std::vector<double> numbers;
      for (const Json& element : value) numbers.push_back(element.get<double>());
      return numbers;
    }
    std::vector<std::int64_t> integers;
    for (const Json& element : value) integers.push_back(integer(element));
    return integers;
  }

  std::string what_;
};

}  // namespace

Json json_of(const Description& description) {
  require_text(description.kind);
  Json object = Json::object();
  object.add(kKind, description.kind);
  for (const Description::Entry& entry : description.fields)
    add(object, entry.name, json_of(entry));
  for (const DescriptionPart& part : description.parts) {
    add(object, part.name, json_of(part.description));
  }
  return object;
}

Description description_of(const Json& object, const std::string& where) {
  const auto kind = object.find(kKind);
  require(kind != nullptr, Errc::config_error, where, ": \"kind\" is missing");
  require(kind->is_string(), Errc::config_error, where, ": \"kind\": expected a string, found ",
          escaped(json_kind(*kind)));
  Description description;
  description.kind = kind->get<std::string>();
  for (const auto& item : object.items()) {
    if (item.key() == kKind) continue;
    const std::string what = where + ": field " + in_quotes(item.key());
    if (item.value().is_object()) {
      description.parts.push_back({item.key(), description_of(item.value(), what)});
    } else {
      description.fields.push_back({item.key(), ValueReader(what).read(item.value())});
    }
  }
  return description;
}

}  // namespace io

std::string to_json(const Description& description) {
  return io::json_of(description).dump();
}

Description description_from_json(std::string_view json, const std::string& source) {
  return io::description_of(io::parse_json_object(json, source), source);
}

}  // namespace mole::inline MOLE_ABI
