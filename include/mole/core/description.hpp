// SPDX-License-Identifier: Apache-2.0
// Descriptions: what a router, bank or layer is, as data that files and other languages can carry.
// A kind and named fields; a config lists its fields next to itself, once, in one short function:
//
//   static constexpr std::string_view kind() noexcept { return "top_k"; }
//   template <class F, class... C>
//   static void visit(F&& f, C&... c) {
//     f(Field::required("width"), c.width...);
//     f(Field{"k"}, c.k...);              // left out: the value of a default config
//   }
//
// A field is a bool, an integer, a floating-point number, a text, an enum that has `enum_names`, or
// a vector of integers or numbers. Names are part of the file format: they stay.
// mole/core/describe.hpp makes descriptions from such configs, and configs from descriptions.
#pragma once

#include <concepts>
#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>
#include <variant>
#include <vector>

#include "mole/core/config.hpp"

namespace mole::inline MOLE_ABI {

/// A field of a config: its name, and whether a description must have it.
struct Field {
  std::string_view name;
  bool is_required = false;

  static constexpr Field required(std::string_view name) noexcept { return {name, true}; }
};

/// Lists its fields and has a name for its kind.
template <class C>
concept DescribableConfig = requires(C config) {
  { C::kind() } -> std::convertible_to<std::string_view>;
  C::visit([](const Field&, auto&...) {}, config);
};

/// `enum_names(E)`, found beside the enum, gives the names of its values from 0 on.
template <class E>
concept NamedEnum = std::is_enum_v<E> && requires(E value) {
  enum_names(value)[0];
};

struct DescriptionPart;

struct Description {
  using Value = std::variant<bool, std::int64_t, double, std::string, std::vector<std::int64_t>,
                             std::vector<double>>;
  struct Entry {
    std::string name;
    Value value;
    bool operator==(const Entry&) const = default;
  };

  std::string kind;
  std::vector<Entry> fields;           ///< in the order of `visit`
  std::vector<DescriptionPart> parts;  ///< what it is made of: a mixture has a router, experts

  /// nullptr if there is none of this name.
  const Value* find(std::string_view name) const noexcept;
  const Description* part(std::string_view name) const noexcept;
};

struct DescriptionPart {
  std::string name;
  Description description;
};

inline bool operator==(const Description& a, const Description& b);
inline bool operator==(const DescriptionPart& a, const DescriptionPart& b) {
  return a.name == b.name && a.description == b.description;
}
inline bool operator==(const Description& a, const Description& b) {
  return a.kind == b.kind && a.fields == b.fields && a.parts == b.parts;
}

inline const Description::Value* Description::find(std::string_view name) const noexcept {
  for (const Entry& entry : fields) {
    if (entry.name == name) return &entry.value;
  }
  return nullptr;
}

inline const Description* Description::part(std::string_view name) const noexcept {
  for (const DescriptionPart& candidate : parts) {
    if (candidate.name == name) return &candidate.description;
  }
  return nullptr;
}

}  // namespace mole::inline MOLE_ABI
