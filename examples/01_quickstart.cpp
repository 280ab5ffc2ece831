// SPDX-License-Identifier: Apache-2.0
// Four LoRA adapters of one language model, mixed token by token on one of its linear layers, and
// checked against PEFT. Prints who worked on what and writes the picture 01_quickstart.svg.
#include <fmt/core.h>

#include <chrono>
#include <fstream>
#include <nlohmann/json.hpp>

#include "mole/io/peft_bank.hpp"
#include "mole/layers/adapted_linear.hpp"
#include "mole/layers/session.hpp"
#include "mole/routers/dense.hpp"
#include "mole/routers/top_k.hpp"
#include "mole/stats/routing_svg.hpp"
#include "support/recording.hpp"

using namespace mole;
using Names = std::vector<std::string>;

int main() {
  const std::string data = MOLE_EXAMPLE_DATA;
  const std::string module = "model.layers.20.mlp.down_proj";
  const Names names = {"german", "kjv", "python", "cpp"};

  // The layer: base weight, four adapters, a router that was trained on the recorded activations.
  const Recording recorded(data + "/layer.safetensors");
  std::vector<PeftAdapter> adapters;
  for (const auto& name : names) adapters.push_back(load_peft(data + "/adapters/" + name));
  const AdapterBank<float> experts(adapters, module);
  const auto base = recorded.matrix("base.weight"), router = recorded.matrix("router.weight");
  const auto x = recorded.matrix("in.x");
  const auto layer_with = [&](auto gate) {
    return AdaptedLinear(Mixture(std::move(gate), experts.bank()));
  };
  Session top2(layer_with(TopKRouter<float>({.width = 1536, .experts = 4, .k = 2})),
               {base.view(), {}, {{router.view()}, experts.weights()}});
  Session dense(layer_with(DenseRouter<float>({.width = 1536, .experts = 4})),
                {base.view(), {}, {{router.view()}, experts.weights()}});

  // One call; the same call with only one adapter allowed, or none; the dense mixture.
  Recording::Matrix y(64, 576);
  double worst = 0;
  const auto compare = [&](auto& session, const std::string& output, Overrides<float> overrides) {
    LayerInput<float> input(x.view());
    input.overrides = overrides;
    session.forward(input, y.view());
    const double error = recorded.worst_error(output, y);
    fmt::print("  {:<10} {:.1e}\n", output, error);
    if (!(error <= worst)) worst = error;
  };
  fmt::print("Largest error against PEFT in double, relative to the largest value of the row\n");
  for (std::size_t e = 0; e < names.size(); ++e) {
    const std::vector<std::int32_t> only(64, static_cast<std::int32_t>(e));
    compare(top2, "out.y." + names[e], {.forced = only});
  }
  const std::vector<std::uint8_t> all(4, 1);
  compare(top2, "out.y.base", {.forbidden = MatView<const std::uint8_t>(all.data(), 1, 4)});
  compare(dense, "out.y.dense", {});
  worst = std::max(worst, recorded.worst_gate_error("out.prob", dense.routing()));
  compare(top2, "out.y.top2", {});
  worst = std::max(worst, recorded.worst_gate_error("out.gate", top2.routing()));

  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < 100; ++i) top2.forward(x.view(), y.view());
  const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
  fmt::print("Worst of all, gates included: {:.1e}\n\nTime: {:.1f} microseconds a token\n\n", worst,
             time.count() / 100 / 64 * 1e6);
  print_mean_gates(top2.routing(), recorded.labels(), names);
  const auto picture = routing_svg<float>(
      top2.routing(), recorded.token_texts(), names,
      {.title = "Who works on which token: top-2 of four adapters", .row_titles = names});
  std::ofstream("01_quickstart.svg") << picture;
  fmt::print("\nPicture: 01_quickstart.svg\n");
  return worst <= 5e-6 ? 0 : 1;
}
