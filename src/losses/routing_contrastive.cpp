// SPDX-License-Identifier: Apache-2.0
#include "mole/losses/routing_contrastive.hpp"

namespace mole::inline MOLE_ABI {
template float routing_contrastive_loss(const RoutingContrast&, MatView<const float>,
                                        const Routing<float>&, MatView<const float>, MatView<float>,
                                        MatView<float>, const Context&);
template double routing_contrastive_loss(const RoutingContrast&, MatView<const double>,
                                         const Routing<double>&, MatView<const double>,
                                         MatView<double>, MatView<double>, const Context&);
}  // namespace mole::inline MOLE_ABI
