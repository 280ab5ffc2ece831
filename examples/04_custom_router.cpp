// SPDX-License-Identifier: Apache-2.0
// Uses the router of 04_custom_router.hpp on the recorded activations. The same header passes the
// contract suite that the library's own routers pass (tests/examples/custom_router_test.cpp).
#include "04_custom_router.hpp"

#include <fmt/core.h>

#include "mole/io/peft_bank.hpp"
#include "mole/layers/mixture.hpp"
#include "mole/layers/session.hpp"
#include "support/recording.hpp"

int main() {
  const std::string data = MOLE_EXAMPLE_DATA;
  const std::vector<std::string> names = {"german", "kjv", "python", "cpp"};
  const Recording recorded(data + "/layer.safetensors");
  std::vector<mole::PeftAdapter> adapters;
  for (const auto& name : names) adapters.push_back(mole::load_peft(data + "/adapters/" + name));
  const mole::AdapterBank<float> experts(adapters, "model.layers.20.mlp.down_proj");
  const auto router = recorded.matrix("router.weight"), x = recorded.matrix("in.x");

  mole::Session session(
      mole::Mixture(ThresholdRouter<float>({.width = 1536, .experts = 4}), experts.bank()),
      {{router.view(), {}}, experts.weights()});
  Recording::Matrix y(64, 576);
  session.forward(x.view(), y.view());

  const auto routing = session.routing();
  std::vector<int> tokens_with(names.size() + 1);
  for (mole::Index t = 0; t < routing.tokens; ++t) {
    ++tokens_with[routing.token_begin[t + 1] - routing.token_begin[t]];
  }
  for (std::size_t count = 0; count < tokens_with.size(); ++count) {
    fmt::print("{:2} tokens asked for {} experts\n", tokens_with[count], count);
  }
  print_mean_gates(routing, recorded.labels(), names);
}
