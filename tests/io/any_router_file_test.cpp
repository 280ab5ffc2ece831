// SPDX-License-Identifier: Apache-2.0
#include <cstring>
#include <string>
#include <vector>

#include "io/file_builder.hpp"
#include "mole/io/mixture_file.hpp"
#include "mole/layers/any_router.hpp"
#include "mole/layers/session.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/matrix.hpp"

using mole::AnyRouter;
using mole::Error;
using mole::Index;

namespace {

constexpr Index kIn = 13, kTokens = 11, kExperts = 4;
using AnyMixture = mole::Mixture<AnyRouter<float>, mole::LoraBank<float>>;

template <class F>
std::string thrown(F&& call) {
  try {
    call();
  } catch (const Error& error) {
    return std::string(name(error.code())) + ": " + error.what();
  }
  return "nothing";
}

mole::LoraBank<float> bank() {
  return mole::LoraBank<float>(
      {.in = kIn, .out = 7, .rank = {3, 0, 5, 1}, .scale = {0.1f, 1, 2, -0.3f}});
}

template <class Layer>
mole::OwnedWeights<Layer> random_weights(const Layer& layer) {
  mole::OwnedWeights<Layer> weights(layer);
  const mole::Random random(5, 3);
  std::uint64_t n = 0;
  mole::params::zip([&](float& value) { value = static_cast<float>(2 * random.uniform(n++) - 1); },
                    weights.params());
  return weights;
}

template <class Layer>
std::vector<float> output(const Layer& layer, const typename Layer::Weights& weights,
                          const typename Layer::Buffers& buffers) {
  const auto x = test::random_matrix<float>(kTokens, kIn, 8);
  std::vector<float> y(kTokens * 7, 0.25f);
  mole::Session session(layer, weights, {.max_tokens = kTokens});
  session.forward(x.view(), {y.data(), kTokens, 7}, buffers);
  return y;
}

template <class Layer>
std::vector<std::byte> file_of(const Layer& layer, const typename Layer::Buffers& buffers) {
  const auto weights = random_weights(layer);
  mole::MixtureFileWriter writer;
  writer.add("a", layer, weights.params(), buffers);
  return writer.bytes();
}

mole::MixtureFile parse(const std::vector<std::byte>& bytes) {
  return mole::MixtureFile(mole::SafeTensors::parse(bytes, "f"));
}

/// The file is the same byte for byte whichever type saved it, and either type loads it.
template <class R>
void check_files(const R& router, const typename R::Buffers& buffers = {},
                 const mole::AnyRouterBuffers<float>& any_buffers = {}) {
  INFO(R::Config::kind());
  using Own = mole::Mixture<R, mole::LoraBank<float>>;
  const Own own(router, bank());
  const AnyMixture any(AnyRouter<float>(mole::describe(router)), bank());
  const auto file = file_of(own, buffers);
  CHECK(file_of(any, any_buffers) == file);
  const mole::MixtureFile mixtures = parse(file);
  mixtures.check(mixtures.only());
  const auto as_own = mixtures.load<Own>("a");
  const auto as_any = mixtures.load<AnyMixture>("a");
  CHECK(mole::describe(as_any.layer()) == mole::describe(own));
  const auto weights = random_weights(own);
  const auto y = output(own, weights.params(), buffers);
  CHECK(test::bit_difference(output(as_own.layer(), as_own.weights(), as_own.buffers()), y) == "");
  CHECK(test::bit_difference(output(as_any.layer(), as_any.weights(), as_any.buffers()), y) == "");
}

}  // namespace

TEST_CASE("mixtures are saved as AnyRouter and loaded by kind, and the other way round") {
  const std::vector<float> bias = {0, 0.7f, -1, 0.1f};
  check_files(mole::TopKRouter<float>({.width = kIn, .experts = kExperts, .k = 2, .bias = true}),
              {bias}, {bias});
  check_files(mole::DeepSeekRouter<float>({.width = kIn, .experts = kExperts, .k = 2}), {bias},
              {bias});
  check_files(mole::DenseRouter<float>({.width = kIn, .experts = kExperts}));
  check_files(
      mole::MlpRouter<float>({.width = kIn, .experts = kExperts, .hidden = 9, .hidden2 = 5}));
  check_files(mole::NoisyTopKRouter<float>({.width = kIn, .experts = kExperts}));
  check_files(mole::ExpertChoiceRouter<float>({.width = kIn, .experts = kExperts}));
  check_files(mole::UnitRouter<float>({.width = kIn, .experts = kExperts}));
}

TEST_CASE("a mixture with an AnyRouter goes through a file by its two functions") {
  const auto d = mole::description_from_json(
      R"({"kind": "top_p", "width": 13, "experts": 4, "top_p": 0.5})", "router.json");
  const mole::AdaptedLinear layer(AnyMixture(AnyRouter<float>(d), bank()));
  const auto weights = random_weights(layer);
  const mole::test::TemporaryFolder folder;
  mole::save_mixture(folder.path() + "/moe.safetensors", layer, weights.params());
  const auto loaded =
      mole::load_mixture<mole::AdaptedLinear<AnyMixture>>(folder.path() + "/moe.safetensors");
  CHECK(loaded.layer().router().kind() == "top_p");
  CHECK(test::bit_difference(output(loaded.layer(), loaded.weights(), loaded.buffers()),
                             output(layer, weights.params(), {})) == "");
}

TEST_CASE("a buffer in a file that the router does not read is refused") {
  const std::vector<float> bias = {0, 0.7f, -1, 0.1f};
  const AnyMixture top_k(
      AnyRouter<float>(mole::TopKRouter<float>({.width = kIn, .experts = kExperts, .k = 2})),
      bank());
  const AnyMixture dense(
      AnyRouter<float>(mole::DenseRouter<float>({.width = kIn, .experts = kExperts})), bank());
  CHECK(thrown([&] { file_of(dense, {bias}); }) ==
        "invalid_argument: mixture \"a\": buffers.selection_bias: a router of kind dense does not "
        "read it");
  const auto file = file_of(top_k, {bias});
  const mole::MixtureFile mixtures = parse(file);
  mole::MixtureRecord record = mixtures.only();
  record.layer = mole::describe(dense);
  CHECK(thrown([&] { mixtures.load<AnyMixture>(record); }) ==
        "config_error: f: mixture \"a\": buffers.selection_bias: a router of kind dense does "
        "not read it");
  CHECK(
      thrown([&] { mixtures.check(record); }) ==
      R"(config_error: f: mixture "a": tensor "a.buffers.selection_bias" is no part of this layer)");
}

TEST_CASE("an AnyRouter is built from JSON and written as JSON") {
  const std::string text = R"({"kind":"top_k","width":5,"experts":7,"k":3,"score":"sigmoid",)"
                           R"("order":"topk_then_score","renormalise":false,"renorm_epsilon":0.0,)"
                           R"("temperature":1.0,"scale":2.5,"bias":true,"probes":false})";
  const AnyRouter<float> router(mole::description_from_json(text, "router.json"));
  CHECK(router.max_per_token() == 3);
  CHECK(to_json(mole::describe(router)) == text);
  CHECK(thrown([] {
          AnyRouter<float>(mole::description_from_json(R"({"kind": "magic"})", "router.json"));
        }).starts_with("unsupported: kind \"magic\" is unknown, expected one of attention, "));
  const auto build = [](const char* json) {
    return thrown([&] { AnyRouter<float>(mole::description_from_json(json, "router.json")); });
  };
  CHECK(build(R"({"kind": "top_k", "width": 5, "experts": 7, "k": 8})") ==
        R"(config_error: "top_k": TopKRouter: k: expected 1 ... experts, got 8)");
  CHECK(
      build(R"({"kind": "top_k", "width": 5, "experts": 7, "k": 2, "q": 1})")
          .starts_with(R"(config_error: "top_k": field "q" is unknown, expected one of width, )"));
}
