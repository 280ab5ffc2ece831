// SPDX-License-Identifier: Apache-2.0
#include "mole/experts/lora_bank.hpp"

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "contracts/bank_trial.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/matrix.hpp"
#include "support/reference_bank.hpp"
#include "support/slots.hpp"

using Catch::Matchers::ContainsSubstring;
using mole::BankPath;
using mole::bf16;
using mole::f16;
using mole::Index;
using mole::LoraBank;
using mole::MatView;
using mole::RowsBy;
using test::bit_difference;
using test::difference;
using test::Matrix;

namespace {

/// More inputs, outputs and ranks than one tile or panel holds.
template <class T>
typename LoraBank<T>::Config large(bool bias) {
  typename LoraBank<T>::Config config;
  config.in = 131;
  config.out = 149;
  config.rank = {17, 2, 0, 67, 1};
  config.scale = {T(0.5), T(2), T(1), T(-0.25), T(1.5)};
  config.bias = bias;
  return config;
}

template <class T, class W>
typename LoraBank<T, W>::Config same_config(const typename LoraBank<T>::Config& from) {
  typename LoraBank<T, W>::Config config;
  config.in = from.in;
  config.out = from.out;
  config.rank = from.rank;
  config.scale = from.scale;
  config.bias = from.bias;
  config.path = from.path;
  return config;
}

/// The same weights and the same call, as the slow twin sees them.
template <class T>
test::ReferenceCall reference_call(const test::BankTrial<LoraBank<T>>& trial,
                                   const test::BankCall<T>& c) {
  test::ReferenceCall reference;
  const auto matrix = [](MatView<T> view) {
    return Matrix<double>(view.rows, view.cols, [&](Index r, Index n) { return view(r, n); });
  };
  for (Index e = 0; e < trial.bank().experts(); ++e) {
    reference.experts.push_back({matrix(trial.params().down_of(e)), matrix(trial.params().up_of(e)),
                                 matrix(trial.params().bias_of(e)),
                                 trial.bank().config().scale[static_cast<std::size_t>(e)]});
  }
  reference.slots = c.slots;
  reference.x_rows = c.x_rows;
  reference.y_rows = c.y_rows;
  reference.x = test::converted<double>(c.x);
  reference.y = test::converted<double>(c.y);
  reference.dy = test::converted<double>(c.dy);
  return reference;
}

/// Parameter gradients in the order of LoraBankParams::visit.
std::vector<double> flat(const std::vector<test::ReferenceExpert>& experts) {
  std::vector<double> values;
  for (const test::ReferenceExpert& e : experts) {
    for (const Matrix<double>* m : {&e.down, &e.up, &e.bias}) {
      for (Index r = 0; r < m->rows(); ++r) {
        for (Index c = 0; c < m->cols(); ++c) values.push_back((*m)(r, c));
      }
    }
  }
  return values;
}

/// Rounding errors of a sum of n products of at most four factors, each rounded: (n + 4) units.
template <class T>
void check_against_reference(const LoraBank<T>& bank, RowsBy x_rows, RowsBy y_rows) {
  const test::BankTrial<LoraBank<T>> trial(bank);
  const auto c = trial.call(test::random_slots(67, bank.experts(), 0.7, 2), x_rows, y_rows);
  const test::ReferenceCall call = reference_call(trial, c);
  const test::ReferenceResult want = reference_bank(call), size = reference_bank(magnitudes(call));
  const double units = std::numeric_limits<T>::epsilon() / 2 *
                       static_cast<double>(bank.input_width() + bank.output_width() +
                                           bank.total_rank() + c.x.rows() + 4);
  CHECK(difference(trial.forward(c), want.y, size.y, units) == "");
  const test::BankGradient<T> got = trial.backward(c);
  CHECK(difference(got.dx, want.dx, size.dx, units) == "");
  CHECK(difference(got.dgate, want.dgate, size.dgate, units) == "");
  CHECK(difference(got.params, flat(want.gradient), flat(size.gradient), units) == "");
}

}  // namespace

TEMPLATE_TEST_CASE("LoraBank agrees with plain loops", "[bank]", float, double) {
  for (const bool bias : {false, true}) {
    const LoraBank<TestType> bank(large<TestType>(bias));
    for (const RowsBy x_rows : {RowsBy::token, RowsBy::slot}) {
      for (const RowsBy y_rows : {RowsBy::token, RowsBy::slot}) {
        check_against_reference(bank, x_rows, y_rows);
      }
    }
  }
}

TEMPLATE_TEST_CASE("the sparse and the dense path give the same bits", "[bank]", float, double) {
  auto config = large<TestType>(false);
  config.path = BankPath::sparse;
  const LoraBank<TestType> sparse(config);
  for (const BankPath path : {BankPath::dense, BankPath::automatic}) {
    config.path = path;
    const LoraBank<TestType> dense(config);
    const test::BankTrial sparse_trial(sparse), dense_trial(dense);
    for (Index tokens = 1; tokens <= 65; tokens += tokens < 8 ? 1 : 19) {
      const auto c = sparse_trial.call(test::dense_slots(tokens, 5));
      CHECK(bit_difference(dense_trial.forward(c), sparse_trial.forward(c)) == "");
      const auto alone = pick_tokens(c, {tokens - 1});
      CHECK(bit_difference(sparse_trial.forward(alone).view(),
                           dense_trial.forward(c).view().row_block(tokens - 1, 1)) == "");
    }
  }
}

TEST_CASE("the dense path keeps away from gates of zero", "[bank]") {
  auto config = large<float>(false);
  config.path = BankPath::dense;
  const LoraBank<float> bank(config);
  test::BankTrial trial(bank);
  auto c = trial.call(test::dense_slots(3, 5));
  for (auto& token : c.slots) token[0].gate = 0;
  const Matrix<float> y = trial.forward(c);
  trial.params().down_of(0)(0, 0) = std::numeric_limits<float>::quiet_NaN();
  trial.prepare();
  CHECK(bit_difference(trial.forward(c), y) == "");
}

TEMPLATE_TEST_CASE("stored halves give the bits of their widened values", "[bank]", bf16, f16,
                   double) {
  using W = TestType;
  const LoraBank<float> wide(large<float>(true));
  const LoraBank<float, W> narrow(same_config<float, W>(large<float>(true)));
  const test::BankTrial wide_trial(wide);
  const test::BankTrial narrow_trial(narrow);  // weights that both types hold
  const auto c = wide_trial.call(test::random_slots(23, 5, 0.7, 2));
  CHECK(bit_difference(narrow_trial.forward(c), wide_trial.forward(c)) == "");
  test::check_same_bits(narrow_trial.backward(c), wide_trial.backward(c));
}

TEST_CASE("experts may be rows and columns of one matrix", "[bank]") {
  const Index in = 13, out = 29, ranks = 11;
  LoraBank<double>::Config config;
  config.in = in;
  config.out = out;
  config.rank.assign(ranks, 1);
  config.scale.assign(ranks, 0.5);
  const LoraBank<double> bank(config);
  const Matrix<double> a = test::random_matrix(ranks, in, 1),
                       b = test::random_matrix(out, ranks, 2);
  std::vector<const double*> down, up;
  for (Index r = 0; r < ranks; ++r) {
    down.push_back(&a(r, 0));
    up.push_back(&b(0, r));
  }
  const LoraBank<double>::Weights weights{in, out, config.rank, down, up, {}, in + 3, ranks + 3};
  const test::OwnedRouting<double> routing(test::random_slots(17, ranks, 0.4, 2), ranks);
  mole::Buffer memory(bank.prepared_bytes()), scratch_memory(bank.scratch_bytes(17, 17 * ranks, 1));
  mole::Workspace workspace(memory.span()), scratch(scratch_memory.span());
  const Matrix<double> x = test::random_matrix(17, in, 3);
  Matrix<double> y(17, out), want(17, out);
  bank.forward(bank.prepare(weights, workspace), {.x = x.view()}, *routing, y, nullptr, {scratch});
  for (Index t = 0; t < 17; ++t) {
    for (Index s = routing->token_begin[t]; s < routing->token_begin[t + 1]; ++s) {
      const Index r = routing->expert[s];
      double h = 0;
      for (Index i = 0; i < in; ++i) h += a(r, i) * x(t, i);
      for (Index n = 0; n < out; ++n) want(t, n) += routing->gate[s] * 0.5 * h * b(n, r);
    }
  }
  CHECK(difference(y, want, test::Close{1e-13, 1e-13}) == "");
}

TEST_CASE("a bank of rank 0 adds nothing but its biases", "[bank]") {
  LoraBank<float>::Config config;
  config.in = 5;
  config.out = 7;
  config.rank = {0, 0};
  config.scale = {2, 3};
  for (const bool bias : {false, true}) {
    config.bias = bias;
    const LoraBank<float> bank(config);
    const test::BankTrial trial(bank);
    const auto c = trial.call(test::dense_slots(4, 2));
    const Matrix<float> y = trial.forward(c);
    CHECK((bit_difference(y, c.y) == "") == !bias);
    const auto g = trial.backward(c);
    CHECK(bit_difference(g.dx, Matrix<float>(4, 5)) == "");
    CHECK(g.params.size() == (bias ? 14u : 0u));
  }
}

TEST_CASE("LoraBank says which field of its config is wrong", "[bank]") {
  const auto message = [](LoraBank<float>::Config config) -> std::string {
    try {
      const LoraBank<float> bank(config);
    } catch (const mole::Error& error) {
      CHECK(error.code() == mole::Errc::invalid_argument);
      return error.what();
    }
    return "";
  };
  const LoraBank<float>::Config good = large<float>(false);
  CHECK(message(good) == "");
  auto bad = good;
  bad.in = 0;
  CHECK_THAT(message(bad), ContainsSubstring("in must be positive, got 0"));
  bad = good;
  bad.out = -1;
  CHECK_THAT(message(bad), ContainsSubstring("out must be positive, got -1"));
  bad = good;
  bad.rank[1] = -2;
  CHECK_THAT(message(bad), ContainsSubstring("rank must not be negative, got -2"));
  bad = good;
  bad.scale.pop_back();
  CHECK_THAT(message(bad), ContainsSubstring("rank has 5 experts, scale has 4"));
  bad = good;
  bad.rank.clear();
  bad.scale.clear();
  CHECK_THAT(message(bad), ContainsSubstring("rank must name an expert"));
}

TEST_CASE("LoraBank refuses weights of another shape", "[bank]") {
  const LoraBank<float> bank(large<float>(true));
  const test::BankTrial trial(bank);
  mole::Buffer memory(bank.prepared_bytes());
  const auto refused = [&](auto&& change) {
    LoraBank<float>::Weights weights = trial.params();
    change(weights);
    mole::Workspace workspace(memory.span());
    try {
      bank.prepare(weights, workspace);
    } catch (const mole::Error& error) {
      return error.code() == mole::Errc::shape_mismatch;
    }
    return false;
  };
  const std::vector<Index> other_rank = {17, 2, 0, 67, 2};
  CHECK(refused([](auto& w) { w.in = 130; }));
  CHECK(refused([](auto& w) { w.out = 150; }));
  CHECK(refused([&](auto& w) { w.rank = other_rank; }));
  CHECK(refused([](auto& w) { w.down = w.down.first(4); }));
  CHECK(refused([](auto& w) { w.up = w.up.first(4); }));
  CHECK(refused([](auto& w) { w.bias = {}; }));
}

TEST_CASE("LoraBank refuses matrices without memory, and strides below their columns", "[bank]") {
  const LoraBank<float> bank(large<float>(true));
  const test::BankTrial trial(bank);
  mole::Buffer memory(bank.prepared_bytes());
  const auto refused = [&](auto&& change) {
    LoraBank<float>::Weights weights = trial.params();
    change(weights);
    mole::Workspace workspace(memory.span());
    CHECK_THROWS_AS(bank.prepare(weights, workspace), mole::Error);
  };
  std::vector<const float*> holes(5, nullptr);
  refused([&](auto& w) { w.down = holes; });
  refused([&](auto& w) { w.up = holes; });
  refused([&](auto& w) { w.bias = holes; });
  refused([](auto& w) { w.down_stride = 130; });
  refused([](auto& w) { w.up_stride = 66; });
}

TEST_CASE("LoraBank refuses gradients and tapes of another shape", "[bank]") {
  using Trial = test::BankTrial<LoraBank<float>>;
  const LoraBank<float> bank(large<float>(false)), with_bias(large<float>(true));
  const Trial trial(bank);
  const auto c = trial.call(test::dense_slots(3, 5));
  const test::OwnedRouting<float> routing(c.slots, 5);
  Trial::Memory memory(trial, *routing, {});
  Trial::Gradients good(trial, c, *routing, 0), biased(Trial(with_bias), c, *routing, 0);
  const auto tape = memory.make_tape(trial, *routing);
  const auto run = [&](const LoraBank<float>::Tape& saved, LoraBank<float>::Params<float> grad) {
    bank.backward(trial.params(), saved, trial.input(c), *routing, c.dy.view(), good.value.dgate,
                  {}, grad, memory.context);
  };
  Matrix<float> y = c.y;
  auto written = tape;
  bank.forward(trial.prepared(), trial.input(c), *routing, y, &written, memory.context);
  CHECK_NOTHROW(run(tape, good.params));
  CHECK_THROWS_AS(run(tape, biased.params), mole::Error);
  CHECK_THROWS_AS(run({}, good.params), mole::Error);
  CHECK_THROWS_AS(run({tape.hidden.row_block(0, 14)}, good.params), mole::Error);
  auto grad = good.params;
  grad.in = 130;
  CHECK_THROWS_AS(run(tape, grad), mole::Error);
  grad = good.params;
  grad.up = grad.up.first(4);
  CHECK_THROWS_AS(run(tape, grad), mole::Error);
  grad.up = {};
  CHECK_NOTHROW(run(tape, grad));
}

TEST_CASE("parameters outlive the bank that shaped them", "[bank]") {
  mole::Buffer memory(LoraBank<float>(large<float>(true)).params_bytes<float>());
  mole::Workspace workspace(memory.span());
  const auto params = LoraBank<float>(large<float>(true)).make_params<float>(workspace);
  CHECK(std::vector<Index>(params.rank.begin(), params.rank.end()) == large<float>(true).rank);
  CHECK(mole::params::count(params) == (131 + 149) * 87 + 5 * 149);
}
