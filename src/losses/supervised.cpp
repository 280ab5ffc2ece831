// SPDX-License-Identifier: Apache-2.0
#include "mole/losses/supervised.hpp"

namespace mole::inline MOLE_ABI {
template float domain_loss(float, MatView<const float>, std::span<const std::int32_t>,
                           MatView<float>, const Context&);
template double domain_loss(double, MatView<const double>, std::span<const std::int32_t>,
                            MatView<double>, const Context&);
template float correctness_loss(float, MatView<const float>, MatView<const std::uint8_t>,
                                MatView<float>);
template double correctness_loss(double, MatView<const double>, MatView<const std::uint8_t>,
                                 MatView<double>);
template float ranking_loss(std::span<const float>, std::span<const std::int64_t>, bool,
                            std::span<float>);
template double ranking_loss(std::span<const double>, std::span<const std::int64_t>, bool,
                             std::span<double>);
template float triplet_loss(float, MatView<const float>, MatView<const float>, MatView<const float>,
                            MatView<float>, MatView<float>, MatView<float>);
template double triplet_loss(double, MatView<const double>, MatView<const double>,
                             MatView<const double>, MatView<double>, MatView<double>,
                             MatView<double>);
}  // namespace mole::inline MOLE_ABI
