// SPDX-License-Identifier: Apache-2.0
// How loops run: one seam for OpenMP, a host's thread pool and serial code.
//
// A loop cuts its range into chunks of `grain` iterations and runs each once, in any order, on any
// of `workers` workers. Work is cut by the owner of the output, so results never depend on either.
#pragma once

#include "mole/core/config.hpp"

namespace mole::inline MOLE_ABI {

/// Runs iterations [begin, end) as worker number `worker`, 0 <= worker < workers.
using RangeBody = void (*)(void* closure, Index begin, Index end, int worker);

/// Host hook: cover [0, count) by calls of `body`, each on at most `grain` iterations, with at most
/// one call at a time per worker number, and return when all are done. `pool` is passed through.
using ParallelFor = void (*)(void* pool, Index count, Index grain, RangeBody body, void* closure);

/// The built-in loop: OpenMP where the library was built with it and the caller is not itself
/// inside a parallel region, serial otherwise: in reverse without NDEBUG, so that code which relies
/// on an order fails early. Never changes OpenMP's global settings.
void built_in_loop(int workers, Index count, Index grain, RangeBody body, void* closure);

/// True if `built_in_loop` can use more than one thread.
bool built_in_loop_is_parallel() noexcept;

/// Hook that runs the chunks one after another on the calling thread.
inline void serial_loop(void*, Index count, Index grain, RangeBody body, void* closure) {
  for (Index begin = 0; begin < count; begin += grain) {
    body(closure, begin, begin + grain < count ? begin + grain : count, 0);
  }
}

/// Hook that runs the chunks serially in reverse: code that relies on an order fails here first.
inline void reversed_loop(void*, Index count, Index grain, RangeBody body, void* closure) {
  for (Index begin = (count - 1) / grain * grain; count > 0 && begin >= 0; begin -= grain) {
    body(closure, begin, begin + grain < count ? begin + grain : count, 0);
  }
}

}  // namespace mole::inline MOLE_ABI

#ifdef MOLE_HEADER_ONLY
#include "mole/core/parallel_built_in.hpp"
#endif
