// SPDX-License-Identifier: Apache-2.0
// Context: what a call may use besides its arguments: scratch memory, workers, instruction set.
#pragma once

#include <memory>
#include <type_traits>

#include "mole/core/config.hpp"
#include "mole/core/parallel.hpp"
#include "mole/core/workspace.hpp"

namespace mole::inline MOLE_ABI {

/// Instruction-set levels of the kernels. All give the same bits; only the speed differs. A level
/// that is not available counts as the next lower one.
enum class Isa { portable, avx2, avx512 };

/// The best level that this machine runs and this build contains.
Isa best_isa() noexcept;

/// True if this machine runs `isa` and this build contains it.
bool isa_available(Isa isa) noexcept;

/// One call at a time may use a Context: its scratch memory is shared by the workers of that call.
struct Context {
  Workspace& scratch;
  int workers = 1;             ///< worker numbers are below it, those of a hook too; below 1: 1
  ParallelFor hook = nullptr;  ///< null: the built-in loop
  void* pool = nullptr;        ///< passed to the hook
  Isa isa = best_isa();
};

template <class Body>
void parallel_for(const Context& context, Index count, Index grain, Body&& body) {
  if (count <= 0) return;
  using Closure = std::remove_reference_t<Body>;
  const RangeBody run = [](void* closure, Index begin, Index end, int worker) {
    (*static_cast<Closure*>(closure))(begin, end, worker);
  };
  void* closure = const_cast<void*>(static_cast<const void*>(std::addressof(body)));
  if (context.hook != nullptr) {
    context.hook(context.pool, count, grain, run, closure);
  } else {
    built_in_loop(context.workers, count, grain, run, closure);
  }
}

}  // namespace mole::inline MOLE_ABI

#ifdef MOLE_HEADER_ONLY
#include "mole/kernels/isa_portable.hpp"
#endif
