// SPDX-License-Identifier: Apache-2.0
// Routing statistics per layer and per label, as CSV and JSON.
//
//   RoutingReport report({"german", "python"});           // names of the labels 0, 1
//   report.add("layer 20", session.routing(), labels);    // any number of calls
//   std::ofstream("routing.csv") << report.to_csv();
//
// Needs the compiled library.
#pragma once

#include <span>
#include <string>
#include <utility>
#include <vector>

#include "mole/core/config.hpp"
#include "mole/stats/routing_stats.hpp"

namespace mole::inline MOLE_ABI {

class RoutingReport {
 public:
  struct Entry {
    std::string layer;
    std::string label;  ///< empty: all tokens of the layer
    RoutingStats stats;
  };

  explicit RoutingReport(std::vector<std::string> label_names = {})
      : label_names_(std::move(label_names)) {}

  /// Adds to the layer's entries; the first call makes them. Labels [tokens], or none; a label
  /// without a name counts for the layer only. Throws shape_mismatch.
  template <class T>
  void add(const std::string& layer, const Routing<T>& routing,
           std::span<const std::int64_t> labels = {});

  /// A layer's entry for all tokens, then one for each label; layers in the order of their first
  /// call.
  const std::vector<Entry>& entries() const noexcept { return entries_; }

  /// One line an expert: layer, label, tokens, expert, count, load, mean gate. RFC 4180, with \n.
  std::string to_csv() const;
  /// {"entries": [...]}: everything that RoutingStats knows. A number that is not finite is null;
  /// bytes of a name that are not UTF-8 become U+FFFD.
  std::string to_json() const;

 private:
  std::size_t first_entry(const std::string& layer, Index experts);

  std::vector<std::string> label_names_;
  std::vector<Entry> entries_;
};

extern template void RoutingReport::add(const std::string&, const Routing<float>&,
                                        std::span<const std::int64_t>);
extern template void RoutingReport::add(const std::string&, const Routing<double>&,
                                        std::span<const std::int64_t>);

}  // namespace mole::inline MOLE_ABI
