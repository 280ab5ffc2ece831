// SPDX-License-Identifier: Apache-2.0
// What a layer of several parts asks of them before it writes anything, so that no part refuses
// once another has written.
#pragma once

#include <span>

#include "mole/core/config.hpp"
#include "mole/core/context.hpp"
#include "mole/core/error.hpp"
#include "mole/core/workspace.hpp"
#include "mole/experts/expert_bank.hpp"
#include "mole/routing/routing.hpp"

namespace mole::inline MOLE_ABI {

/// Throws out_of_memory unless the scratch memory that is free holds what a `scratch_bytes` asks
/// for.
inline void require_scratch(const Context& context, std::size_t bytes) {
  const std::size_t free = context.scratch.free_bytes();
  // A workspace may have lost less than that at its start.
  require(free + kAlignment >= bytes, Errc::out_of_memory, "scratch: ", bytes, " bytes needed, ",
          free, " are free");
}

/// Throws what `bank` throws for weights and gradients that do not fit: it goes back through no
/// tokens, for which it checks them and adds nothing. Needs bank_params_bytes and the scratch of
/// the bank.
template <ExpertBank B>
void require_bank_params(const B& bank, const typename B::Weights& weights,
                         const typename B::template Params<typename B::Scalar>& grad,
                         const Context& context) {
  using T = typename B::Scalar;
  const Workspace::Frame frame(context.scratch);
  RoutingTable<T> none(context.scratch, 0, bank.experts(), 0);
  none.begin(0);
  none.finish();
  BankInput<T> input;
  input.x.cols = bank.input_width();
  input.base.cols = bank.output_width();
  MatView<const T> dy;
  dy.cols = bank.output_width();
  bank.backward(weights, typename B::Tape{}, input, none.view(), dy, std::span<T>(),
                BankInputGradient<T>{}, grad, context);
}

/// Scratch for one such call after the other.
template <ExpertBank B>
std::size_t bank_params_bytes(const B& bank) noexcept {
  return RoutingTable<typename B::Scalar>::bytes(0, bank.experts(), 0);
}

}  // namespace mole::inline MOLE_ABI
