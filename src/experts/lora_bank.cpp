// SPDX-License-Identifier: Apache-2.0
#include "mole/experts/lora_bank.hpp"

namespace mole::inline MOLE_ABI {
template class LoraBank<float>;
template class LoraBank<double>;
template class LoraBank<float, bf16>;
template class LoraBank<float, f16>;
template class LoraBank<float, double>;
template class LoraBank<double, float>;
}  // namespace mole::inline MOLE_ABI
