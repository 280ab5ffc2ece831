// SPDX-License-Identifier: Apache-2.0
// The tensors of a recurrent cell in a golden case.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "golden/golden.hpp"
#include "golden/kinds/router_run.hpp"
#include "mole/routing/recurrent_cell.hpp"

namespace golden {

using mole::CellParams;

template <class T>
mole::CellKind cell_kind(Case<T>& c) {
  return c.template config<std::string>("cell") == "rnn" ? mole::CellKind::rnn
                                                         : mole::CellKind::gru;
}

inline std::vector<std::string> blocks(mole::CellKind kind) {
  return kind == mole::CellKind::rnn ? std::vector<std::string>{"n"}
                                     : std::vector<std::string>{"r", "z", "n"};
}

/// The tensors of a cell, stacked: either they are so in the case, or one tensor a block.
template <class T>
class CellTensors {
 public:
  CellTensors(Case<T>& c, mole::CellKind kind) : c_(c), kind_(kind) {
    stacked_ = c.has("param.weight_ih");
    params = {gather("param.weight_i"), gather("param.weight_h"), {}, {}};
    has_bias = c.has(stacked_ ? "param.bias_ih" : "param.bias_in");
    if (!has_bias) return;
    params.input_bias = gather("param.bias_i");
    params.hidden_bias = gather("param.bias_h");
  }

  void expect_gradient(const CellParams<T>& grad) {
    expect("grad.param.weight_i", grad.input_weight);
    expect("grad.param.weight_h", grad.hidden_weight);
    if (!has_bias) return;
    expect("grad.param.bias_i", grad.input_bias);
    expect("grad.param.bias_h", grad.hidden_bias);
  }

  CellParams<const T> params;
  bool has_bias = false;

 private:
  MatView<const T> gather(const std::string& name) {
    if (stacked_) return c_.matrix(name + "h");
    const auto names = blocks(kind_);
    const MatView<const T> first = c_.matrix(name + "n");
    const bool bias = name.find("bias") != std::string::npos;
    const auto count = static_cast<Index>(names.size());
    const MatView<T> all =
        bias ? zeros(c_, 1, count * first.cols) : zeros(c_, count * first.rows, first.cols);
    for (Index b = 0; b < count; ++b) {
      const MatView<const T> part = c_.matrix(name + names[b]);
      std::copy_n(part.data, part.size(), all.data + b * part.size());
    }
    return all;
  }

  void expect(const std::string& name, MatView<T> all) {
    if (stacked_) return c_.expect(name + "h", all);
    const auto names = blocks(kind_);
    const std::size_t size = static_cast<std::size_t>(all.size()) / names.size();
    for (std::size_t b = 0; b < names.size(); ++b) {
      c_.expect(name + names[b], std::span<const T>(all.data + b * size, size));
    }
  }

  Case<T>& c_;
  mole::CellKind kind_;
  bool stacked_ = false;
};

}  // namespace golden
