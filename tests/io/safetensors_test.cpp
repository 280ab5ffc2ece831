// SPDX-License-Identifier: Apache-2.0
#include "mole/io/safetensors.hpp"

#include <sys/stat.h>

#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>

#include "io/file_builder.hpp"
#include "support/catch.hpp"

namespace {

using mole::Errc;
using mole::Index;
using mole::MatView;
using mole::SafeTensors;
using mole::test::as_bytes;
using mole::test::container;
using mole::test::enclosed;
using mole::test::raw;

struct Refusal {
  Errc code = Errc::internal;
  std::string message = "accepted";
};

template <class F>
Refusal refusal_of(F f) {
  try {
    f();
  } catch (const mole::Error& error) {
    return {error.code(), error.what()};
  }
  return {};
}

Refusal refusal(const std::string& file) {
  return refusal_of([&file] { SafeTensors::parse(as_bytes(file), "test.safetensors"); });
}

// One fault, what it is called, and words the message must hold.
struct Fault {
  const char* fault;
  std::string file;
  Errc code;
  std::vector<std::string> words;
};

std::string entry(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return "{\"dtype\":" + dtype + ",\"shape\":" + shape + ",\"data_offsets\":" + offsets + "}";
}

// A file with one tensor `w`.
std::string one(const std::string& dtype, const std::string& shape, const std::string& offsets,
                std::size_t bytes) {
  return container("{\"w\":" + entry(dtype, shape, offsets) + "}", std::string(bytes, '\0'));
}

void check(const std::vector<Fault>& faults) {
  for (const Fault& fault : faults) {
    INFO(fault.fault);
    const Refusal result = refusal(fault.file);
    INFO(result.message);
    CHECK(name(result.code) == name(fault.code));
    for (const std::string& word : fault.words) {
      INFO(word);
      CHECK(result.message.find(word) != std::string::npos);
    }
    CHECK(result.message.find('\n') == std::string::npos);
    CHECK(result.message.starts_with("test.safetensors: "));
  }
}

const std::string kGood = entry("\"F32\"", "[1]", "[0,4]");
const std::string kFour(4, '\0');

}  // namespace

TEST_CASE("safetensors: faults of the length field are named", "[io]") {
  using mole::test::length_bytes;
  check({
      {"empty file", "", Errc::format_error, {"0 bytes", "at least 8"}},
      {"seven bytes", std::string(7, 'x'), Errc::format_error, {"7 bytes", "at least 8"}},
      {"header length 0", length_bytes(0), Errc::format_error, {"length is 0"}},
      {"longer than the file", length_bytes(9) + "{}", Errc::format_error, {"9", "remaining 2"}},
      {"2^64 - 1", length_bytes(~0ull) + "{}", Errc::limit_exceeded, {"18446744073709551615"}},
      {"2^64 - 8", length_bytes(~0ull - 7) + "{}", Errc::limit_exceeded, {"18446744073709551608"}},
      {"2^63", length_bytes(1ull << 63) + "{}", Errc::limit_exceeded, {"9223372036854775808"}},
      {"one byte short", length_bytes(1) + "{}", Errc::format_error, {"not JSON", "byte 2"}},
      {"one byte long", length_bytes(3) + "{}x", Errc::format_error, {"not JSON", "byte 3"}},
      {"zip", "PK\x03\x04 and so on", Errc::format_error, {"zip archive"}},
      {"GGUF", "GGUF\x03 and so on", Errc::format_error, {"GGUF"}},
      {"LFS", "version https://git-lfs", Errc::format_error, {"Git LFS"}},
      {"JSON", "{\"metadata\": {}}", Errc::format_error, {"JSON text"}},
      {"HDF5", "\x89HDF\r\n\x1a\n\n", Errc::format_error, {"HDF5"}},
      {"gzip without a time",
       std::string("\x1f\x8b\x08\0\0\0\0\0\2\3", 10) + std::string(600000, 'x'),
       Errc::format_error,
       {"gzip"}},
      {"pickle with a short frame",
       std::string("\x80\x04\x95\x0d\0\0\0\0\0\0\0}", 12),
       Errc::format_error,
       {"pickle"}},
      // 640 = 0x280 looks like a pickle, but what follows is a header.
      {"cut in the header",
       length_bytes(640) + "{\"w\"",
       Errc::format_error,
       {"640", "remaining 4"}},
  });
}

TEST_CASE("safetensors: faults of the header text are named", "[io]") {
  check({
      {"not JSON", container("{\"w\":}", ""), Errc::format_error, {"not JSON", "byte 6"}},
      {"array", container("[]", ""), Errc::format_error, {"must be an object"}},
      {"string", container("\"x\"", ""), Errc::format_error, {"must be an object"}},
      {"number", container("12", ""), Errc::format_error, {"must be an object"}},
      {"byte order mark", container("\xef\xbb\xbf{}", ""), Errc::format_error, {"object"}},
      {"padding with NUL",
       container(std::string("{}\0\0", 4), ""),
       Errc::format_error,
       {"NUL", "byte 2"}},
      {"second object after NUL",
       container(std::string("{}\0{}", 5), ""),
       Errc::format_error,
       {"NUL"}},
      {"second object", container("{}{}", ""), Errc::format_error, {"not JSON"}},
      {"comment", container("{/**/}", ""), Errc::format_error, {"not JSON"}},
      {"stray byte", container("{\"\xff\":1}", ""), Errc::format_error, {"UTF-8", "byte 2"}},
      {"overlong form", container("{\"\xc0\xaf\":1}", ""), Errc::format_error, {"UTF-8"}},
      {"encoded surrogate", container("{\"\xed\xa0\x80\":1}", ""), Errc::format_error, {"UTF-8"}},
      {"cut sequence", container("{\"\xe2\x82\":1}", ""), Errc::format_error, {"UTF-8"}},
      {"escaped lone surrogate",
       container("{\"\\ud800\":" + kGood + "}", kFour),
       Errc::format_error,
       {"not JSON"}},
      {"NUL in a name",
       container("{\"a\\u0000b\":" + kGood + "}", kFour),
       Errc::format_error,
       {"a\\x00b", "NUL"}},
      {"entry is a number", container("{\"w\":1}", ""), Errc::format_error, {"\"w\"", "object"}},
      {"entry is null", container("{\"w\":null}", ""), Errc::format_error, {"\"w\"", "null"}},
      {"deep arrays", container(std::string(100000, '['), ""), Errc::format_error, {"object"}},
      {"deep arrays in an entry",
       container("{\"w\":{\"shape\":" + std::string(100000, '[') + "}}", ""),
       Errc::format_error,
       {"\"w\"", "array"}},
      {"deep objects",
       container("{\"w\":{\"dtype\":{\"a\":{", ""),
       Errc::format_error,
       {"\"dtype\"", "object"}},
      {"name twice",
       container("{\"w\":" + kGood + ",\"w\":" + kGood + "}", kFour),
       Errc::format_error,
       {"\"w\" twice"}},
      {"name twice by escape",
       container("{\"a\":" + kGood + ",\"\\u0061\":" + kGood + "}", kFour),
       Errc::format_error,
       {"\"a\" twice"}},
      {"metadata twice",
       container("{\"__metadata__\":{},\"__metadata__\":{}}", ""),
       Errc::format_error,
       {"\"__metadata__\" twice"}},
      {"metadata key twice",
       container("{\"__metadata__\":{\"a\":\"\",\"a\":\"\"}}", ""),
       Errc::format_error,
       {"\"a\" twice"}},
      {"metadata number",
       container("{\"__metadata__\":{\"a\":1}}", ""),
       Errc::format_error,
       {"\"__metadata__\" entry \"a\" is not a string"}},
      {"metadata null",
       container("{\"__metadata__\":{\"a\":null}}", ""),
       Errc::format_error,
       {"\"a\" is not a string"}},
      {"metadata object",
       container("{\"__metadata__\":{\"a\":{}}}", ""),
       Errc::format_error,
       {"\"a\" is not a string"}},
      {"metadata is a string",
       container("{\"__metadata__\":\"a\"}", ""),
       Errc::format_error,
       {"\"__metadata__\" must be an object"}},
  });
}

TEST_CASE("safetensors: faults of an entry are named", "[io]") {
  const auto entry_only = [](const std::string& text) {
    return container("{\"w\":" + text + "}", kFour);
  };
  check({
      {"no dtype",
       entry_only(R"({"shape":[1],"data_offsets":[0,4]})"),
       Errc::format_error,
       {"\"w\" lacks \"dtype\""}},
      {"no shape",
       entry_only(R"({"dtype":"F32","data_offsets":[0,4]})"),
       Errc::format_error,
       {"\"w\" lacks \"shape\""}},
      {"no offsets",
       entry_only(R"({"dtype":"F32","shape":[1]})"),
       Errc::format_error,
       {"\"w\" lacks \"data_offsets\""}},
      {"dtype twice",
       entry_only(R"({"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]})"),
       Errc::format_error,
       {"\"dtype\" twice"}},
      {"unknown member",
       entry_only(R"({"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1})"),
       Errc::format_error,
       {"unknown member \"x\""}},
      {"dtype F99",
       one("\"F99\"", "[1]", "[0,4]", 4),
       Errc::unsupported,
       {"\"w\"", "\"F99\"", "F8_E4M3FNUZ"}},
      {"dtype in lower case", one("\"f32\"", "[1]", "[0,4]", 4), Errc::unsupported, {"\"f32\""}},
      {"empty dtype", one("\"\"", "[1]", "[0,4]", 4), Errc::unsupported, {"dtype \"\""}},
      {"dtype is a number", one("1", "[1]", "[0,4]", 4), Errc::format_error, {"\"dtype\"", "1"}},
      {"dimension -1", one("\"F32\"", "[-1]", "[0,4]", 4), Errc::format_error, {"dimension -1"}},
      {"dimension 1.0", one("\"F32\"", "[1.0]", "[0,4]", 4), Errc::format_error, {"1.0"}},
      {"dimension 1e0", one("\"F32\"", "[1e0]", "[0,4]", 4), Errc::format_error, {"1e0"}},
      {"dimension as text", one("\"F32\"", "[\"4\"]", "[0,4]", 4), Errc::format_error, {"string"}},
      {"dimension null", one("\"F32\"", "[null]", "[0,4]", 4), Errc::format_error, {"null"}},
      {"dimension true", one("\"F32\"", "[true]", "[0,4]", 4), Errc::format_error, {"boolean"}},
      {"shape is a number", one("\"F32\"", "1", "[0,4]", 4), Errc::format_error, {"\"shape\""}},
      {"dimension 2^64",
       one("\"F32\"", "[18446744073709551616]", "[0,4]", 4),
       Errc::format_error,
       {"18446744073709551616"}},
      {"dimension 2^63",
       one("\"F32\"", "[9223372036854775808]", "[0,4]", 4),
       Errc::format_error,
       {"9223372036854775808"}},
      {"product overflows",
       one("\"F32\"", "[2,281474976710656,281474976710656]", "[0,4]", 4),
       Errc::format_error,
       {"\"w\"", "overflows"}},
      {"product wraps to 0",
       one("\"F32\"", "[4294967296,4294967296]", "[0,0]", 0),
       Errc::format_error,
       {"overflows"}},
      {"bits overflow",
       one("\"F64\"", "[281474976710656,4096]", "[0,0]", 0),
       Errc::format_error,
       {"overflows"}},
      {"nine dimensions",
       one("\"F32\"", "[1,1,1,1,1,1,1,1,1]", "[0,4]", 4),
       Errc::limit_exceeded,
       {"\"w\"", "8 dimensions"}},
      {"reversed offsets", one("\"F32\"", "[1]", "[4,0]", 4), Errc::format_error, {"reversed"}},
      {"negative offset", one("\"F32\"", "[1]", "[-4,0]", 4), Errc::format_error, {"-4"}},
      {"three offsets", one("\"F32\"", "[1]", "[0,4,8]", 4), Errc::format_error, {"2 unsigned"}},
      {"one offset", one("\"F32\"", "[1]", "[0]", 4), Errc::format_error, {"2 numbers, got 1"}},
      {"offsets as text",
       one("\"F32\"", "[1]", "[\"0\",\"4\"]", 4),
       Errc::format_error,
       {"string"}},
      {"size differs",
       one("\"F32\"", "[2,2]", "[0,12]", 12),
       Errc::format_error,
       {"needs 16 bytes", "span 12"}},
      {"end beyond the data",
       one("\"F32\"", "[4]", "[0,16]", 12),
       Errc::format_error,
       {"\"w\" ends beyond the data", "16", "12"}},
      {"end near 2^64",
       one("\"U8\"", "[4]", "[18446744073709551611,18446744073709551615]", 4),
       Errc::format_error,
       {"18446744073709551615"}},
      {"half a byte", one("\"F4\"", "[3]", "[0,2]", 2), Errc::format_error, {"12 bits"}},
      {"six bits", one("\"F6_E2M3\"", "[2]", "[0,2]", 2), Errc::format_error, {"12 bits"}},
  });
}

TEST_CASE("safetensors: the ranges must cover the data exactly", "[io]") {
  const auto two = [](const std::string& a, const std::string& b, std::size_t bytes) {
    return container(
        "{\"a\":" + entry("\"U8\"", "[4]", a) + ",\"b\":" + entry("\"U8\"", "[4]", b) + "}",
        std::string(bytes, '\0'));
  };
  check({
      {"overlap",
       two("[0,4]", "[2,6]", 6),
       Errc::format_error,
       {"\"a\" and \"b\" overlap", "2 bytes"}},
      {"the same range", two("[0,4]", "[0,4]", 4), Errc::format_error, {"\"a\" and \"b\" overlap"}},
      {"gap", two("[0,4]", "[7,11]", 11), Errc::format_error, {"gap of 3 bytes before byte 7"}},
      {"gap at the start",
       two("[1,5]", "[5,9]", 9),
       Errc::format_error,
       {"gap of 1 bytes before byte 1"}},
      {"bytes left over",
       two("[0,4]", "[4,8]", 11),
       Errc::format_error,
       {"3 bytes after the last tensor"}},
      {"cut by one byte", two("[0,4]", "[4,8]", 7), Errc::format_error, {"\"b\" ends beyond"}},
      {"data without tensors", container("{}", "xyz"), Errc::format_error, {"3 bytes after"}},
  });
}

TEST_CASE("safetensors: legal oddities are read", "[io]") {
  const auto tensors = [](const std::string& file) {
    return SafeTensors::parse(as_bytes(file), "odd").tensors().size();
  };
  CHECK(tensors(container("{}", "")) == 0);
  CHECK(tensors(container(" \n{}\t\r\n  ", "")) == 0);
  CHECK(tensors(container("{\"__metadata__\":{}}", "")) == 0);
  CHECK(tensors(container("{\"\":" + kGood + "}", kFour)) == 1);
  CHECK(tensors(container("{\"" + std::string(65536, 'x') + "\":" + kGood + "}", kFour)) == 1);
  CHECK(tensors(one("\"F32\"", "[]", "[0,4]", 4)) == 1);
  CHECK(tensors(one("\"F32\"", "[3,0,2]", "[0,0]", 0)) == 1);
  CHECK(tensors(one("\"F4\"", "[3,2]", "[0,3]", 3)) == 1);
  CHECK(tensors(one("\"F6_E3M2\"", "[4]", "[0,3]", 3)) == 1);
  for (const mole::DtypeInfo& known : mole::kDtypes) {
    INFO(known.name);
    CHECK(name(known.dtype) == known.name);
    const std::string bytes = std::to_string(known.bits);
    const std::string dtype = enclosed("\"", known.name, "\"");
    CHECK(tensors(one(dtype, "[2,4]", "[0," + bytes + "]", static_cast<std::size_t>(known.bits))) ==
          1);
  }

  // Empty tensors may sit on any border; entries may come in any order.
  const std::string file = container("{\"z\":" + entry("\"U8\"", "[2]", "[1,3]") +
                                         ",\"e\":" + entry("\"U8\"", "[0]", "[1,1]") +
                                         ",\"a\":" + entry("\"U8\"", "[1]", "[0,1]") +
                                         ",\"f\":" + entry("\"U8\"", "[0]", "[3,3]") + "}",
                                     "abc");
  const SafeTensors parsed = SafeTensors::parse(as_bytes(file), "odd");
  std::string names;
  for (const mole::StoredTensor& tensor : parsed.tensors()) names += tensor.name;
  CHECK(names == "aefz");
  CHECK(parsed.at("z").bytes.size() == 2);
  CHECK(static_cast<char>(parsed.at("z").bytes[0]) == 'b');
}

TEST_CASE("safetensors: metadata are strings by key", "[io]") {
  const std::string file =
      container(R"({"__metadata__":{"format":"pt","case":"{\"kind\":\"x\"}"}})", "");
  const SafeTensors parsed = SafeTensors::parse(as_bytes(file), "meta");
  CHECK(parsed.metadata().size() == 2);
  CHECK(parsed.metadata().at("format") == "pt");
  CHECK(parsed.metadata().at("case") == R"({"kind":"x"})");
}

TEST_CASE("safetensors: limits are named with the option that raises them", "[io]") {
  const std::string file = container("{\"a\":" + entry("\"U8\"", "[1]", "[0,1]") +
                                         ",\"b\":" + entry("\"U8\"", "[1]", "[1,2]") + "}",
                                     "xy");
  const auto with = [&file](const mole::SafeTensorsLimits& limits) {
    return refusal_of([&] { SafeTensors::parse(as_bytes(file), "f", limits); });
  };
  mole::SafeTensorsLimits small;
  small.max_header_bytes = 10;
  CHECK(with(small).code == Errc::limit_exceeded);
  CHECK(with(small).message.find("max_header_bytes") != std::string::npos);
  small = {};
  small.max_entries = 1;
  CHECK(with(small).code == Errc::limit_exceeded);
  CHECK(with(small).message.find("max_entries") != std::string::npos);
  small.max_entries = 2;
  CHECK(with(small).message == "accepted");

  const mole::test::TemporaryFolder folder;
  const std::string path = folder.write("f", file);
  small.max_file_bytes = file.size() - 1;
  const Refusal large = refusal_of([&] { SafeTensors::open(path, small); });
  CHECK(large.code == Errc::limit_exceeded);
  CHECK(large.message.find("max_file_bytes") != std::string::npos);
}

TEST_CASE("safetensors: a long hostile name is escaped and cut in messages", "[io]") {
  const std::string name = "../\\u001b[31m\\n" + std::string(5000, 'n');
  const Refusal result = refusal(container("{\"" + name + "\":1}", ""));
  CHECK(result.code == Errc::format_error);
  CHECK(result.message.size() < 250);
  CHECK(result.message.find("../\\x1b[31m\\x0a") != std::string::npos);
}

TEST_CASE("safetensors: only regular files are opened", "[io]") {
  const mole::test::TemporaryFolder folder;
  const auto code = [](const std::string& path) {
    return refusal_of([&] { SafeTensors::open(path); });
  };
  CHECK(code(folder.path()).code == Errc::io_error);
  CHECK(code(folder.path()).message.find("directory") != std::string::npos);
  CHECK(code(folder.path() + "/none").code == Errc::io_error);
  CHECK(code(std::string("a\0b", 3)).code == Errc::invalid_argument);
  const std::string fifo = folder.path() + "/fifo";
  REQUIRE(::mkfifo(fifo.c_str(), 0600) == 0);
  CHECK(code(fifo).message.find("FIFO") != std::string::npos);
  CHECK(code("/dev/zero").message.find("device") != std::string::npos);
}

TEST_CASE("safetensors: a view is the stored memory itself", "[io]") {
  const std::vector<float> values{1, 2, 3, 4, 5, 6};
  std::string file = container({{"m", "F32", "[2,3]", raw(values)}});
  // A header of 8 n bytes keeps the data aligned; one byte more does not.
  std::string header = file.substr(8, file.size() - 8 - 24);
  header.resize((header.size() + 7) / 8 * 8, ' ');
  const std::string aligned = container(header, raw(values));
  const std::string shifted = container(header + " ", raw(values));

  const SafeTensors parsed = SafeTensors::parse(as_bytes(aligned), "aligned");
  const MatView<const float> view = parsed.view<float>("m");
  CHECK(static_cast<const void*>(view.data) == aligned.data() + 8 + header.size());
  CHECK(view.rows == 2);
  CHECK(view.cols == 3);
  CHECK(view(1, 2) == 6.0f);

  const SafeTensors unaligned = SafeTensors::parse(as_bytes(shifted), "shifted");
  CHECK(refusal_of([&] { unaligned.view<float>("m"); }).code == Errc::unsupported);
  CHECK(unaligned.read<float>("m") == values);

  const mole::test::TemporaryFolder folder;
  const SafeTensors opened = SafeTensors::open(folder.write("s.safetensors", shifted));
  const MatView<const float> own = opened.view<float>("m");
  CHECK(static_cast<const void*>(own.data) == opened.at("m").bytes.data());
  CHECK(reinterpret_cast<std::uintptr_t>(own.data) % 64 == 0);
  const SafeTensors copy = opened;
  CHECK(copy.view<float>("m").data == own.data);
}

TEST_CASE("safetensors: views and reads name what does not fit", "[io]") {
  const std::string file = container({{"cube", "F32", "[2,1,1]", std::string(8, '\0')},
                                      {"ints", "I32", "[2]", std::string(8, '\0')},
                                      {"row", "F32", "[2]", std::string(8, '\0')}});
  const SafeTensors parsed = SafeTensors::parse(as_bytes(file), "f");
  CHECK(parsed.find("rows") == nullptr);
  CHECK(parsed.find("row")->shape == std::vector<Index>{2});
  const auto code = [&](auto f) { return refusal_of([&] { f(); }); };
  const Refusal missing = code([&] { parsed.at("rwo"); });
  CHECK(missing.code == Errc::not_found);
  CHECK(missing.message.find("(nearest: \"row\", ") != std::string::npos);
  CHECK(code([&] { parsed.view<double>("row"); }).code == Errc::unsupported);
  CHECK(code([&] { parsed.view<float>("cube"); }).code == Errc::shape_mismatch);
  CHECK(code([&] { parsed.read<float>("ints"); }).message.find("\"I32\"") != std::string::npos);
  CHECK(code([&] { parsed.read<std::int64_t>("row"); }).code == Errc::unsupported);
  float out[4] = {7, 7, 7, 7};
  const Refusal shape = code([&] { parsed.read("row", MatView<float>(out, 2, 2)); });
  CHECK(shape.code == Errc::shape_mismatch);
  CHECK(shape.message.find("expected [1, 2], got [2, 2]") != std::string::npos);
  CHECK(out[0] == 7.0f);
}

TEST_CASE("safetensors: a matrix is read into rows with a stride", "[io]") {
  const std::string file = container({{"m", "F64", "[2,3]", raw<double>({1, 2, 3, 4, 5, 6})}});
  const SafeTensors parsed = SafeTensors::parse(as_bytes(file), "f");
  std::vector<float> memory(10, -1.0f);
  parsed.read("m", MatView<float>(memory.data(), 2, 3, 5));
  CHECK(memory == std::vector<float>{1, 2, 3, -1, -1, 4, 5, 6, -1, -1});
}

namespace {

// What 16 stored bits mean, from the definition of the formats.
double meaning(unsigned bits, int exponent_bits, int fraction_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = static_cast<int>(bits >> fraction_bits) & ((1 << exponent_bits) - 1);
  const int fraction = static_cast<int>(bits) & ((1 << fraction_bits) - 1);
  const double sign = (bits & 0x8000u) != 0 ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1) {
    return fraction == 0 ? sign * std::numeric_limits<double>::infinity()
                         : std::numeric_limits<double>::quiet_NaN();
  }
  const int whole = exponent == 0 ? fraction : fraction + (1 << fraction_bits);
  return sign * std::ldexp(whole, (exponent == 0 ? 1 : exponent) - bias - fraction_bits);
}

bool same(double a, double b) {
  return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

std::string all_halves(const std::string& dtype) {
  std::vector<std::uint16_t> bits(65536);
  for (std::size_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<std::uint16_t>(i);
  return container({{"h", dtype, "[65536]", raw(bits)}});
}

template <class T>
std::vector<T> read_doubles(const std::vector<double>& values) {
  const std::string shape = enclosed("[", std::to_string(values.size()), "]");
  const std::string file = container({{"d", "F64", shape, raw(values)}});
  return SafeTensors::parse(as_bytes(file), "d").read<T>("d");
}

}  // namespace

TEST_CASE("safetensors: every F16 and BF16 is read exactly", "[io]") {
  const auto [dtype, exponent_bits, fraction_bits] =
      GENERATE(std::make_tuple("F16", 5, 10), std::make_tuple("BF16", 8, 7));
  const std::string file = all_halves(dtype);
  const SafeTensors parsed = SafeTensors::parse(as_bytes(file), dtype);
  const std::vector<double> wide = parsed.read<double>("h");
  const std::vector<float> narrow = parsed.read<float>("h");
  int wrong = 0;
  for (unsigned bits = 0; bits < 65536; ++bits) {
    const double expected = meaning(bits, exponent_bits, fraction_bits);
    wrong += same(wide[bits], expected) && same(narrow[bits], expected) ? 0 : 1;
  }
  CHECK(wrong == 0);
}

TEST_CASE("safetensors: F64 is rounded once", "[io]") {
  const double inf = std::numeric_limits<double>::infinity();
  const std::vector<float> floats =
      read_doubles<float>({1 + 0x1p-24, 1 + 0x3p-24, 0x1p-149, 0x1p-151, 1e300, -0.0, 0.1});
  CHECK(floats == std::vector<float>{1.0f, 1 + 0x1p-22f, 0x1p-149f, 0.0f, static_cast<float>(inf),
                                     0.0f, 0.1f});
  CHECK(std::signbit(floats[5]));

  // Halfway between two halves, and a little beside it where a detour over float would lose it.
  const std::vector<mole::bf16> b =
      read_doubles<mole::bf16>({1 + 0x1p-8, 1 + 0x1p-8 + 0x1p-40, 1 + 0x3p-8 - 0x1p-40, 1 + 0x3p-8,
                                -(1 + 0x1p-8 + 0x1p-40), 1e300, 0x1p-1000});
  const std::vector<std::uint16_t> b_bits{0x3f80, 0x3f81, 0x3f81, 0x3f82, 0xbf81, 0x7f80, 0};
  for (std::size_t i = 0; i < b.size(); ++i) CHECK(b[i].bits == b_bits[i]);

  const std::vector<mole::f16> h = read_doubles<mole::f16>(
      {1 + 0x1p-11, 1 + 0x1p-11 + 0x1p-40, 65519.999999, 65520.0, 0x1p-25, 0x1p-25 + 0x1p-70});
  const std::vector<std::uint16_t> h_bits{0x3c00, 0x3c01, 0x7bff, 0x7c00, 0, 1};
  for (std::size_t i = 0; i < h.size(); ++i) CHECK(h[i].bits == h_bits[i]);
}

TEST_CASE("safetensors: every integer type is read as 64 bits", "[io]") {
  const std::string file = container({{"bool", "BOOL", "[2]", raw<std::uint8_t>({0, 1})},
                                      {"i16", "I16", "[2]", raw<std::int16_t>({-32768, 32767})},
                                      {"i64", "I64", "[1]", raw<std::int64_t>({-(1ll << 62)})},
                                      {"i8", "I8", "[2]", raw<std::int8_t>({-128, 127})},
                                      {"u32", "U32", "[1]", raw<std::uint32_t>({4294967295u})},
                                      {"u64", "U64", "[1]", raw<std::uint64_t>({1ull << 62})},
                                      {"big", "U64", "[1]", raw<std::uint64_t>({1ull << 63})}});
  const SafeTensors parsed = SafeTensors::parse(as_bytes(file), "ints");
  using Wide = std::vector<std::int64_t>;
  CHECK(parsed.read<std::int64_t>("bool") == Wide{0, 1});
  CHECK(parsed.read<std::int64_t>("i16") == Wide{-32768, 32767});
  CHECK(parsed.read<std::int64_t>("i64") == Wide{-(1ll << 62)});
  CHECK(parsed.read<std::int64_t>("i8") == Wide{-128, 127});
  CHECK(parsed.read<std::int64_t>("u32") == Wide{4294967295});
  CHECK(parsed.read<std::int64_t>("u64") == Wide{1ll << 62});
  const Refusal big = refusal_of([&] { parsed.read<std::int64_t>("big"); });
  CHECK(big.code == Errc::numeric_error);
  CHECK(big.message.find("9223372036854775808") != std::string::npos);
}

namespace {

std::string sample_file() {
  return container(R"({"__metadata__":{"format":"pt"},"b":)" + entry("\"F32\"", "[2,3]", "[0,24]") +
                       R"(,"a":)" + entry("\"BF16\"", "[4]", "[24,32]") + "}",
                   std::string(32, '\1'));
}

// Everything an accepted file promises.
bool is_consistent(const SafeTensors& parsed, const std::string& file) {
  const auto* first = reinterpret_cast<const std::byte*>(file.data());
  for (const mole::StoredTensor& tensor : parsed.tensors()) {
    const std::byte* begin = tensor.bytes.data();
    if (begin < first || begin + tensor.bytes.size() > first + file.size()) return false;
    const auto bits = tensor.elements() * info(tensor.dtype).bits;
    if (bits != static_cast<Index>(tensor.bytes.size()) * 8) return false;
  }
  return true;
}

}  // namespace

TEST_CASE("safetensors: every proper prefix of a file is refused", "[io]") {
  const std::string file = sample_file();
  for (std::size_t length = 0; length < file.size(); ++length) {
    INFO(length);
    const Refusal result = refusal(file.substr(0, length));
    CHECK(result.code == Errc::format_error);
  }
  CHECK(refusal(file).message == "accepted");
}

TEST_CASE("safetensors: a file with one changed byte is refused or consistent", "[io]") {
  const std::string file = sample_file();
  const std::size_t header_end = file.size() - 32;
  int accepted = 0, refused = 0, broken = 0;
  for (std::size_t place = 0; place < header_end; ++place) {
    for (int value = 0; value < 256; ++value) {
      std::string changed = file;
      changed[place] = static_cast<char>(value);
      try {
        const SafeTensors parsed = SafeTensors::parse(as_bytes(changed), "changed");
        ++accepted;
        broken += is_consistent(parsed, changed) ? 0 : 1;
      } catch (const mole::Error&) {
        ++refused;
      }
    }
  }
  CHECK(broken == 0);
  CHECK(accepted > 0);
  CHECK(refused > 10 * accepted);
}

TEST_CASE("safetensors: many identical ranges are refused at once", "[io]") {
  std::string header = "{";
  for (int i = 0; i < 50000; ++i) {
    header += (i == 0 ? "\"t" : ",\"t") + std::to_string(i) + "\":" + kGood;
  }
  CHECK(refusal(container(header + "}", kFour)).message.find("overlap") != std::string::npos);
}
