// SPDX-License-Identifier: Apache-2.0
// The ExpertBank concept: adds the gated outputs of its experts.
//
//   y(row) += Σ_e gate(t, e) · f_e(x(row))        for the active slots of the routing
//
// Rows of x and y belong to tokens, or to slots (the inner matrices of a gated feed-forward
// expert). A bank may ask for the base product x Wᵀ (DoRA). Every requirement is explained in
// docs/bank_contract.md and tested by tests/contracts/bank_contract.hpp.
#pragma once

#include <algorithm>
#include <concepts>
#include <span>

#include "mole/core/config.hpp"
#include "mole/core/context.hpp"
#include "mole/core/view.hpp"
#include "mole/core/workspace.hpp"
#include "mole/routing/routing.hpp"

namespace mole::inline MOLE_ABI {

/// Of banks whose experts are a number in their config: a file must not make them fill the memory.
inline constexpr Index kMostExperts = 65536;

/// What the experts read. With `x_rows` slot, x has one row per slot; with `y_rows` slot, y has.
template <class T>
struct BankInput {
  MatView<const T> x;          ///< [tokens or slots, input width]
  MatView<const T> base = {};  ///< [rows of y, output width], x Wᵀ without bias; only if needs_base
  RowsBy x_rows = RowsBy::token;
  RowsBy y_rows = RowsBy::token;
  bool overwrite = false;  ///< y is written, not added to; rows without a slot become 0
};

/// Where the gradients of a BankInput are added. Empty members are not computed.
template <class T>
struct BankInputGradient {
  MatView<T> x = {};
  MatView<T> base = {};
};

/// Throws shape_mismatch unless the routing is for `experts` experts and x [., in] and y [., out]
/// have a row for every token or slot; without any, x and y need no width.
template <class T>
void require_bank_call(const BankInput<T>& input, const Routing<T>& routing, MatView<const T> y,
                       Index experts, Index in, Index out) {
  require(routing.experts == experts, Errc::shape_mismatch, "routing: expected ", experts,
          " experts, got ", routing.experts);
  const auto rows = [&](RowsBy by) {
    return by == RowsBy::token ? routing.tokens : routing.slots();
  };
  const auto fits = [](const char* name, MatView<const T> view, Index expected, Index width) {
    if (expected > 0 || view.rows > 0) require_shape(name, view, expected, width);
  };
  fits("x", input.x, rows(input.x_rows), in);
  fits("y", y, rows(input.y_rows), out);
}

/// The same for backward: dy like y, dgate [slots], dx like x or empty.
template <class T>
void require_bank_call(const BankInput<T>& input, const Routing<T>& routing, MatView<const T> dy,
                       std::span<const T> dgate, const BankInputGradient<T>& d_input, Index experts,
                       Index in, Index out) {
  require_bank_call(input, routing, dy, experts, in, out);
  require(static_cast<Index>(dgate.size()) >= routing.slots(), Errc::shape_mismatch,
          "dgate: expected ", routing.slots(), " slots, got ", dgate.size());
  if (d_input.x.data != nullptr) require_shape("dx", d_input.x, input.x.rows, in);
}

/// What forward does to y once nothing can fail any more.
template <class T>
void begin_output(const BankInput<T>& input, MatView<T> y) noexcept {
  for (Index row = 0; input.overwrite && row < y.rows; ++row) {
    std::ranges::fill(y.row(row), T(0));
  }
}

// clang-format off
template <class B>
concept ExpertBank =
    requires {
      typename B::Scalar;
      typename B::Config;
      typename B::template Params<typename B::Scalar>;
      typename B::Weights;
      typename B::Prepared;
      typename B::Tape;
      { B::needs_base } -> std::convertible_to<bool>;
    } &&
    requires(const B b, const typename B::Weights weights, const typename B::Prepared prepared,
             const BankInput<typename B::Scalar> input, const Routing<typename B::Scalar> routing,
             const MatView<typename B::Scalar> y, typename B::Tape* tape,
             const typename B::Tape saved, const MatView<const typename B::Scalar> dy,
             const std::span<typename B::Scalar> dgate,
             const BankInputGradient<typename B::Scalar> d_input,
             const typename B::template Params<typename B::Scalar> grad, Workspace& memory,
             const Context& context, Index n) {
      { b.input_width() } noexcept -> std::convertible_to<Index>;
      { b.output_width() } noexcept -> std::convertible_to<Index>;
      { b.experts() } noexcept -> std::convertible_to<Index>;
      { b.template params_bytes<typename B::Scalar>() } noexcept
          -> std::convertible_to<std::size_t>;
      { b.template make_params<typename B::Scalar>(memory) }
          -> std::same_as<typename B::template Params<typename B::Scalar>>;
      { b.prepared_bytes() } noexcept -> std::convertible_to<std::size_t>;
      { b.scratch_bytes(n, n, int{}) } noexcept -> std::convertible_to<std::size_t>;
      { b.tape_bytes(n, n) } noexcept -> std::convertible_to<std::size_t>;
      { b.prepare(weights, memory) } -> std::same_as<typename B::Prepared>;
      { b.make_tape(memory, n, n) } -> std::same_as<typename B::Tape>;
      b.forward(prepared, input, routing, y, tape, context);
      b.backward(weights, saved, input, routing, dy, dgate, d_input, grad, context);
    };
// clang-format on

}  // namespace mole::inline MOLE_ABI
