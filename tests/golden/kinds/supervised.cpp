// SPDX-License-Identifier: Apache-2.0
// Losses with right answers, and the rules that balance without a loss.
#include <string>
#include <vector>

#include "golden/golden.hpp"
#include "golden/kinds/router_run.hpp"
#include "mole/losses/supervised.hpp"
#include "mole/routers/deepseek.hpp"
#include "mole/routing/balance_bias.hpp"

namespace {

using golden::Case;
using mole::Index;
using mole::MatView;

template <class T>
void specified_expert(Case<T>& c) {
  const MatView<const T> logits = c.matrix("in.logits");
  const MatView<T> dlogits = golden::zeros(c, logits.rows, logits.cols);
  c.expect("out.loss", mole::domain_loss<T>(1, logits, c.ints("in.domain"), dlogits, c.context()));
  c.expect("grad.in.logits", dlogits);
}
GOLDEN_KIND("loss.specified_expert", specified_expert);

template <class T>
void correctness_bce(Case<T>& c) {
  const MatView<const T> logits = c.matrix("in.logits");
  const MatView<T> dlogits = golden::zeros(c, logits.rows, logits.cols);
  const std::vector<std::uint8_t> correct = c.mask("in.correct");
  c.expect("out.loss", mole::correctness_loss<T>(
                           1, logits, {correct.data(), logits.rows, logits.cols}, dlogits));
  c.expect("grad.in.logits", dlogits);
}
GOLDEN_KIND("loss.correctness_bce", correctness_bce);

template <class T>
void dmoerm_pairwise(Case<T>& c) {
  const auto rank = c.template copy<std::int64_t>("in.rank");
  std::vector<T> dreward(rank.size());
  const auto loss = c.template config<std::string>("loss");
  const bool log_sigmoid = loss == "logsigmoid";
  c.check(log_sigmoid || loss == "direct", "unknown loss " + loss);
  c.expect("out.loss", mole::ranking_loss<T>(c.values("in.reward"), rank, log_sigmoid, dreward));
  c.expect("grad.in.reward", dreward);
}
GOLDEN_KIND("loss.dmoerm_pairwise", dmoerm_pairwise);

template <class T>
void triplet_cosine(Case<T>& c) {
  const MatView<const T> anchor = c.matrix("in.anchor");
  const auto zeros = [&] { return golden::zeros(c, anchor.rows, anchor.cols); };
  const MatView<T> da = zeros(), dp = zeros(), dn = zeros();
  c.expect("out.loss",
           mole::triplet_loss<T>(c.template config<T>("margin"), anchor, c.matrix("in.positive"),
                                 c.matrix("in.negative"), da, dp, dn));
  c.expect("grad.in.anchor", da);
  c.expect("grad.in.positive", dp);
  c.expect("grad.in.negative", dn);
}
GOLDEN_KIND("loss.triplet_cosine", triplet_cosine);

template <class T>
std::vector<T> bias_of(Case<T>& c) {
  const auto values = c.values("state.bias");
  return {values.begin(), values.end()};
}

template <class T>
void sign(Case<T>& c) {
  const auto all = c.template copy<std::int64_t>("in.counts");
  std::vector<T> bias = bias_of(c);
  std::vector<std::int64_t> counts(bias.size());
  for (std::size_t i = 0; i < all.size(); ++i) counts[i % counts.size()] += all[i];
  mole::update_selection_bias<T>(c.template config<double>("rate"), counts, bias);
  c.expect("out.state.bias", bias);
}
GOLDEN_KIND("bias_update.sign", sign);

template <class T>
void sign_selected(Case<T>& c) {
  std::vector<T> bias = bias_of(c);
  const std::vector<std::int32_t> selected = c.ints("in.selected");
  const std::vector<std::uint8_t> mask = golden::token_mask(c);
  const Index tokens = c.extent("in.selected", 0), k = c.extent("in.selected", 1);
  mole::RoutingTable<T> table(c.memory(), tokens, static_cast<Index>(bias.size()), k);
  const std::vector<T> ones(static_cast<std::size_t>(k), T(1));
  table.begin(tokens);
  for (Index t = 0; t < tokens; ++t) {
    table.select(t, std::span(selected).subspan(static_cast<std::size_t>(t * k), ones.size()),
                 ones);
  }
  table.finish();
  std::vector<std::int64_t> counts(bias.size());
  mole::count_tokens<T>(table.view(), counts, mask);
  mole::update_selection_bias<T>(c.template config<double>("rate"), counts, bias);
  c.expect("out.counts", counts);
  c.expect("out.state.bias", bias);
}
GOLDEN_KIND("bias_update.sign_selected", sign_selected);

template <class T>
void smora(Case<T>& c) {
  using Router = mole::DeepSeekRouter<T>;
  std::vector<T> bias = bias_of(c);
  const MatView<const T> x = golden::router_input(c);
  c.expect_option("score", "sigmoid");
  typename Router::Buffers buffers;
  buffers.selection_bias = c.values("state.bias");
  golden::RouterRun<Router> run(c,
                                Router({.width = x.cols,
                                        .experts = static_cast<Index>(bias.size()),
                                        .k = c.template config<Index>("k"),
                                        .bias = golden::has_router_bias(c)}),
                                golden::router_weights(c, static_cast<Index>(bias.size())), buffers,
                                {.x = x});
  std::vector<std::int64_t> counts(bias.size());
  mole::count_tokens<T>(run.routing, counts);
  if (c.template config<bool>("training")) {
    mole::update_selection_bias<T>(c.template config<double>("rate"), counts, bias);
  }
  c.expect("out.mask", run.dense(true));
  if (c.has("out.logits")) c.expect("out.logits", run.tape.logits);
  c.expect("out.counts", counts);
  c.expect("out.state.bias", bias);
}
GOLDEN_KIND("bias_update.smora", smora);

template <class T>
void remoe_coef(Case<T>& c) {
  const MatView<const T> logits = c.matrix("in.logits");
  const double share = mole::sparsity(logits);
  c.expect("out.sparsity", share);
  c.expect("out.state.coef", mole::update_sparsity_weight(
                                 c.scalar("state.coef"), c.template config<double>("multiplier"),
                                 share, c.template config<double>("target_k"), logits.cols));
}
GOLDEN_KIND("bias_update.remoe_coef", remoe_coef);

}  // namespace
