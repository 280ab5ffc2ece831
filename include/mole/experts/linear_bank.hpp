// SPDX-License-Identifier: Apache-2.0
// LinearBank: experts that are whole linear maps, each with a low-rank adapter if wanted.
//
//   y_t += Σ_e gate_te (W_e x_t + b_e + scale_e B_e A_e x_t)
//
//   x [tokens, in]   W_e [out, in]   b_e [1, out]   A_e [r_e, in]   B_e [out, r_e]
//
// With base `shared` all experts have the same W and b, which differ from expert to expert with
// `own`. A shared W is multiplied once per row, not once per slot: with y by slot
// y_s = g_s (W x_t), with y by token y_t = W Σ_e g_te x.
//
// Backward, with v = Wᵀ dy:
//   dgate = v·x + b·dy + adapter   dW += Σ g dy xᵀ   db += Σ g dy   dx += Σ g v + adapter
#pragma once

#include <algorithm>
#include <array>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/core/params.hpp"
#include "mole/experts/bank_memory.hpp"
#include "mole/experts/expert_bank.hpp"
#include "mole/experts/lora_bank.hpp"
#include "mole/kernels/chain_product.hpp"
#include "mole/kernels/gated_low_rank.hpp"
#include "mole/kernels/gated_rows.hpp"
#include "mole/kernels/shared_low_rank.hpp"

namespace mole::inline MOLE_ABI {

/// Whose the full matrices of the experts are.
enum class ExpertBase { shared, own };
constexpr std::array<std::string_view, 2> enum_names(ExpertBase) noexcept {
  return {"shared", "own"};
}

/// Pointers to the tensors of the experts, which may lie anywhere. Of a gradient, what is left
/// empty is not computed: a frozen base has neither weight nor bias.
template <class V>
struct LinearBankParams {
  Index in = 0, out = 0;
  ExpertBase base = ExpertBase::shared;
  std::span<V* const> weight = {};  ///< one if shared, else [experts], each [out, in]
  std::span<V* const> bias = {};    ///< likewise, each [out]; empty: none
  Index weight_stride = 0;          ///< elements between rows of a weight; 0: contiguous
  LoraBankParams<V> adapter = {};   ///< empty without adapters

  /// Of expert e; empty where there is none.
  MatView<V> weight_of(Index e) const noexcept {
    const Index i = base == ExpertBase::shared ? 0 : e;
    if (i >= static_cast<Index>(weight.size())) return {};
    return {weight[i], out, in, weight_stride != 0 ? weight_stride : in};
  }
  MatView<V> bias_of(Index e) const noexcept {
    const Index i = base == ExpertBase::shared ? 0 : e;
    if (i >= static_cast<Index>(bias.size())) return {};
    return {bias[i], 1, out};
  }
  operator LinearBankParams<const V>() const noexcept  // NOLINT(google-explicit-constructor)
      requires(!std::is_const_v<V>) {
    return {in, out, base, weight, bias, weight_stride, adapter};
  }

  template <class F, class P, class... More>
  static void visit(F&& f, P& p, More&... more) {
    const Index tensors = static_cast<Index>(std::max(p.weight.size(), p.bias.size()));
    for (Index e = 0; e < tensors; ++e) {
      const Index number = p.base == ExpertBase::shared ? -1 : e;
      if (!p.weight.empty()) {
        f(Leaf{"weight", number}, as_lvalue(p.weight_of(e)), as_lvalue(more.weight_of(e))...);
      }
      if (!p.bias.empty()) {
        f(Leaf{"bias", number}, as_lvalue(p.bias_of(e)), as_lvalue(more.bias_of(e))...);
      }
    }
    visit_group<LoraBankParams<V>>(Leaf{"adapter"}, f, p.adapter, more.adapter...);
  }

 private:
  template <class View>
  static const View& as_lvalue(const View& view) noexcept {
    return view;
  }
};

template <class T>
class LinearBank : public BankMemory<LinearBank<T>> {
 public:
  using Scalar = T;
  using Adapter = LoraBank<T>;
  template <class V>
  using Params = LinearBankParams<V>;
  using Weights = Params<const T>;

  struct Config {
    Index in = 0;       ///< input width
    Index out = 0;      ///< output width
    Index experts = 0;  ///< 1 ... 65536
    ExpertBase base = ExpertBase::shared;
    bool bias = false;
    std::vector<Index> rank;  ///< [experts], 0 or more, or empty: no adapters
    std::vector<T> scale;     ///< [experts] with ranks

    static constexpr std::string_view kind() noexcept { return "linear_bank"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("in"), c.in...);
      f(Field::required("out"), c.out...);
      f(Field::required("experts"), c.experts...);
      f(Field{"base"}, c.base...);
      f(Field{"bias"}, c.bias...);
      f(Field{"rank"}, c.rank...);
      f(Field{"scale"}, c.scale...);
    }
  };

  /// Packed snapshot of the weights. Immutable; any number of calls may share it.
  struct Prepared {
    Panels<T> weight;  ///< Wᵀ, or all W_eᵀ one above the other
    MatView<T> bias;   ///< [1 or experts, out], or empty
    typename Adapter::Prepared adapter;
  };

  struct Tape {
    Index max_slots = 0;
    typename Adapter::Tape adapter;

    template <class F, class... P>
    static void visit(F&& f, P&... p) {
      visit_group<typename Adapter::Tape>(Leaf{"adapter"}, f, p.adapter...);
    }
  };

  static constexpr bool needs_base = false;

  /// Throws invalid_argument naming the field.
  explicit LinearBank(Config config);

  const Config& config() const noexcept { return config_; }
  Index input_width() const noexcept { return config_.in; }
  Index output_width() const noexcept { return config_.out; }
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
  /// The same into what take_prepared laid out, of weights that fit.
  void pack(const Weights& weights, const Prepared& prepared) const noexcept;

  /// Adds into y. Throws before any write on wrong shapes or too little memory.
  void forward(const Prepared& prepared, const BankInput<T>& input, const Routing<T>& routing,
               MatView<T> y, Tape* tape, const Context& context) const;

  /// Adds into dgate [slots] (empty: not computed), d_input.x and the tensors of grad if given.
  void backward(const Weights& weights, const Tape& saved, const BankInput<T>& input,
                const Routing<T>& routing, MatView<const T> dy, std::span<T> dgate,
                const BankInputGradient<T>& d_input, const Params<T>& grad,
                const Context& context) const;

  /// What forward and backward check beside the shapes of the call. Throws out_of_memory if the
  /// tape has too few slots, shape_mismatch if parameters do not fit the config.
  void check_tape(const Tape& tape, Index slots) const;
  void check_weights(const Weights& weights) const { check_params("weights", weights, false); }
  void check_gradient(const Params<T>& grad) const { check_params("gradient", grad, true); }

 private:
  /// Of one call.
  struct Call {
    const BankInput<T>& input;
    const Routing<T>& routing;
    const Context& context;
  };
  struct Scratch {
    std::span<std::int32_t> rows;  // rows in use of x or of y
    MatView<T> outer;              // [rows of x, out], W x or Σ g dy (shared, y by slot)
    MatView<T> inner;              // [rows of y, in], Σ g x (shared, y by token); [slots, in], g x
    MatView<T> v;                  // [rows of y, or slots, in], Wᵀ dy
    std::span<MatView<const T>> weight, bias;  // [experts]
    std::span<MatView<T>> dweight, dbias;      // [experts]
  };
  template <class Arena>
  Scratch take_scratch(Arena& arena, RowsBy y_by, Index x_rows, Index y_rows, Index slots) const;
  template <class V>
  void check_params(std::string_view what, const Params<V>& params, bool optional) const;
  void check_memory(const Routing<T>& routing, const Context& context) const;

  bool is_shared() const noexcept { return config_.base == ExpertBase::shared; }
  bool is_adapted() const noexcept { return !config_.rank.empty(); }
  Index tensors() const noexcept { return is_shared() ? 1 : config_.experts; }
  gated::Rows used(const Call& call, RowsBy by, gated::Slots which,
                   std::span<std::int32_t> memory) const noexcept {
    return gated::used_rows<T>(call.routing.token_begin, call.routing.gate, by, which, memory);
  }
  /// to = Σ g_s from[row(s)] on the listed rows of `to`.
  void sum_into(const Call& call, MatView<const T> from, RowsBy from_rows, gated::Rows rows,
                MatView<T> to, RowsBy to_rows) const noexcept;

  void shared_forward(const Prepared& prepared, const Call& call, const Scratch& scratch,
                      MatView<T> y) const noexcept;
  void own_forward(const Prepared& prepared, const Call& call, const Scratch& scratch,
                   MatView<T> y) const noexcept;
  void shared_backward(const Weights& weights, const Call& call, const Scratch& scratch,
                       MatView<const T> dy, std::span<T> dgate, MatView<T> dx,
                       const Params<T>& grad) const noexcept;
  void shared_slots_backward(const Weights& weights, const Call& call, const Scratch& scratch,
                             MatView<const T> dy, MatView<T> dx,
                             const Params<T>& grad) const noexcept;
  void own_backward(const Weights& weights, const Call& call, const Scratch& scratch,
                    MatView<const T> dy, std::span<T> dgate, MatView<T> dx,
                    const Params<T>& grad) const noexcept;

  Config config_;
  Adapter adapter_;
  std::vector<T> ones_;            // [experts]
  std::vector<Index> rows_begin_;  // [experts + 1], first row of each expert in Prepared::weight
};

namespace detail {

/// Of a bank without adapters they have rank 0.
template <class T>
typename LoraBank<T>::Config adapter_config(const char* owner, Index in, Index out, Index experts,
                                            const std::vector<Index>& rank,
                                            const std::vector<T>& scale) {
  require(in > 0, Errc::invalid_argument, owner, ": in must be positive, got ", in);
  require(out > 0, Errc::invalid_argument, owner, ": out must be positive, got ", out);
  require(experts > 0 && experts <= kMostExperts, Errc::invalid_argument, owner,
          ": experts: expected 1 ... ", kMostExperts, ", got ", experts);
  const auto fits = [&](const auto& list) {
    return rank.empty() ? list.empty() : static_cast<Index>(list.size()) == experts;
  };
  require(fits(rank), Errc::invalid_argument, owner, ": rank: expected ", experts,
          " values or none, got ", rank.size());
  require(fits(scale), Errc::invalid_argument, owner, ": scale: expected ", rank.size(),
          " values, one for every rank, got ", scale.size());
  const auto count = static_cast<std::size_t>(experts);
  typename LoraBank<T>::Config config;
  config.in = in;
  config.out = out;
  config.rank = rank.empty() ? std::vector<Index>(count) : rank;
  config.scale = rank.empty() ? std::vector<T>(count, T(1)) : scale;
  return config;
}

}  // namespace detail

template <class T>
LinearBank<T>::LinearBank(Config config)
    : config_(std::move(config)),
      adapter_(detail::adapter_config<T>("LinearBank", config_.in, config_.out, config_.experts,
                                         config_.rank, config_.scale)),
      ones_(static_cast<std::size_t>(config_.experts), T(1)) {
  for (Index e = 0; e <= config_.experts; ++e) rows_begin_.push_back(e * config_.in);
}

template <class T>
template <class V, class Arena>
auto LinearBank<T>::take_params(Arena& arena) const -> Params<V> {
  Params<V> params{config_.in, config_.out, config_.base, {}, {}, 0, {}};
  const auto list = [&](Index count, Index rows, Index cols) {
    const std::span<V*> pointers = arena.template take<V*>(count);
    for (Index i = 0; i < count; ++i) {
      const MatView<V> block = arena.template take<V>(rows, cols);
      if (!pointers.empty()) pointers[i] = block.data;
    }
    return pointers;
  };
  params.weight = list(tensors(), config_.out, config_.in);
  params.bias = list(config_.bias ? tensors() : 0, 1, config_.out);
  if (is_adapted()) params.adapter = adapter_.template take_params<V>(arena);
  return params;
}

template <class T>
template <class Arena>
auto LinearBank<T>::take_prepared(Arena& arena) const -> Prepared {
  Prepared prepared;
  prepared.weight = take_panels<T>(arena, saturating_product(tensors(), config_.in), config_.out);
  if (config_.bias) prepared.bias = arena.template take<T>(tensors(), config_.out);
  if (is_adapted()) prepared.adapter = adapter_.take_prepared(arena);
  return prepared;
}

template <class T>
template <class Arena>
auto LinearBank<T>::take_tape(Arena& arena, Index max_tokens, Index max_slots) const -> Tape {
  Tape tape;
  tape.max_slots = max_slots;
  if (is_adapted()) tape.adapter = adapter_.take_tape(arena, max_tokens, max_slots);
  return tape;
}

template <class T>
template <class V>
void LinearBank<T>::check_params(std::string_view what, const Params<V>& params,
                                 bool optional) const {
  const bool has_adapter =
      !params.adapter.down.empty() || !params.adapter.up.empty() || !params.adapter.bias.empty();
  if (optional && params.weight.empty() && params.bias.empty() && !has_adapter) return;
  require(params.in == config_.in && params.out == config_.out && params.base == config_.base,
          Errc::shape_mismatch, "LinearBank ", what, ": expected ",
          enum_names(config_.base)[static_cast<std::size_t>(config_.base)], " weights ", config_.in,
          " -> ", config_.out, ", got ",
          enum_names(params.base)[static_cast<std::size_t>(params.base)], " weights ", params.in,
          " -> ", params.out);
  const auto fits = [&](std::span<V* const> list, bool wanted) {
    const Index expected = wanted ? tensors() : 0;
    return static_cast<Index>(list.size()) == expected || (optional && list.empty());
  };
  require(fits(params.weight, true) && fits(params.bias, config_.bias), Errc::shape_mismatch,
          "LinearBank ", what, ": expected ", tensors(), " weights and ",
          config_.bias ? tensors() : 0, " biases, got ", params.weight.size(), " and ",
          params.bias.size());
  for (Index e = 0; e < tensors(); ++e) {
    if (!params.weight.empty()) {
      require_shape("LinearBank weight", params.weight_of(e), config_.out, config_.in);
    }
    if (!params.bias.empty()) require_shape("LinearBank bias", params.bias_of(e), 1, config_.out);
  }
  require(is_adapted() || !has_adapter, Errc::shape_mismatch, "LinearBank ", what,
          ": expected no adapters, got ", params.adapter.down.size());
  if (is_adapted()) adapter_.check_params(what, params.adapter, optional);
}

template <class T>
void LinearBank<T>::check_tape(const Tape& tape, Index slots) const {
  require(slots <= tape.max_slots, Errc::out_of_memory, "LinearBank: the tape was made for ",
          tape.max_slots, " slots, expected ", slots);
  if (is_adapted()) adapter_.check_tape(tape.adapter, slots);
}

template <class T>
void LinearBank<T>::check_memory(const Routing<T>& routing, const Context& context) const {
  const std::size_t bytes = scratch_bytes(routing.tokens, routing.slots(), context.workers);
  require(context.scratch.free_bytes() + kAlignment >= bytes, Errc::out_of_memory,
          "LinearBank: ", bytes, " bytes of scratch needed, ", context.scratch.free_bytes(),
          " are free");
}

template <class T>
auto LinearBank<T>::prepare(const Weights& weights, Workspace& memory) const -> Prepared {
  check_weights(weights);
  const Prepared prepared = take_prepared(memory);
  pack(weights, prepared);
  return prepared;
}

template <class T>
void LinearBank<T>::pack(const Weights& weights, const Prepared& prepared) const noexcept {
  for (Index e = 0; e < tensors(); ++e) {
    pack_rows(weights.weight_of(e), rows_begin_[e], prepared.weight);
    if (config_.bias) {
      std::ranges::copy(weights.bias_of(e).row(0), prepared.bias.row(e).begin());
    }
  }
  if (is_adapted()) adapter_.pack(weights.adapter, prepared.adapter);
}

template <class T>
template <class Arena>
auto LinearBank<T>::take_scratch(Arena& arena, RowsBy y_by, Index x_rows, Index y_rows,
                                 Index slots) const -> Scratch {
  Scratch scratch;
  scratch.rows = arena.template take<std::int32_t>(std::max(x_rows, y_rows));
  const Index inner_rows = is_shared() ? y_rows : slots;
  if (is_shared() && y_by == RowsBy::slot) {
    scratch.outer = arena.template take<T>(x_rows, config_.out);
  } else {
    scratch.inner = arena.template take<T>(inner_rows, config_.in);
  }
  scratch.v = arena.template take<T>(inner_rows, config_.in);
  scratch.weight = arena.template take<MatView<const T>>(config_.experts);
  scratch.dweight = arena.template take<MatView<T>>(config_.experts);
  if (!config_.bias) return scratch;
  scratch.bias = arena.template take<MatView<const T>>(config_.experts);
  scratch.dbias = arena.template take<MatView<T>>(config_.experts);
  return scratch;
}

template <class T>
std::size_t LinearBank<T>::scratch_bytes(Index max_tokens, Index max_slots,
                                         int workers) const noexcept {
  const Index rows = std::max(max_tokens, max_slots);
  std::size_t bytes = 0;
  for (const RowsBy y_by : {RowsBy::token, RowsBy::slot}) {
    ByteCounter counter;
    take_scratch(counter, y_by, rows, y_by == RowsBy::token ? max_tokens : max_slots, max_slots);
    bytes = std::max(bytes, counter.bytes());
  }
  if (!is_adapted()) return bytes;
  ByteCounter unwanted;
  unwanted.take<T>(max_slots);
  return std::max(bytes, unwanted.bytes() + adapter_.scratch_bytes(max_tokens, max_slots, workers));
}

template <class T>
void LinearBank<T>::sum_into(const Call& call, MatView<const T> from, RowsBy from_rows,
                             gated::Rows rows, MatView<T> to, RowsBy to_rows) const noexcept {
  for (const std::int32_t row : rows) std::ranges::fill(to.row(row), T(0));
  gated::add_rows<T>(call.routing.token_begin, call.routing.gate, from, from_rows, to, to_rows,
                     call.context);
}

template <class T>
void LinearBank<T>::shared_forward(const Prepared& prepared, const Call& call,
                                   const Scratch& scratch, MatView<T> y) const noexcept {
  const RowsBy x_rows = call.input.x_rows, y_rows = call.input.y_rows;
  const Routing<T>& routing = call.routing;
  const auto add_to_y = [&](MatView<const T> from, RowsBy from_rows) {
    gated::add_rows<T>(routing.token_begin, routing.gate, from, from_rows, y, y_rows, call.context);
  };
  if (y_rows == RowsBy::slot) {
    const gated::Rows rows = used(call, x_rows, gated::Slots::active, scratch.rows);
    gated::multiply<T>(rows, call.input.x, prepared.weight, false, scratch.outer, call.context);
    add_to_y(scratch.outer, x_rows);
  } else {
    const gated::Rows rows = used(call, y_rows, gated::Slots::active, scratch.rows);
    sum_into(call, call.input.x, x_rows, rows, scratch.inner, y_rows);
    gated::multiply<T>(rows, scratch.inner, prepared.weight, true, y, call.context);
  }
  if (!config_.bias) return;
  add_to_y({prepared.bias.data, routing.slots(), config_.out, 0}, RowsBy::slot);
}

template <class T>
void LinearBank<T>::own_forward(const Prepared& prepared, const Call& call, const Scratch& scratch,
                                MatView<T> y) const noexcept {
  const Routing<T>& routing = call.routing;
  const std::span<const T> ones = ones_;
  gated::apply_gates<T>(routing.lists, routing.gate, ones, rows_begin_, call.input.x,
                        call.input.x_rows, scratch.inner, call.context);
  gated::up<T>(routing.lists, routing.gate, ones, scratch.inner, prepared.weight, rows_begin_,
               prepared.bias, y, call.input.y_rows, call.context);
}

template <class T>
void LinearBank<T>::forward(const Prepared& prepared, const BankInput<T>& input,
                            const Routing<T>& routing, MatView<T> y, Tape* tape,
                            const Context& context) const {
  require_bank_call<T>(input, routing, y, config_.experts, config_.in, config_.out);
  if (routing.slots() == 0) return begin_output(input, y);
  check_memory(routing, context);
  if (tape != nullptr) check_tape(*tape, routing.slots());
  begin_output(input, y);
  const Call call{input, routing, context};
  {
    Workspace::Frame frame(context.scratch);
    const Scratch scratch =
        take_scratch(context.scratch, input.y_rows, input.x.rows, y.rows, routing.slots());
    is_shared() ? shared_forward(prepared, call, scratch, y)
                : own_forward(prepared, call, scratch, y);
  }
  if (!is_adapted()) return;
  const BankInput<T> added{.x = input.x, .x_rows = input.x_rows, .y_rows = input.y_rows};
  adapter_.forward(prepared.adapter, added, routing, y, tape != nullptr ? &tape->adapter : nullptr,
                   context);
}

/// y by slot: x takes part once per row of x.
template <class T>
void LinearBank<T>::shared_slots_backward(const Weights& weights, const Call& call,
                                          const Scratch& scratch, MatView<const T> dy,
                                          MatView<T> dx, const Params<T>& grad) const noexcept {
  if (dx.data == nullptr && grad.weight.empty()) return;
  const RowsBy x_rows = call.input.x_rows;
  const gated::Rows rows = used(call, x_rows, gated::Slots::active, scratch.rows);
  sum_into(call, dy, RowsBy::slot, rows, scratch.outer, x_rows);
  if (!grad.weight.empty()) {
    gated::outer<T>(rows, scratch.outer, call.input.x, grad.weight_of(0), call.context);
  }
  if (dx.data != nullptr) {
    gated::multiply<T>(rows, scratch.outer, weights.weight_of(0), true, dx, call.context);
  }
}

template <class T>
void LinearBank<T>::shared_backward(const Weights& weights, const Call& call,
                                    const Scratch& scratch, MatView<const T> dy, std::span<T> dgate,
                                    MatView<T> dx, const Params<T>& grad) const noexcept {
  const RowsBy x_rows = call.input.x_rows, y_rows = call.input.y_rows;
  const Routing<T>& routing = call.routing;
  const bool by_slot = y_rows == RowsBy::slot;
  if (!dgate.empty() || (!by_slot && dx.data != nullptr)) {
    const gated::Rows rows = used(call, y_rows, gated::Slots::all, scratch.rows);
    gated::multiply<T>(rows, dy, weights.weight_of(0), false, scratch.v, call.context);
  }
  if (!dgate.empty()) {
    gated::dot_rows<T>(routing.lists, scratch.v, y_rows, call.input.x, x_rows, scratch.bias, dy,
                       y_rows, dgate, call.context);
  }
  if (!grad.bias.empty()) {
    gated::sum_rows<T>(routing.token_begin, routing.gate, dy, y_rows, grad.bias_of(0),
                       call.context);
  }
  if (by_slot) return shared_slots_backward(weights, call, scratch, dy, dx, grad);
  if (!grad.weight.empty()) {
    const gated::Rows rows = used(call, y_rows, gated::Slots::active, scratch.rows);
    sum_into(call, call.input.x, x_rows, rows, scratch.inner, y_rows);
    gated::outer<T>(rows, dy, scratch.inner, grad.weight_of(0), call.context);
  }
  if (dx.data != nullptr) {
    gated::add_rows<T>(routing.token_begin, routing.gate, scratch.v, y_rows, dx, x_rows,
                       call.context);
  }
}

template <class T>
void LinearBank<T>::own_backward(const Weights& weights, const Call& call, const Scratch& scratch,
                                 MatView<const T> dy, std::span<T> dgate, MatView<T> dx,
                                 const Params<T>& grad) const noexcept {
  const RowsBy x_rows = call.input.x_rows, y_rows = call.input.y_rows;
  const Routing<T>& routing = call.routing;
  const std::span<const T> ones = ones_;
  if (!dgate.empty() || dx.data != nullptr) {
    for (Index e = 0; e < config_.experts; ++e) scratch.weight[e] = weights.weight_of(e);
    gated::up_transposed<T>(routing.lists, scratch.weight, dy, y_rows, scratch.v, call.context);
  }
  if (!dgate.empty()) {
    gated::dot_rows<T>(routing.lists, scratch.v, RowsBy::slot, call.input.x, x_rows, scratch.bias,
                       dy, y_rows, dgate, call.context);
  }
  if (!grad.weight.empty()) {
    for (Index e = 0; e < config_.experts; ++e) scratch.dweight[e] = grad.weight_of(e);
    gated::apply_gates<T>(routing.lists, routing.gate, ones, rows_begin_, call.input.x, x_rows,
                          scratch.inner, call.context);
    gated::up_gradient<T>(routing.lists, dy, y_rows, scratch.inner, scratch.dweight, call.context);
  }
  if (!grad.bias.empty()) {
    for (Index e = 0; e < config_.experts; ++e) scratch.dbias[e] = grad.bias_of(e);
    gated::bias_gradient<T>(routing.lists, routing.gate, ones, dy, y_rows, scratch.dbias,
                            call.context);
  }
  if (dx.data != nullptr) {
    gated::add_rows<T>(routing.token_begin, routing.gate, scratch.v, RowsBy::slot, dx, x_rows,
                       call.context);
  }
}

template <class T>
void LinearBank<T>::backward(const Weights& weights, const Tape& saved, const BankInput<T>& input,
                             const Routing<T>& routing, MatView<const T> dy, std::span<T> dgate,
                             const BankInputGradient<T>& d_input, const Params<T>& grad,
                             const Context& context) const {
  check_weights(weights);
  check_gradient(grad);
  const Index slots = routing.slots();
  require_bank_call<T>(input, routing, dy, config_.experts, config_.in, config_.out);
  require(dgate.empty() || static_cast<Index>(dgate.size()) >= slots, Errc::shape_mismatch,
          "dgate: expected ", slots, " slots or none, got ", dgate.size());
  if (d_input.x.data != nullptr) require_shape("dx", d_input.x, input.x.rows, config_.in);
  if (slots == 0) return;
  check_tape(saved, slots);
  check_memory(routing, context);
  const Call call{input, routing, context};
  {
    Workspace::Frame frame(context.scratch);
    const Scratch scratch =
        take_scratch(context.scratch, input.y_rows, input.x.rows, dy.rows, slots);
    for (Index e = 0; config_.bias && e < config_.experts; ++e) {
      scratch.bias[e] = weights.bias_of(e);
    }
    is_shared() ? shared_backward(weights, call, scratch, dy, dgate, d_input.x, grad)
                : own_backward(weights, call, scratch, dy, dgate, d_input.x, grad);
  }
  const bool trains = !grad.adapter.down.empty() || !grad.adapter.up.empty();
  if (!is_adapted() || (dgate.empty() && d_input.x.data == nullptr && !trains)) return;
  Workspace::Frame frame(context.scratch);
  if (dgate.empty()) {
    dgate = context.scratch.template take<T>(slots);
    std::ranges::fill(dgate, T(0));
  }
  const BankInput<T> added{.x = input.x, .x_rows = input.x_rows, .y_rows = input.y_rows};
  adapter_.backward(weights.adapter, saved.adapter, added, routing, dy, dgate, {.x = d_input.x},
                    grad.adapter, context);
}

#ifndef MOLE_HEADER_ONLY
extern template class LinearBank<float>;
extern template class LinearBank<double>;
#endif

static_assert(ExpertBank<LinearBank<float>>);

}  // namespace mole::inline MOLE_ABI
