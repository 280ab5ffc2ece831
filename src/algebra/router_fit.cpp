// SPDX-License-Identifier: Apache-2.0
#include "mole/algebra/router_fit.hpp"

namespace mole::inline MOLE_ABI {
template RouterFitResult fit_router(const RouterFit&, const RouterFitInput<float>&, MatView<float>,
                                    const LinearParams<float>&, const RouterFitDetails<float>&,
                                    const Context&);
template RouterFitResult fit_router(const RouterFit&, const RouterFitInput<double>&,
                                    MatView<double>, const LinearParams<double>&,
                                    const RouterFitDetails<double>&, const Context&);
}  // namespace mole::inline MOLE_ABI
