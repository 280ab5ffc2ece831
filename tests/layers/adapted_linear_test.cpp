// SPDX-License-Identifier: Apache-2.0
#include "mole/layers/adapted_linear.hpp"

#include <algorithm>
#include <functional>
#include <string>

#include "layers/layer_case.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/gradcheck.hpp"

namespace {

using mole::Errc;
using mole::Index;
using mole::Leaf;
using mole::MatView;
using test::LayerCase;
using test::Matrix;

template <class T>
using Layer = mole::AdaptedLinear<test::TopKMixture<T>>;
using DenseLayer = mole::AdaptedLinear<test::DenseMixture<double>>;

template <class T>
Layer<T> make_layer(const typename mole::TopKRouter<T>::Config& router, Index in, Index out,
                    bool bank_bias, bool fan_in_fan_out) {
  return Layer<T>{
      {mole::TopKRouter<T>(router), test::make_bank<T>(in, out, router.experts, bank_bias)},
      {.fan_in_fan_out = fan_in_fan_out}};
}

/// Values of a layer with a top-k router against the plain loops.
template <class T>
void check_values(bool fan_in_fan_out, bool base_bias) {
  constexpr Index kTokens = 13, kIn = 67, kOut = 131;
  LayerCase c(make_layer<T>({.width = kIn, .experts = 5}, kIn, kOut, true, fan_in_fan_out), kTokens,
              1, fan_in_fan_out);
  if (!base_bias) c.params.bias = {};
  c.prepare();
  const auto x = test::normal_matrix<T>(kTokens, kIn, 1);
  const Matrix<T> garbage(kTokens, kOut, [](Index, Index) { return std::nan(""); });
  const Matrix<double> wide_x = test::widened<T>(x.view());
  const auto gates = [](const test::reference::Row& logits) {
    const test::reference::TopK router;
    return router.gates(logits, router.select(logits));
  };
  const Matrix<double> gate = test::reference_gates<T>(c.params.mixture.router, x.view(), gates);
  const auto weight = test::widened<T>(c.params.weight), bias = test::widened<T>(c.params.bias);
  const auto call = [&](const Matrix<double>& base) {
    return test::reference_call(c.layer.mixture().experts(), c.params.mixture.experts, wide_x, gate,
                                base);
  };
  const auto want =
      reference_bank(call(test::reference_base(weight, fan_in_fan_out, bias, wide_x)));
  const auto size = reference_bank(magnitudes(call(
      test::reference_base(absolute(weight), fan_in_fan_out, absolute(bias), absolute(wide_x)))));
  const Matrix<T> y = c.infer(x, garbage);
  CHECK(test::difference(y, want.y, size.y, test::rounding_units<T>(kIn)) == "");
  CHECK(test::bit_difference(c.record(x, garbage), y) == "");
  CHECK(y.padding_is_intact());
}

/// What one finite-difference check switches on.
struct Variant {
  std::string name;
  mole::TopKRouter<double>::Config router;
  bool fan_in_fan_out = false, dropout = false, router_input = false, overrides = false,
       selection_bias = false;
};

constexpr Index kTokens = 7, kIn = 6, kOut = 5, kExperts = 4;

/// Every gradient of a layer and of a balance loss that reads the router's scores.
template <class L>
class GradientCheck {
 public:
  GradientCheck(L layer, const Variant& v)
      : c_(std::move(layer), kTokens + 2, 1, v.fan_in_fan_out),
        x_(test::normal_matrix<double>(kTokens, kIn, 1)),
        router_x_(test::normal_matrix<double>(kTokens, c_.layer.router().input_width(), 2)),
        dy_(test::normal_matrix<double>(kTokens, kOut, 3)),
        factor_(kTokens, kIn),
        logit_bias_(test::normal_matrix<double>(kTokens, kExperts, 4)),
        input_(x_) {
    mole::fill_dropout(0.3, mole::Random(5), factor_.view());
    if (v.dropout) input_.dropout = factor_;
    if (v.router_input) input_.router_x = router_x_;
    if (v.overrides) {
      input_.overrides.logit_bias = logit_bias_;
      input_.overrides.forbidden = {kForbidden, 1, kExperts};
    }
    if constexpr (requires { buffers_.selection_bias; }) {
      if (v.selection_bias) buffers_.selection_bias = kSelectionBias;
    }
  }

  void operator()() {
    loss();
    mole::balance_loss(balance(), c_.tape.routing.view(), prob(c_.tape), prob(c_.d_tape),
                       c_.context);
    Matrix<double> dx(kTokens, kIn), d_router_x(kTokens, c_.layer.router().input_width());
    const bool separate = input_.router_x.data != nullptr;
    c_.backward(input_, dy_, {dx, separate ? d_router_x.view() : MatView<double>()}, buffers_);

    const auto again = [this] { return loss(); };
    LayerCase<L>::Params::visit(
        [&](const Leaf& leaf, const auto& value, const auto& gradient) {
          INFO(leaf.path());
          CHECK(test::gradient_error(value, gradient, again) == "");
        },
        c_.params, c_.grad);
    INFO("x");
    CHECK(test::gradient_error(x_, dx, again) == "");
    if (separate) CHECK(test::gradient_error(router_x_, d_router_x, again) == "");
  }

 private:
  static constexpr std::uint8_t kForbidden[kExperts] = {0, 1, 0, 0};
  static constexpr double kSelectionBias[kExperts] = {0.3, 0, -0.2, 0.1};

  static mole::BalanceLoss<double> balance() { return {.weight = 3}; }
  static MatView<double> prob(const auto& tape) {
    if constexpr (requires { tape.router; }) {
      return tape.router.prob.row_block(0, kTokens);
    } else {
      return tape.prob.row_block(0, kTokens);
    }
  }

  double loss() {
    c_.prepare();
    const Matrix<double> y = c_.record(input_, Matrix<double>(kTokens, kOut), buffers_);
    return test::weighted_sum(dy_, y) +
           mole::balance_loss(balance(), c_.tape.routing.view(), prob(c_.tape), {}, c_.context);
  }

  LayerCase<L> c_;
  Matrix<double> x_, router_x_, dy_, factor_, logit_bias_;
  mole::LayerInput<double> input_;
  typename L::Buffers buffers_;
};

Errc code_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const mole::Error& error) {
    return error.code();
  }
  return Errc{};
}

}  // namespace

TEMPLATE_TEST_CASE("an adapted linear map overwrites y with x W' + b + mixture", "[layers]", float,
                   double) {
  for (const bool fan_in_fan_out : {false, true}) {
    for (const bool base_bias : {false, true}) {
      INFO("fan_in_fan_out " << fan_in_fan_out << ", bias " << base_bias);
      check_values<TestType>(fan_in_fan_out, base_bias);
    }
  }
}

TEST_CASE("both orientations of the base weight give the same bits", "[layers]") {
  const mole::TopKRouter<float>::Config router{.width = 67, .experts = 3};
  LayerCase straight(make_layer<float>(router, 67, 131, false, false), 5);
  LayerCase turned(make_layer<float>(router, 67, 131, false, true), 5, 1, true);
  mole::params::copy(straight.params.mixture, turned.params.mixture);
  std::ranges::copy(straight.params.bias.row(0), turned.params.bias.data);
  for (Index o = 0; o < 131; ++o) {
    for (Index i = 0; i < 67; ++i) turned.params.weight(i, o) = straight.params.weight(o, i);
  }
  turned.prepare();
  const auto x = test::normal_matrix<float>(5, 67, 1), dy = test::normal_matrix<float>(5, 131, 2);
  const Matrix<float> y(5, 131);
  CHECK(test::bit_difference(turned.record(x, y), straight.record(x, y)) == "");
  Matrix<float> dx(5, 67), turned_dx(5, 67);
  straight.backward(x, dy, {.x = dx});
  turned.backward(x, dy, {.x = turned_dx});
  CHECK(test::bit_difference(turned_dx, dx) == "");
  const Matrix<float> dweight(131, 67, [&](Index o, Index i) { return turned.grad.weight(i, o); });
  CHECK(test::bit_difference(dweight, straight.grad.weight) == "");
}

TEST_CASE("backward of the whole layer agrees with finite differences", "[layers]") {
  using Router = mole::TopKRouter<double>;
  using mole::Score;
  const Router::Config plain{.width = kIn, .experts = kExperts, .bias = true};
  const auto with = [&](auto&& change) {
    Router::Config config = plain;
    change(config);
    return config;
  };
  const Variant variants[] = {
      {.name = "softmax, renormalised", .router = plain},
      {.name = "softmax over the selection",
       .router = with([](auto& r) { r.order = Router::Order::topk_then_score; }),
       .fan_in_fan_out = true},
      {.name = "softmax, temperature, own input, dropout",
       .router = with([](auto& r) { r.width = 3, r.renormalise = false, r.temperature = 0.7; }),
       .dropout = true,
       .router_input = true},
      {.name = "sigmoid, epsilon, scale, selection bias",
       .router =
           with([](auto& r) { r.score = Score::sigmoid, r.renorm_epsilon = 0.1, r.scale = 2; }),
       .selection_bias = true},
      {.name = "sqrt_softplus, overrides",
       .router = with([](auto& r) { r.score = Score::sqrt_softplus, r.k = 3; }),
       .dropout = true,
       .overrides = true},
      {.name = "one expert, not renormalised",
       .router = with([](auto& r) { r.k = 1, r.renormalise = false; })},
  };
  for (const Variant& v : variants) {
    INFO(v.name);
    GradientCheck(make_layer<double>(v.router, kIn, kOut, true, v.fan_in_fan_out), v)();
  }
}

TEST_CASE("backward of a layer with a dense router agrees with finite differences", "[layers]") {
  const mole::DenseRouter<double> router(
      {.width = kIn, .experts = kExperts, .temperature = 1.4, .bias = true});
  for (const bool dropout : {false, true}) {
    const Variant v{.name = "dense", .router = {}, .dropout = dropout};
    GradientCheck(DenseLayer{test::DenseMixture<double>{
                      router, test::make_bank<double>(kIn, kOut, kExperts)}},
                  v)();
  }
}

TEST_CASE("what a gradient leaves empty is frozen, and the rest keeps its bits", "[layers]") {
  const mole::TopKRouter<double>::Config router{.width = kIn, .experts = kExperts, .bias = true};
  LayerCase all(make_layer<double>(router, kIn, kOut, true, false), kTokens);
  LayerCase some(make_layer<double>(router, kIn, kOut, true, false), kTokens);
  const auto x = test::normal_matrix<double>(kTokens, kIn, 1);
  const auto dy = test::normal_matrix<double>(kTokens, kOut, 2);
  const Matrix<double> y0(kTokens, kOut);
  all.record(x, y0);
  some.record(x, y0);
  Matrix<double> dx(kTokens, kIn);
  all.backward(x, dy, {.x = dx});

  SECTION("base, router and x") {
    const auto grad = some.grad;
    some.grad.weight = some.grad.bias = {};
    some.grad.mixture.router = {};
    some.layer.backward(some.weights(), some.tape, x, dy, some.d_tape, {}, some.grad, some.context);
    CHECK(test::bit_difference(grad.weight, Matrix<double>(kOut, kIn)) == "");
    CHECK(test::bit_difference(grad.bias, Matrix<double>(1, kOut)) == "");
    CHECK(mole::params::norm(grad.mixture.router) == 0);
    for (Index e = 0; e < kExperts; ++e) {
      INFO("expert " << e);
      const auto& got = grad.mixture.experts;
      const auto& want = all.grad.mixture.experts;
      CHECK(test::bit_difference(got.down_of(e), want.down_of(e)) == "");
      CHECK(test::bit_difference(got.up_of(e), want.up_of(e)) == "");
      CHECK(test::bit_difference(got.bias_of(e), want.bias_of(e)) == "");
    }
  }
  SECTION("the experts") {
    some.grad.mixture.experts = {};
    Matrix<double> some_dx(kTokens, kIn);
    some.layer.backward(some.weights(), some.tape, x, dy, some.d_tape, {.x = some_dx}, some.grad,
                        some.context);
    CHECK(test::bit_difference(some_dx, dx) == "");
    CHECK(test::bit_difference(some.grad.weight, all.grad.weight) == "");
    CHECK(test::bit_difference(some.grad.bias, all.grad.bias) == "");
    CHECK(test::bit_difference(some.grad.mixture.router.weight, all.grad.mixture.router.weight) ==
          "");
  }
}

TEST_CASE("gradients are added to what is there", "[layers]") {
  const mole::TopKRouter<double>::Config router{.width = kIn, .experts = kExperts, .bias = true};
  LayerCase c(make_layer<double>(router, kIn, kOut, true, false), kTokens);
  LayerCase from_seven(make_layer<double>(router, kIn, kOut, true, false), kTokens);
  const auto x = test::normal_matrix<double>(kTokens, kIn, 1);
  const auto dy = test::normal_matrix<double>(kTokens, kOut, 2);
  const Matrix<double> y0(kTokens, kOut);
  c.record(x, y0);
  from_seven.record(x, y0);
  Matrix<double> dx(kTokens, kIn), dx_from_seven(kTokens, kIn, [](Index, Index) { return 7; });
  c.backward(x, dy, {.x = dx});
  mole::params::zip([](double& g) { g = 7; }, from_seven.grad);
  from_seven.layer.backward(from_seven.weights(), from_seven.tape, x, dy, from_seven.d_tape,
                            {.x = dx_from_seven}, from_seven.grad, from_seven.context);
  double worst = 0;
  const auto compare = [&](double with, double without) {
    worst = std::max(worst, std::fabs(with - 7 - without));
  };
  mole::params::zip(compare, from_seven.grad, c.grad);
  for (Index t = 0; t < kTokens; ++t) {
    for (Index i = 0; i < kIn; ++i) compare(dx_from_seven(t, i), dx(t, i));
  }
  CHECK(worst < 1e-12);
  CHECK(mole::params::norm(c.grad) > 1);
}

TEST_CASE("an adapted linear map refuses weights and inputs of other shapes", "[layers]") {
  const mole::TopKRouter<double>::Config router{.width = kIn, .experts = kExperts};
  LayerCase c(make_layer<double>(router, kIn, kOut, false, false), kTokens);
  const auto x = test::normal_matrix<double>(kTokens, kIn, 1);
  const auto narrow = test::normal_matrix<double>(kTokens, kIn - 1, 1);
  auto weights = c.weights();
  mole::Buffer block(c.layer.prepared_bytes());
  mole::Workspace memory(block.span());
  weights.weight = narrow;
  CHECK_THROWS_WITH(c.layer.prepare(weights, memory), "weight: expected [5, 6], got [7, 5]");
  weights = c.weights();
  weights.bias = narrow.view().row_block(0, 1).col_block(0, 4);
  CHECK_THROWS_WITH(c.layer.prepare(weights, memory), "bias: expected [1, 5], got [1, 4]");
  const auto turned = make_layer<double>(router, kIn, kOut, false, true);
  CHECK_THROWS_WITH(turned.prepare(c.weights(), memory),
                    "weight (fan_in_fan_out): expected [6, 5], got [5, 6]");

  Matrix<double> y = test::normal_matrix<double>(kTokens, kOut, 2), low(kTokens - 1, kOut);
  const Matrix<double> before = y;
  const auto forward = [&](const mole::LayerInput<double>& input, MatView<double> to) {
    return code_of([&] { c.layer.forward(c.prepared, input, to, nullptr, c.context); });
  };
  CHECK(forward(narrow, y) == Errc::shape_mismatch);
  CHECK(forward(x, low) == Errc::shape_mismatch);
  CHECK(test::bit_difference(y, before) == "");
}

TEST_CASE("an adapted linear map that refuses a call has not begun to write", "[layers]") {
  const mole::TopKRouter<double>::Config router{.width = kIn, .experts = kExperts};
  LayerCase c(make_layer<double>(router, kIn, kOut, false, false), kTokens);
  const auto x = test::normal_matrix<double>(kTokens, kIn, 1);
  const auto narrow = test::normal_matrix<double>(kTokens, kIn - 1, 1);
  Matrix<double> y = test::normal_matrix<double>(kTokens, kOut, 2);
  const Matrix<double> before = y;
  mole::LayerInput<double> input(x);
  input.dropout = narrow;
  CHECK(code_of([&] { c.layer.forward(c.prepared, input, y, nullptr, c.context); }) ==
        Errc::shape_mismatch);
  CHECK(test::bit_difference(y, before) == "");

  input.dropout = x;
  const std::size_t enough = c.layer.scratch_bytes(kTokens, 1);
  mole::Buffer block(enough);
  int refused = 0;
  for (std::size_t bytes = 0; bytes <= enough; bytes += 64) {
    mole::Workspace scratch(block.span().first(bytes));
    const mole::Context context{.scratch = scratch};
    const Errc code = code_of([&] { c.layer.forward(c.prepared, input, y, nullptr, context); });
    if (code == Errc{}) break;
    CHECK(code == Errc::out_of_memory);
    REQUIRE(test::bit_difference(y, before) == "");
    ++refused;
  }
  CHECK(refused > 10);
  CHECK(test::bit_difference(y, before) != "");
}

TEST_CASE("backward refuses weights and gradients of other shapes", "[layers]") {
  const mole::TopKRouter<double>::Config router{.width = kIn, .experts = kExperts};
  LayerCase c(make_layer<double>(router, kIn, kOut, false, false), kTokens);
  const auto x = test::normal_matrix<double>(kTokens, kIn, 1);
  const auto dy = test::normal_matrix<double>(kTokens, kOut, 2);
  c.record(x, Matrix<double>(kTokens, kOut));
  const auto backward = [&](const auto& weights, const auto& grad, MatView<const double> from) {
    return code_of(
        [&] { c.layer.backward(weights, c.tape, x, from, c.d_tape, {}, grad, c.context); });
  };
  auto weights = c.weights();
  weights.weight.rows -= 1;
  CHECK(backward(weights, c.grad, dy) == Errc::shape_mismatch);
  auto grad = c.grad;
  grad.weight.cols -= 1;
  CHECK(backward(c.weights(), grad, dy) == Errc::shape_mismatch);
  grad = c.grad;
  grad.bias.cols -= 1;
  CHECK(backward(c.weights(), grad, dy) == Errc::shape_mismatch);
  CHECK(backward(c.weights(), c.grad, dy.view().col_block(0, kOut - 1)) == Errc::shape_mismatch);
  CHECK(mole::params::norm(c.grad) == 0);
  CHECK(backward(c.weights(), c.grad, dy) == Errc{});
}
