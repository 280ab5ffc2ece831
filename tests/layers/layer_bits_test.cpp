// SPDX-License-Identifier: Apache-2.0
// The promise of the layers: a token has the same bits whatever the batch, its place in it, the
// workers, the instruction set, the path and the tape.
#include <numeric>
#include <string>

#include "layers/layer_case.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/thread_pool.hpp"

namespace {

using mole::Index;
using mole::MatView;
using test::LayerCase;
using test::Matrix;

constexpr Index kTokens = 65, kIn = 67, kOut = 131, kExperts = 6;

template <class T>
auto top_k_layer() {
  const mole::TopKRouter<T> router({.width = kIn, .experts = kExperts, .k = 2, .bias = true});
  return mole::AdaptedLinear{test::TopKMixture<T>{router, test::make_bank<T>(kIn, kOut, kExperts)}};
}

template <class T>
auto biased_layer() {
  const mole::TopKRouter<T> router(
      {.width = kIn, .experts = kExperts, .k = 3, .score = mole::Score::sigmoid, .probes = true});
  return mole::AdaptedLinear{
      test::TopKMixture<T>{router, test::make_bank<T>(kIn, kOut, kExperts, true)},
      {.fan_in_fan_out = true}};
}

template <class T>
auto dense_layer() {
  const mole::DenseRouter<T> router({.width = kIn, .experts = kExperts});
  return mole::AdaptedLinear{
      test::DenseMixture<T>{router, test::make_bank<T>(kIn, kOut, kExperts)}};
}

template <class Layer>
LayerCase<Layer> make_case(Layer layer, bool fan_in_fan_out = false) {
  return LayerCase<Layer>(std::move(layer), kTokens, 7, fan_in_fan_out);
}

/// Calls check(case) for each kind of layer in both precisions.
template <class Check>
void for_every_layer(Check&& check) {
  const auto of_type = [&](auto zero) {
    using T = decltype(zero);
    INFO("bytes of the scalar: " << sizeof(T));
    check("top_k", make_case(top_k_layer<T>()));
    check("probes, bias, fan_in_fan_out", make_case(biased_layer<T>(), true));
    check("dense", make_case(dense_layer<T>()));
  };
  of_type(0.0f);
  of_type(0.0);
}

template <class T>
Matrix<T> input() {
  return test::normal_matrix<T>(kTokens, kIn, 1);
}

/// Everything that one forward and backward with a balance loss write.
template <class Layer>
struct Result {
  using T = typename Layer::Scalar;
  Matrix<T> y{kTokens, kOut}, dx{kTokens, kIn};
  std::vector<T> gates, rest;  // rest: gradients of logits and parameters

  explicit Result(LayerCase<Layer>& c) {
    const Matrix<T> x = input<T>(), dy = test::normal_matrix<T>(kTokens, kOut, 2);
    y = c.record(x, y);
    const auto routing = c.tape.routing.view();
    gates.assign(routing.gate.begin(), routing.gate.end());
    mole::params::zero(c.d_tape);
    mole::balance_loss<T>({}, routing, c.tape.router.prob, c.d_tape.prob, c.context);
    c.backward(x, dy, {.x = dx});
    const auto collect = [&](const T& value) { rest.push_back(value); };
    mole::params::zip(collect, c.d_tape);
    mole::params::zip(collect, c.grad);
  }

  std::string difference(const Result& other) const {
    std::string text = test::bit_difference(y, other.y);
    if (text.empty()) text = test::bit_difference(dx, other.dx);
    if (text.empty()) text = test::bit_difference(gates, other.gates);
    if (text.empty()) text = test::bit_difference(rest, other.rest);
    return text;
  }
};

/// Runs check(layer case) once as it is and once more after `change(context)`.
template <class Change>
void check_unchanged_by(Change&& change) {
  for_every_layer([&](const char* name, auto c) {
    INFO(name);
    const Result expected(c);
    const Matrix<typename decltype(c)::T> y0(kTokens, kOut);
    change(c.context);
    CHECK(Result(c).difference(expected) == "");
    CHECK(test::bit_difference(c.infer(input<typename decltype(c)::T>(), y0), expected.y) == "");
  });
}

}  // namespace

TEST_CASE("a token has the bits it has alone, in a batch of any size", "[layers][bits]") {
  for_every_layer([](const char* name, auto c) {
    using T = typename decltype(c)::T;
    INFO(name);
    const Matrix<T> x = input<T>();
    Matrix<T> alone(kTokens, kOut);
    for (Index t = 0; t < kTokens; ++t) {
      c.layer.forward(c.prepared, x.view().row_block(t, 1), alone.view().row_block(t, 1), nullptr,
                      c.context);
    }
    for (Index count = 1; count <= kTokens; ++count) {
      INFO(count << " tokens");
      Matrix<T> y(count, kOut);
      c.layer.forward(c.prepared, x.view().row_block(0, count), y, nullptr, c.context);
      CHECK(test::bit_difference(y, alone.view().row_block(0, count)) == "");
    }
  });
}

TEST_CASE("the gradients of x and of the gates do not depend on the batch", "[layers][bits]") {
  for_every_layer([](const char* name, auto c) {
    using T = typename decltype(c)::T;
    INFO(name);
    const Matrix<T> x = input<T>(), dy = test::normal_matrix<T>(kTokens, kOut, 2);
    Matrix<T> dx(kTokens, kIn), y(kTokens, kOut);
    y = c.record(x, y);
    c.backward(x, dy, {.x = dx});
    const Matrix<T> dlogits(kTokens, kExperts,
                            [&](Index t, Index e) { return c.d_tape.logits(t, e); });
    Matrix<T> alone(kTokens, kIn), dlogits_alone(kTokens, kExperts);
    for (Index t = 0; t < kTokens; ++t) {
      const MatView<const T> token = x.view().row_block(t, 1);
      c.layer.forward(c.prepared, token, y.view().row_block(t, 1), &c.tape, c.context);
      mole::params::zero(c.d_tape);
      c.backward(token, dy.view().row_block(t, 1), {.x = alone.view().row_block(t, 1)});
      std::ranges::copy(c.d_tape.logits.row(0), dlogits_alone.view().row(t).begin());
    }
    CHECK(test::bit_difference(alone, dx) == "");
    CHECK(test::bit_difference(dlogits_alone, dlogits) == "");
  });
}

TEST_CASE("a token keeps its bits when the rows are shuffled", "[layers][bits]") {
  for_every_layer([](const char* name, auto c) {
    using T = typename decltype(c)::T;
    INFO(name);
    const Matrix<T> x = input<T>(), y0(kTokens, kOut);
    const Matrix<T> y = c.infer(x, y0);
    const auto moved = [](Index t) { return t * 27 % kTokens; };  // 27 and 65 have no common factor
    const Matrix<T> shuffled(kTokens, kIn, [&](Index t, Index i) { return x(moved(t), i); });
    const Matrix<T> expected(kTokens, kOut, [&](Index t, Index n) { return y(moved(t), n); });
    CHECK(test::bit_difference(c.infer(shuffled, y0), expected) == "");
  });
}

TEST_CASE("forward with a tape has the bits of forward without", "[layers][bits]") {
  check_unchanged_by([](mole::Context&) {});
}

TEST_CASE("a loop that runs backwards changes no bit", "[layers][bits]") {
  check_unchanged_by([](mole::Context& context) { context.hook = mole::reversed_loop; });
}

TEST_CASE("every instruction set gives the same bits", "[layers][bits]") {
  for (const mole::Isa isa : {mole::Isa::portable, mole::Isa::avx2, mole::Isa::avx512}) {
    if (!mole::isa_available(isa)) continue;
    INFO("instruction set " << static_cast<int>(isa));
    check_unchanged_by([&](mole::Context& context) { context.isa = isa; });
  }
}

TEST_CASE("the sparse path has the bits of the dense path", "[layers][bits]") {
  using T = float;
  auto c = make_case(dense_layer<T>());
  auto config = c.layer.mixture().experts().config();
  config.path = mole::BankPath::sparse;
  auto sparse = make_case(mole::AdaptedLinear{
      test::DenseMixture<T>{c.layer.router(), mole::LoraBank<T>(std::move(config))}});
  const Matrix<T> y0(kTokens, kOut);
  CHECK(test::bit_difference(sparse.infer(input<T>(), y0), c.infer(input<T>(), y0)) == "");
}

TEST_CASE("the number of workers of a host's pool changes no bit", "[layers][bits][threads]") {
  for (const int workers : {1, 2, 3, 7}) {
    INFO(workers << " workers");
    ThreadPool pool(workers);
    check_unchanged_by([&](mole::Context& context) {
      context.workers = workers;
      context.hook = &ThreadPool::run;
      context.pool = &pool;
    });
  }
}

TEST_CASE("the number of workers of the built-in loop changes no bit", "[layers][bits]") {
  for (const int workers : {1, 2, 3, 7}) {
    INFO(workers << " workers");
    check_unchanged_by([&](mole::Context& context) { context.workers = workers; });
  }
}
