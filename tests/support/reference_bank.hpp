// SPDX-License-Identifier: Apache-2.0
// Low-rank experts as plain loops in double: slow, obvious, independent of the library's kernels.
//
//   y[row] += gate · scale (B A x[row] + β)     and its derivatives
#pragma once

#include <cmath>
#include <vector>

#include "mole/kernels/gated.hpp"
#include "support/matrix.hpp"
#include "support/slots.hpp"

namespace test {

struct ReferenceExpert {
  Matrix<double> down;  ///< [rank, in]
  Matrix<double> up;    ///< [out, rank]
  Matrix<double> bias;  ///< [1, out], or empty
  double scale = 1;
};

struct ReferenceCall {
  std::vector<ReferenceExpert> experts;
  Slots slots;  ///< ascending by expert
  mole::RowsBy x_rows = mole::RowsBy::token, y_rows = mole::RowsBy::token;
  Matrix<double> x, y, dy;  ///< y: before the call
};

struct ReferenceResult {
  Matrix<double> y, dx;
  std::vector<double> dgate;  ///< in slot order
  std::vector<ReferenceExpert> gradient;
};

/// Adds the slot number `s` of token `t`.
inline void add_slot(const ReferenceCall& call, Index t, Index s, const Slot& slot,
                     ReferenceResult& result) {
  const ReferenceExpert& e = call.experts[static_cast<std::size_t>(slot.expert)];
  ReferenceExpert& de = result.gradient[static_cast<std::size_t>(slot.expert)];
  const Index xr = call.x_rows == mole::RowsBy::token ? t : s;
  const Index yr = call.y_rows == mole::RowsBy::token ? t : s;
  const double q = slot.gate * e.scale;
  double dq = 0;
  for (Index r = 0; r < e.down.rows(); ++r) {
    double h = 0, v = 0;
    for (Index i = 0; i < e.down.cols(); ++i) h += e.down(r, i) * call.x(xr, i);
    for (Index o = 0; o < e.up.rows(); ++o) v += e.up(o, r) * call.dy(yr, o);
    dq += h * v;
    if (slot.gate == 0) continue;
    for (Index o = 0; o < e.up.rows(); ++o) {
      result.y(yr, o) += q * h * e.up(o, r);
      de.up(o, r) += q * call.dy(yr, o) * h;
    }
    for (Index i = 0; i < e.down.cols(); ++i) {
      result.dx(xr, i) += q * v * e.down(r, i);
      de.down(r, i) += q * v * call.x(xr, i);
    }
  }
  for (Index o = 0; o < e.bias.cols(); ++o) {
    dq += e.bias(0, o) * call.dy(yr, o);
    if (slot.gate == 0) continue;
    result.y(yr, o) += q * e.bias(0, o);
    de.bias(0, o) += q * call.dy(yr, o);
  }
  result.dgate.push_back(e.scale * dq);
}

inline ReferenceResult reference_bank(const ReferenceCall& call) {
  ReferenceResult result{call.y, Matrix<double>(call.x.rows(), call.x.cols()), {}, {}};
  for (const ReferenceExpert& e : call.experts) {
    result.gradient.push_back({Matrix<double>(e.down.rows(), e.down.cols()),
                               Matrix<double>(e.up.rows(), e.up.cols()),
                               Matrix<double>(e.bias.rows(), e.bias.cols()), e.scale});
  }
  Index s = 0;
  for (std::size_t t = 0; t < call.slots.size(); ++t) {
    for (const Slot& slot : call.slots[t]) {
      add_slot(call, static_cast<Index>(t), s++, slot, result);
    }
  }
  return result;
}

/// The call with every number replaced by its absolute value: its result bounds the rounding errors
/// of the call, term by term.
inline ReferenceCall magnitudes(ReferenceCall call) {
  const auto absolute = [](Matrix<double>& m) {
    for (Index r = 0; r < m.rows(); ++r) {
      for (Index c = 0; c < m.cols(); ++c) m(r, c) = std::fabs(m(r, c));
    }
  };
  for (ReferenceExpert& e : call.experts) {
    absolute(e.down);
    absolute(e.up);
    absolute(e.bias);
    e.scale = std::fabs(e.scale);
  }
  for (auto& token : call.slots) {
    for (Slot& slot : token) slot.gate = std::fabs(slot.gate);
  }
  absolute(call.x);
  absolute(call.y);
  absolute(call.dy);
  return call;
}

}  // namespace test
