// SPDX-License-Identifier: Apache-2.0
#include "mole/io/safetensors_writer.hpp"

#include <algorithm>
#include <bit>
#include <cstring>

#include "io/file.hpp"
#include "io/json.hpp"
#include "io/safetensors_header.hpp"
#include "io/text.hpp"

namespace mole::inline MOLE_ABI {
namespace {

static_assert(std::endian::native == std::endian::little, "elements are written as they are");

void check_text(const char* what, const std::string& text) {
  const std::size_t invalid = io::first_invalid_utf8(text);
  require(invalid == std::string::npos, Errc::invalid_argument, what, " ", io::in_quotes(text),
          " is not UTF-8 at byte ", invalid);
}

// Names that every reader must refuse, and those that this library's reader refuses.
void check_name(const char* what, const std::string& name) {
  check_text(what, name);
  require(name.find('\0') == std::string::npos, Errc::invalid_argument, what, " ",
          io::in_quotes(name), " holds a NUL");
}

void check_shape(const std::string& name, Dtype dtype, const std::vector<Index>& shape,
                 std::uint64_t bytes) {
  const std::string tensor = "tensor " + io::in_quotes(name) + ", " + io::shape_text(shape) + " " +
                             std::string(mole::name(dtype)) + ",";
  require(shape.size() <= io::kMaxRank, Errc::invalid_argument, tensor, " has more than ",
          io::kMaxRank, " dimensions");
  for (const Index dimension : shape) {
    require(dimension >= 0 && static_cast<std::uint64_t>(dimension) <= io::kMaxDimension,
            Errc::invalid_argument, tensor, " has a dimension outside 0 to ", io::kMaxDimension);
  }
  const std::optional<std::uint64_t> bits = io::stored_bits(dtype, shape);
  require(bits.has_value(), Errc::invalid_argument, tensor, " overflows");
  require(*bits % 8 == 0, Errc::invalid_argument, tensor, " has ", *bits,
          " bits, which are not whole bytes");
  require(*bits / 8 == bytes, Errc::shape_mismatch, tensor, " needs ", *bits / 8, " bytes, got ",
          bytes);
}

std::string quoted_json(const std::string& text) {
  return io::Json(text).dump();
}

std::string joined(const std::vector<Index>& shape) {
  std::string text;
  for (const Index dimension : shape) {
    text.append(text.empty() ? "" : ",").append(std::to_string(dimension));
  }
  return text;
}

std::string length_bytes(std::uint64_t length) {
  std::string bytes;
  for (std::size_t i = 0; i < io::kHeaderStart; ++i) {
    bytes.push_back(static_cast<char>((length >> (8 * i)) & 0xff));
  }
  return bytes;
}

}  // namespace

std::uint64_t SafeTensorsWriter::Rows::total() const noexcept {
  return static_cast<std::uint64_t>(count) * static_cast<std::uint64_t>(bytes);
}

template <class F>
void SafeTensorsWriter::Rows::each_piece(F f) const {
  if (total() == 0) return;
  const bool is_packed = stride == bytes;
  const Index pieces = is_packed ? 1 : count;
  const auto length = static_cast<std::size_t>(is_packed ? total() : bytes);
  for (Index i = 0; i < pieces; ++i) f(std::span(data + i * stride, length));
}

void SafeTensorsWriter::add(StoredTensor tensor) {
  const auto bytes = static_cast<Index>(tensor.bytes.size());
  add(std::move(tensor.name),
      {tensor.dtype, std::move(tensor.shape), {tensor.bytes.data(), 1, bytes, bytes}});
}

void SafeTensorsWriter::add(std::string name, Entry entry) {
  check_name("tensor", name);
  require(name != "__metadata__", Errc::invalid_argument,
          "tensor \"__metadata__\" has the name that the format keeps for metadata");
  check_shape(name, entry.dtype, entry.shape, entry.rows.total());
  const auto [place, is_new] = entries_.try_emplace(std::move(name), std::move(entry));
  require(is_new, Errc::invalid_argument, "tensor ", io::in_quotes(place->first),
          " was added before");
}

void SafeTensorsWriter::set_metadata(std::string key, std::string value) {
  check_name("metadata key", key);
  check_text("metadata value", value);
  const auto [place, is_new] = metadata_.try_emplace(std::move(key), std::move(value));
  require(is_new, Errc::invalid_argument, "metadata key ", io::in_quotes(place->first),
          " was set before");
}

std::vector<const SafeTensorsWriter::Item*> SafeTensorsWriter::in_file_order() const {
  std::vector<const Item*> order;
  order.reserve(entries_.size());
  for (const Item& item : entries_) order.push_back(&item);
  std::stable_sort(order.begin(), order.end(),
                   [](const Item* a, const Item* b) { return a->second.dtype > b->second.dtype; });
  return order;
}

std::string SafeTensorsWriter::start_of_file(const std::vector<const Item*>& order) const {
  std::string text = "{";
  for (const auto& [key, value] : metadata_) {
    text.append(text.size() == 1 ? "\"__metadata__\":{" : ",");
    text.append(quoted_json(key)).append(":").append(quoted_json(value));
  }
  if (!metadata_.empty()) text.append("}");
  std::uint64_t begin = 0;
  for (const Item* item : order) {
    const auto& [name, entry] = *item;
    const std::uint64_t end = begin + entry.rows.total();
    text.append(text.size() == 1 ? "" : ",").append(quoted_json(name));
    text.append(":{\"dtype\":\"").append(mole::name(entry.dtype));
    text.append("\",\"shape\":[").append(joined(entry.shape));
    text.append("],\"data_offsets\":[").append(std::to_string(begin)).append(",");
    text.append(std::to_string(end)).append("]}");
    begin = end;
  }
  text.append("}");
  text.resize((text.size() + 7) / 8 * 8, ' ');
  require(text.size() <= io::kFormatMaxHeader, Errc::limit_exceeded, "header of ", text.size(),
          " bytes exceeds the format's limit of ", io::kFormatMaxHeader);
  return length_bytes(text.size()) + text;
}

std::vector<std::byte> SafeTensorsWriter::bytes() const {
  const std::vector<const Item*> order = in_file_order();
  const std::string start = start_of_file(order);
  std::uint64_t total = start.size();
  for (const Item* item : order) total += item->second.rows.total();
  std::vector<std::byte> file;
  file.reserve(static_cast<std::size_t>(total));
  const auto append = [&file](std::span<const std::byte> piece) {
    file.insert(file.end(), piece.begin(), piece.end());
  };
  append(std::as_bytes(std::span(start)));
  for (const Item* item : order) item->second.rows.each_piece(append);
  return file;
}

void SafeTensorsWriter::save(const std::string& path) const {
  const std::vector<const Item*> order = in_file_order();
  const std::string start = start_of_file(order);
  io::NewFile file(path);
  const auto write = [&file](std::span<const std::byte> piece) { file.write(piece); };
  write(std::as_bytes(std::span(start)));
  for (const Item* item : order) item->second.rows.each_piece(write);
  file.commit();
}

}  // namespace mole::inline MOLE_ABI
