// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/mlp.hpp"

namespace mole::inline MOLE_ABI {
template class HeadRouter<float, MlpHead<float>, TopKRule<float>>;
template class HeadRouter<double, MlpHead<double>, TopKRule<double>>;
}  // namespace mole::inline MOLE_ABI
