// SPDX-License-Identifier: Apache-2.0
#include "mole/experts/shared_up_bank.hpp"

#include <limits>
#include <string>
#include <vector>

#include "contracts/bank_trial.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/reference_bank.hpp"

using Catch::Matchers::ContainsSubstring;
using mole::Index;
using mole::MatView;
using mole::RowsBy;
using mole::SharedUpBank;
using test::difference;
using test::Matrix;

namespace {

template <class T>
typename SharedUpBank<T>::Config config_of(Index rank) {
  typename SharedUpBank<T>::Config config;
  config.in = 131;
  config.out = 149;
  config.rank = rank;
  config.scale = {T(0.5), T(2), T(-0.25)};
  return config;
}

/// Independent experts with the same B.
template <class T>
test::ReferenceCall reference_call(const test::BankTrial<SharedUpBank<T>>& trial,
                                   const test::BankCall<T>& c) {
  const auto matrix = [](MatView<T> view) {
    return Matrix<double>(view.rows, view.cols, [&](Index r, Index n) { return view(r, n); });
  };
  test::ReferenceCall call;
  for (Index e = 0; e < trial.bank().experts(); ++e) {
    call.experts.push_back({matrix(trial.params().down_of(e)),
                            matrix(trial.params().up),
                            {},
                            trial.bank().config().scale[static_cast<std::size_t>(e)]});
  }
  call.slots = c.slots;
  call.x_rows = c.x_rows;
  call.y_rows = c.y_rows;
  call.x = test::converted<double>(c.x);
  call.y = test::converted<double>(c.y);
  call.dy = test::converted<double>(c.dy);
  return call;
}

/// Gradients in the order of SharedUpBankParams::visit: every dA, then the sum of all dB.
std::vector<double> flat(const std::vector<test::ReferenceExpert>& experts) {
  std::vector<double> values;
  for (const auto& e : experts) {
    for (Index i = 0; i < e.down.rows() * e.down.cols(); ++i) {
      values.push_back(e.down(i / e.down.cols(), i % e.down.cols()));
    }
  }
  const Index out = experts[0].up.rows(), rank = experts[0].up.cols();
  for (Index i = 0; i < out * rank; ++i) {
    double sum = 0;
    for (const auto& e : experts) sum += e.up(i / rank, i % rank);
    values.push_back(sum);
  }
  return values;
}

}  // namespace

TEMPLATE_TEST_CASE("SharedUpBank agrees with plain loops", "[bank]", float, double) {
  using T = TestType;
  for (const Index rank : {Index{7}, Index{67}}) {
    const SharedUpBank<T> bank(config_of<T>(rank));
    const test::BankTrial<SharedUpBank<T>> trial(bank);
    for (const RowsBy x_rows : {RowsBy::token, RowsBy::slot}) {
      for (const RowsBy y_rows : {RowsBy::token, RowsBy::slot}) {
        const auto c = trial.call(test::random_slots(67, 3, 0.7, 2), x_rows, y_rows);
        const test::ReferenceCall call = reference_call(trial, c);
        const auto want = reference_bank(call), size = reference_bank(magnitudes(call));
        // A sum of n rounded products of at most four factors: n + 4 rounding errors.
        const double units = std::numeric_limits<T>::epsilon() / 2 *
                             static_cast<double>(131 + 149 + rank + c.x.rows() + 4);
        CHECK(difference(trial.forward(c), want.y, size.y, units) == "");
        const auto got = trial.backward(c);
        CHECK(difference(got.dx, want.dx, size.dx, units) == "");
        CHECK(difference(got.dgate, want.dgate, size.dgate, units) == "");
        CHECK(difference(got.params, flat(want.gradient), flat(size.gradient), units) == "");
      }
    }
  }
}

TEST_CASE("SharedUpBank says which field of its config is wrong", "[bank]") {
  const auto message = [](auto&& change) -> std::string {
    auto config = config_of<float>(7);
    change(config);
    try {
      const SharedUpBank<float> bank(config);
    } catch (const mole::Error& error) {
      return error.what();
    }
    return "";
  };
  CHECK(message([](auto&) {}) == "");
  CHECK_THAT(message([](auto& c) { c.in = 0; }), ContainsSubstring("in must be positive"));
  CHECK_THAT(message([](auto& c) { c.out = 0; }), ContainsSubstring("out must be positive"));
  CHECK_THAT(message([](auto& c) { c.rank = -1; }), ContainsSubstring("rank must not be negative"));
  CHECK_THAT(message([](auto& c) { c.scale.clear(); }), ContainsSubstring("scale must name"));
}

TEST_CASE("SharedUpBank refuses weights of another shape", "[bank]") {
  const SharedUpBank<float> bank(config_of<float>(7));
  const test::BankTrial trial(bank);
  const auto refused = [&](auto&& change) {
    SharedUpBank<float>::Weights weights = trial.params();
    change(weights);
    mole::Buffer memory(bank.prepared_bytes());
    mole::Workspace workspace(memory.span());
    try {
      bank.prepare(weights, workspace);
    } catch (const mole::Error& error) {
      return error.code() == mole::Errc::shape_mismatch;
    }
    return false;
  };
  CHECK(refused([](auto& w) { w.up.rows = 148; }));
  CHECK(refused([](auto& w) { w.up.cols = 6; }));
  CHECK(refused([](auto& w) { w.in = 130; }));
  CHECK(refused([](auto& w) { w.down = w.down.first(2); }));
}

TEST_CASE("SharedUpBank refuses gradients and tapes of another shape", "[bank]") {
  using Bank = SharedUpBank<float>;
  using Trial = test::BankTrial<Bank>;
  const Bank bank(config_of<float>(7));
  const Trial trial(bank);
  const auto c = trial.call(test::dense_slots(3, 3));
  const test::OwnedRouting<float> routing(c.slots, 3);
  Trial::Memory memory(trial, *routing, {});
  Trial::Gradients good(trial, c, *routing, 0);
  auto tape = memory.make_tape(trial, *routing);
  test::Matrix<float> y = c.y;
  bank.forward(trial.prepared(), trial.input(c), *routing, y, &tape, memory.context);
  const auto run = [&](const Bank::Tape& saved, const Bank::Params<float>& grad) {
    bank.backward(trial.params(), saved, trial.input(c), *routing, c.dy.view(), good.value.dgate,
                  {}, grad, memory.context);
  };
  CHECK_NOTHROW(run(tape, good.params));
  CHECK_THROWS_AS(run({}, good.params), mole::Error);
  auto grad = good.params;
  grad.down = grad.down.first(2);
  CHECK_THROWS_AS(run(tape, grad), mole::Error);
  grad = good.params;
  grad.up.cols = 6;
  CHECK_THROWS_AS(run(tape, grad), mole::Error);
  grad = good.params;
  grad.up.data = nullptr;
  CHECK_NOTHROW(run(tape, grad));
}
