// SPDX-License-Identifier: Apache-2.0
// The files in tests/io/data come from the reference implementation (safetensors 0.8.0).
#include "mole/io/safetensors_writer.hpp"

#include <sys/stat.h>
#include <unistd.h>

#include <utility>

#include "io/file_builder.hpp"
#include "support/catch.hpp"

namespace {

using mole::Dtype;
using mole::Errc;
using mole::Index;
using mole::MatView;
using mole::SafeTensors;
using mole::SafeTensorsWriter;
using mole::StoredTensor;
using mole::test::as_bytes;
using mole::test::TemporaryFolder;
namespace fs = std::filesystem;

std::string content(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::string text(const std::vector<std::byte>& bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

SafeTensorsWriter rewritten(const SafeTensors& file) {
  SafeTensorsWriter writer;
  for (const StoredTensor& tensor : file.tensors()) writer.add(tensor);
  for (const auto& [key, value] : file.metadata()) writer.set_metadata(key, value);
  return writer;
}

void check_round_trip(const std::string& path) {
  INFO(path);
  const std::string original = content(path);
  REQUIRE(!original.empty());
  CHECK(text(rewritten(SafeTensors::open(path)).bytes()) == original);
}

template <class F>
void check_refused(F f, Errc code, const std::string& words) {
  INFO(words);
  try {
    f();
    FAIL("accepted");
  } catch (const mole::Error& error) {
    INFO(error.what());
    CHECK(name(error.code()) == name(code));
    CHECK(std::string(error.what()).find(words) != std::string::npos);
  }
}

// The bytes that the reference files hold.
std::string pattern(std::size_t count, std::size_t seed) {
  std::string bytes;
  for (std::size_t i = 0; i < count; ++i) {
    bytes.push_back(static_cast<char>((i * 7 + seed * 31 + 1) % 251));
  }
  return bytes;
}

template <class T>
std::vector<T> elements(std::size_t count, std::size_t seed) {
  std::vector<T> result(count);
  std::memcpy(result.data(), pattern(count * sizeof(T), seed).data(), count * sizeof(T));
  return result;
}

template <class T>
MatView<const T> row_of(const std::vector<T>& values) {
  return mole::as_row(std::span<const T>(values));
}

int files_in(const std::string& folder) {
  return static_cast<int>(std::distance(fs::directory_iterator(folder), {}));
}

mode_t permissions(const std::string& path) {
  struct stat status {};
  CHECK(::stat(path.c_str(), &status) == 0);
  return status.st_mode & 07777;
}

const std::string kData = MOLE_TEST_DATA "/io/data/";
const std::string kAdapters = MOLE_TEST_DATA "/../examples/data/adapters/";

}  // namespace

TEST_CASE("safetensors writer: files of the reference writer are written again byte for byte",
          "[io]") {
  for (const char* file : {"empty", "metadata", "every_dtype", "shapes", "names"}) {
    check_round_trip(kData + file + ".safetensors");
  }
  int adapters = 0;
  for (const auto& folder : fs::directory_iterator(kAdapters)) {
    check_round_trip(folder.path().string() + "/adapter_model.safetensors");
    ++adapters;
  }
  CHECK(adapters == 4);
}

TEST_CASE("safetensors writer: views are written as the reference writes arrays", "[io]") {
  const auto scalar = elements<float>(1, 1), one = elements<float>(1, 2),
             cube = elements<float>(24, 4);
  const auto eight = elements<std::uint8_t>(12, 5), odd = elements<std::uint8_t>(3, 6);
  const auto f64 = elements<double>(4, 8);
  SafeTensorsWriter writer;
  writer.add("odd", row_of(odd), {3});
  writer.add("eight", row_of(eight), {1, 2, 1, 3, 1, 1, 1, 2});
  writer.add("cube", MatView<const float>(cube.data(), 6, 4), {2, 3, 4});
  writer.add("one", row_of(one), {1});
  writer.add("scalar", row_of(scalar), {});
  writer.add<float>("zero", {}, {3, 0, 2});
  writer.add<double>("zero_f64", {}, {0});
  writer.add("f64", MatView<const double>(f64.data(), 2, 2));
  CHECK(text(writer.bytes()) == content(kData + "shapes.safetensors"));
}

TEST_CASE("safetensors writer: every type of element is read back", "[io]") {
  const auto check = []<class T>(T) {
    const auto values = elements<T>(15, 3);
    SafeTensorsWriter writer;
    writer.add("m", MatView<const T>(values.data(), 3, 5));
    const std::vector<std::byte> bytes = writer.bytes();
    const MatView<const T> read = SafeTensors::parse(bytes, "file").view<T>("m");
    CHECK(read.rows == 3);
    CHECK(read.cols == 5);
    CHECK(std::memcmp(read.data, values.data(), 15 * sizeof(T)) == 0);
  };
  check(float{});
  check(double{});
  check(mole::f16{});
  check(mole::bf16{});
  check(std::uint8_t{});
  check(std::int32_t{});
  check(std::int64_t{});
}

TEST_CASE("safetensors writer: rows with a stride are packed", "[io]") {
  const auto values = elements<float>(22, 9);
  std::vector<float> packed;
  for (int row = 0; row < 3; ++row) {
    packed.insert(packed.end(), values.begin() + row * 7, values.begin() + row * 7 + 5);
  }
  SafeTensorsWriter strided, plain;
  strided.add("m", MatView<const float>(values.data(), 3, 5, 7));
  plain.add("m", MatView<const float>(packed.data(), 3, 5));
  CHECK(strided.bytes() == plain.bytes());
  const TemporaryFolder folder;
  const std::string path = folder.path() + "/m.safetensors";
  strided.save(path);
  CHECK(content(path) == text(plain.bytes()));
}

TEST_CASE("safetensors writer: what cannot be written is refused by name", "[io]") {
  const float number = 1;
  const MatView<const float> one(&number, 1, 1);
  SafeTensorsWriter writer;
  writer.add("w", one);
  writer.set_metadata("format", "pt");
  const std::vector<std::byte> before = writer.bytes();
  const auto refused = [&](Errc code, const std::string& words, auto f) {
    check_refused(f, code, words);
    CHECK(writer.bytes() == before);
  };
  const Errc argument = Errc::invalid_argument;
  refused(argument, "\"__metadata__\"", [&] { writer.add("__metadata__", one); });
  refused(argument, "\"w\" was added before", [&] { writer.add("w", one); });
  refused(argument, "\"a\\xff\" is not UTF-8 at byte 1", [&] { writer.add("a\xff", one); });
  refused(argument, "a\\x00b", [&] { writer.add(std::string("a\0b", 3), one); });
  refused(argument, "\"format\" was set before", [&] { writer.set_metadata("format", "np"); });
  refused(argument, "metadata key \"\\xc0\"", [&] { writer.set_metadata("\xc0", ""); });
  refused(argument, "metadata key", [&] { writer.set_metadata(std::string("\0", 1), ""); });
  refused(argument, "metadata value \"\\xc0\"", [&] { writer.set_metadata("k", "\xc0"); });
  refused(argument, "stride", [&] { writer.add("v", MatView<const float>(&number, 2, 2, 1)); });
  refused(argument, "memory", [&] { writer.add("v", MatView<const float>(nullptr, 1, 1)); });
  refused(argument, "8 dimensions", [&] { writer.add("v", one, std::vector<Index>(9, 1)); });
  refused(argument, "[-1, -1]", [&] { writer.add("v", one, {-1, -1}); });
  refused(argument, "dimension", [&] { writer.add("v", one, {0, (Index{1} << 48) + 1}); });
  refused(argument, "overflows", [&] { writer.add("v", one, {Index{1} << 40, Index{1} << 40}); });
  refused(Errc::shape_mismatch, "needs 8 bytes, got 4", [&] { writer.add("v", one, {2}); });
  const auto stored = [&](Dtype dtype, std::vector<Index> shape, std::size_t bytes) {
    const std::string data(bytes, 'x');
    writer.add(StoredTensor{"v", dtype, std::move(shape), as_bytes(data)});
  };
  refused(argument, "12 bits", [&] { stored(Dtype::f4, {3}, 2); });
  refused(Errc::shape_mismatch, "needs 3 bytes", [&] { stored(Dtype::f6_e2m3, {4}, 4); });
}

TEST_CASE("safetensors writer: a header above the limit of the format is refused", "[io]") {
  const std::string around = R"({"__metadata__":{"k":""}})";
  const std::size_t room = 100'000'000 - around.size();
  SafeTensorsWriter fits, too_long;
  fits.set_metadata("k", std::string(room, 'x'));
  too_long.set_metadata("k", std::string(room + 1, 'x'));
  CHECK(fits.bytes().size() == 100'000'008);
  check_refused([&] { too_long.bytes(); }, Errc::limit_exceeded, "100000008");
  const TemporaryFolder folder;
  check_refused([&] { too_long.save(folder.path() + "/f"); }, Errc::limit_exceeded, "100000000");
  CHECK(files_in(folder.path()) == 0);
}

TEST_CASE("safetensors writer: saving replaces a file and keeps its permissions", "[io]") {
  const TemporaryFolder folder;
  const auto values = elements<float>(60000, 1);
  SafeTensorsWriter writer;
  for (int i = 0; i < 9; ++i) {
    const std::string name = "w" + std::to_string(i);
    writer.add(name, MatView<const float>(values.data(), 7 + 900 * i, 8));
  }
  const mode_t mask = ::umask(0027);
  const std::string path = folder.path() + "/new.safetensors";
  writer.save(path);
  CHECK(permissions(path) == 0640);
  CHECK(content(path) == text(writer.bytes()));

  const std::string old = folder.write("old.safetensors", "old");
  CHECK(::chmod(old.c_str(), 0604) == 0);
  writer.save(old);
  ::umask(mask);
  CHECK(permissions(old) == 0604);
  CHECK(content(old) == text(writer.bytes()));
  CHECK(files_in(folder.path()) == 2);
}

TEST_CASE("safetensors writer: a relative path is saved in the working directory", "[io]") {
  const TemporaryFolder folder;
  const fs::path before = fs::current_path();
  fs::current_path(folder.path());
  SafeTensorsWriter().save("here.safetensors");
  fs::current_path(before);
  CHECK(content(folder.path() + "/here.safetensors") == content(kData + "empty.safetensors"));
}

TEST_CASE("safetensors writer: a file may be replaced by its own tensors", "[io]") {
  const TemporaryFolder folder;
  const std::string path = folder.write("f", content(kData + "every_dtype.safetensors"));
  const SafeTensors opened = SafeTensors::open(path);
  rewritten(opened).save(path);
  rewritten(opened).save(path);
  CHECK(content(path) == content(kData + "every_dtype.safetensors"));
}

TEST_CASE("safetensors writer: a symbolic link stays and leads to the new file", "[io]") {
  const TemporaryFolder folder;
  fs::create_directory(folder.path() + "/below");
  const std::string target = folder.write("below/target", "old");
  const std::string link = folder.path() + "/link";
  fs::create_symlink("below/target", link);
  SafeTensorsWriter().save(link);
  CHECK(fs::is_symlink(link));
  CHECK(content(target) == content(kData + "empty.safetensors"));
  CHECK(files_in(folder.path()) == 2);
  CHECK(files_in(folder.path() + "/below") == 1);

  fs::create_symlink("nothing", folder.path() + "/dangling");
  fs::create_symlink("loop", folder.path() + "/loop");
  for (const char* name : {"/dangling", "/loop"}) {
    check_refused([&] { SafeTensorsWriter().save(folder.path() + name); }, Errc::io_error,
                  "symbolic link");
  }
}

TEST_CASE("safetensors writer: targets that are no writable file are refused", "[io]") {
  const TemporaryFolder folder;
  const auto refused = [](const std::string& path, Errc code, const std::string& words) {
    check_refused([&] { SafeTensorsWriter().save(path); }, code, words);
  };
  refused(folder.path(), Errc::io_error, "a directory");
  refused(folder.path() + "/", Errc::io_error, "names no file");
  refused("", Errc::io_error, "names no file");
  refused("/dev/full", Errc::io_error, "a device");
  refused(folder.path() + "/none/f", Errc::io_error, "No such file or directory");
  refused(std::string("a\0b", 3), Errc::invalid_argument, "a\\x00b");
  CHECK(::mkfifo((folder.path() + "/pipe").c_str(), 0600) == 0);
  refused(folder.path() + "/pipe", Errc::io_error, "a FIFO");
  const std::string kept = folder.write("kept", "old");
  refused(kept + "/f", Errc::io_error, "Not a directory");
  CHECK(::chmod(kept.c_str(), 0444) == 0);
  refused(kept, Errc::io_error, "read-only");
  CHECK(content(kept) == "old");
  CHECK(files_in(folder.path()) == 2);
}
