// SPDX-License-Identifier: Apache-2.0
// Dmoerm: the inner mixtures of DMoERM, a reward model with one mixture of LoRA experts for each
// category. A sequence has a category c, chosen by the outer router (SequenceRouter with
// Pool::last) or known, and one reward y, read at x, its last real token. Experts are made in three
// phases:
//
//   base x = W x      h_τ = W x + scale · B_cτ A_cτ x
//   base      y = head_c · W x + bias_c                       a base for the category
//   adapter   y = head_c · h_τ + bias_c                       one capability point τ at a time
//   mixture   v = W¹_c [h_0; h_1; ...] + b¹_c                 the capability points together; the h
//             y = w²_c · prelu(v) + b²_c                      are constants: x, W, A, B get nothing
//
// Shapes: x [tokens, width]; W [width, width]; A [categories · adapters · rank, width]; B
// [categories · adapters · width, rank]; head and w² [categories, width]; bias and b² [1,
// categories]; W¹ [categories · width, adapters · width]; b¹ [categories, width]; slope of prelu
// [1, categories]; y [sequences, 1]. prelu(v) = v above 0, slope_c · v below.
//
// Quan, "DMoERM: Recipes of Mixture-of-Experts for Effective Reward Modeling", ACL 2024. Its loss
// is ranking_loss.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <span>
#include <string_view>

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/core/params.hpp"
#include "mole/kernels/dense.hpp"
#include "mole/kernels/rows.hpp"
#include "mole/layers/layer_checks.hpp"
#include "mole/routing/head.hpp"
#include "mole/routing/pool.hpp"

namespace mole::inline MOLE_ABI {

enum class DmoermPhase { base, adapter, mixture };
constexpr std::array<std::string_view, 3> enum_names(DmoermPhase) noexcept {
  return {"base", "adapter", "mixture"};
}

/// What a phase does not use may be empty.
template <class V>
struct DmoermParams {
  MatView<V> weight, down, up;
  LinearParams<V> head;                    ///< of the phases base and adapter
  MatView<V> inner = {}, inner_bias = {};  ///< W¹, b¹
  MatView<V> slope = {};
  LinearParams<V> outer = {};  ///< w², b²

  template <class F, class... P>
  static void visit(F&& f, P&... p) {
    f(Leaf{"weight"}, p.weight...);
    f(Leaf{"down"}, p.down...);
    f(Leaf{"up"}, p.up...);
    visit_group<LinearParams<V>>(Leaf{"head"}, f, p.head...);
    f(Leaf{"inner"}, p.inner...);
    f(Leaf{"inner_bias"}, p.inner_bias...);
    f(Leaf{"slope"}, p.slope...);
    visit_group<LinearParams<V>>(Leaf{"outer"}, f, p.outer...);
  }
  operator DmoermParams<const V>() const noexcept  // NOLINT(google-explicit-constructor)
      requires(!std::is_const_v<V>) {
    return {weight, down, up, head, inner, inner_bias, slope, outer};
  }
};

template <class T>
class Dmoerm {
 public:
  using Scalar = T;
  template <class V>
  using Params = DmoermParams<V>;

  struct Config {
    Index width = 0, categories = 0;
    Index adapters = 0;  ///< of a category
    Index rank = 0;
    T scale = T(1);
    DmoermPhase phase = DmoermPhase::mixture;
    Index adapter = 0;  ///< of the phase adapter

    static constexpr std::string_view kind() noexcept { return "dmoerm"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("width"), c.width...);
      f(Field::required("categories"), c.categories...);
      f(Field::required("adapters"), c.adapters...);
      f(Field::required("rank"), c.rank...);
      f(Field{"scale"}, c.scale...);
      f(Field{"phase"}, c.phase...);
      f(Field{"adapter"}, c.adapter...);
    }
  };

  struct Prepared {
    Panels<T> weight;
    std::span<Panels<T>> down, up;  ///< [categories · adapters]
    std::span<Panels<T>> inner;     ///< [categories], in the phase mixture
    Params<const T> vectors;        ///< head, inner_bias, slope and outer; the others are empty
  };

  /// Rows by sequence.
  struct Tape {
    MatView<T> x, base;                ///< [sequences, width]
    MatView<T> low;                    ///< [sequences, adapters · rank], A x
    MatView<T> adapted;                ///< [sequences, adapters · width], h
    MatView<T> inner;                  ///< [sequences, width], v
    std::span<std::int32_t> category;  ///< [sequences]
    Index sequences = 0;
  };

  /// Throws invalid_argument, naming the field; limit_exceeded above 2^31 rows of any parameter.
  explicit Dmoerm(const Config& config);

  const Config& config() const noexcept { return config_; }

  /// Parameters of all phases.
  std::size_t params_bytes() const noexcept;
  Params<T> make_params(Workspace& memory) const { return take_params(memory); }
  std::size_t prepared_bytes() const noexcept;
  /// Throws shape_mismatch, naming the member.
  Prepared prepare(const Params<const T>& params, Workspace& memory) const;
  std::size_t scratch_bytes(Index max_sequences) const noexcept;
  std::size_t tape_bytes(Index max_sequences) const noexcept;
  Tape make_tape(Workspace& memory, Index max_sequences) const {
    return take_tape(memory, max_sequences);
  }

  /// y [sequences, 1] is overwritten; category [sequences]. Every sequence has a token. Throws
  /// shape_mismatch, limit_exceeded, invalid_argument or out_of_memory before it writes.
  void forward(const Prepared& prepared, const Tokens<T>& tokens,
               std::span<const std::int32_t> category, MatView<T> y, Tape& tape,
               const Context& context) const;

  /// Adds into dx [tokens, width] and grad, whose members may be empty. Throws as forward, before
  /// it adds anything.
  void backward(const Params<const T>& params, const Tape& tape, const Tokens<T>& tokens,
                MatView<const T> dy, MatView<T> dx, const Params<T>& grad,
                const Context& context) const;

 private:
  template <class Arena>
  Params<T> take_params(Arena& arena) const;
  template <class Arena>
  Tape take_tape(Arena& arena, Index sequences) const;
  bool mixes() const noexcept { return config_.phase == DmoermPhase::mixture; }
  /// The adapters that the phase computes.
  Index first_adapter() const noexcept {
    return config_.phase == DmoermPhase::adapter ? config_.adapter : 0;
  }
  Index adapter_count() const noexcept {
    if (config_.phase == DmoermPhase::base) return 0;
    return mixes() ? config_.adapters : 1;
  }
  void check(const Params<const T>& params, bool optional) const;
  /// Throws unless so many sequences have tokens.
  void check_sequences(const Tokens<T>& tokens, Index sequences) const;
  /// The rows of a category, in ascending order.
  std::span<const std::int32_t> rows_of(const Tape& tape, Index category, Workspace& memory) const;
  void adapt(const Prepared& prepared, Index category, std::span<const std::int32_t> list,
             const Tape& tape, const Context& context) const;
  void adapt_backward(const Params<const T>& params, Index category,
                      std::span<const std::int32_t> list, const Tape& tape, MatView<const T> dh,
                      MatView<T> dx, const Params<T>& grad, const Context& context) const;
  void mix(const Prepared& prepared, Index category, std::span<const std::int32_t> list,
           const Tape& tape, const Context& context) const;
  void mix_backward(const Params<const T>& params, Index category,
                    std::span<const std::int32_t> list, const Tape& tape, MatView<const T> dy,
                    const Params<T>& grad, const Context& context) const;
  /// The last map.
  void last_backward(const Params<const T>& params, const Tape& tape, MatView<const T> dy,
                     const Params<T>& grad) const;
  /// What it reads: W x, h or prelu(v), element i of row n.
  T last_input(const Params<const T>& params, const Tape& tape, Index n, Index i) const noexcept;

  Config config_;
};

template <class T>
Dmoerm<T>::Dmoerm(const Config& config) : config_(config) {
  constexpr const char* kName = "Dmoerm";
  require_count(kName, "width", config.width);
  require_count(kName, "categories", config.categories);
  require_count(kName, "adapters", config.adapters);
  require_count(kName, "rank", config.rank);
  require_finite(kName, "scale", config.scale);
  require_field(config.adapter >= 0 && config.adapter < config.adapters, kName, "adapter",
                "below adapters", config.adapter);
  constexpr Index kLimit = Index{1} << 31;  // so that products of two sizes fit
  const Index experts = saturating_product(config.categories, config.adapters);
  const Index rows = saturating_product(experts, std::max(config.width, config.rank));
  require(rows <= kLimit, Errc::limit_exceeded, "Dmoerm: ", config.categories, " categories of ",
          config.adapters, " adapters of width ", config.width, " and rank ", config.rank, " have ",
          rows, " rows, the limit is ", kLimit);
}

template <class T>
template <class Arena>
auto Dmoerm<T>::take_params(Arena& arena) const -> Params<T> {
  const Index width = config_.width, categories = config_.categories;
  const Index experts = saturating_product(categories, config_.adapters);
  const auto take = [&](Index rows, Index cols) { return arena.template take<T>(rows, cols); };
  Params<T> params;
  params.weight = take(width, width);
  params.down = take(saturating_product(experts, config_.rank), width);
  params.up = take(saturating_product(experts, width), config_.rank);
  params.head = {take(categories, width), take(1, categories)};
  params.inner =
      take(saturating_product(categories, width), saturating_product(config_.adapters, width));
  params.inner_bias = take(categories, width);
  params.slope = take(1, categories);
  params.outer = {take(categories, width), take(1, categories)};
  return params;
}

template <class T>
std::size_t Dmoerm<T>::params_bytes() const noexcept {
  ByteCounter counter;
  take_params(counter);
  return counter.bytes();
}

template <class T>
void Dmoerm<T>::check(const Params<const T>& params, bool optional) const {
  const Index width = config_.width, categories = config_.categories;
  const Index experts = categories * config_.adapters;
  const auto fits = [&](const char* name, MatView<const T> view, bool used, Index rows,
                        Index cols) {
    if (view.data == nullptr && (optional || !used)) return;
    require_shape(name, view, rows, cols);
  };
  const bool adapted = config_.phase != DmoermPhase::base;
  fits("weight", params.weight, true, width, width);
  fits("down", params.down, adapted, experts * config_.rank, width);
  fits("up", params.up, adapted, experts * width, config_.rank);
  fits("head.weight", params.head.weight, !mixes(), categories, width);
  fits("head.bias", params.head.bias, !mixes(), 1, categories);
  fits("inner", params.inner, mixes(), categories * width, config_.adapters * width);
  fits("inner_bias", params.inner_bias, mixes(), categories, width);
  fits("slope", params.slope, mixes(), 1, categories);
  fits("outer.weight", params.outer.weight, mixes(), categories, width);
  fits("outer.bias", params.outer.bias, mixes(), 1, categories);
}

template <class T>
std::size_t Dmoerm<T>::prepared_bytes() const noexcept {
  const Index experts = saturating_product(config_.categories, config_.adapters);
  ByteCounter counter;
  counter.take<Panels<T>>(experts);
  counter.take<Panels<T>>(experts);
  counter.take<Panels<T>>(config_.categories);
  // Every matrix may start on a new cache line.
  const auto pieces = static_cast<std::size_t>(2 * experts + config_.categories);
  return params_bytes() + counter.bytes() + pieces * kAlignment;
}

template <class T>
auto Dmoerm<T>::prepare(const Params<const T>& params, Workspace& memory) const -> Prepared {
  check(params, false);
  const Index experts = config_.categories * config_.adapters;
  Prepared prepared;
  const auto clone = [&](MatView<const T> view) { return rows::clone(view, memory); };
  prepared.vectors.head = {clone(params.head.weight), clone(params.head.bias)};
  prepared.vectors.inner_bias = clone(params.inner_bias);
  prepared.vectors.slope = clone(params.slope);
  prepared.vectors.outer = {clone(params.outer.weight), clone(params.outer.bias)};
  prepared.weight = rows::pack(params.weight, memory);
  const auto pack = [&](MatView<const T> stack, Index count, Index each) {
    const auto panels = memory.take<Panels<T>>(stack.empty() ? 0 : count);
    for (std::size_t i = 0; i < panels.size(); ++i) {
      panels[i] = rows::pack(rows::block(stack, static_cast<Index>(i), each), memory);
    }
    return panels;
  };
  prepared.down = pack(params.down, experts, config_.rank);
  prepared.up = pack(params.up, experts, config_.width);
  if (mixes()) prepared.inner = pack(params.inner, config_.categories, config_.width);
  return prepared;
}

template <class T>
template <class Arena>
auto Dmoerm<T>::take_tape(Arena& arena, Index sequences) const -> Tape {
  const Index width = config_.width, adapters = config_.adapters;
  Tape tape;
  tape.x = arena.template take<T>(sequences, width);
  tape.base = arena.template take<T>(sequences, width);
  tape.low = arena.template take<T>(sequences, saturating_product(adapters, config_.rank));
  tape.adapted = arena.template take<T>(sequences, saturating_product(adapters, width));
  tape.inner = arena.template take<T>(sequences, width);
  tape.category = arena.template take<std::int32_t>(sequences);
  return tape;
}

template <class T>
std::size_t Dmoerm<T>::tape_bytes(Index max_sequences) const noexcept {
  ByteCounter counter;
  take_tape(counter, max_sequences);
  return counter.bytes();
}

template <class T>
std::size_t Dmoerm<T>::scratch_bytes(Index max_sequences) const noexcept {
  const Index all = saturating_product(config_.adapters, config_.width);
  ByteCounter counter;
  counter.take<std::int32_t>(max_sequences);
  counter.take<T>(max_sequences, all);
  for (int part = 0; part < 5; ++part) counter.take<T>(max_sequences, config_.width);
  for (int part = 0; part < 2; ++part) counter.take<T>(max_sequences, config_.rank);
  return counter.bytes();
}

template <class T>
std::span<const std::int32_t> Dmoerm<T>::rows_of(const Tape& tape, Index category,
                                                 Workspace& memory) const {
  const auto list = memory.take<std::int32_t>(tape.sequences);
  std::size_t count = 0;
  for (Index n = 0; n < tape.sequences; ++n) {
    if (tape.category[n] == category) list[count++] = static_cast<std::int32_t>(n);
  }
  return list.first(count);
}

template <class T>
void Dmoerm<T>::adapt(const Prepared& prepared, Index category, std::span<const std::int32_t> list,
                      const Tape& tape, const Context& context) const {
  const auto count = static_cast<Index>(list.size());
  const MatView<T> x = context.scratch.template take<T>(count, config_.width);
  const MatView<T> low = context.scratch.template take<T>(count, config_.rank);
  const MatView<T> delta = context.scratch.template take<T>(count, config_.width);
  rows::gather<T>(tape.x, list, x);
  for (Index a = first_adapter(); a < first_adapter() + adapter_count(); ++a) {
    const Index expert = category * config_.adapters + a;
    dense::forward<T>(prepared.down[expert], {}, x, low, context);
    dense::forward<T>(prepared.up[expert], {}, low, delta, context);
    for (Index i = 0; i < count; ++i) {
      const Index n = list[i];
      std::ranges::copy(low.row(i), tape.low.row(n).begin() + a * config_.rank);
      for (Index j = 0; j < config_.width; ++j) {
        tape.adapted(n, a * config_.width + j) =
            std::fma(config_.scale, delta(i, j), tape.base(n, j));
      }
    }
  }
}

template <class T>
void Dmoerm<T>::mix(const Prepared& prepared, Index category, std::span<const std::int32_t> list,
                    const Tape& tape, const Context& context) const {
  const auto count = static_cast<Index>(list.size());
  const MatView<T> input = context.scratch.template take<T>(count, tape.adapted.cols);
  const MatView<T> inner = context.scratch.template take<T>(count, config_.width);
  rows::gather<T>(tape.adapted, list, input);
  dense::forward<T>(prepared.inner[category], prepared.vectors.inner_bias.row_block(category, 1),
                    input, inner, context);
  for (Index i = 0; i < count; ++i) {
    std::ranges::copy(inner.row(i), tape.inner.row(list[i]).begin());
  }
}

template <class T>
T Dmoerm<T>::last_input(const Params<const T>& params, const Tape& tape, Index n,
                        Index i) const noexcept {
  if (config_.phase == DmoermPhase::base) return tape.base(n, i);
  if (!mixes()) return tape.adapted(n, config_.adapter * config_.width + i);
  const T v = tape.inner(n, i);
  return v < T(0) ? params.slope(0, tape.category[n]) * v : v;
}

template <class T>
void Dmoerm<T>::check_sequences(const Tokens<T>& tokens, Index sequences) const {
  check_tokens(tokens);
  const Index filled = stages::for_each_filled(tokens, [](Index, Index, Index) {});
  require(filled == sequences, Errc::shape_mismatch, "Dmoerm: categories of ", sequences,
          " sequences, of which ", filled, " have tokens");
}

template <class T>
void Dmoerm<T>::forward(const Prepared& prepared, const Tokens<T>& tokens,
                        std::span<const std::int32_t> category, MatView<T> y, Tape& tape,
                        const Context& context) const {
  const auto sequences = static_cast<Index>(category.size());
  require_shape("x", tokens.x, tokens.count(), config_.width);
  require_shape("y", y, sequences, 1);
  require(tape.x.rows >= sequences, Errc::limit_exceeded, "Dmoerm: ", sequences,
          " sequences, the tape was made for ", tape.x.rows);
  check_sequences(tokens, sequences);
  for (const std::int32_t c : category) {
    require(c >= 0 && c < config_.categories, Errc::invalid_argument, "category ", c,
            " is not in 0 ... ", config_.categories - 1);
  }
  const Workspace::Frame frame(context.scratch);
  require_scratch(context, scratch_bytes(sequences));
  tape.sequences = sequences;
  std::ranges::copy(category, tape.category.begin());
  stages::pool<T>(Pool::last, tokens, tape.x);
  dense::forward<T>(prepared.weight, {}, tape.x.row_block(0, sequences),
                    tape.base.row_block(0, sequences), context);
  for (Index c = 0; c < config_.categories && config_.phase != DmoermPhase::base; ++c) {
    const Workspace::Frame of_category(context.scratch);
    const auto list = rows_of(tape, c, context.scratch);
    if (list.empty()) continue;
    adapt(prepared, c, list, tape, context);
    if (mixes()) mix(prepared, c, list, tape, context);
  }
  const auto& last = mixes() ? prepared.vectors.outer : prepared.vectors.head;
  for (Index n = 0; n < sequences; ++n) {
    T sum = T(0);
    for (Index i = 0; i < config_.width; ++i) {
      sum = std::fma(last.weight(category[n], i), last_input(prepared.vectors, tape, n, i), sum);
    }
    y(n, 0) = sum + last.bias(0, category[n]);
  }
}

template <class T>
void Dmoerm<T>::adapt_backward(const Params<const T>& params, Index category,
                               std::span<const std::int32_t> list, const Tape& tape,
                               MatView<const T> dh, MatView<T> dx, const Params<T>& grad,
                               const Context& context) const {
  const Index expert = category * config_.adapters + config_.adapter, rank = config_.rank;
  const auto count = static_cast<Index>(list.size());
  const auto take = [&](Index cols) { return context.scratch.template take<T>(count, cols); };
  const MatView<T> x = take(config_.width), low = take(rank), d_low = take(rank);
  const MatView<T> d_delta = take(config_.width), dx_rows = take(config_.width);
  rows::gather<T>(tape.x, list, x);
  rows::gather<T>(tape.low.col_block(config_.adapter * rank, rank), list, low);
  for (Index i = 0; i < count; ++i) {
    for (Index j = 0; j < config_.width; ++j) d_delta(i, j) = config_.scale * dh(list[i], j);
  }
  rows::fill(d_low, 0);
  rows::fill(dx_rows, 0);
  dense::input_gradient<T>(rows::block(params.up, expert, config_.width), d_delta, d_low, context);
  dense::input_gradient<T>(rows::block(params.down, expert, rank), d_low, dx_rows, context);
  if (grad.up.data != nullptr) {
    dense::weight_gradient<T>(low, d_delta, rows::block(grad.up, expert, config_.width), context);
  }
  if (grad.down.data != nullptr) {
    dense::weight_gradient<T>(x, d_low, rows::block(grad.down, expert, rank), context);
  }
  rows::scatter_add<T>(dx_rows, list, dx);
}

template <class T>
void Dmoerm<T>::mix_backward(const Params<const T>& params, Index category,
                             std::span<const std::int32_t> list, const Tape& tape,
                             MatView<const T> dy, const Params<T>& grad,
                             const Context& context) const {
  const auto count = static_cast<Index>(list.size());
  const MatView<T> input = context.scratch.template take<T>(count, tape.adapted.cols);
  const MatView<T> d_inner = context.scratch.template take<T>(count, config_.width);
  rows::gather<T>(tape.adapted, list, input);
  for (Index i = 0; i < count; ++i) {
    const Index n = list[i];
    for (Index j = 0; j < config_.width; ++j) {
      const T v = tape.inner(n, j), d = dy(n, 0) * params.outer.weight(category, j);
      d_inner(i, j) = v < T(0) ? d * params.slope(0, category) : d;
      if (v < T(0) && grad.slope.data != nullptr) {
        grad.slope(0, category) = std::fma(d, v, grad.slope(0, category));
      }
    }
  }
  if (grad.inner.data != nullptr) {
    dense::weight_gradient<T>(input, d_inner, rows::block(grad.inner, category, config_.width),
                              context);
  }
  if (grad.inner_bias.data != nullptr) {
    dense::bias_gradient<T>(d_inner, grad.inner_bias.row_block(category, 1));
  }
}

template <class T>
void Dmoerm<T>::last_backward(const Params<const T>& params, const Tape& tape, MatView<const T> dy,
                              const Params<T>& grad) const {
  const auto& last = mixes() ? grad.outer : grad.head;
  for (Index n = 0; n < tape.sequences; ++n) {
    const Index c = tape.category[n];
    if (last.bias.data != nullptr) last.bias(0, c) += dy(n, 0);
    for (Index i = 0; last.weight.data != nullptr && i < config_.width; ++i) {
      last.weight(c, i) = std::fma(dy(n, 0), last_input(params, tape, n, i), last.weight(c, i));
    }
  }
}

template <class T>
void Dmoerm<T>::backward(const Params<const T>& params, const Tape& tape, const Tokens<T>& tokens,
                         MatView<const T> dy, MatView<T> dx, const Params<T>& grad,
                         const Context& context) const {
  const Index sequences = tape.sequences, width = config_.width;
  check(params, false);
  check(grad, true);
  check_sequences(tokens, sequences);
  require_shape("dy", dy, sequences, 1);
  if (dx.data != nullptr) require_shape("dx", dx, tokens.count(), width);
  const Workspace::Frame frame(context.scratch);
  require_scratch(context, scratch_bytes(sequences));
  last_backward(params, tape, dy, grad);
  MatView<T> dh, d_rows;
  if (!mixes()) {
    dh = context.scratch.template take<T>(sequences, width);
    d_rows = context.scratch.template take<T>(sequences, width);
    rows::fill(d_rows, 0);
  }
  for (Index n = 0; n < dh.rows; ++n) {
    const auto head = params.head.weight.row(tape.category[n]);
    for (Index i = 0; i < width; ++i) dh(n, i) = dy(n, 0) * head[i];
  }
  for (Index c = 0; c < config_.categories && config_.phase != DmoermPhase::base; ++c) {
    const Workspace::Frame of_category(context.scratch);
    const auto list = rows_of(tape, c, context.scratch);
    if (list.empty()) continue;
    if (mixes()) {
      mix_backward(params, c, list, tape, dy, grad, context);
    } else {
      adapt_backward(params, c, list, tape, dh, d_rows, grad, context);
    }
  }
  if (mixes()) return;
  dense::input_gradient<T>(params.weight, dh, d_rows, context);
  if (grad.weight.data != nullptr) {
    dense::weight_gradient<T>(tape.x.row_block(0, sequences), dh, grad.weight, context);
  }
  if (dx.data != nullptr) stages::pool_backward<T>(Pool::last, tokens, d_rows, dx);
}

#ifndef MOLE_HEADER_ONLY
extern template class Dmoerm<float>;
extern template class Dmoerm<double>;
#endif

}  // namespace mole::inline MOLE_ABI
