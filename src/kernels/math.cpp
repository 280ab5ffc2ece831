// SPDX-License-Identifier: Apache-2.0
#include "mole/kernels/math.hpp"

namespace mole::inline MOLE_ABI::math {

template float exp(float) noexcept;
template float expm1(float) noexcept;
template float log(float) noexcept;
template float log1p(float) noexcept;
template float tanh(float) noexcept;
template float sigmoid(float) noexcept;
template float softplus(float) noexcept;
template float sqrt(float) noexcept;
template double exp(double) noexcept;
template double expm1(double) noexcept;
template double log(double) noexcept;
template double log1p(double) noexcept;
template double tanh(double) noexcept;
template double sigmoid(double) noexcept;
template double softplus(double) noexcept;
template double sqrt(double) noexcept;

}  // namespace mole::inline MOLE_ABI::math
