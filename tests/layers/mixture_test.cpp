// SPDX-License-Identifier: Apache-2.0
#include "mole/layers/mixture.hpp"

#include <limits>
#include <string>

#include "layers/layer_case.hpp"
#include "mole/routers/given.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"

namespace {

using mole::Errc;
using mole::Index;
using mole::MatView;
using test::LayerCase;
using test::Matrix;

constexpr Index kTokens = 13, kIn = 67, kOut = 31, kExperts = 5, kRouterWidth = 11;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

template <class T>
test::TopKMixture<T> top_k_mixture(Index width, bool bank_bias) {
  return {mole::TopKRouter<T>({.width = width, .experts = kExperts, .k = 2, .bias = true}),
          test::make_bank<T>(kIn, kOut, kExperts, bank_bias)};
}

template <class T>
test::DenseMixture<T> dense_mixture(bool bank_bias) {
  return {mole::DenseRouter<T>({.width = kIn, .experts = kExperts}),
          test::make_bank<T>(kIn, kOut, kExperts, bank_bias)};
}

test::reference::Row top_k_gates(const test::reference::Row& logits) {
  const test::reference::TopK router;
  return router.gates(logits, router.select(logits));
}

/// y of the layer, with a tape and without, against the loops.
template <class Layer>
void check_values(const Layer& layer, const test::Gates& gates, bool separate_router_input) {
  using T = typename Layer::Scalar;
  LayerCase<Layer> c(layer, kTokens);
  const auto x = test::normal_matrix<T>(kTokens, kIn, 1);
  const auto router_x = test::normal_matrix<T>(kTokens, layer.router().input_width(), 2);
  const auto y0 = test::normal_matrix<T>(kTokens, kOut, 3);
  mole::LayerInput<T> input(x);
  if (separate_router_input) input.router_x = router_x;

  const Matrix<double> gate = test::reference_gates<T>(c.params.router, input.tokens().x, gates);
  const test::ReferenceCall call =
      test::reference_call(layer.experts(), c.params.experts, test::widened<T>(x.view()), gate,
                           test::widened<T>(y0.view()));
  const Matrix<T> y = c.infer(input, y0);
  CHECK(test::difference(y, reference_bank(call).y, reference_bank(magnitudes(call)).y,
                         test::rounding_units<T>(kIn)) == "");
  CHECK(test::bit_difference(c.record(input, y0), y) == "");
  CHECK(y.padding_is_intact());
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

TEMPLATE_TEST_CASE("a mixture adds the gated experts to y, as the plain loops do", "[layers]",
                   float, double) {
  using T = TestType;
  for (const bool bias : {false, true}) {
    INFO("expert bias " << bias);
    check_values(top_k_mixture<T>(kIn, bias), top_k_gates, false);
    check_values(dense_mixture<T>(bias), test::reference::softmax, false);
  }
}

TEMPLATE_TEST_CASE("the router may read something else than the experts", "[layers]", float,
                   double) {
  check_values(top_k_mixture<TestType>(kRouterWidth, false), top_k_gates, true);
}

TEST_CASE("a mixture without tokens does nothing", "[layers]") {
  LayerCase c(top_k_mixture<float>(kIn, true), kTokens);
  const Matrix<float> nothing(0, kIn), y0(0, kOut);
  const mole::LayerInput<float> input(nothing);
  CHECK(c.record(input, y0).rows() == 0);
  c.backward(input, y0, {});
  CHECK(mole::params::norm(c.grad) == 0);
}

TEST_CASE("router and bank must agree on the number of experts", "[layers]") {
  const mole::TopKRouter<float> router({.width = kIn, .experts = 4});
  CHECK_THROWS_WITH((test::TopKMixture<float>{router, test::make_bank<float>(kIn, kOut, 5)}),
                    "Mixture: the router has 4 experts, the bank has 5");
}

TEST_CASE("NaN and infinity in an expert that a token has not selected stay out of y", "[layers]") {
  LayerCase c(top_k_mixture<double>(kIn, true), kTokens);
  const auto x = test::normal_matrix<double>(kTokens, kIn, 1);
  const auto y0 = test::normal_matrix<double>(kTokens, kOut, 3);
  const Matrix<double> healthy = c.infer(x, y0);
  c.record(x, y0);
  std::vector<bool> selected(kTokens);
  const auto routing = c.tape.routing.view();
  constexpr Index kPoisoned = 2;
  for (Index s = routing.lists.expert_begin[kPoisoned]; s < routing.lists.active_end[kPoisoned];
       ++s) {
    selected[routing.lists.token_of[s]] = true;
  }
  const auto poison = [](MatView<double> view) {
    for (Index i = 0; i < view.size(); ++i) view.data[i] = i % 2 == 0 ? kNan : INFINITY;
  };
  poison(c.params.experts.down_of(kPoisoned));
  poison(c.params.experts.up_of(kPoisoned));
  poison(c.params.experts.bias_of(kPoisoned));
  c.prepare();

  const Matrix<double> y = c.infer(x, y0), y_recorded = c.record(x, y0);
  Index clean = 0;
  for (Index t = 0; t < kTokens; ++t) {
    INFO("token " << t);
    if (selected[t]) {
      CHECK(std::isnan(y(t, 0)));
      continue;
    }
    ++clean;
    CHECK(test::bit_difference(y.view().row(t), healthy.view().row(t)) == "");
    CHECK(test::bit_difference(y_recorded.view().row(t), healthy.view().row(t)) == "");
  }
  CHECK(clean > 3);
  CHECK(clean < kTokens);
}

TEST_CASE("an expert that the caller forbids does not reach y, on the dense path either",
          "[layers]") {
  LayerCase c(dense_mixture<float>(false), kTokens);
  const auto x = test::normal_matrix<float>(kTokens, kIn, 1);
  const auto y0 = test::normal_matrix<float>(kTokens, kOut, 3);
  const std::uint8_t forbidden[kExperts] = {0, 0, 1, 0, 0};
  mole::LayerInput<float> input(x);
  input.overrides.forbidden = {forbidden, 1, kExperts};
  const Matrix<float> healthy = c.infer(input, y0);
  const MatView<float> down = c.params.experts.down_of(2);
  for (Index i = 0; i < down.size(); ++i) down.data[i] = static_cast<float>(kNan);
  c.prepare();
  CHECK(test::bit_difference(c.infer(input, y0), healthy) == "");
  CHECK(std::isnan(c.infer(x, y0)(0, 0)));
}

TEST_CASE("gates that the caller gives carry gradients back to the caller", "[layers]") {
  using Layer = mole::Mixture<mole::GivenRouter<double>, mole::LoraBank<double>>;
  const mole::GivenRouter<double> router({.width = kIn, .experts = kExperts});
  LayerCase c(Layer{router, test::make_bank<double>(kIn, kOut, kExperts, true)}, kTokens);
  const auto x = test::normal_matrix<double>(kTokens, kIn, 1);
  const auto dy = test::normal_matrix<double>(kTokens, kOut, 4);
  auto gates = test::normal_matrix<double>(kTokens, kExperts, 5);
  const Matrix<double> y0(kTokens, kOut);
  mole::LayerInput<double> input(x);
  input.overrides.gates = gates;
  c.record(input, y0);
  c.backward(input, dy, {});
  const auto loss = [&] { return test::weighted_sum(dy, c.infer(input, y0)); };
  CHECK(test::gradient_error(gates, c.d_tape.prob, loss) == "");
}

TEST_CASE("a mixture that refuses a call leaves y alone", "[layers]") {
  LayerCase c(top_k_mixture<double>(kIn, false), kTokens);
  const auto x = test::normal_matrix<double>(kTokens, kIn, 1);
  const auto narrow = test::normal_matrix<double>(kTokens, kIn - 1, 1);
  const auto tall = test::normal_matrix<double>(kTokens + 1, kIn, 1);
  Matrix<double> y = test::normal_matrix<double>(kTokens, kOut, 3);
  Matrix<double> narrow_y(kTokens, kOut - 1), tall_y(kTokens + 1, kOut);
  const Matrix<double> before = y;
  const auto forward = [&](const mole::LayerInput<double>& input, MatView<double> to, bool record) {
    return code_of(
        [&] { c.layer.forward(c.prepared, input, to, record ? &c.tape : nullptr, c.context); });
  };
  for (const bool record : {false, true}) {
    INFO("with a tape " << record);
    CHECK(forward(x, narrow_y, record) == Errc::shape_mismatch);
    CHECK(forward(x, tall_y, record) == Errc::shape_mismatch);
    CHECK(forward(narrow, y, record) == Errc::shape_mismatch);
    mole::LayerInput<double> input(x);
    input.dropout = narrow;
    CHECK(forward(input, y, record) == Errc::shape_mismatch);
    input = mole::LayerInput<double>(x);
    input.router_x = narrow;
    CHECK(forward(input, y, record) == Errc::shape_mismatch);
  }
  CHECK(forward(tall, tall_y, true) == Errc::limit_exceeded);
  CHECK(test::bit_difference(y, before) == "");
  CHECK(test::bit_difference(tall_y, Matrix<double>(kTokens + 1, kOut)) == "");
}

TEST_CASE("a mixture with too little scratch says so and leaves y alone", "[layers]") {
  LayerCase c(top_k_mixture<double>(kIn, false), kTokens);
  const auto x = test::normal_matrix<double>(kTokens, kIn, 1);
  Matrix<double> y = test::normal_matrix<double>(kTokens, kOut, 3);
  const Matrix<double> before = y;
  mole::LayerInput<double> input(x);
  input.dropout = x;
  const std::size_t enough = c.layer.scratch_bytes(kTokens, 1);
  mole::Buffer block(enough);
  int refused = 0;
  for (std::size_t bytes = 0; bytes <= enough; bytes += 512) {
    mole::Workspace scratch(block.span().first(bytes));
    const std::size_t free = scratch.free_bytes();
    const mole::Context context{.scratch = scratch};
    const Errc code = code_of([&] { c.layer.forward(c.prepared, input, y, nullptr, context); });
    if (code == Errc{}) break;
    CHECK(code == Errc::out_of_memory);
    REQUIRE(test::bit_difference(y, before) == "");
    CHECK(scratch.free_bytes() == free);
    ++refused;
  }
  CHECK(refused > 10);
}

TEST_CASE("backward with dropout refuses factors and gradients of another shape", "[layers]") {
  LayerCase c(top_k_mixture<double>(kIn, false), kTokens);
  const auto x = test::normal_matrix<double>(kTokens, kIn, 1);
  const auto dy = test::normal_matrix<double>(kTokens, kOut, 2);
  mole::LayerInput<double> input(x);
  input.router_x = x;
  input.dropout = x;
  c.record(input, Matrix<double>(kTokens, kOut));
  Matrix<double> small(2, 2), dx(kTokens, kIn);
  const auto backward = [&](MatView<const double> factor, MatView<double> to) {
    input.dropout = factor;
    return code_of([&] { c.backward(input, dy, {.x = to}); });
  };
  CHECK(backward(x, small) == Errc::shape_mismatch);
  CHECK(backward(small, dx) == Errc::shape_mismatch);
  CHECK(mole::params::norm(c.grad) == 0);
  CHECK(backward(x, dx) == Errc{});
}
