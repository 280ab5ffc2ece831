// SPDX-License-Identifier: Apache-2.0
// Rows 1-56: files that are no safetensors, or not whole, or hostile.
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <bit>
#include <cmath>
#include <filesystem>
#include <limits>

#include "bad_inputs/rows.hpp"
#include "io/file_builder.hpp"
#include "mole/io/peft.hpp"
#include "mole/io/safetensors.hpp"

namespace test::bad_inputs {
namespace {

using mole::Index;
using mole::SafeTensors;
using mole::test::as_bytes;
using mole::test::container;
using mole::test::EntrySpec;
using mole::test::FileSpec;
using mole::test::length_bytes;
using mole::test::raw;
using mole::test::TemporaryFolder;

using Words = std::vector<std::string>;
using MakeFile = std::function<std::string()>;

constexpr long kEntry = 400;  // bytes that one header entry costs, at most
constexpr Bounds kFullTable = {1000, 100'000 * kEntry};  // headers of many megabytes

/// The same bytes from memory and from a file.
Case bad(std::string name, Errc code, Words words, MakeFile make, Bounds bounds = {}) {
  return {std::move(name), [=] {
            const std::string bytes = make();
            const auto size = static_cast<long>(bytes.size());
            check_refused({code, words, [&] { SafeTensors::parse(as_bytes(bytes), "file"); },
                           nullptr, size, bounds});
            const TemporaryFolder folder;
            const std::string path = folder.write("file", bytes);
            check_refused({code, words, [&] { SafeTensors::open(path); }, nullptr, size, bounds});
          }};
}
Case bad(std::string name, Errc code, Words words, const std::string& bytes, Bounds bounds = {}) {
  return bad(
      std::move(name), code, std::move(words), [bytes] { return bytes; }, bounds);
}

/// The valid file with one thing changed.
Case broken(std::string name, Errc code, Words words, const std::function<void(FileSpec&)>& edit,
            Bounds bounds = {}) {
  return bad(
      std::move(name), code, std::move(words),
      [edit] {
        FileSpec file;
        edit(file);
        return file.bytes();
      },
      bounds);
}
Case bad_entry(std::string name, Words words, std::string EntrySpec::*part, std::string text,
               Errc code = Errc::format_error) {
  return broken(std::move(name), code, std::move(words),
                [=](FileSpec& file) { file.entries[0].*part = text; });
}
Case bad_text(std::string name, Words words, std::string FileSpec::*part, std::string text) {
  return broken(std::move(name), Errc::format_error, std::move(words),
                [=](FileSpec& file) { file.*part = text; });
}

Case good(std::string name, const std::function<void(FileSpec&)>& edit, std::size_t tensors = 2) {
  return works(std::move(name), [=] {
    FileSpec file;
    edit(file);
    const std::string bytes = file.bytes();
    CHECK(SafeTensors::parse(as_bytes(bytes), "file").tensors().size() == tensors);
    const TemporaryFolder folder;
    CHECK(SafeTensors::open(folder.write("file", bytes)).tensors().size() == tensors);
  });
}

Case bad_path(std::string name, Errc code, Words words, std::string path) {
  return refused(std::move(name), code, std::move(words), [path] { SafeTensors::open(path); });
}

// An adapter of one module whose lora_A is `down`.
std::string adapter_file(const EntrySpec& down, std::size_t bytes) {
  FileSpec file;
  file.entries = {down,
                  {"\"base_model.model.q.lora_B.weight\"", "\"F32\"", "[3,2]",
                   "[" + std::to_string(bytes) + "," + std::to_string(bytes + 24) + "]", ""}};
  file.entries[0].name = "\"base_model.model.q.lora_A.weight\"";
  file.data = std::string(bytes, '\0') + raw(std::vector<float>(6, 1.0f));
  return file.bytes();
}
Case bad_adapter(std::string name, Errc code, Words words, std::string file) {
  return works(std::move(name), [=] {
    const TemporaryFolder folder;
    folder.write("adapter_config.json",
                 R"({"peft_type":"LORA","r":2,"lora_alpha":4,"target_modules":["q"]})");
    folder.write("adapter_model.safetensors", file);
    check_refused({code,
                   words,
                   [&] { mole::load_peft(folder.path()); },
                   nullptr,
                   static_cast<long>(file.size()),
                   {}});
  });
}
Case bad_weight(std::string name, Errc code, Words words, std::string dtype, std::string shape,
                std::size_t bytes) {
  const EntrySpec down = {"", dtype, shape, "[0," + std::to_string(bytes) + "]", ""};
  return bad_adapter(std::move(name), code, std::move(words), adapter_file(down, bytes));
}

// A sparse file: its holes need no disk.
std::string write_sparse(const TemporaryFolder& folder, const std::string& name,
                         const std::string& start, std::uint64_t size) {
  const std::string path = folder.write(name, start);
  REQUIRE(::truncate(path.c_str(), static_cast<off_t>(size)) == 0);
  return path;
}
Case sparse(std::string name, Errc code, Words words, std::uint64_t header, std::uint64_t size) {
  return works(std::move(name), [=] {
    const TemporaryFolder folder;
    const std::string path = write_sparse(folder, "file", length_bytes(header), size);
    check_refused({code, words, [&] { SafeTensors::open(path); }, nullptr, 0, {}});
  });
}

std::string many_entries(std::size_t count, const std::function<std::string(std::size_t)>& text) {
  std::string all;
  for (std::size_t i = 0; i < count; ++i) all.append(i == 0 ? "" : ",").append(text(i));
  return all;
}

std::vector<Row> length_rows() {
  const auto fe = Errc::format_error, le = Errc::limit_exceeded;
  std::vector<Case> short_files;
  for (std::size_t size = 1; size < 8; ++size) {
    const std::string count = std::to_string(size) + " bytes";
    short_files.push_back(bad(count, fe, {count, "at least 8"}, std::string(size, 'x')));
  }
  return {
      {1, "empty file", {bad("0 bytes", fe, {"0 bytes", "at least 8"}, std::string())}},
      {2, "1-7 bytes", short_files},
      {3, "header length 0", {bad("", fe, {"length is 0"}, length_bytes(0))}},
      {4,
       "header length above the file's",
       {bad("", fe, {"length 9", "remaining 2"}, length_bytes(9) + "{}")}},
      {5,
       "header length near 2^64: no allocation, no wrap",
       {bad("2^64 - 1", le, {"18446744073709551615"}, length_bytes(~0ull) + "{}"),
        bad("2^64 - 8", le, {"18446744073709551608"}, length_bytes(~0ull - 7) + "{}"),
        bad("2^63", le, {"9223372036854775808"}, length_bytes(1ull << 63) + "{}")}},
      {6,
       "header length one above the limit, in a file that is large enough",
       {sparse("the option's", le, {"16000001", "16000000", "max_header_bytes"}, 16'000'001,
               17'000'000),
        sparse("the format's", le, {"100000001", "100000000"}, 100'000'001, 101'000'000)}},
      {7,
       "header length one too small: cuts the brace",
       {broken("", fe, {"not JSON", "byte"}, [](FileSpec& f) { f.length_error = -1; })}},
      {8,
       "header length one too big: takes a byte of the data along",
       {broken("", fe, {"header", "byte"}, [](FileSpec& f) { f.length_error = 1; })}},
  };
}

std::vector<Row> text_rows() {
  const auto fe = Errc::format_error;
  const auto root = [&](const char* name, const std::string& text) {
    return bad(name, fe, {"header"}, container(text, ""));
  };
  return {
      {9,
       "the header is no object",
       {root("not JSON", "{\"w\":}"), root("array", "[]"), root("string", "\"x\""),
        root("number", "12"), root("nothing", "   "), root("two objects", "{}{}")}},
      {10,
       "{} and no data: a container, but no adapter",
       {good(
            "container", [](FileSpec& f) { f.entries.clear(), f.data.clear(); }, 0),
        bad_adapter("adapter", Errc::config_error, {"no tensors"}, container("{}", ""))}},
      {11, "{} and data", {bad("", fe, {"3 bytes after"}, container("{}", "xyz"))}},
      {12, "white space before the object", {good("", [](FileSpec& f) { f.before = " \n\t"; })}},
      {13, "white space after the object", {good("", [](FileSpec& f) { f.after = "\t\r\n  "; })}},
      {14,
       "NUL padding, as one writer made",
       {bad_text("", {"NUL", "byte", "pad"}, &FileSpec::after, std::string("\0\0", 2))}},
      {15,
       "NUL and a second object",
       {bad_text("", {"NUL"}, &FileSpec::after, std::string("\0{}", 3))}},
      {16, "byte order mark", {bad_text("", {"object"}, &FileSpec::before, "\xef\xbb\xbf")}},
      {17,
       "invalid UTF-8",
       {bad_entry("in a name", {"UTF-8", "byte 2"}, &EntrySpec::name, "\"\xff\""),
        bad_text("in metadata", {"UTF-8", "byte"}, &FileSpec::metadata, "{\"a\":\"\xc3\"}"),
        bad_text("cut sequence", {"UTF-8"}, &FileSpec::metadata, "{\"\xe2\x82\":\"\"}")}},
      {18,
       "overlong UTF-8, lone surrogates",
       {bad_entry("overlong", {"UTF-8"}, &EntrySpec::name, "\"\xc0\xaf\""),
        bad_entry("encoded surrogate", {"UTF-8"}, &EntrySpec::name, "\"\xed\xa0\x80\""),
        bad_entry("escaped surrogate", {"not JSON"}, &EntrySpec::name, "\"\\ud800\""),
        bad_entry("second half first", {"not JSON"}, &EntrySpec::name, "\"\\udc00\\ud800\"")}},
      {19, "a name twice", {bad_entry("", {"\"v\" twice"}, &EntrySpec::name, "\"v\"")}},
      {20,
       "a name twice by another spelling",
       {bad_entry("", {"\"v\" twice"}, &EntrySpec::name, "\"\\u0076\"")}},
      {21,
       "dtype twice in one entry",
       {bad_entry("", {"\"w\"", "\"dtype\" twice"}, &EntrySpec::more, "\"dtype\":\"F32\"")}},
      {22,
       "__metadata__ twice",
       {broken("", fe, {"\"__metadata__\" twice"},
               [](FileSpec& f) { f.metadata = "{},\"__metadata__\":{}"; })}},
      {23,
       "metadata that are no text; no metadata at all are fine",
       {bad_text("number", {"\"a\"", "1"}, &FileSpec::metadata, "{\"a\":1}"),
        bad_text("object", {"\"a\"", "object"}, &FileSpec::metadata, "{\"a\":{}}"),
        bad_text("null", {"\"a\"", "null"}, &FileSpec::metadata, "{\"a\":null}"),
        bad_text("a list", {"__metadata__"}, &FileSpec::metadata, "[]"),
        good("empty", [](FileSpec& f) { f.metadata = "{}"; })}},
      {24,
       "metadata with 10^6 keys",
       {broken(
           "", Errc::limit_exceeded, {"100000", "max_entries"},
           [](FileSpec& f) {
             f.metadata =
                 "{" +
                 many_entries(1'000'000,
                              [](std::size_t i) { return "\"" + std::to_string(i) + "\":\"\""; }) +
                 "}";
           },
           kFullTable)}},
      {25,
       "10^5 nested lists",
       {bad("at the root", fe, {"object"}, container(std::string(100'000, '['), ""), {10, 131'072}),
        broken("in an entry", fe, {"\"w\"", "array"},
               [](FileSpec& f) { f.entries[0].shape = std::string(100'000, '['); }, {10, 131'072}),
        broken("objects", fe, {"\"w\"", "object"},
               [](FileSpec& f) {
                 f.entries[0].dtype.clear();
                 for (int i = 0; i < 100'000; ++i) f.entries[0].dtype += "{\"a\":";
               },
               {10, 131'072})}},
  };
}

std::vector<Row> entry_rows() {
  const auto fe = Errc::format_error;
  const auto shape = [](const char* name, Words words, const std::string& text,
                        Errc code = Errc::format_error) {
    return bad_entry(name, std::move(words), &EntrySpec::shape, text, code);
  };
  const auto offsets = [](const char* name, Words words, const std::string& text) {
    return bad_entry(name, std::move(words), &EntrySpec::offsets, text);
  };
  const auto dtype = [](const char* text) {
    return bad_entry(text, {"\"w\"", text, "F8_E4M3", "BF16"}, &EntrySpec::dtype, text,
                     Errc::unsupported);
  };
  return {
      {26,
       "an unknown member of an entry: refused, as the format's schema says",
       {bad_entry("", {"\"w\"", "\"x\""}, &EntrySpec::more, "\"x\":1")}},
      {27,
       "a member of an entry is missing",
       {bad_entry("dtype", {"\"w\" lacks \"dtype\""}, &EntrySpec::dtype, ""),
        bad_entry("shape", {"\"w\" lacks \"shape\""}, &EntrySpec::shape, ""),
        bad_entry("offsets", {"\"w\" lacks \"data_offsets\""}, &EntrySpec::offsets, "")}},
      {28, "unknown dtypes", {dtype("\"F99\""), dtype("\"f32\""), dtype("\"\"")}},
      {29,
       "dtypes that a container holds and a LoRA cannot have",
       {bad_weight("F8_E4M3", Errc::unsupported, {"lora_A", "F8_E4M3"}, "\"F8_E4M3\"", "[2,3]", 6),
        bad_weight("F4", Errc::unsupported, {"lora_A", "F4"}, "\"F4\"", "[2,4]", 4),
        bad_weight("C64", Errc::unsupported, {"lora_A", "C64"}, "\"C64\"", "[2,3]", 48),
        bad_weight("I64", Errc::unsupported, {"lora_A", "I64"}, "\"I64\"", "[2,3]", 48)}},
      {30,
       "dimensions that are no unsigned integers",
       {shape("-1", {"\"w\"", "-1"}, "[-1,3]"), shape("1.0", {"1.0"}, "[1.0]"),
        shape("1e2", {"1e2"}, "[1e2]"), shape("text", {"string"}, "[\"4\"]"),
        shape("null", {"null"}, "[null]"), shape("true", {"boolean"}, "[true]"),
        shape("a number", {"\"shape\""}, "6")}},
      {31,
       "dimensions beyond 64 bits",
       {shape("2^64", {"18446744073709551616"}, "[18446744073709551616]"),
        shape("2^63", {"9223372036854775808"}, "[9223372036854775808]")}},
      {32,
       "elements or bytes overflow; one dimension above 2^48 is refused before",
       {shape("[2, 2^64 - 2]", {"\"w\"", "18446744073709551614"}, "[2,18446744073709551614]"),
        shape("elements", {"\"w\"", "overflows"}, "[2,281474976710656,281474976710656]"),
        broken("bytes", fe, {"\"w\"", "overflows"},
               [](FileSpec& f) {
                 f.entries[0].dtype = "\"F64\"";
                 f.entries[0].shape = "[281474976710656,4096]";
               })}},
      {33,
       "the product wraps to 0 and the offsets agree: no empty tensor",
       {broken("", fe, {"\"w\"", "overflows"},
               [](FileSpec& f) {
                 f.entries = {{"\"w\"", "\"F32\"", "[4294967296,4294967296]", "[0,0]", ""}};
                 f.data.clear();
               })}},
      {34,
       "a scalar: a tensor, but no LoRA weight",
       {good(
            "container",
            [](FileSpec& f) {
              f.entries = {{"\"w\"", "\"F32\"", "[]", "[0,4]", ""}};
              f.data.resize(4);
            },
            1),
        bad_weight("adapter", Errc::shape_mismatch, {"lora_A", "0 dimensions"}, "\"F32\"", "[]",
                   4)}},
      {35,
       "too many dimensions",
       {shape("9", {"\"w\"", "8 dimensions"}, "[1,1,1,1,1,1,1,1,6]", Errc::limit_exceeded),
        shape("10^6", {"\"w\"", "8 dimensions"},
              "[" + many_entries(1'000'000, [](std::size_t) { return "1"; }) + "]",
              Errc::limit_exceeded)}},
      {36,
       "a dimension of 0: a tensor, but no LoRA weight",
       {good(
            "container",
            [](FileSpec& f) {
              f.entries = {{"\"w\"", "\"F32\"", "[3,0,2]", "[0,0]", ""}};
              f.data.clear();
            },
            1),
        bad_weight("adapter", Errc::shape_mismatch, {"lora_A", "[2, 0]"}, "\"F32\"", "[2,0]", 0)}},
      {37,
       "offsets that are no range",
       {offsets("reversed", {"\"w\"", "reversed", "[24, 0]"}, "[24,0]"),
        offsets("negative", {"-24"}, "[-24,0]"), offsets("three", {"\"w\"", "2 "}, "[0,24,48]"),
        offsets("one", {"\"w\"", "1"}, "[0]"), offsets("text", {"string"}, "[\"0\",\"24\"]")}},
  };
}

std::vector<Row> cover_rows() {
  const auto fe = Errc::format_error;
  const auto ends = [](const char* name, Words words, std::size_t bytes) {
    return broken(name, Errc::format_error, std::move(words),
                  [bytes](FileSpec& f) { f.data.resize(bytes); });
  };
  return {
      {38,
       "a range ends beyond the data",
       {ends("", {"\"v\"", "beyond the data", "40", "30"}, 30)}},
      {39,
       "shape times dtype is not the range",
       {bad_entry("", {"needs 16 bytes", "span 24"}, &EntrySpec::shape, "[2,2]")}},
      {40,
       "two ranges overlap",
       {broken("", fe, {"\"w\" and \"v\" overlap", "8 bytes"},
               [](FileSpec& f) {
                 f.entries[1].offsets = "[16,32]";
                 f.data.resize(32);
               })}},
      {41,
       "10^5 tensors with one range: refused in linear time",
       {broken(
           "", fe, {"overlap", "24 bytes"},
           [](FileSpec& f) {
             f.entries.assign(100'000, {});
             for (std::size_t i = 0; i < f.entries.size(); ++i) {
               f.entries[i].name = "\"" + std::to_string(i) + "\"";
             }
             f.data.resize(24);
           },
           kFullTable)}},
      {42,
       "gaps",
       {broken("between", fe, {"gap of 3 bytes", "byte 27", "\"v\""},
               [](FileSpec& f) {
                 f.entries[1].offsets = "[27,43]";
                 f.data.resize(43);
               }),
        broken("at the start", fe, {"gap of 1 bytes", "byte 1"},
               [](FileSpec& f) {
                 f.entries = {{"\"w\"", "\"F32\"", "[2,3]", "[1,25]", ""}};
                 f.data.resize(25);
               })}},
      {43, "bytes after the last tensor", {ends("", {"3 bytes after"}, 43)}},
      {44,
       "the file is cut",
       {ends("by one byte", {"\"v\"", "39"}, 39), ends("in the middle", {"\"w\"", "20"}, 20),
        bad("in the header", fe, {"remaining 40"}, FileSpec().bytes().substr(0, 48))}},
      {45,
       "the last end and the header together wrap",
       {broken("", fe, {"18446744073709551615"},
               [](FileSpec& f) {
                 f.entries = {
                     {"\"w\"", "\"U8\"", "[4]", "[18446744073709551611,18446744073709551615]", ""}};
                 f.data.resize(4);
               })}},
      {46,
       "entries in another order than their data",
       {good("", [](FileSpec& f) { std::swap(f.entries[0], f.entries[1]); })}},
  };
}

void read_unaligned() {
  FileSpec file;
  const std::vector<float> values = {1, 2, 3, 4, 5, 6};
  file.data = raw(values) + std::string(16, '\0');
  for (int padding = 0; padding < 8; ++padding, file.after += ' ') {
    INFO(padding);
    const std::string bytes = file.bytes();
    CHECK(SafeTensors::parse(as_bytes(bytes), "file").read<float>("w") == values);
    const TemporaryFolder folder;
    CHECK(SafeTensors::open(folder.write("file", bytes)).read<float>("w") == values);
  }
}

std::vector<Case> name_cases() {
  std::vector<Case> cases;
  const std::pair<const char*, std::string> names[] = {
      {"empty", ""},
      {"64 KiB", std::string(65536, 'n')},
      {"new line", "a\\nb"},
      {"a path", "../../etc/passwd"},
      {"terminal escapes", "\\u001b[31m\\u0007"},
  };
  for (const auto& [name, text] : names) {
    cases.push_back(
        good(name, [text = text](FileSpec& f) { f.entries[0].name = "\"" + text + "\""; }));
  }
  cases.push_back(works("in a message", [] {
    FileSpec file;
    file.entries[0].name = "\"../\\u001b[31m\\n" + std::string(5000, 'n') + "\"";
    file.entries[0].dtype = "";
    const std::string bytes = file.bytes();
    const auto call = [&] { SafeTensors::parse(as_bytes(bytes), "file"); };
    check_refused(
        {Errc::format_error, {"../\\x1b[31m\\x0a", "...", "lacks"}, call, nullptr, 0, {}});
    CHECK(outcome_of(call).message.size() < 250);
  }));
  return cases;
}

Case not_finite(std::string name, std::vector<float> up, Words words) {
  return works(std::move(name), [=] {
    FileSpec file;
    file.entries = {{"\"base_model.model.q.lora_A.weight\"", "\"F32\"", "[2,3]", "[0,24]", ""},
                    {"\"base_model.model.q.lora_B.weight\"", "\"F32\"", "[3,2]", "[24,48]", ""}};
    file.data = raw(std::vector<float>(6, 1.0f)) + raw(up);
    bad_adapter("", Errc::numeric_error, words, file.bytes()).check();
    const std::string bytes = file.bytes();  // the container does not judge values
    const auto read =
        SafeTensors::parse(as_bytes(bytes), "file").read<float>("base_model.model.q.lora_B.weight");
    for (std::size_t i = 0; i < up.size(); ++i) {
      CHECK(std::bit_cast<std::uint32_t>(read[i]) == std::bit_cast<std::uint32_t>(up[i]));
    }
  });
}

void convert_every_half() {
  std::vector<std::uint16_t> patterns(65536);
  for (std::size_t i = 0; i < patterns.size(); ++i) patterns[i] = static_cast<std::uint16_t>(i);
  int wrong = 0;
  for (const char* dtype : {"BF16", "F16"}) {
    const std::string file = container({{"w", dtype, "[65536]", raw(patterns)}});
    const auto wide = SafeTensors::parse(as_bytes(file), "file").read<float>("w");
    const auto back16 = SafeTensors::parse(as_bytes(file), "file").read<mole::f16>("w");
    const auto back_b16 = SafeTensors::parse(as_bytes(file), "file").read<mole::bf16>("w");
    for (std::size_t i = 0; i < patterns.size(); ++i) {
      const unsigned sign = patterns[i] >> 15;
      const bool brain = dtype[0] == 'B';
      const int exponent = brain ? (patterns[i] >> 7) & 0xff : (patterns[i] >> 10) & 0x1f;
      const int fraction = brain ? patterns[i] & 0x7f : patterns[i] & 0x3ff;
      const int bits = brain ? 7 : 10, bias = brain ? 127 : 15, top = brain ? 255 : 31;
      const std::uint16_t same = brain ? back_b16[i].bits : back16[i].bits;
      wrong += same != patterns[i];
      wrong += std::signbit(wide[i]) != (sign != 0);
      if (exponent == top) {
        wrong += fraction == 0 ? !std::isinf(wide[i]) : !std::isnan(wide[i]);
        continue;
      }
      const double size = exponent == 0
                              ? std::ldexp(fraction, 1 - bias - bits)
                              : std::ldexp(fraction + (1 << bits), exponent - bias - bits);
      wrong += static_cast<double>(std::fabs(wide[i])) != size;
    }
  }
  CHECK(wrong == 0);
}

std::vector<Row> value_rows() {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  const auto bits = [](const char* dtype, const char* shape, const char* count) {
    return broken(dtype, Errc::format_error, {"\"w\"", count}, [=](FileSpec& f) {
      f.entries = {{"\"w\"", std::string("\"") + dtype + "\"", shape, "[0,2]", ""}};
      f.data.resize(2);
    });
  };
  return {
      {47, "every header length modulo 8: data off their alignment", {works("", read_unaligned)}},
      {48, "hostile names: data, never a path; escaped and cut in messages", name_cases()},
      {49,
       "NaN and infinity in weights: refused by load_peft; the container reads them",
       {not_finite("NaN", {1, 2, nan, 4, 5, 6}, {"lora_B", "1 non-finite", "index 2"}),
        not_finite("infinity", {1, inf, 2, -inf, 5, 6}, {"lora_B", "2 non-finite", "index 1"})}},
      {50, "every bf16 and f16: exact, the same bits back", {works("", convert_every_half)}},
      {51,
       "elements that end inside a byte",
       {bits("F4", "[3]", "12 bits"), bits("F6_E2M3", "[2]", "12 bits")}},
  };
}

Case special_file(std::string name, const char* kind,
                  const std::function<bool(const std::string&)>& make) {
  return works(std::move(name), [=] {
    const TemporaryFolder folder;
    const std::string path = folder.path() + "/it";
    REQUIRE(make(path));
    check_refused({Errc::io_error, {path, kind}, [&] { SafeTensors::open(path); }, nullptr, 0, {}});
  });
}

bool make_socket(const std::string& path) {
  const int socket = ::socket(AF_UNIX, SOCK_STREAM, 0);
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  if (socket < 0 || path.size() >= sizeof address.sun_path) return false;
  path.copy(address.sun_path, path.size());
  const bool bound = ::bind(socket, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0;
  ::close(socket);
  return bound;
}

// File modes do not bind the superuser, who becomes nobody for the call.
void refuse_without_permission() {
  constexpr uid_t kNobody = 65534;
  const TemporaryFolder folder;
  const std::string path = folder.write("secret", FileSpec().bytes());
  REQUIRE(::chmod(path.c_str(), 0) == 0);
  const bool privileged = ::geteuid() == 0;
  if (privileged && ::seteuid(kNobody) != 0) {
    WARN("the superuser cannot become somebody else here: not tested");
    return;
  }
  check_refused(
      {Errc::io_error, {path, "ermission"}, [&] { SafeTensors::open(path); }, nullptr, 0, {}});
  if (privileged) REQUIRE(::seteuid(0) == 0);
}

std::vector<Row> file_rows() {
  const auto fe = Errc::format_error, io = Errc::io_error;
  return {
      {52,
       "no regular file",
       {bad_path("directory", io, {"/tmp", "directory"}, "/tmp"),
        special_file("FIFO", "FIFO",
                     [](const std::string& path) { return ::mkfifo(path.c_str(), 0600) == 0; }),
        special_file("socket", "socket", make_socket),
        bad_path("device", io, {"/dev/zero", "device"}, "/dev/zero"),
        special_file(
            "symlink loop", "symbolic links",
            [](const std::string& path) { return ::symlink(path.c_str(), path.c_str()) == 0; })}},
      {53,
       "paths that lead nowhere",
       {bad_path("not there", io, {"/nowhere/at all", "No such file"}, "/nowhere/at all"),
        bad_path("NUL", Errc::invalid_argument, {"a\\x00b", "NUL"}, std::string("a\0b", 3)),
        bad_path("not UTF-8", io, {"\\xff\\xfe", "No such file"}, "\xff\xfe"),
        bad_path("too long", io, {"xxxx", "too long"}, std::string(5000, 'x')),
        works("no permission", refuse_without_permission)}},
      {54,
       "pickles: nothing is executed",
       {works("adapter_model.bin",
              [] {
                const TemporaryFolder folder;
                folder.write("adapter_config.json",
                             R"({"peft_type":"LORA","r":2,"lora_alpha":4,"target_modules":["q"]})");
                folder.write("adapter_model.bin", "\x80\x02cos\nsystem\n");
                check_refused({Errc::unsupported,
                               {"adapter_model.bin", "pickle", "convert", "safetensors"},
                               [&] { mole::load_peft(folder.path()); },
                               nullptr,
                               0,
                               {}});
              }),
        bad("by content", fe, {"pickle"}, std::string("\x80\x02}q\x00X\x05\x00\x00\x00", 10))}},
      {55,
       "weights split over several files",
       {works("",
              [] {
                const TemporaryFolder folder;
                folder.write("adapter_config.json",
                             R"({"peft_type":"LORA","r":2,"lora_alpha":4,"target_modules":["q"]})");
                folder.write("adapter_model.safetensors.index.json", R"({"weight_map":{}})");
                check_refused({Errc::unsupported,
                               {"index.json", "several files"},
                               [&] { mole::load_peft(folder.path()); },
                               nullptr,
                               0,
                               {}});
              })}},
      {56,
       "files of another kind",
       {bad("zip", fe, {"zip"}, std::string("PK\x03\x04") + std::string(30, '\0')),
        bad("gzip", fe, {"gzip"}, std::string("\x1f\x8b\x08\x00", 4) + std::string(30, '\7')),
        bad("GGUF", fe, {"GGUF"}, std::string("GGUF\x03\0\0\0", 8) + std::string(30, '\0')),
        bad("Git LFS", fe, {"Git LFS"}, std::string("version https://git-lfs.github.com"))}},
  };
}

}  // namespace

std::vector<Row> container_rows() {
  std::vector<Row> all;
  for (const auto& part :
       {length_rows(), text_rows(), entry_rows(), cover_rows(), value_rows(), file_rows()}) {
    all.insert(all.end(), part.begin(), part.end());
  }
  return all;
}

TEST_CASE("bad inputs: files", "[bad_inputs][io]") {
  run(container_rows());
}

}  // namespace test::bad_inputs
