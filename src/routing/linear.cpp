// SPDX-License-Identifier: Apache-2.0
#include "mole/routing/linear.hpp"

namespace mole::inline MOLE_ABI {
template struct Linear<float>;
template struct Linear<double>;
}  // namespace mole::inline MOLE_ABI
