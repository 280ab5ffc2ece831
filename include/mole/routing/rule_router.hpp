// SPDX-License-Identifier: Apache-2.0
// RuleRouter: a whole Router from a rule for one token. For routers with linear logits whose
// decision about a token depends on that token alone.
//
//   l = x Wᵀ + b (+ overrides)     (prob, gate) = rule(l)     an expert with gate 0 is not selected
//
// A rule is a value with three const noexcept members, rows of [experts]:
//
//   Index max_per_token(Index experts)
//   void forward(l, prob, gate)                      prob: what losses see
//   void backward(l, prob, gate, dgate, dprob, dl)   adds into dl; dgate is 0 where gate is 0
//
// A logit of -inf is an expert that is not available; its gate must be 0.
#pragma once

#include <algorithm>
#include <atomic>
#include <concepts>
#include <span>

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/routing/call.hpp"
#include "mole/routing/router.hpp"
#include "mole/routing/stages.hpp"

namespace mole::inline MOLE_ABI {

template <class Rule, class T>
concept TokenRule = requires(const Rule rule, std::span<const T> in, std::span<T> out, Index n) {
  { rule.max_per_token(n) } -> std::convertible_to<Index>;
  rule.forward(in, out, out);
  rule.backward(in, in, in, in, in, out);
};

template <class T, TokenRule<T> Rule>
class RuleRouter {
 public:
  struct Config {
    Index width = 0, experts = 0;
    bool bias = false;  ///< the router has a bias parameter
    Rule rule = {};

    /// A rule that has `kind` and `visit`, as a config has them, can be described.
    static constexpr std::string_view kind() noexcept requires requires { Rule::kind(); }
    { return Rule::kind(); }
    template <class F, class... C>
    static void visit(F&& f, C&... c) requires requires {
      Rule::kind();
    }
    {
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field{"bias"}, c.bias...);
      Rule::visit(f, c.rule...);
    }
  };

  using Scalar = T;
  template <class V>
  using Params = LinearParams<V>;
  using Prepared = LinearPrepared<T>;
  using Buffers = None;
  template <class V>
  using Carry = None;
  using Tape = RouterTape<T>;
  static constexpr Scope scope = Scope::token;
  static constexpr GradientKind gradient = GradientKind::exact;

  /// Throws invalid_argument, naming the field.
  explicit RuleRouter(const Config& config)
      : config_(config), head_{config.width, config.experts, config.bias} {
    require(config.width >= 1, Errc::invalid_argument,
            "RuleRouter: width: expected at least 1, got ", config.width);
    require(config.experts >= 1, Errc::invalid_argument,
            "RuleRouter: experts: expected at least 1, got ", config.experts);
  }

  const Config& config() const noexcept { return config_; }
  Index input_width() const noexcept { return config_.width; }
  Index experts() const noexcept { return config_.experts; }
  Index max_per_token() const noexcept { return config_.rule.max_per_token(config_.experts); }

  std::size_t params_bytes() const noexcept { return head_.params_bytes(); }
  std::size_t prepared_bytes() const noexcept { return head_.prepared_bytes(); }
  std::size_t scratch_bytes(Index max_tokens, int workers) const noexcept;
  std::size_t tape_bytes(Index max_tokens) const noexcept;

  Params<T> make_params(Workspace& memory) const { return head_.make_params(memory); }
  Prepared prepare(const Params<const T>& params, Workspace& memory) const {
    return head_.prepare(params, memory);
  }
  Tape make_tape(Workspace& memory, Index max_tokens) const {
    return take_tape<T>(memory, shape(), max_tokens);
  }

  void forward(const Prepared& prepared, None buffers, const Tokens<T>& tokens,
               const Overrides<T>& overrides, None carry_in, RoutingTable<T>& table, None carry_out,
               Tape* tape, const Context& context) const;

  void backward(const Params<const T>& params, None buffers, const Tape& saved,
                const Tokens<T>& tokens, const Overrides<T>& overrides, None carry_in,
                const Routing<T>& routing, const Tape& d_tape, None d_carry_out, MatView<T> dx,
                const Params<T>& grad, None d_carry_in, const Context& context) const;

  /// What `backward` checks before it adds anything. Throws shape_mismatch or invalid_argument.
  void require_backward(const Params<const T>& params, const Tape& saved, const Tokens<T>& tokens,
                        const Routing<T>& routing, const Tape& d_tape, MatView<T> dx,
                        const Params<T>& grad) const {
    check_backward(shape(), saved, tokens, routing, d_tape, dx);
    head_.check(params);
    head_.check_gradient(grad);
  }

 private:
  struct Scratch {
    WorkerRows<T> rows;  // three a worker
    WorkerRows<std::int32_t> chosen;
  };
  template <class Arena>
  Scratch take_scratch(Arena& arena, int workers) const {
    return {WorkerRows<T>(arena, workers, 3, config_.experts),
            WorkerRows<std::int32_t>(arena, workers, 1, config_.experts)};
  }
  RouterShape shape() const noexcept { return {config_.width, config_.experts, max_per_token()}; }

  Config config_;
  Linear<T> head_;
};

template <class T, TokenRule<T> Rule>
std::size_t RuleRouter<T, Rule>::scratch_bytes(Index max_tokens, int workers) const noexcept {
  ByteCounter counter, logits;
  take_scratch(counter, workers);
  logits.take<T>(max_tokens, config_.experts);
  return counter.bytes() +
         std::max(logits.bytes(), stages::project_backward_bytes(config_.experts));
}

template <class T, TokenRule<T> Rule>
std::size_t RuleRouter<T, Rule>::tape_bytes(Index max_tokens) const noexcept {
  ByteCounter counter;
  take_tape<T>(counter, shape(), max_tokens);
  return counter.bytes();
}

template <class T, TokenRule<T> Rule>
void RuleRouter<T, Rule>::forward(const Prepared& prepared, None, const Tokens<T>& tokens,
                                  const Overrides<T>& overrides, None, RoutingTable<T>& table, None,
                                  Tape* tape, const Context& context) const {
  const Index count = tokens.count();
  check_forward(shape(), tokens, overrides, table, tape);
  const Workspace::Frame frame(context.scratch);
  const Scratch scratch = take_scratch(context.scratch, context.workers);
  const MatView<T> logits = tape != nullptr
                                ? tape->logits.row_block(0, count)
                                : context.scratch.template take<T>(count, config_.experts);
  std::atomic<bool> too_many = false;
  table.begin(count);
  stages::project<T>(prepared, tokens.x, logits, context);
  parallel_for(context, count, kTokensPerTask, [&](Index begin, Index end, int worker) {
    const std::span<std::int32_t> chosen = scratch.chosen(worker, 0);
    const std::span<T> gate = scratch.rows(worker, 1), packed = scratch.rows(worker, 2);
    for (Index t = begin; t < end; ++t) {
      const std::span<T> prob = tape != nullptr ? tape->prob.row(t) : scratch.rows(worker, 0);
      stages::override_logits<T>(overrides, t, logits.row(t));
      config_.rule.forward(logits.row(t), prob, gate);
      std::size_t slots = 0;
      for (std::size_t e = 0; e < gate.size(); ++e) {
        if (gate[e] == T(0)) continue;
        chosen[slots] = static_cast<std::int32_t>(e);
        packed[slots++] = gate[e];
      }
      if (static_cast<Index>(slots) > max_per_token()) {
        too_many = true;
      } else {
        table.select(t, chosen.first(slots), packed.first(slots));
      }
    }
  });
  table.finish();
  require(!too_many, Errc::limit_exceeded,
          "RuleRouter: the rule selected more experts than its max_per_token, ", max_per_token());
  if (tape != nullptr) record_gates(table.view(), *tape);
}

template <class T, TokenRule<T> Rule>
void RuleRouter<T, Rule>::backward(const Params<const T>& params, None, const Tape& saved,
                                   const Tokens<T>& tokens, const Overrides<T>&, None,
                                   const Routing<T>& routing, const Tape& d_tape, None,
                                   MatView<T> dx, const Params<T>& grad, None,
                                   const Context& context) const {
  const Index count = tokens.count();
  require_backward(params, saved, tokens, routing, d_tape, dx, grad);
  const Workspace::Frame frame(context.scratch);
  const Scratch scratch = take_scratch(context.scratch, context.workers);
  parallel_for(context, count, kTokensPerTask, [&](Index begin, Index end, int worker) {
    const std::span<T> gate = scratch.rows(worker, 0), dgate = scratch.rows(worker, 1);
    for (Index t = begin; t < end; ++t) {
      std::fill(gate.begin(), gate.end(), T(0));
      std::fill(dgate.begin(), dgate.end(), T(0));
      for (Index slot = routing.token_begin[t]; slot < routing.token_begin[t + 1]; ++slot) {
        gate[routing.expert[slot]] = routing.gate[slot];
        dgate[routing.expert[slot]] = d_tape.gate(0, slot);
      }
      config_.rule.backward(saved.logits.row(t), saved.prob.row(t), gate, dgate, d_tape.prob.row(t),
                            d_tape.logits.row(t));
      stages::override_logits_backward<T>(saved.logits.row(t), d_tape.logits.row(t));
    }
  });
  stages::project_backward<T>(params, tokens.x, d_tape.logits.row_block(0, count), dx, grad,
                              context);
}

}  // namespace mole::inline MOLE_ABI
