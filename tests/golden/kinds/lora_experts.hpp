// SPDX-License-Identifier: Apache-2.0
// LoRA experts of a golden case: tensors A [..., experts, rank, in] and B [..., experts, out,
// rank], and their gradients.
#pragma once

#include <string>
#include <vector>

#include "golden/golden.hpp"
#include "golden/kinds/router_run.hpp"
#include "mole/experts/lora_bank.hpp"

namespace golden {

template <class T>
class LoraExperts {
 public:
  explicit LoraExperts(Case<T>& c, const std::string& prefix = "param.")
      : c_(c), prefix_(prefix), a_(c.matrix(prefix + "A")), b_(c.matrix(prefix + "B")) {
    const std::vector<Index>& shape = c.shape(prefix + "A");
    rank_ = b_.cols;
    out_ = c.shape(prefix + "B")[shape.size() - 2];
    experts = shape[shape.size() - 3];
    groups = a_.rows / (experts * rank_);
    config.in = a_.cols;
    config.out = out_;
    config.rank.assign(static_cast<std::size_t>(experts), rank_);
    config.scale.assign(static_cast<std::size_t>(experts), c.template config<T>("scaling"));
    da_ = zeros(c, a_.rows, a_.cols);
    db_ = zeros(c, b_.rows, b_.cols);
    for (Index e = 0; e < groups * experts; ++e) {
      down_.push_back(a_.row_block(e * rank_, rank_).data);
      up_.push_back(b_.row_block(e * out_, out_).data);
      d_down_.push_back(da_.row_block(e * rank_, rank_).data);
      d_up_.push_back(db_.row_block(e * out_, out_).data);
    }
  }

  /// Of one group, such as a layer.
  mole::LoraBankParams<const T> weights(Index group = 0) const {
    return {config.in, out_, config.rank, part(down_, group), part(up_, group), {}};
  }
  mole::LoraBankParams<T> gradient(Index group = 0) const {
    return {config.in, out_, config.rank, part(d_down_, group), part(d_up_, group), {}};
  }
  void expect_gradient() {
    c_.expect("grad." + prefix_ + "A", da_);
    c_.expect("grad." + prefix_ + "B", db_);
  }

  typename mole::LoraBank<T>::Config config;
  Index experts = 0, groups = 0;

 private:
  template <class V>
  std::span<V* const> part(const std::vector<V*>& all, Index group) const {
    return std::span<V* const>(all).subspan(static_cast<std::size_t>(group * experts),
                                            static_cast<std::size_t>(experts));
  }

  Case<T>& c_;
  std::string prefix_;
  MatView<const T> a_, b_;
  MatView<T> da_, db_;
  Index rank_ = 0, out_ = 0;
  std::vector<const T*> down_, up_;
  std::vector<T*> d_down_, d_up_;
};

}  // namespace golden
