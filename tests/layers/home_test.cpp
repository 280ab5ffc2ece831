// SPDX-License-Identifier: Apache-2.0
#include "mole/layers/home.hpp"

#include "layers/layer_trial.hpp"

namespace {

using mole::HomeNorm;
using mole::Index;

constexpr Index kTokens = 19, kWidth = 6, kOut = 5, kExperts = 4, kTasks = 3;

/// Task 0 sees three experts and owns one, task 1 sees none and owns two, task 2 sees two; expert 3
/// is nobody's.
template <class T>
typename mole::Home<T>::Config config(HomeNorm norm, bool low, bool training = true) {
  typename mole::Home<T>::Config c;
  c.width = kWidth;
  c.out = kOut;
  c.experts = kExperts;
  c.tasks = kTasks;
  c.visible = {1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 0};
  c.own = {0, 1, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0};
  c.rank = low ? 2 : 0;
  c.scale = T(1.5);
  c.norm = norm;
  c.norm_epsilon = T(0.125);
  c.training = training;
  c.groups = low ? 2 : 0;
  c.feature_rank = low ? 3 : 0;
  if (low) c.group_of = {1, -1, 0, 1};
  return c;
}

template <class T, HomeNorm norm, bool low, bool training = true>
struct Trial : test::LayerTrial<T> {
  Trial() : layer(config<T>(norm, low, training)) {
    params = layer.make_params(this->exact(layer.params_bytes()));
    grad = layer.make_params(this->exact(layer.params_bytes()));
    this->adopt(params, grad);
    x = this->input("x", kTokens, kWidth);
    mean = this->normal(kExperts, kOut);
    variance = this->zeros(kExperts, kOut);
    mole::rows::fill(variance, T(0.75));
    buffers = {mean, variance};
    this->y = this->zeros(kTasks * kTokens, kOut);
    this->dy = this->normal(kTasks * kTokens, kOut);
    tape = layer.make_tape(this->exact(layer.tape_bytes(kTokens + 2)), kTokens + 2);
  }
  std::size_t scratch_bytes(int workers) const { return layer.scratch_bytes(kTokens, workers); }
  void forward(const mole::Context& context) {
    mole::Workspace packing = this->packing(layer.prepared_bytes());
    const auto prepared = layer.prepare(params, packing);
    this->packed();
    layer.forward(prepared, buffers, x.value, this->y, tape, context);
  }
  void backward(const mole::Context& context) {
    layer.backward(params, buffers, tape, x.value, this->dy, x.gradient, grad, context);
  }

  mole::Home<T> layer;
  mole::HomeParams<T> params, grad;
  typename mole::Home<T>::Buffers buffers;
  typename mole::Home<T>::Tape tape;
  typename test::LayerTrial<T>::Tensor x;
  mole::MatView<T> mean, variance;
};
template <class T>
using Layered = Trial<T, HomeNorm::layer, true>;
template <class T>
using Rms = Trial<T, HomeNorm::rms, false>;
template <class T>
using Batch = Trial<T, HomeNorm::batch, false>;
template <class T>
using BatchAtRest = Trial<T, HomeNorm::batch, true, false>;
template <class T>
using Plain = Trial<T, HomeNorm::none, true>;

}  // namespace

TEST_CASE("HoME keeps what every layer keeps", "[layers]") {
  test::check_layer<Layered>();
  test::check_layer<Rms>();
  test::check_layer<Batch>();
  test::check_layer<BatchAtRest>();
  test::check_layer<Plain>();
}

TEST_CASE("HoME computes with a copy of its parameters", "[layers]") {
  test::check_snapshot<Layered<double>>();
  test::check_snapshot<Rms<float>>();
  test::check_snapshot<BatchAtRest<double>>();
}

TEST_CASE("in HoME a task without experts is silent, and unseen experts learn nothing",
          "[layers]") {
  Layered<double> trial;
  test::run(trial, true);
  const auto square = [](mole::MatView<const double> v) { return test::weighted_sum(v, v); };
  const auto gate = [&](Index n) { return trial.grad.gate.row_block(n * kExperts, kExperts); };
  CHECK(square(gate(1)) == 0);
  CHECK(square(gate(0).row_block(3, 1)) == 0);
  CHECK(square(gate(0)) > 0);
  CHECK(square(trial.grad.up.row_block(3 * kOut, kOut)) == 0);
  CHECK(square(trial.y.row_block(kTokens, kTokens)) > 0);  // its own experts speak
  auto silent = config<double>(HomeNorm::layer, true);
  silent.own.assign(kTasks * kExperts, 0);
  trial.layer = mole::Home<double>(silent);
  test::run(trial, false);
  CHECK(square(trial.y.row_block(kTokens, kTokens)) == 0);
}

TEST_CASE("two ways back from one HoME tape give the same gradients", "[layers]") {
  Layered<double> trial;
  test::run(trial, true);
  const auto once = trial.results();
  mole::Buffer block(trial.scratch_bytes(1));
  mole::Workspace scratch(block.span());
  for (const auto& tensor : trial.tensors) mole::rows::fill(tensor.gradient, 0);
  trial.backward(mole::Context{scratch});
  CHECK(test::bit_difference(trial.results(), once) == "");
}

TEST_CASE("HoME's running statistics move towards those of the batch", "[layers]") {
  Batch<double> trial;
  test::run(trial, false);
  const double before = trial.mean(0, 0), batch = trial.tape.mean(0, 0);
  trial.layer.update(trial.tape, trial.mean, trial.variance);
  CHECK(trial.mean(0, 0) == Catch::Approx(0.9 * before + 0.1 * batch));
  const double unbiased = trial.tape.variance(0, 0) * kTokens / (kTokens - 1);
  CHECK(trial.variance(0, 0) == Catch::Approx(0.9 * 0.75 + 0.1 * unbiased));
}

TEST_CASE("HoME refuses what does not fit", "[layers]") {
  auto bad = config<double>(HomeNorm::layer, true);
  bad.visible.pop_back();
  CHECK_THROWS_WITH(mole::Home<double>(bad),
                    "Home: visible and own: expected 12 values, got 11 and 12");
  bad = config<double>(HomeNorm::layer, true);
  bad.group_of[2] = 2;
  CHECK_THROWS_WITH(mole::Home<double>(bad), "Home: group_of: expected -1 ... groups - 1, got 2");
  BatchAtRest<double> trial;
  trial.buffers.mean = {};
  CHECK_THROWS_WITH(test::run(trial, false), "buffers.mean: expected [4, 5], got [0, 0]");
  Rms<double> rms;
  rms.params.norm = {};
  CHECK_THROWS_AS(test::run(rms, false), mole::Error);
}
