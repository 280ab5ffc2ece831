// SPDX-License-Identifier: Apache-2.0
#include "mole/optim/adamw.hpp"

#include <cmath>
#include <limits>
#include <vector>

#include "mole/core/random.hpp"
#include "support/catch.hpp"

namespace {

using mole::AdamWOptions;
using mole::Errc;
using mole::Index;
using mole::Leaf;
using mole::MatView;

template <class V>
struct Pair {
  MatView<V> weight, bias;

  template <class F, class... P>
  static void visit(F&& f, P&... p) {
    f(Leaf{"weight"}, p.weight...);
    f(Leaf{"bias"}, p.bias...);
  }
};

/// A Pair of [rows, cols] and [1, cols] over its own elements, with a gap after every row.
template <class T>
struct Owned {
  static constexpr Index kRows = 3, kCols = 7, kStride = 11;
  std::vector<T> memory;

  explicit Owned(std::uint64_t stream = 0) : memory((kRows + 1) * kStride, T(0)) {
    const mole::Random random(5, stream);
    for (std::size_t i = 0; stream != 0 && i < memory.size(); ++i) {
      memory[i] = static_cast<T>(random.normal(i));
    }
  }
  Pair<T> view() {
    return {{memory.data(), kRows, kCols, kStride},
            {memory.data() + kRows * kStride, 1, kCols, kStride}};
  }
};

/// One step of the paper's Algorithm 2 on one number, in double.
struct Reference {
  double theta, m = 0, v = 0;

  void step(double g, const AdamWOptions& o, int t) {
    m = o.beta1 * m + (1 - o.beta1) * g;
    v = o.beta2 * v + (1 - o.beta2) * g * g;
    const double m_hat = m / (1 - std::pow(o.beta1, t)), v_hat = v / (1 - std::pow(o.beta2, t));
    theta -= o.learning_rate * (m_hat / (std::sqrt(v_hat) + o.epsilon) + o.weight_decay * theta);
  }
};

Errc code_of(const AdamWOptions& options, std::int64_t step) {
  Owned<double> theta(1), grad(2), m, v;
  const std::vector<double> before = theta.memory;
  try {
    mole::adamw_step(theta.view(), grad.view(), m.view(), v.view(), options, step);
  } catch (const mole::Error& error) {
    CHECK(theta.memory == before);
    return error.code();
  }
  return Errc{};
}

}  // namespace

TEMPLATE_TEST_CASE("AdamW follows the paper's algorithm over many steps", "[optim]", float,
                   double) {
  using T = TestType;
  const AdamWOptions options{
      .learning_rate = 0.05, .beta1 = 0.8, .beta2 = 0.95, .epsilon = 1e-6, .weight_decay = 0.3};
  constexpr int kSteps = 20;
  Owned<T> theta(1), m, v;
  const std::vector<T> start = theta.memory;
  std::vector<Reference> expected;
  for (const T value : start) expected.push_back({static_cast<double>(value)});

  for (int t = 1; t <= kSteps; ++t) {
    Owned<T> grad(static_cast<std::uint64_t>(t) + 1);
    mole::adamw_step(theta.view(), grad.view(), m.view(), v.view(), options, t);
    for (std::size_t i = 0; i < expected.size(); ++i) {
      expected[i].step(static_cast<double>(grad.memory[i]), options, t);
    }
  }
  // Every step rounds a handful of times, and no step is longer than 1.3 learning rates.
  const double bound = 16 * kSteps * static_cast<double>(std::numeric_limits<T>::epsilon());
  for (std::size_t i = 0; i < expected.size(); ++i) {
    INFO("element " << i);
    if (i % Owned<T>::kStride >= Owned<T>::kCols) {
      CHECK(theta.memory[i] == start[i]);
      continue;
    }
    CHECK(std::fabs(theta.memory[i] - expected[i].theta) <= bound * (1 + std::fabs(start[i])));
    CHECK(std::fabs(m.memory[i] - expected[i].m) <= bound * (1 + std::fabs(expected[i].m)));
    CHECK(std::fabs(v.memory[i] - expected[i].v) <= bound * (1 + expected[i].v));
  }
}

TEST_CASE("AdamW by hand: the first step moves by the learning rate, then decay shrinks",
          "[optim]") {
  // t = 1: m = 0.1 g, v = 0.001 g², both corrected to g and g²: the step is η (±1 + λ θ).
  double theta[] = {2, 2, -4}, g[] = {0.5, -3, 0}, m[3] = {}, v[3] = {};
  const AdamWOptions options{.learning_rate = 0.125, .epsilon = 1e-300, .weight_decay = 0.5};
  const auto row = [](double* data) { return Pair<double>{{data, 1, 3}, {}}; };
  mole::adamw_step(row(theta), row(g), row(m), row(v), options, 1);
  CHECK(theta[0] == Catch::Approx(2 - 0.125 * (1 + 1)).epsilon(1e-14));
  CHECK(theta[1] == Catch::Approx(2 - 0.125 * (-1 + 1)).epsilon(1e-14));
  CHECK(theta[2] == -4 + 0.125 * 2);
  CHECK(m[1] == Catch::Approx(-0.3).epsilon(1e-14));
  CHECK(v[1] == Catch::Approx(0.009).epsilon(1e-14));

  // t = 2 with the same gradient: corrections keep m̂ = g and v̂ = g².
  const double before = theta[0];
  mole::adamw_step(row(theta), row(g), row(m), row(v), options, 2);
  CHECK(theta[0] == Catch::Approx(before - 0.125 * (1 + 0.5 * before)).epsilon(1e-13));
}

TEST_CASE("AdamW leaves alone what the gradient leaves empty", "[optim]") {
  Owned<double> theta(1), grad(2), m(3), v(4);
  const std::vector<double> theta_before = theta.memory, m_before = m.memory;
  for (double& value : v.memory) value = std::fabs(value);
  Pair<double> some = grad.view();
  some.weight = {};
  Pair<double> moments = m.view();
  moments.weight = {};  // a frozen tensor needs no moments
  mole::adamw_step(theta.view(), some, moments, v.view(), {}, 3);
  const auto bias = static_cast<std::ptrdiff_t>(Owned<double>::kRows * Owned<double>::kStride);
  CHECK(std::equal(theta_before.begin(), theta_before.begin() + bias, theta.memory.begin()));
  CHECK(std::equal(m_before.begin(), m_before.begin() + bias, m.memory.begin()));
  CHECK(theta.memory[bias] != theta_before[bias]);
}

TEST_CASE("AdamW refuses options and shapes before it changes anything", "[optim]") {
  CHECK(code_of({}, 1) == Errc{});
  CHECK(code_of({}, 0) == Errc::invalid_argument);
  CHECK(code_of({.learning_rate = -1}, 1) == Errc::invalid_argument);
  CHECK(code_of({.learning_rate = std::nan("")}, 1) == Errc::invalid_argument);
  CHECK(code_of({.beta1 = 1}, 1) == Errc::invalid_argument);
  CHECK(code_of({.beta2 = -0.1}, 1) == Errc::invalid_argument);
  CHECK(code_of({.epsilon = 0}, 1) == Errc::invalid_argument);
  CHECK(code_of({.weight_decay = INFINITY}, 1) == Errc::invalid_argument);
  CHECK_THROWS_WITH((mole::AdamWUpdate<float>({.beta2 = 1}, 1)),
                    "AdamW: beta2: expected a number in [0, 1), got 1");
  CHECK_THROWS_AS((mole::AdamWUpdate<float>({.epsilon = 1e-60}, 1)), mole::Error);

  Owned<double> theta(1), grad(2), m, v;
  const std::vector<double> before = theta.memory;
  Pair<double> wrong = v.view();
  wrong.bias.cols -= 1;
  CHECK_THROWS_WITH(mole::adamw_step(theta.view(), grad.view(), m.view(), wrong, {}, 1),
                    "bias: expected [1, 7], got [1, 6]");
  CHECK(theta.memory == before);
}
