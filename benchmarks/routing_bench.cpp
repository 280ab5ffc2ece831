// SPDX-License-Identifier: Apache-2.0
// What routing costs. Two questions, on one core:
//   1. nanoseconds a token of the decision alone: softmax and top-k, softmax and top-p
//   2. the whole router, logits included, as a share of the mixture layer that it steers
#include <fmt/core.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "interleaved.hpp"
#include "mole/core/random.hpp"
#include "mole/experts/lora_bank.hpp"
#include "mole/layers/adapted_linear.hpp"
#include "mole/layers/owned_weights.hpp"
#include "mole/layers/session.hpp"
#include "mole/routers/top_k.hpp"
#include "mole/routing/stages.hpp"

using namespace mole;

namespace {

std::vector<float> normal(Index count, std::uint64_t seed, float scale) {
  const Random random(seed);
  std::vector<float> values(static_cast<std::size_t>(count));
  for (Index i = 0; i < count; ++i)
    values[i] = scale * random.normal(static_cast<std::uint64_t>(i));
  return values;
}

/// The decisions of many tokens of one width.
struct Decisions {
  static constexpr Index kTokens = 512;
  Index experts;
  std::vector<float> logits = normal(kTokens * experts, 1, 1.0f);
  std::vector<float> prob = std::vector<float>(static_cast<std::size_t>(experts));
  std::vector<float> gate = prob;
  std::vector<std::int32_t> chosen = std::vector<std::int32_t>(static_cast<std::size_t>(experts));

  std::span<const float> row(Index t) const {
    return std::span(logits).subspan(t * experts, static_cast<std::size_t>(experts));
  }

  void top_k(std::size_t k) {
    for (Index t = 0; t < kTokens; ++t) {
      stages::softmax<float>(row(t), prob);
      stages::select_top_k<float>(prob, std::span(chosen).first(k));
    }
  }
  void top_p(float target) {
    for (Index t = 0; t < kTokens; ++t) {
      stages::softmax<float>(row(t), prob);
      const Index count = stages::select_mass<float>({.target = target}, row(t), prob, chosen);
      for (Index i = 0; i < count; ++i) gate[i] = prob[chosen[i]];
    }
  }
  void shares(std::size_t k) {
    for (Index t = 0; t < kTokens; ++t) {
      stages::weigh<float>({.renormalise = true}, row(t), prob, std::span(chosen).first(k),
                           std::span(gate).first(k));
    }
  }
};

void decision_alone() {
  fmt::print("{:>8} {:>16} {:>16} {:>16}   nanoseconds a token\n", "experts", "softmax + top-2",
             "shares of 2", "top-p 0.6");
  for (const Index experts : {8, 16, 64, 128, 256}) {
    Decisions d{experts};
    const auto seconds =
        bench::interleaved({[&] { d.top_k(2); }, [&] { d.shares(2); }, [&] { d.top_p(0.6f); }});
    const auto nanoseconds = [&](int i) { return seconds[i] / Decisions::kTokens * 1e9; };
    fmt::print("{:>8} {:>16.1f} {:>16.1f} {:>16.1f}\n", experts, nanoseconds(0), nanoseconds(1),
               nanoseconds(2));
  }
}

/// Routing and the whole layer in turns, d = 2048, 512 tokens, rank 16.
void share_of_layer(Index experts) {
  constexpr Index kWidth = 2048, kTokens = 512, kRank = 16;
  using Bank = LoraBank<float>;
  const Bank bank({.in = kWidth,
                   .out = kWidth,
                   .rank = std::vector<Index>(static_cast<std::size_t>(experts), kRank),
                   .scale = std::vector<float>(static_cast<std::size_t>(experts), 1.0f)});
  const AdaptedLinear layer(
      Mixture(TopKRouter<float>({.width = kWidth, .experts = experts, .k = 2}), bank));
  using Layer = std::remove_const_t<decltype(layer)>;
  OwnedWeights<Layer> weights(layer);
  weights.leave_out("bias");
  std::uint64_t seed = 2;
  Layer::Params<float>::visit(
      [&](const Leaf&, const MatView<float>& view) {
        for (Index r = 0; r < view.rows; ++r) {
          std::ranges::copy(normal(view.cols, ++seed, 0.02f), view.row(r).begin());
        }
      },
      weights.params());
  const std::vector<float> x = normal(kTokens * kWidth, 1, 1.0f);
  std::vector<float> y(x.size());
  const MatView<const float> in(x.data(), kTokens, kWidth);
  Session session(layer, typename Layer::Weights(weights.params()),
                  {.max_tokens = kTokens, .workers = 1});
  Context context = session.context();
  Buffer memory(layer.router().prepared_bytes() +
                RoutingTable<float>::bytes(kTokens, experts, layer.router().max_per_token()));
  Workspace workspace(memory.span());
  const auto router = layer.router().prepare(weights.params().mixture.router, workspace);
  auto table = layer.make_table(workspace, kTokens);
  const auto seconds = bench::interleaved(
      {[&] { layer.router().forward(router, {}, {.x = in}, {}, {}, table, {}, nullptr, context); },
       [&] {
         session.forward(in, {y.data(), kTokens, kWidth});
       }},
      7, 0.2);
  fmt::print("{:>8} {:>14.2f} {:>14.2f} {:>9.1f} %\n", experts, seconds[0] * 1e3, seconds[1] * 1e3,
             100 * seconds[0] / seconds[1]);
}

}  // namespace

int main() {
  decision_alone();
  fmt::print("\nwidth 2048, 512 tokens, rank 16, top-2\n{:>8} {:>14} {:>14} {:>11}\n", "experts",
             "router, ms", "layer, ms", "share");
  for (const Index experts : {8, 64}) share_of_layer(experts);
}
