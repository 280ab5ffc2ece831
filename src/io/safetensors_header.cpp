// SPDX-License-Identifier: Apache-2.0
#include "io/safetensors_header.hpp"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "io/text.hpp"

namespace mole::inline MOLE_ABI {
namespace io {
namespace {

constexpr std::string_view kHeaderFirst = "{ \t\r\n";

// Refuses a file of another kind that carries this name.
void refuse_foreign(std::string_view start, const std::string& file) {
  using namespace std::string_view_literals;
  static constexpr std::pair<std::string_view, const char*> kKinds[] = {
      {"PK\x03\x04"sv, "a zip archive"},
      {"\x1f\x8b"sv, "gzip data"},
      {"GGUF"sv, "a GGUF file"},
      {"\x80\x02"sv, "a pickle"},
      {"\x80\x03"sv, "a pickle"},
      {"\x80\x04"sv, "a pickle"},
      {"\x80\x05"sv, "a pickle"},
      {"version "sv, "a Git LFS pointer"},
      {"\x89HDF"sv, "an HDF5 file"},
      {"\x93NUMPY"sv, "a NumPy array"},
      {"{"sv, "JSON text"},
  };
  for (const auto& [magic, kind] : kKinds) {
    if (start.starts_with(magic)) {
      fail(Errc::format_error, file, ": is ", kind, ", not safetensors");
    }
  }
}

// Receives the header piece by piece. What may come next depends on `place_` alone, so nothing
// nests deeper than the format does.
class HeaderHandler final : public nlohmann::json_sax<nlohmann::json> {
 public:
  HeaderHandler(const std::string& file, const SafeTensorsLimits& limits)
      : file_(file), limits_(limits) {}

  Header take() { return std::move(header_); }

  bool null() override { misplaced("null"); }
  bool boolean(bool) override { misplaced("a boolean"); }
  bool number_float(number_float_t, const string_t& text) override { misplaced(escaped(text)); }
  bool binary(binary_t&) override { misplaced("binary data"); }

  bool number_integer(number_integer_t value) override {
    if (place_ == Place::shape) broken(in_quotes(entry_.name), " has the dimension ", value);
    misplaced(std::to_string(value));
  }

  bool number_unsigned(number_unsigned_t value) override {
    if (place_ == Place::shape) {
      add_dimension(value);
    } else if (place_ == Place::offsets && offset_count_ < 2) {
      (offset_count_ == 0 ? entry_.begin : entry_.end) = value;
      ++offset_count_;
    } else {
      misplaced(std::to_string(value));
    }
    return true;
  }

  bool string(string_t& value) override {
    if (place_ == Place::metadata) {
      const bool is_new = header_.metadata.emplace(key_, std::move(value)).second;
      if (!is_new) broken("the metadata have the key ", in_quotes(key_), " twice");
    } else if (place_ == Place::entry && key_ == "dtype") {
      dtype_ = std::move(value);
    } else {
      misplaced("a string");
    }
    return true;
  }

  bool start_object(std::size_t) override {
    if (place_ == Place::start) {
      place_ = Place::root;
    } else if (place_ == Place::root && key_ == "__metadata__") {
      if (std::exchange(has_metadata_, true))
        broken("the header has the key \"__metadata__\" twice");
      place_ = Place::metadata;
    } else if (place_ == Place::root) {
      entry_ = {};
      entry_.name = key_;
      dtype_.reset();
      seen_ = {};
      offset_count_ = 0;
      place_ = Place::entry;
    } else {
      misplaced("an object");
    }
    return true;
  }

  bool key(string_t& value) override {
    if (value.find('\0') != std::string::npos)
      broken("the name ", in_quotes(value), " holds a NUL");
    key_ = std::move(value);
    if (place_ == Place::entry) {
      start_field();
    } else if (++keys_ > limits_.max_entries) {
      fail(Errc::limit_exceeded, file_, ": more than ", limits_.max_entries,
           " header entries (option max_entries)");
    }
    return true;
  }

  bool end_object() override {
    if (place_ == Place::entry) finish_entry();
    place_ = Place::root;
    return true;
  }

  bool start_array(std::size_t) override {
    if (place_ == Place::entry && key_ == "shape") {
      place_ = Place::shape;
    } else if (place_ == Place::entry && key_ == "data_offsets") {
      place_ = Place::offsets;
    } else {
      misplaced("an array");
    }
    return true;
  }

  bool end_array() override {
    if (place_ == Place::offsets && offset_count_ != 2) {
      broken(in_quotes(entry_.name), ": data_offsets must hold 2 numbers, got ", offset_count_);
    }
    place_ = Place::entry;
    return true;
  }

  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::detail::exception&) override {
    broken("header is not JSON: syntax error at byte ", position);
  }

 private:
  enum class Place { start, root, metadata, entry, shape, offsets };

  template <class... Parts>
  [[noreturn]] void broken(const Parts&... parts) const {
    fail(Errc::format_error, file_, ": ", parts...);
  }

  [[noreturn]] void misplaced(const std::string& what) const {
    switch (place_) {
      case Place::start: broken("header must be an object, got ", what);
      case Place::root: broken(in_quotes(key_), " must be an object, got ", what);
      case Place::metadata:
        broken("\"__metadata__\" entry ", in_quotes(key_), " is not a string, got ", what);
      case Place::shape:
        broken(in_quotes(entry_.name), " has the dimension ", what,
               ", expected an unsigned integer");
      case Place::offsets:
        broken(in_quotes(entry_.name), ": data_offsets must hold 2 unsigned integers, got ", what);
      case Place::entry: break;
    }
    broken(in_quotes(entry_.name), ": ", in_quotes(key_), " cannot be ", what);
  }

  void start_field() {
    static constexpr std::string_view kFields[] = {"dtype", "shape", "data_offsets"};
    for (std::size_t i = 0; i < 3; ++i) {
      if (key_ != kFields[i]) continue;
      if (seen_[i]) broken(in_quotes(entry_.name), " has the key ", in_quotes(key_), " twice");
      seen_[i] = true;
      return;
    }
    broken(in_quotes(entry_.name), " has the unknown member ", in_quotes(key_));
  }

  void add_dimension(std::uint64_t value) {
    if (entry_.shape.size() == kMaxRank) {
      fail(Errc::limit_exceeded, file_, ": ", in_quotes(entry_.name), " has more than ", kMaxRank,
           " dimensions");
    }
    if (value > kMaxDimension) {
      broken(in_quotes(entry_.name), " has the dimension ", value, ", above ", kMaxDimension);
    }
    entry_.shape.push_back(static_cast<Index>(value));
  }

  void finish_entry() {
    const std::string name = in_quotes(entry_.name);
    if (!seen_[0]) broken(name, " lacks \"dtype\"");
    if (!seen_[1]) broken(name, " lacks \"shape\"");
    if (!seen_[2]) broken(name, " lacks \"data_offsets\"");
    entry_.dtype = known_dtype();
    const std::uint64_t needed = stored_bytes();
    if (entry_.begin > entry_.end) {
      broken(name, " has reversed data_offsets [", entry_.begin, ", ", entry_.end, "]");
    }
    if (entry_.end - entry_.begin != needed) {
      broken(name, " needs ", needed, " bytes, its offsets span ", entry_.end - entry_.begin);
    }
    header_.entries.push_back(std::move(entry_));
  }

  Dtype known_dtype() const {
    std::string names;
    for (const DtypeInfo& known : kDtypes) {
      if (*dtype_ == known.name) return known.dtype;
      names.append(names.empty() ? "" : " ").append(known.name);
    }
    fail(Errc::unsupported, file_, ": ", in_quotes(entry_.name), " has the dtype ",
         in_quotes(*dtype_), ", known are ", names);
  }

  std::uint64_t stored_bytes() const {
    const std::optional<std::uint64_t> bits = stored_bits(entry_.dtype, entry_.shape);
    if (!bits) {
      broken("the size of ", in_quotes(entry_.name), ", ", shape_text(entry_.shape), " ",
             mole::name(entry_.dtype), ", overflows");
    }
    if (*bits % 8 != 0) {
      broken(in_quotes(entry_.name), " has ", *bits, " bits, which are not whole bytes");
    }
    return *bits / 8;
  }

  const std::string& file_;
  const SafeTensorsLimits& limits_;
  Header header_;
  Place place_ = Place::start;
  std::string key_;
  std::uint64_t keys_ = 0;
  bool has_metadata_ = false;
  HeaderEntry entry_;
  std::optional<std::string> dtype_;
  std::array<bool, 3> seen_ = {};
  int offset_count_ = 0;
};

// Bytes that a JSON parser may treat in its own way are refused before it sees them.
void check_text(std::string_view text, const std::string& file) {
  const std::size_t nul = text.find('\0');
  require(nul == std::string_view::npos, Errc::format_error, file, ": NUL in the header at byte ",
          nul, " (some writers pad with NUL; the format pads with spaces)");
  const std::size_t invalid = first_invalid_utf8(text);
  require(invalid == std::string_view::npos, Errc::format_error, file,
          ": header is not UTF-8 at byte ", invalid);
  const std::size_t first = text.find_first_not_of(" \t\r\n");
  require(first != std::string_view::npos && text[first] == '{', Errc::format_error, file,
          ": header must be an object, it does not start with {");
}

void sort_by_name(std::vector<HeaderEntry>& entries, const std::string& file) {
  const auto by_name = [](const HeaderEntry& a, const HeaderEntry& b) { return a.name < b.name; };
  std::sort(entries.begin(), entries.end(), by_name);
  const auto same = [](const HeaderEntry& a, const HeaderEntry& b) { return a.name == b.name; };
  const auto twin = std::adjacent_find(entries.begin(), entries.end(), same);
  if (twin != entries.end()) {
    fail(Errc::format_error, file, ": the header has the key ", in_quotes(twin->name), " twice");
  }
}

// The ranges, in order, must start at 0, touch each other and end with the data.
void check_cover(const std::vector<HeaderEntry>& entries, std::uint64_t header_bytes,
                 std::uint64_t data_bytes, const std::string& file) {
  std::vector<const HeaderEntry*> order;
  for (const HeaderEntry& entry : entries) order.push_back(&entry);
  std::sort(order.begin(), order.end(), [](const HeaderEntry* a, const HeaderEntry* b) {
    return std::pair(a->begin, a->end) < std::pair(b->begin, b->end);
  });
  const HeaderEntry* previous = nullptr;
  for (const HeaderEntry* entry : order) {
    const std::uint64_t covered = previous == nullptr ? 0 : previous->end;
    if (entry->end > data_bytes) {
      fail(Errc::format_error, file, ": ", in_quotes(entry->name),
           " ends beyond the data: it ends ", entry->end, " bytes into the data of ", data_bytes,
           "; tensor data ends at byte ", kHeaderStart + header_bytes + data_bytes, " of ",
           entry->end > ~std::uint64_t{0} - kHeaderStart - header_bytes
               ? ~std::uint64_t{0}
               : kHeaderStart + header_bytes + entry->end);
    }
    if (entry->begin < covered) {
      fail(Errc::format_error, file, ": ", in_quotes(previous->name), " and ",
           in_quotes(entry->name), " overlap by ", covered - entry->begin, " bytes");
    }
    if (entry->begin > covered) {
      fail(Errc::format_error, file, ": gap of ", entry->begin - covered, " bytes before byte ",
           entry->begin, " of the data, where ", in_quotes(entry->name), " starts");
    }
    previous = entry;
  }
  const std::uint64_t covered = previous == nullptr ? 0 : previous->end;
  require(covered == data_bytes, Errc::format_error, file, ": ", data_bytes - covered,
          " bytes after the last tensor");
}

}  // namespace

std::optional<std::uint64_t> stored_bits(Dtype dtype, const std::vector<Index>& shape) noexcept {
  std::uint64_t bits = 1;
  bool overflow = false;
  for (const Index dimension : shape) {
    overflow |= __builtin_mul_overflow(bits, static_cast<std::uint64_t>(dimension), &bits);
  }
  overflow |= __builtin_mul_overflow(bits, std::uint64_t(info(dtype).bits), &bits);
  return overflow ? std::nullopt : std::optional(bits);
}

std::uint64_t header_length(std::span<const std::byte> start, std::uint64_t file_bytes,
                            const std::string& file, const SafeTensorsLimits& limits) {
  require(file_bytes >= kHeaderStart, Errc::format_error, file, ": file has ", file_bytes,
          " bytes, needs at least ", kHeaderStart);
  std::uint64_t length = 0;
  for (std::size_t i = 0; i < kHeaderStart; ++i) {
    length |= std::to_integer<std::uint64_t>(start[i]) << (8 * i);
  }
  const std::string_view characters(reinterpret_cast<const char*>(start.data()), start.size());
  const std::string_view first = characters.substr(kHeaderStart, 1);
  const bool has_header = first.empty() || kHeaderFirst.find(first) != std::string_view::npos;
  if (length > kFormatMaxHeader || !has_header) refuse_foreign(characters, file);
  require(length <= kFormatMaxHeader, Errc::limit_exceeded, file, ": header length ", length,
          " exceeds the format's limit of ", kFormatMaxHeader);
  require(length <= file_bytes - kHeaderStart, Errc::format_error, file, ": header length ", length,
          " exceeds the remaining ", file_bytes - kHeaderStart,
          " bytes, header longer than the file");
  require(length <= limits.max_header_bytes, Errc::limit_exceeded, file, ": header length ", length,
          " exceeds the limit of ", limits.max_header_bytes, " (option max_header_bytes)");
  require(length > 0, Errc::format_error, file, ": header length is 0");
  return length;
}

Header parse_header(std::string_view text, std::uint64_t data_bytes, const std::string& file,
                    const SafeTensorsLimits& limits) {
  check_text(text, file);
  HeaderHandler handler(file, limits);
  nlohmann::json::sax_parse(text, &handler);
  Header header = handler.take();
  sort_by_name(header.entries, file);
  check_cover(header.entries, text.size(), data_bytes, file);
  return header;
}

}  // namespace io
}  // namespace mole::inline MOLE_ABI
