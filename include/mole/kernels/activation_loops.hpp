// SPDX-License-Identifier: Apache-2.0
// Definitions of kernels/activation.hpp.
#pragma once

#include <cmath>
#include <type_traits>

#include "mole/kernels/activation.hpp"
#include "mole/kernels/math.hpp"

namespace mole::inline MOLE_ABI::gated {

/// act(v) and act'(v).
template <class T>
struct Activated {
  T value, slope;
};

template <class T>
Activated<T> silu(T v) noexcept {
  const T s = math::sigmoid(v);
  return {v * s, std::fma(v * s, T(1) - s, s)};
}

/// In double for float too: the rounded value has the same bits with every good math library.
template <class T>
Activated<T> gelu(T v) noexcept {
  constexpr double kRootHalf = 0.70710678118654752440, kDensityAt0 = 0.39894228040143267794;
  const double x = static_cast<double>(v);
  const double below = 0.5 * std::erfc(-x * kRootHalf);
  const double density = kDensityAt0 * std::exp(-0.5 * x * x);
  return {static_cast<T>(x * below), static_cast<T>(std::fma(x, density, below))};
}

template <class T>
Activated<T> gelu_tanh(T v) noexcept {
  constexpr T kCube = T(0.044715), kTwice = T(1.59576912160573071176);  // 2 √(2/π)
  const T square = v * v;
  const T s = math::sigmoid(kTwice * v * std::fma(kCube, square, T(1)));
  const T spread = s * (T(1) - s);
  if (spread == T(0)) return {v * s, s};
  return {v * s, std::fma(v * spread, kTwice * std::fma(3 * kCube, square, T(1)), s)};
}

template <class T>
Activated<T> relu(T v) noexcept {
  return v <= T(0) ? Activated<T>{T(0), T(0)} : Activated<T>{v, T(1)};
}

/// body(act), act a function of one number.
template <class T, class Body>
void with_activation(Activation activation, Body&& body) noexcept {
  switch (activation) {
    case Activation::silu: return body([](T v) noexcept { return silu(v); });
    case Activation::gelu: return body([](T v) noexcept { return gelu(v); });
    case Activation::gelu_tanh: return body([](T v) noexcept { return gelu_tanh(v); });
    case Activation::relu: return body([](T v) noexcept { return relu(v); });
  }
}

/// What an activation costs, in multiply-adds.
inline constexpr Index kActivationWork = 16;

/// body(row) for the listed rows, in parallel.
template <class Body>
void for_each_listed_row(Rows rows, Index work, const Context& context, Body&& body) {
  const auto tile = [&](Index first, Index count) {
    for (Index i = first; i < first + count; ++i) body(Index{rows[i]});
  };
  for_each_block(static_cast<Index>(rows.size()), kSlotTile, work, context, tile);
}

template <class T>
void activate(Activation activation, Rows rows, MatView<const T> gate, MatView<const T> up,
              MatView<T> active, const Context& context) noexcept {
  with_activation<T>(activation, [&](auto act) {
    for_each_listed_row(rows, gate.cols * kActivationWork, context, [&](Index r) {
      for (Index i = 0; i < gate.cols; ++i) active(r, i) = act(gate(r, i)).value;
      for (Index i = 0; i < up.cols; ++i) active(r, i) *= up(r, i);
    });
  });
}

template <class T>
void activate_backward(Activation activation, Rows rows, MatView<const T> gate, MatView<const T> up,
                       MatView<const T> d_active, MatView<T> d_gate, MatView<T> d_up,
                       const Context& context) noexcept {
  with_activation<T>(activation, [&](auto act) {
    for_each_listed_row(rows, gate.cols * kActivationWork, context, [&](Index r) {
      for (Index i = 0; i < gate.cols; ++i) {
        const Activated<T> at = act(gate(r, i));
        const T d = d_active(r, i);
        if (up.cols > 0) d_up(r, i) = d * at.value;
        d_gate(r, i) = (up.cols > 0 ? d * up(r, i) : d) * at.slope;
      }
    });
  });
}

}  // namespace mole::inline MOLE_ABI::gated
