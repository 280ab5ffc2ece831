// SPDX-License-Identifier: Apache-2.0
#include "mole/io/peft.hpp"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "io/convert.hpp"
#include "io/text.hpp"

namespace mole::inline MOLE_ABI {
namespace {

using io::in_quotes;

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
  const Index rows = shape.size() < 2 ? 1 : shape.front();
  const Index cols = stored.elements() / rows;  // no dimension is 0
  require_shape(in_quotes(tensor), out, rows, cols);
  check_fits<T>(stored, file.name());
  io::with_weight_type(stored, file.name(), [&]<class W>(W) {
    for (Index r = 0; r < rows; ++r) {
      for (Index c = 0; c < cols; ++c) {
        out(r, c) = io::convert<T>(io::load<W>(stored.bytes.data(), r * cols + c));
      }
    }
  });
}

}  // namespace

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

const Replacement* PeftAdapter::find_replacement(std::string_view path,
                                                 std::string_view parameter) const noexcept {
  const auto wanted = std::tie(path, parameter);
  const auto before = [&wanted](const Replacement& r, const auto&) {
    return std::tuple<std::string_view, std::string_view>(r.path, r.parameter) < wanted;
  };
  const auto place = std::lower_bound(replacements().begin(), replacements().end(), wanted, before);
  const bool found =
      place != replacements().end() && place->path == path && place->parameter == parameter;
  return found ? &*place : nullptr;
}

template <class T>
void PeftAdapter::read_down(const LoraModule& module, MatView<T> down) const {
  read_weights(file_, module.down_tensor, down);
}

template <class T>
void PeftAdapter::read_up(const LoraModule& module, MatView<T> up) const {
  read_weights(file_, module.up_tensor, up);
}

template <class T>
void PeftAdapter::read_bias(const LoraModule& module, MatView<T> bias) const {
  require(!module.bias_tensor.empty(), Errc::not_found, io::shown_path(report_.folder), ": ",
          in_quotes(module.path), " has no lora_bias");
  read_weights(file_, module.bias_tensor, bias);
}

template <class T>
void PeftAdapter::read_replacement(const Replacement& replacement, MatView<T> out) const {
  read_weights(file_, replacement.tensor, out);
}

#define MOLE_READ_AS(T)                                                         \
  template void PeftAdapter::read_down<T>(const LoraModule&, MatView<T>) const; \
  template void PeftAdapter::read_up<T>(const LoraModule&, MatView<T>) const;   \
  template void PeftAdapter::read_bias<T>(const LoraModule&, MatView<T>) const; \
  template void PeftAdapter::read_replacement<T>(const Replacement&, MatView<T>) const;
MOLE_READ_AS(float)
MOLE_READ_AS(double)
MOLE_READ_AS(bf16)
MOLE_READ_AS(f16)
#undef MOLE_READ_AS

}  // namespace mole::inline MOLE_ABI
