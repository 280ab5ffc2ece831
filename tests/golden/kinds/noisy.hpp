// SPDX-License-Identifier: Apache-2.0
// What the noisy top-k router and the layer with it have in common.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "golden/golden.hpp"
#include "golden/kinds/router_run.hpp"
#include "mole/losses/importance.hpp"
#include "mole/losses/noisy_load.hpp"
#include "mole/routers/noisy_top_k.hpp"

namespace golden {

template <class T>
mole::NoisyTopKRouter<T> noisy_router(Case<T>& c, Index width, Index experts) {
  const bool softmax_first = c.template config<std::string>("order") == "softmax_then_topk";
  return mole::NoisyTopKRouter<T>({.width = width,
                                   .experts = experts,
                                   .k = c.template config<Index>("k"),
                                   .order = softmax_first ? mole::NoisyOrder::softmax_then_topk
                                                          : mole::NoisyOrder::topk_then_softmax,
                                   .noise_epsilon = c.template config<T>("noise_epsilon"),
                                   .renorm_epsilon = c.template config<T>("renorm_eps"),
                                   .bias = has_router_bias(c)});
}

template <class T>
typename mole::NoisyTopKRouter<T>::Buffers noisy_buffers(Case<T>& c) {
  typename mole::NoisyTopKRouter<T>::Buffers buffers;
  if (c.template config<bool>("train")) buffers.noise = c.matrix("in.noise");
  return buffers;
}

/// Expects the decision; adds the losses' gradients to d_tape.
template <class T, class Tape>
void run_noisy_losses(Case<T>& c, const mole::NoisyTopKRouter<T>& router,
                      const mole::Routing<T>& routing, const Tape& tape, const Tape& d_tape) {
  const bool train = c.template config<bool>("train");
  const MatView<const T> noise = noisy_buffers(c).noise;
  const Index tokens = routing.tokens, experts = routing.experts;
  const MatView<T> gate = zeros(c, tokens, experts), mask = zeros(c, tokens, experts),
                   dgate = zeros(c, tokens, experts), z = zeros(c, tokens, experts);
  std::vector<double> importance(static_cast<std::size_t>(experts)), load(importance.size());
  for (Index t = 0; t < tokens; ++t) {
    std::ranges::copy(tape.logits.row(t), z.row(t).begin());
    if (train) {
      router.rule().noisy_logits(tape.logits.row(t), tape.side.row(t), noise.row(t), z.row(t));
    }
    for (Index s = routing.token_begin[t]; s < routing.token_begin[t + 1]; ++s) {
      const Index e = routing.expert[s];
      gate(t, e) = routing.gate[s];
      mask(t, e) = T(1);
      importance[e] += routing.gate[s];
      load[e] += routing.gate[s] > T(0);
    }
  }
  c.expect("out.gate", gate);
  c.expect("out.mask", mask);
  c.expect("out.logits", z);
  if (c.has("out.importance")) c.expect("out.importance", importance);
  const double weight = c.template config<double>("loss_coef");
  const double share = weight * c.config("loss_weight", 0.0);
  const MatView<const T> gates = gate, logits = tape.logits;
  double loss = mole::importance_loss<T>({weight}, gates, {}, c.context());
  mole::importance_loss<T>({share}, gates, dgate, c.context());
  if (train && router.max_per_token() < experts) {
    mole::NoisyLoad<T> how{
        .weight = weight,
        .k = router.max_per_token(),
        .noise_epsilon = c.template config<T>("noise_epsilon"),
        .limit_is_prob = c.template config<std::string>("load_threshold") == "prob"};
    loss += mole::noisy_load_loss<T>(how, logits, tape.side, noise, load, {}, {}, c.context());
    how.weight = share;
    mole::noisy_load_loss<T>(how, logits, tape.side, noise, load, d_tape.logits, d_tape.side,
                             c.context());
  } else {
    loss += mole::cv_squared({weight}, load, {});
  }
  c.expect("out.load", load);
  c.expect("out.loss", loss);
  for (Index t = 0; t < tokens; ++t) {
    for (Index s = routing.token_begin[t]; s < routing.token_begin[t + 1]; ++s) {
      d_tape.gate(0, s) += dgate(t, routing.expert[s]);
    }
  }
}

}  // namespace golden
