// SPDX-License-Identifier: Apache-2.0
// TopKRouter: every token takes the k experts with the largest keys.
//
//   l = x Wᵀ + b (+ overrides)     u = l / temperature     s = score(u)
//   key = s (score_then_topk) or u (topk_then_score), + selection_bias
//   S = the k largest keys, ties to the lower expert
//   g = s on S, but softmax over S alone for topk_then_score with softmax
//   g <- g / (Σ_S g + renorm_epsilon) with renormalise        g <- scale · g
//
// Shapes: x [tokens, width], W [experts, width], b [1, experts], l, u, s [tokens, experts].
// The selection is a constant in backward. Without a selection bias keys are ranked by u, which
// orders the experts as s does and does not underflow. Fewer than k available experts: fewer slots.
//
// This is the router of Mixtral and OLMoE (softmax, renormalised or not), Granite and GPT-OSS
// (topk_then_score), Llama 4 (sigmoid), LFM2 (sigmoid with selection bias), MoLA and MixLoRA.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/routing/call.hpp"
#include "mole/routing/field_checks.hpp"
#include "mole/routing/router.hpp"
#include "mole/routing/stages.hpp"

namespace mole::inline MOLE_ABI {

template <class T>
class TopKRouter {
 public:
  using Order = TopKOrder;

  struct Config {
    Index width = 0, experts = 0;
    Index k = 2;  ///< 1 ... experts
    Score score = Score::softmax;
    Order order = Order::score_then_topk;
    bool renormalise = true;
    T renorm_epsilon = T(0);
    T temperature = T(1);
    T scale = T(1);
    bool bias = false;    ///< the router has a bias parameter
    bool probes = false;  ///< experts not selected become probe slots

    static constexpr std::string_view kind() noexcept { return "top_k"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field::required("k"), c.k...);
      f(Field{"score"}, c.score...);
      f(Field{"order"}, c.order...);
      f(Field{"renormalise"}, c.renormalise...);
      f(Field{"renorm_epsilon"}, c.renorm_epsilon...);
      f(Field{"temperature"}, c.temperature...);
      f(Field{"scale"}, c.scale...);
      f(Field{"bias"}, c.bias...);
      f(Field{"probes"}, c.probes...);
    }
  };

  struct Buffers {
    std::span<const T> selection_bias = {};  ///< [experts], or empty; ranks, never weighs

    template <class F, class... B>
    static void visit(F&& f, B&... b) {
      f(Leaf{"selection_bias"}, b.selection_bias...);
    }
  };

  using Scalar = T;
  template <class V>
  using Params = LinearParams<V>;
  using Prepared = LinearPrepared<T>;
  template <class V>
  using Carry = None;
  using Tape = RouterTape<T>;
  static constexpr Scope scope = Scope::token;
  static constexpr GradientKind gradient = GradientKind::exact;

  /// Throws invalid_argument, naming the field.
  explicit TopKRouter(const Config& config);

  const Config& config() const noexcept { return config_; }
  Index input_width() const noexcept { return config_.width; }
  Index experts() const noexcept { return config_.experts; }
  Index max_per_token() const noexcept { return config_.probes ? config_.experts : config_.k; }

  std::size_t params_bytes() const noexcept { return head_.params_bytes(); }
  std::size_t prepared_bytes() const noexcept { return head_.prepared_bytes(); }
  std::size_t scratch_bytes(Index max_tokens, int workers) const noexcept;
  std::size_t tape_bytes(Index max_tokens) const noexcept;

  Params<T> make_params(Workspace& memory) const { return head_.make_params(memory); }
  Prepared prepare(const Params<const T>& params, Workspace& memory) const;
  Tape make_tape(Workspace& memory, Index max_tokens) const;

  void forward(const Prepared& prepared, const Buffers& buffers, const Tokens<T>& tokens,
               const Overrides<T>& overrides, None carry_in, RoutingTable<T>& table, None carry_out,
               Tape* tape, const Context& context) const;

  void backward(const Params<const T>& params, const Buffers& buffers, const Tape& saved,
                const Tokens<T>& tokens, const Overrides<T>& overrides, None carry_in,
                const Routing<T>& routing, const Tape& d_tape, None d_carry_out, MatView<T> dx,
                const Params<T>& grad, None d_carry_in, const Context& context) const;

  /// Throws shape_mismatch unless the buffers fit; `forward` checks it.
  void require_buffers(const Buffers& buffers) const {
    require(buffers.selection_bias.empty() ||
                static_cast<Index>(buffers.selection_bias.size()) == config_.experts,
            Errc::shape_mismatch, "selection_bias: expected ", config_.experts, " values, got ",
            buffers.selection_bias.size());
  }
  /// What `backward` checks before it adds anything. Throws shape_mismatch or invalid_argument.
  void require_backward(const Params<const T>& params, const Tape& saved, const Tokens<T>& tokens,
                        const Routing<T>& routing, const Tape& d_tape, MatView<T> dx,
                        const Params<T>& grad) const {
    check_backward(shape(), saved, tokens, routing, d_tape, dx);
    head_.check(params);
    head_.check_gradient(grad);
  }

 private:
  /// Rows over all experts of one worker.
  struct Rows {
    std::span<T> u, score, key, gate, work;
    std::span<std::int32_t> chosen;
  };
  struct Scratch {
    WorkerRows<T> rows;
    WorkerRows<std::int32_t> chosen;
    Rows of(int worker) const noexcept;
  };
  template <class Arena>
  Scratch take_scratch(Arena& arena, int workers) const;

  void divide_by_temperature(std::span<const T> logits, std::span<T> u) const noexcept;
  /// Selects, weighs and writes the slots of one token. `score` empty: only if it is needed.
  void route(Index token, std::span<const T> logits, const Buffers& buffers, std::span<T> score,
             const Rows& rows, RoutingTable<T>& table) const;
  /// The slots of one token with probes: every available expert.
  void select_with_probes(Index token, std::span<const std::int32_t> chosen,
                          std::span<const T> gate, const Rows& rows, RoutingTable<T>& table) const;
  /// Adds the gradients that arrive by the gates and scores of one token into d_tape.logits.
  void route_backward(Index token, const Routing<T>& routing, const Tape& saved, const Tape& d_tape,
                      const Rows& rows) const noexcept;

  RouterShape shape() const noexcept { return {config_.width, config_.experts, max_per_token()}; }

  Config config_;
  Linear<T> head_;
  Weighting<T> weighting_;
};

template <class T>
TopKRouter<T>::TopKRouter(const Config& config)
    : config_(config),
      head_{config.width, config.experts, config.bias},
      weighting_{config.score, config.order == Order::topk_then_score, config.renormalise,
                 config.renorm_epsilon, config.scale} {
  constexpr const char* kName = "TopKRouter";
  require_count(kName, "width", config.width);
  require_count(kName, "experts", config.experts);
  require_k(kName, config.k, config.experts);
  require_positive(kName, "temperature", config.temperature);
  require_from_zero(kName, "renorm_epsilon", config.renorm_epsilon);
  require_finite(kName, "scale", config.scale);
}

template <class T>
auto TopKRouter<T>::Scratch::of(int worker) const noexcept -> Rows {
  return {rows(worker, 0), rows(worker, 1), rows(worker, 2),
          rows(worker, 3), rows(worker, 4), chosen(worker, 0)};
}

template <class T>
template <class Arena>
auto TopKRouter<T>::take_scratch(Arena& arena, int workers) const -> Scratch {
  return {WorkerRows<T>(arena, workers, 5, config_.experts),
          WorkerRows<std::int32_t>(arena, workers, 1, config_.experts)};
}

template <class T>
std::size_t TopKRouter<T>::scratch_bytes(Index max_tokens, int workers) const noexcept {
  ByteCounter counter;
  take_scratch(counter, workers);
  const std::size_t backward = stages::project_backward_bytes(config_.experts);
  ByteCounter logits;
  logits.take<T>(max_tokens, config_.experts);
  return counter.bytes() + std::max(logits.bytes(), backward);
}

template <class T>
std::size_t TopKRouter<T>::tape_bytes(Index max_tokens) const noexcept {
  ByteCounter counter;
  take_tape<T>(counter, shape(), max_tokens);
  return counter.bytes();
}

template <class T>
auto TopKRouter<T>::prepare(const Params<const T>& params, Workspace& memory) const -> Prepared {
  return head_.prepare(params, memory);
}

template <class T>
auto TopKRouter<T>::make_tape(Workspace& memory, Index max_tokens) const -> Tape {
  return take_tape<T>(memory, shape(), max_tokens);
}

template <class T>
void TopKRouter<T>::divide_by_temperature(std::span<const T> logits,
                                          std::span<T> u) const noexcept {
  for (std::size_t e = 0; e < u.size(); ++e) u[e] = logits[e] / config_.temperature;
}

template <class T>
void TopKRouter<T>::route(Index token, std::span<const T> logits, const Buffers& buffers,
                          std::span<T> score, const Rows& rows, RoutingTable<T>& table) const {
  divide_by_temperature(logits, rows.u);
  const bool ranks_by_score =
      config_.order == Order::score_then_topk && !buffers.selection_bias.empty();
  const bool needs_score = !score.empty() || ranks_by_score || !weighting_.shares();
  if (score.empty()) score = rows.score;
  if (needs_score) stages::score<T>(config_.score, rows.u, score);
  stages::selection_key<T>(rows.u, ranks_by_score ? score : rows.u, buffers.selection_bias,
                           rows.key);
  const Index count = stages::select_top_k<T>(rows.key, rows.chosen.first(config_.k));
  const std::span<const std::int32_t> chosen = rows.chosen.first(count);
  const std::span<T> gate = rows.gate.first(count);
  stages::weigh<T>(weighting_, rows.u, score, chosen, gate);
  if (config_.probes) return select_with_probes(token, chosen, gate, rows, table);
  table.select(token, chosen, gate);
}

template <class T>
void TopKRouter<T>::select_with_probes(Index token, std::span<const std::int32_t> chosen,
                                       std::span<const T> gate, const Rows& rows,
                                       RoutingTable<T>& table) const {
  const std::span<T> gate_of = rows.work;
  std::fill(gate_of.begin(), gate_of.end(), T(0));
  for (std::size_t i = 0; i < chosen.size(); ++i) gate_of[chosen[i]] = gate[i];
  Index slots = 0;
  for (std::size_t e = 0; e < gate_of.size(); ++e) {
    if (rows.u[e] == -std::numeric_limits<T>::infinity()) continue;
    rows.chosen[slots] = static_cast<std::int32_t>(e);
    rows.gate[slots++] = gate_of[e];
  }
  table.select(token, rows.chosen.first(slots), rows.gate.first(slots));
}

template <class T>
void TopKRouter<T>::forward(const Prepared& prepared, const Buffers& buffers,
                            const Tokens<T>& tokens, const Overrides<T>& overrides, None,
                            RoutingTable<T>& table, None, Tape* tape,
                            const Context& context) const {
  const Index count = tokens.count();
  check_forward(shape(), tokens, overrides, table, tape);
  require_buffers(buffers);
  const Workspace::Frame frame(context.scratch);
  const Scratch scratch = take_scratch(context.scratch, context.workers);
  const MatView<T> logits = tape != nullptr
                                ? tape->logits.row_block(0, count)
                                : context.scratch.template take<T>(count, config_.experts);
  table.begin(count);
  stages::project<T>(prepared, tokens.x, logits, context);
  parallel_for(context, count, kTokensPerTask, [&](Index begin, Index end, int worker) {
    const Rows rows = scratch.of(worker);
    for (Index t = begin; t < end; ++t) {
      stages::override_logits<T>(overrides, t, logits.row(t));
      route(t, logits.row(t), buffers, tape != nullptr ? tape->prob.row(t) : std::span<T>(), rows,
            table);
    }
  });
  table.finish();
  if (tape != nullptr) record_gates(table.view(), *tape);
}

template <class T>
void TopKRouter<T>::route_backward(Index token, const Routing<T>& routing, const Tape& saved,
                                   const Tape& d_tape, const Rows& rows) const noexcept {
  const std::span<const T> score = saved.prob.row(token), dprob = d_tape.prob.row(token);
  const std::span<T> dscore = rows.score, du = rows.key, dgate = rows.gate;
  divide_by_temperature(saved.logits.row(token), rows.u);
  std::copy(dprob.begin(), dprob.end(), dscore.begin());
  std::fill(du.begin(), du.end(), T(0));

  // A slot with a gate of 0 is a probe, or its score has underflowed and has no slope either.
  Index count = 0;
  for (Index slot = routing.token_begin[token]; slot < routing.token_begin[token + 1]; ++slot) {
    if (routing.gate[slot] == T(0)) continue;
    rows.chosen[count] = routing.expert[slot];
    dgate[count++] = d_tape.gate(0, slot);
  }
  stages::weigh_backward<T>(weighting_, rows.u, score, rows.chosen.first(count), dgate.first(count),
                            dscore, du, rows.work.first(count));
  stages::score_backward<T>(config_.score, rows.u, score, dscore, du);
  const std::span<T> dlogits = d_tape.logits.row(token);
  for (std::size_t e = 0; e < du.size(); ++e) dlogits[e] += du[e] / config_.temperature;
  stages::override_logits_backward<T>(saved.logits.row(token), dlogits);
}

template <class T>
void TopKRouter<T>::backward(const Params<const T>& params, const Buffers&, const Tape& saved,
                             const Tokens<T>& tokens, const Overrides<T>&, None,
                             const Routing<T>& routing, const Tape& d_tape, None, MatView<T> dx,
                             const Params<T>& grad, None, const Context& context) const {
  const Index count = tokens.count();
  require_backward(params, saved, tokens, routing, d_tape, dx, grad);
  const Workspace::Frame frame(context.scratch);
  const Scratch scratch = take_scratch(context.scratch, context.workers);
  parallel_for(context, count, kTokensPerTask, [&](Index begin, Index end, int worker) {
    for (Index t = begin; t < end; ++t) {
      route_backward(t, routing, saved, d_tape, scratch.of(worker));
    }
  });
  stages::project_backward<T>(params, tokens.x, d_tape.logits.row_block(0, count), dx, grad,
                              context);
}

#ifndef MOLE_HEADER_ONLY
extern template class TopKRouter<float>;
extern template class TopKRouter<double>;
#endif

static_assert(Router<TopKRouter<float>>);
static_assert(Router<TopKRouter<double>>);

}  // namespace mole::inline MOLE_ABI
