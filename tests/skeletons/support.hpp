// SPDX-License-Identifier: Apache-2.0
// What the skeleton tests share: memory, random matrices with rows longer than their columns, and
// gradients against difference quotients.
#pragma once

#include <algorithm>
#include <string>

#include "mole/core/context.hpp"
#include "mole/core/params.hpp"
#include "mole/core/random.hpp"
#include "mole/core/view.hpp"
#include "mole/core/workspace.hpp"
#include "support/gradcheck.hpp"

namespace skeleton {

using mole::Index;
using mole::MatView;
using test::weighted_sum;

class Memory {
 public:
  explicit Memory(std::uint64_t seed = 1) : random_(seed) {}

  MatView<double> zeros(Index rows, Index cols) {
    const MatView<double> block = workspace_.take<double>(rows, cols + 3);
    std::fill_n(block.data, block.size(), 0.0);
    return block.col_block(0, cols);
  }
  /// Uniform in (-scale, scale).
  MatView<double> random(Index rows, Index cols, double scale = 1) {
    const MatView<double> view = zeros(rows, cols);
    fill(view, scale);
    return view;
  }
  /// An empty view stays one.
  MatView<double> copy(MatView<const double> from) {
    if (from.data == nullptr) return {};
    const MatView<double> view = zeros(from.rows, from.cols);
    for (Index r = 0; r < from.rows; ++r) std::ranges::copy(from.row(r), view.row(r).begin());
    return view;
  }
  void fill(MatView<double> view, double scale = 1) {
    for (Index r = 0; r < view.rows; ++r) {
      for (double& value : view.row(r)) value = scale * (2 * random_.uniform(position_++) - 1);
    }
  }
  /// Every tensor of a parameter struct.
  template <class P>
  void fill_params(const P& params, double scale = 1) {
    P::visit([&](const mole::Leaf&, const auto& view) { fill(view, scale); }, params);
  }

  mole::Workspace& workspace() { return workspace_; }
  mole::Context context() { return {scratch_}; }
  /// From now on contexts have exactly this much scratch.
  void limit_scratch(std::size_t bytes) {
    scratch_block_ = mole::Buffer(bytes);
    scratch_ = mole::Workspace(scratch_block_.span());
  }

 private:
  mole::Buffer block_{std::size_t{1} << 24}, scratch_block_{std::size_t{1} << 22};
  mole::Workspace workspace_{block_.span()}, scratch_{scratch_block_.span()};
  mole::Random random_;
  std::uint64_t position_ = 0;
};

/// a += b.
inline void add(MatView<double> a, MatView<const double> b) {
  for (Index r = 0; r < a.rows; ++r) {
    for (Index c = 0; c < a.cols; ++c) a(r, c) += b(r, c);
  }
}

/// test::gradient_error with the name of what was varied.
template <class Loss>
std::string gradient_error(const std::string& name, MatView<double> at,
                           MatView<const double> gradient, Loss&& loss) {
  const std::string text = test::gradient_error(at, gradient, loss);
  return text.empty() ? text : name + text;
}

/// The same for every tensor of a parameter struct; the first that disagrees.
template <class P, class Loss>
std::string params_gradient_error(const P& at, const P& gradient, Loss&& loss) {
  std::string text;
  P::visit(
      [&](const mole::Leaf& leaf, const auto& view, const auto& d_view) {
        if (text.empty()) text = gradient_error(leaf.path(), view, d_view, loss);
      },
      at, gradient);
  return text;
}

}  // namespace skeleton
