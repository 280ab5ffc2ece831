// SPDX-License-Identifier: Apache-2.0
// The one file with OpenMP pragmas: the built-in loop of core/parallel.hpp.
#pragma once

#include <algorithm>
#include <atomic>

#include "mole/core/parallel.hpp"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace mole::inline MOLE_ABI {

MOLE_INLINE bool built_in_loop_is_parallel() noexcept {
#ifdef _OPENMP
  return true;
#else
  return false;
#endif
}

MOLE_INLINE void built_in_loop([[maybe_unused]] int workers, Index count, Index grain,
                               RangeBody body, void* closure) {
#ifdef _OPENMP
  const Index chunks = (count + grain - 1) / grain;
  const int team = static_cast<int>(std::min<Index>(workers, chunks));
  if (team > 1 && !omp_in_parallel()) {
    // Threads take chunks as they go. A loop of the runtime's own may allocate (LLVM's does).
    std::atomic<Index> next = 0;
#pragma omp parallel num_threads(team)
    for (Index chunk = next++; chunk < chunks; chunk = next++) {
      body(closure, chunk * grain, std::min(count, (chunk + 1) * grain), omp_get_thread_num());
    }
    return;
  }
#endif
#ifdef NDEBUG
  serial_loop(nullptr, count, grain, body, closure);
#else
  reversed_loop(nullptr, count, grain, body, closure);
#endif
}

}  // namespace mole::inline MOLE_ABI
