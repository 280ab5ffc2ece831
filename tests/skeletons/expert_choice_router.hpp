// SPDX-License-Identifier: Apache-2.0
// Every expert takes the tokens it likes best (Zhou et al., "Mixture-of-Experts with Expert Choice
// Routing", NeurIPS 2022). A token may have no expert, or all of them.
//
//   l = x Wᵀ (+ overrides)     s = score(l)     C = min(N, ⌊factor · N / E⌋), N real tokens
//   gate(t, e) = s(t, e) where t is one of the C largest of column e (earlier token first), no slot
//   elsewhere
//
//   score   softmax over the experts of a token, over the tokens of an expert, or over the tokens
//           the expert has selected by l
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>

#include "mole/routing/call.hpp"
#include "mole/routing/router.hpp"
#include "mole/routing/stages.hpp"

namespace skeleton {

using mole::Index;
using mole::MatView;
using mole::None;

enum class ChoiceScore { experts, tokens, selected };

template <class T>
class ExpertChoiceRouter {
 public:
  struct Config {
    Index width = 0, experts = 0;
    T capacity_factor = T(1);
    ChoiceScore score = ChoiceScore::experts;
  };

  using Scalar = T;
  template <class V>
  using Params = mole::LinearParams<V>;
  using Prepared = mole::LinearPrepared<T>;
  using Buffers = None;
  template <class V>
  using Carry = None;
  using Tape = mole::RouterTape<T>;  ///< prob: the scores; 0 outside the selection for `selected`
  static constexpr mole::Scope scope = mole::Scope::batch;
  static constexpr mole::GradientKind gradient = mole::GradientKind::exact;

  explicit ExpertChoiceRouter(const Config& config)
      : config_(config), head_{config.width, config.experts, false} {}

  Index input_width() const noexcept { return config_.width; }
  Index experts() const noexcept { return config_.experts; }
  Index max_per_token() const noexcept { return config_.experts; }
  Index capacity(Index tokens) const noexcept {
    const T share = config_.capacity_factor * static_cast<T>(tokens);
    const auto fair = static_cast<Index>(std::floor(share / static_cast<T>(config_.experts)));
    return std::min(tokens, fair);
  }

  std::size_t params_bytes() const noexcept { return head_.params_bytes(); }
  Params<T> make_params(mole::Workspace& memory) const { return head_.make_params(memory); }
  std::size_t prepared_bytes() const noexcept { return head_.prepared_bytes(); }
  std::size_t scratch_bytes(Index max_tokens, int) const noexcept {
    mole::ByteCounter counter;
    take_scratch(counter, max_tokens);
    return counter.bytes() + mole::stages::project_backward_bytes(config_.experts);
  }
  std::size_t tape_bytes(Index max_tokens) const noexcept {
    mole::ByteCounter counter;
    mole::take_tape<T>(counter, shape(), max_tokens);
    return counter.bytes();
  }
  Tape make_tape(mole::Workspace& memory, Index max_tokens) const {
    return mole::take_tape<T>(memory, shape(), max_tokens);
  }
  Prepared prepare(const Params<const T>& params, mole::Workspace& memory) const {
    return head_.prepare(params, memory);
  }

  void forward(const Prepared& prepared, None, const mole::Tokens<T>& tokens,
               const mole::Overrides<T>& overrides, None, mole::RoutingTable<T>& table, None,
               Tape* tape, const mole::Context& context) const {
    const Index count = tokens.count();
    mole::check_forward(shape(), tokens, overrides, table, tape);
    const mole::Workspace::Frame frame(context.scratch);
    const Scratch scratch = take_scratch(context.scratch, count);
    const MatView<T> logits = tape != nullptr ? tape->logits.row_block(0, count) : scratch.logits;
    const MatView<T> score = tape != nullptr ? tape->prob.row_block(0, count) : scratch.score;
    mole::stages::project<T>(prepared, tokens.x, logits, context);
    for (Index t = 0; t < count; ++t) {
      mole::stages::override_logits<T>(overrides, t, logits.row(t));
      if (!tokens.mask.empty() && tokens.mask[t] == 0) std::ranges::fill(logits.row(t), kNever);
      mole::stages::softmax<T>(logits.row(t), score.row(t));
    }
    const Index real = tokens.mask.empty() ? count : std::ranges::count(tokens.mask, 1);
    for (Index e = 0; e < config_.experts; ++e) {
      choose(e, capacity(real), logits, score, scratch);
    }
    write_table(count, score, scratch, table);
    if (tape != nullptr) mole::record_gates(table.view(), *tape);
  }

  void backward(const Params<const T>& params, None, const Tape& saved,
                const mole::Tokens<T>& tokens, const mole::Overrides<T>&, None,
                const mole::Routing<T>& routing, const Tape& d_tape, None, MatView<T> dx,
                const Params<T>& grad, None, const mole::Context& context) const {
    const Index count = tokens.count();
    mole::check_backward(shape(), saved, tokens, routing, d_tape, dx);
    const mole::Workspace::Frame frame(context.scratch);
    const Scratch scratch = take_scratch(context.scratch, count);
    const MatView<T> d_score = scratch.score;
    for (Index t = 0; t < count; ++t) {
      std::ranges::copy(d_tape.prob.row(t), d_score.row(t).begin());
      for (Index s = routing.token_begin[t]; s < routing.token_begin[t + 1]; ++s) {
        d_score(t, routing.expert[s]) += d_tape.gate(0, s);
      }
    }
    if (config_.score == ChoiceScore::experts) {
      for (Index t = 0; t < count; ++t) {
        mole::stages::softmax_backward<T>(saved.prob.row(t), d_score.row(t), d_tape.logits.row(t));
      }
    } else {
      for (Index e = 0; e < config_.experts; ++e) {
        column_backward(e, saved.prob, d_score, d_tape.logits, scratch);
      }
    }
    for (Index t = 0; t < count; ++t) {
      mole::stages::override_logits_backward<T>(saved.logits.row(t), d_tape.logits.row(t));
    }
    mole::stages::project_backward<T>(params, tokens.x, d_tape.logits.row_block(0, count), dx, grad,
                                      context);
  }

 private:
  static constexpr T kNever = -std::numeric_limits<T>::infinity();

  struct Scratch {
    MatView<T> logits, score;        // [tokens, experts]
    MatView<std::uint8_t> taken;     // [tokens, experts]
    std::span<T> a, b, c;            // [tokens], a column each
    std::span<std::int32_t> chosen;  // [tokens]
    std::span<T> gate;               // [experts]
    std::span<std::int32_t> experts;
  };
  template <class Arena>
  Scratch take_scratch(Arena& arena, Index tokens) const {
    const Index experts = config_.experts;
    Scratch scratch;
    scratch.logits = arena.template take<T>(tokens, experts);
    scratch.score = arena.template take<T>(tokens, experts);
    scratch.taken = arena.template take<std::uint8_t>(tokens, experts);
    scratch.a = arena.template take<T>(tokens);
    scratch.b = arena.template take<T>(tokens);
    scratch.c = arena.template take<T>(tokens);
    scratch.chosen = arena.template take<std::int32_t>(tokens);
    scratch.gate = arena.template take<T>(experts);
    scratch.experts = arena.template take<std::int32_t>(experts);
    return scratch;
  }
  mole::RouterShape shape() const noexcept {
    return {config_.width, config_.experts, max_per_token()};
  }

  static void read_column(MatView<const T> from, Index e, std::span<T> to) noexcept {
    for (std::size_t t = 0; t < to.size(); ++t) to[t] = from(static_cast<Index>(t), e);
  }
  static void write_column(std::span<const T> from, MatView<T> to, Index e) noexcept {
    for (std::size_t t = 0; t < from.size(); ++t) to(static_cast<Index>(t), e) = from[t];
  }

  /// Marks the tokens of one expert and leaves its scores in column e.
  void choose(Index e, Index capacity, MatView<const T> logits, MatView<T> score,
              const Scratch& scratch) const noexcept {
    const std::span<T> logit = scratch.a, key = scratch.b, share = scratch.c;
    read_column(logits, e, logit);
    if (config_.score == ChoiceScore::tokens) {
      mole::stages::softmax<T>(logit, share);
      write_column(share, score, e);
    }
    read_column(config_.score == ChoiceScore::experts ? score : logits, e, key);
    for (std::size_t t = 0; t < key.size(); ++t) {
      if (logit[t] == kNever) key[t] = kNever;
      scratch.taken(static_cast<Index>(t), e) = 0;
    }
    const auto places = static_cast<std::size_t>(capacity);
    const Index found = mole::stages::select_top_k<T>(key, scratch.chosen.first(places));
    for (Index i = 0; i < found; ++i) scratch.taken(scratch.chosen[i], e) = 1;
    if (config_.score != ChoiceScore::selected) return;
    for (std::size_t t = 0; t < logit.size(); ++t) {
      if (scratch.taken(static_cast<Index>(t), e) == 0) logit[t] = kNever;
    }
    mole::stages::softmax<T>(logit, share);
    write_column(share, score, e);
  }

  void write_table(Index count, MatView<const T> score, const Scratch& scratch,
                   mole::RoutingTable<T>& table) const {
    table.begin(count);
    for (Index t = 0; t < count; ++t) {
      std::size_t slots = 0;
      for (Index e = 0; e < config_.experts; ++e) {
        if (scratch.taken(t, e) == 0) continue;
        scratch.experts[slots] = static_cast<std::int32_t>(e);
        scratch.gate[slots++] = score(t, e);
      }
      table.select(t, scratch.experts.first(slots), scratch.gate.first(slots));
    }
    table.finish();
  }

  void column_backward(Index e, MatView<const T> score, MatView<const T> d_score,
                       MatView<T> dlogits, const Scratch& scratch) const noexcept {
    read_column(score, e, scratch.a);
    read_column(d_score, e, scratch.b);
    read_column(dlogits, e, scratch.c);
    mole::stages::softmax_backward<T>(scratch.a, scratch.b, scratch.c);
    write_column(scratch.c, dlogits, e);
  }

  Config config_;
  mole::Linear<T> head_;
};

static_assert(mole::Router<ExpertChoiceRouter<float>>);
static_assert(mole::Router<ExpertChoiceRouter<double>>);

}  // namespace skeleton
