// SPDX-License-Identifier: Apache-2.0
// A bank under test with random weights, and calls of it with exactly the memory it asks for.
#pragma once

#include <limits>
#include <type_traits>
#include <vector>

#include "mole/core/params.hpp"
#include "mole/experts/expert_bank.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/matrix.hpp"
#include "support/slots.hpp"

namespace test {

using mole::RowsBy;

/// Storage type of a bank's weights: V of Params<const V>.
template <class Weights>
struct StorageOf;
template <template <class> class P, class V>
struct StorageOf<P<const V>> {
  using Type = V;
};

/// How a call runs; none of it may change a bit of the results.
struct Machine {
  int workers = 1;
  mole::ParallelFor hook = nullptr;
  void* pool = nullptr;
  mole::Isa isa = mole::best_isa();
};

/// Single iterations in reverse order: the cruellest order that a hook may choose.
inline void reversed_single_steps(void*, Index count, Index, mole::RangeBody body, void* closure) {
  mole::reversed_loop(nullptr, count, 1, body, closure);
}

template <class T>
struct BankCall {
  Slots slots;
  RowsBy x_rows = RowsBy::token, y_rows = RowsBy::token;
  bool overwrite = false;
  Matrix<T> x, base, y, dy;
};

/// Everything that backward adds into.
template <class T>
struct BankGradient {
  Matrix<T> dx, dbase;
  std::vector<T> dgate;
  std::vector<T> params;  ///< in the order of visit
};

template <mole::ExpertBank Bank>
class BankTrial {
 public:
  using T = typename Bank::Scalar;
  using W = typename StorageOf<typename Bank::Weights>::Type;
  using Params = typename Bank::template Params<W>;

  explicit BankTrial(const Bank& bank)
      : bank_(bank),
        weights_block_(bank.template params_bytes<W>()),
        prepared_block_(bank.prepared_bytes()) {
    mole::Workspace memory(weights_block_.span());
    params_ = bank.template make_params<W>(memory);
    const mole::Random random(11, 5);
    std::uint64_t n = 0;
    mole::params::zip(
        [&](W& w) { w = static_cast<W>(static_cast<float>(random.below(n++, 256)) / 128 - 1); },
        params_);
    prepare();
  }

  const Bank& bank() const { return bank_; }
  const Params& params() const { return params_; }

  /// Again, after the weights changed.
  void prepare() {
    mole::Workspace memory(prepared_block_.span());
    prepared_ = bank_.prepare(params_, memory);
  }

  BankCall<T> call(Slots slots, RowsBy x_rows = RowsBy::token,
                   RowsBy y_rows = RowsBy::token) const {
    Index count = 0;
    for (const auto& token : slots) count += static_cast<Index>(token.size());
    const auto rows = [&](RowsBy by) {
      return by == RowsBy::token ? static_cast<Index>(slots.size()) : count;
    };
    BankCall<T> c;
    c.x_rows = x_rows;
    c.y_rows = y_rows;
    c.x = random_matrix<T>(rows(x_rows), bank_.input_width(), 1);
    c.y = random_matrix<T>(rows(y_rows), bank_.output_width(), 2);
    c.dy = random_matrix<T>(rows(y_rows), bank_.output_width(), 3);
    if (Bank::needs_base) c.base = random_matrix<T>(rows(y_rows), bank_.output_width(), 4);
    c.slots = std::move(slots);
    return c;
  }

  /// y after the call. Fails the test if anything beside the elements of y was written.
  Matrix<T> forward(const BankCall<T>& c, const Machine& machine = {}) const {
    const OwnedRouting<T> routing(c.slots, bank_.experts());
    Memory memory(*this, *routing, machine);
    Matrix<T> y = c.y;
    bank_.forward(prepared_, input(c), *routing, y, nullptr, memory.context);
    CHECK(y.padding_is_intact());
    return y;
  }

  /// The gradients after a forward with a tape; they start from `start` everywhere.
  BankGradient<T> backward(const BankCall<T>& c, const Machine& machine = {}, T start = 0) const {
    const OwnedRouting<T> routing(c.slots, bank_.experts());
    Memory memory(*this, *routing, machine);
    Matrix<T> y = c.y;
    typename Bank::Tape tape = memory.make_tape(*this, *routing);
    bank_.forward(prepared_, input(c), *routing, y, &tape, memory.context);
    CHECK(bit_difference(y, forward(c, machine)) == "");

    Gradients g(*this, c, *routing, start);
    bank_.backward(params_, tape, input(c), *routing, c.dy.view(), g.value.dgate, g.input(),
                   g.params, memory.context);
    CHECK(g.value.dx.padding_is_intact());
    return g.finish();
  }

  mole::BankInput<T> input(const BankCall<T>& c) const {
    mole::BankInput<T> input;
    input.x = c.x;
    if (Bank::needs_base) input.base = c.base;
    input.x_rows = c.x_rows;
    input.y_rows = c.y_rows;
    input.overwrite = c.overwrite;
    return input;
  }

  /// Scratch and tape of one call.
  struct Memory {
    mole::Buffer scratch_block, tape_block;
    mole::Workspace scratch;
    mole::Context context;

    Memory(const BankTrial& trial, const mole::Routing<T>& routing, const Machine& machine,
           double share = 1)
        : scratch_block(static_cast<std::size_t>(
              share * static_cast<double>(trial.bank_.scratch_bytes(routing.tokens, routing.slots(),
                                                                    machine.workers)))),
          tape_block(trial.bank_.tape_bytes(routing.tokens, routing.slots())),
          scratch(scratch_block.span()),
          context{scratch, machine.workers, machine.hook, machine.pool, machine.isa} {}
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;

    typename Bank::Tape make_tape(const BankTrial& trial, const mole::Routing<T>& routing) {
      mole::Workspace memory(tape_block.span());
      return trial.bank_.make_tape(memory, routing.tokens, routing.slots());
    }
  };

  /// Gradients of one call with their memory.
  struct Gradients {
    BankGradient<T> value;
    mole::Buffer block;
    typename Bank::template Params<T> params;

    Gradients(const BankTrial& trial, const BankCall<T>& c, const mole::Routing<T>& routing,
              T start)
        : block(trial.bank_.template params_bytes<T>()) {
      mole::Workspace memory(block.span());
      params = trial.bank_.template make_params<T>(memory);
      mole::params::zip([&](T& g) { g = start; }, params);
      const auto fill = [&](Index, Index) { return start; };
      value.dx = Matrix<T>(c.x.rows(), c.x.cols(), fill);
      value.dbase = Matrix<T>(c.base.rows(), c.base.cols(), fill);
      value.dgate.assign(routing.expert.size(), start);
    }
    mole::BankInputGradient<T> input() {
      mole::BankInputGradient<T> d;
      d.x = value.dx;
      if (Bank::needs_base) d.base = value.dbase;
      return d;
    }
    BankGradient<T> finish() {
      mole::params::zip([&](const T& g) { value.params.push_back(g); }, params);
      return value;
    }
  };

  const typename Bank::Prepared& prepared() const { return prepared_; }

 private:
  const Bank& bank_;
  mole::Buffer weights_block_, prepared_block_;
  Params params_;
  typename Bank::Prepared prepared_;
};

template <class T>
void check_same_bits(const BankGradient<T>& got, const BankGradient<T>& want) {
  CHECK(bit_difference(got.dx, want.dx) == "");
  CHECK(bit_difference(got.dbase, want.dbase) == "");
  CHECK(bit_difference(got.dgate, want.dgate) == "");
  CHECK(bit_difference(got.params, want.params) == "");
}

/// Room for the few roundings of one sum of a contract-sized call.
template <class T>
Close rounding() {
  const double eps = std::numeric_limits<T>::epsilon();
  return {512 * eps, 512 * eps};
}

inline Slots without_probes(Slots slots) {
  for (auto& token : slots) std::erase_if(token, [](const Slot& slot) { return slot.gate == 0; });
  return slots;
}

/// f(row of the larger matrix) picked into a new one.
template <class T, class F>
Matrix<T> rows_of(const Matrix<T>& from, Index rows, F&& f) {
  return Matrix<T>(rows, from.cols(), [&](Index r, Index c) { return from(f(r), c); });
}

/// The token of every slot.
inline std::vector<Index> token_of_slots(const Slots& slots) {
  std::vector<Index> tokens;
  for (std::size_t t = 0; t < slots.size(); ++t) {
    tokens.insert(tokens.end(), slots[t].size(), static_cast<Index>(t));
  }
  return tokens;
}

/// The call reduced to some of its tokens, in the given order. Rows by token.
template <class T>
BankCall<T> pick_tokens(const BankCall<T>& c, const std::vector<Index>& tokens) {
  BankCall<T> part = c;
  const auto count = static_cast<Index>(tokens.size());
  const auto token = [&](Index row) { return tokens[static_cast<std::size_t>(row)]; };
  for (Matrix<T> BankCall<T>::*m :
       {&BankCall<T>::x, &BankCall<T>::base, &BankCall<T>::y, &BankCall<T>::dy}) {
    if ((c.*m).rows() > 0) part.*m = rows_of(c.*m, count, token);
  }
  part.slots.clear();
  for (const Index t : tokens) part.slots.push_back(c.slots[static_cast<std::size_t>(t)]);
  return part;
}

}  // namespace test
