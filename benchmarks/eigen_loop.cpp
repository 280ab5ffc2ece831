// SPDX-License-Identifier: Apache-2.0
#include "eigen_loop.hpp"

#include <Eigen/Dense>

namespace peer {

using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using Map = Eigen::Map<Matrix>;
using ConstMap = Eigen::Map<const Matrix>;

struct EigenLayer::Weights {
  Matrix base;                   // [in, out]
  std::vector<Matrix> down, up;  // [in, rank], [rank, out]: the layouts that suit Eigen best
  mutable Matrix rows, hidden, result;
  mutable std::vector<std::vector<int>> slots;
};

EigenLayer::EigenLayer(int in, int out, int rank, int experts, const std::vector<float>& weight,
                       const std::vector<float>& down, const std::vector<float>& up, float scale)
    : weights_(std::make_unique<Weights>()) {
  weights_->base = ConstMap(weight.data(), out, in).transpose();
  weights_->slots.resize(static_cast<std::size_t>(experts));
  for (int e = 0; e < experts; ++e) {
    weights_->down.emplace_back(ConstMap(down.data() + e * rank * in, rank, in).transpose());
    weights_->up.emplace_back(scale * ConstMap(up.data() + e * rank * out, out, rank).transpose());
  }
}

EigenLayer::~EigenLayer() = default;

void EigenLayer::base(const std::vector<float>& x, int tokens, std::vector<float>& y) const {
  const Matrix& w = weights_->base;
  Map(y.data(), tokens, w.cols()).noalias() = ConstMap(x.data(), tokens, w.rows()) * w;
}

void EigenLayer::mixture(const std::vector<float>& x, int tokens,
                         const std::vector<std::int32_t>& expert, const std::vector<float>& gate,
                         int per_token, std::vector<float>& y) const {
  Weights& w = *weights_;
  const ConstMap in(x.data(), tokens, w.base.rows());
  Map out(y.data(), tokens, w.base.cols());
  for (auto& list : w.slots) list.clear();
  for (int s = 0; s < tokens * per_token; ++s) w.slots[expert[s]].push_back(s);
  for (std::size_t e = 0; e < w.slots.size(); ++e) {
    const auto& list = w.slots[e];
    const auto count = static_cast<Eigen::Index>(list.size());
    if (count == 0) continue;
    w.rows.resize(count, in.cols());
    for (Eigen::Index i = 0; i < count; ++i) w.rows.row(i) = in.row(list[i] / per_token);
    w.hidden.noalias() = w.rows * w.down[e];
    w.result.noalias() = w.hidden * w.up[e];
    for (Eigen::Index i = 0; i < count; ++i) {
      out.row(list[i] / per_token) += gate[list[i]] * w.result.row(i);
    }
  }
}

}  // namespace peer
