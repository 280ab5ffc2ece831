// SPDX-License-Identifier: Apache-2.0
#include <map>
#include <set>

#include "bad_inputs/rows.hpp"

namespace {

using namespace test::bad_inputs;

}  // namespace

TEST_CASE("bad inputs: every row has one place", "[bad_inputs]") {
  std::map<int, int> places;
  for (const auto& table : {container_rows(), adapter_rows(), routing_rows(), layer_rows(),
                            memory_rows(), thread_rows()}) {
    for (const Row& row : table) ++places[row.number];
  }
  std::set<int> expected;
  for (const auto& [first, last] : {std::pair(1, 82), std::pair(96, 128)}) {
    for (int number = first; number <= last; ++number) expected.insert(number);
  }
  std::set<int> found;
  for (const auto& [number, count] : places) {
    INFO("row " << number);
    CHECK(count == 1);
    found.insert(number);
  }
  CHECK(found == expected);
}

TEST_CASE("bad inputs: a refusal that is late, greedy, wrong or untidy is found", "[bad_inputs]") {
  static std::vector<std::string*> kept;
  const auto greedy = [] {
    const std::string memory(300'000, 'x');
    mole::fail(Errc::format_error, "needs ", memory.size());
  };
  const Outcome large = outcome_of(greedy);
  CHECK(large.peak >= 300'000);
  CHECK(large.left == 0);
  const auto leaking = [] {
    kept.push_back(new std::string(100, 'x'));
    mole::fail(Errc::format_error, "leaks");
  };
  kept.reserve(4);
  const Outcome untidy = outcome_of(leaking);
  CHECK(untidy.left > 0);
  CHECK(untidy.left_bytes > 0);
  for (const std::string* one : kept) delete one;
  kept.clear();
  kept.shrink_to_fit();
  CHECK(outcome_of([] {}).message == "accepted");
  CHECK_FALSE(is_one_printable_line("two\nlines"));
  CHECK_FALSE(is_one_printable_line("\x1b[31m"));
}
