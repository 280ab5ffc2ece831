// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/sequence.hpp"

namespace mole::inline MOLE_ABI {
template struct SequenceHead<float>;
template struct SequenceHead<double>;
template class HeadRouter<float, SequenceHead<float>, TopKRule<float>>;
template class HeadRouter<double, SequenceHead<double>, TopKRule<double>>;
}  // namespace mole::inline MOLE_ABI
