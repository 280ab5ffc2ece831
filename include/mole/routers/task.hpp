// SPDX-License-Identifier: Apache-2.0
// TaskRouter: the task of a token decides, by a learned embedding, and not its content.
//
//   l_t = W m_(id_t) + b      S = the k largest, ties to the lower expert
//   g = softmax(l) on S, divided by its sum with renormalise
//
// Shapes: embedding m [tasks, task width], W [experts, task width], ids [tokens]. All tokens of a
// sequence have the id of its task, so a sequence has one gate; a host may also give every token
// its own domain, language or modality. A token without ids, or with an id that is negative or
// beyond the table, has no expert. x is not read. The logits of all tasks are computed once, when
// the parameters are prepared.
//
// Liu et al., "When MOE Meets LLMs: Parameter Efficient Fine-tuning for Multi-task Medical
// Applications", 2023 (MOELoRA): k = experts. Its experts are scaled by alpha / (rank · experts).
#pragma once

#include <cmath>

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/routing/head_router.hpp"
#include "mole/routing/top_k_rule.hpp"

namespace mole::inline MOLE_ABI {

template <class V>
struct TaskParams {
  MatView<V> embedding;    ///< [tasks, task width]
  LinearParams<V> router;  ///< W [experts, task width], b

  template <class F, class... P>
  static void visit(F&& f, P&... p) {
    f(Leaf{"embedding"}, p.embedding...);
    visit_group<LinearParams<V>>(Leaf{"router"}, f, p.router...);
  }
  operator TaskParams<const V>() const noexcept  // NOLINT(google-explicit-constructor)
      requires(!std::is_const_v<V>) {
    return {embedding, router};
  }
};

template <class T>
struct TaskHead {
  Index input_width = 0;  ///< of x, which is not read
  Index tasks = 0;
  Linear<T> linear;  ///< from the embedding to the logits

  template <class V>
  using Params = TaskParams<V>;
  struct Prepared {
    MatView<const T> logits;  ///< [tasks, experts]
  };
  using Tape = NoHeadTape;
  template <class V>
  using Carry = None;
  static constexpr Scope scope = Scope::token;

  Index width() const noexcept { return input_width; }
  Index experts() const noexcept { return linear.experts; }
  Index side() const noexcept { return 0; }

  std::size_t params_bytes() const noexcept;
  std::size_t prepared_bytes() const noexcept;
  std::size_t scratch_bytes(Index max_tokens, int workers) const noexcept;
  Params<T> make_params(Workspace& memory) const;
  Prepared prepare(const Params<const T>& params, Workspace& memory) const;
  template <class Arena>
  Tape take_tape(Arena&, Index) const {
    return {};
  }
  void check(const Params<const T>& params) const;
  void check_gradient(const Params<T>& grad) const;

  void forward(const Prepared& prepared, const Tokens<T>& tokens, None, MatView<T> logits,
               MatView<T> side, None, const Tape& tape, const Context& context) const;
  void backward(const Params<const T>& params, const Tape& saved, const Tokens<T>& tokens, None,
                MatView<const T> dlogits, MatView<const T> dside, None, MatView<T> dx,
                const Params<T>& grad, None, const Context& context) const;

 private:
  bool has_task(const Tokens<T>& tokens, Index t) const noexcept {
    return !tokens.ids.empty() && tokens.ids[t] >= 0 && tokens.ids[t] < tasks;
  }
};

template <class T>
class TaskRouter : public HeadRouter<T, TaskHead<T>, TopKRule<T>> {
 public:
  struct Config {
    Index width = 0;  ///< of x, which is not read
    Index experts = 0;
    Index tasks = 0;
    Index task_width = 64;
    Index k = 0;  ///< 1 ... experts, 0 = all
    bool renormalise = false;
    bool bias = false;  ///< the logits have a bias

    static constexpr std::string_view kind() noexcept { return "task"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field::required("tasks"), c.tasks...);
      f(Field::required("task_width"), c.task_width...);
      f(Field{"k"}, c.k...);
      f(Field{"renormalise"}, c.renormalise...);
      f(Field{"bias"}, c.bias...);
    }
  };

  /// Throws invalid_argument, naming the field.
  explicit TaskRouter(const Config& config)
      : HeadRouter<T, TaskHead<T>, TopKRule<T>>(
            {config.width, config.tasks,
             linear_head<T>("TaskRouter", config.task_width, config.experts, config.bias).linear},
            {config.k == 0 ? config.experts : config.k,
             {Score::softmax, false, config.renormalise, T(0), T(1)}}),
        config_(config) {
    require_field(config.width >= 0, "TaskRouter", "width", "at least 0", config.width);
    require_count("TaskRouter", "tasks", config.tasks);
    require_field(config.k >= 0 && config.k <= config.experts, "TaskRouter", "k", "0 ... experts",
                  config.k);
  }

  const Config& config() const noexcept { return config_; }

 private:
  Config config_;
};

template <class T>
std::size_t TaskHead<T>::params_bytes() const noexcept {
  ByteCounter counter;
  counter.take<T>(tasks, linear.width);
  return counter.bytes() + linear.params_bytes();
}

template <class T>
std::size_t TaskHead<T>::prepared_bytes() const noexcept {
  ByteCounter counter;
  counter.take<T>(tasks, linear.experts);
  return counter.bytes();
}

template <class T>
std::size_t TaskHead<T>::scratch_bytes(Index, int) const noexcept {
  ByteCounter counter;
  counter.take<double>(tasks, linear.experts);
  counter.take<T>(tasks, linear.experts);
  return counter.bytes() + stages::project_backward_bytes(linear.experts);
}

template <class T>
auto TaskHead<T>::make_params(Workspace& memory) const -> Params<T> {
  Params<T> params;
  params.embedding = memory.template take<T>(tasks, linear.width);
  params.router = linear.make_params(memory);
  return params;
}

template <class T>
auto TaskHead<T>::prepare(const Params<const T>& params, Workspace& memory) const -> Prepared {
  check(params);
  const MatView<T> logits = memory.template take<T>(tasks, linear.experts);
  for (Index i = 0; i < tasks; ++i) {
    for (Index e = 0; e < linear.experts; ++e) {
      T sum = T(0);
      for (Index j = 0; j < linear.width; ++j) {
        sum = std::fma(params.embedding(i, j), params.router.weight(e, j), sum);
      }
      logits(i, e) = linear.bias ? sum + params.router.bias(0, e) : sum;
    }
  }
  return {logits};
}

template <class T>
void TaskHead<T>::check(const Params<const T>& params) const {
  require_shape("embedding", params.embedding, tasks, linear.width);
  linear.check(params.router);
}

template <class T>
void TaskHead<T>::check_gradient(const Params<T>& grad) const {
  if (grad.embedding.data != nullptr) {
    require_shape("grad.embedding", grad.embedding, tasks, linear.width);
  }
  linear.check_gradient(grad.router);
}

template <class T>
void TaskHead<T>::forward(const Prepared& prepared, const Tokens<T>& tokens, None,
                          MatView<T> logits, MatView<T>, None, const Tape&, const Context&) const {
  for (Index t = 0; t < logits.rows; ++t) {
    if (has_task(tokens, t)) {
      std::ranges::copy(prepared.logits.row(tokens.ids[t]), logits.row(t).begin());
    } else {
      std::ranges::fill(logits.row(t), -std::numeric_limits<T>::infinity());
    }
  }
}

template <class T>
void TaskHead<T>::backward(const Params<const T>& params, const Tape&, const Tokens<T>& tokens,
                           None, MatView<const T> dlogits, MatView<const T>, None, MatView<T>,
                           const Params<T>& grad, None, const Context& context) const {
  const Workspace::Frame frame(context.scratch);
  const auto sum = context.scratch.take<double>(tasks, linear.experts);
  const auto dtask = context.scratch.template take<T>(tasks, linear.experts);
  std::fill_n(sum.data, sum.size(), 0.0);
  for (Index t = 0; t < dlogits.rows; ++t) {
    if (!has_task(tokens, t)) continue;
    for (Index e = 0; e < linear.experts; ++e) sum(tokens.ids[t], e) += dlogits(t, e);
  }
  std::transform(sum.data, sum.data + sum.size(), dtask.data,
                 [](double value) { return static_cast<T>(value); });
  stages::project_backward<T>(params.router, params.embedding, dtask, grad.embedding, grad.router,
                              context);
}

#ifndef MOLE_HEADER_ONLY
extern template struct TaskHead<float>;
extern template struct TaskHead<double>;
extern template class HeadRouter<float, TaskHead<float>, TopKRule<float>>;
extern template class HeadRouter<double, TaskHead<double>, TopKRule<double>>;
#endif

static_assert(Router<TaskRouter<float>>);
static_assert(Router<TaskRouter<double>>);

}  // namespace mole::inline MOLE_ABI
