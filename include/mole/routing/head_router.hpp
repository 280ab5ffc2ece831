// SPDX-License-Identifier: Apache-2.0
// HeadRouter: a Router put together from two halves.
//
//   tokens ── head ──► logits [tokens, experts] ── overrides ── rule ──► slots and gates
//
// The head (head.hpp) says how logits come about, the rule (rule.hpp) what they decide.
#pragma once

#include <algorithm>
#include <atomic>
#include <span>

#include "mole/core/config.hpp"
#include "mole/routing/call.hpp"
#include "mole/routing/head.hpp"
#include "mole/routing/router.hpp"
#include "mole/routing/rule.hpp"
#include "mole/routing/stages.hpp"

namespace mole::inline MOLE_ABI {

/// The tape of a HeadRouter.
template <class T, class HeadTape>
struct HeadRouterTape : RouterTape<T> {
  MatView<T> side;  ///< [tokens, side columns], its gradient takes part
  HeadTape head;    ///< what the head keeps for itself

  template <class F, class... P>
  static void visit(F&& f, P&... p) {
    RouterTape<T>::visit(f, p...);
    f(Leaf{"side"}, p.side...);
  }
};

template <class T, class Head, class Rule>
class HeadRouter {
  static constexpr bool by_row = RowRule<Rule, T>;

  static constexpr Scope rule_scope() {
    if constexpr (requires { Rule::scope; }) {
      return Rule::scope;
    } else {
      return by_row ? Scope::token : Scope::batch;
    }
  }
  static constexpr GradientKind rule_gradient() {
    if constexpr (requires { Rule::gradient; }) {
      return Rule::gradient;
    } else {
      return GradientKind::exact;
    }
  }

 public:
  using Scalar = T;
  template <class V>
  using Params = typename Head::template Params<V>;
  using Prepared = typename Head::Prepared;
  using Buffers = typename detail::RuleBuffers<Rule>::type;
  template <class V>
  using Carry = typename Head::template Carry<V>;
  using Tape = HeadRouterTape<T, typename Head::Tape>;
  static constexpr Scope scope = std::max(Head::scope, rule_scope());
  static constexpr GradientKind gradient = rule_gradient();

  HeadRouter(const Head& head, const Rule& rule) : head_(head), rule_(rule) {}

  const Head& head() const noexcept { return head_; }
  const Rule& rule() const noexcept { return rule_; }
  Index input_width() const noexcept { return head_.width(); }
  Index experts() const noexcept { return head_.experts(); }
  Index max_per_token() const noexcept { return rule_.max_per_token(experts()); }

  std::size_t params_bytes() const noexcept { return head_.params_bytes(); }
  std::size_t prepared_bytes() const noexcept { return head_.prepared_bytes(); }
  std::size_t scratch_bytes(Index max_tokens, int workers) const noexcept;
  std::size_t tape_bytes(Index max_tokens) const noexcept;

  Params<T> make_params(Workspace& memory) const { return head_.make_params(memory); }
  Prepared prepare(const Params<const T>& params, Workspace& memory) const {
    return head_.prepare(params, memory);
  }
  Tape make_tape(Workspace& memory, Index max_tokens) const { return take(memory, max_tokens); }

  void forward(const Prepared& prepared, const Buffers& buffers, const Tokens<T>& tokens,
               const Overrides<T>& overrides, const Carry<const T>& carry_in,
               RoutingTable<T>& table, const Carry<T>& carry_out, Tape* tape,
               const Context& context) const;

  void backward(const Params<const T>& params, const Buffers& buffers, const Tape& saved,
                const Tokens<T>& tokens, const Overrides<T>& overrides,
                const Carry<const T>& carry_in, const Routing<T>& routing, const Tape& d_tape,
                const Carry<T>& d_carry_out, MatView<T> dx, const Params<T>& grad,
                const Carry<T>& d_carry_in, const Context& context) const;

  /// What `backward` checks before it adds anything. Throws shape_mismatch or invalid_argument.
  void require_backward(const Params<const T>& params, const Tape& saved, const Tokens<T>& tokens,
                        const Routing<T>& routing, const Tape& d_tape, MatView<T> dx,
                        const Params<T>& grad) const;

 private:
  struct Rows {
    WorkerRows<T> gate, dgate, work;
    WorkerRows<std::int32_t> chosen, order;
  };
  template <class Arena>
  Rows take_rows(Arena& arena, int workers) const;
  template <class Arena>
  Tape take(Arena& arena, Index tokens) const;
  static Tape first_rows(const Tape& tape, Index count) noexcept;

  RuleRow<T> row_of(Index t, const Tokens<T>& tokens, const Tape& tape, const Rows& rows,
                    int worker) const noexcept;
  // Templates on the rule, so that those of batch rules never come into being.
  template <class R>
  void decide_rows(const R& rule, const Buffers& buffers, const Tokens<T>& tokens, const Tape& tape,
                   RoutingTable<T>& table, const Context& context) const;
  template <class R>
  void rows_backward(const R& rule, const Buffers& buffers, const Tokens<T>& tokens,
                     const Tape& tape, const Routing<T>& routing, const Tape& d_tape,
                     const Context& context) const;
  void check_call(const Tokens<T>& tokens, const Buffers& buffers) const {
    check_tokens(tokens);
    if constexpr (requires { rule_.check(buffers, Index{}, Index{}); }) {
      rule_.check(buffers, tokens.count(), experts());
    }
  }
  RouterShape shape() const noexcept { return {input_width(), experts(), max_per_token()}; }

  Head head_;
  Rule rule_;
};

template <class T, class Head, class Rule>
template <class Arena>
auto HeadRouter<T, Head, Rule>::take_rows(Arena& arena, int workers) const -> Rows {
  const Index slots = max_per_token();
  return {WorkerRows<T>(arena, workers, 1, slots), WorkerRows<T>(arena, workers, 1, slots),
          WorkerRows<T>(arena, workers, 1, detail::work_rows<Rule>() * experts()),
          WorkerRows<std::int32_t>(arena, workers, 1, slots),
          WorkerRows<std::int32_t>(arena, workers, 1, experts())};
}

template <class T, class Head, class Rule>
template <class Arena>
auto HeadRouter<T, Head, Rule>::take(Arena& arena, Index tokens) const -> Tape {
  Tape tape;
  static_cast<RouterTape<T>&>(tape) = take_tape<T>(arena, shape(), tokens);
  tape.side = arena.template take<T>(tokens, head_.side());
  tape.head = head_.take_tape(arena, tokens);
  return tape;
}

template <class T, class Head, class Rule>
auto HeadRouter<T, Head, Rule>::first_rows(const Tape& tape, Index count) noexcept -> Tape {
  Tape rows = tape;
  rows.logits = tape.logits.row_block(0, count);
  rows.prob = tape.prob.row_block(0, count);
  if (tape.side.cols > 0) rows.side = tape.side.row_block(0, count);
  return rows;
}

template <class T, class Head, class Rule>
std::size_t HeadRouter<T, Head, Rule>::scratch_bytes(Index max_tokens, int workers) const noexcept {
  ByteCounter rows, tape;
  take_rows(rows, workers);
  take(tape, max_tokens);
  std::size_t bytes = rows.bytes() + tape.bytes() + head_.scratch_bytes(max_tokens, workers);
  if constexpr (!by_row) bytes += rule_.scratch_bytes(max_tokens, experts(), workers);
  return bytes;
}

template <class T, class Head, class Rule>
std::size_t HeadRouter<T, Head, Rule>::tape_bytes(Index max_tokens) const noexcept {
  ByteCounter counter;
  take(counter, max_tokens);
  return counter.bytes();
}

template <class T, class Head, class Rule>
RuleRow<T> HeadRouter<T, Head, Rule>::row_of(Index t, const Tokens<T>& tokens, const Tape& tape,
                                             const Rows& rows, int worker) const noexcept {
  RuleRow<T> row;
  row.token = t;
  if (!tokens.ids.empty()) row.id = tokens.ids[t];
  row.logits = tape.logits.row(t);
  if (tape.side.cols > 0) row.side = tape.side.row(t);
  row.prob = tape.prob.row(t);
  row.chosen = rows.chosen(worker, 0);
  row.gate = rows.gate(worker, 0);
  row.work = rows.work(worker, 0);
  row.order = rows.order(worker, 0);
  return row;
}

template <class T, class Head, class Rule>
template <class R>
void HeadRouter<T, Head, Rule>::decide_rows(const R& rule, const Buffers& buffers,
                                            const Tokens<T>& tokens, const Tape& tape,
                                            RoutingTable<T>& table, const Context& context) const {
  const Rows rows = take_rows(context.scratch, context.workers);
  const Index room = max_per_token();
  std::atomic<bool> too_many = false;
  parallel_for(context, tokens.count(), kTokensPerTask, [&](Index begin, Index end, int worker) {
    for (Index t = begin; t < end; ++t) {
      const RuleRow<T> row = row_of(t, tokens, tape, rows, worker);
      const Index slots = rule.forward(row, buffers);
      if (slots < 0 || slots > room) {
        too_many = true;
      } else {
        const auto count = static_cast<std::size_t>(slots);
        table.select(t, row.chosen.first(count), row.gate.first(count));
      }
    }
  });
  table.finish();
  require(!too_many, Errc::limit_exceeded,
          "router: the rule selected more experts than its max_per_token, ", room);
}

template <class T, class Head, class Rule>
void HeadRouter<T, Head, Rule>::forward(const Prepared& prepared, const Buffers& buffers,
                                        const Tokens<T>& tokens, const Overrides<T>& overrides,
                                        const Carry<const T>& carry_in, RoutingTable<T>& table,
                                        const Carry<T>& carry_out, Tape* tape,
                                        const Context& context) const {
  const Index count = tokens.count();
  check_forward(shape(), tokens, overrides, table, tape);
  check_call(tokens, buffers);
  const Workspace::Frame frame(context.scratch);
  const Tape rows = tape != nullptr ? first_rows(*tape, count) : take(context.scratch, count);
  table.begin(count);
  head_.forward(prepared, tokens, carry_in, rows.logits, rows.side, carry_out, rows.head, context);
  parallel_for(context, count, kTokensPerTask, [&](Index begin, Index end, int) {
    for (Index t = begin; t < end; ++t) {
      stages::override_logits<T>(overrides, t, rows.logits.row(t));
    }
  });
  if constexpr (by_row) {
    decide_rows(rule_, buffers, tokens, rows, table, context);
  } else {
    rule_.forward(RuleBatch<T>{tokens, rows.logits, rows.side, rows.prob}, buffers, table, context);
    table.finish();
  }
  if (tape != nullptr) record_gates(table.view(), *tape);
}

template <class T, class Head, class Rule>
template <class R>
void HeadRouter<T, Head, Rule>::rows_backward(const R& rule, const Buffers& buffers,
                                              const Tokens<T>& tokens, const Tape& tape,
                                              const Routing<T>& routing, const Tape& d_tape,
                                              const Context& context) const {
  const Rows rows = take_rows(context.scratch, context.workers);
  parallel_for(context, tokens.count(), kTokensPerTask, [&](Index begin, Index end, int worker) {
    for (Index t = begin; t < end; ++t) {
      RuleRow<T> row = row_of(t, tokens, tape, rows, worker);
      const Index first = routing.token_begin[t], slots = routing.token_begin[t + 1] - first;
      const std::span<T> dgate = rows.dgate(worker, 0).first(static_cast<std::size_t>(slots));
      for (Index i = 0; i < slots; ++i) {
        row.chosen[i] = routing.expert[first + i];
        row.gate[i] = routing.gate[first + i];
        dgate[i] = d_tape.gate(0, first + i);
      }
      row.chosen = row.chosen.first(dgate.size());
      row.gate = row.gate.first(dgate.size());
      RuleRowGradient<T> d{dgate, d_tape.prob.row(t), d_tape.logits.row(t), {}};
      if (d_tape.side.cols > 0) d.dside = d_tape.side.row(t);
      rule.backward(row, buffers, d);
    }
  });
}

template <class T, class Head, class Rule>
void HeadRouter<T, Head, Rule>::require_backward(const Params<const T>& params, const Tape& saved,
                                                 const Tokens<T>& tokens, const Routing<T>& routing,
                                                 const Tape& d_tape, MatView<T> dx,
                                                 const Params<T>& grad) const {
  check_backward(shape(), saved, tokens, routing, d_tape, dx);
  require_shape("saved.side", saved.side, saved.prob.rows, head_.side());
  require_shape("d_tape.side", d_tape.side, d_tape.prob.rows, head_.side());
  head_.check(params);
  head_.check_gradient(grad);
}

template <class T, class Head, class Rule>
void HeadRouter<T, Head, Rule>::backward(const Params<const T>& params, const Buffers& buffers,
                                         const Tape& saved, const Tokens<T>& tokens,
                                         const Overrides<T>&, const Carry<const T>& carry_in,
                                         const Routing<T>& routing, const Tape& d_tape,
                                         const Carry<T>& d_carry_out, MatView<T> dx,
                                         const Params<T>& grad, const Carry<T>& d_carry_in,
                                         const Context& context) const {
  const Index count = tokens.count();
  require_backward(params, saved, tokens, routing, d_tape, dx, grad);
  check_call(tokens, buffers);
  const Workspace::Frame frame(context.scratch);
  const Tape rows = first_rows(saved, count), d_rows = first_rows(d_tape, count);
  if constexpr (by_row) {
    rows_backward(rule_, buffers, tokens, rows, routing, d_rows, context);
  } else {
    rule_.backward(
        RuleBatch<T>{tokens, rows.logits, rows.side, rows.prob}, buffers, routing,
        RuleBatchGradient<T>{d_rows.gate.row(0), d_rows.prob, d_rows.logits, d_rows.side}, context);
  }
  for (Index t = 0; t < count; ++t) {
    stages::override_logits_backward<T>(rows.logits.row(t), d_rows.logits.row(t));
    if (rows.side.cols == 0) continue;
    stages::override_logits_backward<T>(rows.side.row(t), d_rows.side.row(t));
  }
  head_.backward(params, rows.head, tokens, carry_in, d_rows.logits, d_rows.side, d_carry_out, dx,
                 grad, d_carry_in, context);
}

}  // namespace mole::inline MOLE_ABI
