// SPDX-License-Identifier: Apache-2.0
// SequenceRouter: one decision for a whole sequence, which all its tokens share.
//
//   l = W pool(x_1 ... x_n) + b (+ overrides)      p = softmax(l)      pool: mean, or the last
//   token S = the k largest l, ties to the lower expert      g = softmax of l over S
//
// Shapes: x [tokens, width], W [experts, width], b [1, experts]; sequences by
// tokens.sequence_begin, padding by tokens.mask. The tape has a row per token, equal within a
// sequence as long as the overrides are. With k = 1 the gate is 1 and W learns from losses.
//
// With sequences of equal length n, tape.logits seen as [sequences, experts] with n times the
// stride has the logits of the sequences, and d_tape likewise takes their gradients.
//
// k = 1, mean: the sentence-level switch of Gleghorn Lab's "Mixture of Experts for sentence
// similarity", 2024. k = 1, last, bias: the outer router of DMoERM (Quan, 2024), whose choice is
// the category.
#pragma once

#include <algorithm>

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/routing/head_router.hpp"
#include "mole/routing/pool.hpp"
#include "mole/routing/top_k_rule.hpp"

namespace mole::inline MOLE_ABI {

template <class T>
struct SequenceHead : LinearHead<T> {
  Pool how = Pool::mean;

  static constexpr Scope scope = Scope::sequence;

  std::size_t scratch_bytes(Index max_tokens, int workers) const noexcept;
  void forward(const LinearPrepared<T>& prepared, const Tokens<T>& tokens, None, MatView<T> logits,
               MatView<T> side, None, NoHeadTape, const Context& context) const;
  void backward(const LinearParams<const T>& params, NoHeadTape, const Tokens<T>& tokens, None,
                MatView<const T> dlogits, MatView<const T> dside, None, MatView<T> dx,
                const LinearParams<T>& grad, None, const Context& context) const;
};

template <class T>
class SequenceRouter : public HeadRouter<T, SequenceHead<T>, TopKRule<T>> {
 public:
  struct Config {
    Index width = 0, experts = 0;
    Index k = 1;  ///< 1 ... experts
    Pool pool = Pool::mean;
    bool bias = false;  ///< the router has a bias parameter

    static constexpr std::string_view kind() noexcept { return "sequence"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field::required("k"), c.k...);
      f(Field{"pool"}, c.pool...);
      f(Field{"bias"}, c.bias...);
    }
  };

  /// Throws invalid_argument, naming the field.
  explicit SequenceRouter(const Config& config)
      : HeadRouter<T, SequenceHead<T>, TopKRule<T>>(
            {linear_head<T>("SequenceRouter", config.width, config.experts, config.bias),
             config.pool},
            {config.k, {Score::softmax, false, true, T(0), T(1)}}),
        config_(config) {
    require_k("SequenceRouter", config.k, config.experts);
  }

  const Config& config() const noexcept { return config_; }

 private:
  Config config_;
};

template <class T>
std::size_t SequenceHead<T>::scratch_bytes(Index max_tokens, int) const noexcept {
  ByteCounter counter;
  counter.take<T>(max_tokens, this->linear.width);
  counter.take<T>(max_tokens, this->linear.width);
  counter.take<T>(max_tokens, this->linear.experts);
  return counter.bytes() + stages::project_backward_bytes(this->linear.experts);
}

template <class T>
void SequenceHead<T>::forward(const LinearPrepared<T>& prepared, const Tokens<T>& tokens, None,
                              MatView<T> logits, MatView<T>, None, NoHeadTape,
                              const Context& context) const {
  const Workspace::Frame frame(context.scratch);
  const MatView<T> pooled = context.scratch.template take<T>(tokens.count(), this->linear.width);
  const MatView<T> of_sequence =
      context.scratch.template take<T>(tokens.count(), this->linear.experts);
  const Index sequences = stages::pool<T>(how, tokens, pooled);
  stages::project<T>(prepared, pooled.row_block(0, sequences), of_sequence.row_block(0, sequences),
                     context);
  stages::spread<T>(tokens, of_sequence, logits);
}

template <class T>
void SequenceHead<T>::backward(const LinearParams<const T>& params, NoHeadTape,
                               const Tokens<T>& tokens, None, MatView<const T> dlogits,
                               MatView<const T>, None, MatView<T> dx, const LinearParams<T>& grad,
                               None, const Context& context) const {
  const Workspace::Frame frame(context.scratch);
  const MatView<T> pooled = context.scratch.template take<T>(tokens.count(), this->linear.width);
  const MatView<T> d_pooled = context.scratch.template take<T>(tokens.count(), this->linear.width);
  const MatView<T> d_sequence =
      context.scratch.template take<T>(tokens.count(), this->linear.experts);
  const Index sequences = stages::pool<T>(how, tokens, pooled);
  stages::spread_backward<T>(tokens, dlogits, d_sequence);
  for (Index s = 0; s < sequences; ++s) std::ranges::fill(d_pooled.row(s), T(0));
  stages::project_backward<T>(params, pooled.row_block(0, sequences),
                              d_sequence.row_block(0, sequences), d_pooled.row_block(0, sequences),
                              grad, context);
  if (dx.data != nullptr) stages::pool_backward<T>(how, tokens, d_pooled, dx);
}

#ifndef MOLE_HEADER_ONLY
extern template struct SequenceHead<float>;
extern template struct SequenceHead<double>;
extern template class HeadRouter<float, SequenceHead<float>, TopKRule<float>>;
extern template class HeadRouter<double, SequenceHead<double>, TopKRule<double>>;
#endif

static_assert(Router<SequenceRouter<float>>);
static_assert(Router<SequenceRouter<double>>);

}  // namespace mole::inline MOLE_ABI
