// SPDX-License-Identifier: Apache-2.0
#include "mole/algebra/residual_base.hpp"

#include <Eigen/QR>
#include <Eigen/SVD>
#include <algorithm>
#include <cmath>

#include "mole/core/error.hpp"

namespace mole::inline MOLE_ABI {
namespace {

template <class T>
Eigen::MatrixXd checked_copy(const char* call, MatView<const T> weight, Index rank,
                             MatView<T> residual) {
  require_shape("residual", residual, weight.rows, weight.cols);
  require_shape("weight", weight, weight.rows, weight.cols);
  const Index most = std::min(weight.rows, weight.cols);
  require(rank >= 1 && rank <= most, Errc::invalid_argument, call, ": rank ", rank,
          ", must be from 1 to ", most, " for a weight of ", weight.rows, " x ", weight.cols);
  Eigen::MatrixXd copy(weight.rows, weight.cols);
  for (Index i = 0; i < weight.rows; ++i) {
    for (Index j = 0; j < weight.cols; ++j) {
      copy(i, j) = static_cast<double>(weight(i, j));
      require(std::isfinite(copy(i, j)), Errc::numeric_error, call, ": weight [", i, ", ", j,
              "] is not finite");
    }
  }
  return copy;
}

// residual = weight - left right, one chain per element.
template <class T>
void subtract(const Eigen::MatrixXd& weight, const Eigen::MatrixXd& left,
              const Eigen::MatrixXd& right, MatView<T> residual) {
  for (Index i = 0; i < residual.rows; ++i) {
    for (Index j = 0; j < residual.cols; ++j) {
      double rest = weight(i, j);
      for (Index k = 0; k < right.rows(); ++k) rest = std::fma(-left(i, k), right(k, j), rest);
      residual(i, j) = static_cast<T>(rest);
    }
  }
}

}  // namespace

template <class T>
void pissa_residual(std::type_identity_t<MatView<const T>> weight, Index rank,
                    MatView<T> residual) {
  const Eigen::MatrixXd copy = checked_copy<T>("pissa_residual", weight, rank, residual);
  const Eigen::BDCSVD<Eigen::MatrixXd> svd(copy, Eigen::ComputeThinU | Eigen::ComputeThinV);
  require(svd.info() == Eigen::Success, Errc::numeric_error,
          "pissa_residual: the singular values did not converge");
  const Eigen::MatrixXd left =
      svd.matrixU().leftCols(rank) * svd.singularValues().head(rank).asDiagonal();
  const Eigen::MatrixXd right = svd.matrixV().leftCols(rank).transpose();
  subtract(copy, left, right, residual);
}

template <class T>
void olora_residual(std::type_identity_t<MatView<const T>> weight, Index rank, double scale,
                    MatView<T> residual) {
  require(std::isfinite(scale), Errc::invalid_argument, "olora_residual: scale is ", scale,
          ", must be finite");
  const Eigen::MatrixXd copy = checked_copy<T>("olora_residual", weight, rank, residual);
  const Eigen::HouseholderQR<Eigen::MatrixXd> qr(copy);
  const Eigen::MatrixXd left =
      qr.householderQ() * (scale * Eigen::MatrixXd::Identity(copy.rows(), rank));
  const Eigen::MatrixXd right = qr.matrixQR().topRows(rank).template triangularView<Eigen::Upper>();
  subtract(copy, left, right, residual);
}

#define MOLE_RESIDUAL_OF(T)                                                                   \
  template void pissa_residual<T>(std::type_identity_t<MatView<const T>>, Index, MatView<T>); \
  template void olora_residual<T>(std::type_identity_t<MatView<const T>>, Index, double,      \
                                  MatView<T>);
MOLE_RESIDUAL_OF(float)
MOLE_RESIDUAL_OF(double)
#undef MOLE_RESIDUAL_OF

}  // namespace mole::inline MOLE_ABI
