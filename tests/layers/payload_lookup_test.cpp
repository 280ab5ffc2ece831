// SPDX-License-Identifier: Apache-2.0
// A bank of payloads that is looked up by key and adapted by a mixture.
#include "mole/layers/payload_lookup.hpp"

#include <algorithm>
#include <limits>
#include <vector>

#include "layers/layer_case.hpp"
#include "mole/losses/pull.hpp"
#include "support/alloc_counter.hpp"
#include "support/catch.hpp"

namespace {

using mole::Index;
using test::Matrix;

template <class T>
using Lookup = mole::PayloadLookup<test::DenseMixture<T>>;

constexpr Index kQueries = 5, kQueryWidth = 6, kEntries = 7, kTake = 2, kRows = 3, kWidth = 9,
                kExperts = 4;

template <class T>
Lookup<T> make_lookup(Index width = kWidth, bool bias = false) {
  return {mole::PrototypeRouter<T>({.width = kQueryWidth,
                                    .experts = kEntries,
                                    .k = kTake,
                                    .weight = mole::PrototypeWeight::unit}),
          {mole::DenseRouter<T>({.width = kQueryWidth, .experts = kExperts}),
           test::make_bank<T>(width, width, kExperts, bias)},
          kRows};
}

/// The layer with random parameters, and memory of exactly the size it asks for.
template <class T>
class Example {
 public:
  using Layer = Lookup<T>;
  using Params = typename Layer::template Params<T>;

  explicit Example(int workers = 1, bool bias = false)
      : layer(make_lookup<T>(kWidth, bias)),
        block_(std::size_t{1} << 20),
        memory_(block_.span()),
        prepared_block_(layer.prepared_bytes()),
        tape_block_(layer.tape_bytes(kQueries)),
        scratch_block_(layer.scratch_bytes(kQueries, workers)),
        prepared_memory_(prepared_block_.span()),
        tape_memory_(tape_block_.span()),
        scratch_(scratch_block_.span()),
        params(make_params()),
        grad(make_params()),
        context{.scratch = scratch_, .workers = workers},
        tape(layer.make_tape(tape_memory_, kQueries)),
        d_lookup(layer.lookup().make_tape(memory_, kQueries)),
        d_adapter(layer.adapter().router().make_tape(memory_, layer.output_rows(kQueries))) {
    const mole::Random random(7);
    std::uint64_t next = 0;
    mole::params::zip([&](T& value) { value = static_cast<T>(0.5 * random.normal(next++)); },
                      params);
    prepare();
  }

  void prepare() {
    mole::Workspace memory(prepared_block_.span());
    prepared = layer.prepare(weights(), memory);
  }
  typename Layer::Weights weights() const {
    return {{params.lookup.prototypes},
            params.payload,
            {params.adapter.router, params.adapter.experts}};
  }
  void forward(bool with_tape = true) {
    layer.forward(prepared, query, y, with_tape ? &tape : nullptr, context);
  }
  /// Σ dy ∘ y, and the pull of the selected keys.
  double loss() {
    prepare();
    forward();
    return test::weighted_sum(dy, y) +
           static_cast<double>(mole::pull_loss<T>(0.5, tape.found.view(), tape.lookup.logits, {}));
  }
  void backward() {
    mole::params::zero(d_lookup);
    mole::params::zero(d_adapter);
    mole::params::zero(grad);
    for (Index b = 0; b < kQueries; ++b) std::ranges::fill(dquery.view().row(b), T(0));
    mole::pull_loss<T>(0.5, tape.found.view(), tape.lookup.logits, d_lookup.logits);
    layer.backward(weights(), tape, query, dy, d_lookup, d_adapter, dquery, grad, context);
  }
  /// A call with the gradients as they are.
  mole::Errc backward_code(const Params& to, mole::MatView<const T> from,
                           const mole::Context& with) {
    try {
      layer.backward(weights(), tape, query, from, d_lookup, d_adapter, dquery, to, with);
    } catch (const mole::Error& error) {
      return error.code();
    }
    return mole::Errc{};
  }

  Layer layer;

 private:
  Params make_params() {
    return {{memory_.take<T>(kEntries, kQueryWidth)},
            memory_.take<T>(kEntries * kRows, kWidth),
            {layer.adapter().router().make_params(memory_),
             layer.adapter().experts().template make_params<T>(memory_)}};
  }
  mole::Buffer block_;
  mole::Workspace memory_;
  mole::Buffer prepared_block_, tape_block_, scratch_block_;
  mole::Workspace prepared_memory_, tape_memory_, scratch_;

 public:
  Params params, grad;
  mole::Context context;
  typename Layer::Prepared prepared;
  typename Layer::Tape tape;
  typename mole::PrototypeRouter<T>::Tape d_lookup;
  typename mole::DenseRouter<T>::Tape d_adapter;
  Matrix<T> query = test::normal_matrix<T>(kQueries, kQueryWidth, 1);
  Matrix<T> dy = test::normal_matrix<T>(kQueries * kTake * kRows, kWidth, 2);
  Matrix<T> y{kQueries * kTake * kRows, kWidth}, dquery{kQueries, kQueryWidth};
};

}  // namespace

TEST_CASE("A payload lookup differentiates", "[layers]") {
  Example<double> example;
  example.loss();
  example.backward();
  const auto value = [&] { return example.loss(); };
  CHECK(test::gradient_error(example.query, example.dquery.view(), value) == "");
  const auto check = [&](mole::MatView<double> values, mole::MatView<double> gradient) {
    CHECK(test::gradient_error(values, gradient, value) == "");
  };
  check(example.params.lookup.prototypes, example.grad.lookup.prototypes);
  check(example.params.payload, example.grad.payload);
  check(example.params.adapter.router.weight, example.grad.adapter.router.weight);
  for (Index e = 0; e < kExperts; ++e) {
    check(example.params.adapter.experts.down_of(e), example.grad.adapter.experts.down_of(e));
    check(example.params.adapter.experts.up_of(e), example.grad.adapter.experts.up_of(e));
  }
}

TEST_CASE("The payload of the best entry comes first, adapted by the query", "[layers]") {
  Example<double> example;
  mole::params::zero(example.params.adapter.experts);
  example.prepare();
  example.forward();
  for (Index b = 0; b < kQueries; ++b) {
    const Index first = example.tape.entry[b * kTake], second = example.tape.entry[b * kTake + 1];
    CHECK(example.tape.lookup.logits(b, first) >= example.tape.lookup.logits(b, second));
    for (Index i = 0; i < kWidth; ++i) {
      CHECK(example.y(b * kTake * kRows + 1, i) == example.params.payload(first * kRows + 1, i));
      CHECK(example.y((b * kTake + 1) * kRows, i) == example.params.payload(second * kRows, i));
    }
  }
}

TEMPLATE_TEST_CASE("A payload lookup gives the same bits with and without tape, for any workers",
                   "[layers]", float, double) {
  Example<TestType> one;
  one.forward();
  one.backward();
  Example<TestType> untaped;
  untaped.forward(false);
  CHECK(test::bit_difference(untaped.y, one.y) == "");
  for (const int workers : {2, 3, 7}) {
    Example<TestType> other(workers);
    other.forward();
    other.backward();
    CHECK(test::bit_difference(other.y, one.y) == "");
    CHECK(test::bit_difference(other.dquery, one.dquery) == "");
    std::vector<TestType> got, want;
    mole::params::zip([&](TestType v) { got.push_back(v); }, other.grad);
    mole::params::zip([&](TestType v) { want.push_back(v); }, one.grad);
    CHECK(test::bit_difference(got, want) == "");
  }
}

TEST_CASE("A payload lookup allocates nothing and leaves rows without an entry 0", "[layers]") {
  Example<float> example;
  example.query(2, 1) = std::numeric_limits<float>::quiet_NaN();
  const long before = test::allocations();
  example.forward(false);
  example.forward();
  example.backward();
  if (test::kCountsAllocations) CHECK(test::allocations() == before);
  CHECK(example.tape.entry[2 * kTake] == -1);
  for (Index i = 0; i < kWidth; ++i) CHECK(example.y(2 * kTake * kRows, i) == 0);
  CHECK(std::isfinite(mole::params::norm(example.grad.lookup)));
}

TEST_CASE("Rows without an entry are 0 under experts with biases, and nothing learns from them",
          "[layers]") {
  Example<double> example(1, true);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (Index e = 1; e < kEntries; ++e) example.params.lookup.prototypes(e, 0) = nan;
  example.prepare();
  for (const bool recorded : {false, true}) {
    example.forward(recorded);
    for (Index r = 0; r < example.y.rows(); ++r) {
      const auto row = example.y.view().row(r);
      const bool missing = r / kRows % kTake == 1;
      CHECK(std::ranges::all_of(row, [](double v) { return v == 0; }) == missing);
    }
  }
  REQUIRE(example.tape.entry[0] == 0);
  REQUIRE(example.tape.entry[1] == -1);
  const auto gradients = [&] {
    example.backward();
    std::vector<double> all;
    const auto append = [&](const auto&, const auto& view) {
      for (Index r = 0; r < view.rows; ++r) {
        all.insert(all.end(), view.row(r).begin(), view.row(r).end());
      }
    };
    Example<double>::Params::visit(append, example.grad);
    append(0, example.dquery.view());
    return all;
  };
  const std::vector<double> expected = gradients();
  for (Index r = 0; r < example.dy.rows(); ++r) {
    if (r / kRows % kTake == 1) std::ranges::fill(example.dy.view().row(r), 100);
  }
  CHECK(test::bit_difference(gradients(), expected) == "");
  CHECK(mole::params::norm(example.grad.adapter) > 0.01);
}

TEST_CASE("A payload lookup that is refused has not begun to write", "[layers]") {
  Example<double> example;
  example.loss();
  example.backward();
  const double norm = mole::params::norm(example.grad);
  const auto refused = [&](const Example<double>::Params& to, const mole::Context& with) {
    const mole::Errc code = example.backward_code(to, example.dy, with);
    CHECK(mole::params::norm(example.grad) == norm);
    return code;
  };
  auto grad = example.grad;
  grad.lookup.prototypes.rows -= 1;
  CHECK(refused(grad, example.context) == mole::Errc::shape_mismatch);
  const std::size_t enough = example.layer.scratch_bytes(kQueries, 1);
  for (Index r = 0; r < example.y.rows(); ++r) std::ranges::fill(example.y.view().row(r), 3);
  const Matrix<double> before = example.y;
  int forward_refused = 0;
  for (std::size_t bytes = 0; bytes + mole::kAlignment < enough; bytes += enough / 97) {
    mole::Buffer block(bytes);
    mole::Workspace scratch(block.span());
    const mole::Context context{.scratch = scratch};
    CHECK(refused(example.grad, context) == mole::Errc::out_of_memory);
    try {
      example.layer.forward(example.prepared, example.query, example.y, nullptr, context);
      break;
    } catch (const mole::Error& error) {
      REQUIRE(error.code() == mole::Errc::out_of_memory);
    }
    REQUIRE(test::bit_difference(example.y, before) == "");
    ++forward_refused;
  }
  CHECK(forward_refused > 10);
  CHECK(example.backward_code(example.grad, example.dy, example.context) == mole::Errc{});
}

TEST_CASE("A payload lookup refuses parts that do not fit", "[layers]") {
  using Router = mole::PrototypeRouter<double>;
  const auto make = [](Router lookup, Index router_width, Index out, Index rows) {
    return Lookup<double>(lookup,
                          {mole::DenseRouter<double>({.width = router_width, .experts = 2}),
                           test::make_bank<double>(kWidth, out, 2)},
                          rows);
  };
  const Router unit({.width = 6, .experts = 3, .weight = mole::PrototypeWeight::unit});
  CHECK_NOTHROW(make(unit, 6, kWidth, 1));
  CHECK_THROWS_AS(make(unit, 5, kWidth, 1), mole::Error);
  CHECK_THROWS_AS(make(unit, 6, kWidth + 1, 1), mole::Error);
  CHECK_THROWS_AS(make(unit, 6, kWidth, 0), mole::Error);
  CHECK_THROWS_AS(make(Router({.width = 6, .experts = 3}), 6, kWidth, 1), mole::Error);
  const Lookup<double> endless =
      make(Router({.width = 6, .experts = 4, .weight = mole::PrototypeWeight::unit}), 6, kWidth,
           Index{1} << 62);
  CHECK(endless.output_rows(2) == std::numeric_limits<Index>::max());
  Example<double> example;
  const auto adapter = test::make_bank<double>(kWidth, kWidth, 2);
  mole::Buffer block(std::size_t{1} << 16);
  mole::Workspace memory(block.span());
  const auto prototypes = test::normal_matrix<double>(4, 6, 3);
  const auto router = test::normal_matrix<double>(2, 6, 4);
  const auto experts = adapter.make_params<double>(memory);
  mole::params::zero(experts);
  const Lookup<double>::Weights weights{
      {prototypes.view()}, {nullptr, 0, kWidth}, {{router.view(), {}}, experts}};
  CHECK_THROWS_WITH(endless.prepare(weights, memory),
                    "payload: expected [9223372036854775807, 9], got [0, 9]");
  example.y = Matrix<double>(1, kWidth);
  CHECK_THROWS_AS(example.forward(), mole::Error);
}
