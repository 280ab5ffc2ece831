// SPDX-License-Identifier: Apache-2.0
// Layers live on the memory that they ask for, at full width, and never allocate.
#include <string>

#include "layers/layer_case.hpp"
#include "mole/layers/session.hpp"
#include "support/alloc_counter.hpp"
#include "support/catch.hpp"

namespace {

using mole::Index;
using test::LayerCase;
using test::Matrix;

constexpr Index kWidth = 4096, kTokens = 3;

template <class Layer>
void check_no_allocation(const Layer& layer) {
  using T = typename Layer::Scalar;
  LayerCase<Layer> c(layer, kTokens);
  const auto x = test::normal_matrix<T>(kTokens, kWidth, 1);
  const auto dy = test::normal_matrix<T>(kTokens, kWidth, 2);
  Matrix<T> y(kTokens, kWidth), dx(kTokens, kWidth), factor(kTokens, kWidth);
  mole::fill_dropout(0.1, mole::Random(1), factor.view());
  mole::LayerInput<T> input(x);
  input.dropout = factor;
  const long before = test::allocations();
  c.layer.forward(c.prepared, input, y, nullptr, c.context);
  const long inference = test::allocations();
  c.layer.forward(c.prepared, input, y, &c.tape, c.context);
  mole::balance_loss<T>({}, c.tape.routing.view(), c.tape.router.prob, c.d_tape.prob, c.context);
  c.layer.backward(c.weights(), c.tape, input, dy, c.d_tape, {.x = dx}, c.grad, c.context);
  const long training = test::allocations();
  CHECK(inference - before == 0);
  CHECK(training - inference == 0);
  CHECK(mole::params::norm(c.grad) > 1);
}

}  // namespace

TEST_CASE("forward and backward at width 4096 allocate nothing", "[layers]") {
  if (!test::kCountsAllocations) return;
  const mole::TopKRouter<float> top_k({.width = kWidth, .experts = 8, .bias = true});
  check_no_allocation(mole::AdaptedLinear{
      test::TopKMixture<float>{top_k, test::make_bank<float>(kWidth, kWidth, 8)}});
  const mole::DenseRouter<float> dense({.width = kWidth, .experts = 8});
  check_no_allocation(mole::AdaptedLinear{
      test::DenseMixture<float>{dense, test::make_bank<float>(kWidth, kWidth, 8, true)}});
}

TEST_CASE("a session allocates when it is made, not when it works", "[layers]") {
  if (!test::kCountsAllocations) return;
  constexpr Index kIn = 67, kOut = 31;
  const mole::TopKRouter<double> router({.width = kIn, .experts = 5});
  LayerCase c(test::TopKMixture<double>{router, test::make_bank<double>(kIn, kOut, 5)}, kTokens);
  const auto x = test::normal_matrix<double>(kTokens, kIn, 1);
  Matrix<double> y(kTokens, kOut), dx(kTokens, kIn);
  const long before = test::allocations();
  mole::Session<test::TopKMixture<double>> session(c.layer, c.weights(),
                                                   {.max_tokens = kTokens, .training = true});
  const long made = test::allocations();
  session.forward(x, y);
  session.backward(c.weights(), x, y, {.x = dx}, c.grad);
  session.update(c.weights());
  const long worked = test::allocations();
  CHECK(made - before > 0);
  CHECK(worked - made == 0);
}
