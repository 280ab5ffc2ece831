// SPDX-License-Identifier: Apache-2.0
// The recorded layer of examples/data: inputs, base weight, router, and the outputs that PEFT
// computed in double.
#pragma once

#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "mole/io/safetensors.hpp"
#include "mole/routing/routing.hpp"

class Recording {
 public:
  /// A matrix with its memory.
  class Matrix {
   public:
    Matrix(mole::Index rows, mole::Index cols)
        : rows_(rows), cols_(cols), values_(static_cast<std::size_t>(rows * cols)) {}
    mole::MatView<float> view() { return {values_.data(), rows_, cols_}; }
    mole::MatView<const float> view() const { return {values_.data(), rows_, cols_}; }

   private:
    mole::Index rows_, cols_;
    std::vector<float> values_;
  };

  explicit Recording(const std::string& path) : file_(mole::SafeTensors::open(path)) {}

  Matrix matrix(const std::string& name) const {
    const auto& shape = file_.at(name).shape;
    Matrix m(shape.at(0), shape.at(1));
    file_.read<float>(name, m.view());
    return m;
  }

  /// Index of the text, 0 ... 3, that each token comes from.
  std::vector<std::int64_t> labels() const { return file_.read<std::int64_t>("in.label"); }

  std::vector<std::string> token_texts() const {
    return nlohmann::json::parse(file_.metadata().at("case")).at("token_text");
  }

  /// Largest |y - recorded| over the largest |recorded| of its row.
  double worst_error(const std::string& name, const Matrix& y) const {
    const Matrix expected = matrix(name);
    double worst = 0;
    for (mole::Index t = 0; t < y.view().rows; ++t) {
      double difference = 0, scale = 0;
      for (mole::Index i = 0; i < y.view().cols; ++i) {
        const double e = expected.view()(t, i);
        const double d = std::abs(y.view()(t, i) - e);
        if (!(d <= difference)) difference = d;  // NaN too
        scale = std::max(scale, std::abs(e));
      }
      if (!(difference / scale <= worst)) worst = difference / scale;
    }
    return worst;
  }

  /// Largest gate difference; infinite if a token has other experts than recorded.
  double worst_gate_error(const std::string& name, const mole::Routing<float>& routing) const {
    Matrix difference = matrix(name);
    double worst = 0;
    for (mole::Index t = 0; t < routing.tokens; ++t) {
      for (auto s = routing.token_begin[t]; s < routing.token_begin[t + 1]; ++s) {
        float& left = difference.view()(t, routing.expert[s]);
        if (left == 0) return INFINITY;
        const double d = std::abs(left - routing.gate[s]);
        if (!(d <= worst)) worst = d;
        left = 0;
      }
      for (const float left : difference.view().row(t)) {
        if (left != 0) return INFINITY;
      }
    }
    return worst;
  }

 private:
  mole::SafeTensors file_;
};

/// Tokens whose largest gate is that of the expert of their own text.
inline int tokens_sent_right(const mole::Routing<float>& routing,
                             const std::vector<std::int64_t>& labels) {
  int right = 0;
  for (mole::Index t = 0; t < routing.tokens; ++t) {
    const auto best = std::max_element(routing.gate.begin() + routing.token_begin[t],
                                       routing.gate.begin() + routing.token_begin[t + 1]);
    right += routing.expert[best - routing.gate.begin()] == labels[t];
  }
  return right;
}

/// A table text x expert of mean gates.
inline void print_mean_gates(const mole::Routing<float>& routing,
                             const std::vector<std::int64_t>& labels,
                             const std::vector<std::string>& names) {
  fmt::print("Mean gate   ");
  for (const auto& name : names) fmt::print("{:>9}", name);
  for (std::size_t text = 0; text < names.size(); ++text) {
    std::vector<double> sum(names.size());
    double tokens = 0;
    for (mole::Index t = 0; t < routing.tokens; ++t) {
      if (labels[t] != static_cast<std::int64_t>(text)) continue;
      ++tokens;
      for (auto s = routing.token_begin[t]; s < routing.token_begin[t + 1]; ++s) {
        sum[routing.expert[s]] += routing.gate[s];
      }
    }
    fmt::print("\n{:<12}", names[text] + " text");
    for (const double s : sum) fmt::print("{:9.3f}", s / tokens);
  }
  fmt::print("\n");
}
