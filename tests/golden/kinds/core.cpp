// SPDX-License-Identifier: Apache-2.0
// core.*: the gated bottleneck products.
#include <algorithm>
#include <vector>

#include "golden/golden.hpp"
#include "mole/experts/lora_bank.hpp"
#include "mole/experts/shared_down_bank.hpp"
#include "mole/experts/shared_up_bank.hpp"
#include "mole/routing/routing.hpp"

namespace {

using golden::Case;
using mole::BankPath;
using mole::Index;
using mole::MatView;

/// The routing of a case and the way back from slots to its gate tensor.
template <class T>
struct CaseRouting {
  mole::RoutingTable<T> table;
  std::vector<Index> entry_of_slot;  // element of in.gate

  explicit CaseRouting(Case<T>& c)
      : table(c.memory(), c.extent("in.x", 0), c.extent("in.scale", 0), c.extent("in.scale", 0)) {
    table.begin(c.extent("in.x", 0));
    if (c.has("in.indptr")) {
      select_sparse(c);
    } else {
      select_dense(c);
    }
  }

  std::vector<T> by_entry(std::span<const T> by_slot) const {
    std::vector<T> entries(entry_of_slot.size());
    for (std::size_t s = 0; s < entries.size(); ++s) entries[entry_of_slot[s]] = by_slot[s];
    return entries;
  }

 private:
  void select_dense(Case<T>& c) {
    const MatView<const T> gate = c.matrix("in.gate");
    for (Index t = 0; t < gate.rows; ++t) table.select_all(t, gate.row(t));
    table.finish();
    for (Index i = 0; i < gate.size(); ++i) entry_of_slot.push_back(i);
  }

  void select_sparse(Case<T>& c) {
    const std::vector<std::int32_t> begin = c.ints("in.indptr"), expert = c.ints("in.indices");
    const std::span<const T> gate = c.values("in.gate");
    const std::span<const std::int32_t> experts = expert;
    for (std::size_t t = 0; t + 1 < begin.size(); ++t) {
      const auto first = static_cast<std::size_t>(begin[t]);
      const auto count = static_cast<std::size_t>(begin[t + 1]) - first;
      table.select(t, experts.subspan(first, count), gate.subspan(first, count));
      std::vector<Index> order;
      for (std::size_t i = first; i < first + count; ++i) order.push_back(i);
      std::sort(order.begin(), order.end(),
                [&](Index a, Index b) { return expert[a] < expert[b]; });
      entry_of_slot.insert(entry_of_slot.end(), order.begin(), order.end());
    }
    table.finish();
  }
};

/// y before the call: the host's, or zeros.
template <class T>
std::vector<T> start(Case<T>& c) {
  if (c.has("in.y0")) return c.template copy<T>("in.y0");
  return std::vector<T>(static_cast<std::size_t>(c.extent("in.dy", 0) * c.extent("in.dy", 1)));
}

/// Tokens without an active expert keep their row of y, whatever it held.
template <class T>
void check_idle_rows(Case<T>& c, const mole::Routing<T>& routing, const std::vector<T>& before,
                     const std::vector<T>& after) {
  const auto width = static_cast<std::size_t>(c.extent("in.dy", 1));
  for (Index t = 0; t < routing.tokens; ++t) {
    const auto first = routing.gate.begin() + routing.token_begin[t];
    const auto last = routing.gate.begin() + routing.token_begin[t + 1];
    if (std::any_of(first, last, [](T gate) { return gate != T(0); })) continue;
    c.check_same_bits(std::span(before).subspan(t * width, width),
                      std::span(after).subspan(t * width, width),
                      "a token without experts changed its row of y");
  }
}

template <class T, class Bank>
std::vector<T> forward(Case<T>& c, const Bank& bank, const typename Bank::Weights& weights,
                       const mole::Routing<T>& routing, typename Bank::Tape* tape) {
  std::vector<T> y = start(c);
  const std::vector<T> before = y;
  mole::BankInput<T> input;
  input.x = c.matrix("in.x");
  const MatView<T> out(y.data(), input.x.rows, bank.output_width());
  bank.forward(bank.prepare(weights, c.memory()), input, routing, out, tape, c.context());
  check_idle_rows(c, routing, before, y);
  return y;
}

/// Expectations that every bank of this file shares, all but the parameter gradients.
template <class T, class Bank>
void run_bank(Case<T>& c, const Bank& bank, const typename Bank::Weights& weights,
              const typename Bank::template Params<T>& grad) {
  const CaseRouting<T> routed(c);
  const mole::Routing<T> routing = routed.table.view();
  typename Bank::Tape tape = bank.make_tape(c.memory(), routing.tokens, routing.slots());
  const std::vector<T> y = forward(c, bank, weights, routing, &tape);
  const std::vector<T> inferred = forward(c, bank, weights, routing, nullptr);
  c.check_same_bits(y, inferred, "forward with a tape and without differ");
  c.expect("out.y", y);

  mole::BankInput<T> input;
  input.x = c.matrix("in.x");
  std::vector<T> dgate(routing.expert.size()), dx(static_cast<std::size_t>(input.x.size()));
  mole::BankInputGradient<T> d_input;
  d_input.x = {dx.data(), input.x.rows, input.x.cols};
  bank.backward(weights, tape, input, routing, c.matrix("in.dy"), dgate, d_input, grad,
                c.context());
  c.expect("grad.in.x", dx);
  c.expect("grad.in.gate", routed.by_entry(dgate));
  if (c.has("grad.in.y0")) c.expect("grad.in.y0", c.matrix("in.dy"));
}

/// Pointers to the experts of A and B, or of their gradients. Rank n of a `concat` layout is row n
/// of A and column n of B.
template <class V>
struct ExpertPointers {
  std::vector<V*> down, up;

  ExpertPointers(const std::vector<Index>& rank, Index in, Index out, bool stacked, V* a, V* b) {
    Index first = 0;
    for (const Index r : rank) {
      down.push_back(a + first * in);
      up.push_back(b + (stacked ? first * out : first));
      first += r;
    }
  }
};

template <class T>
std::vector<Index> ranks_of(Case<T>& c) {
  const auto experts = static_cast<std::size_t>(c.extent("in.scale", 0));
  if (c.has("in.rank_offsets")) {
    const std::vector<std::int32_t> offset = c.ints("in.rank_offsets");
    std::vector<Index> rank;
    for (std::size_t e = 0; e < experts; ++e) rank.push_back(offset[e + 1] - offset[e]);
    return rank;
  }
  const bool stacked = c.template config<std::string>("layout") == "stacked";
  return std::vector<Index>(experts, stacked ? c.extent("param.A", 1) : 1);
}

template <class T>
void gated_low_rank(Case<T>& c) {
  const bool stacked = c.template config<std::string>("layout") == "stacked";
  const Index in = c.extent("in.x", 1), out = c.extent("in.dy", 1);
  typename mole::LoraBank<T>::Config config;
  config.in = in;
  config.out = out;
  config.rank = ranks_of(c);
  config.scale = c.template copy<T>("in.scale");
  const Index up_stride = stacked ? 0 : c.extent("param.B", 1);

  const ExpertPointers<const T> weight(config.rank, in, out, stacked, c.values("param.A").data(),
                                       c.values("param.B").data());
  const mole::LoraBankParams<const T> weights{in,        out, config.rank, weight.down,
                                              weight.up, {},  0,           up_stride};
  std::vector<T> da(c.values("param.A").size()), db(c.values("param.B").size());
  const ExpertPointers<T> gradient(config.rank, in, out, stacked, da.data(), db.data());
  const mole::LoraBankParams<T> grad{in,          out, config.rank, gradient.down,
                                     gradient.up, {},  0,           up_stride};
  run_bank(c, mole::LoraBank<T>(config), weights, grad);
  c.expect("grad.param.A", da);
  c.expect("grad.param.B", db);

  const CaseRouting<T> routed(c);
  std::vector<std::vector<T>> y;
  for (const BankPath path : {BankPath::sparse, BankPath::dense}) {
    config.path = path;
    y.push_back(forward(c, mole::LoraBank<T>(config), weights, routed.table.view(), nullptr));
  }
  c.check_same_bits(y[0], y[1], "the sparse and the dense path differ");
}

/// Pointers to the matrices of a stack of `experts`.
template <class V>
std::vector<V*> unstack(MatView<V> stack, std::size_t experts) {
  std::vector<V*> pointers;
  for (std::size_t e = 0; e < experts; ++e)
    pointers.push_back(stack.data + e * stack.size() / experts);
  return pointers;
}

/// Gradients of param.A and param.B, zeros of their shapes.
template <class T>
struct Gradients {
  std::vector<T> a_values, b_values;
  MatView<T> a, b;

  explicit Gradients(Case<T>& c)
      : a_values(c.values("param.A").size()), b_values(c.values("param.B").size()) {
    a = {a_values.data(), c.matrix("param.A").rows, c.matrix("param.A").cols};
    b = {b_values.data(), c.matrix("param.B").rows, c.matrix("param.B").cols};
  }
  void expect(Case<T>& c) const {
    c.expect("grad.param.A", a);
    c.expect("grad.param.B", b);
  }
};

template <class T, class Bank>
Bank shared_bank(Case<T>& c, Index rank) {
  typename Bank::Config config;
  config.in = c.extent("in.x", 1);
  config.out = c.extent("in.dy", 1);
  config.rank = rank;
  config.scale = c.template copy<T>("in.scale");
  return Bank(config);
}

template <class T>
void shared_down(Case<T>& c) {
  const auto bank = shared_bank<T, mole::SharedDownBank<T>>(c, c.extent("param.A", 0));
  const Gradients<T> gradients(c);
  const auto up = unstack(c.matrix("param.B"), bank.experts());
  const auto dup = unstack(gradients.b, bank.experts());
  run_bank(c, bank, {c.matrix("param.A"), bank.output_width(), up},
           {gradients.a, bank.output_width(), dup});
  gradients.expect(c);
}

template <class T>
void shared_up(Case<T>& c) {
  const auto bank = shared_bank<T, mole::SharedUpBank<T>>(c, c.extent("param.B", 1));
  const Gradients<T> gradients(c);
  const auto down = unstack(c.matrix("param.A"), bank.experts());
  const auto ddown = unstack(gradients.a, bank.experts());
  run_bank(c, bank, {bank.input_width(), down, c.matrix("param.B")},
           {bank.input_width(), ddown, gradients.b});
  gradients.expect(c);
}

GOLDEN_KIND("core.gated_lowrank", gated_low_rank);
GOLDEN_KIND("core.shared_a", shared_down);
GOLDEN_KIND("core.shared_b", shared_up);

}  // namespace
