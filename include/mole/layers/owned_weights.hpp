// SPDX-License-Identifier: Apache-2.0
// OwnedWeights: the parameters of a layer with the memory that holds them, each in the type in
// which it is stored. What a loader fills and a trainer trains.
#pragma once

#include <array>
#include <concepts>
#include <string_view>
#include <type_traits>
#include <utility>

#include "mole/core/config.hpp"
#include "mole/core/params.hpp"
#include "mole/core/workspace.hpp"
#include "mole/layers/adapted_linear.hpp"
#include "mole/layers/lora.hpp"
#include "mole/layers/mixture.hpp"

namespace mole::inline MOLE_ABI {

namespace detail {

template <class B>
struct StorageOf : std::type_identity<typename B::Scalar> {};
template <class B>
requires requires {
  typename B::Storage;
}
struct StorageOf<B> : std::type_identity<typename B::Storage> {};

}  // namespace detail

/// The parameters of a layer, writable. Specialised for every kind of layer.
template <class Layer>
struct StoredParams;

template <Router R, ExpertBank B>
requires std::same_as<typename R::Scalar, typename B::Scalar>
struct StoredParams<Mixture<R, B>> {
  using Layer = Mixture<R, B>;
  using T = typename R::Scalar;
  using W = typename detail::StorageOf<B>::type;
  static constexpr std::array<std::string_view, 0> kOptional = {};  ///< paths that may be absent

  typename R::template Params<T> router;
  typename B::template Params<W> experts;

  static std::size_t bytes(const Layer& layer) noexcept {
    return layer.router().params_bytes() + layer.experts().template params_bytes<W>();
  }
  static StoredParams make(const Layer& layer, Workspace& memory) {
    return {layer.router().make_params(memory), layer.experts().template make_params<W>(memory)};
  }
  void leave_out(std::string_view) noexcept {}

  template <class F, class... P>
  static void visit(F&& f, P&... p) {
    const Leaf router{"router"}, experts{"experts"};
    visit_group<typename R::template Params<T>>(router, f, p.router...);
    visit_group<typename B::template Params<W>>(experts, f, p.experts...);
  }
  operator typename Layer::Weights() const {  // NOLINT(google-explicit-constructor)
    return {router, experts};
  }
  operator typename Layer::template Params<T>() const  // NOLINT(google-explicit-constructor)
      requires(std::is_same_v<T, W>) {
    return {router, experts};
  }
};

template <class T, class W>
struct StoredParams<Lora<T, W>> : StoredParams<Mixture<UnitRouter<T>, LoraBank<T, W>>> {
  static StoredParams make(const Lora<T, W>& layer, Workspace& memory) {
    return {StoredParams<Mixture<UnitRouter<T>, LoraBank<T, W>>>::make(layer, memory)};
  }
};

template <class M>
struct StoredParams<AdaptedLinear<M>> {
  using Layer = AdaptedLinear<M>;
  using T = typename Layer::Scalar;
  using W = typename StoredParams<M>::W;
  static constexpr std::array<std::string_view, 1> kOptional = {"bias"};

  MatView<T> weight, bias;
  StoredParams<M> mixture;

  static std::size_t bytes(const Layer& layer) noexcept {
    ByteCounter counter;
    take_base(layer, counter);
    return counter.bytes() + StoredParams<M>::bytes(layer.mixture());
  }
  static StoredParams make(const Layer& layer, Workspace& memory) {
    const auto [weight, bias] = take_base(layer, memory);
    return {weight, bias, StoredParams<M>::make(layer.mixture(), memory)};
  }
  void leave_out(std::string_view path) noexcept {
    if (path == "bias") bias = {};
  }

  template <class F, class... P>
  static void visit(F&& f, P&... p) {
    f(Leaf{"weight"}, p.weight...);
    f(Leaf{"bias"}, p.bias...);
    StoredParams<M>::visit(f, p.mixture...);
  }
  operator typename Layer::Weights() const {  // NOLINT(google-explicit-constructor)
    return {weight, bias, mixture};
  }
  operator typename Layer::template Params<T>() const  // NOLINT(google-explicit-constructor)
      requires(std::is_same_v<T, W>) {
    return {weight, bias, mixture};
  }

 private:
  template <class Arena>
  static std::pair<MatView<T>, MatView<T>> take_base(const Layer& layer, Arena& arena) {
    const Index in = layer.input_width(), out = layer.output_width();
    const bool turned = layer.config().fan_in_fan_out;
    const MatView<T> weight = arena.template take<T>(turned ? in : out, turned ? out : in);
    return {weight, arena.template take<T>(1, out)};
  }
};

/// The parameters of a layer and their memory. Move-only.
template <class Layer>
class OwnedWeights {
 public:
  /// Uninitialised.
  explicit OwnedWeights(const Layer& layer) : memory_(StoredParams<Layer>::bytes(layer)) {
    Workspace workspace(memory_.span());
    params_ = StoredParams<Layer>::make(layer, workspace);
  }

  const StoredParams<Layer>& params() const noexcept { return params_; }
  /// Makes an optional tensor absent.
  void leave_out(std::string_view path) noexcept { params_.leave_out(path); }

 private:
  Buffer memory_;
  StoredParams<Layer> params_;
};

}  // namespace mole::inline MOLE_ABI
