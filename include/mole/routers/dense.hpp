// SPDX-License-Identifier: Apache-2.0
// DenseRouter: every token takes every expert.
//
//   l = x Wᵀ + b (+ overrides)     g = softmax(l / temperature)
//
// Shapes: x [tokens, width], W [experts, width], b [1, experts], l, g [tokens, experts]. Experts
// that are not available have no slot. This is the router of LoRAMoE and HydraLoRA.
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
class DenseRouter {
 public:
  struct Config {
    Index width = 0, experts = 0;
    T temperature = T(1);
    bool bias = false;  ///< the router has a bias parameter

    static constexpr std::string_view kind() noexcept { return "dense"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field{"temperature"}, c.temperature...);
      f(Field{"bias"}, c.bias...);
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
  explicit DenseRouter(const Config& config);

  const Config& config() const noexcept { return config_; }
  Index input_width() const noexcept { return config_.width; }
  Index experts() const noexcept { return config_.experts; }
  Index max_per_token() const noexcept { return config_.experts; }

  std::size_t params_bytes() const noexcept { return head_.params_bytes(); }
  std::size_t prepared_bytes() const noexcept { return head_.prepared_bytes(); }
  std::size_t scratch_bytes(Index max_tokens, int workers) const noexcept;
  std::size_t tape_bytes(Index max_tokens) const noexcept;

  Params<T> make_params(Workspace& memory) const { return head_.make_params(memory); }
  Prepared prepare(const Params<const T>& params, Workspace& memory) const;
  Tape make_tape(Workspace& memory, Index max_tokens) const;

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
    WorkerRows<T> rows;  ///< two a worker
    WorkerRows<std::int32_t> chosen;
  };
  template <class Arena>
  Scratch take_scratch(Arena& arena, int workers) const;

  RouterShape shape() const noexcept { return {config_.width, config_.experts, config_.experts}; }

  Config config_;
  Linear<T> head_;
};

template <class T>
DenseRouter<T>::DenseRouter(const Config& config)
    : config_(config), head_{config.width, config.experts, config.bias} {
  constexpr const char* kName = "DenseRouter";
  require_count(kName, "width", config.width);
  require_count(kName, "experts", config.experts);
  require_positive(kName, "temperature", config.temperature);
}

template <class T>
template <class Arena>
auto DenseRouter<T>::take_scratch(Arena& arena, int workers) const -> Scratch {
  return {WorkerRows<T>(arena, workers, 2, config_.experts),
          WorkerRows<std::int32_t>(arena, workers, 1, config_.experts)};
}

template <class T>
std::size_t DenseRouter<T>::scratch_bytes(Index max_tokens, int workers) const noexcept {
  ByteCounter counter, logits;
  take_scratch(counter, workers);
  logits.take<T>(max_tokens, config_.experts);
  return counter.bytes() +
         std::max(logits.bytes(), stages::project_backward_bytes(config_.experts));
}

template <class T>
std::size_t DenseRouter<T>::tape_bytes(Index max_tokens) const noexcept {
  ByteCounter counter;
  take_tape<T>(counter, shape(), max_tokens);
  return counter.bytes();
}

template <class T>
auto DenseRouter<T>::prepare(const Params<const T>& params, Workspace& memory) const -> Prepared {
  return head_.prepare(params, memory);
}

template <class T>
auto DenseRouter<T>::make_tape(Workspace& memory, Index max_tokens) const -> Tape {
  return take_tape<T>(memory, shape(), max_tokens);
}

template <class T>
void DenseRouter<T>::forward(const Prepared& prepared, None, const Tokens<T>& tokens,
                             const Overrides<T>& overrides, None, RoutingTable<T>& table, None,
                             Tape* tape, const Context& context) const {
  const Index count = tokens.count();
  check_forward(shape(), tokens, overrides, table, tape);
  const Workspace::Frame frame(context.scratch);
  const Scratch scratch = take_scratch(context.scratch, context.workers);
  const MatView<T> logits = tape != nullptr
                                ? tape->logits.row_block(0, count)
                                : context.scratch.template take<T>(count, config_.experts);
  table.begin(count);
  stages::project<T>(prepared, tokens.x, logits, context);
  parallel_for(context, count, kTokensPerTask, [&](Index begin, Index end, int worker) {
    const std::span<T> u = scratch.rows(worker, 0), gate = scratch.rows(worker, 1);
    const std::span<std::int32_t> chosen = scratch.chosen(worker, 0);
    for (Index t = begin; t < end; ++t) {
      stages::override_logits<T>(overrides, t, logits.row(t));
      for (std::size_t e = 0; e < u.size(); ++e) u[e] = logits(t, e) / config_.temperature;
      stages::softmax<T>(u, gate);
      if (tape != nullptr) std::copy(gate.begin(), gate.end(), tape->prob.row(t).begin());
      std::size_t slots = 0;
      for (std::size_t e = 0; e < u.size(); ++e) {
        if (u[e] == -std::numeric_limits<T>::infinity()) continue;
        chosen[slots] = static_cast<std::int32_t>(e);
        gate[slots++] = gate[e];
      }
      table.select(t, chosen.first(slots), gate.first(slots));
    }
  });
  table.finish();
  if (tape != nullptr) record_gates(table.view(), *tape);
}

template <class T>
void DenseRouter<T>::backward(const Params<const T>& params, None, const Tape& saved,
                              const Tokens<T>& tokens, const Overrides<T>&, None,
                              const Routing<T>& routing, const Tape& d_tape, None, MatView<T> dx,
                              const Params<T>& grad, None, const Context& context) const {
  const Index count = tokens.count();
  require_backward(params, saved, tokens, routing, d_tape, dx, grad);
  const Workspace::Frame frame(context.scratch);
  const Scratch scratch = take_scratch(context.scratch, context.workers);
  parallel_for(context, count, kTokensPerTask, [&](Index begin, Index end, int worker) {
    const std::span<T> dprob = scratch.rows(worker, 0), du = scratch.rows(worker, 1);
    for (Index t = begin; t < end; ++t) {
      for (std::size_t e = 0; e < dprob.size(); ++e) dprob[e] = d_tape.prob(t, e);
      for (Index slot = routing.token_begin[t]; slot < routing.token_begin[t + 1]; ++slot) {
        dprob[routing.expert[slot]] += d_tape.gate(0, slot);
      }
      std::fill(du.begin(), du.end(), T(0));
      stages::softmax_backward<T>(saved.prob.row(t), dprob, du);
      for (std::size_t e = 0; e < du.size(); ++e)
        d_tape.logits(t, e) += du[e] / config_.temperature;
      stages::override_logits_backward<T>(saved.logits.row(t), d_tape.logits.row(t));
    }
  });
  stages::project_backward<T>(params, tokens.x, d_tape.logits.row_block(0, count), dx, grad,
                              context);
}

#ifndef MOLE_HEADER_ONLY
extern template class DenseRouter<float>;
extern template class DenseRouter<double>;
#endif

static_assert(Router<DenseRouter<float>>);
static_assert(Router<DenseRouter<double>>);

}  // namespace mole::inline MOLE_ABI
