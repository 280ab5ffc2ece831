// SPDX-License-Identifier: Apache-2.0
// The table of bad inputs: every row has a number, what comes in, and what must happen. There is
// one table per area; complete_test.cpp checks that no number is missing or comes twice.
//
// A refusal must be of the expected category, name what is wrong in one printable line, leave
// outputs alone, take little time and memory, and leave nothing behind. A row that works is tested
// for the result it promises.
#pragma once

#include <algorithm>
#include <ctime>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "mole/core/error.hpp"
#include "support/alloc_counter.hpp"
#include "support/catch.hpp"

namespace test::bad_inputs {

using mole::Errc;

/// What a refused call may cost beside the memory of its input.
struct Bounds {
  double milliseconds = 50;
  long bytes = 128 * 1024;
};

/// What must be refused and how.
struct Refusal {
  Errc code = Errc::internal;
  std::vector<std::string> words;             ///< in the message, names and numbers
  std::function<void()> call;                 ///< throws
  std::function<bool()> untouched = nullptr;  ///< outputs are as before
  long input_bytes = 0;
  Bounds bounds = {};
};

struct Case {
  std::string name;
  std::function<void()> check;  ///< with CHECK and REQUIRE
};

struct Row {
  int number;
  const char* what;
  std::vector<Case> cases;
};

std::vector<Row> container_rows();  // 1-56
std::vector<Row> adapter_rows();    // 57-74, 78-82
std::vector<Row> routing_rows();    // 75-77, 111, 112
std::vector<Row> layer_rows();      // 96-110
std::vector<Row> memory_rows();     // 113-124
std::vector<Row> thread_rows();     // 125-128

#ifdef MOLE_TEST_SANITIZED
inline constexpr double kSlower = 20;
inline constexpr long kLarger = 4;  // blocks with red zones
#else
inline constexpr double kSlower = 1;
inline constexpr long kLarger = 1;
#endif

/// Of this thread, so that other programs on the machine do not count.
inline double milliseconds_now() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) * 1e3 + static_cast<double>(now.tv_nsec) * 1e-6;
}

/// Calls and returns what was thrown; `cost` is the time and the most memory of the call.
struct Outcome {
  Errc code = Errc::internal;
  std::string message = "accepted";
  double milliseconds = 0;
  long peak = 0, left = 0, left_bytes = 0;
};

inline Outcome outcome_of(const std::function<void()>& call) {
  Outcome outcome;
  outcome.message.reserve(4096);
  const long live = live_allocations(), bytes = live_bytes();
  reset_peak();
  const double start = milliseconds_now();
  try {
    call();
  } catch (const mole::Error& error) {
    outcome.milliseconds = milliseconds_now() - start;
    outcome.code = error.code();
    outcome.message.assign(error.what());
  }
  outcome.peak = peak_bytes() - bytes;
  outcome.left = live_allocations() - live;
  outcome.left_bytes = live_bytes() - bytes;
  return outcome;
}

inline bool is_one_printable_line(const std::string& text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return c >= 0x20 && c <= 0x7e; });
}

inline void check_refused(const Refusal& refusal) {
  Outcome outcome = outcome_of(refusal.call);
  // The first call may warm caches and static objects; a second opinion counts.
  const double limit = refusal.bounds.milliseconds * kSlower;
  for (int again = 0; again < 3 && (outcome.milliseconds > limit || outcome.left != 0); ++again) {
    outcome = outcome_of(refusal.call);
  }
  INFO(outcome.message);
  CHECK(name(outcome.code) == name(refusal.code));
  for (const std::string& word : refusal.words) {
    INFO("word: " << word);
    CHECK(outcome.message.find(word) != std::string::npos);
  }
  CHECK(is_one_printable_line(outcome.message));
  CHECK(outcome.milliseconds <= limit);
  CHECK(outcome.peak <= kLarger * (refusal.input_bytes + refusal.bounds.bytes));
  CHECK(outcome.left == 0);
  CHECK(outcome.left_bytes == 0);
  if (refusal.untouched) CHECK(refusal.untouched());
}

/// A case that must be refused.
inline Case refused(std::string name, Errc code, std::vector<std::string> words,
                    std::function<void()> call, std::function<bool()> untouched = nullptr,
                    Bounds bounds = {}) {
  Refusal refusal{code, std::move(words), std::move(call), std::move(untouched), 0, bounds};
  return {std::move(name), [refusal = std::move(refusal)] { check_refused(refusal); }};
}

/// A case that must work; `check` says what the result is.
inline Case works(std::string name, std::function<void()> check) {
  return {std::move(name), std::move(check)};
}

inline void run(const std::vector<Row>& rows) {
  for (const Row& row : rows) {
    REQUIRE(!row.cases.empty());
    for (const Case& one : row.cases) {
      INFO("row " << row.number << ": " << row.what << ": " << one.name);
      one.check();
    }
  }
}

}  // namespace test::bad_inputs
