// SPDX-License-Identifier: Apache-2.0
#include "io/json.hpp"

#include <set>
#include <vector>

#include "io/text.hpp"
#include "mole/core/error.hpp"

namespace mole::inline MOLE_ABI {
namespace io {
namespace {

constexpr std::size_t kMaxDepth = 16;

// Walks the document without building it and refuses what a tree would hide.
class Guard final : public nlohmann::json_sax<Json> {
 public:
  Guard(std::string_view text, const std::string& file) : text_(text), file_(file) {}

  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(number_integer_t) override { return true; }
  bool number_unsigned(number_unsigned_t) override { return true; }
  bool number_float(number_float_t, const string_t&) override { return true; }
  bool string(string_t&) override { return true; }
  bool binary(binary_t&) override { return true; }

  bool start_object(std::size_t) override { return enter(); }
  bool start_array(std::size_t) override { return enter(); }
  bool end_object() override { return leave(); }
  bool end_array() override { return leave(); }

  bool key(string_t& value) override {
    require(keys_.back().insert(value).second, Errc::format_error, file_, ": has the key ",
            in_quotes(value), " twice");
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

 private:
  bool enter() {
    require(keys_.size() < kMaxDepth, Errc::format_error, file_, ": nested deeper than ",
            kMaxDepth);
    keys_.emplace_back();
    return true;
  }
  bool leave() {
    keys_.pop_back();
    return true;
  }

  std::string_view text_;
  const std::string& file_;
  std::vector<std::set<std::string>> keys_;  // of every open object
};

}  // namespace

Json parse_json_object(std::string_view text, const std::string& file) {
  const std::size_t nul = text.find('\0');
  require(nul == std::string_view::npos, Errc::format_error, file, ": NUL at byte ", nul);
  const std::size_t invalid = first_invalid_utf8(text);
  require(invalid == std::string_view::npos, Errc::format_error, file, ": is not UTF-8 at byte ",
          invalid);
  Guard guard(text, file);
  Json::sax_parse(text, &guard);
  const std::size_t first = text.find_first_not_of(" \t\r\n");
  require(text[first] == '{', Errc::format_error, file, ": must hold an object");
  return Json::parse(text);
}

std::string json_kind(const Json& value) {
  switch (value.type()) {
    case Json::value_t::null: return "null";
    case Json::value_t::object: return "an object";
    case Json::value_t::array: return "a list";
    case Json::value_t::string: return "a string";
    case Json::value_t::boolean: return value.get<bool>() ? "true" : "false";
    default: return value.dump();
  }
}

}  // namespace io
}  // namespace mole::inline MOLE_ABI
