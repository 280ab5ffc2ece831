// SPDX-License-Identifier: Apache-2.0
// The names in a folder. Once it is open nothing is allocated any more.
#pragma once

#include <dirent.h>

#include <string>

#include "mole/core/config.hpp"

namespace mole::inline MOLE_ABI {
namespace io {

/// An open folder; `if (!directory)` it could not be opened and errno says why.
class Directory {
 public:
  Directory() = default;
  explicit Directory(const std::string& path);
  ~Directory();
  Directory(Directory&& other) noexcept;
  Directory& operator=(Directory&& other) noexcept;

  explicit operator bool() const noexcept { return stream_ != nullptr; }
  int descriptor() const noexcept { return ::dirfd(stream_); }

  /// The next name but "." and "..", valid until the next call; null at the end, and on an error,
  /// which errno then holds (0 at the end).
  const char* next() noexcept;
  void rewind() noexcept { ::rewinddir(stream_); }

 private:
  DIR* stream_ = nullptr;
};

}  // namespace io
}  // namespace mole::inline MOLE_ABI
