// SPDX-License-Identifier: Apache-2.0
// Writing safetensors, byte for byte as the reference implementation writes: tensors by element
// type (the order of `Dtype`, last first), then by name; a compact header padded with spaces to a
// multiple of 8 bytes. Metadata come first, by key.
//
//   mole::SafeTensorsWriter writer;
//   writer.add<float>("weight", weight);
//   writer.set_metadata("format", "pt");
//   writer.save("layer.safetensors");
//
// Needs the compiled library.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "mole/core/config.hpp"
#include "mole/core/expected.hpp"
#include "mole/core/view.hpp"
#include "mole/io/dtype.hpp"
#include "mole/io/safetensors.hpp"

namespace mole::inline MOLE_ABI {

/// Collects tensors and writes them. It keeps views: the elements must outlive the last `bytes` or
/// `save`. A call that throws changes nothing.
class SafeTensorsWriter {
 public:
  /// Adds a matrix as [rows, cols]; rows that lie apart are packed when they are written.
  /// T is float, double, f16, bf16, std::uint8_t, std::int32_t or std::int64_t.
  /// Throws invalid_argument: a name that is taken, "__metadata__", not UTF-8 or with a NUL; a
  /// matrix without memory or with a stride below its columns.
  template <class T>
  void add(std::string name, MatView<const T> matrix) {
    add<T>(std::move(name), matrix, {matrix.rows, matrix.cols});
  }

  /// The same elements, row by row, under another shape: {} is a scalar. At most 8 dimensions of at
  /// most 2^48. Throws also shape_mismatch, if the shape holds another number of elements.
  template <class T>
  void add(std::string name, MatView<const T> elements, std::vector<Index> shape) {
    require_shape("elements", elements, elements.rows, elements.cols);
    constexpr Index kSize = sizeof(T);
    const auto* data = reinterpret_cast<const std::byte*>(elements.data);
    add(std::move(name), {dtype_of<T>,
                          std::move(shape),
                          {data, elements.rows, elements.cols * kSize, elements.stride * kSize}});
  }

  /// Adds a tensor of any dtype from its packed bytes. Throws as above.
  void add(StoredTensor tensor);

  /// Throws invalid_argument: a key that is taken or holds a NUL, text that is not UTF-8.
  void set_metadata(std::string key, std::string value);

  /// The file. Throws limit_exceeded if the header would exceed the format's 100,000,000 bytes.
  std::vector<std::byte> bytes() const;

  /// Writes the file under a temporary name in the same folder, flushes it to the disk and renames
  /// it: at every moment the path holds the old file or the new one, whole. On an error the old
  /// file is untouched and no other is left. A symbolic link stays, what it leads to is replaced;
  /// permissions of an existing file are kept, its owner and hard links are not.
  /// Throws io_error (also for a target that is read-only or no regular file), invalid_argument (a
  /// path with a NUL), limit_exceeded as `bytes`.
  void save(const std::string& path) const;

  /// The same without exceptions.
  Expected<void> try_save(std::string_view path) const noexcept {
    return attempt([&] { save(std::string(path)); });
  }

 private:
  struct Rows {
    const std::byte* data = nullptr;
    Index count = 0;
    Index bytes = 0;
    Index stride = 0;  // bytes between the starts of two rows

    std::uint64_t total() const noexcept;
    template <class F>
    void each_piece(F f) const;
  };
  struct Entry {
    Dtype dtype = Dtype::f32;
    std::vector<Index> shape;
    Rows rows;
  };

  using Item = std::map<std::string, Entry>::value_type;

  void add(std::string name, Entry entry);
  std::vector<const Item*> in_file_order() const;
  std::string start_of_file(const std::vector<const Item*>& order) const;

  std::map<std::string, Entry> entries_;
  std::map<std::string, std::string> metadata_;
};

}  // namespace mole::inline MOLE_ABI
