// SPDX-License-Identifier: Apache-2.0
#include "io/json.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <nlohmann/json.hpp>
#include <set>

#include "io/text.hpp"
#include "mole/core/error.hpp"

namespace mole::inline MOLE_ABI {
namespace io {
namespace {

constexpr std::size_t kMaxDepth = 16;

// Builds the tree and refuses what other parsers would pass over.
class Builder final : public nlohmann::json_sax<nlohmann::json> {
 public:
  Builder(std::string_view text, const std::string& file) : text_(text), file_(file) {}

  bool null() override { return add(nullptr); }
  bool boolean(bool value) override { return add(value); }
  bool number_integer(number_integer_t value) override { return add(value); }
  bool number_unsigned(number_unsigned_t value) override { return add(value); }
  bool number_float(number_float_t value, const string_t&) override { return add(value); }
  bool string(string_t& value) override { return add(std::move(value)); }
  bool binary(binary_t&) override { return false; }

  bool start_object(std::size_t) override { return enter(Json::object()); }
  bool start_array(std::size_t) override { return enter(Json::array()); }
  bool end_object() override { return leave(); }
  bool end_array() override { return leave(); }

  bool key(string_t& value) override {
    require(open_.back().keys.insert(value).second, Errc::format_error, file_, ": has the key ",
            in_quotes(value), " twice");
    key_ = std::move(value);
    return true;
  }

  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::detail::exception&) override {
    const std::string_view rest = text_.substr(position == 0 ? 0 : position - 1);
    for (const std::string_view word : {"NaN", "Infinity"}) {
      if (rest.starts_with(word)) {
        fail(Errc::format_error, file_, ": holds ", word, " at byte ", position,
             ", which is not JSON");
      }
    }
    fail(Errc::format_error, file_, ": is not JSON, syntax error at byte ", position);
  }

  Json take() { return std::move(root_); }

 private:
  struct Open {
    Json* value;
    std::set<std::string> keys;
  };

  // Only the innermost open value grows, so the addresses of the others stay.
  Json& place(Json value) {
    if (open_.empty()) return root_ = std::move(value);
    Json& parent = *open_.back().value;
    if (parent.is_object()) return parent.add(std::move(key_), std::move(value));
    return parent.push_back(std::move(value));
  }
  bool add(Json value) {
    place(std::move(value));
    return true;
  }
  bool enter(Json value) {
    require(open_.size() < kMaxDepth, Errc::format_error, file_, ": nested deeper than ",
            kMaxDepth);
    Json& placed = place(std::move(value));
    open_.push_back({&placed, {}});
    return true;
  }
  bool leave() {
    open_.pop_back();
    return true;
  }

  std::string_view text_;
  const std::string& file_;
  Json root_;
  std::string key_;
  std::vector<Open> open_;
};

void write_escape(std::string& text, unsigned unit) {
  constexpr char kDigits[] = "0123456789abcdef";
  text += "\\u";
  for (int shift = 12; shift >= 0; shift -= 4) text += kDigits[(unit >> shift) & 15u];
}

// The character at `at`, which is valid UTF-8, and its length.
std::pair<unsigned, std::size_t> decode(std::string_view text, std::size_t at) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[at + i]); };
  const unsigned first = byte(0);
  if (first < 0x80) return {first, 1};
  const std::size_t length = first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
  unsigned code = first & (0xffu >> (length + 1));
  for (std::size_t i = 1; i < length; ++i) code = (code << 6) | (byte(i) & 0x3fu);
  return {code, length};
}

void write_wide(std::string& text, unsigned code) {
  if (code < 0x10000) return write_escape(text, code);
  write_escape(text, 0xd800u + ((code - 0x10000) >> 10));
  write_escape(text, 0xdc00u + ((code - 0x10000) & 0x3ffu));
}

void write_string(std::string& text, std::string_view value, bool ascii) {
  text += '"';
  std::size_t valid_end = std::min(first_invalid_utf8(value), value.size());
  for (std::size_t at = 0; at < value.size();) {
    if (at == valid_end) {
      text += ascii ? "\\ufffd" : "\xef\xbf\xbd";
      const std::size_t next = first_invalid_utf8(value.substr(++at));
      valid_end = next == std::string_view::npos ? value.size() : at + next;
      continue;
    }
    const auto [code, length] = decode(value, at);
    constexpr std::string_view kNamed = "\"\\\b\f\n\r\t", kLetters = "\"\\bfnrt";
    const std::size_t named = code < 0x80 ? kNamed.find(static_cast<char>(code)) : kNamed.npos;
    if (named != kNamed.npos) {
      text += '\\';
      text += kLetters[named];
    } else if (code < 0x20 || (ascii && code >= 0x80)) {
      write_wide(text, code);
    } else {
      text += value.substr(at, length);
    }
    at += length;
  }
  text += '"';
}

// Shortest decimal that reads back; a float keeps a point or an exponent. What is not finite has no
// JSON and becomes null.
void write_number(std::string& text, double value) {
  if (!std::isfinite(value)) {
    text += "null";
    return;
  }
  char digits[64];
  const std::string_view shown(digits, std::to_chars(digits, digits + sizeof digits, value).ptr);
  text += shown;
  if (shown.find_first_of(".e") == std::string_view::npos) text += ".0";
}

void start_line(std::string& text, int indent, int depth) {
  if (indent < 0) return;
  text += '\n';
  text.append(static_cast<std::size_t>(indent * depth), ' ');
}

}  // namespace

Json::Json(Value value) noexcept : value_(std::move(value)) {}
Json::Json(std::nullptr_t) noexcept {}
Json::Json(double value) noexcept : value_(value) {}
Json::Json(std::string value) noexcept : value_(std::move(value)) {}
Json::Json(const char* value) : value_(std::string(value)) {}
Json::Json(Json&& other) noexcept = default;
Json& Json::operator=(Json&& other) noexcept = default;
Json::~Json() = default;

Json Json::array() {
  return Json(Value(Array()));
}

Json Json::object() {
  return Json(Value(Object()));
}

std::size_t Json::size() const noexcept {
  if (const auto* list = std::get_if<Array>(&value_)) return list->size();
  const auto* members = std::get_if<Object>(&value_);
  return members == nullptr ? 0 : members->size();
}

const Json* Json::begin() const noexcept {
  const auto* list = std::get_if<Array>(&value_);
  return list == nullptr ? nullptr : list->data();
}

const Json* Json::end() const noexcept {
  const auto* list = std::get_if<Array>(&value_);
  return list == nullptr ? nullptr : list->data() + list->size();
}

Json& Json::push_back(Json element) {
  return std::get<Array>(value_).emplace_back(std::move(element));
}

const std::vector<JsonMember>& Json::items() const {
  return std::get<Object>(value_);
}

const Json* Json::find(std::string_view key) const noexcept {
  const auto* members = std::get_if<Object>(&value_);
  if (members == nullptr) return nullptr;
  for (const JsonMember& member : *members) {
    if (member.name == key) return &member.data;
  }
  return nullptr;
}

Json& Json::operator[](std::string_view key) {
  if (is_null()) value_ = Object();
  auto& members = std::get<Object>(value_);
  for (JsonMember& member : members) {
    if (member.name == key) return member.data;
  }
  return add(std::string(key), nullptr);
}

Json& Json::add(std::string key, Json member) {
  return std::get<Object>(value_).emplace_back(JsonMember{std::move(key), std::move(member)}).data;
}

bool Json::operator==(std::string_view text) const noexcept {
  const auto* own = std::get_if<std::string>(&value_);
  return own != nullptr && *own == text;
}

std::string Json::dump(int indent, bool ascii) const {
  std::string text;
  write(text, indent, 0, ascii);
  return text;
}

void Json::write(std::string& text, int indent, int depth, bool ascii) const {
  if (is_null()) {
    text += "null";
  } else if (is_boolean()) {
    text += get<bool>() ? "true" : "false";
  } else if (is_string()) {
    write_string(text, std::get<std::string>(value_), ascii);
  } else if (is_number_unsigned()) {
    text += std::to_string(get<std::uint64_t>());
  } else if (is_number_integer()) {
    text += std::to_string(get<std::int64_t>());
  } else if (is_number()) {
    write_number(text, get<double>());
  } else {
    const bool list = is_array();
    const std::size_t count = size();
    text += list ? '[' : '{';
    for (std::size_t i = 0; i < count; ++i) {
      if (i > 0) text += ',';
      start_line(text, indent, depth + 1);
      if (!list) {
        write_string(text, items()[i].name, ascii);
        text += indent < 0 ? ":" : ": ";
      }
      (list ? begin()[i] : items()[i].data).write(text, indent, depth + 1, ascii);
    }
    if (count > 0) start_line(text, indent, depth);
    text += list ? ']' : '}';
  }
}

void Json::sort() {
  if (auto* list = std::get_if<Array>(&value_)) {
    for (Json& element : *list) element.sort();
  } else if (auto* members = std::get_if<Object>(&value_)) {
    for (JsonMember& member : *members) member.data.sort();
    std::sort(members->begin(), members->end(),
              [](const JsonMember& a, const JsonMember& b) { return a.name < b.name; });
  }
}

Json parse_json_object(std::string_view text, const std::string& file) {
  const std::size_t nul = text.find('\0');
  require(nul == std::string_view::npos, Errc::format_error, file, ": NUL at byte ", nul);
  const std::size_t invalid = first_invalid_utf8(text);
  require(invalid == std::string_view::npos, Errc::format_error, file, ": is not UTF-8 at byte ",
          invalid);
  Builder builder(text, file);
  nlohmann::json::sax_parse(text, &builder);
  // A byte order mark, which the grammar passes over, is refused too.
  const std::size_t first = text.find_first_not_of(" \t\r\n");
  require(text[first] == '{', Errc::format_error, file, ": must hold an object");
  return builder.take();
}

std::string json_kind(const Json& value) {
  if (value.is_object()) return "an object";
  if (value.is_array()) return "a list";
  if (value.is_string()) return "a string";
  return value.dump();
}

}  // namespace io
}  // namespace mole::inline MOLE_ABI
