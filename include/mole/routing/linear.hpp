// SPDX-License-Identifier: Apache-2.0
// What a router with linear logits owns: weight [experts, width] and, if it has one, bias.
#pragma once

#include <algorithm>
#include <span>
#include <type_traits>

#include "mole/core/config.hpp"
#include "mole/core/params.hpp"
#include "mole/core/view.hpp"
#include "mole/core/workspace.hpp"
#include "mole/kernels/chain_product.hpp"

namespace mole::inline MOLE_ABI {

template <class V>
struct LinearParams {
  MatView<V> weight = {};  ///< [experts, width]
  MatView<V> bias = {};    ///< [1, experts], or empty: none

  template <class F, class... P>
  static void visit(F&& f, P&... p) {
    f(Leaf{"weight"}, p.weight...);
    f(Leaf{"bias"}, p.bias...);
  }
  operator LinearParams<const V>() const noexcept  // NOLINT(google-explicit-constructor)
      requires(!std::is_const_v<V>) {
    return {weight, bias};
  }
};

template <class T>
struct LinearPrepared {
  Panels<T> weight;
  std::span<const T> bias;  ///< [experts], or empty
};

/// The shape of a linear router, and what follows from it.
template <class T>
struct Linear {
  Index width = 0, experts = 0;
  bool bias = false;

  std::size_t params_bytes() const noexcept;
  /// Uninitialised parameters.
  LinearParams<T> make_params(Workspace& memory) const;

  std::size_t prepared_bytes() const noexcept;
  /// A packed copy. Throws what `check` throws.
  LinearPrepared<T> prepare(const LinearParams<const T>& params, Workspace& memory) const;

  /// Throws shape_mismatch or invalid_argument, naming the member.
  void check(const LinearParams<const T>& params) const;
  /// The same for gradients, any of which may be absent; that of a bias without the bias must be.
  void check_gradient(const LinearParams<T>& grad) const;
};

template <class T>
std::size_t Linear<T>::params_bytes() const noexcept {
  ByteCounter counter;
  counter.template take<T>(experts, width);
  counter.template take<T>(bias ? experts : 0);
  return counter.bytes();
}

template <class T>
LinearParams<T> Linear<T>::make_params(Workspace& memory) const {
  LinearParams<T> params;
  params.weight = memory.template take<T>(experts, width);
  if (bias) params.bias = memory.template take<T>(1, experts);
  return params;
}

template <class T>
std::size_t Linear<T>::prepared_bytes() const noexcept {
  return params_bytes();
}

template <class T>
void Linear<T>::check(const LinearParams<const T>& params) const {
  require_shape("weight", params.weight, experts, width);
  require_shape("bias", params.bias, bias ? 1 : 0, bias ? experts : 0);
}

template <class T>
void Linear<T>::check_gradient(const LinearParams<T>& grad) const {
  if (grad.weight.data != nullptr) require_shape("grad.weight", grad.weight, experts, width);
  if (grad.bias.data == nullptr) return;
  require_shape("grad.bias", grad.bias, bias ? 1 : 0, bias ? experts : 0);
}

template <class T>
LinearPrepared<T> Linear<T>::prepare(const LinearParams<const T>& params, Workspace& memory) const {
  check(params);
  const LinearParams<T> copy = make_params(memory);
  LinearPrepared<T> prepared;
  prepared.weight = pack_panels<T>(params.weight, copy.weight.data);
  if (bias) {
    const std::span<const T> from = params.bias.row(0);
    std::copy(from.begin(), from.end(), copy.bias.data);
    prepared.bias = copy.bias.row(0);
  }
  return prepared;
}

#ifndef MOLE_HEADER_ONLY
extern template struct Linear<float>;
extern template struct Linear<double>;
#endif

}  // namespace mole::inline MOLE_ABI
