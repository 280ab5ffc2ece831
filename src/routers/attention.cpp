// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/attention.hpp"

namespace mole::inline MOLE_ABI {
template class HeadRouter<float, AttentionHead<float>, TopKRule<float>>;
template class HeadRouter<double, AttentionHead<double>, TopKRule<double>>;
}  // namespace mole::inline MOLE_ABI
