// SPDX-License-Identifier: Apache-2.0
// Losses of given logits. The router of each kind makes scores and choices out of them and carries
// the gradient back.
#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "golden/golden.hpp"
#include "golden/kinds/dynmole.hpp"
#include "golden/kinds/router_run.hpp"
#include "mole/losses/balance.hpp"
#include "mole/losses/choice_balance.hpp"
#include "mole/losses/device_balance.hpp"
#include "mole/losses/entropy.hpp"
#include "mole/losses/importance.hpp"
#include "mole/losses/shifted_balance.hpp"
#include "mole/losses/soft_balance.hpp"
#include "mole/losses/sparsity.hpp"
#include "mole/losses/z_loss.hpp"
#include "mole/routers/deepseek.hpp"
#include "mole/routers/dense.hpp"
#include "mole/routers/learned_threshold.hpp"
#include "mole/routers/relu.hpp"
#include "mole/routers/threshold.hpp"
#include "mole/routers/top_k.hpp"
#include "mole/routers/top_p.hpp"
#include "mole/routers/tsallis.hpp"
#include "mole/routing/balance_bias.hpp"

namespace {

using golden::Case;
using golden::RouterRun;
using mole::BalanceLoss;
using mole::Index;
using mole::MatView;

/// Every layer of `in.logits` [layers, ..., experts] through a router of its own.
template <class T, class Router>
class Layers {
 public:
  Layers(Case<T>& c, const Router& router, Index layers) : c_(c) {
    const MatView<const T> logits = c.matrix("in.logits");
    const Index tokens = logits.rows / layers;
    grad_ = golden::zeros(c, logits.rows, logits.cols);
    for (Index l = 0; l < layers; ++l) {
      runs_.push_back(std::make_unique<RouterRun<Router>>(
          c, router, golden::router_weights(c, logits.cols), typename Router::Buffers{},
          mole::Tokens<T>{.x = logits.row_block(l * tokens, tokens)}));
    }
  }

  RouterRun<Router>& operator[](std::size_t l) { return *runs_[l]; }
  std::size_t size() const { return runs_.size(); }
  Index tokens() const { return runs_.front()->routing.tokens; }

  std::vector<mole::BalancedLayer<T>> balanced() {
    std::vector<mole::BalancedLayer<T>> all;
    for (auto& run : runs_) all.push_back({run->routing, run->tape.prob, run->d_tape.prob});
    return all;
  }

  void expect_gradient() {
    for (std::size_t l = 0; l < runs_.size(); ++l) {
      runs_[l]->backward();
      const MatView<T> dx = runs_[l]->dx;
      for (Index t = 0; t < dx.rows; ++t) {
        std::copy_n(dx.row(t).begin(), dx.cols,
                    grad_.row(static_cast<Index>(l) * dx.rows + t).begin());
      }
    }
    c_.expect("grad.in.logits", grad_);
  }

 private:
  Case<T>& c_;
  std::vector<std::unique_ptr<RouterRun<Router>>> runs_;
  MatView<T> grad_;
};

template <class T>
std::vector<std::uint8_t> mask_of(Case<T>& c) {
  return golden::token_mask(c);
}

template <class T>
Index experts(Case<T>& c) {
  return c.matrix("in.logits").cols;
}

template <class T>
mole::TopKRouter<T> top_k(Case<T>& c, Index k, mole::Score score = mole::Score::softmax) {
  return mole::TopKRouter<T>(
      {.width = experts(c), .experts = experts(c), .k = k, .score = score, .renormalise = false});
}

template <class T>
Index sequences_of(Case<T>& c) {
  const auto& shape = c.shape("in.logits");
  return shape[shape.size() - 3];
}

template <class T>
T number(Case<T>& c, const char* key) {
  return c.template config<T>(key);
}

template <class T>
void count(Case<T>& c, const mole::Routing<T>& routing, const std::vector<std::uint8_t>& mask,
           std::vector<double>& counts, bool zero_gates) {
  for (Index t = 0; t < routing.tokens; ++t) {
    if (!mask.empty() && mask[t] == 0) continue;
    for (Index s = routing.token_begin[t]; s < routing.token_begin[t + 1]; ++s) {
      counts[routing.expert[s]] += zero_gates || routing.gate[s] != T(0);
    }
  }
  static_cast<void>(c);
}

/// A balance loss over layers pooled, all that several kinds need.
template <class T, class Router>
void pooled(Case<T>& c, const Router& router, Index layers, BalanceLoss<T> loss) {
  Layers<T, Router> all(c, router, layers);
  const std::vector<std::uint8_t> mask = mask_of(c);
  loss.weight = c.config("coef", T(1));
  loss.mask = mask;
  loss.count_zero_gates = true;
  const auto balanced = all.balanced();
  c.expect("out.loss", mole::balance_loss<T>(loss, balanced, c.context()));
  if (c.has("out.counts")) {
    std::vector<double> counts(static_cast<std::size_t>(experts(c))), sums(counts.size());
    for (std::size_t l = 0; l < all.size(); ++l) {
      count(c, all[l].routing, mask, counts, true);
      for (Index t = 0; t < all.tokens(); ++t) {
        for (Index e = 0; e < experts(c) && (mask.empty() || mask[t] != 0); ++e) {
          sums[e] += all[l].tape.prob(t, e);
        }
      }
    }
    c.expect("out.counts", counts);
    if (c.has("out.prob_sum")) c.expect("out.prob_sum", sums);
  }
  all.expect_gradient();
}

template <class T>
void mixtral(Case<T>& c) {
  const Index layers = c.extent("in.logits", 0);
  pooled(c, top_k(c, c.template config<Index>("k")), layers, {});
}
GOLDEN_KIND("loss.mixtral", mixtral);

template <class T>
void rmoe_balance(Case<T>& c) {
  const Index layers = c.extent("in.logits", 0);
  pooled(c, top_k(c, c.template config<Index>("top_k")), layers, {});
}
GOLDEN_KIND("loss.rmoe_balance", rmoe_balance);

template <class T>
void sentence_balance(Case<T>& c) {
  pooled(c, top_k(c, 1), c.extent("in.logits", 0), {});
}
GOLDEN_KIND("loss.sentence_balance", sentence_balance);

template <class T>
void layer_mean(Case<T>& c) {
  const Index layers = c.extent("in.logits", 0);
  Layers<T, mole::TopKRouter<T>> all(c, top_k(c, c.template config<Index>("k")), layers);
  const std::vector<std::uint8_t> mask = mask_of(c);
  T sum = 0;
  for (std::size_t l = 0; l < all.size(); ++l) {
    const BalanceLoss<T> loss{.weight = c.config("coef", T(1)) / static_cast<T>(layers),
                              .mask = mask,
                              .count_zero_gates = true};
    sum += mole::balance_loss<T>(loss, all[l].routing, all[l].tape.prob, all[l].d_tape.prob,
                                 c.context());
  }
  c.expect("out.loss", sum);
  all.expect_gradient();
}
GOLDEN_KIND("loss.layer_mean", layer_mean);

template <class T>
void mole_top_k(Case<T>& c) {
  pooled(c, top_k(c, c.template config<Index>("k")), 1, {});
}
GOLDEN_KIND("loss.mole_top_k", mole_top_k);

template <class T>
void deepspeed_topk(Case<T>& c) {
  pooled(c, top_k(c, c.template config<Index>("k")), 1, {.load_per = mole::LoadPer::selection});
}
GOLDEN_KIND("loss.deepspeed_topk", deepspeed_topk);

template <class T>
void no_expert_factor(Case<T>& c) {
  pooled(c, top_k(c, c.template config<Index>("k")), 1, {.by_experts = false});
}
GOLDEN_KIND("loss.no_expert_factor", no_expert_factor);

template <class T>
void switch_loss(Case<T>& c) {
  const auto begin = golden::equal_sequences(c.matrix("in.logits").rows, sequences_of(c));
  pooled(c, top_k(c, 1), 1, {.sequence_begin = begin});
}
GOLDEN_KIND("loss.switch", switch_loss);

template <class T>
void llava_mole(Case<T>& c) {
  const Index layers = c.extent("in.logits", 0);
  const Index tokens = c.matrix("in.logits").rows / layers;
  const auto begin = golden::equal_sequences(tokens, c.extent("in.logits", 1));
  pooled(c, top_k(c, 1), layers, {.by_experts = false, .sequence_begin = begin});
}
GOLDEN_KIND("loss.llava_mole", llava_mole);

template <class T>
void mola(Case<T>& c) {
  const auto layers = c.template config<Index>("layers");
  const auto k = c.template config<std::vector<Index>>("k");
  const std::vector<std::uint8_t> mask = mask_of(c);
  T sum = 0;
  for (Index i = 0; i < layers; ++i) {
    const std::string name = "in.logits." + std::to_string(i);
    const MatView<const T> logits = c.matrix(name);
    const MatView<T> identity = golden::zeros(c, logits.cols, logits.cols);
    for (Index e = 0; e < logits.cols; ++e) identity(e, e) = T(1);
    const mole::TopKRouter<T> router({.width = logits.cols, .experts = logits.cols, .k = k[i]});
    RouterRun<mole::TopKRouter<T>> run(c, router, {identity, {}}, {}, {.x = logits});
    const BalanceLoss<T> loss{.weight = number(c, "coef"),
                              .load_per = mole::LoadPer::selection,
                              .mask = mask,
                              .count_zero_gates = true};
    sum += mole::balance_loss<T>(loss, run.routing, run.tape.prob, run.d_tape.prob, c.context());
    run.backward();
    c.expect("grad." + name, run.dx);
  }
  c.expect("out.loss", sum);
}
GOLDEN_KIND("loss.mola", mola);

template <class T>
void megatron_aux(Case<T>& c) {
  const mole::Score score = golden::score_named(c.template config<std::string>("score"));
  const auto k = c.template config<Index>("k");
  std::vector<std::int32_t> begin;
  if (c.template config<std::string>("scope") == "sequence") {
    begin = golden::equal_sequences(c.matrix("in.logits").rows, sequences_of(c));
  }
  pooled(c, top_k(c, k, score), 1,
         {.load_divisor = static_cast<T>(k),
          .normalise_scores = score != mole::Score::softmax,
          .sequence_begin = begin,
          .equal_sequences = c.has("in.mask")});
}
GOLDEN_KIND("loss.megatron_aux", megatron_aux);

template <class T>
void deepseek_aux(Case<T>& c) {
  const auto k = c.template config<Index>("k");
  std::vector<std::int32_t> begin;
  if (c.template config<bool>("seq_aux")) {
    begin = golden::equal_sequences(c.matrix("in.logits").rows, sequences_of(c));
  }
  pooled(c,
         mole::DeepSeekRouter<T>(
             {.width = experts(c),
              .experts = experts(c),
              .k = k,
              .score = golden::score_named(c.template config<std::string>("score")),
              .groups = c.template config<Index>("n_group"),
              .keep_groups = c.template config<Index>("topk_group"),
              .group_score_top = c.template config<Index>("group_score_top"),
              .fill_zero = c.config("group_fill", std::string("0")) == "0",
              .renormalise = false}),
         1, {.load_divisor = static_cast<T>(k), .sequence_begin = begin});
}
GOLDEN_KIND("loss.deepseek_aux", deepseek_aux);

template <class T>
void deepseek_levels(Case<T>& c) {
  Layers<T, mole::TopKRouter<T>> all(c, top_k(c, c.template config<Index>("k")), 1);
  const mole::DeviceBalance<T> loss{.k = c.template config<Index>("k"),
                                    .devices = c.template config<Index>("devices"),
                                    .device_limit = c.template config<Index>("device_limit"),
                                    .expert_weight = number(c, "alpha_expert"),
                                    .device_weight = number(c, "alpha_device"),
                                    .communication_weight = number(c, "alpha_communication")};
  const auto value = mole::device_balance_loss<T>(loss, all[0].routing, all[0].tape.prob,
                                                  all[0].d_tape.prob, c.context());
  c.expect("out.expert", value.expert);
  c.expect("out.device", value.device);
  c.expect("out.communication", value.communication);
  c.expect("out.loss", value.total);
  all.expect_gradient();
}
GOLDEN_KIND("loss.deepseek_levels", deepseek_levels);

template <class T>
mole::DenseRouter<T> dense(Case<T>& c) {
  return mole::DenseRouter<T>({.width = experts(c), .experts = experts(c)});
}

template <class T>
void gshard(Case<T>& c) {
  Layers<T, mole::DenseRouter<T>> all(c, dense(c), 1);
  const std::vector<std::uint8_t> mask = mask_of(c);
  const auto begin = golden::equal_sequences(all.tokens(), sequences_of(c));
  const mole::ChoiceBalance<T> loss{
      .weight = T(1) / number(c, "num_microbatches"),
      .second_weight = c.template config<bool>("second_place_loss") ? T(0.5) : T(0),
      .sequence_begin = begin};
  c.expect("out.loss", mole::choice_balance_loss<T>(loss, MatView<const T>(all[0].tape.prob),
                                                    all[0].d_tape.prob, c.context(), {mask}));
  all.expect_gradient();
}
GOLDEN_KIND("loss.gshard", gshard);

template <class T>
mole::TopPRouter<T> top_p(Case<T>& c, T temperature) {
  return mole::TopPRouter<T>({.width = experts(c),
                              .experts = experts(c),
                              .top_p = number(c, "top_p"),
                              .temperature = temperature == T(0) ? T(1) : temperature});
}

template <class T>
void mixlora_dynamic(Case<T>& c) {
  pooled(c, top_p(c, number(c, "temperature")), 1, {});
}
GOLDEN_KIND("loss.mixlora_dynamic", mixlora_dynamic);

template <class T>
void dynamic_moe(Case<T>& c) {
  Layers<T, mole::TopPRouter<T>> all(c, top_p(c, T(1)), 1);
  const std::vector<std::uint8_t> mask = mask_of(c);
  BalanceLoss<T> balance{.mask = mask, .count_zero_gates = true};
  mole::EntropyLoss<T> entropy{.entropy = {mole::EntropyKind::shannon, T(1), T(0), false}};
  const MatView<const T> prob = all[0].tape.prob;
  c.expect("out.balance", mole::balance_loss<T>(balance, all[0].routing, prob, {}, c.context()));
  c.expect("out.entropy_mean", mole::entropy_loss<T>(entropy, prob, {}, c.context(), {mask}));
  balance.weight = number(c, "balance_coef");
  entropy.weight = number(c, "entropy_coef");
  T loss = mole::balance_loss<T>(balance, all[0].routing, prob, all[0].d_tape.prob, c.context());
  loss += mole::entropy_loss<T>(entropy, prob, all[0].d_tape.prob, c.context(), {mask});
  c.expect("out.loss", loss);
  all.expect_gradient();
}
GOLDEN_KIND("loss.dynamic_moe", dynamic_moe);

template <class T>
void mole_threshold(Case<T>& c) {
  pooled(c,
         mole::ThresholdRouter<T>(
             {.width = experts(c), .experts = experts(c), .threshold = number(c, "threshold")}),
         1, {});
}
GOLDEN_KIND("loss.mole_threshold", mole_threshold);

template <class T>
void adamole(Case<T>& c) {
  Layers<T, mole::DenseRouter<T>> all(c, dense(c), 1);
  const std::vector<std::uint8_t> mask = mask_of(c);
  const mole::LearnedThresholdRule<T> rule{number(c, "max_threshold")};
  const MatView<const T> prob = all[0].tape.prob;
  std::vector<T> tau, dtau(static_cast<std::size_t>(all.tokens()));
  std::vector<double> counts(static_cast<std::size_t>(experts(c)));
  for (const T logit : c.values("in.threshold_logit")) tau.push_back(rule.threshold(logit));
  c.expect("out.loss", mole::shifted_balance_loss<T>(1, prob, tau, all[0].d_tape.prob, dtau,
                                                     c.context(), {mask}));
  for (Index t = 0; t < all.tokens(); ++t) {
    dtau[t] *= rule.threshold_slope(c.values("in.threshold_logit")[t]);
    for (Index e = 0; e < experts(c) && (mask.empty() || mask[t] != 0); ++e) {
      counts[e] += prob(t, e) >= tau[t];
    }
  }
  c.expect("out.counts", counts);
  c.expect("grad.in.threshold_logit", dtau);
  all.expect_gradient();
}
GOLDEN_KIND("loss.adamole", adamole);

/// The specialisation loss of LoRA-Mixer.
template <class T>
T specialisation(Case<T>& c, RouterRun<mole::TopKRouter<T>>& run, T alpha, T entropy_weight,
                 bool square, T k, const std::vector<std::uint8_t>& mask) {
  const MatView<const T> prob = run.tape.prob;
  const mole::EntropyLoss<T> entropy{-entropy_weight,
                                     {mole::EntropyKind::shannon, T(1), T(0), false}};
  const BalanceLoss<T> balance{.weight = alpha,
                               .mask = mask,
                               .count_zero_gates = true,
                               .load_divisor = k,
                               .by_experts = false};
  const T usage =
      square ? mole::square_usage_loss<T>(alpha, prob, run.d_tape.prob, c.context(), {mask})
             : mole::balance_loss<T>(balance, run.routing, prob, run.d_tape.prob, c.context());
  return usage + mole::entropy_loss<T>(entropy, prob, run.d_tape.prob, c.context(), {mask});
}

template <class T>
void lora_mixer(Case<T>& c) {
  const auto k = c.template config<Index>("k");
  Layers<T, mole::TopKRouter<T>> all(c, top_k(c, k), 1);
  const bool square = c.template config<std::string>("usage") == "prob_squared";
  c.expect("out.loss", specialisation(c, all[0], number(c, "alpha"), number(c, "entropy_coef"),
                                      square, static_cast<T>(k), mask_of(c)));
  all.expect_gradient();
}
GOLDEN_KIND("loss.lora_mixer", lora_mixer);

template <class T>
void lora_mixer_specialization(Case<T>& c) {
  const std::string usage = c.template config<std::string>("usage");
  const Index k = usage == "topk" ? c.template config<Index>("usage_k") : 1;
  Layers<T, mole::TopKRouter<T>> all(c, top_k(c, k), 1);
  T loss = specialisation(c, all[0], number(c, "alpha"), number(c, "lambda"), usage == "square",
                          static_cast<T>(k), {});
  const MatView<const T> prob = all[0].tape.prob;
  std::vector<double> share(static_cast<std::size_t>(experts(c)));
  if (usage == "square") {
    for (Index t = 0; t < prob.rows; ++t) {
      for (Index e = 0; e < prob.cols; ++e) share[e] += prob(t, e);
    }
  } else {
    count(c, all[0].routing, {}, share, true);
  }
  for (double& s : share) s /= static_cast<double>(prob.rows * k);
  c.expect("out.usage", share);
  const mole::EntropyLoss<T> mean{.entropy = {mole::EntropyKind::shannon, T(1), T(0), false}};
  c.expect("out.entropy", mole::entropy_loss<T>(mean, prob, {}, c.context()));
  if (c.has("param.theta")) {
    std::vector<T> dtheta;
    const T beta = number(c, "beta");
    for (std::size_t i = 0; i < c.values("param.theta").size(); ++i) {
      const T away = c.values("param.theta")[i] - c.values("state.theta0")[i];
      loss += beta * away * away;
      dtheta.push_back(2 * beta * away);
    }
    c.expect("grad.param.theta", dtheta);
  }
  c.expect("out.loss", loss);
  all.expect_gradient();
}
GOLDEN_KIND("loss.lora_mixer_specialization", lora_mixer_specialization);

template <class T>
void dynmole(Case<T>& c) {
  const mole::TsallisRouter<T> router(golden::dynmole_config(c, experts(c), experts(c), false));
  const mole::Entropy<T> how = golden::dynmole_entropy(router);
  Layers<T, mole::TsallisRouter<T>> all(c, router, c.extent("in.logits", 0));
  const std::vector<std::uint8_t> mask = mask_of(c);
  std::vector<mole::SoftBalancedLayer<T>> values, layers;
  T entropy = 0;
  for (std::size_t l = 0; l < all.size(); ++l) {
    const MatView<const T> prob = all[l].tape.prob;
    const T share = T(1) / static_cast<T>(all.size());
    entropy += mole::entropy_loss<T>({share, how}, prob, {}, c.context());
    mole::entropy_loss<T>({share * number(c, "dyn_coef"), how}, prob, all[l].d_tape.prob,
                          c.context());
    values.push_back({all[l].routing, prob, {}, {}});
    layers.push_back({all[l].routing, prob, all[l].d_tape.gate.row(0), all[l].d_tape.prob});
  }
  const double epsilon = mask.empty() ? 0 : 1e-8;
  const T balance = mole::soft_balance_loss<T>(1, values, c.context(), {mask}, epsilon);
  mole::soft_balance_loss<T>(number(c, "aux_coef"), layers, c.context(), {mask}, epsilon);
  c.expect("out.entropy_mean", entropy);
  c.expect("out.balance", balance);
  c.expect("out.loss", number(c, "dyn_coef") * entropy + number(c, "aux_coef") * balance);
  all.expect_gradient();
}
GOLDEN_KIND("loss.dynmole", dynmole);

template <class T>
void mixlora_switch(Case<T>& c) {
  Layers<T, mole::TopKRouter<T>> all(c, top_k(c, 1), 1);
  const std::vector<std::uint8_t> mask = mask_of(c);
  const BalanceLoss<T> balance{
      .weight = number(c, "aux_coef"), .mask = mask, .count_zero_gates = true};
  T loss = mole::balance_loss<T>(balance, all[0].routing, all[0].tape.prob, all[0].d_tape.prob,
                                 c.context());
  loss += mole::z_loss<T>(number(c, "z_coef"), MatView<const T>(all[0].tape.logits),
                          all[0].d_tape.logits, {mask});
  c.expect("out.loss", loss);
  all.expect_gradient();
}
GOLDEN_KIND("loss.mixlora_switch", mixlora_switch);

template <class T>
void router_z(Case<T>& c) {
  const MatView<const T> logits = c.matrix("in.logits");
  const MatView<T> dlogits = golden::zeros(c, logits.rows, logits.cols);
  const std::vector<std::uint8_t> mask = mask_of(c);
  c.expect("out.loss", mole::z_loss<T>(number(c, "coef"), logits, dlogits, {mask}));
  c.expect("grad.in.logits", dlogits);
}
GOLDEN_KIND("loss.router_z", router_z);

template <class T>
void loramoe(Case<T>& c) {
  Layers<T, mole::DenseRouter<T>> all(c, dense(c), 1);
  const std::vector<std::uint8_t> mask = mask_of(c);
  const std::vector<std::int32_t> types = c.ints("in.task_types");
  const auto begin = golden::equal_sequences(all.tokens(), sequences_of(c));
  const mole::LocalisedBalance<T> loss{number(c, "blc_weight"), number(c, "blc_alpha"), types,
                                       begin};
  c.expect("out.loss", mole::localised_balance_loss<T>(loss, MatView<const T>(all[0].tape.prob),
                                                       all[0].d_tape.prob, c.context(), {mask}));
  all.expect_gradient();
}
GOLDEN_KIND("loss.loramoe", loramoe);

template <class T>
void importance(Case<T>& c) {
  const MatView<const T> gate = c.matrix("in.gate");
  const MatView<T> dgate = golden::zeros(c, gate.rows, gate.cols);
  const std::vector<std::uint8_t> mask = mask_of(c);
  c.expect("out.loss", mole::importance_loss<T>({c.template config<double>("coef"),
                                                 c.template config<double>("epsilon")},
                                                gate, dgate, c.context(), {mask}));
  c.expect("grad.in.gate", dgate);
}
GOLDEN_KIND("loss.importance", importance);

template <class T>
void entropy(Case<T>& c) {
  Layers<T, mole::DenseRouter<T>> all(c, dense(c), 1);
  const std::vector<std::uint8_t> mask = mask_of(c);
  const std::string type = c.template config<std::string>("type");
  const mole::Entropy<T> how{type == "shannon"   ? mole::EntropyKind::shannon
                             : type == "tsallis" ? mole::EntropyKind::tsallis
                                                 : mole::EntropyKind::renyi,
                             number(c, "index"), number(c, "epsilon"),
                             c.template config<bool>("normalize")};
  const bool of_mean = c.template config<std::string>("of") == "mean_prob";
  const MatView<const T> prob = all[0].tape.prob;
  if (c.has("out.entropy")) {
    std::vector<T> values;
    for (Index t = 0; t < prob.rows; ++t) {
      values.push_back(mole::stages::entropy<T>(how, prob.row(t)));
    }
    c.expect("out.entropy", values);
  }
  c.expect("out.loss", mole::entropy_loss<T>({number(c, "coef"), how, of_mean}, prob,
                                             all[0].d_tape.prob, c.context(), {mask}));
  all.expect_gradient();
}
GOLDEN_KIND("loss.entropy", entropy);

template <class T>
void mutual_information(Case<T>& c) {
  Layers<T, mole::DenseRouter<T>> all(c, dense(c), 1);
  const std::vector<std::uint8_t> mask = mask_of(c);
  c.expect("out.loss",
           mole::mutual_information_loss<T>(number(c, "coef"), MatView<const T>(all[0].tape.prob),
                                            all[0].d_tape.prob, c.context(), {mask}));
  all.expect_gradient();
}
GOLDEN_KIND("loss.mutual_information", mutual_information);

template <class T>
void remoe_l1(Case<T>& c) {
  const mole::ReluRouter<T> router({.width = experts(c), .experts = experts(c)});
  Layers<T, mole::ReluRouter<T>> all(c, router, 1);
  const std::vector<std::uint8_t> mask = mask_of(c);
  const mole::SparsityLoss<T> loss{number(c, "coef"), number(c, "target_k"),
                                   c.template config<std::string>("form") == "balanced"};
  c.expect("out.loss", mole::sparsity_loss<T>(loss, MatView<const T>(all[0].tape.prob),
                                              all[0].d_tape.prob, c.context(), {mask}));
  all.expect_gradient();
}
GOLDEN_KIND("loss.remoe_l1", remoe_l1);

}  // namespace
