// SPDX-License-Identifier: Apache-2.0
// One module of several PEFT adapters as a bank of experts: expert e is adapter e.
//
// Needs the compiled library.
#pragma once

#include <span>
#include <string_view>

#include "mole/core/config.hpp"
#include "mole/core/workspace.hpp"
#include "mole/experts/lora_bank.hpp"
#include "mole/io/peft.hpp"

namespace mole::inline MOLE_ABI {

/// A bank with the memory that holds its weights. Move-only.
template <class T>
class AdapterBank {
 public:
  /// Copies A, B and lora_bias of every adapter, converted to T; with any lora_bias, experts
  /// without one have zeros. An adapter that does not touch the module keeps its place as an expert
  /// of rank 0. All experts share one base layer, so an adapter that changes it
  /// (apply_base_changes) can only be alone. Throws not_found if no adapter has the module,
  /// shape_mismatch if they disagree about its widths, unsupported for adapters with different base
  /// layers, and what PeftAdapter::read_down throws.
  AdapterBank(std::span<const PeftAdapter> adapters, std::string_view module);

  const LoraBank<T>& bank() const noexcept { return bank_; }
  LoraBankParams<const T> weights() const noexcept { return params_; }

  /// The same weights, for training them.
  const LoraBankParams<T>& params() const noexcept { return params_; }

 private:
  LoraBank<T> bank_;
  Buffer memory_;
  LoraBankParams<T> params_;
};

extern template class AdapterBank<float>;
extern template class AdapterBank<double>;

}  // namespace mole::inline MOLE_ABI
