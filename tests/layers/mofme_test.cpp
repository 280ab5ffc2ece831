// SPDX-License-Identifier: Apache-2.0
#include "mole/layers/mofme.hpp"

#include <limits>
#include <string>

#include "layers/layer_trial.hpp"
#include "mole/routers/tie_top_k.hpp"

namespace {

using mole::Index;

constexpr Index kTokens = 21, kWidth = 5, kExperts = 4;

template <class T, bool shifted>
struct Trial : test::LayerTrial<T> {
  using Router = mole::TieTopKRouter<T>;
  using Layer = mole::Mofme<Router>;

  Trial()
      : layer(Router({.width = kWidth, .experts = kExperts, .k = 2, .bias = true}),
              {.hidden = 7, .norm_epsilon = T(0.125), .shifted = shifted}) {
    params = layer.make_params(this->exact(layer.params_bytes()));
    grad = layer.make_params(this->exact(layer.params_bytes()));
    this->adopt(params, grad);
    x = this->input("x", kTokens, kWidth);
    this->y = this->zeros(kTokens, kWidth);
    this->dy = this->normal(kTokens, kWidth);
    tape = layer.make_tape(this->exact(layer.tape_bytes(kTokens + 2)), kTokens + 2);
    d_tape = layer.router().make_tape(this->memory, kTokens);
  }

  typename Layer::Weights weights() const {
    return {params.norm,
            params.shift,
            params.gate,
            params.value,
            {params.mixture.router, params.mixture.experts},
            params.inner,
            params.outer};
  }
  std::size_t scratch_bytes(int workers) const { return layer.scratch_bytes(kTokens, workers); }
  void forward(const mole::Context& context) {
    mole::Workspace packing = this->packing(layer.prepared_bytes());
    const auto prepared = layer.prepare(weights(), packing);
    this->packed();
    layer.forward(prepared, {}, x.value, this->y, tape, context);
  }
  void backward(const mole::Context& context) {
    mole::params::zero(d_tape);
    layer.backward(weights(), {}, tape, x.value, this->dy, d_tape, x.gradient, grad, context);
  }

  Layer layer;
  typename Layer::template Params<T> params, grad;
  typename Layer::Tape tape;
  typename Router::Tape d_tape;
  typename test::LayerTrial<T>::Tensor x;
};
template <class T>
using Intended = Trial<T, false>;
template <class T>
using Released = Trial<T, true>;

}  // namespace

TEST_CASE("MoFME's block keeps what every layer keeps", "[layers]") {
  test::check_layer<Intended>();
  test::check_layer<Released>();
}

TEST_CASE("MoFME's block computes with a copy of its parameters", "[layers]") {
  test::check_snapshot<Intended<double>>();
  test::check_snapshot<Released<float>>();
}

TEST_CASE("in MoFME's released list the last modulation is never used", "[layers]") {
  Released<double> trial;
  test::run(trial, true);
  const auto gamma = trial.grad.mixture.experts.gamma_weight;
  const auto last = gamma.row_block((kExperts - 1) * kWidth, kWidth);
  CHECK(test::weighted_sum(last, last) == 0);
  CHECK(test::weighted_sum(gamma, gamma) > 0);
}

TEST_CASE("the bank of MoFME's modulations names the field of a bad config", "[layers]") {
  const auto message = [](const mole::FilmBank<float>::Config& config) -> std::string {
    try {
      mole::FilmBank<float> bank(config);
    } catch (const mole::Error& error) {
      CHECK(error.code() == mole::Errc::invalid_argument);
      return error.what();
    }
    return "accepted";
  };
  for (const bool shifted : {false, true}) {
    const auto experts = [&](Index count) {
      return message({.width = 3, .experts = count, .shifted = shifted});
    };
    const std::string range = "FilmBank: experts: expected 1 ... 65536, got ";
    CHECK(experts(65536) == "accepted");
    CHECK(experts(65537) == range + "65537");
    CHECK(experts(std::numeric_limits<Index>::max()) == range + "9223372036854775807");
    CHECK(experts(0) == range + "0");
    CHECK(experts(-1) == range + "-1");
  }
  CHECK(message({.width = 0, .experts = 2}) == "FilmBank: width must be positive, got 0");
}

TEST_CASE("MoFME's block refuses shapes that do not fit", "[layers]") {
  Intended<double> trial;
  trial.y = trial.zeros(kTokens, kWidth + 1);
  CHECK_THROWS_WITH(test::run(trial, false), "y: expected [21, 5], got [21, 6]");
  Intended<double> other;
  other.params.shift = {};
  CHECK_THROWS_AS(test::run(other, false), mole::Error);
  other.params.shift = other.params.norm;
  other.tape = other.layer.make_tape(other.memory, kTokens - 1);
  CHECK_THROWS_WITH(test::run(other, false), "Mofme: 21 tokens, the tape was made for 20");
}
