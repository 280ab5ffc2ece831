// SPDX-License-Identifier: Apache-2.0
// Routers that are fitted, not trained.
#include "mole/algebra/router_fit.hpp"

#include <vector>

#include "golden/golden.hpp"
#include "golden/kinds/router_run.hpp"

namespace {

using golden::Case;
using mole::Index;
using mole::MatView;

template <class T>
void mixer_fit(Case<T>& c) {
  const MatView<const T> contexts = c.matrix("in.contexts"), gate = c.matrix("state.gate");
  const Index count = contexts.rows, width = contexts.cols, experts = gate.cols;
  const bool has_bias = c.template config<bool>("use_bias");
  const MatView<T> centres = golden::zeros(c, experts, width);
  const MatView<const T> before = c.matrix("state.centroids");
  const MatView<T> weight = golden::zeros(c, experts, width), bias = golden::zeros(c, 1, experts);
  for (Index e = 0; e < experts; ++e) {
    for (Index i = 0; i < width; ++i) {
      centres(e, i) = before(e, i);
      weight(e, i) = gate(i, e);
    }
    if (has_bias) bias(0, e) = gate(width, e);
  }
  std::vector<std::int32_t> cluster(static_cast<std::size_t>(count)),
      expert(static_cast<std::size_t>(experts));
  const MatView<T> loss = golden::zeros(c, experts, experts),
                   target = golden::zeros(c, count, experts);
  const mole::RouterFit how{.max_iterations = c.template config<Index>("max_iter"),
                            .tolerance_abs = c.template config<double>("tol_abs"),
                            .tolerance_rel = c.template config<double>("tol_rel"),
                            .noise_level = c.template config<double>("noise_level")};
  const mole::RouterFitResult result = mole::fit_router<T>(
      how, {contexts, c.matrix("in.losses"), c.matrix("in.noise")}, centres,
      {weight, has_bias ? bias : MatView<T>()}, {cluster, expert, loss, target}, c.context());
  c.expect("out.updated", result.updated ? 1 : 0);
  c.expect("out.centroids_valid", result.updated ? 1 : 0);
  c.expect("out.iterations", result.iterations);
  c.expect("out.assignment", cluster);
  c.expect("out.chosen", expert);
  c.expect("out.cluster_loss", loss);
  c.expect("out.targets", target);
  c.expect("out.state.centroids", centres);
  const MatView<T> fitted = golden::zeros(c, gate.rows, experts);
  for (Index e = 0; e < experts; ++e) {
    for (Index i = 0; i < width; ++i) fitted(i, e) = weight(e, i);
    if (has_bias) fitted(width, e) = bias(0, e);
  }
  c.expect("out.state.gate", fitted);
}
GOLDEN_KIND("procedure.mixer_fit", mixer_fit);

}  // namespace
