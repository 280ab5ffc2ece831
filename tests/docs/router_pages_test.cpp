// SPDX-License-Identifier: Apache-2.0
// The pages of the routers and the table of kinds in docs/mixture_file.md against the configs.
#include <algorithm>
#include <charconv>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <set>
#include <sstream>
#include <string>
#include <string_view>
#include <type_traits>
#include <variant>
#include <vector>

#include "mole/layers/kinds.hpp"
#include "mole/routers/gru.hpp"
#include "mole/routers/mova.hpp"
#include "mole/routers/pathway.hpp"
#include "support/catch.hpp"

namespace {

using Lines = std::vector<std::string>;

/// Routers that have a page and are not in the registry.
using OtherRouters =
    mole::TypeList<mole::GruRouter<double>, mole::MovaRouter<double>, mole::PathwayRouter<double>>;

struct FieldText {
  std::string name;
  std::string value;  ///< "required", or the default as the docs write it
  std::vector<std::string> choices = {};

  bool operator==(const FieldText& other) const {
    return name == other.name && value == other.value;
  }
};

std::ostream& operator<<(std::ostream& out, const FieldText& field) {
  return out << field.name << " = " << field.value;
}

struct KindText {
  std::string kind;
  std::vector<FieldText> fields;
};

std::filesystem::path docs() {
  return std::filesystem::path(MOLE_TEST_DATA).parent_path() / "docs";
}

Lines read_lines(const std::filesystem::path& path) {
  INFO(path);
  std::ifstream file(path);
  REQUIRE(file.good());
  Lines lines;
  for (std::string line; std::getline(file, line);) lines.push_back(line);
  return lines;
}

std::string trimmed(std::string_view text) {
  const auto first = text.find_first_not_of(' '), last = text.find_last_not_of(' ');
  return std::string(first == text.npos ? "" : text.substr(first, last - first + 1));
}

/// The cells of a row of a table; none if the line is no row.
Lines cells(const std::string& line) {
  Lines result;
  if (line.empty() || line.front() != '|') return result;
  std::istringstream row(line.substr(1));
  for (std::string cell; std::getline(row, cell, '|');) result.push_back(trimmed(cell));
  return result;
}

/// What stands between each two marks: of `a`, `b` a and b.
Lines marked(std::string_view text, char mark) {
  Lines result;
  for (auto begin = text.find(mark); begin != text.npos; begin = text.find(mark, begin)) {
    const auto end = text.find(mark, begin + 1);
    if (end == text.npos) return result;
    result.emplace_back(text.substr(begin + 1, end - begin - 1));
    begin = end + 1;
  }
  return result;
}

std::string shown(double value) {
  char digits[32];
  std::string text(digits, std::to_chars(digits, std::end(digits), value).ptr);
  const auto exponent = text.find("e-0");
  if (exponent != text.npos) text.erase(exponent + 2, 1);
  return text;
}

std::string shown(const mole::Description::Value& value) {
  if (const auto* flag = std::get_if<bool>(&value)) return *flag ? "true" : "false";
  if (const auto* word = std::get_if<std::string>(&value)) return '"' + *word + '"';
  std::string text;
  if (const auto* integer = std::get_if<std::int64_t>(&value)) {
    text = std::to_string(*integer);
  } else if (const auto* number = std::get_if<double>(&value)) {
    text = shown(*number);
  } else {
    return "";  // a list, empty by default
  }
  return text.front() == '-' ? "\u2212" + text.substr(1) : text;
}

template <class Config>
KindText kind_text() {
  const Config config;
  KindText result{std::string(Config::kind()), {}};
  const auto description = mole::describe_config(config);
  Config::visit(
      [&](const mole::Field& field, const auto& member) {
        const auto& entry = description.fields[result.fields.size()];
        FieldText text{std::string(field.name),
                       field.is_required ? "required" : shown(entry.value)};
        if constexpr (mole::NamedEnum<std::remove_cvref_t<decltype(member)>>) {
          for (const auto name : enum_names(member)) text.choices.emplace_back(name);
        }
        result.fields.push_back(text);
      },
      config);
  return result;
}

template <class... X>
std::vector<KindText> kinds(mole::TypeList<X...>) {
  return {kind_text<typename X::Config>()...};
}

/// Those with a page.
std::vector<KindText> routers() {
  auto all = kinds(mole::RouterTypes<double>());
  for (const auto& other : kinds(OtherRouters())) all.push_back(other);
  return all;
}

/// The table that starts with this header.
std::vector<Lines> table(const Lines& lines, const std::string& header) {
  auto line = std::find(lines.begin(), lines.end(), header);
  std::vector<Lines> rows;
  if (line == lines.end()) return rows;
  for (line += 2; line != lines.end() && !cells(*line).empty(); ++line)
    rows.push_back(cells(*line));
  return rows;
}

/// The words are values that the field may have.
void check_choices(const FieldText& field, const Lines& words) {
  if (field.choices.empty()) return;
  for (const auto& word : words) {
    INFO(field.name << ": " << word);
    CHECK(std::count(field.choices.begin(), field.choices.end(), word) == 1);
  }
}

/// The fields of one cell of the table of kinds: `name` default (other values), …
std::vector<FieldText> fields_of_cell(const std::string& cell, bool required) {
  std::vector<FieldText> fields;
  for (auto begin = cell.find('`'); begin != cell.npos; begin = cell.find('`', begin)) {
    const auto end = cell.find('`', begin + 1), next = cell.find('`', end + 1);
    const auto rest = cell.substr(end + 1, next == cell.npos ? next : next - end - 1);
    const auto value = trimmed(rest.substr(0, rest.find_first_of(",(")));
    fields.push_back({cell.substr(begin + 1, end - begin - 1), required ? "required" : value,
                      marked(rest, '"')});
    begin = next;
    if (next == cell.npos) break;
  }
  return fields;
}

}  // namespace

TEST_CASE("Every router has a page with its fields and defaults", "[docs]") {
  for (const auto& router : routers()) {
    INFO(router.kind);
    const auto lines = read_lines(docs() / "routers" / (router.kind + ".md"));
    const auto rows = table(lines, "| Field | Default | Meaning |");
    std::vector<FieldText> fields;
    for (const auto& row : rows) {
      REQUIRE(row.size() == 3);
      REQUIRE(marked(row[0], '`').size() == 1);
      CHECK_FALSE(row[2].empty());
      fields.push_back({marked(row[0], '`')[0], row[1]});
    }
    REQUIRE(fields == router.fields);
    for (std::size_t i = 0; i < rows.size(); ++i)
      check_choices(router.fields[i], marked(rows[i][2], '"'));
    CHECK(std::count(lines.begin(), lines.end(), "```cpp") == 1);
  }
}

TEST_CASE("The overview of routers links every page, and there is no other", "[docs]") {
  std::set<std::string> expected = {"any.md"}, found;  // AnyRouter, whose config is a description
  for (const auto& router : routers()) expected.insert(router.kind + ".md");
  for (const auto& entry : std::filesystem::directory_iterator(docs() / "routers")) {
    found.insert(entry.path().filename().string());
  }
  CHECK(found == expected);
  std::string overview;
  for (const auto& line : read_lines(docs() / "routers.md")) overview += line;
  for (const auto& page : expected) {
    INFO(page);
    CHECK(overview.find("](routers/" + page + ")") != overview.npos);
  }
}

TEST_CASE("The pages of routers link files and name golden cases that there are", "[docs]") {
  std::set<std::string> golden;
  for (const auto& line : read_lines(docs().parent_path() / "tests" / "golden" / "supported.txt")) {
    golden.insert(line.substr(0, line.find("__")));
  }
  for (const auto& page : std::filesystem::directory_iterator(docs() / "routers")) {
    const auto& path = page.path();
    int links = 0;
    for (const auto& line : read_lines(path)) {
      INFO(path << ": " << line);
      for (auto at = line.find("]("); at != line.npos; at = line.find("](", at + 1)) {
        const auto target = line.substr(at + 2, line.find(')', at) - at - 2);
        CHECK(std::filesystem::exists(path.parent_path() / target));
        ++links;
      }
      for (const auto& word : marked(line, '`')) {
        const auto family = word.substr(0, word.find('.'));
        const bool is_case = family == "router" || family == "layer" || family == "procedure" ||
                             family == "gru" || family == "lora";
        const bool is_header = word.find(".hpp") != word.npos;
        if (is_case && !is_header && family != word) CHECK(golden.count(word) == 1);
      }
    }
    CHECK(links > 0);
  }
}

TEST_CASE("The table of kinds lists every router and bank of the registry", "[docs]") {
  const auto rows =
      table(read_lines(docs() / "mixture_file.md"), "| Kind | Required | With default |");
  auto expected = kinds(mole::RouterTypes<double>());
  for (const auto& bank : kinds(mole::BankTypes<double>())) expected.push_back(bank);
  std::size_t found = 0;
  for (const auto& row : rows) {
    REQUIRE(row.size() == 3);
    auto fields = fields_of_cell(row[1], true);
    for (const auto& field : fields_of_cell(row[2], false)) fields.push_back(field);
    for (const auto& name : marked(row[0], '`')) {
      if (name == "mixture" || name == "adapted_linear") continue;
      INFO(name);
      const auto kind = std::find_if(expected.begin(), expected.end(),
                                     [&](const KindText& one) { return one.kind == name; });
      REQUIRE(kind != expected.end());
      auto wanted = kind->fields;
      std::stable_partition(wanted.begin(), wanted.end(),
                            [](const FieldText& one) { return one.value == "required"; });
      REQUIRE(fields == wanted);
      for (std::size_t i = 0; i < fields.size(); ++i) check_choices(wanted[i], fields[i].choices);
      ++found;
    }
  }
  CHECK(found == expected.size());
}
