// SPDX-License-Identifier: Apache-2.0
#include "io/pattern.hpp"

#include <chrono>
#include <random>
#include <set>

#include "io/file_builder.hpp"
#include "mole/core/error.hpp"
#include "support/catch.hpp"

namespace {

using mole::Errc;
using mole::io::Pattern;

bool all(const std::string& pattern, const std::string& text) {
  return Pattern(pattern, "p").matches_all(text);
}
bool start(const std::string& pattern, const std::string& text) {
  return Pattern(pattern, "p").matches_start(text);
}

Errc refusal(const std::string& pattern) {
  try {
    Pattern(pattern, "rank_pattern \"x\"");
  } catch (const mole::Error& error) {
    CHECK(std::string(error.what()).starts_with("rank_pattern \"x\" "));
    return error.code();
  }
  return Errc::internal;
}

}  // namespace

TEST_CASE("pattern: each piece of syntax means what Python's re says", "[io]") {
  struct Case {
    const char* pattern;
    const char* text;
    bool whole, prefix;
  };
  const Case cases[] = {
      {"", "", true, true},
      {"", "a", false, true},
      {"ab", "ab", true, true},
      {"ab", "abc", false, true},
      {"a.c", "a\nc", false, false},
      {"a.c",
       "a\xc3\xa9"
       "c",
       true, true},
      {"a*b+c?", "bb", true, true},
      {"a|bc|", "bc", true, true},
      {"a|ab", "ab", true, true},
      {"(q|q_proj)", "q_proj", true, true},
      {"(?:ab)*", "abab", true, true},
      {"(?P<layer>\\d)x", "3x", true, true},
      {"a{2}", "aa", true, true},
      {"a{2}", "a", false, false},
      {"a{,2}b", "aab", true, true},
      {"a{2,}", "aaaa", true, true},
      {"a{2,3}", "aaaa", false, true},
      {"a{0}b", "b", true, true},
      {"a{x", "a{x", true, true},
      {"a{}", "a{}", true, true},
      {"a*?b", "aab", true, true},
      {"[01]", "1", true, true},
      {"[a-c]+", "abcabc", true, true},
      {"[^a-c]", "b", false, false},
      {"[^a-c]", "d", true, true},
      {"[]a]+", "a]", true, true},
      {"[^]]", "]", false, false},
      {"[a-]+", "-a", true, true},
      {"[\\d.]+", "1.2", true, true},
      {"[\\]\\-]+", "-]", true, true},
      {"[+--]", ",", true, true},
      {"\\.\\*", ".*", true, true},
      {"\\w+\\W\\d\\D\\s\\S", "a_1-2b c", true, true},
      {"^a$", "a", true, true},
      {"^a$", "ab", false, false},
      {"a$", "a\n", false, true},
      {"a$b", "ab", false, false},
      {"(^|x)a", "xa", true, true},
      {"(a$|ab)", "ab", true, true},
      {"(?:^)*a", "a", true, true},
      {"(a*)*", "aaa", true, true},
      {"(a?)+b", "b", true, true},
      {"\\Aa\\Z", "a", true, true},
      {"a\\Z", "a\n", false, false},
      {"\xc3\xa9+", "\xc3\xa9\xc3\xa9", true, true},
  };
  for (const Case& c : cases) {
    INFO(c.pattern << " on " << c.text);
    CHECK(all(c.pattern, c.text) == c.whole);
    CHECK(start(c.pattern, c.text) == c.prefix);
  }
}

TEST_CASE("pattern: group 1 is the one that a backtracking search would find", "[io]") {
  const auto group = [](const std::string& pattern, const std::string& text) {
    const auto found = Pattern(pattern, "p").group_at_start(text);
    return found.has_value() ? mole::test::enclosed("<", *found, ">") : "none";
  };
  CHECK(group("(a*)", "aab") == "<aa>");
  CHECK(group("(a*?)b", "aab") == "<aa>");
  CHECK(group("(a*?)", "aab") == "<>");
  CHECK(group("(a|ab)(c|bcd)", "abcd") == "<a>");
  CHECK(group("(?:x|(y))z", "xz") == "<>");
  CHECK(group("(a)", "b") == "none");
  CHECK(group(".*?\\.[^.]*\\.(\\d+)\\.", "model.layers.12.experts.3.w1") == "<12>");
  CHECK(group(".*?\\.[^.]*\\.(\\d+)\\.", "layers.12.w1") == "none");
  CHECK(group("(?:^|.*?\\.)layers\\.(\\d+)\\.", "layers.7.layers.9.w") == "<7>");
  CHECK(group("(?:^|.*?\\.)layers\\.(\\d+)\\.", "sublayers.1.layers.2.w") == "<2>");
}

TEST_CASE("pattern: what is no regular expression is a config_error", "[io]") {
  for (const char* pattern :
       {"q_proj(", "a)", "*.q_proj", "a|*b", "(+a)", "a**", "a{2}{3}", "^*", "[a", "[", "[b-a]",
        "[\\d-z]", "a\\", "[a\\", "\\q", "a{3,2}", "(?P<n", "x{2"}) {
    INFO(pattern);
    const bool literal_brace = std::string(pattern) == "x{2";
    CHECK(refusal(pattern) == (literal_brace ? Errc::internal : Errc::config_error));
  }
}

TEST_CASE("pattern: what is not supported is refused by name", "[io]") {
  for (const char* pattern : {"(?=a)", "(?!a)", "(?<=a)", "(?i)a", "(a)\\1", "\\bq", "a*+", "a{2}+",
                              "(?P=n)", "\\x41", "\\u0041", "[\\1]"}) {
    INFO(pattern);
    CHECK(refusal(pattern) == Errc::unsupported);
  }
}

TEST_CASE("pattern: size and depth are bounded", "[io]") {
  CHECK(refusal(std::string(10001, 'a')) == Errc::unsupported);
  CHECK(refusal(std::string(5000, 'a')) == Errc::unsupported);
  CHECK(refusal(std::string(5000, '(') + std::string(5000, ')')) == Errc::unsupported);
  CHECK(refusal("a{1001}") == Errc::unsupported);
  CHECK(refusal("a{99999999999999999999}") == Errc::unsupported);
  CHECK(refusal("((a{100}){100}){100}") == Errc::unsupported);
  CHECK(refusal("(?:(?:(?:){1000}){1000}){1000}") == Errc::internal);
  CHECK(refusal(std::string(40, '(') + "a" + std::string(40, ')')) == Errc::internal);
}

TEST_CASE("pattern: patterns that ruin a backtracking search take linear time", "[io]") {
  const std::string text = std::string(5000, 'a') + "b";
  const auto begin = std::chrono::steady_clock::now();
  CHECK_FALSE(start("(a+)+$", text));
  CHECK_FALSE(all("(a|a)*", text));
  CHECK_FALSE(all("(a*)*c", text));
  CHECK_FALSE(all("(.*)*\\.(.*)*q", text));
  CHECK_FALSE(all("(a?){50}a{50}b", text));
  CHECK(all("(a?){50}a{50}", std::string(50, 'a')));
  CHECK_FALSE(start("(.*\\.)?((a|aa)+c)$", text));
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  CHECK(seconds.count() < 5.0);
}

namespace {

// A random pattern with its meaning by definition: from which places to which places of a text it
// can go. Slow, obvious and never exponential.
struct Node {
  enum class Kind { symbol, sequence, choice, repeat };
  Kind kind = Kind::symbol;
  std::string text;     // the pattern
  std::string symbols;  // that a symbol accepts
  std::vector<Node> parts;
  int least = 0, most = 0;

  std::set<std::size_t> ends(const std::string& subject, const std::set<std::size_t>& from) const {
    std::set<std::size_t> result;
    if (kind == Kind::symbol) {
      for (const std::size_t place : from) {
        const bool inside = place < subject.size();
        if (inside && symbols.find(subject[place]) != std::string::npos) result.insert(place + 1);
      }
    } else if (kind == Kind::sequence) {
      result = from;
      for (const Node& part : parts) result = part.ends(subject, result);
    } else if (kind == Kind::choice) {
      for (const Node& part : parts) result.merge(part.ends(subject, from));
    } else {
      std::set<std::size_t> reached = from;
      for (int i = 0; i <= most; ++i) {
        if (i >= least) result.insert(reached.begin(), reached.end());
        reached = parts.front().ends(subject, reached);
      }
    }
    return result;
  }
};

class RandomPattern {
 public:
  explicit RandomPattern(unsigned seed) : engine_(seed) {}

  Node choice(int depth) {
    Node node{Node::Kind::choice, {}, {}, {sequence(depth)}};
    node.text = node.parts.front().text;
    while (below(3) == 0) {
      node.parts.push_back(sequence(depth));
      node.text += "|" + node.parts.back().text;
    }
    return node;
  }

  std::string subject() {
    std::string result;
    for (int i = below(kLongest + 1); i > 0; --i) result += "ab."[below(3)];
    return result;
  }

 private:
  static constexpr int kLongest = 8;

  int below(int bound) { return static_cast<int>(engine_() % static_cast<unsigned>(bound)); }

  Node sequence(int depth) {
    Node node{Node::Kind::sequence, {}, {}, {}};
    for (int i = below(4); i > 0; --i) {
      node.parts.push_back(repeated(atom(depth)));
      node.text += node.parts.back().text;
    }
    return node;
  }

  Node atom(int depth) {
    if (depth > 0 && below(3) == 0) {
      Node node = choice(depth - 1);
      node.text = (below(2) == 0 ? "(" : "(?:") + node.text + ")";
      return node;
    }
    static const char* const kSymbols[][2] = {{"a", "a"},    {"b", "b"},      {"\\.", "."},
                                              {".", "ab."},  {"[ab]", "ab"},  {"[^a]", "b."},
                                              {"\\w", "ab"}, {"[.-b]", "ab."}};
    const auto& symbol = kSymbols[below(8)];
    return {Node::Kind::symbol, symbol[0], symbol[1], {}};
  }

  Node repeated(Node atom) {
    struct Repeat {
      const char* text;
      int least, most;
    };
    static constexpr Repeat kRepeats[] = {{"*", 0, kLongest}, {"+", 1, kLongest + 1},
                                          {"?", 0, 1},        {"*?", 0, kLongest},
                                          {"{2}", 2, 2},      {"{1,2}", 1, 2}};
    const int which = below(12);
    if (which >= 6) return atom;
    const Repeat& repeat = kRepeats[which];
    std::string text = atom.text + repeat.text;
    return {Node::Kind::repeat, std::move(text), {}, {std::move(atom)}, repeat.least, repeat.most};
  }

  std::mt19937 engine_;
};

}  // namespace

TEST_CASE("pattern: random patterns match what their definition says", "[io]") {
  RandomPattern random(20240607);
  int matches = 0;
  for (int round = 0; round < 5000; ++round) {
    const Node node = random.choice(3);
    const Pattern pattern(node.text, node.text);
    for (int i = 0; i < 5; ++i) {
      const std::string subject = random.subject();
      const std::set<std::size_t> ends = node.ends(subject, {0});
      INFO(node.text << " on " << subject);
      REQUIRE(pattern.matches_all(subject) == (ends.count(subject.size()) == 1));
      REQUIRE(pattern.matches_start(subject) == !ends.empty());
      matches += static_cast<int>(ends.count(subject.size()));
    }
  }
  CHECK(matches > 1000);
}
