// SPDX-License-Identifier: Apache-2.0
#include "mole/layers/dmoerm.hpp"

#include <vector>

#include "layers/layer_trial.hpp"

namespace {

using mole::DmoermPhase;
using mole::Index;

constexpr Index kTokens = 23, kWidth = 5, kSequences = 6;

/// Six sequences of three categories, some with padding.
template <class T, DmoermPhase phase>
struct Trial : test::LayerTrial<T> {
  Trial()
      : layer({.width = kWidth,
               .categories = 4,
               .adapters = 3,
               .rank = 2,
               .scale = T(1.5),
               .phase = phase,
               .adapter = 1}) {
    params = layer.make_params(this->exact(layer.params_bytes()));
    grad = layer.make_params(this->exact(layer.params_bytes()));
    this->adopt(params, grad);
    x = this->input("x", kTokens, kWidth);
    this->y = this->zeros(kSequences, 1);
    this->dy = this->normal(kSequences, 1);
    tape = layer.make_tape(this->exact(layer.tape_bytes(kSequences + 1)), kSequences + 1);
    mask.assign(kTokens, 1);
    mask[3] = mask[4] = mask[22] = 0;
  }

  mole::Tokens<T> tokens() const { return {.x = x.value, .sequence_begin = begin, .mask = mask}; }
  std::size_t scratch_bytes(int) const { return layer.scratch_bytes(kSequences); }
  void forward(const mole::Context& context) {
    mole::Workspace packing = this->packing(layer.prepared_bytes());
    const auto prepared = layer.prepare(params, packing);
    this->packed();
    layer.forward(prepared, tokens(), category, this->y, tape, context);
  }
  void backward(const mole::Context& context) {
    layer.backward(params, tape, tokens(), this->dy, x.gradient, grad, context);
  }

  mole::Dmoerm<T> layer;
  mole::DmoermParams<T> params, grad;
  typename mole::Dmoerm<T>::Tape tape;
  typename test::LayerTrial<T>::Tensor x;
  std::vector<std::int32_t> begin = {0, 5, 7, 8, 14, 20, 23}, category = {2, 0, 2, 3, 0, 2};
  std::vector<std::uint8_t> mask;
};
template <class T>
using BaseTrial = Trial<T, DmoermPhase::base>;
template <class T>
using AdapterTrial = Trial<T, DmoermPhase::adapter>;
template <class T>
using MixtureTrial = Trial<T, DmoermPhase::mixture>;

}  // namespace

TEST_CASE("DMoERM's base and adapter phases keep what every layer keeps", "[layers]") {
  test::check_layer<BaseTrial>();
  test::check_layer<AdapterTrial>();
}

TEST_CASE("DMoERM's mixture phase trains the mixture alone", "[layers]") {
  test::check_workers<MixtureTrial<float>>();
  test::check_allocations<MixtureTrial<float>>();
  MixtureTrial<double> trial;
  test::run(trial, true);
  for (const auto& tensor : trial.tensors) {
    INFO(tensor.name);
    const bool trained = tensor.name.starts_with("inner") || tensor.name.starts_with("slope") ||
                         tensor.name.starts_with("outer");
    if (!trained) {
      CHECK(test::weighted_sum(tensor.gradient, tensor.gradient) == 0);
      continue;
    }
    const auto loss = [&] {
      test::run(trial, false);
      return test::weighted_sum(trial.dy, trial.y);
    };
    CHECK(test::gradient_error(tensor.value, tensor.gradient, loss) == "");
    CHECK(test::weighted_sum(tensor.gradient, tensor.gradient) > 0);
  }
}

TEST_CASE("DMoERM computes with a copy of its parameters", "[layers]") {
  test::check_snapshot<BaseTrial<double>>();
  test::check_snapshot<AdapterTrial<float>>();
  test::check_snapshot<MixtureTrial<double>>();
}

TEST_CASE("DMoERM with too little scratch has not begun to write", "[layers]") {
  test::check_scratch<AdapterTrial<double>>(false);
  test::check_scratch<AdapterTrial<double>>(true);
  test::check_scratch<MixtureTrial<double>>(true);
}

TEST_CASE("DMoERM refuses to go back through other sequences", "[layers]") {
  AdapterTrial<double> trial;
  test::run(trial, true);
  const auto before = trial.results();
  mole::Buffer block(trial.scratch_bytes(1));
  mole::Workspace scratch(block.span());
  const auto refused = [&] {
    CHECK_THROWS_AS(trial.backward(mole::Context{.scratch = scratch}), mole::Error);
    CHECK(test::bit_difference(trial.results(), before) == "");
  };
  const auto begin = trial.begin;
  trial.begin = {0, 5, 7, 8, 14, 20, 22, 23};
  refused();
  trial.begin = {0, 5, 7, 8, 14, 20, 40};
  refused();
  trial.begin = begin;
  trial.mask.pop_back();
  refused();
  trial.mask.push_back(0);
  trial.backward(mole::Context{.scratch = scratch});
  CHECK(test::bit_difference(trial.results(), before) != "");
}

TEMPLATE_TEST_CASE("DMoERM refuses to go back before it has added anything", "[layers]",
                   AdapterTrial<double>, MixtureTrial<double>) {
  TestType trial;
  test::run(trial, true);
  const auto before = trial.results();
  mole::Buffer block(trial.scratch_bytes(1));
  mole::Workspace scratch(block.span());
  const auto refused = [&] {
    mole::Errc code{};
    try {
      trial.backward(mole::Context{.scratch = scratch});
    } catch (const mole::Error& error) {
      code = error.code();
    }
    CHECK(code == mole::Errc::shape_mismatch);
    CHECK(test::bit_difference(trial.results(), before) == "");
  };
  const auto check = [&](auto&& spoil) {
    for (auto* params : {&trial.params, &trial.grad}) {
      const auto good = *params;
      spoil(*params);
      refused();
      *params = good;
    }
  };
  check([](auto& params) { params.weight.rows -= 1; });
  check([](auto& params) { params.down.rows -= 2; });
  check([](auto& params) { params.up.cols -= 1; });
  check([](auto& params) { params.head.weight.rows -= 1; });
  check([](auto& params) { params.head.bias.cols -= 1; });
  check([](auto& params) { params.inner.cols -= kWidth; });
  check([](auto& params) { params.inner_bias.rows -= 1; });
  check([](auto& params) { params.slope.cols -= 1; });
  check([](auto& params) { params.outer.weight.cols -= 1; });
  check([](auto& params) { params.outer.bias.cols -= 1; });
  const auto dx = trial.x.gradient, dy = trial.dy;
  trial.x.gradient = dx.row_block(0, kTokens - 1);
  refused();
  trial.x.gradient = dx;
  trial.dy = dy.row_block(0, kSequences - 1);
  refused();
}

TEST_CASE("DMoERM reads the last real token of a sequence", "[layers]") {
  AdapterTrial<double> trial;
  test::run(trial, false);
  const double before = trial.y(0, 0);
  trial.x.value(3, 0) += 1;  // padding
  trial.x.value(1, 0) += 1;
  test::run(trial, false);
  CHECK(trial.y(0, 0) == before);
  trial.x.value(2, 0) += 1;
  test::run(trial, false);
  CHECK(trial.y(0, 0) != before);
}

TEST_CASE("DMoERM refuses categories and shapes that do not fit", "[layers]") {
  AdapterTrial<double> trial;
  trial.category[1] = 4;
  CHECK_THROWS_WITH(test::run(trial, false), "category 4 is not in 0 ... 3");
  trial.category = {0, 0};
  trial.y = trial.y.row_block(0, 2);
  CHECK_THROWS_WITH(test::run(trial, false),
                    "Dmoerm: categories of 2 sequences, of which 6 have tokens");
  AdapterTrial<double> other;
  other.params.up = {};
  CHECK_THROWS_AS(test::run(other, false), mole::Error);
  CHECK_THROWS_WITH(
      mole::Dmoerm<double>({.width = 3, .categories = 2, .adapters = 2, .rank = 1, .adapter = 2}),
      "Dmoerm: adapter: expected below adapters, got 2");
  constexpr Index kMany = Index{1} << 31;  // 2^33 adapters of rank 2^31: no product of them fits
  CHECK_THROWS_WITH(
      mole::Dmoerm<double>({.width = 1, .categories = 4, .adapters = kMany, .rank = kMany}),
      "Dmoerm: 4 categories of 2147483648 adapters of width 1 and rank 2147483648 "
      "have 9223372036854775807 rows, the limit is 2147483648");
}
