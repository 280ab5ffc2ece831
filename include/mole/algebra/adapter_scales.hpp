// SPDX-License-Identifier: Apache-2.0
// AdapterScales: which adapters of a layer are active, and how strong each one is, changed between
// calls without touching weights. The calls are those of PEFT's layers; the result is one gate per
// adapter for a bank that holds the initial scales, e.g. AdapterBank behind a GivenRouter:
//
//   y += Σ_active gate_a · s_a · B_a A_a x        gate_a = scale_a / s_a        s_a: initial scale
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "mole/core/config.hpp"
#include "mole/core/error.hpp"
#include "mole/core/view.hpp"

namespace mole::inline MOLE_ABI {

/// The adapters of one layer. A name the layer does not have is ignored by every call: an adapter
/// need not touch every layer of a model. Adapters keep the order in which they were given.
class AdapterScales {
 public:
  struct Adapter {
    std::string name;
    double scale = 1;  ///< initial scale, alpha / rank or alpha / sqrt(rank)
  };

  /// No adapter is active. Throws invalid_argument: a name twice, a scale that is not finite.
  explicit AdapterScales(const std::vector<Adapter>& adapters);

  Index adapters() const noexcept { return static_cast<Index>(entries_.size()); }
  const std::string& name(Index a) const { return entries_.at(index(a)).name; }
  bool is_active(Index a) const { return entries_.at(index(a)).active; }
  /// The scale that an active adapter has, whether it is active or not.
  double scale(Index a) const { return entries_.at(index(a)).scale; }
  /// scale over initial scale if active, else 0.
  double gate(Index a) const;

  /// Makes exactly these adapters active. Throws invalid_argument for a name given twice.
  void set_adapter(std::span<const std::string> names);
  void set_adapter(std::string_view name);

  /// scale = factor · initial scale of one adapter, active or not, whatever was set before.
  void set_scale(std::string_view name, double factor);
  /// scale · factor for every active adapter.
  void scale_layer(double factor);
  /// scale / factor for every active adapter; without a factor back to the initial scale.
  void unscale_layer(std::optional<double> factor = std::nullopt);

  /// One row per token, all alike: gates [tokens, adapters]. Throws shape_mismatch.
  template <class T>
  void fill_gates(MatView<T> gates) const {
    require_shape("gates", gates, gates.rows, adapters());
    for (Index a = 0; a < adapters(); ++a) {
      const T value = static_cast<T>(gate(a));
      for (Index t = 0; t < gates.rows; ++t) gates(t, a) = value;
    }
  }

 private:
  struct Entry {
    std::string name;
    double initial, scale;
    bool active;
  };

  static std::size_t index(Index a) noexcept { return static_cast<std::size_t>(a); }
  Entry* find(std::string_view name) noexcept;
  static void check_factor(const char* call, double factor, bool divides);

  std::vector<Entry> entries_;
};

inline AdapterScales::AdapterScales(const std::vector<Adapter>& adapters) {
  for (const Adapter& adapter : adapters) {
    require(find(adapter.name) == nullptr, Errc::invalid_argument, "AdapterScales: the adapter ",
            adapter.name, " comes twice");
    require(std::isfinite(adapter.scale), Errc::invalid_argument, "AdapterScales: the scale of ",
            adapter.name, " is ", adapter.scale, ", must be finite");
    entries_.push_back({adapter.name, adapter.scale, adapter.scale, false});
  }
}

inline AdapterScales::Entry* AdapterScales::find(std::string_view name) noexcept {
  const auto same = [name](const Entry& entry) { return entry.name == name; };
  const auto place = std::find_if(entries_.begin(), entries_.end(), same);
  return place == entries_.end() ? nullptr : &*place;
}

inline double AdapterScales::gate(Index a) const {
  const Entry& entry = entries_.at(index(a));
  if (!entry.active || entry.initial == 0) return 0;  // a scale of 0 stays 0
  return entry.scale / entry.initial;
}

inline void AdapterScales::set_adapter(std::span<const std::string> names) {
  for (std::size_t i = 0; i < names.size(); ++i) {
    const bool again = std::find(names.begin(), names.begin() + static_cast<std::ptrdiff_t>(i),
                                 names[i]) != names.begin() + static_cast<std::ptrdiff_t>(i);
    require(!again, Errc::invalid_argument, "set_adapter: the adapter ", names[i], " comes twice");
  }
  for (Entry& entry : entries_) {
    entry.active = std::find(names.begin(), names.end(), entry.name) != names.end();
  }
}

inline void AdapterScales::set_adapter(std::string_view name) {
  for (Entry& entry : entries_) entry.active = entry.name == name;
}

inline void AdapterScales::check_factor(const char* call, double factor, bool divides) {
  require(std::isfinite(factor) && !(divides && factor == 0), Errc::invalid_argument, call,
          ": the factor is ", factor, ", must be finite", divides ? " and not 0" : "");
}

inline void AdapterScales::set_scale(std::string_view name, double factor) {
  check_factor("set_scale", factor, false);
  Entry* entry = find(name);
  if (entry != nullptr) entry->scale = factor * entry->initial;
}

inline void AdapterScales::scale_layer(double factor) {
  check_factor("scale_layer", factor, false);
  for (Entry& entry : entries_) {
    if (entry.active) entry.scale *= factor;
  }
}

inline void AdapterScales::unscale_layer(std::optional<double> factor) {
  if (factor.has_value()) check_factor("unscale_layer", *factor, true);
  for (Entry& entry : entries_) {
    if (entry.active) entry.scale = factor.has_value() ? entry.scale / *factor : entry.initial;
  }
}

}  // namespace mole::inline MOLE_ABI
