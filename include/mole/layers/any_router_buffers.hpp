// SPDX-License-Identifier: Apache-2.0
// AnyRouterBuffers: the buffers of every kind of router in one struct, and how one kind gets its
// own out of it, by the names of the members.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <type_traits>
#include <utility>

#include "mole/core/config.hpp"
#include "mole/core/error.hpp"
#include "mole/core/params.hpp"
#include "mole/core/view.hpp"

namespace mole::inline MOLE_ABI {

/// What a member means is said where the router is. A router takes the members that it has; views
/// that it has no use for must be empty.
template <class T>
struct AnyRouterBuffers {
  std::span<const T> selection_bias = {};  ///< [experts], top_k, deepseek
  MatView<const T> noise = {};             ///< [tokens, experts], noisy_top_k
  MatView<const T> uniform = {};           ///< [tokens, experts] top_k_capacity, [1, tokens] gshard
  MatView<const T> factor = {};            ///< [samples * tokens, width], uncertainty
  MatView<const std::int32_t> table = {};  ///< [ids, k], hash
  MatView<const std::int32_t> experts = {};  ///< [tokens or more, k], forced
  std::uint64_t call = 0;                    ///< random
  bool balance = true;                       ///< base, sinkhorn

  /// What is saved with a mixture.
  template <class F, class... B>
  static void visit(F&& f, B&... b) {
    f(Leaf{"selection_bias"}, b.selection_bias...);
  }

  /// f(name, get) for every member; get(buffers) is the member of that name, of any struct that
  /// has it.
  template <class F>
  static constexpr void members(F&& f) {
    f("selection_bias", [](auto& b) -> decltype((b.selection_bias)) { return b.selection_bias; });
    f("noise", [](auto& b) -> decltype((b.noise)) { return b.noise; });
    f("uniform", [](auto& b) -> decltype((b.uniform)) { return b.uniform; });
    f("factor", [](auto& b) -> decltype((b.factor)) { return b.factor; });
    f("table", [](auto& b) -> decltype((b.table)) { return b.table; });
    f("experts", [](auto& b) -> decltype((b.experts)) { return b.experts; });
    f("call", [](auto& b) -> decltype((b.call)) { return b.call; });
    f("balance", [](auto& b) -> decltype((b.balance)) { return b.balance; });
  }
};

namespace detail {

/// Converts to whatever a member is.
struct AnyMember {
  template <class X>
  operator X() const noexcept;  // NOLINT(google-explicit-constructor)
};

template <class B, std::size_t... I>
constexpr bool has_members(std::index_sequence<I...>) {
  return requires {
    B{(static_cast<void>(I), AnyMember{})...};
  };
}

/// Number of members of an aggregate.
template <class B, std::size_t N = 0>
constexpr std::size_t member_count() {
  if constexpr (has_members<B>(std::make_index_sequence<N + 1>())) {
    return member_count<B, N + 1>();
  } else {
    return N;
  }
}

/// Whether AnyRouterBuffers<T> has every member of B.
template <class T, class B>
constexpr bool covers_buffers() {
  if (!std::is_aggregate_v<B>) return false;
  std::size_t known = 0;
  AnyRouterBuffers<T>::members(
      [&](std::string_view, auto get) { known += std::is_invocable_v<decltype(get), B&> ? 1 : 0; });
  return known == member_count<B>();
}

template <class X>
bool is_given(const X& member) noexcept {
  if constexpr (requires { member.data == nullptr; }) {
    return member.data != nullptr;
  } else if constexpr (requires { member.empty(); }) {
    return !member.empty();
  } else {
    return false;
  }
}

template <class X>
void copy_member(std::string_view, const X& from, X& to) noexcept {
  to = from;
}
template <class V>
void copy_member(std::string_view name, const MatView<V>& from, std::span<V>& to) {
  require(from.rows <= 1, Errc::shape_mismatch, "buffers.", name, ": expected one row, got ",
          from.rows);
  to = from.rows == 1 ? from.row(0) : std::span<V>();
}

/// The buffers of one router. Throws invalid_argument for a view that it has no use for,
/// shape_mismatch for several rows where it reads one.
template <class B, class T>
B own_buffers(std::string_view router, const AnyRouterBuffers<T>& all) {
  B own{};
  AnyRouterBuffers<T>::members([&](std::string_view name, auto get) {
    if constexpr (std::is_invocable_v<decltype(get), B&>) {
      copy_member(name, get(all), get(own));
    } else {
      require(!is_given(get(all)), Errc::invalid_argument, "buffers.", name, ": a router of kind ",
              router, " does not read it");
    }
  });
  return own;
}

}  // namespace detail

}  // namespace mole::inline MOLE_ABI
