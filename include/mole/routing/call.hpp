// SPDX-License-Identifier: Apache-2.0
// What surrounds the decision in every router's call: checks that throw before anything is written,
// the memory of a tape, rows for the workers, and the gates copied to the tape.
#pragma once

#include <algorithm>
#include <span>

#include "mole/core/config.hpp"
#include "mole/core/context.hpp"
#include "mole/core/error.hpp"
#include "mole/core/view.hpp"
#include "mole/core/workspace.hpp"
#include "mole/routing/router.hpp"
#include "mole/routing/routing.hpp"
#include "mole/routing/tokens.hpp"

namespace mole::inline MOLE_ABI {

/// Tokens whose rows one task decides.
inline constexpr Index kTokensPerTask = 16;

struct RouterShape {
  Index width = 0;  ///< of x; -1 = x is not read
  Index experts = 0;
  Index max_per_token = 0;
};

/// Throws shape_mismatch, limit_exceeded or invalid_argument unless forward can run.
template <class T>
void check_forward(const RouterShape& shape, const Tokens<T>& tokens, const Overrides<T>& overrides,
                   const RoutingTable<T>& table, const RouterTape<T>* tape);

/// Throws shape_mismatch or invalid_argument unless backward can run.
template <class T>
void check_backward(const RouterShape& shape, const RouterTape<T>& saved, const Tokens<T>& tokens,
                    const Routing<T>& routing, const RouterTape<T>& d_tape, MatView<T> dx);

/// The tape of at most `tokens` tokens. `Arena` is a Workspace or a ByteCounter.
template <class T, class Arena>
RouterTape<T> take_tape(Arena& arena, const RouterShape& shape, Index tokens) {
  RouterTape<T> tape;
  tape.logits = arena.template take<T>(tokens, shape.experts);
  tape.prob = arena.template take<T>(tokens, shape.experts);
  tape.gate = arena.template take<T>(1, saturating_product(tokens, shape.max_per_token));
  return tape;
}

/// tape.gate = the gates of the routing.
template <class T>
void record_gates(const Routing<T>& routing, const RouterTape<T>& tape) {
  std::copy(routing.gate.begin(), routing.gate.end(), tape.gate.data);
}

/// `parts` rows of `size` elements for every worker, no two workers on one cache line.
template <class V>
class WorkerRows {
 public:
  template <class Arena>
  WorkerRows(Arena& arena, int workers, Index parts, Index size)
      : parts_(parts), size_(size), stride_(aligned_bytes(size * sizeof(V)) / sizeof(V)) {
    memory_ = arena.template take<V>(saturating_product(std::max(workers, 1) * parts, stride_));
  }
  std::span<V> operator()(int worker, Index part) const noexcept {
    return memory_.subspan(static_cast<std::size_t>((worker * parts_ + part) * stride_),
                           static_cast<std::size_t>(size_));
  }

 private:
  Index parts_, size_, stride_;
  std::span<V> memory_;
};

/// Throws shape_mismatch unless scores and logits have a column per expert.
template <class T>
void check_tape_columns(const RouterTape<T>& tape, Index experts) {
  require_shape("tape.prob", tape.prob, tape.prob.rows, experts);
  require_shape("tape.logits", tape.logits, tape.prob.rows, experts);
}

template <class T>
void check_forward(const RouterShape& shape, const Tokens<T>& tokens, const Overrides<T>& overrides,
                   const RoutingTable<T>& table, const RouterTape<T>* tape) {
  const Index count = tokens.count();
  if (count > 0 && shape.width >= 0) require_shape("x", tokens.x, count, shape.width);
  check_overrides(overrides, count, shape.experts);
  require(shape.width < 0 || overrides.gates.data == nullptr, Errc::invalid_argument,
          "overrides.gates: this router decides by itself, only a GivenRouter takes gates");
  require(count <= table.max_tokens(), Errc::limit_exceeded, "router: ", count,
          " tokens, the routing table was made for at most ", table.max_tokens());
  require(table.experts() == shape.experts && table.max_per_token() >= shape.max_per_token,
          Errc::shape_mismatch, "routing table: made for ", table.experts(), " experts, ",
          table.max_per_token(), " a token; the router has ", shape.experts, ", up to ",
          shape.max_per_token, " a token");
  if (tape == nullptr) return;
  const Index slots = count * shape.max_per_token;
  require((shape.width < 0 || tape->prob.rows >= count) && tape->gate.cols >= slots,
          Errc::limit_exceeded, "router tape: made for ", tape->prob.rows, " tokens and ",
          tape->gate.cols, " slots, the call needs ", count, " and ", slots);
  if (shape.width >= 0) check_tape_columns(*tape, shape.experts);
}

template <class T>
void check_backward(const RouterShape& shape, const RouterTape<T>& saved, const Tokens<T>& tokens,
                    const Routing<T>& routing, const RouterTape<T>& d_tape, MatView<T> dx) {
  const Index count = tokens.count();
  require(routing.tokens == count && routing.experts == shape.experts, Errc::shape_mismatch,
          "routing: of ", routing.tokens, " tokens and ", routing.experts, " experts, expected ",
          count, " and ", shape.experts);
  for (const RouterTape<T>* tape : {&saved, &d_tape}) {
    require(tape->prob.rows >= count && tape->gate.cols >= routing.slots(), Errc::shape_mismatch,
            tape == &saved ? "saved" : "d_tape", ": made for ", tape->prob.rows, " tokens and ",
            tape->gate.cols, " slots, the call has ", count, " and ", routing.slots());
    if (shape.width >= 0) check_tape_columns(*tape, shape.experts);
  }
  if (count == 0 || shape.width < 0) return;
  require_shape("x", tokens.x, count, shape.width);
  if (dx.data != nullptr) require_shape("dx", dx, count, shape.width);
}

#ifndef MOLE_HEADER_ONLY
extern template void check_forward(const RouterShape&, const Tokens<float>&,
                                   const Overrides<float>&, const RoutingTable<float>&,
                                   const RouterTape<float>*);
extern template void check_forward(const RouterShape&, const Tokens<double>&,
                                   const Overrides<double>&, const RoutingTable<double>&,
                                   const RouterTape<double>*);
extern template void check_backward(const RouterShape&, const RouterTape<float>&,
                                    const Tokens<float>&, const Routing<float>&,
                                    const RouterTape<float>&, MatView<float>);
extern template void check_backward(const RouterShape&, const RouterTape<double>&,
                                    const Tokens<double>&, const Routing<double>&,
                                    const RouterTape<double>&, MatView<double>);
#endif

}  // namespace mole::inline MOLE_ABI
