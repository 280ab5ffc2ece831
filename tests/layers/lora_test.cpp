// SPDX-License-Identifier: Apache-2.0
#include "mole/layers/lora.hpp"

#include <cmath>
#include <vector>

#include "layers/layer_case.hpp"
#include "mole/algebra/merge.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"

namespace {

using mole::Index;
using mole::MatView;
using test::LayerCase;
using test::Matrix;

constexpr Index kTokens = 9, kIn = 67, kOut = 31;

template <class T>
mole::Lora<T> make_lora(std::vector<Index> rank, std::vector<T> scale, bool bias = false) {
  return mole::Lora<T>(
      {.in = kIn, .out = kOut, .rank = std::move(rank), .scale = std::move(scale), .bias = bias});
}

/// Gates of the adapters that are in use.
Matrix<double> gates(const std::vector<double>& per_adapter) {
  return Matrix<double>(kTokens, static_cast<Index>(per_adapter.size()),
                        [&](Index, Index e) { return per_adapter[e]; });
}

template <class T>
void check_values(LayerCase<mole::Lora<T>>& c, const mole::LayerInput<T>& input,
                  const Matrix<double>& gate) {
  const auto y0 = test::normal_matrix<T>(kTokens, kOut, 3);
  const test::ReferenceCall call =
      test::reference_call(c.layer.experts(), c.params.experts, test::widened<T>(input.x), gate,
                           test::widened<T>(y0.view()));
  const Matrix<T> y = c.infer(input, y0);
  CHECK(test::difference(y, reference_bank(call).y, reference_bank(magnitudes(call)).y,
                         test::rounding_units<T>(kIn)) == "");
  CHECK(test::bit_difference(c.record(input, y0), y) == "");
}

}  // namespace

TEST_CASE("lora_scale is alpha / r, and alpha / sqrt(r) for rsLoRA", "[layers]") {
  CHECK(mole::lora_scale(16, 8) == 2);
  CHECK(mole::lora_scale(-6, 4) == -1.5);
  CHECK(mole::lora_scale(12.5, 4, true) == 6.25);
  CHECK(mole::lora_scale(16, 8, true) == 16 / std::sqrt(8.0));
  CHECK_THROWS_WITH(mole::lora_scale(16, 0), "lora_scale: rank must be at least 1, got 0");
  CHECK_THROWS_WITH(mole::lora_scale(INFINITY, 1), "lora_scale: alpha must be finite, got inf");
}

TEMPLATE_TEST_CASE("one LoRA and several that are all active", "[layers]", float, double) {
  using T = TestType;
  const auto x = test::normal_matrix<T>(kTokens, kIn, 1);
  for (const bool bias : {false, true}) {
    LayerCase<mole::Lora<T>> one(make_lora<T>({4}, {T(2)}, bias), kTokens);
    check_values<T>(one, x, gates({1}));
    LayerCase<mole::Lora<T>> three(make_lora<T>({4, 0, 7}, {T(2), T(1), T(-0.5)}, bias), kTokens);
    check_values<T>(three, x, gates({1, 1, 1}));
  }
}

TEST_CASE("adapters can be forbidden for all tokens, for some, and forced", "[layers]") {
  LayerCase c(make_lora<double>({4, 2, 7}, {2, 1, -0.5}, true), kTokens);
  const auto x = test::normal_matrix<double>(kTokens, kIn, 1);
  mole::LayerInput<double> input(x);
  SECTION("one for all tokens") {
    const std::uint8_t forbidden[] = {0, 1, 0};
    input.overrides.forbidden = {forbidden, 1, 3};
    check_values(c, input, gates({1, 0, 1}));
    CHECK(c.tape.routing.view().slots() == 2 * kTokens);
  }
  SECTION("another set for every token") {
    std::vector<std::uint8_t> forbidden(kTokens * 3);
    Matrix<double> gate = gates({1, 1, 1});
    for (Index i = 0; i < kTokens * 3; ++i) {
      forbidden[i] = i % 5 < 2;
      if (forbidden[i] != 0) gate(i / 3, i % 3) = 0;
    }
    input.overrides.forbidden = {forbidden.data(), kTokens, 3};
    check_values(c, input, gate);
  }
  SECTION("one adapter a token, as in a batch for many users") {
    const std::int32_t forced[kTokens] = {0, 2, -1, 1, 1, 0, -1, 2, 0};
    Matrix<double> gate = gates({1, 1, 1});
    for (Index t = 0; t < kTokens; ++t) {
      for (Index e = 0; e < 3; ++e) gate(t, e) = forced[t] == -1 || forced[t] == e ? 1 : 0;
    }
    input.overrides.forced = forced;
    check_values(c, input, gate);
  }
  SECTION("overrides of another shape") {
    const std::uint8_t forbidden[] = {0, 1, 0, 0};
    input.overrides.forbidden = {forbidden, 1, 4};
    const Matrix<double> y0(kTokens, kOut);
    CHECK_THROWS_WITH(c.infer(input, y0), "overrides.forbidden: expected [1, 3], got [1, 4]");
  }
}

TEST_CASE("the gradients of several LoRAs agree with finite differences", "[layers]") {
  LayerCase c(make_lora<double>({2, 0, 3}, {2, 1, -0.5}, true), kTokens);
  auto x = test::normal_matrix<double>(kTokens, kIn, 1);
  const auto dy = test::normal_matrix<double>(kTokens, kOut, 2);
  const std::int32_t forced[kTokens] = {0, 2, -1, 1, 1, 0, -1, 2, 0};
  mole::LayerInput<double> input(x);
  input.overrides.forced = forced;
  const auto loss = [&] {
    c.prepare();
    return test::weighted_sum(dy, c.record(input, Matrix<double>(kTokens, kOut)));
  };
  loss();
  Matrix<double> dx(kTokens, kIn);
  c.backward(input, dy, {.x = dx});
  mole::Lora<double>::Params<double>::visit(
      [&](const mole::Leaf& leaf, const auto& value, const auto& gradient) {
        INFO(leaf.path());
        CHECK(test::gradient_error(value, gradient, loss) == "");
      },
      c.params, c.grad);
  CHECK(test::gradient_error(x, dx, loss) == "");
}

TEST_CASE("a merged weight gives what the adapters gave", "[layers]") {
  using Layer = mole::AdaptedLinear<mole::Lora<double>>;
  const std::vector<double> scale = {2, -0.5};
  LayerCase c(Layer(make_lora<double>({4, 7}, scale)), kTokens);
  LayerCase merged(Layer(make_lora<double>({0}, {1})), kTokens);
  mole::params::zip([](const double& from, double& to) { to = from; },
                    mole::LinearParams<double>{c.params.weight, c.params.bias},
                    mole::LinearParams<double>{merged.params.weight, merged.params.bias});
  const auto& experts = c.params.mixture.experts;
  for (Index e = 0; e < 2; ++e) {
    mole::merge_lora(experts.down_of(e), experts.up_of(e), scale[e], merged.params.weight);
  }
  merged.prepare();
  const auto x = test::normal_matrix<double>(kTokens, kIn, 1);
  const Matrix<double> y0(kTokens, kOut);
  CHECK(test::difference(merged.infer(x, y0), c.infer(x, y0), test::Close{1e-12, 1e-12}) == "");
}
