// SPDX-License-Identifier: Apache-2.0
#include "io/new_folder.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <system_error>
#include <utility>

#include "io/text.hpp"
#include "mole/core/error.hpp"

namespace mole::inline MOLE_ABI {
namespace io {
namespace {

[[noreturn]] void refuse(const std::string& path, const char* operation, int error) {
  fail(error == ENOMEM ? Errc::out_of_memory : Errc::io_error, shown_path(path), ": ", operation,
       " failed: ", std::generic_category().message(error));
}

struct Split {
  std::string parent, name;
};

// Of a path without a slash at its end.
Split split(const std::string& path) {
  const std::size_t slash = path.rfind('/');
  if (slash == std::string::npos) return {".", path};
  std::size_t end = slash;
  while (end > 1 && path[end - 1] == '/') --end;
  return {path.substr(0, std::max<std::size_t>(end, 1)), path.substr(slash + 1)};
}

std::string joined(const std::string& parent, const std::string& name) {
  return parent + (parent == "/" ? "" : "/") + name;
}

// Absolute, with the links resolved of the part that exists and without "." and "..".
std::string resolved(std::string path) {
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  const std::unique_ptr<char, decltype(&std::free)> whole(::realpath(path.c_str(), nullptr),
                                                          &std::free);
  if (whole != nullptr) return whole.get();
  if (errno != ENOENT || path.empty()) refuse(path, "resolving the path", errno);
  const Split part = split(path);
  const std::string parent = resolved(part.parent);
  if (part.name == ".") return parent;
  if (part.name == "..") return split(parent).parent;
  return joined(parent, part.name);
}

// And the folders above it, where they do not exist.
void make_folders(const std::string& path) {
  struct stat status {};
  if (::stat(path.c_str(), &status) == 0) return;
  if (errno != ENOENT) refuse(path, "making the folder", errno);
  make_folders(split(path).parent);
  if (::mkdir(path.c_str(), 0777) != 0 && errno != EEXIST) {
    refuse(path, "making the folder", errno);
  }
}

Directory opened(const std::string& path) {
  Directory folder(path);
  if (!folder) refuse(path, "reading the folder", errno);
  return folder;
}

// The folder's own entries are on the disk.
void flush(const std::string& folder) noexcept {
  const int descriptor = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (descriptor < 0) return;
  ::fsync(descriptor);
  ::close(descriptor);
}

// False where the system or the file system cannot.
bool exchanged(const std::string& a, const std::string& b) {
#ifdef RENAME_EXCHANGE
  if (::renameat2(AT_FDCWD, a.c_str(), AT_FDCWD, b.c_str(), RENAME_EXCHANGE) == 0) return true;
  if (errno != ENOSYS && errno != EINVAL && errno != ENOTSUP) refuse(b, "exchanging", errno);
#endif
  return false;
}

// Whether relative paths start there.
bool is_current(const struct stat& folder) {
  struct stat current {};
  return ::stat(".", &current) == 0 && current.st_dev == folder.st_dev &&
         current.st_ino == folder.st_ino;
}

// The owner as far as the system allows it, then the permissions, which a new owner resets.
void take_over(const struct stat& old, int folder) noexcept {
  struct stat now {};
  mode_t mode = old.st_mode & 07777u;
  if (::fchown(folder, old.st_uid, old.st_gid) != 0 &&
      ::fchown(folder, static_cast<uid_t>(-1), old.st_gid) != 0 &&
      (::fstat(folder, &now) != 0 || now.st_gid != old.st_gid)) {
    mode &= 05707u;  // what the old group may do is not for another one
  }
  ::fchmod(folder, mode);
}

// Fails with EEXIST where the name is taken.
int move_entry(const char* name, int from, int to) noexcept {
  struct stat status {};
  if (::fstatat(to, name, &status, AT_SYMLINK_NOFOLLOW) != 0) {
    return ::renameat(from, name, to, name);
  }
  errno = EEXIST;
  return -1;
}

}  // namespace

NewFolder::NewFolder(const std::string& target, bool overwrite) {
  require(target.find('\0') == std::string::npos, Errc::invalid_argument, shown_path(target),
          ": a path cannot hold a NUL byte");
  target_ = resolved(target);
  struct stat status {};
  const bool exists = ::lstat(target_.c_str(), &status) == 0;
  if (exists) {
    require(S_ISDIR(status.st_mode), Errc::io_error, shown_path(target_),
            ": is no folder, so none can be written there");
    require(!is_current(status), Errc::state_error, shown_path(target_),
            ": is the current directory, which cannot be replaced");
    old_ = opened(target_);
    replaces_ = old_.next() != nullptr;
    if (!replaces_ && errno != 0) refuse(target_, "reading the folder", errno);
    require(!replaces_ || overwrite, Errc::state_error, shown_path(target_),
            ": the folder is not empty (ok with the option overwrite)");
  }
  parent_ = split(target_).parent;
  make_folders(parent_);
  make();
  if (exists) take_over(status, new_.descriptor());
}

void NewFolder::make() {
  constexpr std::size_t kLongest = 100;  // with what is added it must still be a name
  const std::string name = split(target_).name;
  const std::string start =
      joined(parent_, "." + (name.size() <= kLongest ? name : "mole") + ".new-");
  constexpr int kAttempts = 1000;
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    std::string path = start + std::to_string(::getpid()) + "-" + std::to_string(attempt);
    aside_ = path + "-old";
    if (::mkdir(path.c_str(), 0777) == 0) {
      temporary_ = std::move(path);
      new_ = Directory(temporary_);
      if (new_) return;
      const int error = errno;
      ::rmdir(temporary_.c_str());
      refuse(temporary_, "reading the folder", error);
    }
    if (errno != EEXIST || attempt + 1 == kAttempts) refuse(path, "making the folder", errno);
  }
}

NewFolder::~NewFolder() {
  if (committed_) return;
  new_.rewind();
  while (const char* name = new_.next()) ::unlinkat(new_.descriptor(), name, 0);
  ::rmdir(temporary_.c_str());  // what cannot go stays, under a name that nobody reads
}

void NewFolder::commit(const std::vector<std::string>& replaced) {
  flush(temporary_);
  if (replaces_) {
    exchange();
    committed_ = true;
    move_along(replaced);
  } else {
    // A folder that somebody filled meanwhile is not replaced: rename refuses it.
    if (::rename(temporary_.c_str(), target_.c_str()) != 0) refuse(target_, "renaming", errno);
    committed_ = true;
  }
  flush(parent_);
}

// Afterwards the new folder has the target's name, and temporary_ is the name of the old one.
void NewFolder::exchange() {
  if (exchanged(temporary_, target_)) return;
  if (::rename(target_.c_str(), aside_.c_str()) != 0) refuse(target_, "renaming", errno);
  if (::rename(temporary_.c_str(), target_.c_str()) != 0) {
    const int error = errno;
    if (::rename(aside_.c_str(), target_.c_str()) == 0) refuse(target_, "renaming", error);
    fail(Errc::io_error, shown_path(target_), ": is not there any more, what it held is in ",
         shown_path(aside_), ": ", std::generic_category().message(error));
  }
  if (::rename(aside_.c_str(), temporary_.c_str()) != 0) std::swap(aside_, temporary_);
}

void NewFolder::move_along(const std::vector<std::string>& replaced) {
  int error = 0;
  for (bool again = true; again && error == 0;) {  // entries that go may hide others
    again = false;
    old_.rewind();
    while (const char* name = old_.next()) {
      again = true;
      const bool goes = std::find(replaced.begin(), replaced.end(), name) != replaced.end();
      const int done = goes ? ::unlinkat(old_.descriptor(), name, 0)
                            : move_entry(name, old_.descriptor(), new_.descriptor());
      if (done != 0 && error == 0) error = errno;
    }
    if (error == 0) error = errno;
  }
  if (error == 0 && ::rmdir(temporary_.c_str()) != 0) error = errno;
  require(error == 0, Errc::io_error, shown_path(target_),
          ": is written, but what the old folder held is in ", shown_path(temporary_), ": ",
          std::generic_category().message(error));
}

}  // namespace io
}  // namespace mole::inline MOLE_ABI
