// SPDX-License-Identifier: Apache-2.0
#include "mole/layers/soft_moe.hpp"

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "layers/layer_trial.hpp"
#include "mole/experts/ffn_bank.hpp"
#include "mole/experts/lora_bank.hpp"
#include "mole/layers/any_layer.hpp"
#include "support/compare.hpp"

namespace {

using mole::Index;
using mole::MatView;
using test::Matrix;

constexpr Index kTokens = 19, kIn = 7, kOut = 5, kExperts = 3, kSlots = 2, kSequences = 4;

template <class T>
struct Lora {
  using Bank = mole::LoraBank<T>;
  static Bank make() {
    return Bank({.in = kIn,
                 .out = kOut,
                 .rank = {2, 0, 3},
                 .scale = {T(1.5), T(1), T(-0.75)},
                 .bias = true});
  }
};
template <class T>
struct Ffn {
  using Bank = mole::FfnBank<T>;
  static Bank make() {
    return Bank({.in = kIn,
                 .inner = 4,
                 .out = kOut,
                 .experts = kExperts,
                 .base = mole::ExpertBase::own,
                 .up = {{1, 2, 0}, {T(1), T(0.5), T(1)}}});
  }
};

/// Five sequences: one is empty, one is all padding.
template <class T, template <class> class Experts, bool normalise>
struct Trial : test::LayerTrial<T> {
  using Bank = typename Experts<T>::Bank;
  using Layer = mole::SoftMoe<Bank>;

  Trial()
      : layer(Experts<T>::make(), {.slots = kSlots,
                                   .max_sequences = kSequences,
                                   .normalise = normalise,
                                   .epsilon = 0.125}) {
    params = layer.make_params(this->exact(layer.params_bytes()));
    grad = layer.make_params(this->exact(layer.params_bytes()));
    this->adopt(params, grad);
    x = this->input("x", kTokens, kIn);
    host = this->normal(kTokens, kOut);
    this->y = this->zeros(kTokens, kOut);
    this->dy = this->normal(kTokens, kOut);
    tape = layer.make_tape(this->exact(layer.tape_bytes(kTokens + 2)), kTokens + 2);
    mask.assign(kTokens, 1);
    mask[3] = mask[7] = mask[8] = mask[18] = 0;
  }

  typename Layer::Weights weights() const { return {params.slots, params.experts}; }
  mole::LayerInput<T> call_input() const {
    mole::LayerInput<T> all = x.value;
    all.sequence_begin = begin;
    all.mask = mask;
    return all;
  }
  std::size_t scratch_bytes(int workers) const { return layer.scratch_bytes(kTokens, workers); }
  void forward(const mole::Context& context) {
    mole::Workspace packing = this->packing(layer.prepared_bytes());
    mole::rows::copy<T>(host, this->y);
    layer.forward(layer.prepare(weights(), packing), call_input(), this->y,
                  with_tape ? &tape : nullptr, context);
  }
  void backward(const mole::Context& context) {
    layer.backward(weights(), tape, call_input(), this->dy, x.gradient, grad, context);
  }

  Layer layer;
  typename Layer::template Params<T> params, grad;
  typename Layer::Tape tape;
  typename test::LayerTrial<T>::Tensor x;
  MatView<T> host;
  std::vector<std::int32_t> begin = {0, 7, 7, 9, 13, 19};
  std::vector<std::uint8_t> mask;
  bool with_tape = true;
};
template <class T>
using LoraTrial = Trial<T, Lora, false>;
template <class T>
using NormalisedTrial = Trial<T, Lora, true>;
template <class T>
using FfnTrial = Trial<T, Ffn, false>;
template <class T>
using NormalisedFfnTrial = Trial<T, Ffn, true>;

template <class T>
Matrix<T> kept(MatView<T> view) {
  return Matrix<T>(view.rows, view.cols, [&](Index r, Index c) { return view(r, c); });
}

/// y of one call.
template <class AnyTrial>
auto output(AnyTrial& trial) {
  test::run(trial, false);
  return kept(trial.y);
}

double dot(MatView<const double> a, Index row_a, MatView<const double> b, Index row_b) {
  double sum = 0;
  for (Index i = 0; i < a.cols; ++i) sum += a(row_a, i) * b(row_b, i);
  return sum;
}

/// f_e(v) of a LoRA expert with a bias.
std::vector<double> expert(const mole::LoraBank<double>& bank,
                           const mole::LoraBankParams<double>& params, Index e,
                           const std::vector<double>& v) {
  std::vector<double> y;
  const auto down = params.down_of(e), up = params.up_of(e);
  for (Index n = 0; n < kOut; ++n) {
    double sum = params.bias_of(e)(0, n);
    for (Index r = 0; r < down.rows; ++r) {
      for (Index i = 0; i < kIn; ++i) sum += up(n, r) * down(r, i) * v[i];
    }
    y.push_back(bank.config().scale[e] * sum);
  }
  return y;
}

/// The layer as it is stated, sequence by sequence.
template <class AnyTrial>
Matrix<double> plain(const AnyTrial& trial) {
  const MatView<const double> x = trial.x.value, phi = trial.params.slots.phi;
  const auto& config = trial.layer.config();
  const auto length = [&](MatView<const double> rows, Index r) {
    return config.normalise ? std::sqrt(dot(rows, r, rows, r) + config.epsilon) : 1;
  };
  const double scale = config.normalise ? trial.params.slots.scale(0, 0) : 1;
  const Index slots = kExperts * kSlots;
  Matrix<double> weight(kTokens, slots, [&](Index t, Index s) {
    return std::exp(scale * dot(x, t, phi, s) / length(x, t) / length(phi, s));
  });
  Matrix<double> y = kept(trial.host);
  for (std::size_t q = 0; q + 1 < trial.begin.size(); ++q) {
    for (Index s = 0; s < slots; ++s) {
      std::vector<double> merged(kIn, 0.0);
      double all_tokens = 0;
      for (Index t = trial.begin[q]; t < trial.begin[q + 1]; ++t) {
        if (trial.mask[t] == 0) continue;
        all_tokens += weight(t, s);
        for (Index i = 0; i < kIn; ++i) merged[i] += weight(t, s) * x(t, i);
      }
      if (all_tokens == 0) continue;
      for (double& value : merged) value /= all_tokens;
      const auto worked = expert(trial.layer.experts(), trial.params.experts, s / kSlots, merged);
      for (Index t = trial.begin[q]; t < trial.begin[q + 1]; ++t) {
        if (trial.mask[t] == 0) continue;
        double all_slots = 0;
        for (Index other = 0; other < slots; ++other) all_slots += weight(t, other);
        for (Index n = 0; n < kOut; ++n) y(t, n) += weight(t, s) / all_slots * worked[n];
      }
    }
  }
  return y;
}

/// What one call of the layer throws.
template <class AnyTrial>
std::string refusal(AnyTrial& trial, const mole::LayerInput<double>& input, MatView<double> y) {
  mole::Buffer packed(trial.layer.prepared_bytes()), block(trial.layer.scratch_bytes(kTokens, 1));
  mole::Workspace memory(packed.span()), scratch(block.span());
  const auto prepared = trial.layer.prepare(trial.weights(), memory);
  try {
    trial.layer.forward(prepared, input, y, &trial.tape, {.scratch = scratch});
    return "nothing";
  } catch (const mole::Error& error) {
    return error.what();
  }
}

}  // namespace

TEST_CASE("Soft MoE keeps what every layer keeps", "[layers]") {
  test::check_layer<LoraTrial>();
  test::check_layer<NormalisedTrial>();
}

TEST_CASE("Soft MoE of feed-forward experts keeps what every layer keeps", "[layers]") {
  test::check_layer<FfnTrial>();
  test::check_layer<NormalisedFfnTrial>();
}

TEST_CASE("Soft MoE is what its equations say", "[layers]") {
  const test::Close close{1e-13, 1e-13};
  LoraTrial<double> trial;
  CHECK(test::difference(output(trial), plain(trial), close) == "");
  NormalisedTrial<double> normalised;
  CHECK(test::difference(output(normalised), plain(normalised), close) == "");
  normalised.params.slots.scale(0, 0) = 0;  // means of everything
  CHECK(test::difference(output(normalised), plain(normalised), close) == "");
  trial.begin.clear();
  const auto one = output(trial);
  trial.begin = {0, kTokens};
  CHECK(test::difference(one, plain(trial), close) == "");
}

TEST_CASE("a tape changes no bit of Soft MoE", "[layers]") {
  NormalisedTrial<float> trial;
  const auto with = output(trial);
  trial.with_tape = false;
  CHECK(test::bit_difference(output(trial), with) == "");
}

TEST_CASE("sequences do not see each other, tokens of one do, earlier ones too", "[layers]") {
  NormalisedTrial<float> trial, alone;
  const auto all = output(trial);
  const Index first = trial.begin[4], count = kTokens - first;
  alone.x.value = trial.x.value.row_block(first, count);
  alone.host = trial.host.row_block(first, count);
  alone.y = alone.y.row_block(0, count);
  alone.mask.assign(trial.mask.begin() + first, trial.mask.end());
  alone.begin.clear();
  CHECK(test::bit_difference(output(alone).view(), all.view().row_block(first, count)) == "");

  trial.x.value(6, 0) += 1;  // the last of its sequence
  const auto moved = output(trial);
  for (Index t = 0; t < kTokens; ++t) {
    INFO("token " << t);
    const bool same = test::bit_difference(moved.view().row(t), all.view().row(t)) == "";
    CHECK(same == (t >= 7 || t == 3));
  }
}

TEST_CASE("padding, and tokens whose logits are not finite, have no part", "[layers]") {
  LoraTrial<double> trial;
  const auto plain_y = output(trial);
  const auto results = [&] {
    test::run(trial, true);
    return trial.results();
  };
  const auto expected = results();
  for (const Index t : {3, 7, 8, 18}) {
    CHECK(test::bit_difference(plain_y.view().row(t), trial.host.row(t)) == "");
    trial.x.value(t, 2) = std::numeric_limits<double>::quiet_NaN();
    trial.dy(t, 1) = std::numeric_limits<double>::infinity();
  }
  CHECK(test::bit_difference(results(), expected) == "");

  trial.mask[10] = 0;
  const auto without = results();
  trial.mask[10] = 1;
  for (const double bad :
       {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    trial.x.value(10, 4) = bad;
    CHECK(test::bit_difference(results(), without) == "");
  }
}

TEST_CASE("Soft MoE adds its gradients and leaves out those without memory", "[layers]") {
  NormalisedTrial<double> trial;
  test::run(trial, true);
  const auto once = trial.results();
  mole::Buffer block(trial.scratch_bytes(1));
  mole::Workspace scratch(block.span());
  const mole::Context context{.scratch = scratch};
  trial.backward(context);
  const auto twice = trial.results();
  std::vector<double> doubled = once;
  for (std::size_t i = static_cast<std::size_t>(trial.y.size()); i < once.size(); ++i) {
    doubled[i] *= 2;
  }
  CHECK(test::difference(twice, doubled, test::Close{1e-12, 1e-12}) == "");

  test::run(trial, true);
  const auto dphi = kept(trial.grad.slots.phi), dx = kept(trial.x.gradient);
  const auto dup = kept(trial.grad.experts.up_of(2));
  mole::params::zero(trial.grad);
  auto part = trial.grad;
  part.slots = {};
  trial.layer.backward(trial.weights(), trial.tape, trial.call_input(), trial.dy, {}, part,
                       context);
  CHECK(test::bit_difference(kept(trial.grad.experts.up_of(2)), dup) == "");
  CHECK(test::weighted_sum(trial.grad.slots.phi, trial.grad.slots.phi) == 0);
  part = {{trial.grad.slots.phi, {}}, {}};
  trial.layer.backward(trial.weights(), trial.tape, trial.call_input(), trial.dy, {}, part,
                       context);
  CHECK(test::bit_difference(kept(trial.grad.slots.phi), dphi) == "");
  CHECK(trial.grad.slots.scale(0, 0) == 0);
  mole::rows::fill(trial.x.gradient, 0);
  trial.layer.backward(trial.weights(), trial.tape, trial.call_input(), trial.dy, trial.x.gradient,
                       {}, context);
  CHECK(test::bit_difference(kept(trial.x.gradient), dx) == "");
}

TEST_CASE("Soft MoE without tokens does nothing", "[layers]") {
  LoraTrial<double> trial;
  trial.x.value = trial.x.value.row_block(0, 0);
  trial.x.gradient = trial.x.gradient.row_block(0, 0);
  trial.host = trial.host.row_block(0, 0);
  trial.y = trial.y.row_block(0, 0);
  trial.dy = trial.dy.row_block(0, 0);
  trial.mask.clear();
  for (const auto& begin : std::vector<std::vector<std::int32_t>>{{}, {0}, {0, 0, 0}}) {
    trial.begin = begin;
    test::run(trial, true);
    for (const auto& tensor : trial.tensors) {
      CHECK(test::weighted_sum(tensor.gradient, tensor.gradient) == 0);
    }
  }
}

TEST_CASE("Soft MoE refuses what does not fit", "[layers]") {
  LoraTrial<double> trial;
  const auto input = trial.call_input();
  const auto before = kept(trial.y);
  auto other = input;
  other.x = input.x.col_block(0, kIn - 1);
  CHECK(refusal(trial, other, trial.y) == "x: expected [19, 7], got [19, 6]");
  CHECK(refusal(trial, input, trial.y.row_block(0, 3)) == "y: expected [19, 5], got [3, 5]");
  other = input;
  other.dropout = trial.x.value;
  CHECK(refusal(trial, other, trial.y) == "SoftMoe: dropout: expected none, it is not read");
  other = input;
  const std::uint8_t forbidden[kExperts] = {0, 1, 0};
  other.overrides.forbidden = {forbidden, 1, kExperts};
  CHECK(refusal(trial, other, trial.y) == "SoftMoe: overrides: expected none, it is not read");
  const std::vector<std::int32_t> many = {0, 1, 2, 3, 4, 19}, short_begin = {0, 5};
  other = input;
  other.sequence_begin = many;
  CHECK(refusal(trial, other, trial.y) == "SoftMoe: 5 sequences with tokens, max_sequences is 4");
  other.sequence_begin = short_begin;
  CHECK(refusal(trial, other, trial.y) == "tokens.sequence_begin: expected to ascend from 0 to 19");
  trial.tape = trial.layer.make_tape(trial.memory, kTokens - 1);
  CHECK(refusal(trial, input, trial.y) == "SoftMoe: 19 tokens, the tape was made for 18");
  trial.params.slots.phi = trial.params.slots.phi.row_block(0, 5);
  CHECK_THROWS_WITH(refusal(trial, input, trial.y), "phi: expected [6, 7], got [5, 7]");
  CHECK(test::bit_difference(kept(trial.y), before) == "");

  NormalisedTrial<double> normalised;
  test::run(normalised, true);
  normalised.grad.slots.phi = normalised.grad.slots.phi.row_block(0, 5);
  CHECK_THROWS_WITH(test::run(normalised, true), "grad.phi: expected [6, 7], got [5, 7]");
  using Layer = LoraTrial<double>::Layer;
  const auto bank = Lora<double>::make();
  CHECK_THROWS_WITH(Layer(bank, {.slots = 0}),
                    "SoftMoe: slots: expected at least 1 and at most 2^31 in all, got 0");
  CHECK_THROWS_WITH(Layer(bank, {.max_sequences = 0}),
                    "SoftMoe: max_sequences: expected at least 1, got 0");
  CHECK_THROWS_WITH(Layer(bank, {.epsilon = -1}),
                    "SoftMoe: epsilon: expected a number from 0 up, got -1");
}

TEST_CASE("AnyLayer holds a Soft MoE; its table says what the experts have in a token",
          "[layers]") {
  NormalisedTrial<double> trial;
  const auto want = output(trial);
  const mole::AnyLayer<double> layer(trial.layer, trial.weights());
  mole::Buffer table_block(layer.table_bytes(kTokens)), block(layer.scratch_bytes(kTokens, 1));
  mole::Workspace memory(table_block.span()), scratch(block.span());
  auto table = layer.make_table(memory, kTokens);
  mole::rows::copy<double>(trial.host, trial.y);
  layer.forward(trial.call_input(), table, trial.y, {.scratch = scratch});
  CHECK(test::bit_difference(kept(trial.y), want) == "");
  CHECK(layer.experts() == kExperts);
  const mole::Routing<double> routing = table.view();
  for (Index t = 0; t < kTokens; ++t) {
    INFO("token " << t);
    const Index first = routing.token_begin[t], slots = routing.token_begin[t + 1] - first;
    CHECK(slots == (trial.mask[t] != 0 ? kExperts : 0));
    double sum = 0;
    for (Index s = first; s < first + slots; ++s) sum += routing.gate[s];
    if (slots > 0) CHECK(sum == Catch::Approx(1).epsilon(1e-14));
    for (Index e = 0; e < slots; ++e) {
      const double share =
          trial.tape.found.combine(t, 2 * e) + trial.tape.found.combine(t, 2 * e + 1);
      CHECK(routing.gate[first + e] == Catch::Approx(share).epsilon(1e-14));
    }
  }
}
