// SPDX-License-Identifier: Apache-2.0
// Training a router from scratch: it sees activations of four kinds of text and must learn which
// adapter to send each token to, from nothing but the outputs that the right adapter gives.
//
//   loss = mean over tokens of ‖y - target‖² + 0.01 · balance loss, minimised with AdamW
#include <fmt/core.h>

#include "mole/core/random.hpp"
#include "mole/io/peft_bank.hpp"
#include "mole/layers/adapted_linear.hpp"
#include "mole/layers/session.hpp"
#include "mole/losses/balance.hpp"
#include "mole/optim/adamw.hpp"
#include "mole/routers/top_k.hpp"
#include "support/recording.hpp"

using namespace mole;
using Layer = AdaptedLinear<Mixture<TopKRouter<float>, LoraBank<float>>>;

int main() {
  const std::string data = MOLE_EXAMPLE_DATA;
  const std::vector<std::string> names = {"german", "kjv", "python", "cpp"};
  const Recording recorded(data + "/layer.safetensors");
  std::vector<PeftAdapter> adapters;
  for (const auto& name : names) adapters.push_back(load_peft(data + "/adapters/" + name));
  const AdapterBank<float> experts(adapters, "model.layers.20.mlp.down_proj");
  const auto base = recorded.matrix("base.weight"), x = recorded.matrix("in.x");
  const auto labels = recorded.labels();

  // Target of token t: the recorded output of the adapter of its own text.
  Recording::Matrix target(64, 576), y(64, 576), dy(64, 576);
  for (std::size_t e = 0; e < names.size(); ++e) {
    const auto output = recorded.matrix("out.y." + names[e]);
    for (Index t = 0; t < 64; ++t) {
      if (labels[t] == static_cast<std::int64_t>(e)) {
        std::ranges::copy(output.view().row(t), target.view().row(t).begin());
      }
    }
  }

  // Router weights, their gradient and the two moments of AdamW are the same kind of struct.
  Recording::Matrix weight(4, 1536), d_weight(4, 1536), first(4, 1536), second(4, 1536);
  const Random random(2026);
  for (Index i = 0; i < 4 * 1536; ++i) weight.view().data[i] = 0.02f * random.normal(i);
  const LinearParams<float> router{weight.view(), {}}, grad{d_weight.view(), {}};
  const LinearParams<float> moment1{first.view(), {}}, moment2{second.view(), {}};
  const Layer::Weights weights{base.view(), {}, {router, experts.weights()}};
  Layer layer(Mixture(TopKRouter<float>({.width = 1536, .experts = 4, .k = 2}), experts.bank()));
  Session session(std::move(layer), weights, {.max_tokens = 64, .training = true});

  int right = 0;
  for (int step = 1; step <= 120; ++step) {
    session.update(weights);
    session.forward(x.view(), y.view());
    float loss = 0;
    for (Index i = 0; i < y.view().size(); ++i) {
      const float difference = y.view().data[i] - target.view().data[i];
      dy.view().data[i] = 2 * difference / 64;
      loss += difference * difference / 64;
    }
    const float balance =
        balance_loss<float>({.weight = 0.01f}, session.routing(), session.tape().router.prob,
                            session.d_tape().prob, session.context());
    params::zero(grad);
    session.backward(weights, x.view(), dy.view(), {}, {{}, {}, {grad, {}}});
    adamw_step(router, grad, moment1, moment2, {.learning_rate = 2e-3}, step);

    right = tokens_sent_right(session.routing(), labels);
    if (step % 10 == 0 || step == 1) {
      fmt::print("step {:3}  loss {:9.6f}  balance {:.4f}  tokens sent right {}/64\n", step, loss,
                 balance, right);
    }
  }
  fmt::print("Final accuracy {:.1f} %\n", right / 0.64);
  return right >= 58 ? 0 : 1;
}
