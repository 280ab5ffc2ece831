// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/top_k.hpp"

namespace mole::inline MOLE_ABI {
template class TopKRouter<float>;
template class TopKRouter<double>;
}  // namespace mole::inline MOLE_ABI
