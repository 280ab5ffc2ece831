// SPDX-License-Identifier: Apache-2.0
// The equipment of router_contract.hpp: a router with random parameters, problems for it, and calls
// with exactly the memory that the router asked for.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "mole/core/params.hpp"
#include "mole/routing/router.hpp"
#include "support/compare.hpp"
#include "support/matrix.hpp"

namespace test {

/// How a router is used.
template <class R>
struct RouterUse {
  typename R::Buffers buffers = {};
  bool given_gates = false;  ///< forward reads Overrides::gates, and has no logits
  bool by_score = true;      ///< logits decide who is chosen, not ids
  bool has_logits = true;    ///< that can be biased

  bool takes_logits() const { return has_logits && !given_gates; }
};

/// The inputs of one call.
template <class T>
struct RouterProblem {
  Matrix<T> x, logit_bias, gates;
  Matrix<std::uint8_t> forbidden;
  std::vector<std::int32_t> forced = {}, ids = {};

  Index count() const { return x.rows(); }
  mole::Tokens<T> tokens() const { return {.x = x, .ids = ids}; }
  mole::Overrides<T> overrides() const {
    mole::Overrides<T> all;
    if (logit_bias.rows() > 0) all.logit_bias = logit_bias;
    if (forbidden.rows() > 0) all.forbidden = forbidden;
    if (gates.rows() > 0) all.gates = gates;
    all.forced = forced;
    return all;
  }

  /// The problem of these tokens only.
  RouterProblem pick(const std::vector<Index>& tokens) const {
    const auto rows = [&](const auto& matrix) {
      using M = std::remove_cvref_t<decltype(matrix)>;
      if (matrix.rows() == 0) return M();
      return M(static_cast<Index>(tokens.size()), matrix.cols(),
               [&](Index r, Index c) { return matrix(tokens[r], c); });
    };
    RouterProblem picked{rows(x), rows(logit_bias), rows(gates), rows(forbidden)};
    for (const Index t : tokens) {
      if (!forced.empty()) picked.forced.push_back(forced[t]);
      picked.ids.push_back(ids[t]);
    }
    return picked;
  }
};

struct RouterRun {
  int workers = 1;
  mole::ParallelFor hook = nullptr;
  void* pool = nullptr;
  mole::Isa isa = mole::best_isa();
};

/// A block of exactly `bytes` bytes, all ones: reading what nobody wrote gives NaN.
class Dirty {
 public:
  explicit Dirty(std::size_t bytes) : block_(bytes), workspace_(block_.span()) {
    if (bytes > 0) std::memset(block_.span().data(), 0xff, bytes);
  }
  mole::Workspace& workspace() { return workspace_; }

 private:
  mole::Buffer block_;
  mole::Workspace workspace_;
};

/// A router with random parameters.
template <class R>
class RouterCase {
 public:
  using T = typename R::Scalar;
  using Params = typename R::template Params<T>;
  using ConstParams = typename R::template Params<const T>;
  static_assert(std::is_same_v<typename R::template Carry<T>, mole::None>,
                "the suite does not cover routers with a carry");

  RouterCase(const R& router, const RouterUse<R>& use)
      : router(router),
        use(use),
        params_memory_(router.params_bytes()),
        prepared_memory_(router.prepared_bytes()),
        params(router.make_params(params_memory_.workspace())) {
    const mole::Random random(5, 31);
    std::uint64_t n = 0;
    const double size =
        2 / std::sqrt(static_cast<double>(std::max<Index>(router.input_width(), 1)));
    fill_params([&] { return static_cast<T>(size * (2 * random.uniform(n++) - 1)); });
  }

  /// Another case with the same router and parameters of its own.
  RouterCase copy() const { return RouterCase(router, use); }

  template <class Next>
  void fill_params(Next&& next) {
    mole::params::zip([&](T& value) { value = next(); }, params);
    prepare();
  }
  void prepare() {
    prepared_memory_ = Dirty(router.prepared_bytes());
    prepared = router.prepare(const_params(), prepared_memory_.workspace());
  }
  ConstParams const_params() const {
    Params from = params;
    ConstParams to;
    Params::visit([](const mole::Leaf&, auto& view, auto& target) { target = view; }, from, to);
    return to;
  }

  RouterProblem<T> problem(Index tokens) const {
    RouterProblem<T> p;
    p.x = converted<T>(random_matrix(tokens, router.input_width(), 41));
    if (use.given_gates) {
      p.gates = converted<T>(random_matrix(tokens, router.experts(), 42));
      for (Index t = 0; t < tokens; ++t) p.gates(t, t % router.experts()) = T(0);
    }
    for (Index t = 0; t < tokens; ++t) p.ids.push_back(static_cast<std::int32_t>(t));
    return p;
  }

  R router;
  RouterUse<R> use;

 private:
  Dirty params_memory_, prepared_memory_;

 public:
  Params params;
  typename R::Prepared prepared;
};

/// The slots of every token, and the tape.
template <class T>
struct Decision {
  std::vector<std::vector<std::int32_t>> experts;
  std::vector<std::vector<T>> gates;
  Matrix<T> logits, prob;

  Index tokens() const { return static_cast<Index>(experts.size()); }
  /// The experts of token t with a gate that is not 0.
  std::vector<std::int32_t> active(Index t) const {
    std::vector<std::int32_t> found;
    for (std::size_t i = 0; i < experts[t].size(); ++i) {
      if (gates[t][i] != T(0)) found.push_back(experts[t][i]);
    }
    return found;
  }
};

template <class T>
struct Gradient {
  Matrix<T> dx, dlogits;
  std::vector<T> params;
};

/// Everything that one forward and one backward need, allocated beforehand.
template <class R>
class RouterCall {
 public:
  using T = typename R::Scalar;

  /// Tables and tapes have room for `spare` more tokens.
  RouterCall(const RouterCase<R>& use, const RouterProblem<T>& problem, RouterRun run = {},
             Index spare = 2)
      : case_(use),
        problem_(&problem),
        run_(run),
        room_(problem.count() + spare),
        table_memory_(
            mole::RoutingTable<T>::bytes(room_, use.router.experts(), use.router.max_per_token())),
        tape_memory_(use.router.tape_bytes(room_)),
        d_tape_memory_(use.router.tape_bytes(room_)),
        grad_memory_(use.router.params_bytes()),
        scratch_memory_(use.router.scratch_bytes(problem.count(), run.workers)),
        tape_(use.router.make_tape(tape_memory_.workspace(), room_)),
        d_tape_(use.router.make_tape(d_tape_memory_.workspace(), room_)),
        dx_(problem.count(), use.router.input_width()),
        grad_(use.router.make_params(grad_memory_.workspace())),
        table(table_memory_.workspace(), room_, use.router.experts(), use.router.max_per_token()) {
    mole::params::zero(grad_);
  }

  /// Another problem in the same memory.
  void give(const RouterProblem<T>& problem) { problem_ = &problem; }

  void forward(bool with_tape = true) {
    case_.router.forward(case_.prepared, case_.use.buffers, problem_->tokens(),
                         problem_->overrides(), {}, table, {}, with_tape ? &tape_ : nullptr,
                         context());
    routing = table.view();
  }

  /// Incoming gradients, fixed for every token id and expert.
  static double upstream(std::int32_t id, Index expert, int what) {
    const mole::Random random(what, 77);
    return 2 * random.uniform(static_cast<std::uint64_t>(id) * 1024 + expert) - 1;
  }

  void set_upstream() {
    mole::params::zero(d_tape_);
    for (Index t = 0; t < problem_->count(); ++t) {
      for (Index e = 0; e < case_.router.experts(); ++e) {
        if (!d_tape_.prob.empty()) d_tape_.prob(t, e) = T(upstream(problem_->ids[t], e, 1));
        if (!d_tape_.logits.empty()) d_tape_.logits(t, e) = T(upstream(problem_->ids[t], e, 2));
      }
      for (Index s = routing.token_begin[t]; s < routing.token_begin[t + 1]; ++s) {
        d_tape_.gate(0, s) = T(upstream(problem_->ids[t], routing.expert[s], 3));
      }
    }
  }

  void backward(bool all = true) {
    typename R::template Params<T> absent{};
    case_.router.backward(case_.const_params(), case_.use.buffers, tape_, problem_->tokens(),
                          problem_->overrides(), {}, routing, d_tape_, {},
                          all ? dx_.view() : mole::MatView<T>(), all ? grad_ : absent, {},
                          context());
  }

  Decision<T> decision(bool with_tape = true) const {
    Decision<T> d;
    for (Index t = 0; t < routing.tokens; ++t) {
      const auto first = routing.token_begin[t], last = routing.token_begin[t + 1];
      d.experts.emplace_back(routing.expert.begin() + first, routing.expert.begin() + last);
      d.gates.emplace_back(routing.gate.begin() + first, routing.gate.begin() + last);
    }
    if (with_tape) {
      d.logits = rows_of(tape_.logits);
      d.prob = rows_of(tape_.prob);
    }
    return d;
  }

  Gradient<T> gradient() const {
    Gradient<T> g{dx_, rows_of(d_tape_.logits), {}};
    mole::params::zip([&](const T& value) { g.params.push_back(value); }, grad_);
    return g;
  }

  /// The last call gave its scratch memory back and wrote nothing beside dx.
  bool memory_is_intact() {
    return scratch_memory_.workspace().free_bytes() == free_before_ && dx_.padding_is_intact();
  }
  const typename R::Tape& tape() const { return tape_; }
  const typename R::Tape& d_tape() const { return d_tape_; }

 private:
  mole::Context context() {
    free_before_ = scratch_memory_.workspace().free_bytes();
    mole::Context context{scratch_memory_.workspace()};
    context.workers = run_.workers;
    context.hook = run_.hook;
    context.pool = run_.pool;
    context.isa = run_.isa;
    return context;
  }

  Matrix<T> rows_of(mole::MatView<T> view) const {
    if (view.empty()) return {};
    const Index rows = std::min(problem_->count(), view.rows);
    return Matrix<T>(rows, view.cols, [&](Index r, Index c) { return view(r, c); });
  }

  const RouterCase<R>& case_;
  const RouterProblem<T>* problem_;
  RouterRun run_;
  Index room_;
  Dirty table_memory_, tape_memory_, d_tape_memory_, grad_memory_, scratch_memory_;
  std::size_t free_before_ = 0;
  typename R::Tape tape_, d_tape_;
  Matrix<T> dx_;
  typename R::template Params<T> grad_;

 public:
  mole::RoutingTable<T> table;
  mole::Routing<T> routing;
};

template <class R, class P>
auto decide(const RouterCase<R>& use, const P& problem, RouterRun run = {}, bool tape = true) {
  RouterCall<R> call(use, problem, run);
  call.forward(tape);
  return call.decision(tape);
}

template <class R, class P>
auto differentiate(const RouterCase<R>& use, const P& problem, RouterRun run = {}) {
  RouterCall<R> call(use, problem, run);
  call.forward();
  call.set_upstream();
  call.backward();
  return call.gradient();
}

/// Where row `a` of one decision and row `b` of another differ, in bits.
template <class T>
std::string row_difference(const Decision<T>& got, Index a, const Decision<T>& want, Index b) {
  const std::string where = "token " + std::to_string(b) + ": ";
  if (got.experts[a] != want.experts[b]) return where + "other experts";
  if (const auto text = bit_difference(got.gates[a], want.gates[b]); !text.empty()) {
    return where + "gate " + text;
  }
  for (const auto& [one, other] : {std::pair(&got.logits, &want.logits), {&got.prob, &want.prob}}) {
    if (one->rows() == 0 || other->rows() == 0) continue;
    const auto text = bit_difference(one->view().row(a), other->view().row(b));
    if (!text.empty()) return where + "tape " + text;
  }
  return "";
}

template <class T>
std::string bits_of(const Decision<T>& got, const Decision<T>& want) {
  if (got.tokens() != want.tokens()) return "other number of tokens";
  for (Index t = 0; t < got.tokens(); ++t) {
    if (const auto text = row_difference(got, t, want, t); !text.empty()) return text;
  }
  return "";
}

template <class T>
std::string bits_of(const Gradient<T>& got, const Gradient<T>& want) {
  if (const auto text = bit_difference(got.dx, want.dx); !text.empty()) return "dx " + text;
  if (const auto text = bit_difference(got.dlogits, want.dlogits); !text.empty()) {
    return "dlogits " + text;
  }
  const auto text = bit_difference(got.params, want.params);
  return text.empty() ? "" : "parameters " + text;
}

}  // namespace test
