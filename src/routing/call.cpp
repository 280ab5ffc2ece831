// SPDX-License-Identifier: Apache-2.0
#include "mole/routing/call.hpp"

namespace mole::inline MOLE_ABI {
template void check_forward(const RouterShape&, const Tokens<float>&, const Overrides<float>&,
                            const RoutingTable<float>&, const RouterTape<float>*);
template void check_forward(const RouterShape&, const Tokens<double>&, const Overrides<double>&,
                            const RoutingTable<double>&, const RouterTape<double>*);
template void check_backward(const RouterShape&, const RouterTape<float>&, const Tokens<float>&,
                             const Routing<float>&, const RouterTape<float>&, MatView<float>);
template void check_backward(const RouterShape&, const RouterTape<double>&, const Tokens<double>&,
                             const Routing<double>&, const RouterTape<double>&, MatView<double>);
}  // namespace mole::inline MOLE_ABI
