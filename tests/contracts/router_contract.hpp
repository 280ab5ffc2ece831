// SPDX-License-Identifier: Apache-2.0
// What every Router must hold, as tests. One line for a new router:
//
//   test::router_contract(MyRouter<double>({.width = 13, .experts = 7}));
//
// and one with router_threads_contract in a test with the tag [threads]. docs/router_contract.md
// explains each rule. A check returns a text, empty when the rule holds, so the suite is tested
// with broken routers too.
//
// Beside the concept it asks for `params_bytes()` and `make_params(workspace)`, and a tape with the
// members of RouterTape. Routers with a carry are not covered.
#pragma once

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "contracts/router_case.hpp"
#include "mole/core/error.hpp"
#include "support/alloc_counter.hpp"
#include "support/catch.hpp"
#include "support/gradcheck.hpp"
#include "support/thread_pool.hpp"

namespace test {
namespace router_checks {

inline constexpr Index kTokens = 11;
inline constexpr Index kManyTokens = 101;  // several tasks, the last one not full

/// At most max_per_token slots, experts ascending and in range, finite gates, those of the tape
/// too.
template <class R>
std::string slots_are_valid(const RouterCase<R>& use) {
  const auto problem = use.problem(kTokens);
  RouterCall<R> call(use, problem);
  call.forward();
  const auto& routing = call.routing;
  if (routing.tokens != kTokens || routing.experts != use.router.experts()) return "other sizes";
  if (routing.slots() == 0) return "no token has an expert: nothing to see";
  const auto decision = call.decision();
  for (Index t = 0; t < kTokens; ++t) {
    const auto& experts = decision.experts[t];
    if (static_cast<Index>(experts.size()) > use.router.max_per_token()) return "too many slots";
    for (std::size_t i = 0; i < experts.size(); ++i) {
      if (experts[i] < 0 || experts[i] >= use.router.experts()) return "expert out of range";
      if (i > 0 && experts[i - 1] >= experts[i]) return "experts do not ascend";
      if (!std::isfinite(decision.gates[t][i])) return "a gate is not finite";
    }
  }
  const std::span<const typename R::Scalar> recorded = call.tape().gate.row(0);
  return bit_difference(recorded.first(routing.gate.size()), routing.gate);
}

/// Inference decides as training does.
template <class R>
std::string tape_changes_nothing(const RouterCase<R>& use) {
  const auto problem = use.problem(kTokens);
  return bits_of(decide(use, problem, {}, false), decide(use, problem));
}

/// More tokens than the table has room for are refused, and the last routing stays.
template <class R>
std::string too_many_tokens_are_refused(const RouterCase<R>& use) {
  const auto few = use.problem(2), many = use.problem(3);
  RouterCall<R> call(use, few, {}, 0);
  call.forward();
  const auto before = call.decision();
  call.give(many);
  try {
    call.forward();
    return "accepted";
  } catch (const mole::Error& error) {
    if (error.code() != mole::Errc::limit_exceeded) return error.what();
  }
  return bits_of(call.decision(), before);
}

/// No token: no slot, no gradient.
template <class R>
std::string empty_batch_is_fine(const RouterCase<R>& use) {
  const auto none = use.problem(0);
  RouterCall<R> call(use, none);
  call.forward();
  if (call.routing.tokens != 0 || call.routing.slots() != 0) return "slots without tokens";
  call.backward();
  for (const auto value : call.gradient().params) {
    if (value != 0) return "a gradient without tokens";
  }
  return "";
}

/// Forward and backward leave the scratch memory as they found it and write only their outputs.
template <class R>
std::string memory_is_left_alone(const RouterCase<R>& use) {
  const auto problem = use.problem(kTokens);
  RouterCall<R> call(use, problem);
  call.forward();
  if (!call.memory_is_intact()) return "forward";
  call.set_upstream();
  call.backward();
  return call.memory_is_intact() ? "" : "backward";
}

template <class R>
std::string nothing_is_allocated(const RouterCase<R>& use) {
  const auto problem = use.problem(kTokens);
  RouterCall<R> call(use, problem);
  const long before = allocations();
  call.forward(false);
  call.forward();
  const long after_forward = allocations();
  call.set_upstream();
  call.backward();
  const long after_backward = allocations();
  if (after_forward != before) return "forward allocates";
  return after_backward == after_forward ? "" : "backward allocates";
}

/// Scope token: a token alone, and in any place, decides and differentiates as in the batch.
template <class R>
std::string tokens_do_not_see_each_other(const RouterCase<R>& use) {
  if (R::scope != mole::Scope::token) return "";
  const auto problem = use.problem(kTokens);
  const auto together = decide(use, problem);
  const auto gradient = differentiate(use, problem);
  std::vector<std::vector<Index>> batches(1);
  for (Index t = kTokens - 1; t >= 0; --t) batches[0].push_back(t * 4 % kTokens);
  for (Index t = 0; t < kTokens; ++t) batches.push_back({t});
  for (const auto& batch : batches) {
    const auto part = problem.pick(batch);
    const auto decision = decide(use, part);
    const auto part_gradient = differentiate(use, part);
    for (std::size_t i = 0; i < batch.size(); ++i) {
      const auto text = row_difference(decision, static_cast<Index>(i), together, batch[i]);
      if (!text.empty()) return text;
      const auto got = part_gradient.dx.view().row(static_cast<Index>(i));
      const auto dx = bit_difference(got, gradient.dx.view().row(batch[i]));
      if (!dx.empty()) return "dx of token " + std::to_string(batch[i]) + dx;
    }
  }
  return "";
}

template <class R>
std::string same_bits(const RouterCase<R>& use, const std::vector<RouterRun>& runs) {
  const auto problem = use.problem(kManyTokens);
  const auto decision = decide(use, problem);
  const auto gradient = differentiate(use, problem);
  for (const RouterRun& run : runs) {
    std::string text = bits_of(decide(use, problem, run), decision);
    if (text.empty()) text = bits_of(differentiate(use, problem, run), gradient);
    if (!text.empty()) return std::to_string(run.workers) + " workers, " + text;
  }
  return "";
}

/// Parameter gradients too.
template <class R>
std::string workers_change_nothing(const RouterCase<R>& use) {
  std::vector<RouterRun> runs = {{1, mole::serial_loop}, {1, mole::reversed_loop}};
  for (const int workers : {2, 3, 7}) runs.push_back({.workers = workers});
  return same_bits(use, runs);
}

template <class R>
std::string host_threads_change_nothing(const RouterCase<R>& use) {
  for (const int workers : {1, 2, 3, 7}) {
    ThreadPool pool(workers);
    const std::string text = same_bits(use, {{workers, &ThreadPool::run, &pool}});
    if (!text.empty()) return text;
  }
  return "";
}

template <class R>
std::string instruction_sets_change_nothing(const RouterCase<R>& use) {
  std::vector<RouterRun> runs;
  for (const mole::Isa isa : {mole::Isa::portable, mole::Isa::avx2, mole::Isa::avx512}) {
    if (mole::isa_available(isa)) runs.push_back({.isa = isa});
  }
  return same_bits(use, runs);
}

/// With parameters of 0 all experts are equal: the lowest ones are chosen.
template <class R>
std::string ties_go_to_the_lower_expert(RouterCase<R> use) {
  if (use.use.given_gates || !use.use.by_score) return "";
  use.fill_params([] { return typename R::Scalar(0); });
  const auto decision = decide(use, use.problem(kTokens));
  for (Index t = 0; t < kTokens; ++t) {
    const auto active = decision.active(t);
    for (std::size_t i = 0; i < active.size(); ++i) {
      if (active[i] != static_cast<std::int32_t>(i)) return "token " + std::to_string(t);
    }
  }
  return "";
}

template <class T>
bool has_expert(const Decision<T>& decision, Index token, Index expert) {
  const auto& experts = decision.experts[token];
  return std::find(experts.begin(), experts.end(), expert) != experts.end();
}

/// Rows of `got` but `token` are bitwise those of `want`.
template <class T>
std::string others_differ(const Decision<T>& got, const Decision<T>& want, Index token) {
  for (Index t = 0; t < got.tokens(); ++t) {
    if (t == token) continue;
    if (const auto text = row_difference(got, t, want, t); !text.empty()) return text;
  }
  return "";
}

/// A forbidden expert has no slot, a forced one is the only one, no expert left is no slot.
template <class R>
std::string overrides_are_obeyed(const RouterCase<R>& use) {
  const Index experts = use.router.experts();
  auto problem = use.problem(kTokens);
  const auto free = decide(use, problem);
  problem.forbidden = Matrix<std::uint8_t>(
      kTokens, experts, [&](Index t, Index e) { return t == 4 || (t == 1 && e % 2 == 0); });
  const auto forbidden = decide(use, problem);
  if (!forbidden.experts[4].empty()) return "a slot although every expert is forbidden";
  for (const std::int32_t e : forbidden.experts[1]) {
    if (e % 2 == 0) return "a slot for a forbidden expert";
  }
  for (Index t = 0; t < kTokens && R::scope == mole::Scope::token; ++t) {
    if (t == 1 || t == 4) continue;
    const auto text = row_difference(forbidden, t, free, t);
    if (!text.empty()) return "not forbidden, yet changed: " + text;
  }

  problem.forbidden = Matrix<std::uint8_t>(1, experts, [](Index, Index e) { return e == 0; });
  const auto one_row = decide(use, problem);
  problem.forbidden = Matrix<std::uint8_t>(kTokens, experts, [](Index, Index e) { return e == 0; });
  if (const auto text = bits_of(one_row, decide(use, problem)); !text.empty()) {
    return "one row for all tokens is not every row: " + text;
  }

  problem.forbidden = {};
  problem.forced.assign(kTokens, -1);
  problem.forced[3] = static_cast<std::int32_t>(experts - 1);
  const auto forced = decide(use, problem);
  for (const std::int32_t e : forced.experts[3]) {
    if (e != experts - 1) return "a slot beside the forced expert";
  }
  return R::scope == mole::Scope::token ? others_differ(forced, free, 3) : "";
}

/// NaN and -inf: not available. +inf: the gates stay finite. Other rows keep their bits, and no
/// gradient becomes NaN.
template <class R>
std::string non_finite_logits_follow_the_policy(const RouterCase<R>& use) {
  using T = typename R::Scalar;
  if (!use.use.takes_logits()) return "";
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  constexpr T kNan = std::numeric_limits<T>::quiet_NaN();
  const Index experts = use.router.experts(), row = 5;
  auto problem = use.problem(kTokens);
  problem.logit_bias = Matrix<T>(kTokens, experts);
  const auto plain = decide(use, problem);
  for (const T value : {kNan, -kInfinity, kInfinity}) {
    for (const bool all : {false, true}) {
      for (Index e = 0; e < experts; ++e) problem.logit_bias(row, e) = all || e == 1 ? value : T(0);
      const auto decision = decide(use, problem);
      if (value == kInfinity) {
        // Where others compete, or the id decides, +inf may lose.
        const bool wins = R::scope == mole::Scope::token && use.use.by_score;
        if (wins && decision.active(row).empty()) return "no expert in a row with +inf";
        for (const T gate : decision.gates[row]) {
          if (!std::isfinite(gate)) return "+inf gives a gate that is not finite";
        }
      } else if (has_expert(decision, row, 1) || (all && !decision.experts[row].empty())) {
        return "an expert that is not available has a slot";
      }
      if (R::scope == mole::Scope::token) {
        if (const auto text = others_differ(decision, plain, row); !text.empty()) return text;
      }
      const auto gradient = differentiate(use, problem);
      for (Index e = 0; e < gradient.dlogits.cols(); ++e) {
        const T d = gradient.dlogits(row, e);
        if ((all || e == 1) && d != T(0)) return "a logit that is not finite has a gradient";
        if (!std::isfinite(d)) return "a gradient that is not finite";
      }
    }
  }
  return "";
}

/// A row of x with NaN or infinity touches no other row and no parameter gradient.
template <class R>
std::string non_finite_rows_stay_alone(const RouterCase<R>& use) {
  using T = typename R::Scalar;
  auto problem = use.problem(kTokens);
  const Index row = 2;
  const auto plain = decide(use, problem);
  const auto plain_gradient = differentiate(use, problem);
  for (const T value : {std::numeric_limits<T>::quiet_NaN(), std::numeric_limits<T>::infinity()}) {
    problem.x(row, 1) = value;
    const auto decision = decide(use, problem);
    const auto gradient = differentiate(use, problem);
    for (const T gate : decision.gates[row]) {
      if (!std::isfinite(gate)) return "a gate of the bad row is not finite";
    }
    for (const T d : gradient.params) {
      if (!std::isfinite(d)) return "a parameter gradient is not finite";
    }
    if (R::scope != mole::Scope::token) continue;
    if (const auto text = others_differ(decision, plain, row); !text.empty()) return text;
    for (Index t = 0; t < kTokens; ++t) {
      if (t == row) continue;
      const auto got = gradient.dx.view().row(t);
      const auto text = bit_difference(got, plain_gradient.dx.view().row(t));
      if (!text.empty()) return "dx of token " + std::to_string(t) + text;
    }
  }
  return "";
}

/// Gradients are added to what is there, and outputs without memory are left out.
template <class R>
std::string gradients_are_added(const RouterCase<R>& use) {
  using T = typename R::Scalar;
  const auto problem = use.problem(kTokens);
  RouterCall<R> call(use, problem);
  call.forward();
  call.set_upstream();
  call.backward();
  const auto once = call.gradient();
  call.set_upstream();
  call.backward(false);
  if (const auto text = bits_of(call.gradient(), once); !text.empty()) {
    return "without dx and parameter gradients: " + text;
  }
  call.set_upstream();
  call.backward();
  const auto twice = call.gradient();
  const Close close = sizeof(T) == 4 ? Close{1e-4, 1e-5} : Close{1e-11, 1e-12};
  const auto doubled = [](auto value) { return 2 * value; };
  const Matrix<T> dx(once.dx.rows(), once.dx.cols(),
                     [&](Index r, Index c) { return doubled(once.dx(r, c)); });
  if (const auto text = difference(twice.dx, dx, close); !text.empty()) return "dx " + text;
  std::vector<T> params;
  for (const T value : once.params) params.push_back(doubled(value));
  return difference(twice.params, params, close);
}

/// Σ gate · upstream + Σ prob · upstream + Σ logits · upstream of one forward. NaN where the
/// selection is not that of `base`: there the loss has a step.
template <class R, class P>
double loss(const RouterCase<R>& use, const P& problem, const Decision<double>& base) {
  const auto decision = decide(use, problem);
  if (decision.experts != base.experts) return std::numeric_limits<double>::quiet_NaN();
  const auto upstream = RouterCall<R>::upstream;
  double sum = 0;
  for (Index t = 0; t < problem.count(); ++t) {
    for (std::size_t i = 0; i < decision.experts[t].size(); ++i) {
      if ((decision.gates[t][i] == 0) != (base.gates[t][i] == 0)) {
        return std::numeric_limits<double>::quiet_NaN();
      }
      sum += decision.gates[t][i] * upstream(problem.ids[t], decision.experts[t][i], 3);
    }
    for (Index e = 0; e < use.router.experts(); ++e) {
      if (decision.prob.rows() > 0) sum += decision.prob(t, e) * upstream(problem.ids[t], e, 1);
      const bool finite = decision.logits.rows() > 0 && std::isfinite(decision.logits(t, e));
      if (finite) sum += decision.logits(t, e) * upstream(problem.ids[t], e, 2);
    }
  }
  return sum;
}

/// Empty if `gradient` agrees with the quotients that are not NaN, and most are not.
inline std::string compare_quotients(Matrix<double> quotients, MatView<const double> gradient) {
  Index skipped = 0;
  for (Index r = 0; r < quotients.rows(); ++r) {
    for (Index c = 0; c < quotients.cols(); ++c) {
      if (!std::isnan(quotients(r, c))) continue;
      quotients(r, c) = gradient(r, c);
      ++skipped;
    }
  }
  if (skipped * 5 > gradient.size()) return "most points lie at a border of the selection";
  return difference(gradient, quotients, Close{1e-6, 1e-8});
}

/// Gradient kind exact: by x, the logits and the parameters, in double.
template <class R>
std::string gradients_are_exact(RouterCase<R> use) {
  if constexpr (std::is_same_v<typename R::Scalar, double>) {
    if (R::gradient != mole::GradientKind::exact) return "";
    constexpr double kStep = 1e-5;
    auto problem = use.problem(kTokens);
    if (use.use.takes_logits()) {
      problem.logit_bias = random_matrix(kTokens, use.router.experts(), 43);
      problem.forbidden = Matrix<std::uint8_t>(kTokens, use.router.experts(),
                                               [](Index t, Index e) { return t == 3 && e == 2; });
    }
    const auto base = decide(use, problem);
    const auto gradient = differentiate(use, problem);
    const auto value = [&] { return loss(use, problem, base); };

    auto text =
        compare_quotients(difference_quotients(problem.x.view(), value, kStep), gradient.dx);
    if (!text.empty()) return "dx " + text;
    if (problem.logit_bias.rows() > 0) {
      text = compare_quotients(difference_quotients(problem.logit_bias.view(), value, kStep),
                               gradient.dlogits);
      if (!text.empty()) return "dlogits " + text;
    }
    const auto prepared_value = [&] {
      use.prepare();
      return value();
    };
    std::size_t first = 0;
    R::template Params<double>::visit(
        [&](const mole::Leaf& leaf, MatView<double> view) {
          const MatView<const double> part(gradient.params.data() + first, view.rows, view.cols);
          first += static_cast<std::size_t>(view.size());
          const auto quotients = difference_quotients(view, prepared_value, kStep);
          const auto found = compare_quotients(quotients, part);
          if (text.empty() && !found.empty()) text = leaf.path() + " " + found;
        },
        use.params);
    return text;
  }
  return "";
}

template <class R>
struct Named {
  const char* rule;
  std::string (*check)(const RouterCase<R>&);
};

template <class R>
std::vector<Named<R>> all() {
  return {
      {"slots are valid", slots_are_valid},
      {"the tape changes nothing", tape_changes_nothing},
      {"too many tokens are refused", too_many_tokens_are_refused},
      {"an empty batch is fine", empty_batch_is_fine},
      {"memory is left alone", memory_is_left_alone},
      {"nothing is allocated", nothing_is_allocated},
      {"tokens do not see each other", tokens_do_not_see_each_other},
      {"workers change nothing", workers_change_nothing},
      {"instruction sets change nothing", instruction_sets_change_nothing},
      {"ties go to the lower expert",
       [](const RouterCase<R>& use) { return ties_go_to_the_lower_expert(use.copy()); }},
      {"overrides are obeyed", overrides_are_obeyed},
      {"non-finite logits follow the policy", non_finite_logits_follow_the_policy},
      {"non-finite rows stay alone", non_finite_rows_stay_alone},
      {"gradients are added", gradients_are_added},
      {"gradients are exact",
       [](const RouterCase<R>& use) { return gradients_are_exact(use.copy()); }},
  };
}

/// Runs one check; an exception breaks the rule.
template <class R>
std::string run(const Named<R>& named, const RouterCase<R>& use) {
  try {
    return named.check(use);
  } catch (const std::exception& error) {
    return std::string("throws: ") + error.what();
  }
}

}  // namespace router_checks

template <class R>
void router_contract(const R& router, const RouterUse<R>& use = {}) {
  static_assert(mole::Router<R>, "each requirement is explained in docs/router_contract.md");
  const RouterCase<R> router_case(router, use);
  for (const auto& named : router_checks::all<R>()) {
    INFO(named.rule);
    CHECK(router_checks::run(named, router_case) == "");
  }
}

/// Decisions and gradients on real threads. For a test with the tag [threads].
template <class R>
void router_threads_contract(const R& router, const RouterUse<R>& use = {}) {
  const RouterCase<R> router_case(router, use);
  CHECK(router_checks::host_threads_change_nothing(router_case) == "");
}

}  // namespace test
