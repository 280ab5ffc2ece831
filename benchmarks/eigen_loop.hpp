// SPDX-License-Identifier: Apache-2.0
// The peer: what one writes with Eigen alone. Compiled with the machine's own flags.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace peer {

class EigenLayer {
 public:
  /// weight [out, in], down per expert [rank, in], up per expert [out, rank]; all row-major.
  EigenLayer(int in, int out, int rank, int experts, const std::vector<float>& weight,
             const std::vector<float>& down, const std::vector<float>& up, float scale);
  ~EigenLayer();

  /// y = x Wᵀ
  void base(const std::vector<float>& x, int tokens, std::vector<float>& y) const;

  /// y += for every expert: gather its tokens, two products, scatter the gated sum.
  void mixture(const std::vector<float>& x, int tokens, const std::vector<std::int32_t>& expert,
               const std::vector<float>& gate, int per_token, std::vector<float>& y) const;

 private:
  struct Weights;
  std::unique_ptr<Weights> weights_;
};

}  // namespace peer
