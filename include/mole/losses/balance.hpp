// SPDX-License-Identifier: Apache-2.0
// Load balance losses: how often an expert is chosen, times how much the router wants it.
//
//   loss = weight · E · Σ_e f_e P_e       P_e = (1/N) Σ_t prob(t, e)
//   f_e = n_e / N (per_token)             n_e = number of active slots of expert e
//   f_e = n_e / Σ n (per_selection)       N   = number of real tokens
//
// With perfect balance and k experts a token the value is weight · k (per_token) or weight
// (per_selection). f is a constant in the gradient: dprob(t, e) += weight · E · f_e / N for real
// tokens. Without a real token, or with nothing selected, the loss is 0.
//
//   which one                                    load_per    further fields
//   Mixtral, MixLoRA, RMoE (all layers pooled)   token
//   Switch, GShard's first choice                token       sequence_begin
//   MoLA (a block's modules added up)            selection
//   DeepSpeed, DeepSeekMoE                       selection   sequence_begin for its seq_aux
//   Megatron-LM                                  token       load_divisor k, normalise_scores
//   LLaVA-MoLE (layers pooled)                   token       by_experts false, sequence_begin
//   AdaMoLE                                      token       count_zero_gates; see shifted_balance
//
// Layers whose tokens are pooled compensate each other: that is a weaker demand than the sum of
// their losses.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <type_traits>

#include "mole/core/config.hpp"
#include "mole/core/context.hpp"
#include "mole/core/error.hpp"
#include "mole/core/view.hpp"
#include "mole/losses/add_product.hpp"
#include "mole/routing/routing.hpp"

namespace mole::inline MOLE_ABI {

/// What the counts of the balance loss are divided by.
enum class LoadPer { token, selection };

template <class T>
struct BalanceLoss {
  T weight = T(1);
  LoadPer load_per = LoadPer::token;
  std::span<const std::uint8_t> mask = {};  ///< [tokens], 1 = real token; empty: all real
  /// Counts every slot. For a routing without probes: a selected expert whose gate has underflowed
  /// to 0 counts too.
  bool count_zero_gates = false;
  T load_divisor = T(1);          ///< f is divided by it; k makes perfect balance 1
  bool by_experts = true;         ///< the factor E
  bool normalise_scores = false;  ///< P of prob / (Σ_e prob + 1e-20)
  /// [sequences + 1]: the mean over the sequences of the loss of each; empty: all tokens at once.
  std::span<const std::int32_t> sequence_begin = {};
  bool equal_sequences = false;  ///< N is the mean number of real tokens of a sequence
};

/// One layer of a pooled loss.
template <class T>
struct BalancedLayer {
  Routing<T> routing;
  MatView<const T> prob;  ///< [tokens or more, experts], the scores of the router's tape
  MatView<T> dprob = {};  ///< or empty
};

/// The layers' tokens are pooled; all have the same tokens and experts. Rows of prob beyond the
/// tokens of the routing, as a tape for larger calls has them, are not looked at. Tokens are summed
/// in ascending order, layer by layer, in double. Throws shape_mismatch or invalid_argument.
template <class T>
T balance_loss(const BalanceLoss<T>& loss,
               std::type_identity_t<std::span<const BalancedLayer<T>>> layers,
               const Context& context);

/// Of one layer.
template <class T>
T balance_loss(const BalanceLoss<T>& loss, const Routing<T>& routing,
               std::type_identity_t<MatView<const T>> prob, std::type_identity_t<MatView<T>> dprob,
               const Context& context) {
  const BalancedLayer<T> layer[] = {{routing, prob, dprob}};
  return balance_loss<T>(loss, std::span<const BalancedLayer<T>>(layer), context);
}

namespace detail {

/// The sums of one balance loss.
template <class T>
class BalanceSums {
 public:
  BalanceSums(const BalanceLoss<T>& loss, std::span<const BalancedLayer<T>> layers,
              const Context& context)
      : loss_(loss),
        layers_(layers),
        experts_(layers.front().routing.experts),
        count_(context.scratch.take<double>(experts_)),
        sum_(context.scratch.take<double>(experts_)) {}

  /// Of the tokens begin ... end - 1. `real_tokens` < 0: as many as there are.
  double value(Index begin, Index end, double share, double real_tokens) {
    std::fill(count_.begin(), count_.end(), 0.0);
    std::fill(sum_.begin(), sum_.end(), 0.0);
    double real = 0, selected = 0;
    for (const BalancedLayer<T>& layer : layers_) {
      for (Index t = begin; t < end; ++t) {
        if (!is_real(t)) continue;
        ++real;
        const double unit = 1 / row_sum(layer.prob, t);
        for (Index e = 0; e < experts_; ++e) add_product(sum_[e], unit, layer.prob(t, e));
        selected += add_counts(layer.routing, t);
      }
    }
    if (real_tokens >= 0) real = real_tokens;
    if (selected == 0 || real == 0) return 0;
    const double divisor =
        (loss_.load_per == LoadPer::token ? real : selected) * loss_.load_divisor;
    const double factor = loss_.by_experts ? static_cast<double>(experts_) : 1.0;
    double value = 0;
    for (Index e = 0; e < experts_; ++e) {
      count_[e] = share * loss_.weight * factor * (count_[e] / divisor) / real;
      value = std::fma(count_[e], sum_[e], value);
    }
    for (const BalancedLayer<T>& layer : layers_) add_gradient(layer, begin, end);
    return value;
  }

  bool is_real(Index t) const noexcept { return loss_.mask.empty() || loss_.mask[t] != 0; }

 private:
  double row_sum(MatView<const T> prob, Index t) const noexcept {
    if (!loss_.normalise_scores) return 1;
    double sum = 1e-20;
    for (Index e = 0; e < experts_; ++e) sum += prob(t, e);
    return sum;
  }

  double add_counts(const Routing<T>& routing, Index t) noexcept {
    double added = 0;
    for (Index slot = routing.token_begin[t]; slot < routing.token_begin[t + 1]; ++slot) {
      if (routing.gate[slot] == T(0) && !loss_.count_zero_gates) continue;
      ++count_[routing.expert[slot]];
      ++added;
    }
    return added;
  }

  /// `count_` holds the gradient by the scores, or by the normalised ones.
  void add_gradient(const BalancedLayer<T>& layer, Index begin, Index end) noexcept {
    if (layer.dprob.data == nullptr) return;
    for (Index t = begin; t < end; ++t) {
      if (!is_real(t)) continue;
      const double sum = row_sum(layer.prob, t);
      double mean = 0;
      for (Index e = 0; loss_.normalise_scores && e < experts_; ++e) {
        mean = std::fma(count_[e], layer.prob(t, e) / sum, mean);
      }
      for (Index e = 0; e < experts_; ++e) {
        layer.dprob(t, e) += static_cast<T>((count_[e] - mean) / sum);
      }
    }
  }

  const BalanceLoss<T>& loss_;
  std::span<const BalancedLayer<T>> layers_;
  Index experts_;
  std::span<double> count_, sum_;
};

template <class T>
void check_balance(const BalanceLoss<T>& loss, std::span<const BalancedLayer<T>> layers) {
  const Index tokens = layers.front().routing.tokens, experts = layers.front().routing.experts;
  for (const BalancedLayer<T>& layer : layers) {
    require(layer.routing.tokens == tokens && layer.routing.experts == experts,
            Errc::shape_mismatch, "routing: expected ", tokens, " tokens and ", experts,
            " experts as in the first layer, got ", layer.routing.tokens, " and ",
            layer.routing.experts);
    require(layer.prob.rows >= tokens, Errc::shape_mismatch, "prob: expected at least ", tokens,
            " rows, got ", layer.prob.rows);
    require_shape("prob", layer.prob, layer.prob.rows, experts);
    if (layer.dprob.data != nullptr) require_shape("dprob", layer.dprob, layer.prob.rows, experts);
  }
  require(loss.mask.empty() || static_cast<Index>(loss.mask.size()) == tokens, Errc::shape_mismatch,
          "mask: expected ", tokens, " values, got ", loss.mask.size());
  const auto begin = loss.sequence_begin;
  require(begin.empty() || (begin.front() == 0 && begin.back() == tokens &&
                            std::is_sorted(begin.begin(), begin.end())),
          Errc::invalid_argument, "sequence_begin: expected to ascend from 0 to ", tokens);
}

}  // namespace detail

template <class T>
T balance_loss(const BalanceLoss<T>& loss,
               std::type_identity_t<std::span<const BalancedLayer<T>>> layers,
               const Context& context) {
  if (layers.empty()) return T(0);
  detail::check_balance<T>(loss, layers);
  const Workspace::Frame frame(context.scratch);
  detail::BalanceSums<T> sums(loss, layers, context);
  const Index tokens = layers.front().routing.tokens;
  const auto begin = loss.sequence_begin;
  if (begin.size() < 2) return static_cast<T>(sums.value(0, tokens, 1, -1));

  const auto sequences = static_cast<double>(begin.size() - 1);
  double real = -1;
  if (loss.equal_sequences) {
    real = 0;
    for (Index t = 0; t < tokens; ++t) real += sums.is_real(t);
    real *= static_cast<double>(layers.size()) / sequences;
  }
  double value = 0;
  for (std::size_t s = 0; s + 1 < begin.size(); ++s) {
    value += sums.value(begin[s], begin[s + 1], 1 / sequences, real);
  }
  return static_cast<T>(value);
}

#ifndef MOLE_HEADER_ONLY
extern template float balance_loss(const BalanceLoss<float>&, std::span<const BalancedLayer<float>>,
                                   const Context&);
extern template double balance_loss(const BalanceLoss<double>&,
                                    std::span<const BalancedLayer<double>>, const Context&);
#endif

}  // namespace mole::inline MOLE_ABI
