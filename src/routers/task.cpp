// SPDX-License-Identifier: Apache-2.0
#include "mole/routers/task.hpp"

namespace mole::inline MOLE_ABI {
template struct TaskHead<float>;
template struct TaskHead<double>;
template class HeadRouter<float, TaskHead<float>, TopKRule<float>>;
template class HeadRouter<double, TaskHead<double>, TopKRule<double>>;
}  // namespace mole::inline MOLE_ABI
