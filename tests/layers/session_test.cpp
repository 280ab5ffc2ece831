// SPDX-License-Identifier: Apache-2.0
#include <functional>
#include <string>

#include "layers/layer_case.hpp"
#include "mole/layers/session.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"

namespace {

using mole::Errc;
using mole::Index;
using mole::MatView;
using mole::Session;
using test::LayerCase;
using test::Matrix;

constexpr Index kTokens = 13, kIn = 67, kOut = 31, kExperts = 5;

template <class T>
using Layer = mole::AdaptedLinear<test::TopKMixture<T>>;

template <class T>
Layer<T> make_layer() {
  const mole::TopKRouter<T> router({.width = kIn, .experts = kExperts, .bias = true});
  return Layer<T>{{router, test::make_bank<T>(kIn, kOut, kExperts, true)}};
}

Errc code_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const mole::Error& error) {
    return error.code();
  }
  return Errc{};
}

}  // namespace

TEMPLATE_TEST_CASE("a session has the bits of the layer, forward and backward", "[layers]", float,
                   double) {
  using T = TestType;
  LayerCase<Layer<T>> c(make_layer<T>(), kTokens), of_session(make_layer<T>(), kTokens);
  const auto x = test::normal_matrix<T>(kTokens, kIn, 1);
  const auto dy = test::normal_matrix<T>(kTokens, kOut, 2);
  const Matrix<T> y0(kTokens, kOut);
  Session<Layer<T>> inference(c.layer, c.weights(), {.max_tokens = kTokens});
  Session<Layer<T>> training(c.layer, c.weights(), {.max_tokens = kTokens + 3, .training = true});

  const Matrix<T> expected = c.record(x, y0);
  Matrix<T> y(kTokens, kOut), dx(kTokens, kIn), session_dx(kTokens, kIn);
  inference.forward(x, y);
  CHECK(test::bit_difference(y, expected) == "");
  for (int step = 0; step < 2; ++step) {  // the second step starts from clean gradients
    INFO("step " << step);
    training.forward(x, y);
    CHECK(test::bit_difference(y, expected) == "");
    CHECK(mole::params::norm(training.d_tape()) == 0);
    const auto loss = [&](auto& tape, auto& d_tape) {
      return mole::balance_loss<T>({}, c.tape.routing.view(), tape.prob.row_block(0, kTokens),
                                   d_tape.prob.row_block(0, kTokens), c.context);
    };
    mole::params::zero(c.d_tape);
    CHECK(loss(training.tape().router, training.d_tape()) == loss(c.tape.router, c.d_tape));
    dx = Matrix<T>(kTokens, kIn);
    session_dx = dx;
    c.backward(x, dy, {.x = dx});
    mole::params::zero(of_session.grad);
    training.backward(c.weights(), x, dy, {.x = session_dx}, of_session.grad);
    CHECK(test::bit_difference(session_dx, dx) == "");
    bool same = true;
    mole::params::zip([&](T a, T b) { same = same && a == b; }, of_session.grad, c.grad);
    CHECK(same);
    CHECK(mole::params::norm(c.grad) > 1);
  }
}

TEST_CASE("a session shows the routing of its last forward", "[layers]") {
  LayerCase c(make_layer<float>(), kTokens);
  const auto x = test::normal_matrix<float>(kTokens, kIn, 1);
  Matrix<float> y(kTokens, kOut);
  c.record(x, y);
  for (const bool training : {false, true}) {
    INFO("training " << training);
    Session<Layer<float>> session(c.layer, c.weights(),
                                  {.max_tokens = kTokens, .training = training});
    CHECK(session.routing().slots() == 0);
    session.forward(x, y);
    const auto got = session.routing(), want = c.tape.routing.view();
    CHECK(test::bit_difference(got.gate, want.gate) == "");
    CHECK(test::bit_difference(got.expert, want.expert) == "");
    session.forward(x.view().row_block(0, 3), y.view().row_block(0, 3));
    CHECK(session.routing().tokens == 3);
  }
}

TEST_CASE("a session computes with the weights it packed last", "[layers]") {
  LayerCase c(make_layer<double>(), kTokens);
  Session<Layer<double>> session(c.layer, c.weights(), {.max_tokens = kTokens});
  const auto x = test::normal_matrix<double>(kTokens, kIn, 1);
  const Matrix<double> y0(kTokens, kOut);
  const Matrix<double> before = c.infer(x, y0);
  mole::params::zip([](double& value) { value *= 1.5; }, c.params);
  Matrix<double> y(kTokens, kOut);
  session.forward(x, y);
  CHECK(test::bit_difference(y, before) == "");
  c.prepare();
  const Matrix<double> after = c.infer(x, y0);
  CHECK(test::bit_difference(after, before) != "");
  session.update(c.weights());
  session.forward(x, y);
  CHECK(test::bit_difference(y, after) == "");
}

TEST_CASE("a session passes buffers and overrides on", "[layers]") {
  LayerCase c(make_layer<double>(), kTokens);
  Session<Layer<double>> session(c.layer, c.weights(), {.max_tokens = kTokens});
  const auto x = test::normal_matrix<double>(kTokens, kIn, 1);
  Matrix<double> y(kTokens, kOut);
  const double selection_bias[kExperts] = {0, 0, 0, 9, 9};
  session.forward(x, y, {.selection_bias = selection_bias});
  for (const std::int32_t expert : session.routing().expert) CHECK(expert >= 3);
  const std::uint8_t forbidden[kExperts] = {0, 0, 1, 1, 1};
  mole::LayerInput<double> input(x);
  input.overrides.forbidden = {forbidden, 1, kExperts};
  session.forward(input, y);
  for (const std::int32_t expert : session.routing().expert) CHECK(expert < 2);
}

TEST_CASE("a session refuses what it was not made for, and y stays", "[layers]") {
  LayerCase c(make_layer<double>(), kTokens);
  Session<Layer<double>> session(c.layer, c.weights(), {.max_tokens = kTokens - 1});
  const auto x = test::normal_matrix<double>(kTokens, kIn, 1);
  Matrix<double> y = test::normal_matrix<double>(kTokens, kOut, 2);
  const Matrix<double> before = y;
  CHECK_THROWS_WITH(session.forward(x, y), "Session: 13 tokens, max_tokens is 12");
  CHECK(code_of([&] { session.forward(x, y); }) == Errc::limit_exceeded);
  CHECK(code_of([&] { session.forward(x.view().row_block(0, 3), y); }) == Errc::shape_mismatch);
  CHECK(code_of([&] { session.backward(c.weights(), x, y, {}, c.grad); }) == Errc::state_error);
  CHECK(test::bit_difference(y, before) == "");
  CHECK(mole::params::norm(c.grad) == 0);

  CHECK(code_of([&] { Session<Layer<double>>(c.layer, c.weights(), {.workers = 0}); }) ==
        Errc::invalid_argument);
  CHECK(code_of([&] { Session<Layer<double>>(c.layer, c.weights(), {.max_tokens = -1}); }) ==
        Errc::invalid_argument);
}

TEST_CASE("a session goes back once for every time it went forward", "[layers]") {
  LayerCase c(make_layer<double>(), kTokens);
  Session<Layer<double>> session(c.layer, c.weights(), {.max_tokens = kTokens, .training = true});
  const auto x = test::normal_matrix<double>(kTokens, kIn, 1);
  Matrix<double> y(kTokens, kOut);
  const auto backward = [&] {
    return code_of([&] { session.backward(c.weights(), x, y, {}, c.grad); });
  };
  CHECK(backward() == Errc::state_error);
  CHECK(mole::params::norm(c.grad) == 0);
  session.forward(x, y);
  CHECK(backward() == Errc{});
  const double once = mole::params::norm(c.grad);
  CHECK(backward() == Errc::state_error);
  CHECK(mole::params::norm(c.grad) == once);
  session.forward(x, y);
  CHECK(backward() == Errc{});
  CHECK(mole::params::norm(c.grad) == Catch::Approx(2 * once));
}
