// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/lora_mixer.hpp"

namespace mole::inline MOLE_ABI {
template struct LoraMixerRule<float>;
template struct LoraMixerRule<double>;
template class HeadRouter<float, LinearHead<float>, LoraMixerRule<float>>;
template class HeadRouter<double, LinearHead<double>, LoraMixerRule<double>>;
}  // namespace mole::inline MOLE_ABI
