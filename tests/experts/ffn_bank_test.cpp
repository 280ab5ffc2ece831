// SPDX-License-Identifier: Apache-2.0
#include "mole/experts/ffn_bank.hpp"

#include <cmath>
#include <string>
#include <vector>

#include "contracts/bank_trial.hpp"
#include "mole/layers/mixture.hpp"
#include "mole/routers/top_k.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"

using Catch::Matchers::ContainsSubstring;
using mole::Activation;
using mole::ExpertBase;
using mole::FfnBank;
using mole::FfnForm;
using mole::Index;
using mole::LinearBank;
using mole::MatView;
using test::bit_difference;
using test::difference;

namespace {

using Row = std::vector<double>;

template <class T>
typename FfnBank<T>::Config config_of(FfnForm form, ExpertBase base, bool bias) {
  typename FfnBank<T>::Config config;
  config.in = 13;
  config.inner = 71;
  config.out = 17;
  config.experts = 3;
  config.form = form;
  config.base = base;
  config.inner_bias = config.outer_bias = bias;
  if (form == FfnForm::gated) config.gate = {{2, 0, 5}, {T(0.5), T(1), T(-2)}};
  config.up = {{1, 3, 0}, {T(1), T(0.25), T(1)}};
  config.down = {{0, 2, 3}, {T(1), T(-0.5), T(1.5)}};
  return config;
}

/// M_e v = W v + b + scale B A v, in plain loops.
template <class T>
Row projected(const mole::LinearBankParams<T>& m, const std::vector<T>& scale, Index e,
              const Row& v) {
  const auto multiply = [](MatView<T> w, const Row& x) {
    Row y(static_cast<std::size_t>(w.rows));
    for (Index n = 0; n < w.rows; ++n) {
      for (Index i = 0; i < w.cols; ++i) y[n] += static_cast<double>(w(n, i)) * x[i];
    }
    return y;
  };
  Row y = multiply(m.weight_of(e), v);
  const Row added = multiply(m.adapter.up_of(e), multiply(m.adapter.down_of(e), v));
  for (std::size_t n = 0; n < y.size(); ++n) {
    y[n] += static_cast<double>(scale[static_cast<std::size_t>(e)]) * added[n];
    if (!m.bias.empty()) y[n] += static_cast<double>(m.bias_of(e)(0, static_cast<Index>(n)));
  }
  return y;
}

/// F_e(x) with silu.
template <class T>
Row expert_output(const FfnBank<T>& bank, const mole::FfnBankParams<T>& params, Index e,
                  const Row& x) {
  const auto& config = bank.config();
  const auto inner = static_cast<std::size_t>(config.inner);
  Row up = projected(params.up, config.up.scale, e, x), gate = up;
  if (config.form == FfnForm::gated) gate = projected(params.gate, config.gate.scale, e, x);
  if (config.form == FfnForm::fused) up.assign(gate.begin() + config.inner, gate.end());
  Row active(inner);
  for (std::size_t i = 0; i < inner; ++i) {
    active[i] = gate[i] / (1 + std::exp(-gate[i]));
    if (config.form != FfnForm::plain) active[i] *= up[i];
  }
  return projected(params.down, config.down.scale, e, active);
}

std::string refusal(const FfnBank<double>::Config& config) {
  try {
    FfnBank<double> bank(config);
  } catch (const mole::Error& error) {
    return error.what();
  }
  return "accepted";
}

}  // namespace

TEMPLATE_TEST_CASE("FfnBank computes its experts", "[bank]", float, double) {
  using T = TestType;
  for (const FfnForm form : {FfnForm::gated, FfnForm::fused, FfnForm::plain}) {
    for (const ExpertBase base : {ExpertBase::shared, ExpertBase::own}) {
      INFO("form " << static_cast<int>(form) << ", base " << static_cast<int>(base));
      const FfnBank<T> bank(config_of<T>(form, base, true));
      const test::BankTrial trial(bank);
      const auto c = trial.call(test::random_slots(9, 3, 0.8, 3));
      const test::Matrix<T> y = trial.forward(c);
      test::Matrix<double> want(y.rows(), y.cols());
      double largest = 0;
      for (Index t = 0; t < y.rows(); ++t) {
        Row x;
        for (Index i = 0; i < c.x.cols(); ++i) x.push_back(static_cast<double>(c.x(t, i)));
        for (Index n = 0; n < y.cols(); ++n) want(t, n) = static_cast<double>(c.y(t, n));
        for (const auto& slot : c.slots[static_cast<std::size_t>(t)]) {
          const Row out = expert_output(bank, trial.params(), slot.expert, x);
          for (Index n = 0; n < y.cols(); ++n) {
            want(t, n) += slot.gate * out[static_cast<std::size_t>(n)];
            largest = std::max(largest, std::fabs(want(t, n)));
          }
        }
      }
      const double eps = std::numeric_limits<T>::epsilon();
      CHECK(difference(y, want, {256 * eps, 256 * eps * largest}) == "");
    }
  }
}

TEST_CASE("a shared base is the same base for every expert", "[bank]") {
  const FfnBank<double> shared(config_of<double>(FfnForm::gated, ExpertBase::shared, true));
  const FfnBank<double> own(config_of<double>(FfnForm::gated, ExpertBase::own, true));
  const test::BankTrial trial(shared);
  test::BankTrial twin(own);
  const auto copy = [](const mole::LinearBankParams<double>& from,
                       const mole::LinearBankParams<double>& to) {
    const auto rows = [](MatView<const double> a, MatView<double> b) {
      for (Index r = 0; r < b.rows; ++r) std::ranges::copy(a.row(r), b.row(r).begin());
    };
    for (Index e = 0; e < 3; ++e) {
      rows(from.weight_of(e), to.weight_of(e));
      rows(from.bias_of(e), to.bias_of(e));
    }
    mole::params::copy(from.adapter, to.adapter);
  };
  copy(trial.params().gate, twin.params().gate);
  copy(trial.params().up, twin.params().up);
  copy(trial.params().down, twin.params().down);
  twin.prepare();
  const auto c = trial.call(test::random_slots(21, 3, 0.7, 2));
  const test::Close close{1e-12, 1e-10};
  CHECK(difference(twin.forward(c), trial.forward(c), close) == "");
  const auto g = trial.backward(c), twin_g = twin.backward(c);
  CHECK(difference(twin_g.dx, g.dx, close) == "");
  CHECK(difference(twin_g.dgate, g.dgate, close) == "");
}

TEST_CASE("a frozen base leaves the other gradients as they are", "[bank]") {
  for (const ExpertBase base : {ExpertBase::shared, ExpertBase::own}) {
    const FfnBank<double> bank(config_of<double>(FfnForm::gated, base, true));
    using Trial = test::BankTrial<FfnBank<double>>;
    const Trial trial(bank);
    const auto c = trial.call(test::random_slots(21, 3, 0.7, 2));
    const test::OwnedRouting<double> routing(c.slots, 3);
    Trial::Memory memory(trial, *routing, {});
    auto tape = memory.make_tape(trial, *routing);
    test::Matrix<double> y = c.y;
    bank.forward(trial.prepared(), trial.input(c), *routing, y, &tape, memory.context);
    Trial::Gradients all(trial, c, *routing, 0), frozen(trial, c, *routing, 0);
    const auto backward = [&](Trial::Gradients& g, const mole::FfnBankParams<double>& grad) {
      bank.backward(trial.params(), tape, trial.input(c), *routing, c.dy.view(), g.value.dgate,
                    g.input(), grad, memory.context);
    };
    backward(all, all.params);
    mole::FfnBankParams<double> adapters = frozen.params;
    for (auto* m : {&adapters.gate, &adapters.up, &adapters.down}) m->weight = m->bias = {};
    backward(frozen, adapters);
    CHECK(bit_difference(frozen.value.dx, all.value.dx) == "");
    CHECK(bit_difference(frozen.value.dgate, all.value.dgate) == "");
    const auto norm = [](const auto& part) { return mole::params::norm(part); };
    for (auto m : {&mole::FfnBankParams<double>::gate, &mole::FfnBankParams<double>::up,
                   &mole::FfnBankParams<double>::down}) {
      CHECK(norm((frozen.params.*m).adapter) == norm((all.params.*m).adapter));
      CHECK(norm((all.params.*m).adapter) > 0);
      (frozen.params.*m).adapter = {};
      CHECK(norm(frozen.params.*m) == 0);
    }
  }
}

TEST_CASE("FfnBank names its parameters", "[bank]") {
  const auto names = [](FfnForm form, ExpertBase base) {
    auto config = config_of<double>(form, base, false);
    config.experts = 2;
    config.gate = {};
    config.up = {{1, 0}, {1, 1}};
    config.down = {};
    const FfnBank<double> bank(config);
    mole::Buffer block(bank.params_bytes<double>());
    mole::Workspace memory(block.span());
    std::string text;
    const auto params = bank.make_params<double>(memory);
    mole::FfnBankParams<double>::visit(
        [&](const mole::Leaf& leaf, const auto&) { text += leaf.path() + " "; }, params);
    return text;
  };
  CHECK(names(FfnForm::gated, ExpertBase::shared) ==
        "gate.weight up.weight up.adapter.0.down up.adapter.0.up up.adapter.1.down "
        "up.adapter.1.up down.weight ");
  CHECK(names(FfnForm::plain, ExpertBase::own) ==
        "up.0.weight up.1.weight up.adapter.0.down up.adapter.0.up up.adapter.1.down "
        "up.adapter.1.up down.0.weight down.1.weight ");
}

TEST_CASE("FfnBank refuses what does not fit, by name", "[bank]") {
  const auto good = config_of<double>(FfnForm::gated, ExpertBase::shared, false);
  const auto refused = [&](auto change) {
    auto config = good;
    change(config);
    return refusal(config);
  };
  CHECK(refusal(good) == "accepted");
  CHECK_THAT(refused([](auto& c) { c.in = 0; }), ContainsSubstring("in must be positive, got 0"));
  CHECK_THAT(refused([](auto& c) { c.inner = -1; }),
             ContainsSubstring("inner must be positive, got -1"));
  CHECK_THAT(refused([](auto& c) { c.out = 0; }), ContainsSubstring("out must be positive"));
  CHECK_THAT(refused([](auto& c) { c.experts = 0; }),
             ContainsSubstring("experts: expected 1 ... 65536, got 0"));
  CHECK_THAT(refused([](auto& c) { c.experts = 65537; }), ContainsSubstring("got 65537"));
  CHECK_THAT(refused([](auto& c) { c.up.rank.pop_back(); }),
             ContainsSubstring("rank: expected 3 values or none, got 2"));
  CHECK_THAT(refused([](auto& c) { c.down.scale.pop_back(); }),
             ContainsSubstring("scale: expected 3 values, one for every rank, got 2"));
  CHECK_THAT(refused([](auto& c) { c.form = FfnForm::fused; }),
             ContainsSubstring("gate_rank: the form fused has no gate of its own"));
}

TEST_CASE("FfnBank refuses weights and gradients of another shape", "[bank]") {
  const FfnBank<double> bank(config_of<double>(FfnForm::gated, ExpertBase::own, true));
  const test::BankTrial trial(bank);
  mole::Buffer block(bank.prepared_bytes());
  const auto refused = [&](auto change) {
    mole::FfnBankParams<const double> weights = trial.params();
    change(weights);
    mole::Workspace memory(block.span());
    try {
      bank.prepare(weights, memory);
    } catch (const mole::Error& error) {
      return std::string(error.what());
    }
    return std::string("accepted");
  };
  CHECK(refused([](auto&) {}) == "accepted");
  CHECK_THAT(refused([](auto& w) { w.gate.in = 12; }),
             ContainsSubstring("expected own weights 13 -> 71, got own weights 12 -> 71"));
  CHECK_THAT(refused([](auto& w) { w.up.base = ExpertBase::shared; }),
             ContainsSubstring("got shared weights"));
  CHECK_THAT(refused([](auto& w) { w.down.weight = w.down.weight.first(2); }),
             ContainsSubstring("expected 3 weights and 3 biases, got 2 and 3"));
  CHECK_THAT(refused([](auto& w) { w.down.bias = {}; }), ContainsSubstring("got 3 and 0"));
  CHECK_THAT(refused([](auto& w) { w.down.adapter = {}; }), ContainsSubstring("LoraBank weights"));
}

TEST_CASE("LinearBank refuses what does not fit, by its own name", "[bank]") {
  using Config = LinearBank<double>::Config;
  const auto refused = [](auto change) -> std::string {
    Config config{.in = 3, .out = 5, .experts = 2, .rank = {1, 2}, .scale = {1, 1}};
    change(config);
    try {
      LinearBank<double> bank(config);
    } catch (const mole::Error& error) {
      CHECK(error.code() == mole::Errc::invalid_argument);
      return error.what();
    }
    return "accepted";
  };
  CHECK(refused([](Config&) {}) == "accepted");
  CHECK(refused([](Config& c) { c.in = 0; }) == "LinearBank: in must be positive, got 0");
  CHECK(refused([](Config& c) { c.out = -1; }) == "LinearBank: out must be positive, got -1");
  CHECK(refused([](Config& c) { c.experts = 0; }) ==
        "LinearBank: experts: expected 1 ... 65536, got 0");
  CHECK(refused([](Config& c) { c.experts = 65537; }) ==
        "LinearBank: experts: expected 1 ... 65536, got 65537");
  CHECK(refused([](Config& c) { c.rank.pop_back(); }) ==
        "LinearBank: rank: expected 2 values or none, got 1");
  CHECK(refused([](Config& c) { c.scale.pop_back(); }) ==
        "LinearBank: scale: expected 2 values, one for every rank, got 1");
  CHECK(refused([](Config& c) { c.rank = {}; }) ==
        "LinearBank: scale: expected 0 values, one for every rank, got 2");
}

TEST_CASE("LinearBank refuses gradients of biases that no adapter of it has", "[bank]") {
  using Trial = test::BankTrial<LinearBank<double>>;
  for (const bool adapted : {false, true}) {
    LinearBank<double>::Config config;
    config.in = 13;
    config.out = 17;
    config.experts = 3;
    config.bias = true;
    if (adapted) config.rank = {1, 0, 2}, config.scale = {1, 1, 0.5};
    const LinearBank<double> bank(config);
    const Trial trial(bank);
    const auto c = trial.call(test::random_slots(9, 3, 0.8, 3));
    const test::OwnedRouting<double> routing(c.slots, 3);
    Trial::Memory memory(trial, *routing, {});
    auto tape = memory.make_tape(trial, *routing);
    test::Matrix<double> y = c.y;
    bank.forward(trial.prepared(), trial.input(c), *routing, y, &tape, memory.context);
    Trial::Gradients g(trial, c, *routing, 1);
    std::vector<double> bias(17, 1);
    const std::vector<double*> biases(3, bias.data());
    mole::LinearBankParams<double> with_others = g.params, alone = g.params;
    with_others.adapter.bias = alone.adapter.bias = biases;
    alone.weight = alone.bias = alone.adapter.down = alone.adapter.up = {};
    for (const auto& grad : {alone, with_others}) {
      CHECK_THROWS_WITH(
          bank.backward(trial.params(), tape, trial.input(c), *routing, c.dy.view(), g.value.dgate,
                        g.input(), grad, memory.context),
          ContainsSubstring(adapted ? "LoraBank gradient: expected down, up of 3 experts, got"
                                    : "LinearBank gradient: expected no adapters, got"));
    }
    test::check_same_bits(g.finish(), Trial::Gradients(trial, c, *routing, 1).finish());
    CHECK(bias == std::vector<double>(17, 1));
  }
}
