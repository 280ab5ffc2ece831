// SPDX-License-Identifier: Apache-2.0
// AdaptedFfn: a feed-forward block whose matrices are mixed one by one with one routing.
//
//   u = act(G x + mixture_gate(x)) ∘ (U x + mixture_up(x))      y = D u + mixture_down(u)
//
//   x [tokens, in]   G, U [inner, in]   D [out, inner]   y [tokens, out]
//
// Without a gate u = act(U x + mixture_up(x)). Biases are optional. The router reads x and decides
// once; every mixture has its own bank. y is overwritten. With gates of 1 at one expert this is
// that expert's block; with more experts it differs from a mixture of blocks (FfnBank), which mixes
// after the activation.
//
// LLaVA-MoLE (Chen et al., 2024): LoraBank with HardTopKRouter of k = 1, or DenseRouter.
#pragma once

#include <algorithm>
#include <array>
#include <concepts>
#include <numeric>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "mole/core/config.hpp"
#include "mole/core/context.hpp"
#include "mole/core/params.hpp"
#include "mole/experts/expert_bank.hpp"
#include "mole/kernels/activation.hpp"
#include "mole/kernels/dense.hpp"
#include "mole/layers/layer_checks.hpp"
#include "mole/layers/layer_input.hpp"
#include "mole/routing/router.hpp"

namespace mole::inline MOLE_ABI {

template <Router R, ExpertBank B>
class AdaptedFfn {
 public:
  static_assert(std::same_as<typename R::Scalar, typename B::Scalar>, "one compute type");
  static_assert(!B::needs_base, "AdaptedFfn hands no base product to its banks");
  using Scalar = typename R::Scalar;
  using T = Scalar;
  using Buffers = typename R::Buffers;
  template <class V>
  using Carry = typename R::template Carry<V>;
  using RouterTape = typename R::Tape;

  /// The matrices in the order of all lists here. Without a gate the first is left out.
  enum Matrix { kGate, kUp, kDown };
  static constexpr std::array<std::string_view, 3> kNames = {"gate", "up", "down"};

  /// One matrix of weights and gradients, its experts. Of a gradient, what is empty is not
  /// computed.
  template <class V, class Experts>
  struct Projection {
    MatView<V> weight = {};  ///< [out, in] of the matrix
    MatView<V> bias = {};    ///< [1, out], or empty: none
    Experts experts;

    template <class F, class... P>
    static void visit(F&& f, P&... p) {
      f(Leaf{"weight"}, p.weight...);
      f(Leaf{"bias"}, p.bias...);
      visit_group<Experts>(Leaf{"experts"}, f, p.experts...);
    }
  };

  /// Weights, gradients or moments: router.*, gate.*, up.*, down.*.
  template <class V>
  struct Params {
    using Part = Projection<V, typename B::template Params<V>>;
    typename R::template Params<V> router;
    std::array<Part, 3> matrix = {};

    template <class F, class... P>
    static void visit(F&& f, P&... p) {
      visit_group<typename R::template Params<V>>(Leaf{"router"}, f, p.router...);
      for (std::size_t m = 0; m < 3; ++m) visit_group<Part>(Leaf{kNames[m]}, f, p.matrix[m]...);
    }
  };

  struct Weights {
    using Part = Projection<const T, typename B::Weights>;
    typename R::template Params<const T> router;
    std::array<Part, 3> matrix = {};
  };

  struct Prepared {
    struct Part {
      Panels<T> weight;
      MatView<const T> bias;
      typename B::Prepared experts;
    };
    typename R::Prepared router;
    std::array<Part, 3> matrix = {};
  };

  struct Tape {
    typename R::Tape router;
    std::array<typename B::Tape, 3> experts = {};
    RoutingTable<T> routing;
    MatView<T> inner;   ///< [max tokens, inner or 2 inner], before the activation
    MatView<T> active;  ///< [max tokens, inner], u
  };

  /// `banks`: of gate, up and down, or of up and down. Throws shape_mismatch when router and banks
  /// have different numbers of experts or the widths do not fit.
  AdaptedFfn(R router, std::vector<B> banks, Activation activation = Activation::silu);

  const R& router() const noexcept { return router_; }
  const B& experts(Matrix matrix) const noexcept { return banks_[matrix - first()]; }
  bool has_gate() const noexcept { return banks_.size() == 3; }
  Index input_width() const noexcept { return experts(kUp).input_width(); }
  Index inner_width() const noexcept { return experts(kDown).input_width(); }
  Index output_width() const noexcept { return experts(kDown).output_width(); }

  std::size_t prepared_bytes() const noexcept;
  std::size_t scratch_bytes(Index max_tokens, int workers) const noexcept;
  std::size_t tape_bytes(Index max_tokens) const noexcept;

  /// Throws shape_mismatch unless the weights are those of the config.
  Prepared prepare(const Weights& weights, Workspace& memory) const;
  Tape make_tape(Workspace& memory, Index max_tokens) const;

  /// Writes y. `tape` null is inference. No dropout. Throws before it writes y.
  void forward(const Prepared& prepared, const Buffers& buffers, const LayerInput<T>& input,
               const Carry<const T>& carry_in, MatView<T> y, const Carry<T>& carry_out, Tape* tape,
               const Context& context) const;

  /// `d_tape` holds the gradients that losses added; the banks add their gate gradients, then the
  /// router reads it. Adds into d_input and grad. Throws before it adds anything.
  void backward(const Weights& weights, const Buffers& buffers, const Tape& saved,
                const LayerInput<T>& input, const Carry<const T>& carry_in, MatView<const T> dy,
                const typename R::Tape& d_tape, const Carry<T>& d_carry_out,
                const LayerInputGradient<T>& d_input, const Params<T>& grad,
                const Carry<T>& d_carry_in, const Context& context) const;

 private:
  struct Rows {
    MatView<T> inner, active;
    std::span<std::int32_t> all;  // 0 ... tokens - 1
  };
  template <class Arena>
  Rows take_rows(Arena& arena, Index tokens) const {
    return {arena.template take<T>(tokens, inner_width() * (has_gate() ? 2 : 1)),
            arena.template take<T>(tokens, inner_width()),
            arena.template take<std::int32_t>(tokens)};
  }
  Index max_slots(Index tokens) const noexcept {
    return saturating_product(tokens, router_.max_per_token());
  }
  std::size_t first() const noexcept { return has_gate() ? kGate : kUp; }
  MatView<T> gate_of(MatView<T> inner) const noexcept { return inner.col_block(0, inner_width()); }
  MatView<T> up_of(MatView<T> inner) const noexcept {
    return has_gate() ? inner.col_block(inner_width(), inner_width()) : MatView<T>{};
  }
  /// The columns of `inner` that gate or up writes.
  MatView<T> columns(std::size_t matrix, MatView<T> inner) const noexcept {
    return matrix == kGate || !has_gate() ? gate_of(inner) : up_of(inner);
  }
  void check_weights(const Weights& weights) const;
  void check_gradient(const Params<T>& grad) const;
  void check_call(const LayerInput<T>& input, const char* name, MatView<const T> y) const;
  void check_backward(const Weights& weights, const Tape& saved, const LayerInput<T>& input,
                      MatView<const T> dy, const typename R::Tape& d_tape,
                      const LayerInputGradient<T>& d_input, const Params<T>& grad,
                      const Context& context) const;
  static MatView<T> router_gradient(const LayerInput<T>& input,
                                    const LayerInputGradient<T>& d_input) noexcept {
    return input.router_x.data != nullptr ? d_input.router_x : d_input.x;
  }
  void multiply_backward(std::size_t matrix, const Weights& weights, const Tape& saved,
                         MatView<const T> x, MatView<const T> dy, std::span<T> dgate, MatView<T> dx,
                         const Params<T>& grad, const Context& context) const;

  R router_;
  std::vector<B> banks_;
  Activation activation_;
};

template <Router R, ExpertBank B>
AdaptedFfn<R, B>::AdaptedFfn(R router, std::vector<B> banks, Activation activation)
    : router_(std::move(router)), banks_(std::move(banks)), activation_(activation) {
  require(banks_.size() == 2 || banks_.size() == 3, Errc::invalid_argument,
          "AdaptedFfn: expected banks of gate, up and down, or of up and down, got ",
          banks_.size());
  for (const B& bank : banks_) {
    require(bank.experts() == router_.experts(), Errc::shape_mismatch,
            "AdaptedFfn: the router has ", router_.experts(), " experts, a bank has ",
            bank.experts());
  }
  const auto is_inwards = [&](const B& bank) {
    return bank.input_width() == input_width() && bank.output_width() == inner_width();
  };
  for (std::size_t i = 0; i + 1 < banks_.size(); ++i) {
    require(is_inwards(banks_[i]), Errc::shape_mismatch, "AdaptedFfn: gate and up: expected ",
            input_width(), " -> ", inner_width(), ", got ", banks_[i].input_width(), " -> ",
            banks_[i].output_width());
  }
}

template <Router R, ExpertBank B>
std::size_t AdaptedFfn<R, B>::prepared_bytes() const noexcept {
  std::size_t bytes = router_.prepared_bytes();
  for (const B& bank : banks_) {
    ByteCounter counter;
    counter.take<T>(bank.output_width(), bank.input_width());
    counter.take<T>(1, bank.output_width());
    bytes += counter.bytes() + bank.prepared_bytes();
  }
  return bytes;
}

template <Router R, ExpertBank B>
std::size_t AdaptedFfn<R, B>::scratch_bytes(Index max_tokens, int workers) const noexcept {
  std::size_t banks = 0;
  for (const B& bank : banks_) {
    banks = std::max(banks, bank.scratch_bytes(max_tokens, max_slots(max_tokens), workers));
  }
  ByteCounter counter;
  take_rows(counter, max_tokens);
  return RoutingTable<T>::bytes(max_tokens, router_.experts(), router_.max_per_token()) +
         counter.bytes() + std::max(router_.scratch_bytes(max_tokens, workers), banks);
}

template <Router R, ExpertBank B>
std::size_t AdaptedFfn<R, B>::tape_bytes(Index max_tokens) const noexcept {
  ByteCounter counter;
  take_rows(counter, max_tokens);
  std::size_t bytes =
      router_.tape_bytes(max_tokens) + counter.bytes() +
      RoutingTable<T>::bytes(max_tokens, router_.experts(), router_.max_per_token());
  for (const B& bank : banks_) bytes += bank.tape_bytes(max_tokens, max_slots(max_tokens));
  return bytes;
}

template <Router R, ExpertBank B>
auto AdaptedFfn<R, B>::make_tape(Workspace& memory, Index max_tokens) const -> Tape {
  Tape tape;
  tape.router = router_.make_tape(memory, max_tokens);
  tape.routing = RoutingTable<T>(memory, max_tokens, router_.experts(), router_.max_per_token());
  const Rows rows = take_rows(memory, max_tokens);
  tape.inner = rows.inner;
  tape.active = rows.active;
  for (std::size_t m = first(); m < 3; ++m) {
    tape.experts[m] = banks_[m - first()].make_tape(memory, max_tokens, max_slots(max_tokens));
  }
  return tape;
}

template <Router R, ExpertBank B>
void AdaptedFfn<R, B>::check_weights(const Weights& weights) const {
  for (std::size_t m = first(); m < 3; ++m) {
    const B& bank = banks_[m - first()];
    require_shape(kNames[m], weights.matrix[m].weight, bank.output_width(), bank.input_width());
    if (weights.matrix[m].bias.data == nullptr) continue;
    require_shape(kNames[m], weights.matrix[m].bias, 1, bank.output_width());
  }
}

template <Router R, ExpertBank B>
void AdaptedFfn<R, B>::check_gradient(const Params<T>& grad) const {
  for (std::size_t m = first(); m < 3; ++m) {
    const B& bank = banks_[m - first()];
    const auto& part = grad.matrix[m];
    if (part.weight.data != nullptr) {
      require_shape(kNames[m], part.weight, bank.output_width(), bank.input_width());
    }
    if (part.bias.data != nullptr) require_shape(kNames[m], part.bias, 1, bank.output_width());
  }
}

template <Router R, ExpertBank B>
void AdaptedFfn<R, B>::check_call(const LayerInput<T>& input, const char* name,
                                  MatView<const T> y) const {
  require_shape("x", input.x, input.x.rows, input_width());
  require_shape(name, y, input.x.rows, output_width());
  require(input.dropout.data == nullptr, Errc::unsupported, "AdaptedFfn: dropout");
}

template <Router R, ExpertBank B>
auto AdaptedFfn<R, B>::prepare(const Weights& weights, Workspace& memory) const -> Prepared {
  check_weights(weights);
  Prepared prepared;
  prepared.router = router_.prepare(weights.router, memory);
  for (std::size_t m = first(); m < 3; ++m) {
    const auto& from = weights.matrix[m];
    auto& to = prepared.matrix[m];
    to.weight = pack_panels<T>(from.weight, memory.take<T>(from.weight.size()).data());
    if (from.bias.data != nullptr) {
      const MatView<T> bias = memory.take<T>(1, from.bias.cols);
      std::ranges::copy(from.bias.row(0), bias.data);
      to.bias = bias;
    }
    to.experts = banks_[m - first()].prepare(from.experts, memory);
  }
  return prepared;
}

template <Router R, ExpertBank B>
void AdaptedFfn<R, B>::forward(const Prepared& prepared, const Buffers& buffers,
                               const LayerInput<T>& input, const Carry<const T>& carry_in,
                               MatView<T> y, const Carry<T>& carry_out, Tape* tape,
                               const Context& context) const {
  check_call(input, "y", y);
  require_apart("y", y, "x", input.x);
  const Workspace::Frame frame(context.scratch);
  const Index count = input.x.rows;
  const bool recorded = tape != nullptr;
  require(!recorded || tape->active.rows >= count, Errc::limit_exceeded,
          "AdaptedFfn tape: made for ", recorded ? tape->active.rows : 0, " tokens, the call has ",
          count);
  require_scratch(context, scratch_bytes(count, context.workers));
  RoutingTable<T> scratch_table;
  if (!recorded) {
    scratch_table =
        RoutingTable<T>(context.scratch, count, router_.experts(), router_.max_per_token());
  }
  RoutingTable<T>& table = recorded ? tape->routing : scratch_table;
  Rows rows = take_rows(context.scratch, count);
  if (recorded) rows.inner = tape->inner.row_block(0, count);
  if (recorded) rows.active = tape->active.row_block(0, count);
  std::iota(rows.all.begin(), rows.all.end(), 0);

  router_.forward(prepared.router, buffers, input.tokens(), input.overrides, carry_in, table,
                  carry_out, recorded ? &tape->router : nullptr, context);
  const auto multiply = [&](std::size_t m, MatView<const T> x, MatView<T> to) {
    const auto& part = prepared.matrix[m];
    dense::forward<T>(part.weight, part.bias, x, to, context);
    banks_[m - first()].forward(part.experts, {.x = x}, table.view(), to,
                                recorded ? &tape->experts[m] : nullptr, context);
  };
  for (std::size_t m = first(); m < kDown; ++m) multiply(m, input.x, columns(m, rows.inner));
  gated::activate<T>(activation_, rows.all, gate_of(rows.inner), up_of(rows.inner), rows.active,
                     context);
  multiply(kDown, rows.active, y);
}

/// One matrix: gradients of its weights, its experts, its input, and part of those of the gates.
template <Router R, ExpertBank B>
void AdaptedFfn<R, B>::multiply_backward(std::size_t matrix, const Weights& weights,
                                         const Tape& saved, MatView<const T> x, MatView<const T> dy,
                                         std::span<T> dgate, MatView<T> dx, const Params<T>& grad,
                                         const Context& context) const {
  const auto& part = weights.matrix[matrix];
  const auto& to = grad.matrix[matrix];
  banks_[matrix - first()].backward(part.experts, saved.experts[matrix], {.x = x},
                                    saved.routing.view(), dy, dgate, {.x = dx}, to.experts,
                                    context);
  if (dx.data != nullptr) dense::input_gradient<T>(part.weight, dy, dx, context);
  if (to.weight.data != nullptr) dense::weight_gradient<T>(x, dy, to.weight, context);
  if (to.bias.data != nullptr) dense::bias_gradient<T>(dy, to.bias);
}

template <Router R, ExpertBank B>
void AdaptedFfn<R, B>::check_backward(const Weights& weights, const Tape& saved,
                                      const LayerInput<T>& input, MatView<const T> dy,
                                      const typename R::Tape& d_tape,
                                      const LayerInputGradient<T>& d_input, const Params<T>& grad,
                                      const Context& context) const {
  check_weights(weights);
  check_gradient(grad);
  check_call(input, "dy", dy);
  const Routing<T> routing = saved.routing.view();
  require_shape("x", input.x, routing.tokens, input_width());
  if (d_input.x.data != nullptr) require_shape("dx", d_input.x, routing.tokens, input_width());
  require_apart("dx", d_input.x, "x", input.x);
  require_apart("dx", d_input.x, "dy", dy);
  if constexpr (requires { &R::require_backward; }) {
    router_.require_backward(weights.router, saved.router, input.tokens(), routing, d_tape,
                             router_gradient(input, d_input), grad.router);
  }
  require_scratch(context, scratch_bytes(routing.tokens, context.workers));
  for (std::size_t m = first(); m < 3; ++m) {
    require_bank_params(banks_[m - first()], weights.matrix[m].experts, grad.matrix[m].experts,
                        context);
  }
}

template <Router R, ExpertBank B>
void AdaptedFfn<R, B>::backward(const Weights& weights, const Buffers& buffers, const Tape& saved,
                                const LayerInput<T>& input, const Carry<const T>& carry_in,
                                MatView<const T> dy, const typename R::Tape& d_tape,
                                const Carry<T>& d_carry_out, const LayerInputGradient<T>& d_input,
                                const Params<T>& grad, const Carry<T>& d_carry_in,
                                const Context& context) const {
  const Workspace::Frame frame(context.scratch);
  check_backward(weights, saved, input, dy, d_tape, d_input, grad, context);
  const Routing<T> routing = saved.routing.view();
  const Index count = routing.tokens;
  const Rows d_rows = take_rows(context.scratch, count);
  std::iota(d_rows.all.begin(), d_rows.all.end(), 0);
  std::fill_n(d_rows.active.data, d_rows.active.size(), T(0));
  const std::span<T> dgate = d_tape.gate.row(0);
  const MatView<T> inner = saved.inner.row_block(0, count);

  multiply_backward(kDown, weights, saved, saved.active.row_block(0, count), dy, dgate,
                    d_rows.active, grad, context);
  gated::activate_backward<T>(activation_, d_rows.all, gate_of(inner), up_of(inner), d_rows.active,
                              gate_of(d_rows.inner), up_of(d_rows.inner), context);
  for (std::size_t m = first(); m < kDown; ++m) {
    multiply_backward(m, weights, saved, input.x, columns(m, d_rows.inner), dgate, d_input.x, grad,
                      context);
  }
  router_.backward(weights.router, buffers, saved.router, input.tokens(), input.overrides, carry_in,
                   routing, d_tape, d_carry_out, router_gradient(input, d_input), grad.router,
                   d_carry_in, context);
}

}  // namespace mole::inline MOLE_ABI
