// SPDX-License-Identifier: Apache-2.0
// What every ExpertBank must do, as one call:
//
//   TEST_CASE("MyBank keeps the bank contract") { bank_contract(MyBank<double>(config)); }
//
// The bank needs at least three experts: expert 1 never gets a token here. Widths that are no
// multiple of a vector test more. docs/bank_contract.md explains every check.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "contracts/bank_trial.hpp"
#include "support/alloc_counter.hpp"
#include "support/gradcheck.hpp"

namespace test {

template <mole::ExpertBank Bank>
class BankContract {
 public:
  using T = typename Bank::Scalar;
  using Trial = BankTrial<Bank>;
  using Call = BankCall<T>;

  explicit BankContract(const Bank& bank) : bank_(bank), trial_(bank) {}

  /// The output is linear in the gates, a sum over the experts, and added to what y holds.
  void adds_gated_outputs() const {
    Call c = trial_.call(slots());
    const Matrix<T> before = c.y, after = trial_.forward(c);
    c.y = Matrix<T>(before.rows(), before.cols());
    const Matrix<T> alone = trial_.forward(c);
    CHECK(difference(sum(before, alone), after, rounding<T>()) == "");

    Call doubled = c;
    for (Slot& slot : all_slots(doubled)) slot.gate *= 2;
    CHECK(bit_difference(trial_.forward(doubled), sum(alone, alone)) == "");

    Matrix<T> total(before.rows(), before.cols());
    for (Index e = 0; e < bank_.experts(); ++e) {
      Call one = c;
      for (auto& token : one.slots) std::erase_if(token, [&](Slot s) { return s.expert != e; });
      total = sum(total, trial_.forward(one));
    }
    CHECK(difference(total, alone, rounding<T>()) == "");
  }

  /// Asked to overwrite, it gives the bits of adding to zeros, whatever y held.
  void overwrites_on_request() const {
    Call c = trial_.call(slots());
    for (const bool some : {true, false}) {
      if (!some) c.slots.assign(c.slots.size(), {});
      c.overwrite = false;
      c.y = Matrix<T>(c.y.rows(), c.y.cols());
      const Matrix<T> want = trial_.forward(c);
      c.overwrite = true;
      c.y = Matrix<T>(c.y.rows(), c.y.cols(),
                      [](Index, Index) { return std::numeric_limits<T>::quiet_NaN(); });
      CHECK(bit_difference(trial_.forward(c), want) == "");
    }
  }

  /// A row of y without an active slot keeps its bits. What is in its row of x, or in the weights
  /// of an expert that is nowhere active, reaches nothing but the gate gradients of that expert.
  void keeps_what_it_does_not_own() const {
    const Call clean = trial_.call(slots());
    Call c = clean;
    const T nan = -std::numeric_limits<T>::quiet_NaN();
    for (std::size_t t = 0; t < c.slots.size(); ++t) {
      const auto row = static_cast<Index>(t);
      if (!c.slots[t].empty()) {
        c.slots[t].insert(c.slots[t].begin() + (c.slots[t][0].expert == 0), Slot{1, 0});
        continue;
      }
      c.slots[t] = {Slot{1, 0}, Slot{2, 0}};
      for (Index i = 0; i < c.x.cols(); ++i) c.x(row, i) = nan;
      for (Index n = 0; n < c.y.cols(); ++n) {
        c.dy(row, n) = nan;
        c.y(row, n) = n % 2 == 0 ? nan : T(-0.0);
      }
    }
    Trial poisoned(bank_);
    Trial::Params::visit(
        [](const mole::Leaf& leaf, const auto& view) {
          for (Index i = 0; leaf.index == 1 && i < view.size(); ++i) {
            view(i / view.cols, i % view.cols) =
                static_cast<typename Trial::W>(std::numeric_limits<float>::quiet_NaN());
          }
        },
        poisoned.params());
    poisoned.prepare();

    Matrix<T> y = trial_.forward(clean);
    for (Index t = 0; t < y.rows(); ++t) {
      if (!clean.slots[static_cast<std::size_t>(t)].empty()) continue;
      std::ranges::copy(c.y.view().row(t), y.view().row(t).begin());
    }
    CHECK(bit_difference(poisoned.forward(c), y) == "");
    BankGradient<T> g = poisoned.backward(c);
    g.dgate = without_probes(c.slots, g.dgate);
    BankGradient<T> want = trial_.backward(clean);
    want.dgate = without_probes(clean.slots, want.dgate);
    check_same_bits(g, want);
  }

  /// A probe changes nothing but its own gate gradient.
  void ignores_probes() const {
    const Call with = trial_.call(slots());
    Call without = with;
    without.slots = test::without_probes(with.slots);
    CHECK(bit_difference(trial_.forward(with), trial_.forward(without)) == "");

    BankGradient<T> g = trial_.backward(with);
    const std::size_t all = g.dgate.size();
    g.dgate = without_probes(with.slots, g.dgate);
    CHECK(g.dgate.size() < all);
    check_same_bits(g, trial_.backward(without));
  }

  /// A token gets the same bits in any batch, at any place.
  void does_not_see_the_batch() const {
    const Index tokens = 65;
    const Call all = trial_.call(random_slots(tokens, bank_.experts(), 0.6, 3));
    const Matrix<T> y = trial_.forward(all);
    const BankGradient<T> g = trial_.backward(all);
    for (const Index count :
         {Index{1}, Index{2}, Index{5}, Index{6}, Index{7}, Index{48}, tokens}) {
      for (const Index step : {Index{1}, Index{29}}) {
        std::vector<Index> picked;
        for (Index i = 0; i < count; ++i) picked.push_back((3 + step * i) % tokens);
        const Call part = pick_tokens(all, picked);
        const auto token = [&](Index row) { return picked[static_cast<std::size_t>(row)]; };
        CHECK(bit_difference(trial_.forward(part), rows_of(y, count, token)) == "");
        const BankGradient<T> part_g = trial_.backward(part);
        CHECK(bit_difference(part_g.dx, rows_of(g.dx, count, token)) == "");
        CHECK(bit_difference(part_g.dgate, gates_of(all.slots, g.dgate, picked)) == "");
      }
    }
  }

  /// Order of the loop, instruction set.
  void does_not_see_the_machine() const {
    for (const Slots& slots :
         {random_slots(97, bank_.experts(), 0.6, 4), dense_slots(53, bank_.experts())}) {
      const Call c = trial_.call(slots);
      const Machine plain{1, mole::serial_loop, nullptr, mole::Isa::portable};
      std::vector<Machine> machines = {{1, mole::reversed_loop, nullptr, mole::Isa::portable},
                                       {1, reversed_single_steps, nullptr, mole::Isa::portable},
                                       {2, nullptr, nullptr, mole::best_isa()},
                                       {7, nullptr, nullptr, mole::best_isa()}};
      for (const mole::Isa isa : {mole::Isa::avx2, mole::Isa::avx512}) {
        if (mole::isa_available(isa)) machines.push_back({1, mole::serial_loop, nullptr, isa});
      }
      const Matrix<T> y = trial_.forward(c, plain);
      const BankGradient<T> g = trial_.backward(c, plain);
      for (const Machine& machine : machines) same_on(machine, c, y, g);
    }
  }

  /// The same on threads of a host.
  void does_not_see_the_workers(mole::ParallelFor hook, void* pool, int workers) const {
    const Call c = trial_.call(random_slots(97, bank_.experts(), 0.6, 4));
    same_on({workers, hook, pool, mole::best_isa()}, c, trial_.forward(c), trial_.backward(c));
  }

  /// Rows by slot are rows by token, spread.
  void reads_and_writes_rows_by_slot() const {
    const Call by_token = trial_.call(slots());
    const std::vector<Index> token = token_of_slots(by_token.slots);
    const auto spread = [&](const Matrix<T>& m) {
      return rows_of(m, static_cast<Index>(token.size()),
                     [&](Index s) { return token[static_cast<std::size_t>(s)]; });
    };
    const BankGradient<T> want = trial_.backward(by_token);
    Call c = by_token;
    c.x_rows = RowsBy::slot;
    c.x = spread(by_token.x);
    CHECK(bit_difference(trial_.forward(c), trial_.forward(by_token)) == "");
    const BankGradient<T> from_x = trial_.backward(c);
    CHECK(bit_difference(from_x.dgate, want.dgate) == "");
    CHECK(difference(gathered(from_x.dx, token, by_token.x.rows()), want.dx, rounding<T>()) == "");
    CHECK(difference(from_x.params, want.params, rounding<T>()) == "");

    c.y_rows = RowsBy::slot;
    c.dy = spread(by_token.dy);
    if (Bank::needs_base) c.base = spread(by_token.base);
    c.y = Matrix<T>(c.dy.rows(), c.dy.cols());
    const Matrix<T> y = gathered(trial_.forward(c), token, by_token.y.rows());
    CHECK(difference(sum(y, by_token.y), trial_.forward(by_token), rounding<T>()) == "");
    const BankGradient<T> g = trial_.backward(c);
    CHECK(bit_difference(g.dgate, want.dgate) == "");
    CHECK(difference(g.params, want.params, rounding<T>()) == "");
    CHECK(difference(gathered(g.dbase, token, by_token.base.rows()), want.dbase, rounding<T>()) ==
          "");
    c.x_rows = RowsBy::token;
    c.x = by_token.x;
    CHECK(difference(trial_.backward(c).dx, want.dx, rounding<T>()) == "");
  }

  /// Gradients are added to what is there; those not asked for are left out.
  void adds_gradients() const {
    const Call c = trial_.call(slots());
    const BankGradient<T> zero = trial_.backward(c), one = trial_.backward(c, {}, T(1));
    const Matrix<T> ones(c.x.rows(), c.x.cols(), [](Index, Index) { return T(1); });
    CHECK(difference(one.dx, sum(zero.dx, ones), rounding<T>()) == "");
    const auto plus_one = [](std::vector<T> values) {
      for (T& value : values) value += T(1);
      return values;
    };
    CHECK(difference(one.dgate, plus_one(zero.dgate), rounding<T>()) == "");
    CHECK(difference(one.params, plus_one(zero.params), rounding<T>()) == "");

    const OwnedRouting<T> routing(c.slots, bank_.experts());
    typename Trial::Memory memory(trial_, *routing, {});
    typename Bank::Tape tape = memory.make_tape(trial_, *routing);
    Matrix<T> y = c.y;
    bank_.forward(trial_.prepared(), trial_.input(c), *routing, y, &tape, memory.context);
    std::vector<T> dgate(zero.dgate.size());
    bank_.backward(trial_.params(), tape, trial_.input(c), *routing, c.dy.view(), dgate, {}, {},
                   memory.context);
    CHECK(bit_difference(dgate, zero.dgate) == "");
  }

  /// Every gradient against difference quotients.
  void differentiates() {
    if constexpr (std::is_same_v<T, double> && std::is_same_v<typename Trial::W, double>) {
      for (const RowsBy rows : {RowsBy::token, RowsBy::slot}) {
        differentiates(trial_.call(random_slots(5, bank_.experts(), 0.7, 6), rows, rows));
      }
    }
  }

  /// No tokens, or tokens without slots.
  void accepts_nothing_to_do() const {
    for (const std::size_t tokens : {0u, 3u}) {
      const Call c = trial_.call(Slots(tokens));
      CHECK(bit_difference(trial_.forward(c), c.y) == "");
      const BankGradient<T> g = trial_.backward(c, {}, T(3));
      CHECK(bit_difference(g.params, std::vector<T>(g.params.size(), T(3))) == "");
      CHECK(bit_difference(g.dx, Matrix<T>(g.dx.rows(), g.dx.cols(),
                                           [](Index, Index) { return T(3); })) == "");
    }
    if constexpr (!Bank::needs_base) {  // without rows, x and y need not even have a width
      const OwnedRouting<T> routing(Slots(0), bank_.experts());
      typename Trial::Memory memory(trial_, *routing, {});
      CHECK_NOTHROW(bank_.forward(trial_.prepared(), {}, *routing, {}, nullptr, memory.context));
    }
  }

  /// Too little memory is an error, and nothing was written.
  void refuses_too_little_memory() const {
    const Call c = trial_.call(slots());
    const OwnedRouting<T> routing(c.slots, bank_.experts());
    typename Trial::Memory enough(trial_, *routing, {});
    typename Bank::Tape tape = enough.make_tape(trial_, *routing);
    Matrix<T> y = c.y;
    bank_.forward(trial_.prepared(), trial_.input(c), *routing, y, &tape, enough.context);
    for (const double share : {0.0, 0.25, 0.5, 0.75}) {
      typename Trial::Memory memory(trial_, *routing, {}, share);
      refuses_forward(c, *routing, trial_.input(c), nullptr, memory.context, share == 0);
      refuses_backward(c, *routing, tape, memory.context, share == 0);
    }
    mole::Workspace none;
    typename Bank::Tape small = bank_.make_tape(none, 0, 0);
    refuses_forward(c, *routing, trial_.input(c), &small, enough.context, true);
    CHECK_THROWS_AS(bank_.prepare(trial_.params(), none), mole::Error);
  }

  /// Wrong shapes are an error that says what was expected, and nothing was written.
  void refuses_wrong_shapes() const {
    const Call c = trial_.call(slots());
    const OwnedRouting<T> routing(c.slots, bank_.experts()), more(c.slots, bank_.experts() + 1);
    typename Trial::Memory memory(trial_, *routing, {});
    mole::BankInput<T> input = trial_.input(c);
    refuses_forward(c, *more, input, nullptr, memory.context, true);
    input.x = c.x.view().row_block(0, c.x.rows() - 1);
    refuses_forward(c, *routing, input, nullptr, memory.context, true);
    input.x = c.x.view().col_block(0, c.x.cols() - 1);
    refuses_forward(c, *routing, input, nullptr, memory.context, true);
    input = trial_.input(c);
    input.x_rows = RowsBy::slot;
    refuses_forward(c, *routing, input, nullptr, memory.context, true);

    Matrix<T> y = c.y;
    typename Bank::Tape tape = memory.make_tape(trial_, *routing);
    bank_.forward(trial_.prepared(), trial_.input(c), *routing, y, &tape, memory.context);
    std::vector<T> dgate(routing->expert.size() - 1);
    CHECK_THROWS_AS(bank_.backward(trial_.params(), tape, trial_.input(c), *routing, c.dy.view(),
                                   dgate, {}, {}, memory.context),
                    mole::Error);
    dgate.resize(routing->expert.size());
    Matrix<T> narrow(c.x.rows(), c.x.cols() - 1);
    mole::BankInputGradient<T> d_input;
    d_input.x = narrow;
    CHECK_THROWS_AS(bank_.backward(trial_.params(), tape, trial_.input(c), *routing, c.dy.view(),
                                   dgate, d_input, {}, memory.context),
                    mole::Error);
    CHECK(bit_difference(dgate, std::vector<T>(dgate.size())) == "");
  }

  /// Neither forward nor backward allocates, on any number of workers.
  void allocates_nothing(Index tokens = 33) const {
    if (!kCountsAllocations) return;
    const Call c = trial_.call(random_slots(tokens, bank_.experts(), 0.6, 8));
    const OwnedRouting<T> routing(c.slots, bank_.experts());
    for (const int workers : {1, 2}) {
      typename Trial::Memory memory(trial_, *routing, {workers, nullptr, nullptr});
      typename Bank::Tape tape = memory.make_tape(trial_, *routing);
      typename Trial::Gradients gradients(trial_, c, *routing, T(0));
      Matrix<T> y = c.y;
      const auto run = [&] {
        bank_.forward(trial_.prepared(), trial_.input(c), *routing, y, nullptr, memory.context);
        bank_.forward(trial_.prepared(), trial_.input(c), *routing, y, &tape, memory.context);
        bank_.backward(trial_.params(), tape, trial_.input(c), *routing, c.dy.view(),
                       gradients.value.dgate, gradients.input(), gradients.params, memory.context);
      };
      run();  // threads start here
      const long before = allocations();
      run();
      CHECK(allocations() == before);
    }
  }

 private:
  Slots slots() const { return random_slots(19, bank_.experts(), 0.7, 2); }

  static std::vector<std::reference_wrapper<Slot>> all_slots(Call& c) {
    std::vector<std::reference_wrapper<Slot>> slots;
    for (auto& token : c.slots) slots.insert(slots.end(), token.begin(), token.end());
    return slots;
  }

  /// The gate gradients of the active slots.
  static std::vector<T> without_probes(const Slots& slots, const std::vector<T>& dgate) {
    std::vector<T> active;
    std::size_t s = 0;
    for (const auto& token : slots) {
      for (const Slot& slot : token) {
        if (slot.gate != 0) active.push_back(dgate[s]);
        ++s;
      }
    }
    return active;
  }

  static Matrix<T> sum(const Matrix<T>& a, const Matrix<T>& b) {
    return Matrix<T>(a.rows(), a.cols(), [&](Index r, Index c) { return a(r, c) + b(r, c); });
  }

  /// Rows by slot added up by token.
  static Matrix<T> gathered(const Matrix<T>& by_slot, const std::vector<Index>& token,
                            Index tokens) {
    Matrix<T> by_token(tokens, by_slot.cols());
    for (Index s = 0; s < by_slot.rows(); ++s) {
      for (Index c = 0; c < by_slot.cols(); ++c) {
        by_token(token[static_cast<std::size_t>(s)], c) += by_slot(s, c);
      }
    }
    return by_token;
  }

  /// The gate gradients of some tokens, in their order.
  static std::vector<T> gates_of(const Slots& slots, const std::vector<T>& dgate,
                                 const std::vector<Index>& tokens) {
    const std::vector<Index> token = token_of_slots(slots);
    std::vector<T> picked;
    for (const Index t : tokens) {
      for (std::size_t s = 0; s < token.size(); ++s) {
        if (token[s] == t) picked.push_back(dgate[s]);
      }
    }
    return picked;
  }

  void same_on(const Machine& machine, const Call& c, const Matrix<T>& y,
               const BankGradient<T>& g) const {
    CHECK(bit_difference(trial_.forward(c, machine), y) == "");
    check_same_bits(trial_.backward(c, machine), g);
  }

  void differentiates(Call c) {
    const BankGradient<T> g = trial_.backward(c);
    const auto loss = [&] { return weighted_sum(c.dy, trial_.forward(c)); };
    CHECK(gradient_error(c.x, g.dx, loss) == "");
    if (Bank::needs_base) CHECK(gradient_error(c.base, g.dbase, loss) == "");

    std::size_t s = 0;
    for (Slot& slot : all_slots(c)) {
      const MatView<double> gate(&slot.gate, 1, 1);
      CHECK(gradient_error(gate, MatView<const double>(&g.dgate[s++], 1, 1), loss) == "");
    }

    std::size_t n = 0;
    const auto prepared_loss = [&] {
      trial_.prepare();
      return loss();
    };
    Trial::Params::visit(
        [&](const mole::Leaf& leaf, const auto& view) {
          INFO(leaf.path());
          const MatView<const double> gradient(g.params.data() + n, view.rows, view.cols);
          n += static_cast<std::size_t>(view.size());
          CHECK(gradient_error(view, gradient, prepared_loss) == "");
        },
        trial_.params());
    trial_.prepare();
  }

  /// Either the call works, or it throws and y keeps its bits.
  void refuses_forward(const Call& c, const mole::Routing<T>& routing,
                       const mole::BankInput<T>& input, typename Bank::Tape* tape,
                       const mole::Context& context, bool must_throw) const {
    Matrix<T> y = c.y;
    bool threw = false;
    try {
      bank_.forward(trial_.prepared(), input, routing, y, tape, context);
    } catch (const mole::Error&) {
      threw = true;
    }
    CHECK((threw || !must_throw));
    if (threw) CHECK(bit_difference(y, c.y) == "");
  }

  void refuses_backward(const Call& c, const mole::Routing<T>& routing,
                        const typename Bank::Tape& tape, const mole::Context& context,
                        bool must_throw) const {
    typename Trial::Gradients gradients(trial_, c, routing, T(2));
    bool threw = false;
    try {
      bank_.backward(trial_.params(), tape, trial_.input(c), routing, c.dy.view(),
                     gradients.value.dgate, gradients.input(), gradients.params, context);
    } catch (const mole::Error&) {
      threw = true;
    }
    CHECK((threw || !must_throw));
    if (!threw) return;
    const BankGradient<T> g = gradients.finish();
    check_same_bits(g, typename Trial::Gradients(trial_, c, routing, T(2)).finish());
  }

  const Bank& bank_;
  Trial trial_;
};

/// All of it, without threads.
template <mole::ExpertBank Bank>
void bank_contract(const Bank& bank) {
  BankContract<Bank> contract(bank);
  contract.adds_gated_outputs();
  contract.overwrites_on_request();
  contract.keeps_what_it_does_not_own();
  contract.ignores_probes();
  contract.does_not_see_the_batch();
  contract.does_not_see_the_machine();
  contract.reads_and_writes_rows_by_slot();
  contract.adds_gradients();
  contract.differentiates();
  contract.accepts_nothing_to_do();
  contract.refuses_too_little_memory();
  contract.refuses_wrong_shapes();
  contract.allocates_nothing();
}

}  // namespace test
