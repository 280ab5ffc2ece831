// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/dense.hpp"

namespace mole::inline MOLE_ABI {
template class DenseRouter<float>;
template class DenseRouter<double>;
}  // namespace mole::inline MOLE_ABI
