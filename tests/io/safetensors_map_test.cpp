// SPDX-License-Identifier: Apache-2.0
// Mapped files, files that change while they are read, and the interface without exceptions.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

#include "io/file.hpp"
#include "io/file_builder.hpp"
#include "mole/core/expected.hpp"
#include "mole/io/safetensors.hpp"
#include "mole/io/safetensors_writer.hpp"
#include "support/catch.hpp"

namespace {

using mole::Errc;
using mole::Expected;
using mole::Failure;
using mole::SafeTensors;
using mole::SafeTensorsWriter;
using mole::test::as_bytes;
using mole::test::container;
using mole::test::length_bytes;
using mole::test::TemporaryFolder;

const std::string kData = MOLE_TEST_DATA "/io/data/";

std::string file_with(float first) {
  SafeTensorsWriter writer;
  const float values[] = {first, 2, 3, 4, 5, 6};
  writer.add("m", mole::MatView<const float>(values, 2, 3));
  const std::vector<std::byte> bytes = writer.bytes();
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

bool same(const SafeTensors& a, const SafeTensors& b) {
  const auto equal = [](const mole::StoredTensor& x, const mole::StoredTensor& y) {
    return x.name == y.name && x.dtype == y.dtype && x.shape == y.shape &&
           std::equal(x.bytes.begin(), x.bytes.end(), y.bytes.begin(), y.bytes.end());
  };
  return a.name() == b.name() && a.metadata() == b.metadata() &&
         std::equal(a.tensors().begin(), a.tensors().end(), b.tensors().begin(), b.tensors().end(),
                    equal);
}

template <class F>
std::string message_of(F f) {
  try {
    f();
  } catch (const mole::Error& error) {
    return std::string(name(error.code())) + ": " + error.what();
  }
  return "accepted";
}

}  // namespace

TEST_CASE("safetensors: a mapped file holds what an opened one holds", "[io]") {
  for (const char* file : {"empty", "metadata", "every_dtype", "shapes", "names"}) {
    const std::string path = kData + file + ".safetensors";
    INFO(path);
    CHECK(same(SafeTensors::map(path), SafeTensors::open(path)));
  }
}

TEST_CASE("safetensors: a mapped file is refused with the words for an opened one", "[io]") {
  const TemporaryFolder folder;
  const std::string good = file_with(1);
  const std::vector<std::string> files{"",
                                       "seven b",
                                       length_bytes(0),
                                       length_bytes(9) + "{}",
                                       length_bytes(~0ull) + "{}",
                                       container("[]", ""),
                                       container("{}", "xyz"),
                                       container("{\"a\":1}", ""),
                                       good.substr(0, good.size() - 1),
                                       good + "x"};
  for (const std::string& bytes : files) {
    const std::string path = folder.write("f", bytes);
    const std::string opened = message_of([&] { SafeTensors::open(path); });
    CHECK(opened != "accepted");
    CHECK(message_of([&] { SafeTensors::map(path); }) == opened);
  }
  CHECK(message_of([&] { SafeTensors::map(folder.path()); }).find("a directory") !=
        std::string::npos);
  const std::string path = folder.write("f", good);
  const mole::SafeTensorsLimits limits{.max_file_bytes = 10};
  CHECK(message_of([&] { SafeTensors::map(path, limits); }).find("max_file_bytes") !=
        std::string::npos);
}

TEST_CASE("safetensors: a mapping lives as long as a copy", "[io]") {
  SafeTensors kept;
  {
    const SafeTensors mapped = SafeTensors::map(kData + "shapes.safetensors");
    kept = mapped;
    CHECK(kept.at("f64").bytes.data() == mapped.at("f64").bytes.data());
  }
  const std::byte* data = kept.at("f64").bytes.data();
  CHECK(kept.view<double>("f64").rows == 2);
  CHECK(static_cast<int>(data[0]) == 249);
  const auto page = reinterpret_cast<std::uintptr_t>(data) & ~std::uintptr_t{4095};
  const auto is_mapped = [page] {
    unsigned char resident = 0;
    return ::mincore(reinterpret_cast<void*>(page), 1, &resident) == 0;
  };
  CHECK(is_mapped());
  kept = {};
  CHECK(!is_mapped());
}

TEST_CASE("safetensors: a file that is replaced while it is mapped stays readable", "[io]") {
  const TemporaryFolder folder;
  const std::string path = folder.write("f", file_with(1));
  const SafeTensors old = SafeTensors::map(path);
  SafeTensorsWriter writer;
  const float nine = 9;
  writer.add("m", mole::MatView<const float>(&nine, 1, 1));
  writer.save(path);
  CHECK(old.view<float>("m")(0, 0) == 1.0f);
  CHECK(SafeTensors::map(path).view<float>("m")(0, 0) == 9.0f);

  // Even by its own tensors.
  const SafeTensors mapped = SafeTensors::map(path);
  SafeTensorsWriter again;
  again.add(mapped.at("m"));
  again.save(path);
  CHECK(mapped.view<float>("m")(0, 0) == 9.0f);
  CHECK(SafeTensors::open(path).view<float>("m")(0, 0) == 9.0f);
  CHECK(::unlink(path.c_str()) == 0);
  CHECK(mapped.view<float>("m")(0, 0) == 9.0f);
}

TEST_CASE("a file that became shorter after it was opened is refused", "[io]") {
  const TemporaryFolder folder;
  const std::string path = folder.write("f", std::string(10000, 'x'));
  const mole::io::File file(path);
  CHECK(::truncate(path.c_str(), 6000) == 0);
  std::vector<std::byte> bytes(10000);
  const std::string read = message_of([&] { file.read(0, bytes); });
  CHECK(read == "io_error: " + path + ": became shorter while it was read, at byte 6000");
  const std::string mapped = message_of([&] { file.map(); });
  CHECK(mapped == "io_error: " + path + ": became shorter while it was mapped");
  CHECK(::truncate(path.c_str(), 20000) == 0);
  CHECK(message_of([&] { file.read(0, bytes); }) == "accepted");
}

TEST_CASE("Expected holds a value or a failure", "[core]") {
  Expected<std::string> text = std::string("abc");
  REQUIRE(text);
  CHECK(*text == "abc");
  CHECK(text->size() == 3);
  const std::string moved = *std::move(text);
  CHECK(moved == "abc");

  const Expected<std::string> failed = Failure(Errc::not_found, "no such thing");
  REQUIRE(!failed);
  CHECK(!failed.has_value());
  CHECK(failed.error().code() == Errc::not_found);
  CHECK(std::string(failed.error().message()) == "no such thing");

  CHECK(Expected<void>().has_value());
  CHECK(!Expected<void>(Failure(Errc::io_error, "")).has_value());
}

TEST_CASE("attempt turns exceptions into failures", "[core]") {
  static_assert(noexcept(mole::attempt([] { throw 1; })));
  const Expected<int> value = mole::attempt([] { return 7; });
  CHECK(*value == 7);
  CHECK(mole::attempt([] {}).has_value());

  const auto failure = [](auto f) {
    const auto result = mole::attempt(f);
    REQUIRE(!result);
    const Failure copy = result.error();
    return std::string(name(copy.code())) + ": " + copy.message();
  };
  const std::string message(200, 'm');
  CHECK(failure([&]() -> int { mole::fail(Errc::config_error, message); }) ==
        "config_error: " + message);
  CHECK(failure([] { throw std::bad_alloc(); }) == "out_of_memory: out of memory");
  CHECK(failure([] { throw 1; }) == "internal: unexpected exception");
}

TEST_CASE("safetensors: the interface without exceptions says the same", "[io]") {
  const TemporaryFolder folder;
  const std::string path = folder.write("f", file_with(3));
  const std::string bytes = file_with(4);
  CHECK(SafeTensors::try_open(path)->view<float>("m")(0, 0) == 3.0f);
  CHECK(SafeTensors::try_map(path)->view<float>("m")(0, 0) == 3.0f);
  CHECK(SafeTensors::try_parse(as_bytes(bytes), "f")->view<float>("m")(0, 0) == 4.0f);

  const std::string missing = folder.path() + "/none";
  const auto refused = [](const auto& result) {
    REQUIRE(!result);
    return std::string(name(result.error().code())) + ": " + result.error().message();
  };
  CHECK(refused(SafeTensors::try_open(missing)) == message_of([&] { SafeTensors::open(missing); }));
  CHECK(refused(SafeTensors::try_map(missing)) == message_of([&] { SafeTensors::map(missing); }));
  CHECK(refused(SafeTensors::try_parse({}, "f")) ==
        message_of([&] { SafeTensors::parse({}, "f"); }));
  const mole::SafeTensorsLimits limits{.max_header_bytes = 1};
  CHECK(refused(SafeTensors::try_open(path, limits)).starts_with("limit_exceeded"));

  SafeTensorsWriter writer;
  CHECK(writer.try_save(path).has_value());
  CHECK(SafeTensors::open(path).tensors().empty());
  CHECK(refused(writer.try_save(folder.path())) == message_of([&] { writer.save(folder.path()); }));
}
