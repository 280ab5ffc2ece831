// SPDX-License-Identifier: Apache-2.0
// FilmBank: experts that modulate their input by linear maps of it (feature-wise linear
// modulation).
//
//   y_t += Σ_e gate_te M_e(x_t)      M_e(x) = (Γ_e x + γ_e) ∘ x + (Ξ_e x + ξ_e)
//
//   x [tokens, width]   Γ = gamma_weight, Ξ = beta_weight [experts · width, width]   γ =
//   gamma_bias, ξ = beta_bias [experts, width]
//
// One output is one chain of fused multiply-adds from the host's y over the active experts of the
// token, ascending. With `shifted`, expert 0 is gelu(x) and expert e is M_(e-1); the last M is
// never used: so the released code of MoFME counts.
//
// Zhang et al., "Efficient Deweather Mixture-of-Experts with Uncertainty-Aware Feature-Wise Linear
// Modulation" (MoFME), AAAI 2024.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <span>

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/core/params.hpp"
#include "mole/experts/bank_memory.hpp"
#include "mole/experts/expert_bank.hpp"
#include "mole/kernels/activation.hpp"
#include "mole/kernels/gated_low_rank.hpp"
#include "mole/kernels/rows.hpp"

namespace mole::inline MOLE_ABI {

template <class V>
struct FilmBankParams {
  MatView<V> gamma_weight = {}, gamma_bias = {}, beta_weight = {}, beta_bias = {};

  template <class F, class... P>
  static void visit(F&& f, P&... p) {
    f(Leaf{"gamma_weight"}, p.gamma_weight...);
    f(Leaf{"gamma_bias"}, p.gamma_bias...);
    f(Leaf{"beta_weight"}, p.beta_weight...);
    f(Leaf{"beta_bias"}, p.beta_bias...);
  }
  operator FilmBankParams<const V>() const noexcept  // NOLINT(google-explicit-constructor)
      requires(!std::is_const_v<V>) {
    return {gamma_weight, gamma_bias, beta_weight, beta_bias};
  }
};

template <class T>
class FilmBank : public BankMemory<FilmBank<T>> {
 public:
  using Scalar = T;
  template <class V>
  using Params = FilmBankParams<V>;
  using Weights = Params<const T>;

  struct Config {
    Index width = 0;       ///< of input and output
    Index experts = 0;     ///< 1 ... 65536
    bool shifted = false;  ///< expert 0 is gelu, the others are one late

    static constexpr std::string_view kind() noexcept { return "film_bank"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field{"shifted"}, c.shifted...);
    }
  };

  struct Prepared {
    std::span<Panels<T>> gamma, beta;  ///< [experts]; of no columns where an expert is gelu
    MatView<T> gamma_bias, beta_bias;  ///< copies
  };

  struct Tape {
    MatView<T> gamma, beta;  ///< [max slots, width], Γ x + γ and Ξ x + ξ

    template <class F, class... P>
    static void visit(F&& f, P&... p) {
      f(Leaf{"gamma"}, p.gamma...);
      f(Leaf{"beta"}, p.beta...);
    }
  };

  static constexpr bool needs_base = false;

  /// Throws invalid_argument naming the field.
  explicit FilmBank(const Config& config);

  const Config& config() const noexcept { return config_; }
  Index input_width() const noexcept { return config_.width; }
  Index output_width() const noexcept { return config_.width; }
  Index experts() const noexcept { return config_.experts; }

  template <class V, class Arena>
  Params<V> take_params(Arena& arena) const;
  template <class Arena>
  Prepared take_prepared(Arena& arena) const;
  template <class Arena>
  Tape take_tape(Arena& arena, Index max_tokens, Index max_slots) const;
  std::size_t scratch_bytes(Index max_tokens, Index max_slots, int workers) const noexcept;

  /// Throws shape_mismatch unless the weights are those of the config.
  Prepared prepare(const Weights& weights, Workspace& memory) const;

  /// Adds into y. Throws before any write on wrong shapes or too little memory.
  void forward(const Prepared& prepared, const BankInput<T>& input, const Routing<T>& routing,
               MatView<T> y, Tape* tape, const Context& context) const;

  /// Adds into dgate [slots], d_input.x if given, and the members of grad if given.
  void backward(const Weights& weights, const Tape& saved, const BankInput<T>& input,
                const Routing<T>& routing, MatView<const T> dy, std::span<T> dgate,
                const BankInputGradient<T>& d_input, const Params<T>& grad,
                const Context& context) const;

 private:
  struct Scratch {
    MatView<T> gamma, beta;               // [slots, width], or their gradients
    std::span<std::int32_t> list;         // [rows of x]
    MatView<T> gelu, ones;                // [rows of x, width] if shifted
    std::span<MatView<const T>> weights;  // [experts]
    std::span<MatView<T>> gradients;      // [experts]
  };
  template <class Arena>
  Scratch take_scratch(Arena& arena, Index rows, Index slots, bool backward) const;
  template <class V>
  void check_params(const Params<V>& params, bool optional) const;
  void check_tape(const Tape& tape, Index slots) const;
  /// Which M expert e is; -1: gelu.
  Index map_of(Index e) const noexcept { return config_.shifted ? e - 1 : e; }
  /// body(slot, row of x, row of y, map) for every slot of tokens begin ... end - 1.
  template <class Body>
  void for_each_slot(const Routing<T>& routing, const BankInput<T>& input, Index begin, Index end,
                     Body body) const;
  /// Gradients of the two linear maps: `d` by slot, by way of the weights and into dx.
  void linear_backward(const Routing<T>& routing, const BankInput<T>& input, MatView<const T> d,
                       MatView<const T> weight, MatView<T> dx, MatView<T> dweight, MatView<T> dbias,
                       const Scratch& scratch, const Context& context) const;

  Config config_;
};

template <class T>
FilmBank<T>::FilmBank(const Config& config) : config_(config) {
  require(config.width > 0, Errc::invalid_argument, "FilmBank: width must be positive, got ",
          config.width);
  require(config.experts > 0 && config.experts <= kMostExperts, Errc::invalid_argument,
          "FilmBank: experts: expected 1 ... ", kMostExperts, ", got ", config.experts);
}

template <class T>
template <class V, class Arena>
auto FilmBank<T>::take_params(Arena& arena) const -> Params<V> {
  const Index rows = saturating_product(experts(), config_.width);
  Params<V> params;
  params.gamma_weight = arena.template take<V>(rows, config_.width);
  params.gamma_bias = arena.template take<V>(experts(), config_.width);
  params.beta_weight = arena.template take<V>(rows, config_.width);
  params.beta_bias = arena.template take<V>(experts(), config_.width);
  return params;
}

template <class T>
template <class Arena>
auto FilmBank<T>::take_prepared(Arena& arena) const -> Prepared {
  Prepared prepared;
  prepared.gamma = arena.template take<Panels<T>>(experts());
  prepared.beta = arena.template take<Panels<T>>(experts());
  for (Index e = 0; e < experts(); ++e) {
    const Index cols = map_of(e) < 0 ? 0 : config_.width;
    const Panels<T> gamma = take_panels<T>(arena, config_.width, cols);
    const Panels<T> beta = take_panels<T>(arena, config_.width, cols);
    if (prepared.gamma.empty()) continue;
    prepared.gamma[e] = gamma;
    prepared.beta[e] = beta;
  }
  prepared.gamma_bias = arena.template take<T>(experts(), config_.width);
  prepared.beta_bias = arena.template take<T>(experts(), config_.width);
  return prepared;
}

template <class T>
template <class Arena>
auto FilmBank<T>::take_tape(Arena& arena, Index, Index max_slots) const -> Tape {
  Tape tape;
  tape.gamma = arena.template take<T>(max_slots, config_.width);
  tape.beta = arena.template take<T>(max_slots, config_.width);
  return tape;
}

template <class T>
template <class V>
void FilmBank<T>::check_params(const Params<V>& params, bool optional) const {
  const auto fits = [&](const char* name, MatView<V> view, Index rows) {
    if (!optional || view.data != nullptr) require_shape(name, view, rows, config_.width);
  };
  fits("FilmBank gamma_weight", params.gamma_weight, experts() * config_.width);
  fits("FilmBank gamma_bias", params.gamma_bias, experts());
  fits("FilmBank beta_weight", params.beta_weight, experts() * config_.width);
  fits("FilmBank beta_bias", params.beta_bias, experts());
}

template <class T>
void FilmBank<T>::check_tape(const Tape& tape, Index slots) const {
  require(tape.gamma.rows >= slots && tape.gamma.cols == config_.width, Errc::out_of_memory,
          "FilmBank: the tape holds ", tape.gamma.rows, " slots of width ", tape.gamma.cols,
          ", expected ", slots, " of width ", config_.width);
}

template <class T>
auto FilmBank<T>::prepare(const Weights& weights, Workspace& memory) const -> Prepared {
  check_params(weights, false);
  const Prepared prepared = take_prepared(memory);
  rows::copy(weights.gamma_bias, prepared.gamma_bias);
  rows::copy(weights.beta_bias, prepared.beta_bias);
  for (Index e = 0; e < experts(); ++e) {
    if (map_of(e) < 0) continue;
    pack_rows(rows::block(weights.gamma_weight, map_of(e), config_.width), 0, prepared.gamma[e]);
    pack_rows(rows::block(weights.beta_weight, map_of(e), config_.width), 0, prepared.beta[e]);
  }
  return prepared;
}

template <class T>
template <class Arena>
auto FilmBank<T>::take_scratch(Arena& arena, Index rows, Index slots, bool backward) const
    -> Scratch {
  Scratch scratch;
  scratch.gamma = arena.template take<T>(slots, config_.width);
  scratch.beta = arena.template take<T>(slots, config_.width);
  if (config_.shifted) {
    scratch.list = arena.template take<std::int32_t>(rows);
    scratch.gelu = arena.template take<T>(rows, config_.width);
    if (backward) scratch.ones = arena.template take<T>(rows, config_.width);
  }
  if (!backward) return scratch;
  scratch.weights = arena.template take<MatView<const T>>(experts());
  scratch.gradients = arena.template take<MatView<T>>(experts());
  return scratch;
}

template <class T>
std::size_t FilmBank<T>::scratch_bytes(Index max_tokens, Index max_slots, int) const noexcept {
  ByteCounter counter;
  take_scratch(counter, std::max(max_tokens, max_slots), max_slots, true);
  return counter.bytes();
}

template <class T>
template <class Body>
void FilmBank<T>::for_each_slot(const Routing<T>& routing, const BankInput<T>& input, Index begin,
                                Index end, Body body) const {
  for (Index t = begin; t < end; ++t) {
    for (Index s = routing.token_begin[t]; s < routing.token_begin[t + 1]; ++s) {
      body(s, input.x_rows == RowsBy::token ? t : s, input.y_rows == RowsBy::token ? t : s,
           map_of(routing.expert[s]));
    }
  }
}

template <class T>
void FilmBank<T>::forward(const Prepared& prepared, const BankInput<T>& input,
                          const Routing<T>& routing, MatView<T> y, Tape* tape,
                          const Context& context) const {
  require_bank_call<T>(input, routing, y, experts(), config_.width, config_.width);
  if (routing.slots() == 0) return begin_output(input, y);
  if (tape != nullptr) check_tape(*tape, routing.slots());
  const Workspace::Frame frame(context.scratch);
  const Scratch scratch = take_scratch(context.scratch, input.x.rows, routing.slots(), false);
  const MatView<T> gamma = tape != nullptr ? tape->gamma : scratch.gamma;
  const MatView<T> beta = tape != nullptr ? tape->beta : scratch.beta;
  const gated::Slots which = tape != nullptr ? gated::Slots::all : gated::Slots::active;

  begin_output(input, y);
  gated::down<T>(routing.lists, which, prepared.gamma, input.x, input.x_rows, gamma, context);
  gated::down<T>(routing.lists, which, prepared.beta, input.x, input.x_rows, beta, context);
  if (config_.shifted) {
    std::iota(scratch.list.begin(), scratch.list.end(), 0);
    gated::activate<T>(Activation::gelu, scratch.list, input.x, {}, scratch.gelu, context);
  }
  const auto slot = [&](Index s, Index x_row, Index y_row, Index map) {
    const T gate = routing.gate[s];
    if (which == gated::Slots::active && gate == T(0)) return;
    for (Index i = 0; i < config_.width; ++i) {
      if (map < 0) {
        gamma(s, i) = T(0);
        beta(s, i) = scratch.gelu(x_row, i);
      } else {
        gamma(s, i) += prepared.gamma_bias(map, i);
        beta(s, i) += prepared.beta_bias(map, i);
      }
      const T value = std::fma(gamma(s, i), input.x(x_row, i), beta(s, i));
      if (gate != T(0)) y(y_row, i) = std::fma(gate, value, y(y_row, i));
    }
  };
  parallel_for(
      context, routing.tokens, gated::grain_for(config_.width),
      [&](Index begin, Index end, int) { for_each_slot(routing, input, begin, end, slot); });
}

template <class T>
void FilmBank<T>::linear_backward(const Routing<T>& routing, const BankInput<T>& input,
                                  MatView<const T> d, MatView<const T> weight, MatView<T> dx,
                                  MatView<T> dweight, MatView<T> dbias, const Scratch& scratch,
                                  const Context& context) const {
  const Index width = config_.width;
  for (Index e = 0; e < experts(); ++e) {
    const bool linear = map_of(e) >= 0;
    const MatView<const T> none{weight.data, 0, width, weight.stride};
    scratch.weights[e] = linear ? rows::block(weight, map_of(e), width) : none;
    scratch.gradients[e] = MatView<T>(dweight.data, 0, width, dweight.stride);
    if (linear) scratch.gradients[e] = rows::block(dweight, map_of(e), width);
  }
  if (dweight.data != nullptr) {
    gated::down_gradient<T>(routing.lists, d, input.x, input.x_rows, scratch.gradients, context);
  }
  if (dx.data != nullptr) {
    gated::down_transposed<T>(routing.lists, d, scratch.weights, dx, input.x_rows, context);
  }
  if (dbias.data == nullptr) return;
  for_each_slot(routing, input, 0, routing.tokens, [&](Index s, Index, Index, Index map) {
    if (routing.gate[s] == T(0) || map < 0) return;
    for (Index i = 0; i < width; ++i) dbias(map, i) += d(s, i);
  });
}

template <class T>
void FilmBank<T>::backward(const Weights& weights, const Tape& saved, const BankInput<T>& input,
                           const Routing<T>& routing, MatView<const T> dy, std::span<T> dgate,
                           const BankInputGradient<T>& d_input, const Params<T>& grad,
                           const Context& context) const {
  check_params(weights, false);
  check_params(grad, true);
  require_bank_call<T>(input, routing, dy, dgate, d_input, experts(), config_.width, config_.width);
  if (routing.slots() == 0) return;
  check_tape(saved, routing.slots());
  const Workspace::Frame frame(context.scratch);
  const Scratch scratch = take_scratch(context.scratch, input.x.rows, routing.slots(), true);
  const MatView<T> dx = d_input.x;
  if (config_.shifted) {  // the slope of gelu
    std::iota(scratch.list.begin(), scratch.list.end(), 0);
    rows::fill(scratch.ones, 1);
    gated::activate_backward<T>(Activation::gelu, scratch.list, input.x, {}, scratch.ones,
                                scratch.gelu, {}, context);
  }
  const auto slot = [&](Index s, Index x_row, Index y_row, Index map) {
    const T gate = routing.gate[s];
    T sum = T(0);
    for (Index i = 0; i < config_.width; ++i) {
      const T x = input.x(x_row, i), d = dy(y_row, i);
      const T value = std::fma(saved.gamma(s, i), x, saved.beta(s, i));
      sum = std::fma(d, value, sum);
      scratch.beta(s, i) = gate * d;
      scratch.gamma(s, i) = gate * d * x;
      if (dx.data == nullptr || gate == T(0)) continue;
      const T slope = map < 0 ? scratch.gelu(x_row, i) : saved.gamma(s, i);
      dx(x_row, i) = std::fma(gate * d, slope, dx(x_row, i));
    }
    dgate[s] += sum;
  };
  parallel_for(
      context, routing.tokens, gated::grain_for(config_.width),
      [&](Index begin, Index end, int) { for_each_slot(routing, input, begin, end, slot); });
  linear_backward(routing, input, scratch.gamma, weights.gamma_weight, dx, grad.gamma_weight,
                  grad.gamma_bias, scratch, context);
  linear_backward(routing, input, scratch.beta, weights.beta_weight, dx, grad.beta_weight,
                  grad.beta_bias, scratch, context);
}

#ifndef MOLE_HEADER_ONLY
extern template class FilmBank<float>;
extern template class FilmBank<double>;
#endif

static_assert(ExpertBank<FilmBank<float>>);

}  // namespace mole::inline MOLE_ABI
