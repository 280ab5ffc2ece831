// SPDX-License-Identifier: Apache-2.0
// Reading safetensors: 8 bytes little-endian header length N, N bytes of JSON, then the data.
//
// The reader is strict. It accepts a file only if the header is valid UTF-8 JSON without repeated
// keys, every tensor's byte range is exactly its shape times its element size, and the ranges cover
// the data without holes, overlap or bytes left over. Whatever it refuses it names: file, tensor,
// rule and numbers. Nothing is allocated in proportion to a number that has not been checked.
//
// Needs the compiled library.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "mole/core/config.hpp"
#include "mole/core/expected.hpp"
#include "mole/core/view.hpp"
#include "mole/io/dtype.hpp"

namespace mole::inline MOLE_ABI {

/// What a reader accepts. Exceeding one is limit_exceeded; the message names the field.
struct SafeTensorsLimits {
  std::uint64_t max_header_bytes = 16'000'000;  ///< never above the format's own 100,000,000
  std::uint64_t max_entries = 100'000;          ///< tensors, and metadata entries
  std::uint64_t max_file_bytes = std::uint64_t{1} << 36;
};

/// One tensor as stored: row-major, little-endian, not necessarily aligned.
struct StoredTensor {
  std::string name;
  Dtype dtype = Dtype::f32;
  std::vector<Index> shape;  ///< empty for a scalar
  std::span<const std::byte> bytes;

  Index elements() const noexcept {
    Index product = 1;
    for (const Index dimension : shape) product *= dimension;
    return product;
  }
};

namespace io {
struct Header;
}

/// The tensors of one file. A value: copies share the (immutable) memory.
class SafeTensors {
 public:
  SafeTensors() = default;

  /// Reads a regular file into memory aligned to 64 bytes.
  /// Throws io_error, format_error, limit_exceeded, unsupported (unknown dtype), out_of_memory.
  static SafeTensors open(const std::string& path, const SafeTensorsLimits& limits = {});

  /// Maps a regular file instead of reading its data: pages come from the disk when they are
  /// touched, and no memory is allocated for them. Checks and throws as `open`.
  ///
  /// Only for files that are replaced whole, by renaming, as `SafeTensorsWriter::save` does: then
  /// the tensors stay what they were. If the file is overwritten in place, they change; if it is
  /// cut short, touching what is gone ends the process (SIGBUS).
  static SafeTensors map(const std::string& path, const SafeTensorsLimits& limits = {});

  /// Looks at the caller's bytes, which must outlive the object. `name` stands for the file in
  /// messages. Throws as `open`, except io_error.
  static SafeTensors parse(std::span<const std::byte> bytes, const std::string& name,
                           const SafeTensorsLimits& limits = {});

  /// The same without exceptions.
  static Expected<SafeTensors> try_open(std::string_view path,
                                        const SafeTensorsLimits& limits = {}) noexcept {
    return attempt([&] { return open(std::string(path), limits); });
  }
  static Expected<SafeTensors> try_map(std::string_view path,
                                       const SafeTensorsLimits& limits = {}) noexcept {
    return attempt([&] { return map(std::string(path), limits); });
  }
  static Expected<SafeTensors> try_parse(std::span<const std::byte> bytes, std::string_view name,
                                         const SafeTensorsLimits& limits = {}) noexcept {
    return attempt([&] { return parse(bytes, std::string(name), limits); });
  }

  const std::string& name() const noexcept { return name_; }
  /// Sorted by name.
  const std::vector<StoredTensor>& tensors() const noexcept { return tensors_; }
  const std::map<std::string, std::string>& metadata() const noexcept { return metadata_; }

  /// nullptr if there is no such tensor.
  const StoredTensor* find(std::string_view tensor) const noexcept;
  /// Throws not_found with the nearest names.
  const StoredTensor& at(std::string_view tensor) const;

  /// The stored elements as a matrix, without a copy; a vector of n elements is 1 x n.
  /// T is float, double, f16, bf16, std::uint8_t, std::int32_t or std::int64_t.
  /// Throws not_found, unsupported (stored as another type, or not aligned for T: use `read`),
  /// shape_mismatch (neither rank 1 nor rank 2).
  template <class T>
  MatView<const T> view(std::string_view tensor) const {
    const StoredTensor& stored = viewable(tensor, dtype_of<T>, alignof(T));
    const Index cols = stored.shape.back();
    const Index rows = stored.shape.size() == 2 ? stored.shape.front() : 1;
    return {reinterpret_cast<const T*>(stored.bytes.data()), rows, cols};
  }

  /// Copies a matrix (a vector is 1 x n) and converts it: float, double, f16 and bf16 take F64,
  /// F32, F16 and BF16, exactly or rounded once to nearest even; std::int64_t takes every integer
  /// type and BOOL. Throws not_found, unsupported (dtype), shape_mismatch (naming both shapes),
  /// numeric_error (a U64 above the range); then `out` is untouched.
  template <class T>
  void read(std::string_view tensor, MatView<T> out) const;

  /// The same, of any rank, in row-major order.
  template <class T>
  std::vector<T> read(std::string_view tensor) const;

 private:
  SafeTensors(std::string name, io::Header header, std::span<const std::byte> data,
              std::shared_ptr<const std::byte> memory);
  const StoredTensor& viewable(std::string_view tensor, Dtype dtype, std::size_t alignment) const;

  std::string name_;
  std::vector<StoredTensor> tensors_;
  std::map<std::string, std::string> metadata_;
  std::shared_ptr<const std::byte> memory_;
};

}  // namespace mole::inline MOLE_ABI
