// SPDX-License-Identifier: Apache-2.0
#include "mole/experts/film_bank.hpp"

namespace mole::inline MOLE_ABI {
template class FilmBank<float>;
template class FilmBank<double>;
}  // namespace mole::inline MOLE_ABI
