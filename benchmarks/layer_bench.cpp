// SPDX-License-Identifier: Apache-2.0
// How fast is a layer (base product + top-2 mixture of LoRA experts, float)?
//
//   mixture / Eigen   the mixture alone against a gather-and-GEMM loop in Eigen
//   layer / Eigen     base + mixture against Eigen's base product + that loop
//   layer / base      base + mixture against the library's own base product alone
//
// usage: layer_bench [workers]      one worker unless said; Eigen's loop always uses one thread
#include <fmt/core.h>

#include <cstdlib>
#include <vector>

#include "eigen_loop.hpp"
#include "interleaved.hpp"
#include "mole/core/random.hpp"
#include "mole/experts/lora_bank.hpp"
#include "mole/kernels/dense.hpp"

namespace {

using mole::Index;
using mole::MatView;

std::vector<float> normals(std::uint64_t stream, Index count, double sd) {
  const mole::Random random(1, stream);
  std::vector<float> values;
  for (Index i = 0; i < count; ++i) values.push_back(static_cast<float>(sd * random.normal(i)));
  return values;
}

struct Shape {
  int tokens, experts, rank, width;
};

void run(const Shape& s, int workers) {
  constexpr int kPerToken = 2;
  const Index d = s.width;
  const auto x = normals(0, s.tokens * d, 1), weight = normals(1, d * d, 0.02);
  const auto down = normals(2, s.experts * s.rank * d, 0.02);
  const auto up = normals(3, s.experts * s.rank * d, 0.02);
  std::vector<float> y(static_cast<std::size_t>(s.tokens * d));
  std::vector<float> y_eigen(y.size());

  const mole::LoraBank<float> bank({.in = d,
                                    .out = d,
                                    .rank = std::vector<Index>(s.experts, s.rank),
                                    .scale = std::vector<float>(s.experts, 2.0f)});
  std::vector<const float*> downs, ups;
  for (int e = 0; e < s.experts; ++e) {
    downs.push_back(down.data() + e * s.rank * d);
    ups.push_back(up.data() + e * s.rank * d);
  }
  const mole::LoraBankParams<const float> weights{
      .in = d, .out = d, .rank = bank.config().rank, .down = downs, .up = ups};
  mole::Buffer prepared_memory(bank.prepared_bytes());
  mole::Workspace prepared_workspace(prepared_memory.span());
  const auto prepared = bank.prepare(weights, prepared_workspace);
  std::vector<float> packed(weight.size());
  const auto panels = mole::pack_panels(MatView<const float>(weight.data(), d, d), packed.data());

  mole::Buffer table_memory(mole::RoutingTable<float>::bytes(s.tokens, s.experts, kPerToken));
  mole::Workspace table_workspace(table_memory.span());
  mole::RoutingTable<float> table(table_workspace, s.tokens, s.experts, kPerToken);
  const mole::Random random(7);
  std::vector<std::int32_t> expert;
  const std::vector<float> gate(static_cast<std::size_t>(s.tokens * kPerToken), 0.5f);
  table.begin(s.tokens);
  for (int t = 0; t < s.tokens; ++t) {
    const auto first = static_cast<std::int32_t>(random.below(2 * t, s.experts));
    const auto step = static_cast<std::int32_t>(random.below(2 * t + 1, s.experts - 1));
    const std::int32_t pair[] = {first, (first + 1 + step) % s.experts};
    expert.insert(expert.end(), pair, pair + 2);
    table.select(t, pair, std::span(gate).first(2));
  }
  table.finish();

  mole::Buffer scratch_memory(bank.scratch_bytes(s.tokens, s.tokens * kPerToken, workers));
  mole::Workspace scratch(scratch_memory.span());
  const mole::Context context{.scratch = scratch, .workers = workers};
  const peer::EigenLayer eigen(s.width, s.width, s.rank, s.experts, weight, down, up, 2.0f);
  const MatView<const float> in(x.data(), s.tokens, d);
  const MatView<float> out(y.data(), s.tokens, d);

  const auto base = [&] { mole::dense::forward<float>(panels, {}, in, out, context); };
  const auto mixture = [&] {
    bank.forward(prepared, {.x = in}, table.view(), out, nullptr, context);
  };
  const auto eigen_base = [&] { eigen.base(x, s.tokens, y_eigen); };
  const auto eigen_mixture = [&] { eigen.mixture(x, s.tokens, expert, gate, kPerToken, y_eigen); };
  const auto time = bench::interleaved({mixture, eigen_mixture, base,
                                        [&] {
                                          base();
                                          mixture();
                                        },
                                        [&] {
                                          eigen_base();
                                          eigen_mixture();
                                        }});
  const double flops = 4.0 * s.tokens * kPerToken * s.rank * d;
  fmt::print(
      "{:5} {:3} {:3} {:5} | {:9.1f} {:9.1f} {:9.1f} | {:8.2f} {:8.2f} {:8.2f} | {:6.1f} {:6.1f}\n",
      s.tokens, s.experts, s.rank, s.width, time[0] * 1e6, time[2] * 1e6, time[3] * 1e6,
      time[0] / time[1], time[3] / time[4], time[3] / time[2], flops / time[0] * 1e-9,
      2.0 * s.tokens * d * d / time[2] * 1e-9);
}

}  // namespace

int main(int argc, char** argv) {
  const int workers = argc > 1 ? std::atoi(argv[1]) : 1;
  fmt::print("{} worker(s), top-2, float; times in microseconds, medians of interleaved runs\n",
             workers);
  fmt::print(
      "    T   E   r     d |   mixture      base     layer |  mixture    layer    layer | GF/s:    "
      " \n");
  fmt::print(
      "                    |                               |  / Eigen  / Eigen   / base | mixture "
      "base\n");
  for (const int width : {576, 2048}) {
    for (const int rank : {8, 16}) {
      for (const int experts : {4, 8, 64}) {
        for (const int tokens : {1, 16, 128, 512}) run({tokens, experts, rank, width}, workers);
      }
    }
  }
}
