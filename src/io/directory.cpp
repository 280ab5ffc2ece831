// SPDX-License-Identifier: Apache-2.0
#include "io/directory.hpp"

#include <cerrno>
#include <cstring>
#include <utility>

namespace mole::inline MOLE_ABI {
namespace io {

Directory::Directory(const std::string& path) : stream_(::opendir(path.c_str())) {}

Directory::~Directory() {
  if (stream_ != nullptr) ::closedir(stream_);
}

Directory::Directory(Directory&& other) noexcept : stream_(std::exchange(other.stream_, nullptr)) {}

Directory& Directory::operator=(Directory&& other) noexcept {
  std::swap(stream_, other.stream_);
  return *this;
}

const char* Directory::next() noexcept {
  for (;;) {
    errno = 0;
    const dirent* entry = ::readdir(stream_);
    if (entry == nullptr) return nullptr;
    const char* name = entry->d_name;
    if (std::strcmp(name, ".") != 0 && std::strcmp(name, "..") != 0) return name;
  }
}

}  // namespace io
}  // namespace mole::inline MOLE_ABI
