// SPDX-License-Identifier: Apache-2.0
// What a load did, for people and for programs.
#include <fmt/format.h>

#include "io/json.hpp"
#include "io/text.hpp"
#include "mole/io/peft.hpp"

namespace mole::inline MOLE_ABI {
namespace {

using io::Json;

const char* name_of(ModuleKind kind) {
  switch (kind) {
    case ModuleKind::linear: return "linear";
    case ModuleKind::conv1d: return "conv1d";
    case ModuleKind::embedding: return "embedding";
    default: return "other";
  }
}

const char* name_of(BaseChange change) {
  switch (change) {
    case BaseChange::pissa: return "pissa";
    case BaseChange::olora: return "olora";
    default: return "none";
  }
}

void add_count(std::string& text, const char* title, std::size_t count) {
  text += fmt::format("{}: {}\n", title, count == 0 ? "none" : std::to_string(count));
}

void add_names(std::string& text, const char* title, const std::vector<std::string>& names) {
  add_count(text, title, names.size());
  for (const std::string& name : names) text += "  " + io::escaped(name) + "\n";
}

std::string dtypes(const LoraModule& module) {
  const std::string bias =
      module.bias_tensor.empty() ? std::string() : fmt::format("/{}", name(module.stored_bias));
  return fmt::format("{}/{}{}", name(module.stored_down), name(module.stored_up), bias);
}

Json tensor_entry(const std::string& tensor, Dtype dtype) {
  if (tensor.empty()) return nullptr;
  Json entry = Json::object();
  entry.add("name", tensor);
  entry.add("dtype", std::string(name(dtype)));
  return entry;
}

Json module_entry(const LoraModule& module) {
  Json entry = Json::object();
  entry.add("path", module.path);
  entry.add("kind", name_of(module.kind));
  entry.add("rank", module.rank);
  entry.add("rank_from", module.rank_from);
  entry.add("alpha", module.alpha);
  entry.add("alpha_from", module.alpha_from);
  entry.add("scale", module.scale);
  entry.add("d_in", module.d_in);
  entry.add("d_out", module.d_out);
  entry.add("base_change", name_of(module.base_change));
  entry.add("down", tensor_entry(module.down_tensor, module.stored_down));
  entry.add("up", tensor_entry(module.up_tensor, module.stored_up));
  entry.add("bias", tensor_entry(module.bias_tensor, module.stored_bias));
  return entry;
}

Json replacement_entry(const Replacement& replacement) {
  Json entry = Json::object();
  entry.add("path", replacement.path);
  entry.add("parameter", replacement.parameter);
  entry.add("tensor", replacement.tensor);
  entry.add("dtype", std::string(name(replacement.stored)));
  entry.add("shape", replacement.shape);
  entry.add("from", replacement.from);
  return entry;
}

}  // namespace

std::string LoadReport::to_text() const {
  std::string text =
      fmt::format("adapter {}\nmodules applied: {}\n", io::shown_path(folder), applied.size());
  for (const LoraModule& module : applied) {
    const bool whole = module.base_change == BaseChange::none;
    text += fmt::format("  {}: rank {} ({}), alpha {} ({}), scale {}, {} -> {}, {}{}{}\n",
                        io::escaped(module.path), module.rank, module.rank_from, module.alpha,
                        module.alpha_from, module.scale, module.d_in, module.d_out, dtypes(module),
                        whole ? "" : ", base less its part of ",
                        whole ? "" : name_of(module.base_change));
  }
  add_count(text, "base parameters replaced", replaced.size());
  for (const Replacement& r : replaced) {
    text += fmt::format("  {}.{}: {} {} ({})\n", io::escaped(r.path), io::escaped(r.parameter),
                        name(r.stored), io::shape_text(r.shape), r.from);
  }
  add_names(text, "redundant tensors", redundant);
  add_names(text, "unused tensors", unused);
  add_names(text, "missing modules", missing);
  add_names(text, "skipped modules", skipped);
  add_names(text, "unknown settings", unknown_fields);
  add_names(text, "checks off", checks_off);
  return text;
}

std::string LoadReport::to_json() const {
  Json report;
  report["folder"] = folder;
  report["applied"] = Json::array();
  for (const LoraModule& module : applied) report["applied"].push_back(module_entry(module));
  report["replaced"] = Json::array();
  for (const Replacement& r : replaced) report["replaced"].push_back(replacement_entry(r));
  report["redundant"] = redundant;
  report["unused"] = unused;
  report["missing"] = missing;
  report["skipped"] = skipped;
  report["unknown_fields"] = unknown_fields;
  report["checks_off"] = checks_off;
  constexpr int kIndent = 2;
  return report.dump(kIndent) + "\n";
}

}  // namespace mole::inline MOLE_ABI
