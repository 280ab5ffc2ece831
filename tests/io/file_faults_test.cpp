// SPDX-License-Identifier: Apache-2.0
// What is left when memory, the disk or the process fails in the middle of reading or saving.
#undef _FORTIFY_SOURCE  // its inline versions would hide the system calls that are replaced below

#include <fcntl.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "io/file_builder.hpp"
#include "io/new_folder.hpp"
#include "mole/core/random.hpp"
#include "mole/io/safetensors.hpp"
#include "mole/io/safetensors_writer.hpp"
#include "support/alloc_counter.hpp"
#include "support/catch.hpp"

namespace {

// What the system calls of this program do while an object lives. Without one they only pass on.
struct SystemFaults {
  static SystemFaults* active;

  int error = 0;             // of the n-th call
  long n = 0;                // 0: none fails
  bool for_ever = false;     // and all after it
  std::string_view only;     // counts only calls whose names start so; empty: all
  bool no_exchange = false;  // a file system that cannot exchange two names
  std::size_t transfer = 0;  // most bytes that one read or write moves; 0: all
  int interrupt = 0;         // every so many reads or writes are interrupted first; 0: none

  long calls = 0, transfers = 0;
  std::string failed;  // the last call that was made to fail

  explicit SystemFaults(int error_ = 0, long n_ = 0, bool for_ever_ = false)
      : error(error_), n(n_), for_ever(for_ever_) {
    active = this;
  }
  ~SystemFaults() { active = nullptr; }
  SystemFaults(const SystemFaults&) = delete;
  SystemFaults& operator=(const SystemFaults&) = delete;
};
SystemFaults* SystemFaults::active = nullptr;

// True, with errno set, if this call must fail.
bool fails(const char* call) {
  SystemFaults* faults = SystemFaults::active;
  if (faults == nullptr || !std::string_view(call).starts_with(faults->only)) return false;
  const long number = ++faults->calls;
  if (faults->n == 0 || number < faults->n || (number > faults->n && !faults->for_ever)) {
    return false;
  }
  faults->failed = call;
  errno = faults->error;
  return true;
}

bool is_interrupted() {
  SystemFaults* faults = SystemFaults::active;
  if (faults == nullptr || faults->interrupt == 0) return false;
  if (++faults->transfers % faults->interrupt != 0) return false;
  errno = EINTR;
  return true;
}

std::size_t transferred(std::size_t wanted) {
  const SystemFaults* faults = SystemFaults::active;
  if (faults == nullptr || faults->transfer == 0) return wanted;
  return std::min(wanted, faults->transfer);
}

mode_t mode_argument(int flags, std::va_list arguments) {
  return (flags & O_CREAT) != 0 ? static_cast<mode_t>(va_arg(arguments, int)) : 0;
}

}  // namespace

// These take the place of the C library's in this program.
extern "C" {
ssize_t pread(int file, void* to, std::size_t bytes, off_t offset) {
  if (is_interrupted() || fails("pread")) return -1;
  return ::syscall(SYS_pread64, file, to, transferred(bytes), offset);
}
ssize_t write(int file, const void* from, std::size_t bytes) {
  if (is_interrupted() || fails("write")) return -1;
  return ::syscall(SYS_write, file, from, transferred(bytes));
}
int open(const char* path, int flags, ...) {
  std::va_list arguments;
  va_start(arguments, flags);
  const mode_t mode = mode_argument(flags, arguments);
  va_end(arguments);
  return fails("open") ? -1 : static_cast<int>(::syscall(SYS_openat, AT_FDCWD, path, flags, mode));
}
int openat(int folder, const char* path, int flags, ...) {
  std::va_list arguments;
  va_start(arguments, flags);
  const mode_t mode = mode_argument(flags, arguments);
  va_end(arguments);
  return fails("openat") ? -1 : static_cast<int>(::syscall(SYS_openat, folder, path, flags, mode));
}
int fchmod(int file, mode_t mode) noexcept {
  return fails("fchmod") ? -1 : static_cast<int>(::syscall(SYS_fchmod, file, mode));
}
int fsync(int file) {
  return fails("fsync") ? -1 : static_cast<int>(::syscall(SYS_fsync, file));
}
int close(int file) {  // the descriptor is gone even if it reports an error
  const int result = static_cast<int>(::syscall(SYS_close, file));
  return fails("close") ? -1 : result;
}
int renameat(int from, const char* old_name, int to, const char* new_name) noexcept {
  return fails("renameat")
             ? -1
             : static_cast<int>(::syscall(SYS_renameat2, from, old_name, to, new_name, 0));
}
int renameat2(int from, const char* old_name, int to, const char* new_name,
              unsigned flags) noexcept {
  if (SystemFaults::active != nullptr && SystemFaults::active->no_exchange) {
    errno = EINVAL;
    return -1;
  }
  return fails("renameat2")
             ? -1
             : static_cast<int>(::syscall(SYS_renameat2, from, old_name, to, new_name, flags));
}
int rename(const char* old_name, const char* new_name) noexcept {
  return fails("rename") ? -1
                         : static_cast<int>(
                               ::syscall(SYS_renameat2, AT_FDCWD, old_name, AT_FDCWD, new_name, 0));
}
ssize_t getrandom(void* to, std::size_t bytes, unsigned flags) {
  return fails("getrandom") ? -1 : ::syscall(SYS_getrandom, to, bytes, flags);
}
}

namespace {

using mole::Errc;
using mole::Expected;
using mole::MatView;
using mole::SafeTensors;
using mole::SafeTensorsWriter;
using mole::test::as_bytes;
using mole::test::TemporaryFolder;
namespace fs = std::filesystem;

std::string content(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

int entries(const std::string& folder) {
  return static_cast<int>(std::distance(fs::directory_iterator(folder), {}));
}

int open_descriptors() {
  return entries("/proc/self/fd");
}

/// A writer with memory of its own: some small tensors, a strided one, and one of `large` floats.
struct Sample {
  std::vector<float> values;
  SafeTensorsWriter writer;

  explicit Sample(float value, int large = 100'000)
      : values(static_cast<std::size_t>(large), value) {
    for (int i = 0; i < 5; ++i) {
      writer.add<float>("small." + std::to_string(i), MatView<const float>(values.data(), 3, 5));
    }
    writer.add<float>("strided", MatView<const float>(values.data(), 20, 4, 9));
    writer.add<float>("large", MatView<const float>(values.data(), 4, large / 4));
    writer.set_metadata("format", "pt");
    writer.set_metadata("a key that is longer than a short string", "and its value as well");
  }
  std::string bytes() const {
    const std::vector<std::byte> file = writer.bytes();
    return {reinterpret_cast<const char*>(file.data()), file.size()};
  }
};

/// A folder with one file, to be replaced by another.
struct Replacement {
  TemporaryFolder folder;
  Sample old_one{1, 5000}, new_one{2};
  std::string path = folder.write("f.safetensors", old_one.bytes());
  std::string before = old_one.bytes(), after = new_one.bytes();

  void restore() { folder.write("f.safetensors", before); }
  Expected<void> save() { return new_one.writer.try_save(path); }
};

// Exit code of f in a process of its own; 128 + signal if it was killed.
template <class F>
int in_child(F f) {
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) ::_exit(f());
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

}  // namespace

TEST_CASE("faults: short and interrupted transfers lose nothing", "[io][faults]") {
  Replacement files;
  {
    SystemFaults faults;
    faults.transfer = 4093;
    faults.interrupt = 3;
    CHECK(files.save().has_value());
    CHECK(faults.transfers > 100);
  }
  CHECK(content(files.path) == files.after);
  SystemFaults faults;
  faults.transfer = 1021;
  faults.interrupt = 2;
  const SafeTensors opened = SafeTensors::open(files.path);
  CHECK(faults.transfers > 400);
  for (const mole::StoredTensor& tensor : opened.tensors()) {
    const std::vector<float> read = opened.read<float>(tensor.name);
    CHECK(std::count(read.begin(), read.end(), 2.0f) == tensor.elements());
  }
}

TEST_CASE("faults: whichever system call fails, the old file stays", "[io][faults]") {
  const auto [error, text] = GENERATE(std::make_tuple(ENOSPC, "No space left on device"),
                                      std::make_tuple(EIO, "Input/output error"));
  const bool for_ever = GENERATE(false, true);
  Replacement files;
  const int descriptors = open_descriptors();
  std::string failed;
  for (long n = 1;; ++n) {
    SystemFaults faults(error, n, for_ever);
    const Expected<void> saved = files.save();
    SystemFaults::active = nullptr;
    INFO(n << ": " << faults.failed);
    CHECK(entries(files.folder.path()) == 1);
    CHECK(open_descriptors() == descriptors);
    const bool is_old = content(files.path) == files.before;
    CHECK((is_old || content(files.path) == files.after));
    if (faults.failed.empty()) {
      CHECK(saved.has_value());
      CHECK(!is_old);
      break;
    }
    failed += " " + faults.failed;
    if (saved.has_value()) {  // the last close, which has nothing to lose
      CHECK(!is_old);
    } else {
      const std::string message = saved.error().message();
      INFO(message);
      CHECK(saved.error().code() == Errc::io_error);
      CHECK(message.find(files.path) != std::string::npos);
      CHECK(message.find(text) != std::string::npos);
      CHECK(is_old == (message.find("fsync of the folder") == std::string::npos));
    }
    files.restore();
  }
  if (!for_ever) {
    CHECK(failed ==
          " open getrandom openat fchmod write write write fsync close renameat fsync close");
  }
}

TEST_CASE("faults: whichever system call fails, reading says so", "[io][faults]") {
  const bool is_mapped = GENERATE(false, true);
  Replacement files;
  const int descriptors = open_descriptors();
  std::string failed;
  for (long n = 1;; ++n) {
    SystemFaults faults(EIO, n);
    const auto read =
        is_mapped ? SafeTensors::try_map(files.path) : SafeTensors::try_open(files.path);
    SystemFaults::active = nullptr;
    INFO(n << ": " << faults.failed);
    CHECK(open_descriptors() == descriptors);
    CHECK(read.has_value() == (faults.failed.empty() || faults.failed == "close"));
    if (!read) {
      const std::string message = read.error().message();
      CHECK(read.error().code() == Errc::io_error);
      CHECK(message.find(files.path) != std::string::npos);
      CHECK(message.find("Input/output error") != std::string::npos);
    }
    if (faults.failed.empty()) break;
    failed += " " + faults.failed;
  }
  CHECK(failed == (is_mapped ? " open pread pread close" : " open pread pread pread close"));
}

TEST_CASE("faults: a temporary name that is taken is not used", "[io][faults]") {
  Replacement files;
  SystemFaults faults(EEXIST, 1);
  faults.only = "openat";
  CHECK(files.save().has_value());
  CHECK(faults.calls == 2);
  CHECK(content(files.path) == files.after);
}

TEST_CASE("faults: a file system that cannot flush folders will do", "[io][faults]") {
  Replacement files;
  SystemFaults faults(EINVAL, 2);
  faults.only = "fsync";
  CHECK(files.save().has_value());
  CHECK(faults.failed == "fsync");
  CHECK(content(files.path) == files.after);
}

namespace {

std::set<std::string> names_in(const std::string& folder) {
  std::set<std::string> names;
  if (!fs::exists(folder)) return names;
  for (const auto& entry : fs::directory_iterator(folder)) names.insert(entry.path().filename());
  return names;
}

/// A folder with the files "old" and "card", to be replaced by one with the file "new".
struct FolderReplacement {
  TemporaryFolder folder;
  std::string target = folder.path() + "/kept", message;

  FolderReplacement() {
    fs::create_directory(target);
    folder.write("kept/old", "old");
    folder.write("kept/card", "card");
  }
  /// Replaces "old" while the faults act; one word on what is there then.
  std::string commit(SystemFaults& faults) {
    SystemFaults::active = nullptr;
    try {
      mole::io::NewFolder made(target, true);
      std::ofstream(made.path() + "/new") << "new";
      SystemFaults::active = &faults;
      made.commit({"old"});
    } catch (const mole::Error& error) {
      message = error.what();
    }
    SystemFaults::active = nullptr;
    return outcome();
  }

 private:
  std::string outcome() const {
    using Names = std::set<std::string>;
    std::string hidden;
    for (const std::string& name : names_in(folder.path())) {
      if (name != "kept") hidden.append(folder.path()).append("/").append(name);
    }
    const Names found = names_in(target), rest = names_in(hidden), before = {"card", "old"};
    if (hidden.empty()) {
      if (found == before && !message.empty()) return "untouched";
      return found == Names{"card", "new"} && message.empty() ? "replaced" : "lost";
    }
    const std::string shown = hidden.substr(folder.path().size()) + ":";
    if (message.find(shown) == std::string::npos) return "lost";
    if (found == Names{"new"} && rest == Names{"card"}) return "rest-aside";
    return !fs::exists(target) && rest == before ? "all-aside" : "lost";
  }
};

}  // namespace

TEST_CASE("faults: whichever rename fails, no file of a replaced folder is lost", "[io][faults]") {
  const bool for_ever = GENERATE(false, true);
  std::string outcomes;
  for (long n = 1; n <= 5; ++n) {
    FolderReplacement folders;
    SystemFaults faults(EIO, n, for_ever);
    faults.only = "rename";
    faults.no_exchange = true;
    outcomes += " " + folders.commit(faults);
  }
  // The old folder aside, the new one into place, the old one to its other name, its card along.
  CHECK(outcomes == (for_ever ? " untouched all-aside rest-aside rest-aside replaced"
                              : " untouched untouched replaced rest-aside replaced"));
}

TEST_CASE("faults: an exchange that fails leaves the old folder", "[io][faults]") {
  FolderReplacement folders;
  SystemFaults faults(EIO, 1);
  faults.only = "rename";
  CHECK(folders.commit(faults) == "untouched");
  CHECK(faults.failed == "renameat2");
}

namespace {

// Fails the n-th allocation of f for n = 1, 2, 3, ... until none is left to fail.
template <class F, class After>
void fail_every_allocation(F f, Errc expected, After after) {
  const int descriptors = open_descriptors();
  for (const bool for_ever : {false, true}) {
    CHECK(f() == expected);
    after();
    int failures = 0;
    for (long n = 1;; ++n) {
      const long live = test::live_allocations();
      bool came = false;
      Errc code{};
      {
        const test::FailingAllocations failing(n, for_ever);
        code = f();
        came = failing.came();
      }
      const long leaked = test::live_allocations() - live;
      INFO("allocation " << n << (for_ever ? " and all after it" : ""));
      CHECK(leaked == 0);
      CHECK(open_descriptors() == descriptors);
      const Errc allowed = came && code != expected ? Errc::out_of_memory : expected;
      CHECK(name(code) == name(allowed));
      failures += code == Errc::out_of_memory;
      after();
      if (!came) break;
    }
    CHECK(failures > 0);
  }
}

constexpr Errc kNone{};

template <class T>
Errc code_of(const Expected<T>& result) noexcept {
  return result ? kNone : result.error().code();
}

}  // namespace

TEST_CASE("faults: whichever allocation fails, reading is refused and nothing leaks",
          "[io][faults]") {
  const TemporaryFolder folder;
  const std::string bytes = Sample(1, 300).bytes();
  const std::string path = folder.write("f", bytes);
  const std::string broken = bytes + "x", missing = folder.path() + "/none";
  const auto nothing = [] {};
  fail_every_allocation([&] { return code_of(SafeTensors::try_open(path)); }, kNone, nothing);
  fail_every_allocation([&] { return code_of(SafeTensors::try_map(path)); }, kNone, nothing);
  fail_every_allocation([&] { return code_of(SafeTensors::try_parse(as_bytes(bytes), "f")); },
                        kNone, nothing);
  fail_every_allocation([&] { return code_of(SafeTensors::try_parse(as_bytes(broken), "f")); },
                        Errc::format_error, nothing);
  fail_every_allocation([&] { return code_of(SafeTensors::try_open(missing)); }, Errc::io_error,
                        nothing);
}

TEST_CASE("faults: whichever allocation fails, the old file stays and nothing leaks",
          "[io][faults]") {
  Replacement files;
  const std::string link = files.folder.path() + "/link";
  fs::create_symlink(files.path, link);
  const std::string path = GENERATE(false, true) ? link : files.path;
  const auto check_and_restore = [&] {
    const std::string found = content(files.path);
    CHECK((found == files.before || found == files.after));
    CHECK(entries(files.folder.path()) == 2);
    files.restore();
  };
  fail_every_allocation([&] { return code_of(files.new_one.writer.try_save(path)); }, kNone,
                        check_and_restore);
}

TEST_CASE("faults: whichever allocation fails, a writer is what it was", "[io][faults]") {
  const Sample sample(1, 300);
  const std::string bytes = sample.bytes();
  const SafeTensors parsed = SafeTensors::parse(as_bytes(bytes), "f");
  const auto write = [&] { return code_of(mole::attempt([&] { return sample.writer.bytes(); })); };
  fail_every_allocation(write, kNone, [&] { CHECK(sample.bytes() == bytes); });

  const auto rebuild = [&] {
    return code_of(mole::attempt([&] {
      SafeTensorsWriter writer;
      for (const auto& [key, value] : parsed.metadata()) writer.set_metadata(key, value);
      for (const mole::StoredTensor& tensor : parsed.tensors()) writer.add(tensor);
    }));
  };
  fail_every_allocation(rebuild, kNone, [] {});

  Sample grown(1, 300);
  const std::string before = grown.bytes();
  const auto add = [&] {
    return code_of(mole::attempt([&] {
      grown.writer.add<float>("a tensor with a name", MatView<const float>(nullptr, 0, 7));
    }));
  };
  for (long n = 1; grown.bytes() == before; ++n) {
    bool came = false;
    Errc code{};
    {
      const test::FailingAllocations failing(n, false);
      code = add();
      came = failing.came();
    }
    CHECK(code == (came ? Errc::out_of_memory : kNone));
  }
  CHECK(add() == Errc::invalid_argument);
}

TEST_CASE("faults: a limit of file size leaves the old file", "[io][faults]") {
  Replacement files;
  const int result = in_child([&] {
    const rlimit limit{100'001, 100'001};  // the write that meets it is short, the next one fails
    ::signal(SIGXFSZ, SIG_IGN);
    if (::setrlimit(RLIMIT_FSIZE, &limit) != 0) return 1;
    const Expected<void> saved = files.save();
    if (saved || saved.error().code() != Errc::io_error) return 2;
    return std::strstr(saved.error().message(), "File too large") == nullptr ? 3 : 0;
  });
  CHECK(result == 0);
  CHECK(content(files.path) == files.before);
  CHECK(entries(files.folder.path()) == 1);
}

namespace {

constexpr int kSkipped = 77;

// A small disk at `folder` that only this process sees and that goes away with it.
bool mount_small_disk(const std::string& folder) {
  const uid_t user = ::getuid();
  if (::unshare(CLONE_NEWNS) != 0) {
    if (::unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0) return false;
    std::ofstream("/proc/self/uid_map") << "0 " << user << " 1";
  }
  return ::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0 &&
         ::mount("tmpfs", folder.c_str(), "tmpfs", 0, "size=256k") == 0;
}

int fill_small_disk(const std::string& folder) {
  if (!mount_small_disk(folder)) return kSkipped;
  const std::string path = folder + "/f.safetensors";
  const Sample old_one(1, 2000), too_large(2), fits(3, 2500);
  if (!old_one.writer.try_save(path)) return 1;
  const Expected<void> saved = too_large.writer.try_save(path);
  if (saved || saved.error().code() != Errc::io_error) return 2;
  if (std::strstr(saved.error().message(), "No space left on device") == nullptr) return 3;
  if (content(path) != old_one.bytes()) return 4;
  if (entries(folder) != 1) return 5;
  if (!fits.writer.try_save(path) || content(path) != fits.bytes()) return 6;
  return 0;
}

}  // namespace

TEST_CASE("faults: a full disk leaves the old file", "[io][faults]") {
  const TemporaryFolder folder;
  const int result = in_child([&] { return fill_small_disk(folder.path()); });
  if (result == kSkipped) {
    WARN("no disk can be mounted here: a really full one is not tested");
    return;
  }
  CHECK(result == 0);
}

TEST_CASE("faults: a process that is killed while it saves leaves a whole file", "[io][faults]") {
  Replacement files;
  const mole::Random random(1);
  for (int round = 0; round < 30; ++round) {
    const pid_t child = ::fork();
    REQUIRE(child >= 0);
    if (child == 0) {
      while (files.old_one.writer.try_save(files.path) && files.save()) {
      }
      ::_exit(0);
    }
    std::this_thread::sleep_for(std::chrono::microseconds(random.below(round, 12'000)));
    REQUIRE(::kill(child, SIGKILL) == 0);
    int status = 0;
    REQUIRE(::waitpid(child, &status, 0) == child);
    CHECK(WIFSIGNALED(status));
    const std::string found = content(files.path);
    CHECK((found == files.before || found == files.after));
    CHECK(SafeTensors::try_open(files.path).has_value());
    for (const auto& entry : fs::directory_iterator(files.folder.path())) {
      if (entry.path() != files.path) fs::remove(entry.path());
    }
  }
  CHECK(entries(files.folder.path()) == 1);
}
