// SPDX-License-Identifier: Apache-2.0
// What an adapter changes in a host's own weights. An engine walks over its layers once:
//
//   for (Layer& layer : layers) {
//     apply_base_changes(adapter, layer.path, layer.weight, layer.bias);   // the base
//     AdapterBank<float> bank({&adapter, 1}, layer.path);                  // the low-rank part
//   }
//
// or, to run without any low-rank part, merge_adapter(adapter, layer.path, ...) alone.
//
// Needs the compiled library.
#pragma once

#include <string_view>

#include "mole/core/config.hpp"
#include "mole/core/view.hpp"
#include "mole/io/peft.hpp"

namespace mole::inline MOLE_ABI {

/// Whether apply_base_changes would change the module's weight or bias.
bool changes_base(const PeftAdapter& adapter, std::string_view path) noexcept;

/// Puts the adapter's own weight and bias (modules_to_save, trained biases) in the place of the
/// base model's, then takes PiSSA's or OLoRA's part off the weight. A module that the adapter
/// leaves alone keeps its bits.
///
///   weight   [d_out, d_in] as the host stores it; conv1d and embedding [d_in, d_out]
///   bias     [1, d_out]; empty if the host's module has none
///
/// Other saved parameters are read with PeftAdapter::read_replacement. Throws shape_mismatch (also
/// for a saved bias without a place), numeric_error, before anything is written.
template <class T>
void apply_base_changes(const PeftAdapter& adapter, std::string_view path, MatView<T> weight,
                        MatView<T> bias = {});

/// The same, and then the low-rank part: weight += scale · B A (transposed for conv1d), bias +=
/// scale · beta. Throws as apply_base_changes; shape_mismatch for a beta without a bias.
template <class T>
void merge_adapter(const PeftAdapter& adapter, std::string_view path, MatView<T> weight,
                   MatView<T> bias = {});

}  // namespace mole::inline MOLE_ABI
