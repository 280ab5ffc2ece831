// SPDX-License-Identifier: Apache-2.0
// Files for the reader's tests, byte by byte: nothing here checks anything.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace mole::test {

inline std::string length_bytes(std::uint64_t length) {
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes.push_back(static_cast<char>((length >> (8 * i)) & 0xff));
  return bytes;
}

/// A safetensors file with this header and these data.
inline std::string container(const std::string& header, const std::string& data) {
  return length_bytes(header.size()) + header + data;
}

inline std::span<const std::byte> as_bytes(const std::string& text) {
  return std::as_bytes(std::span<const char>(text));
}

inline std::string enclosed(const char* before, std::string_view text, const char* after) {
  return std::string(before).append(text).append(after);
}

template <class T>
std::string raw(const std::vector<T>& values) {
  std::string bytes(values.size() * sizeof(T), '\0');
  std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

struct TestTensor {
  std::string name, dtype, shape, bytes;
};

/// A valid file with the tensors in the given order.
inline std::string container(const std::vector<TestTensor>& tensors) {
  std::string header = "{", data;
  for (const TestTensor& tensor : tensors) {
    const std::size_t begin = data.size();
    data += tensor.bytes;
    header += header.size() > 1 ? "," : "";
    header += "\"" + tensor.name + "\":{\"dtype\":\"" + tensor.dtype +
              "\",\"shape\":" + tensor.shape + ",\"data_offsets\":[" + std::to_string(begin) + "," +
              std::to_string(data.size()) + "]}";
  }
  return container(header + "}", data);
}

/// One entry of a header, every part as JSON text. An empty part is left out.
struct EntrySpec {
  std::string name = "\"w\"";
  std::string dtype = "\"F32\"";
  std::string shape = "[2,3]";
  std::string offsets = "[0,24]";
  std::string more = "";  ///< further members

  std::string text() const {
    std::string members;
    const auto add = [&members](const std::string& member) {
      members.append(members.empty() ? "" : ",").append(member);
    };
    if (!dtype.empty()) add("\"dtype\":" + dtype);
    if (!shape.empty()) add("\"shape\":" + shape);
    if (!offsets.empty()) add("\"data_offsets\":" + offsets);
    if (!more.empty()) add(more);
    return name + ":{" + members + "}";
  }
};

/// A valid file with two matrices, whose parts can be changed one by one to break one rule.
struct FileSpec {
  std::vector<EntrySpec> entries = {{}, {"\"v\"", "\"F32\"", "[4]", "[24,40]", ""}};
  std::string metadata = "";            ///< JSON text of __metadata__; empty: none
  std::string before = "", after = "";  ///< around the header's object
  std::string data = std::string(40, '\0');
  std::int64_t length_error = 0;  ///< added to the header length

  std::string header() const {
    std::string members = metadata.empty() ? "" : "\"__metadata__\":" + metadata;
    for (const EntrySpec& entry : entries) {
      members.append(members.empty() ? "" : ",").append(entry.text());
    }
    return before + "{" + members + "}" + after;
  }
  std::string bytes() const {
    const std::string text = header();
    const auto length = static_cast<std::int64_t>(text.size()) + length_error;
    return length_bytes(static_cast<std::uint64_t>(length)) + text + data;
  }
};

/// A folder of its own that goes away with the object.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "mole_test_XXXXXX").string();
    path_ = ::mkdtemp(name.data()) != nullptr ? name : std::string();
  }
  ~TemporaryFolder() { std::filesystem::remove_all(path_); }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;

  const std::string& path() const { return path_; }
  std::string write(const std::string& file, const std::string& bytes) const {
    const std::string path = path_ + "/" + file;
    std::ofstream(path, std::ios::binary) << bytes;
    return path;
  }

 private:
  std::string path_;
};

}  // namespace mole::test
