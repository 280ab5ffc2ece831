// SPDX-License-Identifier: Apache-2.0
#include "mole/routing/score.hpp"

namespace mole::inline MOLE_ABI::stages {
template bool split_infinite(std::span<const float>, std::span<float>) noexcept;
template bool split_infinite(std::span<const double>, std::span<double>) noexcept;
template void softmax(std::span<const float>, std::span<float>) noexcept;
template void softmax(std::span<const double>, std::span<double>) noexcept;
template void softmax_backward(std::span<const float>, std::span<const float>,
                               std::span<float>) noexcept;
template void softmax_backward(std::span<const double>, std::span<const double>,
                               std::span<double>) noexcept;
template void score(Score, std::span<const float>, std::span<float>) noexcept;
template void score(Score, std::span<const double>, std::span<double>) noexcept;
template void score_backward(Score, std::span<const float>, std::span<const float>,
                             std::span<const float>, std::span<float>) noexcept;
template void score_backward(Score, std::span<const double>, std::span<const double>,
                             std::span<const double>, std::span<double>) noexcept;
template float log_score(Score, float) noexcept;
template double log_score(Score, double) noexcept;
template float log_score_slope(Score, float) noexcept;
template double log_score_slope(Score, double) noexcept;
}  // namespace mole::inline MOLE_ABI::stages
