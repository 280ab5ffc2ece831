// SPDX-License-Identifier: Apache-2.0
// From routers, banks and layers to their descriptions and back:
//
//   Description d = describe(router);      auto same = from_description<TopKRouter<float>>(d);
//
// Reading is strict: what is unknown, missing, repeated, of another type or out of range is refused
// by the name of the field. Works for every type with a DescribableConfig; see description.hpp.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/core/error.hpp"

namespace mole::inline MOLE_ABI {

/// Sizes in a description are at most this; two of them multiply without overflow.
inline constexpr Index kLargestDescribedSize = std::numeric_limits<std::int32_t>::max();

namespace detail {

/// A text from outside for a message: quoted, printable ASCII, cut.
inline std::string shown(std::string_view text) {
  constexpr std::size_t kLongest = 80;
  constexpr char kHex[] = "0123456789abcdef";
  std::string result = "\"";
  for (const char c : text) {
    if (result.size() > kLongest) return result + "...\"";
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte <= 0x7e) {
      result += c;
    } else {
      result.append({'\\', 'x', kHex[byte >> 4], kHex[byte & 15]});
    }
  }
  return result + '"';
}

template <class N>
std::string shown_list(const std::vector<N>& values) {
  std::string result = "a list of " + std::to_string(values.size());
  if (values.empty() || values.size() > 8) return result;
  for (std::size_t i = 0; i < values.size(); ++i)
    result += (i == 0 ? ": " : ", ") + text(values[i]);
  return result;
}

inline std::string shown_value(const Description::Value& value) {
  if (const auto* flag = std::get_if<bool>(&value)) return *flag ? "true" : "false";
  if (const auto* integer = std::get_if<std::int64_t>(&value)) return text(*integer);
  if (const auto* number = std::get_if<double>(&value)) return text(*number);
  if (const auto* word = std::get_if<std::string>(&value)) return shown(std::string_view(*word));
  if (const auto* list = std::get_if<std::vector<std::int64_t>>(&value)) return shown_list(*list);
  return shown_list(std::get<std::vector<double>>(value));
}

template <class V>
struct IsVector : std::false_type {};
template <class V>
struct IsVector<std::vector<V>> : std::true_type {};

template <class V>
Description::Value to_value(std::string_view what, const V& value) {
  if constexpr (std::is_same_v<V, bool>) {
    return value;
  } else if constexpr (NamedEnum<V>) {
    return std::string(enum_names(value)[static_cast<std::size_t>(value)]);
  } else if constexpr (std::is_integral_v<V>) {
    require(std::in_range<std::int64_t>(value), Errc::config_error, what,
            ": expected an integer of 64 bits with sign, got ", value);
    return static_cast<std::int64_t>(value);
  } else if constexpr (std::is_floating_point_v<V>) {
    return static_cast<double>(value);
  } else if constexpr (IsVector<V>::value) {
    using Element = typename V::value_type;
    using Wide = std::conditional_t<std::is_integral_v<Element>, std::int64_t, double>;
    static_assert(std::is_arithmetic_v<Element> && !std::is_same_v<Element, bool>);
    return std::vector<Wide>(value.begin(), value.end());
  } else {
    static_assert(std::is_convertible_v<const V&, std::string>, "not a type of a field");
    return std::string(value);
  }
}

[[noreturn]] inline void wrong_value(std::string_view what, std::string_view expected,
                                     const Description::Value& found) {
  fail(Errc::config_error, what, ": expected ", expected, ", found ", shown_value(found));
}

template <class N>
constexpr std::int64_t largest_integer() noexcept {
  if (std::is_same_v<N, Index>) return kLargestDescribedSize;
  return std::in_range<std::int64_t>(std::numeric_limits<N>::max())
             ? static_cast<std::int64_t>(std::numeric_limits<N>::max())
             : std::numeric_limits<std::int64_t>::max();
}

template <class N>
constexpr std::int64_t smallest_integer() noexcept {
  if (std::is_same_v<N, Index>) return -kLargestDescribedSize;
  return static_cast<std::int64_t>(std::numeric_limits<N>::min());
}

template <class N>
N to_integer(std::string_view what, std::int64_t value) {
  require(value >= smallest_integer<N>() && value <= largest_integer<N>(), Errc::config_error, what,
          ": expected an integer in ", smallest_integer<N>(), " ... ", largest_integer<N>(),
          ", found ", value);
  return static_cast<N>(value);
}

template <class N>
N to_number(std::string_view what, double value) {
  require(std::fabs(value) <= static_cast<double>(std::numeric_limits<N>::max()),
          Errc::config_error, what, ": expected a finite number, at most ",
          std::numeric_limits<N>::max(), " in size, found ", value);
  return static_cast<N>(value);
}

template <class E>
E to_enum(std::string_view what, const Description::Value& value) {
  const auto* word = std::get_if<std::string>(&value);
  const auto names = enum_names(E{});
  std::string known;
  for (std::size_t i = 0; i < names.size(); ++i) {
    if (word != nullptr && *word == names[i]) return static_cast<E>(i);
    known.append(i == 0 ? "" : ", ").append(shown(names[i]));
  }
  wrong_value(what, "one of " + known, value);
}

/// Throws config_error unless the value has the type of the field and fits it.
template <class V>
void from_value(std::string_view what, const Description::Value& value, V& out) {
  const auto* integer = std::get_if<std::int64_t>(&value);
  if constexpr (NamedEnum<V>) {
    out = to_enum<V>(what, value);
  } else if constexpr (std::is_integral_v<V> && !std::is_same_v<V, bool>) {
    if (integer == nullptr) wrong_value(what, "an integer", value);
    out = to_integer<V>(what, *integer);
  } else if constexpr (std::is_floating_point_v<V>) {
    const auto* number = std::get_if<double>(&value);
    if (number == nullptr && integer == nullptr) wrong_value(what, "a number", value);
    out = to_number<V>(what, number != nullptr ? *number : static_cast<double>(*integer));
  } else if constexpr (IsVector<V>::value) {
    using Element = typename V::value_type;
    const auto* integers = std::get_if<std::vector<std::int64_t>>(&value);
    const auto* numbers = std::get_if<std::vector<double>>(&value);
    const bool usable = integers != nullptr || (numbers != nullptr && !std::is_integral_v<Element>);
    if (!usable) {
      wrong_value(what, std::is_integral_v<Element> ? "a list of integers" : "a list of numbers",
                  value);
    }
    out.clear();
    for (std::size_t i = 0; integers != nullptr && i < integers->size(); ++i) {
      if constexpr (std::is_integral_v<Element>) {
        out.push_back(to_integer<Element>(what, (*integers)[i]));
      } else {
        out.push_back(to_number<Element>(what, static_cast<double>((*integers)[i])));
      }
    }
    for (std::size_t i = 0; numbers != nullptr && i < numbers->size(); ++i) {
      out.push_back(to_number<Element>(what, (*numbers)[i]));
    }
  } else {
    const auto* same =
        std::get_if<std::conditional_t<std::is_same_v<V, bool>, bool, std::string>>(&value);
    if (same == nullptr)
      wrong_value(what, std::is_same_v<V, bool> ? "true or false" : "text", value);
    out = *same;
  }
}

/// Throws config_error if a name is there twice or none of `known`.
inline void require_known(const Description& description,
                          const std::vector<std::string_view>& known_fields,
                          const std::vector<std::string_view>& known_parts) {
  const auto check = [&](const auto& items, const auto& known, const char* what) {
    for (std::size_t i = 0; i < items.size(); ++i) {
      std::string names;
      bool is_known = false;
      for (const std::string_view name : known) {
        is_known |= items[i].name == name;
        names.append(names.empty() ? "" : ", ").append(name);
      }
      require(is_known, Errc::config_error, shown(description.kind), ": ", what, " ",
              shown(items[i].name), " is unknown, expected ",
              names.empty() ? std::string("none") : "one of " + names);
      for (std::size_t j = 0; j < i; ++j) {
        require(items[i].name != items[j].name, Errc::config_error, shown(description.kind), ": ",
                what, " ", shown(items[i].name), " is there twice");
      }
    }
  };
  check(description.fields, known_fields, "field");
  check(description.parts, known_parts, "part");
}

template <DescribableConfig C>
std::vector<std::string_view> field_names() {
  std::vector<std::string_view> names;
  C config{};
  C::visit([&](const Field& field, auto&) { names.push_back(field.name); }, config);
  return names;
}

inline void require_kind(const Description& description, std::string_view kind) {
  require(description.kind == kind, Errc::config_error, "kind: expected ", shown(kind), ", found ",
          shown(description.kind));
}

/// make(), whose complaint about an argument becomes one about the description.
template <class F>
auto as_config_error(std::string_view kind, F make) {
  try {
    return make();
  } catch (const Error& error) {
    const bool about_config =
        error.code() == Errc::invalid_argument || error.code() == Errc::shape_mismatch;
    if (!about_config) throw;
    fail(Errc::config_error, shown(kind), ": ", error.what());
  }
}

}  // namespace detail

/// The fields of a config with their values. Throws config_error for an integer above 63 bits.
template <DescribableConfig C>
Description describe_config(const C& config) {
  Description description{.kind = std::string(C::kind()), .fields = {}, .parts = {}};
  C::visit(
      [&](const Field& field, const auto& value) {
        description.fields.push_back(
            {std::string(field.name), detail::to_value(field.name, value)});
      },
      config);
  return description;
}

/// The config a description stands for. Throws config_error that names the field, what was expected
/// and what was found: another kind, an unknown or repeated field, a missing required field, a
/// value of another type or outside the field's range, a part.
template <DescribableConfig C>
C config_from_description(const Description& description) {
  detail::require_kind(description, C::kind());
  detail::require_known(description, detail::field_names<C>(), {});
  C config{};
  C::visit(
      [&](const Field& field, auto& value) {
        const std::string what =
            detail::shown(description.kind) + ": field " + detail::shown(field.name);
        const Description::Value* found = description.find(field.name);
        if (found != nullptr) return detail::from_value(what, *found, value);
        require(!field.is_required, Errc::config_error, what, " is missing");
      },
      config);
  return config;
}

/// How a type is described and built again; specialised for layers, which are made of parts.
template <class X>
struct DescriptionOf {
  static Description describe(const X& x) { return describe_config(x.config()); }
  static X build(const Description& description) {
    return detail::as_config_error(X::Config::kind(), [&] {
      return X(config_from_description<typename X::Config>(description));
    });
  }
};

/// Description of a router, a bank or a layer; its weights are no part of it.
template <class X>
Description describe(const X& x) {
  return DescriptionOf<X>::describe(x);
}

/// The router, bank or layer of a description. Throws what config_from_description throws, and
/// config_error with the words of X's constructor for values that it refuses.
template <class X>
X from_description(const Description& description) {
  return DescriptionOf<X>::build(description);
}

}  // namespace mole::inline MOLE_ABI
