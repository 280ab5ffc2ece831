// SPDX-License-Identifier: Apache-2.0
#include "mole/routing/project.hpp"

namespace mole::inline MOLE_ABI::stages {
template void project(const LinearPrepared<float>&, MatView<const float>, MatView<float>,
                      const Context&);
template void project(const LinearPrepared<double>&, MatView<const double>, MatView<double>,
                      const Context&);
template void project_backward(const LinearParams<const float>&, MatView<const float>,
                               MatView<const float>, MatView<float>, const LinearParams<float>&,
                               const Context&);
template void project_backward(const LinearParams<const double>&, MatView<const double>,
                               MatView<const double>, MatView<double>, const LinearParams<double>&,
                               const Context&);
}  // namespace mole::inline MOLE_ABI::stages
