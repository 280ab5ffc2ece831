// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/top_k_capacity.hpp"

namespace mole::inline MOLE_ABI {
template struct TopKCapacityRule<float>;
template struct TopKCapacityRule<double>;
template class HeadRouter<float, LinearHead<float>, TopKCapacityRule<float>>;
template class HeadRouter<double, LinearHead<double>, TopKCapacityRule<double>>;
}  // namespace mole::inline MOLE_ABI
