// SPDX-License-Identifier: Apache-2.0
// Regular files: read whole or in part, or replaced whole. Everything else (directory, FIFO,
// device) is refused by name before a byte is read or written.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

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
  /// The whole file, read-only, mapped as long as a copy of the pointer lives. Not for empty files.
  std::shared_ptr<const std::byte> map() const;

 private:
  std::string path_;
  int descriptor_ = -1;
  std::uint64_t size_ = 0;
};

/// Whether anything has this path.
bool exists(const std::string& path);
bool is_folder(const std::string& path);

/// A file that takes its place all at once. What is written goes to a temporary file in the same
/// folder; `commit` flushes it to the disk and renames it. Without a commit nothing has changed and
/// the temporary file goes away. A symbolic link stays and what it leads to is replaced; a new file
/// gets the permissions that the process gives new files, an existing one keeps its own.
/// Throws io_error with path, operation and the system's reason (a read-only target and one that is
/// no regular file are refused by the constructor); invalid_argument for a path with a NUL.
class NewFile {
 public:
  explicit NewFile(const std::string& path);
  ~NewFile();
  NewFile(const NewFile&) = delete;
  NewFile& operator=(const NewFile&) = delete;

  void write(std::span<const std::byte> bytes);
  /// Once, at the end. If only the folder cannot be flushed, the new file is in place already.
  void commit();

 private:
  NewFile() = default;
  void open_folder(const std::string& path);
  void create(int mode);
  void write_out(std::span<const std::byte> bytes);

  std::string shown_;             // for messages
  std::string name_, temporary_;  // in the folder; no temporary file while empty
  std::vector<std::byte> small_;  // gathers small pieces
  int folder_ = -1;
  int descriptor_ = -1;
};

/// A NewFile with these bytes.
void write_atomically(const std::string& path, std::span<const std::byte> bytes);
void write_atomically(const std::string& path, std::string_view text);

/// The whole file as text. Throws limit_exceeded above `limit` bytes, naming `option`.
std::string read_text(const std::string& path, std::uint64_t limit, const char* option);

}  // namespace io
}  // namespace mole::inline MOLE_ABI
