// SPDX-License-Identifier: Apache-2.0
// What the routers share that decide for all tokens at once: scores of all tokens, and gates that
// are scores of the slots that were kept.
#pragma once

#include <algorithm>
#include <cmath>
#include <span>

#include "mole/core/config.hpp"
#include "mole/core/context.hpp"
#include "mole/routing/call.hpp"
#include "mole/routing/routing.hpp"
#include "mole/routing/score.hpp"
#include "mole/routing/select.hpp"
#include "mole/routing/weight.hpp"

namespace mole::inline MOLE_ABI::stages {

/// prob = softmax of every row of logits.
template <class T>
void softmax_rows(MatView<const T> logits, MatView<T> prob, const Context& context) {
  parallel_for(context, logits.rows, kTokensPerTask, [&](Index begin, Index end, int) {
    for (Index t = begin; t < end; ++t) softmax<T>(logits.row(t), prob.row(t));
  });
}

inline std::size_t softmax_gates_backward_bytes(Index experts, int workers) noexcept {
  ByteCounter counter;
  WorkerRows<double>(counter, workers, 3, experts);
  WorkerRows<std::int32_t>(counter, workers, 1, experts);
  return counter.bytes();
}

/// One token in the backward of a router whose scores are a softmax. Rows over all experts are
/// scratch but for `dprob`, which starts as the gradient that losses gave the scores.
template <class T>
struct SoftmaxGatesRow {
  Index token = 0;
  std::span<const T> logits, prob;
  std::span<const std::int32_t> chosen;  ///< ascending
  std::span<const T> gate, dgate;        ///< of the chosen
  std::span<T> dprob, work;
  std::span<std::int32_t> order;
};

/// dlogits += the softmax's backward of what body(row) leaves in row.dprob, for every token.
template <class T, class Body>
void softmax_gates_backward(MatView<const T> logits, MatView<const T> prob,
                            const Routing<T>& routing, std::span<const T> dgate,
                            MatView<const T> dprob, MatView<T> dlogits, const Context& context,
                            Body body) {
  const Workspace::Frame frame(context.scratch);
  const WorkerRows<T> rows(context.scratch, context.workers, 2, logits.cols);
  const WorkerRows<std::int32_t> ids(context.scratch, context.workers, 1, logits.cols);
  parallel_for(context, logits.rows, kTokensPerTask, [&](Index begin, Index end, int worker) {
    for (Index t = begin; t < end; ++t) {
      const auto first = static_cast<std::size_t>(routing.token_begin[t]);
      const auto slots = static_cast<std::size_t>(routing.token_begin[t + 1]) - first;
      SoftmaxGatesRow<T> row{t,
                             logits.row(t),
                             prob.row(t),
                             routing.expert.subspan(first, slots),
                             routing.gate.subspan(first, slots),
                             dgate.subspan(first, slots),
                             rows(worker, 0),
                             rows(worker, 1),
                             ids(worker, 0)};
      std::copy_n(dprob.row(t).begin(), logits.cols, row.dprob.begin());
      body(row);
      softmax_backward<T>(row.prob, row.dprob, dlogits.row(t));
    }
  });
}

/// dlogits += the backward of scores prob = sigmoid(logits) and of gates that are those scores.
template <class T>
void sigmoid_gates_backward(MatView<const T> logits, MatView<const T> prob,
                            const Routing<T>& routing, std::span<const T> dgate,
                            MatView<const T> dprob, MatView<T> dlogits, const Context& context) {
  parallel_for(context, logits.rows, kTokensPerTask, [&](Index begin, Index end, int) {
    for (Index t = begin; t < end; ++t) {
      score_backward<T>(Score::sigmoid, logits.row(t), prob.row(t), dprob.row(t), dlogits.row(t));
      for (Index s = routing.token_begin[t]; s < routing.token_begin[t + 1]; ++s) {
        const Index e = routing.expert[s];
        const T p = prob(t, e);
        dlogits(t, e) = std::fma(dgate[s], p * (T(1) - p), dlogits(t, e));
      }
    }
  });
}

/// dprob of gates prob / Σ prob over the chosen.
template <class T>
void add_shares(const SoftmaxGatesRow<T>& row) noexcept {
  T sum = T(0);
  for (const std::int32_t e : row.chosen) sum += row.prob[e];
  shares_backward<T>(row.chosen, row.gate, row.dgate, sum, row.dprob);
}

/// dprob of gates prob.
template <class T>
void add_scores(const SoftmaxGatesRow<T>& row) noexcept {
  for (std::size_t i = 0; i < row.chosen.size(); ++i) row.dprob[row.chosen[i]] += row.dgate[i];
}

/// dprob of gates prob / (Σ prob over the `among` best + epsilon), of which some may have been
/// dropped. A sum of 0 has divided by 1.
template <class T>
void add_shares_of_best(const SoftmaxGatesRow<T>& row, Index among, T epsilon) noexcept {
  const auto found = static_cast<std::size_t>(
      stages::select_top_k<T>(row.logits, row.order.first(static_cast<std::size_t>(among))));
  const std::span<const std::int32_t> best = row.order.first(found);
  T sum = epsilon, mean = T(0);
  for (const std::int32_t e : best) sum += row.prob[e];
  if (sum == T(0)) return add_scores(row);
  for (std::size_t i = 0; i < row.gate.size(); ++i) {
    mean = std::fma(row.gate[i], row.dgate[i], mean);
    row.dprob[row.chosen[i]] += row.dgate[i] / sum;
  }
  for (const std::int32_t e : best) row.dprob[e] -= mean / sum;
}

}  // namespace mole::inline MOLE_ABI::stages
