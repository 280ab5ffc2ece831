// SPDX-License-Identifier: Apache-2.0
#include "mole/io/peft.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "io/convert.hpp"
#include "io/text.hpp"

namespace mole::inline MOLE_ABI {
namespace {

using io::in_quotes;

void add_names(std::string& text, const char* title, const std::vector<std::string>& names) {
  text += fmt::format("{}: {}\n", title, names.empty() ? "none" : std::to_string(names.size()));
  for (const std::string& name : names) text += "  " + io::escaped(name) + "\n";
}

// A finite weight that becomes infinite in T is refused before anything is written.
template <class T>
void check_fits(const StoredTensor& tensor, const std::string& file) {
  io::with_weight_type(tensor, file, [&]<class W>(W) {
    for (Index i = 0; i < tensor.elements(); ++i) {
      const W stored = io::load<W>(tensor.bytes.data(), i);
      if (!std::isfinite(io::convert<double>(io::convert<T>(stored)))) {
        fail(Errc::numeric_error, file, ": ", in_quotes(tensor.name), " holds ",
             io::number_text(io::convert<double>(stored)), " at index ", i, ", which overflows ",
             name(dtype_of<T>));
      }
    }
  });
}

template <class T>
void read_weights(const SafeTensors& file, const std::string& tensor, MatView<T> out) {
  const StoredTensor& stored = file.at(tensor);
  const std::vector<Index>& shape = stored.shape;
  require_shape(in_quotes(tensor), out, shape.front(), shape.back());
  check_fits<T>(stored, file.name());
  file.read<T>(tensor, out);
}

}  // namespace

std::string LoadReport::to_text() const {
  std::string text =
      fmt::format("adapter {}\nmodules applied: {}\n", io::shown_path(folder), applied.size());
  for (const LoraModule& module : applied) {
    text += fmt::format("  {}: rank {} ({}), alpha {} ({}), scale {}, {} -> {}, {}/{}\n",
                        io::escaped(module.path), module.rank, module.rank_from, module.alpha,
                        module.alpha_from, module.scale, module.d_in, module.d_out,
                        name(module.stored_down), name(module.stored_up));
  }
  add_names(text, "unused tensors", unused);
  add_names(text, "missing modules", missing);
  add_names(text, "skipped modules", skipped);
  add_names(text, "unknown settings", unknown_fields);
  add_names(text, "checks off", checks_off);
  return text;
}

const LoraModule* PeftAdapter::find(std::string_view path) const noexcept {
  const auto by_path = [](const LoraModule& module, std::string_view wanted) {
    return module.path < wanted;
  };
  const auto place = std::lower_bound(modules().begin(), modules().end(), path, by_path);
  return place != modules().end() && place->path == path ? &*place : nullptr;
}

const LoraModule& PeftAdapter::at(std::string_view path) const {
  const LoraModule* found = find(path);
  if (found == nullptr) {
    std::vector<std::string_view> paths;
    for (const LoraModule& module : modules()) paths.emplace_back(module.path);
    fail(Errc::not_found, io::shown_path(report_.folder), ": the adapter does not touch ",
         in_quotes(path), io::nearest_text(path, paths));
  }
  return *found;
}

template <class T>
void PeftAdapter::read_down(const LoraModule& module, MatView<T> down) const {
  read_weights(file_, module.down_tensor, down);
}

template <class T>
void PeftAdapter::read_up(const LoraModule& module, MatView<T> up) const {
  read_weights(file_, module.up_tensor, up);
}

#define MOLE_READ_AS(T)                                                         \
  template void PeftAdapter::read_down<T>(const LoraModule&, MatView<T>) const; \
  template void PeftAdapter::read_up<T>(const LoraModule&, MatView<T>) const;
MOLE_READ_AS(float)
MOLE_READ_AS(double)
MOLE_READ_AS(bf16)
MOLE_READ_AS(f16)
#undef MOLE_READ_AS

}  // namespace mole::inline MOLE_ABI
