// SPDX-License-Identifier: Apache-2.0
// expect: PayloadLookup hands no base product to its adapter
#include "mole/experts/lora_bank.hpp"
#include "mole/layers/payload_lookup.hpp"
#include "mole/routers/dense.hpp"

struct Adapter : mole::Mixture<mole::DenseRouter<float>, mole::LoraBank<float>> {
#ifdef MOLE_COMPILE_FAIL
  static constexpr bool needs_base = true;
#endif
};

static_assert(sizeof(mole::PayloadLookup<Adapter>) > 0);
