// SPDX-License-Identifier: Apache-2.0
// Regular expressions from adapter files, matched in time proportional to pattern times text: all
// threads of the automaton advance together, nothing backtracks, so a hostile pattern costs no
// more than a kind one.
//
// Syntax and meaning are those of Python's `re`: literals, . * + ? {m,n} | ( ) (?: ) (?P<n> )
// ^ $ \A \Z, classes with ranges and ^, \d \D \w \W \s \S and escaped characters; lazy operators
// choose which text group 1 holds. The named classes know ASCII only. Look-around,
// back-references, flags, \b and possessive operators are refused by name.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "mole/core/config.hpp"

namespace mole::inline MOLE_ABI {
namespace io {

class Pattern {
 public:
  /// `what` starts the messages and names the pattern. Throws config_error (not a regular
  /// expression), unsupported (syntax named above; too large or too deep).
  Pattern(std::string_view text, const std::string& what);

  /// The whole text matches.
  bool matches_all(std::string_view text) const;
  /// Some prefix of the text matches.
  bool matches_start(std::string_view text) const;
  /// Group 1 of the match that starts the text; nothing without match, empty without group.
  std::optional<std::string_view> group_at_start(std::string_view text) const;

 private:
  friend class PatternParser;

  enum class Op { symbol, any, klass, split, jump, line_start, text_end, end_only, save, accept };
  struct Range {
    char32_t first, last;
  };
  struct Class {
    std::vector<Range> ranges;
    bool negated = false;
    bool contains(char32_t symbol) const noexcept;
  };
  /// Targets are relative, so that a fragment can be copied. `split` prefers `x` to `y`.
  struct Instruction {
    Op op = Op::accept;
    int x = 0, y = 0;
    char32_t symbol = 0;
  };
  struct Match;

  Match run(std::string_view text, bool to_end) const;
  bool consumes(const Instruction& instruction, char32_t symbol) const noexcept;

  std::vector<Instruction> program_;
  std::vector<Class> classes_;
};

}  // namespace io
}  // namespace mole::inline MOLE_ABI
