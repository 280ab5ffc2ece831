// SPDX-License-Identifier: Apache-2.0
#include "mole/stats/routing_report.hpp"

#include <fmt/format.h>

#include <cmath>
#include <iterator>
#include <type_traits>

#include "io/json.hpp"

namespace mole::inline MOLE_ABI {
namespace {

using io::Json;

std::string csv_field(const std::string& text) {
  if (text.find_first_of(",\"\r\n") == std::string::npos) return text;
  std::string quoted = "\"";
  for (const char c : text) quoted.append(c == '"' ? 2 : 1, c);
  return quoted + '"';
}

Json number(double value) {
  return std::isfinite(value) ? Json(value) : Json(nullptr);
}

/// f(e) for every expert.
template <class F>
Json list(const RoutingStats& stats, F f) {
  Json values = Json::array();
  for (Index e = 0; e < stats.experts(); ++e) values.push_back(f(e));
  return values;
}

Json entry_json(const RoutingReport::Entry& entry) {
  const RoutingStats& stats = entry.stats;
  Json json = Json::object();
  json.add("layer", entry.layer);
  json.add("label", entry.label.empty() ? Json(nullptr) : Json(entry.label));
  json.add("tokens", stats.tokens());
  json.add("slots", stats.slots());
  json.add("idle_tokens", stats.idle_tokens());
  json.add("experts_per_token", stats.experts_per_token());
  json.add("gate_entropy", number(stats.gate_entropy()));
  json.add("load_entropy", stats.load_entropy());
  json.add("load_cv", stats.load_cv());
  json.add("max_over_mean", stats.max_over_mean());
  json.add("dead", Json(stats.dead()));
  json.add("count", list(stats, [&](Index e) { return Json(stats.count(e)); }));
  json.add("load", list(stats, [&](Index e) { return Json(stats.load(e)); }));
  json.add("mean_gate", list(stats, [&](Index e) { return number(stats.mean_gate(e)); }));
  json.add("together", list(stats, [&](Index a) {
             return list(stats, [&](Index b) { return Json(stats.together(a, b)); });
           }));
  return json;
}

}  // namespace

std::size_t RoutingReport::first_entry(const std::string& layer, Index experts) {
  for (std::size_t i = 0; i < entries_.size(); i += 1 + label_names_.size()) {
    if (entries_[i].layer == layer) return i;
  }
  std::vector<Entry> added;  // all of a layer's entries, or none
  added.reserve(1 + label_names_.size());
  added.push_back({layer, "", RoutingStats(experts)});
  for (const std::string& label : label_names_) {
    added.push_back({layer, label, RoutingStats(experts)});
  }
  static_assert(std::is_nothrow_move_constructible_v<Entry>);
  const std::size_t first = entries_.size();
  entries_.insert(entries_.end(), std::move_iterator(added.begin()),
                  std::move_iterator(added.end()));
  return first;
}

template <class T>
void RoutingReport::add(const std::string& layer, const Routing<T>& routing,
                        std::span<const std::int64_t> labels) {
  require(labels.empty() || static_cast<Index>(labels.size()) == routing.tokens,
          Errc::shape_mismatch, "routing report: ", labels.size(), " labels for ", routing.tokens,
          " tokens");
  const std::size_t first = first_entry(layer, routing.experts);
  entries_[first].stats.add(routing);
  if (labels.empty()) return;
  for (std::size_t i = 0; i < label_names_.size(); ++i) {
    entries_[first + 1 + i].stats.add(routing, labels, static_cast<std::int64_t>(i));
  }
}

template void RoutingReport::add(const std::string&, const Routing<float>&,
                                 std::span<const std::int64_t>);
template void RoutingReport::add(const std::string&, const Routing<double>&,
                                 std::span<const std::int64_t>);

std::string RoutingReport::to_csv() const {
  std::string text = "layer,label,tokens,expert,count,load,mean_gate\n";
  for (const Entry& entry : entries_) {
    for (Index e = 0; e < entry.stats.experts(); ++e) {
      text += fmt::format("{},{},{},{},{},{},{}\n", csv_field(entry.layer), csv_field(entry.label),
                          entry.stats.tokens(), e, entry.stats.count(e), entry.stats.load(e),
                          entry.stats.mean_gate(e));
    }
  }
  return text;
}

std::string RoutingReport::to_json() const {
  Json list = Json::array();
  for (const Entry& entry : entries_) list.push_back(entry_json(entry));
  Json json = Json::object();
  json.add("entries", std::move(list));
  return json.dump();
}

}  // namespace mole::inline MOLE_ABI
