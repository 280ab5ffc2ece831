// SPDX-License-Identifier: Apache-2.0
#include "mole/routing/attention_head.hpp"

namespace mole::inline MOLE_ABI {
template struct AttentionHead<float>;
template struct AttentionHead<double>;
}  // namespace mole::inline MOLE_ABI
