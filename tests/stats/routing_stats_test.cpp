// SPDX-License-Identifier: Apache-2.0
#include "mole/stats/routing_stats.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "mole/core/workspace.hpp"
#include "mole/stats/routing_report.hpp"
#include "mole/stats/routing_svg.hpp"
#include "support/alloc_counter.hpp"
#include "support/catch.hpp"

using mole::Errc;
using mole::Index;
using mole::RoutingReport;
using mole::RoutingStats;

namespace {

/// A routing of 4 experts with its memory.
class Table {
 public:
  explicit Table(Index experts = 4)
      : memory_(4096), workspace_(memory_.span()), table_(workspace_, 8, experts, 3) {}

  mole::Routing<float> of(
      std::vector<std::pair<std::vector<std::int32_t>, std::vector<float>>> rows) {
    table_.begin(static_cast<Index>(rows.size()));
    for (std::size_t t = 0; t < rows.size(); ++t) {
      table_.select(static_cast<Index>(t), rows[t].first, rows[t].second);
    }
    table_.finish();
    return table_.view();
  }

 private:
  mole::Buffer memory_;
  mole::Workspace workspace_;
  mole::RoutingTable<float> table_;
};

/// Tokens: {0, 1}, {1 and a probe of 2}, nothing, {1}.
mole::Routing<float> example(Table& table) {
  return table.of({{{0, 1}, {0.25f, 0.75f}}, {{1, 2}, {0.5f, 0.0f}}, {{}, {}}, {{1}, {-2.0f}}});
}

template <class F>
Errc code_of(F f) {
  try {
    f();
  } catch (const mole::Error& error) {
    return error.code();
  }
  FAIL("nothing was thrown");
  return Errc::io_error;
}

}  // namespace

TEST_CASE("routing stats: counts, load and gates", "[stats]") {
  Table table;
  RoutingStats stats(4);
  stats.add(example(table));
  CHECK(stats.tokens() == 4);
  CHECK(stats.slots() == 4);
  CHECK(stats.idle_tokens() == 1);
  CHECK(stats.count(0) == 1);
  CHECK(stats.count(1) == 3);
  CHECK(stats.count(2) == 0);
  CHECK(stats.load(1) == 0.75);
  CHECK(stats.mean_gate(0) == 0.0625);
  CHECK(stats.mean_gate(1) == -0.1875);
  CHECK(stats.experts_per_token() == 1.0);
  CHECK(stats.dead() == std::vector<Index>{2, 3});
}

TEST_CASE("routing stats: who worked together", "[stats]") {
  Table table;
  RoutingStats stats(4);
  stats.add(example(table));
  CHECK(stats.together(0, 1) == 1);
  CHECK(stats.together(1, 0) == 1);
  CHECK(stats.together(1, 2) == 0);
  CHECK(stats.together(1, 1) == 3);
}

TEST_CASE("routing stats: balance and entropy", "[stats]") {
  Table table;
  RoutingStats stats(4);
  stats.add(example(table));
  CHECK(stats.max_over_mean() == 3.0);
  CHECK(stats.load_cv() == Approx(std::sqrt((0.0 + 4 + 1 + 1) / 4)));
  CHECK(stats.load_entropy() ==
        Approx(-(0.25 * std::log(0.25) + 0.75 * std::log(0.75)) / std::log(4)));
  CHECK(stats.gate_entropy() == Approx(-(0.25 * std::log(0.25) + 0.75 * std::log(0.75)) / 4));

  RoutingStats even(4);
  even.add(table.of({{{0}, {1.0f}}, {{1}, {1.0f}}, {{2}, {1.0f}}, {{3}, {1.0f}}}));
  CHECK(even.max_over_mean() == 1.0);
  CHECK(even.load_cv() == 0.0);
  CHECK(even.load_entropy() == Approx(1.0));
  CHECK(even.gate_entropy() == 0.0);
  CHECK(even.dead().empty());
}

TEST_CASE("routing stats: nothing seen, one expert", "[stats]") {
  const RoutingStats none(3);
  CHECK(none.load(0) == 0);
  CHECK(none.mean_gate(0) == 0);
  CHECK(none.load_cv() == 0);
  CHECK(none.max_over_mean() == 0);
  CHECK(none.load_entropy() == 0);
  CHECK(none.dead().size() == 3);
  CHECK(code_of([] { RoutingStats(0); }) == Errc::invalid_argument);
  CHECK(RoutingStats(RoutingStats::kMostExperts).together(4095, 4095) == 0);
  CHECK(code_of([] { RoutingStats(4097); }) == Errc::invalid_argument);
}

TEST_CASE("routing stats: sums are chains of fused multiply-adds, whatever the user's flags",
          "[stats]") {
  const std::vector<std::vector<float>> gates = {
      {0.3f, 0.2f, 0.1f}, {0.85f, 0.35f, 0.2f}, {0.3f, 0.25f, 0.15f}, {0.9f, 0.15f, 0.05f}};
  const std::vector<std::vector<std::int32_t>> experts = {
      {0, 1, 2}, {1, 3, 4}, {0, 1, 3}, {1, 2, 4}};
  std::vector<std::pair<std::vector<std::int32_t>, std::vector<float>>> rows;
  double entropy = 0;
  for (std::size_t t = 0; t < gates.size(); ++t) {
    rows.emplace_back(experts[t], gates[t]);
    double total = 0;
    for (const float gate : gates[t]) total += gate;
    for (const float gate : gates[t]) {
      entropy = std::fma(-(gate / total), std::log(gate / total), entropy);
    }
  }
  const double mean = 12.0 / 5;
  double load_entropy = 0, squares = 0;
  for (const double count : {2.0, 4.0, 2.0, 2.0, 2.0}) {
    load_entropy = std::fma(-(count / 12), std::log(count / 12), load_entropy);
    squares = std::fma(count - mean, count - mean, squares);
  }
  Table table(5);
  RoutingStats stats(5);
  stats.add(table.of(rows));
  REQUIRE(stats.slots() == 12);
  CHECK(stats.gate_entropy() == entropy / 4);
  CHECK(stats.load_entropy() == load_entropy / std::log(5.0));
  CHECK(stats.load_cv() == std::sqrt(squares / 5) / mean);
}

TEST_CASE("routing stats: by label, and the sum of the parts", "[stats]") {
  Table table;
  const auto routing = example(table);
  const std::vector<std::int64_t> labels = {5, 5, 7, 7};
  RoutingStats five(4), seven(4), all(4);
  five.add(routing, labels, 5);
  seven.add(routing, labels, 7);
  all.add(routing);
  CHECK(five.tokens() == 2);
  CHECK(five.count(1) == 2);
  CHECK(seven.idle_tokens() == 1);
  CHECK(seven.mean_gate(1) == -1.0);
  five.add(seven);
  CHECK(five.tokens() == all.tokens());
  CHECK(five.together(0, 1) == all.together(0, 1));
  CHECK(five.mean_gate(1) == all.mean_gate(1));
  CHECK(five.gate_entropy() == Approx(all.gate_entropy()));
  CHECK(code_of([&] { all.add(RoutingStats(3)); }) == Errc::shape_mismatch);
  CHECK(code_of([&] { all.add(routing, std::span(labels).first(3), 5); }) == Errc::shape_mismatch);
}

TEST_CASE("routing report: layers and labels in CSV", "[stats]") {
  Table table;
  RoutingReport report({"plain", "with, \"quotes\""});
  const std::vector<std::int64_t> labels = {0, 1, 1, 9};
  report.add("a", example(table), labels);
  report.add("b", example(table));
  report.add("a", example(table), labels);
  REQUIRE(report.entries().size() == 6);
  CHECK(report.entries()[0].stats.tokens() == 8);
  CHECK(report.entries()[1].stats.tokens() == 2);
  CHECK(report.entries()[2].stats.tokens() == 4);
  CHECK(report.entries()[3].stats.tokens() == 4);
  CHECK(report.entries()[4].stats.tokens() == 0);
  const std::string csv = report.to_csv();
  CHECK(csv.substr(0, 86) ==
        "layer,label,tokens,expert,count,load,mean_gate\na,,8,0,2,0.25,0.0625\na,,8,1,6,0.75,-0.1");
  CHECK(csv.find("a,\"with, \"\"quotes\"\"\",4,1,2,1,0.25\n") != std::string::npos);
  CHECK(code_of([&] { report.add("c", example(table), std::span(labels).first(2)); }) ==
        Errc::shape_mismatch);
  CHECK(report.entries().size() == 6);
}

TEST_CASE("routing report: JSON says what the statistics say", "[stats]") {
  Table table;
  RoutingReport report({"plain"});
  const std::vector<std::int64_t> labels = {0, 1, 1, 0};
  report.add("a \"layer\"", example(table), labels);
  const auto json = nlohmann::json::parse(report.to_json());
  REQUIRE(json.at("entries").size() == 2);
  const auto& all = json.at("entries")[0];
  const RoutingStats& stats = report.entries()[0].stats;
  CHECK(all.at("layer") == "a \"layer\"");
  CHECK(all.at("label").is_null());
  CHECK(json.at("entries")[1].at("label") == "plain");
  CHECK(all.at("tokens") == stats.tokens());
  CHECK(all.at("idle_tokens") == 1);
  CHECK(all.at("load_cv") == stats.load_cv());
  CHECK(all.at("dead") == std::vector<Index>{2, 3});
  CHECK(all.at("together")[0][1] == 1);
  CHECK(all.at("mean_gate")[1] == stats.mean_gate(1));
}

TEST_CASE("routing report: a gate that is not finite is null in JSON", "[stats]") {
  Table table;
  RoutingReport report;
  report.add("a", table.of({{{2}, {std::numeric_limits<float>::infinity()}}}));
  const auto json = nlohmann::json::parse(report.to_json());
  CHECK(json.at("entries")[0].at("mean_gate")[2].is_null());
  CHECK(json.at("entries")[0].at("count")[2] == 1);
}

TEST_CASE("routing report: a new layer copies no older one, and comes whole or not at all",
          "[stats]") {
  Table table;
  const auto routing = example(table);
  RoutingReport report({"plain"});
  std::vector<long> allocations;
  for (int layer = 0; layer < 40; ++layer) {
    const std::string name = std::to_string(layer);
    const long before = test::allocations();
    report.add(name, routing);
    allocations.push_back(test::allocations() - before);
  }
  if (test::kCountsAllocations) {
    CHECK(*std::max_element(allocations.begin(), allocations.end()) <= allocations.front());
  }
  for (long n = 1; report.entries().size() == 80; ++n) {
    REQUIRE(n < 20);
    const test::FailingAllocations failing(n, false);
    try {
      report.add("new", routing);
    } catch (const std::bad_alloc&) {
    }
  }
  CHECK(report.entries().size() == 82);
  CHECK(report.entries()[79].label == "plain");
  CHECK(report.entries()[78].stats.tokens() == 4);
}

namespace {

/// A picture of the example's four tokens.
std::string picture(Index tokens_per_row, std::vector<std::string> texts = {"a", "b", "c", "d"}) {
  Table table;
  const std::vector<std::string> names = {"0", "1", "2", "3"}, titles = {"all"};
  mole::RoutingSvgOptions options;
  options.tokens_per_row = tokens_per_row;
  if (tokens_per_row >= 4) options.row_titles = titles;
  return mole::routing_svg<float>(example(table), texts, names, options);
}

}  // namespace

TEST_CASE("routing svg: rows are as wide as they have tokens", "[stats]") {
  const std::string four = picture(4);
  CHECK(four.find("width='364' height='224'") != std::string::npos);
  CHECK(picture(5) == four);
  CHECK(picture(40'000'000) == four);
  CHECK(picture(std::numeric_limits<Index>::max()) == four);
  CHECK(picture(2).find("width='248' height='378'") != std::string::npos);
  CHECK(code_of([] { picture(0); }) == Errc::invalid_argument);
  Table table;
  const std::vector<std::string> names = {"0", "1", "2", "3"};
  CHECK(mole::routing_svg<float>(table.of({}), {}, names).find("width='190' height='70'") !=
        std::string::npos);
}

TEST_CASE("routing svg: what is long is counted in characters", "[stats]") {
  const auto small = [](const std::string& text) {
    const std::string svg = picture(4, {text, "", "", ""});
    return svg.find("font-size:10px'>" + text) != std::string::npos;
  };
  CHECK_FALSE(small("sieben7"));
  CHECK(small("achtacht"));
  CHECK_FALSE(small("äöüßäöü"));
  CHECK_FALSE(small("日本語日本語日"));
  CHECK(small("日本語日本語日本"));
}
