// SPDX-License-Identifier: Apache-2.0
#include "mole/io/safetensors.hpp"

#include <algorithm>
#include <limits>
#include <new>
#include <utility>

#include "io/convert.hpp"
#include "io/file.hpp"
#include "io/safetensors_header.hpp"

namespace mole::inline MOLE_ABI {
namespace {

constexpr std::size_t kAlignment = 64;

std::shared_ptr<std::byte> allocate(std::uint64_t bytes, const std::string& file) {
  const auto free = [](std::byte* memory) {
    ::operator delete(memory, std::align_val_t(kAlignment));
  };
  void* memory =
      ::operator new(static_cast<std::size_t>(bytes), std::align_val_t(kAlignment), std::nothrow);
  require(memory != nullptr, Errc::out_of_memory, file, ": no memory for ", bytes,
          " bytes of tensor data");
  return {static_cast<std::byte*>(memory), free};
}

struct HeaderInFile {
  io::Header header;
  std::uint64_t data_begin = 0, data_bytes = 0;
};

HeaderInFile read_header(const io::File& file, const std::string& name,
                         const SafeTensorsLimits& limits) {
  require(file.size() <= limits.max_file_bytes, Errc::limit_exceeded, name, ": ", file.size(),
          " bytes exceed the limit of ", limits.max_file_bytes, " (option max_file_bytes)");
  std::byte memory[io::kHeaderStart + 1] = {};
  const std::span<std::byte> start(memory, std::min<std::uint64_t>(file.size(), sizeof(memory)));
  file.read(0, start);
  const std::uint64_t length = io::header_length(start, file.size(), name, limits);
  std::string text(static_cast<std::size_t>(length), '\0');
  file.read(io::kHeaderStart, std::as_writable_bytes(std::span<char>(text)));
  const std::uint64_t data_begin = io::kHeaderStart + length;
  const std::uint64_t data_bytes = file.size() - data_begin;
  return {io::parse_header(text, data_bytes, name, limits), data_begin, data_bytes};
}

// Rows and columns of a vector or matrix.
std::pair<Index, Index> matrix_shape(const StoredTensor& tensor, const std::string& file) {
  const std::size_t rank = tensor.shape.size();
  require(rank == 1 || rank == 2, Errc::shape_mismatch, file, ": ", io::in_quotes(tensor.name),
          " has ", rank, " dimensions, a matrix has 1 or 2");
  return {rank == 2 ? tensor.shape.front() : 1, tensor.shape.back()};
}

// Checks before the first element is written, so that a refusal leaves the output alone.
void check_in_range(const StoredTensor& tensor, const std::string& file) {
  if (tensor.dtype != Dtype::u64) return;
  for (Index i = 0; i < tensor.elements(); ++i) {
    const auto value = io::load<std::uint64_t>(tensor.bytes.data(), i);
    if (value > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
      fail(Errc::numeric_error, file, ": ", io::in_quotes(tensor.name), " holds ", value,
           " at index ", i, ", above the range of a signed 64-bit integer");
    }
  }
}

template <class T>
void copy_elements(const StoredTensor& tensor, const std::string& file, MatView<T> out) {
  const auto copy = [&]<class W>(W) {
    for (Index row = 0; row < out.rows; ++row) {
      for (Index col = 0; col < out.cols; ++col) {
        const W stored = io::load<W>(tensor.bytes.data(), row * out.cols + col);
        if constexpr (std::is_integral_v<T>) {
          out(row, col) = static_cast<T>(stored);
        } else {
          out(row, col) = io::convert<T>(stored);
        }
      }
    }
  };
  if constexpr (std::is_integral_v<T>) {
    check_in_range(tensor, file);
    io::with_integer_type(tensor, file, copy);
  } else {
    io::with_weight_type(tensor, file, copy);
  }
}

}  // namespace

SafeTensors::SafeTensors(std::string name, io::Header header, std::span<const std::byte> data,
                         std::shared_ptr<const std::byte> memory)
    : name_(std::move(name)), metadata_(std::move(header.metadata)), memory_(std::move(memory)) {
  tensors_.reserve(header.entries.size());
  for (io::HeaderEntry& entry : header.entries) {
    const auto length = static_cast<std::size_t>(entry.end - entry.begin);
    tensors_.push_back({std::move(entry.name), entry.dtype, std::move(entry.shape),
                        data.subspan(static_cast<std::size_t>(entry.begin), length)});
  }
}

SafeTensors SafeTensors::open(const std::string& path, const SafeTensorsLimits& limits) {
  const io::File file(path);
  std::string name = io::shown_path(path);
  auto [header, begin, bytes] = read_header(file, name, limits);
  std::shared_ptr<std::byte> memory = allocate(bytes, name);
  const std::span<std::byte> data(memory.get(), static_cast<std::size_t>(bytes));
  file.read(begin, data);
  return {std::move(name), std::move(header), data, std::move(memory)};
}

SafeTensors SafeTensors::map(const std::string& path, const SafeTensorsLimits& limits) {
  const io::File file(path);
  std::string name = io::shown_path(path);
  auto [header, begin, bytes] = read_header(file, name, limits);
  std::shared_ptr<const std::byte> memory = file.map();
  const std::span<const std::byte> data(memory.get() + begin, static_cast<std::size_t>(bytes));
  return {std::move(name), std::move(header), data, std::move(memory)};
}

SafeTensors SafeTensors::parse(std::span<const std::byte> bytes, const std::string& name,
                               const SafeTensorsLimits& limits) {
  std::string shown = io::shown_path(name);
  const std::uint64_t length = io::header_length(bytes, bytes.size(), shown, limits);
  const auto header_bytes = bytes.subspan(io::kHeaderStart, static_cast<std::size_t>(length));
  const auto data = bytes.subspan(io::kHeaderStart + static_cast<std::size_t>(length));
  const std::string_view text(reinterpret_cast<const char*>(header_bytes.data()),
                              header_bytes.size());
  io::Header header = io::parse_header(text, data.size(), shown, limits);
  return {std::move(shown), std::move(header), data, nullptr};
}

const StoredTensor* SafeTensors::find(std::string_view tensor) const noexcept {
  const auto by_name = [](const StoredTensor& stored, std::string_view name) {
    return stored.name < name;
  };
  const auto place = std::lower_bound(tensors_.begin(), tensors_.end(), tensor, by_name);
  return place != tensors_.end() && place->name == tensor ? &*place : nullptr;
}

const StoredTensor& SafeTensors::at(std::string_view tensor) const {
  const StoredTensor* found = find(tensor);
  if (found == nullptr) {
    std::vector<std::string_view> names;
    for (const StoredTensor& stored : tensors_) names.emplace_back(stored.name);
    fail(Errc::not_found, name_, ": no tensor ", io::in_quotes(tensor),
         io::nearest_text(tensor, names));
  }
  return *found;
}

const StoredTensor& SafeTensors::viewable(std::string_view tensor, Dtype dtype,
                                          std::size_t alignment) const {
  const StoredTensor& stored = at(tensor);
  matrix_shape(stored, name_);
  require(stored.dtype == dtype, Errc::unsupported, name_, ": ", io::in_quotes(tensor),
          " is stored as ", mole::name(stored.dtype), " and cannot be viewed as ",
          mole::name(dtype), ", only read");
  const auto address = reinterpret_cast<std::uintptr_t>(stored.bytes.data());
  require(address % alignment == 0, Errc::unsupported, name_, ": ", io::in_quotes(tensor), " lies ",
          address % alignment, " bytes off an alignment of ", alignment,
          " and cannot be viewed, only read");
  return stored;
}

template <class T>
void SafeTensors::read(std::string_view tensor, MatView<T> out) const {
  const StoredTensor& stored = at(tensor);
  const auto [rows, cols] = matrix_shape(stored, name_);
  require_shape(name_ + ": " + io::in_quotes(tensor), out, rows, cols);
  copy_elements(stored, name_, out);
}

template <class T>
std::vector<T> SafeTensors::read(std::string_view tensor) const {
  const StoredTensor& stored = at(tensor);
  std::vector<T> elements(static_cast<std::size_t>(stored.elements()));
  copy_elements(stored, name_, as_row(std::span<T>(elements)));
  return elements;
}

#define MOLE_READ_AS(T)                                                   \
  template void SafeTensors::read<T>(std::string_view, MatView<T>) const; \
  template std::vector<T> SafeTensors::read<T>(std::string_view) const;
MOLE_READ_AS(float)
MOLE_READ_AS(double)
MOLE_READ_AS(bf16)
MOLE_READ_AS(f16)
MOLE_READ_AS(std::int64_t)
#undef MOLE_READ_AS

}  // namespace mole::inline MOLE_ABI
