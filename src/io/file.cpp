// SPDX-License-Identifier: Apache-2.0
#include "io/file.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <cstdlib>
#include <system_error>
#include <utility>

#include "io/text.hpp"
#include "mole/core/error.hpp"

namespace mole::inline MOLE_ABI {
namespace io {
namespace {

constexpr std::size_t kGathered = 1 << 16;

[[noreturn]] void refuse(const std::string& path, const char* operation, int error) {
  fail(error == ENOMEM ? Errc::out_of_memory : Errc::io_error, path, ": ", operation,
       " failed: ", std::generic_category().message(error));
}

const char* kind_name(mode_t mode) {
  if (S_ISDIR(mode)) return "a directory";
  if (S_ISFIFO(mode)) return "a FIFO";
  if (S_ISSOCK(mode)) return "a socket";
  return "a device";
}

void check_path(const std::string& path) {
  require(path.find('\0') == std::string::npos, Errc::invalid_argument, shown_path(path),
          ": a path cannot hold a NUL byte");
}

bool is_link(const std::string& path) {
  struct stat status {};
  return ::lstat(path.c_str(), &status) == 0 && S_ISLNK(status.st_mode);
}

}  // namespace

File::File(const std::string& path) : path_(shown_path(path)) {
  check_path(path);
  struct stat status {};
  // Looked at before it is opened: opening a FIFO would wait, opening a device may act.
  if (::stat(path.c_str(), &status) != 0) refuse(path_, "stat", errno);
  require(S_ISREG(status.st_mode), Errc::io_error, path_, ": is ", kind_name(status.st_mode),
          ", expected a regular file");
  descriptor_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (descriptor_ < 0) refuse(path_, "open", errno);
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
    if (count < 0) refuse(path_, "read", errno);
    require(count > 0, Errc::io_error, path_, ": became shorter while it was read, at byte ",
            offset);
    out = out.subspan(static_cast<std::size_t>(count));
    offset += static_cast<std::uint64_t>(count);
  }
}

std::shared_ptr<const std::byte> File::map() const {
  const auto length = static_cast<std::size_t>(size_);
  void* memory = ::mmap(nullptr, length, PROT_READ, MAP_PRIVATE, descriptor_, 0);
  if (memory == MAP_FAILED) refuse(path_, "mmap", errno);
  std::shared_ptr<const std::byte> mapped(
      static_cast<const std::byte*>(memory),
      [memory, length](const std::byte*) { ::munmap(memory, length); });
  struct stat status {};
  const bool is_whole =
      ::fstat(descriptor_, &status) == 0 && static_cast<std::uint64_t>(status.st_size) >= size_;
  require(is_whole, Errc::io_error, path_, ": became shorter while it was mapped");
  return mapped;
}

NewFile::NewFile(const std::string& path) : NewFile() {
  check_path(path);
  shown_ = shown_path(path);
  small_.reserve(kGathered);
  open_folder(path);
  struct stat status {};
  if (::fstatat(folder_, name_.c_str(), &status, 0) != 0) {
    if (errno != ENOENT) refuse(shown_, "stat", errno);
    create(0666);
    return;
  }
  require(S_ISREG(status.st_mode), Errc::io_error, shown_, ": is ", kind_name(status.st_mode),
          ", expected a regular file");
  const bool is_writable =
      (status.st_mode & 0222) != 0 && ::faccessat(folder_, name_.c_str(), W_OK, AT_EACCESS) == 0;
  require(is_writable, Errc::io_error, shown_, ": is read-only");
  create(0600);
  if (::fchmod(descriptor_, status.st_mode & 0777) != 0) refuse(shown_, "chmod", errno);
}

NewFile::~NewFile() {
  if (!temporary_.empty()) ::unlinkat(folder_, temporary_.c_str(), 0);
  if (descriptor_ >= 0) ::close(descriptor_);
  if (folder_ >= 0) ::close(folder_);
}

void NewFile::open_folder(const std::string& path) {
  std::string target = path;
  if (is_link(path)) {
    char real[PATH_MAX];
    if (::realpath(path.c_str(), real) == nullptr) {
      refuse(shown_, "following the symbolic link", errno);
    }
    target = real;
  }
  const std::size_t start = target.rfind('/') + 1;
  name_ = target.substr(start);
  require(!name_.empty(), Errc::io_error, shown_, ": names no file");
  const std::string folder = start == 0 ? "." : target.substr(0, start);
  folder_ = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (folder_ < 0) refuse(shown_, "opening the folder", errno);
}

void NewFile::create(int mode) {
  constexpr int kFlags = O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC;
  while (descriptor_ < 0) {
    std::uint64_t number = 0;
    if (::getrandom(&number, sizeof(number), 0) != sizeof(number))
      refuse(shown_, "getrandom", errno);
    std::string name = fmt::format(".mole-{:016x}.tmp", number);
    descriptor_ = ::openat(folder_, name.c_str(), kFlags, mode);
    if (descriptor_ >= 0) {
      temporary_ = std::move(name);
    } else if (errno != EEXIST) {
      refuse(shown_, "creating a temporary file beside it", errno);
    }
  }
}

void NewFile::write(std::span<const std::byte> bytes) {
  if (small_.size() + bytes.size() > kGathered) {
    write_out(small_);
    small_.clear();
  }
  if (bytes.size() > kGathered) {
    write_out(bytes);
  } else {
    small_.insert(small_.end(), bytes.begin(), bytes.end());
  }
}

void NewFile::write_out(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t count = ::write(descriptor_, bytes.data(), bytes.size());
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) refuse(shown_, "write", count < 0 ? errno : EIO);
    bytes = bytes.subspan(static_cast<std::size_t>(count));
  }
}

void NewFile::commit() {
  write_out(small_);
  small_.clear();
  if (::fsync(descriptor_) != 0) refuse(shown_, "fsync", errno);
  if (::close(std::exchange(descriptor_, -1)) != 0) refuse(shown_, "close", errno);
  if (::renameat(folder_, temporary_.c_str(), folder_, name_.c_str()) != 0) {
    refuse(shown_, "rename", errno);
  }
  temporary_.clear();
  // EINVAL: a file system that has no such thing.
  if (::fsync(folder_) != 0 && errno != EINVAL) refuse(shown_, "fsync of the folder", errno);
}

void write_atomically(const std::string& path, std::span<const std::byte> bytes) {
  NewFile file(path);
  file.write(bytes);
  file.commit();
}

void write_atomically(const std::string& path, std::string_view text) {
  write_atomically(path, std::as_bytes(std::span(text)));
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
