// SPDX-License-Identifier: Apache-2.0
// The build switches of the library. Nothing else in the headers is configured by a macro.
//
// MOLE_HEADER_ONLY  set by the target mole::header_only: every definition is in the headers.
// MOLE_ABI          inline namespace that keeps the two builds apart at link time.
// MOLE_INLINE       `inline` where a function that is not a template is defined in a header.
#pragma once

#include <cstddef>

#ifdef MOLE_HEADER_ONLY
#define MOLE_ABI v0_header_only
#define MOLE_INLINE inline
#else
#define MOLE_ABI v0
#define MOLE_INLINE
#endif

namespace mole::inline MOLE_ABI {

/// Sizes, positions and strides: signed, so that differences are safe.
using Index = std::ptrdiff_t;

/// "There is none": the buffers of a router without state, the carry of one without memory.
struct None {};

}  // namespace mole::inline MOLE_ABI
