// SPDX-License-Identifier: Apache-2.0
#include "mole/routing/mlp_head.hpp"

namespace mole::inline MOLE_ABI {
template struct MlpHead<float>;
template struct MlpHead<double>;
}  // namespace mole::inline MOLE_ABI
