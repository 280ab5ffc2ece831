// SPDX-License-Identifier: Apache-2.0
// The lines at the top of the README, between the marks.
#include <fmt/core.h>

#include "mole/io/peft_bank.hpp"
#include "mole/layers/mixture.hpp"
#include "mole/layers/session.hpp"
#include "mole/routers/top_k.hpp"
#include "support/recording.hpp"

int main() {
  const std::string data = MOLE_EXAMPLE_DATA;
  const Recording recorded(data + "/layer.safetensors");
  const auto inputs = recorded.matrix("in.x"), weights = recorded.matrix("router.weight");
  Recording::Matrix outputs(64, 576);
  const auto x = inputs.view(), router = weights.view();
  const auto y = outputs.view();

  // [readme
  const std::vector<std::string> names = {"german", "kjv", "python", "cpp"};
  std::vector<mole::PeftAdapter> adapters;
  for (const auto& name : names) adapters.push_back(mole::load_peft(data + "/adapters/" + name));
  const mole::AdapterBank<float> experts(adapters, "model.layers.20.mlp.down_proj");

  mole::TopKRouter<float> top2({.width = 1536, .experts = 4, .k = 2});
  mole::Session layer(mole::Mixture(top2, experts.bank()), {{router}, experts.weights()});
  layer.forward(x, y);  // y += the mixture of every row of x

  const auto routing = layer.routing();  // who worked on token 0, and how much
  for (auto slot = routing.token_begin[0]; slot < routing.token_begin[1]; ++slot)
    fmt::print("{} {:.3f}\n", names[routing.expert[slot]], routing.gate[slot]);
  // readme]
}
