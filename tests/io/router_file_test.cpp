// SPDX-License-Identifier: Apache-2.0
// Routers with parameters of their own, or with some that may be absent, come back from a file.
#include <cstring>
#include <string>
#include <vector>

#include "mole/io/mixture_file.hpp"
#include "mole/layers/session.hpp"
#include "mole/routers/attention.hpp"
#include "mole/routers/grouped.hpp"
#include "mole/routers/low_rank.hpp"
#include "mole/routers/mlp.hpp"
#include "mole/routers/near_best.hpp"
#include "mole/routers/prototype.hpp"
#include "mole/routers/prototype_choice.hpp"
#include "mole/routers/rank.hpp"
#include "mole/routers/task.hpp"
#include "mole/routers/top_any.hpp"
#include "support/catch.hpp"
#include "support/matrix.hpp"

namespace {

using mole::Index;

constexpr Index kIn = 13, kOut = 7, kTokens = 11, kExperts = 4;

/// Writes a mixture with this router and random parameters, and reads it: the same description, the
/// same tensors `router.*`, the same bits.
template <class R>
void check_round_trip(const R& router, const std::vector<std::string>& tensors) {
  using Layer = mole::Mixture<R, mole::LoraBank<float>>;
  INFO(R::Config::kind());
  const Layer layer(
      router, mole::LoraBank<float>(
                  {.in = kIn, .out = kOut, .rank = {3, 0, 5, 1}, .scale = {0.1f, 1, 2, -0.3f}}));
  mole::OwnedWeights<Layer> weights(layer);
  const mole::Random random(5, 3);
  std::uint64_t n = 0;
  mole::params::zip([&](float& v) { v = static_cast<float>(2 * random.uniform(n++) - 1); },
                    weights.params());
  mole::MixtureFileWriter writer;
  writer.add("m", layer, weights.params());
  const auto bytes = writer.bytes();
  const mole::SafeTensors stored = mole::SafeTensors::parse(bytes, "f");
  std::vector<std::string> found;
  for (const auto& tensor : stored.tensors()) {
    if (tensor.name.starts_with("m.router.")) found.push_back(tensor.name.substr(9));
  }
  CHECK(found == tensors);
  const mole::MixtureFile file(mole::SafeTensors::parse(bytes, "f"));
  file.check(file.only());
  const auto loaded = file.load<Layer>("m");
  CHECK(describe(loaded.layer()) == describe(layer));

  const auto x = test::random_matrix<float>(kTokens, kIn, 8);
  std::vector<std::int32_t> ids;
  for (Index t = 0; t < kTokens; ++t) ids.push_back(static_cast<std::int32_t>(t % 3));
  mole::LayerInput<float> input(x.view());
  input.ids = ids;
  const auto output = [&](const Layer& of, const typename Layer::Weights& values) {
    std::vector<float> y(static_cast<std::size_t>(kTokens * kOut), 0.25f);
    mole::Session session(of, values, {.max_tokens = kTokens});
    session.forward(input, {y.data(), kTokens, kOut});
    return y;
  };
  const auto y = output(layer, weights.params());
  const auto again = output(loaded.layer(), loaded.weights());
  CHECK(std::memcmp(y.data(), again.data(), y.size() * sizeof(float)) == 0);
  CHECK(y != std::vector<float>(y.size(), 0.25f));
}

}  // namespace

TEST_CASE("routers with learned heads come back from a file") {
  check_round_trip(
      mole::MlpRouter<float>({.width = kIn, .experts = kExperts, .hidden = 5, .hidden2 = 3}),
      {"hidden.bias", "hidden.weight", "hidden2.bias", "hidden2.weight", "output.bias",
       "output.weight"});
  check_round_trip(
      mole::MlpRouter<float>({.width = kIn, .experts = kExperts, .hidden = 5, .bias = false}),
      {"hidden.weight", "output.weight"});
  check_round_trip(mole::AttentionRouter<float>({.width = kIn, .experts = kExperts}),
                   {"key.weight", "query.weight", "value.weight"});
  check_round_trip(mole::LowRankRouter<float>({.width = kIn, .experts = kExperts, .rank = 2}),
                   {"hidden.weight", "output.weight"});
  check_round_trip(
      mole::TaskRouter<float>({.width = kIn, .experts = kExperts, .tasks = 3, .task_width = 5}),
      {"embedding", "router.weight"});
}

TEST_CASE("routers with prototypes come back from a file") {
  check_round_trip(mole::PrototypeRouter<float>({.width = kIn,
                                                 .experts = kExperts,
                                                 .k = 2,
                                                 .unconditional = true,
                                                 .unconditional_id = 1}),
                   {"prototypes"});
  check_round_trip(mole::PrototypeRouter<float>({.width = kIn,
                                                 .experts = kExperts,
                                                 .weight = mole::PrototypeWeight::softmax,
                                                 .learned_scale = true,
                                                 .projection = 6}),
                   {"projection", "prototypes", "scale"});
  check_round_trip(mole::PrototypeChoiceRouter<float>({.width = kIn, .experts = kExperts, .k = 2}),
                   {"prototypes"});
  check_round_trip(mole::TopAnyRouter<float>({.width = kIn, .experts = kExperts}),
                   {"prototypes", "threshold"});
}

TEST_CASE("routers that select in their own ways come back from a file") {
  check_round_trip(
      mole::RankRouter<float>({.width = kIn, .experts = kExperts, .positions = {0, 2, 3}}),
      {"weight"});
  check_round_trip(mole::GroupedRouter<float>({.width = kIn, .experts = kExperts, .bias = true}),
                   {"bias", "weight"});
  check_round_trip(mole::NearBestRouter<float>({.width = kIn, .experts = kExperts}), {"weight"});
}
