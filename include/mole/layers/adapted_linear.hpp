// SPDX-License-Identifier: Apache-2.0
// AdaptedLinear: a linear map with a mixture on top.
//
//   y = x Wᵀ + b + mixture(x)        x [tokens, in]   W [out, in]   b [1, out]   y [tokens, out]
//
// y is overwritten. Each output is one chain: over the inputs from 0, the bias, then the active
// slots. With fan_in_fan_out the weight is stored [in, out] (GPT-2's Conv1D).
#pragma once

#include <algorithm>
#include <utility>

#include "mole/core/config.hpp"
#include "mole/core/context.hpp"
#include "mole/core/description.hpp"
#include "mole/core/params.hpp"
#include "mole/kernels/dense.hpp"
#include "mole/layers/mixture.hpp"

namespace mole::inline MOLE_ABI {

template <class M>
class AdaptedLinear {
 public:
  using Scalar = typename M::Scalar;
  using T = Scalar;
  using Buffers = typename M::Buffers;
  template <class V>
  using Carry = typename M::template Carry<V>;
  using Tape = typename M::Tape;
  using RouterTape = typename M::RouterTape;
  using ExpertTape = typename M::ExpertTape;

  struct Config {
    bool fan_in_fan_out = false;  ///< the base weight is stored [in, out]

    static constexpr std::string_view kind() noexcept { return "adapted_linear"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field{"fan_in_fan_out"}, c.fan_in_fan_out...);
    }
  };

  /// As gradients: a member left empty is frozen.
  template <class V>
  struct Params {
    MatView<V> weight;  ///< [out, in], or [in, out] with fan_in_fan_out
    MatView<V> bias;    ///< [1, out], or empty
    typename M::template Params<V> mixture;

    template <class F, class... P>
    static void visit(F&& f, P&... p) {
      f(Leaf{"weight"}, p.weight...);
      f(Leaf{"bias"}, p.bias...);
      M::template Params<V>::visit(f, p.mixture...);
    }
  };

  struct Weights {
    MatView<const T> weight;
    MatView<const T> bias;
    typename M::Weights mixture;

    template <class F, class... P>
    static void visit(F&& f, P&... p) {
      f(Leaf{"weight"}, p.weight...);
      f(Leaf{"bias"}, p.bias...);
      M::Weights::visit(f, p.mixture...);
    }
  };

  struct Prepared {
    Panels<T> weight;
    MatView<const T> bias;  ///< [1, out], or empty
    typename M::Prepared mixture;
  };

  explicit AdaptedLinear(M mixture, Config config = {})
      : mixture_(std::move(mixture)), config_(config) {}

  const Config& config() const noexcept { return config_; }
  const M& mixture() const noexcept { return mixture_; }
  const auto& router() const noexcept { return mixture_.router(); }
  Index input_width() const noexcept { return mixture_.input_width(); }
  Index output_width() const noexcept { return mixture_.output_width(); }

  std::size_t prepared_bytes() const noexcept;
  std::size_t scratch_bytes(Index max_tokens, int workers) const noexcept;
  std::size_t tape_bytes(Index max_tokens) const noexcept {
    return mixture_.tape_bytes(max_tokens);
  }

  /// Throws shape_mismatch unless weight and bias fit.
  Prepared prepare(const Weights& weights, Workspace& memory) const;
  Tape make_tape(Workspace& memory, Index max_tokens) const {
    return mixture_.make_tape(memory, max_tokens);
  }
  RoutingTable<T> make_table(Workspace& memory, Index max_tokens) const {
    return mixture_.make_table(memory, max_tokens);
  }

  void route(const Prepared& prepared, const Buffers& buffers, const LayerInput<T>& input,
             const Carry<const T>& carry_in, RoutingTable<T>& table, const Carry<T>& carry_out,
             typename M::RouterTape* tape, const Context& context) const {
    mixture_.route(prepared.mixture, buffers, input, carry_in, table, carry_out, tape, context);
  }

  /// y = x Wᵀ + b + mixture for a finished routing. Shapes and scratch are checked before y is
  /// written; if the bank refuses its tape, y holds the base product.
  void apply(const Prepared& prepared, const LayerInput<T>& input, const Routing<T>& routing,
             MatView<T> y, typename M::ExpertTape* tape, const Context& context) const;

  void forward(const Prepared& prepared, const Buffers& buffers, const LayerInput<T>& input,
               const Carry<const T>& carry_in, MatView<T> y, const Carry<T>& carry_out, Tape* tape,
               const Context& context) const;

  void forward(const Prepared& prepared, const LayerInput<T>& input, MatView<T> y, Tape* tape,
               const Context& context) const requires std::same_as<Carry<T>, None> {
    forward(prepared, Buffers{}, input, {}, y, {}, tape, context);
  }

  /// As Mixture::backward; also adds dW and db where grad has them.
  void backward(const Weights& weights, const Buffers& buffers, const Tape& saved,
                const LayerInput<T>& input, const Carry<const T>& carry_in, MatView<const T> dy,
                const typename M::RouterTape& d_tape, const Carry<T>& d_carry_out,
                const LayerInputGradient<T>& d_input, const Params<T>& grad,
                const Carry<T>& d_carry_in, const Context& context) const;

  void backward(const Weights& weights, const Tape& saved, const LayerInput<T>& input,
                MatView<const T> dy, const typename M::RouterTape& d_tape,
                const LayerInputGradient<T>& d_input, const Params<T>& grad,
                const Context& context) const requires std::same_as<Carry<T>, None> {
    backward(weights, Buffers{}, saved, input, {}, dy, d_tape, {}, d_input, grad, {}, context);
  }

 private:
  /// Throws shape_mismatch unless the members that are there fit.
  template <class V>
  void check_base(MatView<V> weight, MatView<V> bias) const;
  /// The weight as [out, in]: itself, or its transpose in scratch.
  MatView<const T> upright(MatView<const T> weight, const Context& context) const;

  M mixture_;
  Config config_;
};

template <class M>
std::size_t AdaptedLinear<M>::prepared_bytes() const noexcept {
  ByteCounter counter;
  counter.take<T>(output_width(), input_width());
  counter.take<T>(1, output_width());
  return counter.bytes() + mixture_.prepared_bytes();
}

template <class M>
std::size_t AdaptedLinear<M>::scratch_bytes(Index max_tokens, int workers) const noexcept {
  ByteCounter counter;
  if (M::needs_base) {
    counter.take<T>(saturating_product(2, max_tokens), output_width());
    counter.take<T>(output_width(), input_width());
  }
  if (config_.fan_in_fan_out) counter.take<T>(output_width(), input_width());
  return counter.bytes() + mixture_.scratch_bytes(max_tokens, workers);
}

template <class M>
template <class V>
void AdaptedLinear<M>::check_base(MatView<V> weight, MatView<V> bias) const {
  const Index in = input_width(), out = output_width();
  if (weight.data != nullptr && config_.fan_in_fan_out) {
    require_shape("weight (fan_in_fan_out)", weight, in, out);
  } else if (weight.data != nullptr) {
    require_shape("weight", weight, out, in);
  }
  if (bias.data != nullptr) require_shape("bias", bias, 1, out);
}

template <class M>
auto AdaptedLinear<M>::prepare(const Weights& weights, Workspace& memory) const -> Prepared {
  const Index in = input_width(), out = output_width();
  require(weights.weight.data != nullptr, Errc::invalid_argument,
          "AdaptedLinear: the base weight is missing");
  check_base(weights.weight, weights.bias);
  T* packed = memory.take<T>(out * in).data();
  Panels<T> panels{packed, in, out};
  if (config_.fan_in_fan_out) {
    for (Index p = 0; p < panels.count(); ++p) {
      const Index width = panels.panel(p).cols;
      for (Index k = 0; k < in; ++k) {
        std::copy_n(weights.weight.row(k).data() + p * kPanel, width,
                    packed + p * kPanel * in + k * width);
      }
    }
  } else {
    pack_panels(weights.weight, packed);
  }
  const MatView<T> bias = memory.take<T>(1, out);
  if (weights.bias.data != nullptr) std::ranges::copy(weights.bias.row(0), bias.data);
  return {panels, weights.bias.data != nullptr ? MatView<const T>(bias) : MatView<const T>{},
          mixture_.prepare(weights.mixture, memory)};
}

template <class M>
auto AdaptedLinear<M>::upright(MatView<const T> weight, const Context& context) const
    -> MatView<const T> {
  if (!config_.fan_in_fan_out) return weight;
  const MatView<T> turned = context.scratch.take<T>(weight.cols, weight.rows);
  for (Index o = 0; o < turned.rows; ++o) {
    for (Index i = 0; i < turned.cols; ++i) turned(o, i) = weight(i, o);
  }
  return turned;
}

template <class M>
void AdaptedLinear<M>::apply(const Prepared& prepared, const LayerInput<T>& input,
                             const Routing<T>& routing, MatView<T> y, typename M::ExpertTape* tape,
                             const Context& context) const {
  Workspace::Frame frame(context.scratch);
  MatView<T> base;
  if constexpr (M::needs_base) base = context.scratch.take<T>(y.rows, y.cols);
  mixture_.check_apply(input, routing, y, context);
  LayerInput<T> with_base = input;
  if constexpr (M::needs_base) {
    dense::forward<T>(prepared.weight, {}, input.x, base, context);
    for (Index t = 0; t < y.rows; ++t) {
      for (Index n = 0; n < y.cols; ++n) {
        y(t, n) = prepared.bias.empty() ? base(t, n) : base(t, n) + prepared.bias(0, n);
      }
    }
    with_base.base = base;
  } else {
    dense::forward<T>(prepared.weight, prepared.bias, input.x, y, context);
  }
  mixture_.apply(prepared.mixture, with_base, routing, y, tape, context);
}

template <class M>
void AdaptedLinear<M>::forward(const Prepared& prepared, const Buffers& buffers,
                               const LayerInput<T>& input, const Carry<const T>& carry_in,
                               MatView<T> y, const Carry<T>& carry_out, Tape* tape,
                               const Context& context) const {
  Workspace::Frame frame(context.scratch);
  RoutingTable<T> scratch_table;
  if (tape == nullptr) scratch_table = make_table(context.scratch, input.x.rows);
  RoutingTable<T>& table = tape != nullptr ? tape->routing : scratch_table;
  route(prepared, buffers, input, carry_in, table, carry_out,
        tape != nullptr ? &tape->router : nullptr, context);
  apply(prepared, input, table.view(), y, tape != nullptr ? &tape->experts : nullptr, context);
}

template <class M>
void AdaptedLinear<M>::backward(const Weights& weights, const Buffers& buffers, const Tape& saved,
                                const LayerInput<T>& input, const Carry<const T>& carry_in,
                                MatView<const T> dy, const typename M::RouterTape& d_tape,
                                const Carry<T>& d_carry_out, const LayerInputGradient<T>& d_input,
                                const Params<T>& grad, const Carry<T>& d_carry_in,
                                const Context& context) const {
  require(weights.weight.data != nullptr, Errc::invalid_argument,
          "AdaptedLinear: the base weight is missing");
  check_base(weights.weight, weights.bias);
  check_base(grad.weight, grad.bias);
  Workspace::Frame frame(context.scratch);
  const MatView<const T> weight = upright(weights.weight, context);
  LayerInput<T> with_base = input;
  LayerInputGradient<T> d_mixture = d_input;
  MatView<const T> d_product = dy;  // gradient of x Wᵀ
  if constexpr (M::needs_base) {
    const MatView<T> base = context.scratch.take<T>(dy.rows, dy.cols);
    const MatView<T> d_base = context.scratch.take<T>(dy.rows, dy.cols);
    Workspace::Frame packing(context.scratch);
    const Panels<T> panels =
        pack_panels(weight, context.scratch.take<T>(weight.rows * weight.cols).data());
    dense::forward<T>(panels, {}, input.x, base, context);
    for (Index t = 0; t < dy.rows; ++t) std::ranges::copy(dy.row(t), d_base.row(t).begin());
    with_base.base = base;
    d_mixture.base = d_base;
    d_product = d_base;
  }
  mixture_.backward(weights.mixture, buffers, saved, with_base, carry_in, dy, d_tape, d_carry_out,
                    d_mixture, grad.mixture, d_carry_in, context);
  if (d_input.x.data != nullptr) dense::input_gradient<T>(weight, d_product, d_input.x, context);
  if (grad.weight.data != nullptr && config_.fan_in_fan_out) {
    dense::weight_gradient<T>(d_product, input.x, grad.weight, context);
  } else if (grad.weight.data != nullptr) {
    dense::weight_gradient<T>(input.x, d_product, grad.weight, context);
  }
  if (grad.bias.data != nullptr) dense::bias_gradient<T>(dy, grad.bias);
}

}  // namespace mole::inline MOLE_ABI
