// SPDX-License-Identifier: Apache-2.0
#include "io/pattern.hpp"

#include <algorithm>
#include <utility>

#include "io/text.hpp"
#include "mole/core/error.hpp"

namespace mole::inline MOLE_ABI {
namespace io {
namespace {

constexpr std::size_t kMaxText = 10000;         // bytes of a pattern
constexpr std::size_t kMaxInstructions = 2000;  // of its program
constexpr int kMaxDepth = 50;                   // of nested groups
constexpr int kMaxRepeats = 1000;               // in {m,n}
constexpr int kUnbounded = -1;
constexpr char32_t kLastSymbol = 0x10ffff;

struct Symbol {
  char32_t value;
  std::size_t bytes;
};

// The code point at `position`; a byte that is not UTF-8 stands for itself, above all code points.
Symbol symbol_at(std::string_view text, std::size_t position) noexcept {
  const auto lead = static_cast<unsigned char>(text[position]);
  if (lead < 0x80) return {lead, 1};
  const std::size_t length = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : 2;
  const std::string_view piece = text.substr(position, length);
  if (first_invalid_utf8(piece) != std::string_view::npos) return {kLastSymbol + 1 + lead, 1};
  char32_t value = lead & (0xffu >> (length + 1));
  for (const char c : piece.substr(1))
    value = (value << 6) | (static_cast<unsigned char>(c) & 0x3fu);
  return {value, length};
}

bool is_digit(char32_t symbol) noexcept {
  return symbol >= '0' && symbol <= '9';
}
bool is_letter(char32_t symbol) noexcept {
  return (symbol >= 'a' && symbol <= 'z') || (symbol >= 'A' && symbol <= 'Z');
}

}  // namespace

// Recursive descent over the pattern. Every rule returns a fragment of the program.
class PatternParser {
 public:
  PatternParser(Pattern& pattern, std::string_view text, const std::string& what)
      : pattern_(pattern), what_(what) {
    if (text.size() > kMaxText) too_large();
    for (std::size_t i = 0; i < text.size();) {
      const Symbol symbol = symbol_at(text, i);
      text_.push_back(symbol.value);
      i += symbol.bytes;
    }
  }

  void parse() {
    pattern_.program_ = alternatives(0);
    if (!at_end()) invalid("unbalanced )");
    append(pattern_.program_, {Instruction{}});
  }

 private:
  using Op = Pattern::Op;
  using Instruction = Pattern::Instruction;
  using Fragment = std::vector<Instruction>;
  struct Repeat {
    int least = 0, most = kUnbounded;
    bool lazy = false;
  };

  [[noreturn]] void invalid(const char* why) const {
    fail(Errc::config_error, what_, " is not a valid regular expression: ", why);
  }
  [[noreturn]] void unsupported(const char* syntax) const {
    fail(Errc::unsupported, what_, " uses ", syntax, ", which is not supported");
  }
  [[noreturn]] void too_large() const {
    fail(Errc::unsupported, what_, " is too large: patterns may have ", kMaxText, " bytes, ",
         kMaxInstructions, " steps, ", kMaxDepth, " nested groups and ", kMaxRepeats, " repeats");
  }

  bool at_end() const { return position_ == text_.size(); }
  bool next_is(char32_t symbol) const { return !at_end() && text_[position_] == symbol; }
  bool take(char32_t symbol) {
    const bool found = next_is(symbol);
    position_ += found ? 1 : 0;
    return found;
  }

  void append(Fragment& to, const Fragment& piece) const {
    if (to.size() + piece.size() > kMaxInstructions) too_large();
    to.insert(to.end(), piece.begin(), piece.end());
  }
  static Instruction branch(std::size_t x, std::size_t y) {
    return {Op::split, static_cast<int>(x), static_cast<int>(y), 0};
  }
  static Instruction jump(std::ptrdiff_t by) { return {Op::jump, static_cast<int>(by), 0, 0}; }

  Fragment alternatives(int depth) {
    if (depth > kMaxDepth) too_large();
    Fragment left = sequence(depth);
    while (take('|')) {
      const Fragment right = sequence(depth);
      Fragment both;
      append(both, {branch(1, left.size() + 2)});
      append(both, left);
      append(both, {jump(static_cast<std::ptrdiff_t>(right.size()) + 1)});
      append(both, right);
      left = std::move(both);
    }
    return left;
  }

  Fragment sequence(int depth) {
    Fragment all, item;
    bool repeatable = false;
    while (!at_end() && !next_is('|') && !next_is(')')) {
      Repeat repeat;
      if (take_repeat(repeat)) {
        if (!repeatable) invalid("nothing to repeat");
        item = repeated(item, repeat);
        repeatable = false;
        continue;
      }
      append(all, item);
      item = atom(depth, repeatable);
    }
    append(all, item);
    return all;
  }

  bool take_repeat(Repeat& repeat) {
    if (take('*')) {
      repeat = {0, kUnbounded};
    } else if (take('+')) {
      repeat = {1, kUnbounded};
    } else if (take('?')) {
      repeat = {0, 1};
    } else if (!take_counts(repeat)) {
      return false;
    }
    repeat.lazy = take('?');
    if (!repeat.lazy && next_is('+')) unsupported("a possessive operator");
    return true;
  }

  // {m}, {m,}, {,n} or {m,n}; anything else after { makes it a literal.
  bool take_counts(Repeat& repeat) {
    const std::size_t start = position_;
    if (!take('{') || next_is('}')) {
      position_ = start;
      return false;
    }
    const int least = take_number();
    const bool range = take(',');
    const int most = range ? take_number() : least;
    if (!take('}')) {
      position_ = start;
      return false;
    }
    if (most != kUnbounded && most < least) invalid("minimum repeat above the maximum");
    repeat = {std::max(least, 0), most};
    return true;
  }

  // Digits, or kUnbounded where there are none.
  int take_number() {
    if (at_end() || !is_digit(text_[position_])) return kUnbounded;
    int number = 0;
    while (!at_end() && is_digit(text_[position_])) {
      number = std::min(kMaxRepeats + 1, number * 10 + static_cast<int>(text_[position_] - '0'));
      ++position_;
    }
    if (number > kMaxRepeats) too_large();
    return number;
  }

  Fragment repeated(const Fragment& item, const Repeat& repeat) const {
    Fragment result;
    for (int i = 0; i < repeat.least; ++i) append(result, item);
    if (repeat.most == kUnbounded) {
      append(result, {choice(item.size() + 2, repeat.lazy)});
      append(result, item);
      append(result, {jump(-static_cast<std::ptrdiff_t>(item.size()) - 1)});
    }
    for (int i = repeat.least; i < repeat.most; ++i) {
      append(result, {choice(item.size() + 1, repeat.lazy)});
      append(result, item);
    }
    return result;
  }

  // Into the item that follows, or past it.
  static Instruction choice(std::size_t past, bool lazy) {
    return lazy ? branch(past, 1) : branch(1, past);
  }

  Fragment atom(int depth, bool& repeatable) {
    const char32_t symbol = text_[position_++];
    repeatable = symbol != '^' && symbol != '$';
    switch (symbol) {
      case '.': return {{Op::any, 0, 0, 0}};
      case '^': return {{Op::line_start, 0, 0, 0}};
      case '$': return {{Op::text_end, 0, 0, 0}};
      case '(': return group(depth);
      case '[': return bracket();
      case '\\': return escape(repeatable);
      default: return {{Op::symbol, 0, 0, symbol}};
    }
  }

  Fragment group(int depth) {
    bool captures = true;
    if (take('?')) {
      if (take(':')) {
        captures = false;
      } else if (take('P')) {
        if (!take('<')) unsupported("a reference to a named group");
        while (!at_end() && !next_is('>')) ++position_;
        if (!take('>')) invalid("unterminated group name");
      } else {
        unsupported("a group that starts with (?");
      }
    }
    const bool first = captures && groups_++ == 0;
    const Fragment body = alternatives(depth + 1);
    if (!take(')')) invalid("missing )");
    if (!first) return body;
    Fragment result{{Op::save, 0, 0, 0}};
    append(result, body);
    append(result, {{Op::save, 1, 0, 0}});
    return result;
  }

  Fragment class_fragment(Pattern::Class klass) {
    pattern_.classes_.push_back(std::move(klass));
    return {{Op::klass, static_cast<int>(pattern_.classes_.size() - 1), 0, 0}};
  }

  Fragment escape(bool& repeatable) {
    if (at_end()) invalid("it ends with a backslash");
    const char32_t symbol = text_[position_++];
    if (symbol == 'A' || symbol == 'Z') {
      repeatable = false;
      return {{symbol == 'A' ? Op::line_start : Op::end_only, 0, 0, 0}};
    }
    Pattern::Class klass;
    if (named_class(symbol, klass)) return class_fragment(std::move(klass));
    if (is_digit(symbol)) unsupported("a back-reference or an octal escape");
    return {{Op::symbol, 0, 0, escaped_symbol(symbol)}};
  }

  char32_t escaped_symbol(char32_t symbol) const {
    switch (symbol) {
      case 'n': return '\n';
      case 't': return '\t';
      case 'r': return '\r';
      case 'b':
      case 'B': unsupported("\\b");
      case 'x':
      case 'u':
      case 'U':
      case 'N': unsupported("an escape by number or name");
      default: break;
    }
    if (is_letter(symbol)) invalid("unknown escape");
    return symbol;
  }

  // Adds \d, \w, \s or the complement of one to the class.
  static bool named_class(char32_t letter, Pattern::Class& klass) {
    std::vector<Pattern::Range> ranges;
    switch (letter) {
      case 'd':
      case 'D': ranges = {{'0', '9'}}; break;
      case 'w':
      case 'W': ranges = {{'0', '9'}, {'A', 'Z'}, {'_', '_'}, {'a', 'z'}}; break;
      case 's':
      case 'S': ranges = {{'\t', '\r'}, {' ', ' '}}; break;
      default: return false;
    }
    if (letter == 'D' || letter == 'W' || letter == 'S') {
      char32_t from = 0;
      for (Pattern::Range& range : ranges) {
        const char32_t next = range.last + 1;
        range = {from, range.first - 1};
        from = next;
      }
      ranges.push_back({from, ~char32_t{0}});
    }
    klass.ranges.insert(klass.ranges.end(), ranges.begin(), ranges.end());
    return true;
  }

  Fragment bracket() {
    Pattern::Class klass;
    klass.negated = take('^');
    for (bool first = true; first || !next_is(']'); first = false) {
      const bool single = class_item(klass);
      if (!next_is('-') || position_ + 1 == text_.size() || text_[position_ + 1] == ']') continue;
      ++position_;
      const char32_t low = single ? klass.ranges.back().last : 0;
      if (!single || !class_item(klass)) invalid("bad range in a class");
      const char32_t high = klass.ranges.back().last;
      if (high < low) invalid("reversed range in a class");
      klass.ranges.back().first = low;
    }
    ++position_;
    return class_fragment(std::move(klass));
  }

  // One symbol (true) or a named class (false).
  bool class_item(Pattern::Class& klass) {
    if (at_end()) invalid("unterminated class");
    char32_t symbol = text_[position_++];
    if (symbol == '\\') {
      if (at_end()) invalid("unterminated class");
      symbol = text_[position_++];
      if (named_class(symbol, klass)) return false;
      if (is_digit(symbol)) unsupported("an octal escape");
      symbol = escaped_symbol(symbol);
    }
    klass.ranges.push_back({symbol, symbol});
    return true;
  }

  Pattern& pattern_;
  const std::string& what_;
  std::vector<char32_t> text_;
  std::size_t position_ = 0;
  int groups_ = 0;
};

Pattern::Pattern(std::string_view text, const std::string& what) {
  PatternParser(*this, text, what).parse();
}

bool Pattern::Class::contains(char32_t symbol) const noexcept {
  const auto holds = [symbol](const Range& r) { return r.first <= symbol && symbol <= r.last; };
  return std::any_of(ranges.begin(), ranges.end(), holds) != negated;
}

bool Pattern::consumes(const Instruction& instruction, char32_t symbol) const noexcept {
  switch (instruction.op) {
    case Op::symbol: return instruction.symbol == symbol;
    case Op::any: return symbol != '\n';
    case Op::klass: return classes_[static_cast<std::size_t>(instruction.x)].contains(symbol);
    default: return false;
  }
}

struct Pattern::Match {
  static constexpr std::size_t kNone = std::string_view::npos;
  struct Thread {
    std::size_t at = 0;
    std::size_t group[2] = {kNone, kNone};
  };

  // Follows everything that consumes no text, the preferred branch first; what consumes or accepts
  // joins the list in order of preference. An instruction is visited once per position.
  void add(const std::vector<Instruction>& program, const Thread& start, std::string_view text,
           std::size_t position, std::vector<Thread>& list) {
    std::vector<Thread> open{start};
    while (!open.empty()) {
      Thread thread = open.back();
      open.pop_back();
      if (std::exchange(visited[thread.at], round) == round) continue;
      const Instruction& instruction = program[thread.at];
      const auto go = [&open, &thread](int by) {
        open.push_back(thread);
        open.back().at += static_cast<std::size_t>(static_cast<std::ptrdiff_t>(by));
      };
      const std::size_t left = text.size() - position;
      switch (instruction.op) {
        case Op::split:
          go(instruction.y);
          go(instruction.x);
          break;
        case Op::jump: go(instruction.x); break;
        case Op::line_start:
          if (position == 0) go(1);
          break;
        case Op::text_end:
          if (left == 0 || (left == 1 && text.back() == '\n')) go(1);
          break;
        case Op::end_only:
          if (left == 0) go(1);
          break;
        case Op::save:
          thread.group[instruction.x] = position;
          go(1);
          break;
        default: list.push_back(thread); break;
      }
    }
  }

  bool found = false;
  Thread thread;
  std::vector<std::size_t> visited;
  std::size_t round = 0;
};

Pattern::Match Pattern::run(std::string_view text, bool to_end) const {
  Match match;
  match.visited.assign(program_.size(), 0);
  std::vector<Match::Thread> current, next;
  match.round = 1;
  match.add(program_, {}, text, 0, current);
  for (std::size_t position = 0;;) {
    const bool end = position == text.size();
    const Symbol symbol = end ? Symbol{0, 0} : symbol_at(text, position);
    ++match.round;
    for (Match::Thread thread : current) {
      const Instruction& instruction = program_[thread.at];
      if (instruction.op == Op::accept) {
        if (to_end && !end) continue;
        match.found = true;
        match.thread = thread;
        break;  // every thread behind it is less preferred
      }
      if (end || !consumes(instruction, symbol.value)) continue;
      ++thread.at;
      match.add(program_, thread, text, position + symbol.bytes, next);
    }
    if (end || next.empty()) return match;
    current.swap(next);
    next.clear();
    position += symbol.bytes;
  }
}

bool Pattern::matches_all(std::string_view text) const {
  return run(text, true).found;
}

bool Pattern::matches_start(std::string_view text) const {
  return run(text, false).found;
}

std::optional<std::string_view> Pattern::group_at_start(std::string_view text) const {
  const Match match = run(text, false);
  if (!match.found) return std::nullopt;
  const std::size_t begin = match.thread.group[0];
  const std::size_t end = match.thread.group[1];
  if (begin == Match::kNone || end == Match::kNone) return std::string_view();
  return text.substr(begin, end - begin);
}

}  // namespace io
}  // namespace mole::inline MOLE_ABI
