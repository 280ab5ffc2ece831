// SPDX-License-Identifier: Apache-2.0
// Golden cases inside unit tests: inputs and true answers of one file in tests/skeletons/cases.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "mole/core/view.hpp"

namespace skeleton {

using mole::Index;
using mole::MatView;

class GoldenCase {
 public:
  /// Throws std::runtime_error if the file is missing or malformed.
  explicit GoldenCase(const std::string& name);

  /// Names of the cases that start with `prefix`, sorted.
  static std::vector<std::string> names(const std::string& prefix);

  bool has(const std::string& tensor) const { return tensors_.contains(tensor); }
  Index extent(const std::string& tensor, std::size_t axis) const;
  double number(const std::string& key) const { return numbers_.at(key); }
  const std::string& text(const std::string& key) const { return texts_.at(key); }

  /// [product of the leading dimensions, last dimension]; a vector is one row. A tensor that the
  /// case lacks is an empty view.
  MatView<const double> matrix(const std::string& tensor) const;
  /// Entry `i` of the leading dimension, as `matrix`.
  MatView<const double> slice(const std::string& tensor, Index i) const;

  /// Empty if every element is within the tolerance of the case, else the worst one.
  std::string difference(const std::string& tensor, MatView<const double> got) const;
  std::string slice_difference(const std::string& tensor, Index i, MatView<const double> got) const;

 private:
  struct Tensor {
    std::vector<Index> shape;
    std::vector<double> values;
  };
  std::string compare(const std::string& what, MatView<const double> expected,
                      MatView<const double> got) const;

  std::map<std::string, Tensor> tensors_;
  std::map<std::string, double> numbers_;
  std::map<std::string, std::string> texts_;
  double relative_ = 0, absolute_ = 0;
};

}  // namespace skeleton
