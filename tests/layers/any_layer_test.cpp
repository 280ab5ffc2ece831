// SPDX-License-Identifier: Apache-2.0
#include "mole/layers/any_layer.hpp"

#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "layers/layer_case.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"

namespace {

using mole::AnyLayer;
using mole::Index;
using mole::MatView;
using test::LayerCase;
using test::Matrix;

constexpr Index kTokens = 13, kIn = 67, kOut = 31, kExperts = 5;

/// y of an AnyLayer in memory of exactly the sizes that it names.
template <class T>
Matrix<T> run(const AnyLayer<T>& layer, const mole::LayerInput<T>& input, const Matrix<T>& y0) {
  mole::Buffer table_block(layer.table_bytes(input.x.rows));
  mole::Buffer scratch_block(layer.scratch_bytes(input.x.rows, 1));
  mole::Workspace table_memory(table_block.span()), scratch(scratch_block.span());
  mole::RoutingTable<T> table = layer.make_table(table_memory, input.x.rows);
  Matrix<T> y = y0;
  layer.forward(input, table, y, mole::Context{.scratch = scratch});
  CHECK(table.view().tokens == input.x.rows);
  return y;
}

template <class Layer>
void check_same_bits(const Layer& layer) {
  using T = typename Layer::Scalar;
  LayerCase<Layer> c(layer, kTokens);
  const auto x = test::normal_matrix<T>(kTokens, layer.input_width(), 1);
  const auto y0 = test::normal_matrix<T>(kTokens, layer.output_width(), 2);
  const std::uint8_t forbidden[kExperts] = {0, 1};
  mole::LayerInput<T> input(x);
  input.overrides.forbidden = {forbidden, 1, layer.router().experts()};
  const AnyLayer<T> any(layer, c.weights());
  CHECK(any.input_width() == layer.input_width());
  CHECK(any.output_width() == layer.output_width());
  CHECK(any.experts() == layer.router().experts());
  CHECK(test::bit_difference(run(any, input, y0), c.infer(input, y0)) == "");
}

template <class T>
test::TopKMixture<T> mixture() {
  return {mole::TopKRouter<T>({.width = kIn, .experts = kExperts}),
          test::make_bank<T>(kIn, kOut, kExperts, true)};
}

}  // namespace

TEMPLATE_TEST_CASE("AnyLayer has the bits of the layer inside", "[layers]", float, double) {
  using T = TestType;
  check_same_bits(mixture<T>());
  check_same_bits(mole::AdaptedLinear{mixture<T>()});
  check_same_bits(test::DenseMixture<T>{mole::DenseRouter<T>({.width = kIn, .experts = kExperts}),
                                        test::make_bank<T>(kIn, kOut, kExperts)});
  const mole::Lora<T> lora({.in = kIn, .out = kOut, .rank = {4, 2}, .scale = {T(2), T(1)}});
  check_same_bits(lora);
  check_same_bits(mole::AdaptedLinear{lora});
}

TEST_CASE("an AnyLayer keeps its own packed weights, and copies share them", "[layers]") {
  const auto x = test::normal_matrix<float>(kTokens, kIn, 1);
  const Matrix<float> y0(kTokens, kOut);
  Matrix<float> expected;
  std::optional<AnyLayer<float>> first;
  {
    LayerCase c(mixture<float>(), kTokens);
    expected = c.infer(x, y0);
    first.emplace(c.layer, c.weights());
    mole::params::zero(c.params);
  }
  const AnyLayer<float> copy = *first;
  CHECK(test::bit_difference(run<float>(*first, x, y0), expected) == "");
  first.reset();
  CHECK(test::bit_difference(run<float>(copy, x, y0), expected) == "");
}

TEST_CASE("an AnyLayer keeps the buffers of its router", "[layers]") {
  LayerCase c(mixture<double>(), kTokens);
  const double selection_bias[kExperts] = {0, 0, 0, 9, 9};
  const auto x = test::normal_matrix<double>(kTokens, kIn, 1);
  const Matrix<double> y0(kTokens, kOut);
  const AnyLayer<double> any(c.layer, c.weights(), {.selection_bias = selection_bias});
  const Matrix<double> expected = c.infer(x, y0, {.selection_bias = selection_bias});
  CHECK(test::bit_difference(run<double>(any, x, y0), expected) == "");
  CHECK(test::bit_difference(c.infer(x, y0), expected) != "");
}

TEST_CASE("layers of one scalar can be held side by side", "[layers]") {
  LayerCase adds(mixture<double>(), kTokens);
  LayerCase writes(mole::AdaptedLinear{mixture<double>()}, kTokens);
  const std::vector<AnyLayer<double>> layers = {{adds.layer, adds.weights()},
                                                {writes.layer, writes.weights()}};
  const auto x = test::normal_matrix<double>(kTokens, kIn, 1);
  const auto y0 = test::normal_matrix<double>(kTokens, kOut, 2);
  CHECK(test::bit_difference(run<double>(layers[0], x, y0), adds.infer(x, y0)) == "");
  CHECK(test::bit_difference(run<double>(layers[1], x, y0), writes.infer(x, y0)) == "");
  static_assert(!std::is_constructible_v<AnyLayer<float>, test::TopKMixture<double>,
                                         test::TopKMixture<double>::Weights>);
}

TEST_CASE("an AnyLayer refuses weights of another shape", "[layers]") {
  LayerCase c(mixture<double>(), kTokens);
  auto weights = c.weights();
  weights.experts.in = kIn + 1;
  CHECK_THROWS_AS((AnyLayer<double>{c.layer, weights}), mole::Error);
}
