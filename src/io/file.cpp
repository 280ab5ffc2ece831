// SPDX-License-Identifier: Apache-2.0
#include "io/file.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

#include "io/text.hpp"
#include "mole/core/error.hpp"

namespace mole::inline MOLE_ABI {
namespace io {
namespace {

std::string reason(int error) {
  return std::generic_category().message(error);
}

const char* kind_name(mode_t mode) {
  if (S_ISDIR(mode)) return "a directory";
  if (S_ISFIFO(mode)) return "a FIFO";
  if (S_ISSOCK(mode)) return "a socket";
  return "a device";
}

}  // namespace

File::File(const std::string& path) : path_(shown_path(path)) {
  require(path.find('\0') == std::string::npos, Errc::invalid_argument, path_,
          ": a path cannot hold a NUL byte");
  struct stat status {};
  // Looked at before it is opened: opening a FIFO would wait, opening a device may act.
  require(::stat(path.c_str(), &status) == 0, Errc::io_error, path_,
          ": stat failed: ", reason(errno));
  require(S_ISREG(status.st_mode), Errc::io_error, path_, ": is ", kind_name(status.st_mode),
          ", expected a regular file");
  descriptor_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  require(descriptor_ >= 0, Errc::io_error, path_, ": open failed: ", reason(errno));
  if (::fstat(descriptor_, &status) != 0 || !S_ISREG(status.st_mode)) {
    ::close(descriptor_);
    fail(Errc::io_error, path_, ": changed while it was opened");
  }
  size_ = static_cast<std::uint64_t>(status.st_size);
}

File::~File() {
  ::close(descriptor_);
}

void File::read(std::uint64_t offset, std::span<std::byte> out) const {
  while (!out.empty()) {
    const ssize_t count = ::pread(descriptor_, out.data(), out.size(), static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) continue;
    require(count >= 0, Errc::io_error, path_, ": read failed: ", reason(errno));
    require(count > 0, Errc::io_error, path_, ": became shorter while it was read, at byte ",
            offset);
    out = out.subspan(static_cast<std::size_t>(count));
    offset += static_cast<std::uint64_t>(count);
  }
}

bool exists(const std::string& path) {
  struct stat status {};
  return ::stat(path.c_str(), &status) == 0;
}

bool is_folder(const std::string& path) {
  struct stat status {};
  return ::stat(path.c_str(), &status) == 0 && S_ISDIR(status.st_mode);
}

std::string read_text(const std::string& path, std::uint64_t limit, const char* option) {
  const File file(path);
  require(file.size() <= limit, Errc::limit_exceeded, shown_path(path), ": ", file.size(),
          " bytes exceed the limit of ", limit, " (option ", option, ")");
  std::string text(static_cast<std::size_t>(file.size()), '\0');
  file.read(0, std::as_writable_bytes(std::span<char>(text)));
  return text;
}

}  // namespace io
}  // namespace mole::inline MOLE_ABI
