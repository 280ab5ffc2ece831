// SPDX-License-Identifier: Apache-2.0
// Regular files, read whole or in part. Everything else (directory, FIFO, device) is refused by
// name before a byte is read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "mole/core/config.hpp"

namespace mole::inline MOLE_ABI {
namespace io {

/// An open regular file. Throws io_error with path, operation and the system's reason;
/// invalid_argument for a path with a NUL.
class File {
 public:
  explicit File(const std::string& path);
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  std::uint64_t size() const noexcept { return size_; }
  /// Fills `out` from `offset`; a file that became shorter meanwhile is an io_error.
  void read(std::uint64_t offset, std::span<std::byte> out) const;

 private:
  std::string path_;
  int descriptor_ = -1;
  std::uint64_t size_ = 0;
};

/// Whether anything has this path.
bool exists(const std::string& path);
bool is_folder(const std::string& path);

/// The whole file as text. Throws limit_exceeded above `limit` bytes, naming `option`.
std::string read_text(const std::string& path, std::uint64_t limit, const char* option);

}  // namespace io
}  // namespace mole::inline MOLE_ABI
