// SPDX-License-Identifier: Apache-2.0
#include "io/new_folder.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <system_error>

#include "io/file.hpp"
#include "io/text.hpp"
#include "mole/core/error.hpp"

namespace mole::inline MOLE_ABI {
namespace io {
namespace {

namespace fs = std::filesystem;

[[noreturn]] void refuse(const std::string& path, const char* operation, int error) {
  fail(Errc::io_error, shown_path(path), ": ", operation,
       " failed: ", std::generic_category().message(error));
}

// What f does with files. The overloads that report by error code end the process when memory is
// short, so the throwing ones are called.
template <class F>
auto tried(const std::string& path, const char* operation, F f) {
  try {
    return f();
  } catch (const fs::filesystem_error& error) {
    refuse(path, operation, error.code().value());
  }
}

// The target itself: links resolved, no slash at the end.
fs::path resolved(const std::string& target) {
  require(target.find('\0') == std::string::npos, Errc::invalid_argument, shown_path(target),
          ": a path cannot hold a NUL byte");
  fs::path path = tried(target, "resolving the path",
                        [&] { return fs::weakly_canonical(fs::absolute(target)); });
  if (!path.has_filename()) path = path.parent_path();
  return path;
}

// The folder's own entry is on the disk.
void flush(const std::string& folder) {
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

}  // namespace

NewFolder::NewFolder(const std::string& target, bool overwrite) {
  const fs::path path = resolved(target);
  target_ = path.string();
  struct stat status {};
  if (::lstat(target_.c_str(), &status) == 0) {
    require(S_ISDIR(status.st_mode), Errc::io_error, shown_path(target_),
            ": is no folder, so none can be written there");
    replaces_ = !tried(target_, "reading the folder",
                       [&] { return fs::directory_iterator(path) == fs::directory_iterator(); });
    require(!replaces_ || overwrite, Errc::state_error, shown_path(target_),
            ": the folder is not empty (ok with the option overwrite)");
  }
  tried(path.parent_path().string(), "making the folder",
        [&] { return fs::create_directories(path.parent_path()); });
  make();
  // A replaced folder keeps its permissions.
  if (replaces_) ::chmod(temporary_.c_str(), status.st_mode & 07777u);
}

void NewFolder::make() {
  const fs::path path(target_);
  const std::string start = (path.parent_path() / ("." + path.filename().string())).string();
  constexpr int kAttempts = 1000;
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    temporary_ = start + ".new-" + std::to_string(::getpid()) + "-" + std::to_string(attempt);
    if (::mkdir(temporary_.c_str(), 0777) == 0) return;
    if (errno != EEXIST) break;
  }
  const int error = errno;
  const std::string wanted = std::move(temporary_);
  temporary_.clear();
  refuse(wanted, "making the folder", error);
}

NewFolder::~NewFolder() {
  if (committed_ || temporary_.empty()) return;
  try {
    fs::remove_all(temporary_);
  } catch (const std::exception&) {
    return;  // it stays, under a name that nobody reads
  }
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
  flush(fs::path(target_).parent_path().string());
}

// Afterwards the new folder has the target's name and the old one the temporary name.
void NewFolder::exchange() {
  const std::string aside = temporary_ + "-old";
  if (exchanged(temporary_, target_)) return;
  if (::rename(target_.c_str(), aside.c_str()) != 0) refuse(target_, "renaming", errno);
  if (::rename(temporary_.c_str(), target_.c_str()) != 0) {
    const int error = errno;
    ::rename(aside.c_str(), target_.c_str());
    refuse(target_, "renaming", error);
  }
  if (::rename(aside.c_str(), temporary_.c_str()) != 0) refuse(aside, "renaming", errno);
}

void NewFolder::move_along(const std::vector<std::string>& replaced) const {
  try {
    std::vector<fs::path> entries;
    for (const auto& entry : fs::directory_iterator(temporary_)) entries.push_back(entry.path());
    for (const fs::path& entry : entries) {
      const std::string name = entry.filename().string();
      const bool goes = std::find(replaced.begin(), replaced.end(), name) != replaced.end();
      if (!goes) fs::rename(entry, fs::path(target_) / name);
    }
    fs::remove_all(temporary_);
  } catch (const fs::filesystem_error& error) {
    fail(Errc::io_error, shown_path(target_), ": is written, but what the old folder held is in ",
         shown_path(temporary_), ": ", error.code().message());
  }
}

}  // namespace io
}  // namespace mole::inline MOLE_ABI
