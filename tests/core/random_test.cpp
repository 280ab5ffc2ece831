// SPDX-License-Identifier: Apache-2.0
#include "mole/core/random.hpp"

#include <array>
#include <cmath>
#include <cstdint>
#include <set>
#include <vector>

#include "support/catch.hpp"

using mole::Random;
using Words = std::array<std::uint32_t, 4>;

namespace {

constexpr int kDraws = 200000;

struct Moments {
  double mean = 0, variance = 0, skew = 0, kurtosis = 0;
};

template <class Draw>
Moments moments(Draw&& draw) {
  double sum = 0;
  for (int n = 0; n < kDraws; ++n) sum += draw(n);
  Moments m;
  m.mean = sum / kDraws;
  for (int n = 0; n < kDraws; ++n) {
    const double d = draw(n) - m.mean;
    m.variance += d * d / kDraws;
    m.skew += d * d * d / kDraws;
    m.kurtosis += d * d * d * d / kDraws;
  }
  m.skew /= std::pow(m.variance, 1.5);
  m.kurtosis /= m.variance * m.variance;
  return m;
}

/// Five standard errors of a mean of kDraws independent values.
double five_sigma(double variance_of_one) {
  return 5 * std::sqrt(variance_of_one / kDraws);
}

}  // namespace

TEST_CASE("Philox gives the published answers") {
  CHECK(Random(0).words(0) == Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  CHECK(Random(UINT64_MAX, UINT64_MAX).words(UINT64_MAX) ==
        Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
}

TEST_CASE("counter words are n and stream, key words are the seed, low words first") {
  const Random pi(0x299f31d0a4093822u, 0x0370734413198a2eu);
  CHECK(pi.words(0x85a308d3243f6a88u) == Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
}

TEST_CASE("seeds, streams and positions all change the words") {
  std::set<Words> seen;
  for (std::uint64_t shift = 0; shift < 64; ++shift) {
    const std::uint64_t bit = std::uint64_t{1} << shift;
    seen.insert(Random(bit).words(0));
    seen.insert(Random(0, bit).words(0));
    seen.insert(Random(0).words(bit));
  }
  CHECK(seen.size() == 3 * 64);
}

TEST_CASE("a draw depends on its position alone") {
  const Random random(7, 3);
  std::vector<double> up, down(100);
  for (std::uint64_t n = 0; n < 100; ++n) up.push_back(random.normal(n));
  for (std::uint64_t n = 100; n-- > 0;) down[n] = Random(7, 3).normal(n);
  CHECK(up == down);
}

TEST_CASE("uniform draws have the moments of the uniform distribution") {
  const Random random(11);
  const auto draw = [&](int n) { return random.uniform(static_cast<std::uint64_t>(n)); };
  const Moments m = moments(draw);
  CHECK(std::fabs(m.mean - 0.5) < five_sigma(1.0 / 12));
  CHECK(std::fabs(m.variance - 1.0 / 12) < five_sigma(1.0 / 180));
  CHECK(std::fabs(m.skew) < 0.02);
  CHECK(std::fabs(m.kurtosis - 1.8) < 0.02);
  for (int n = 0; n < 1000; ++n) {
    const double scaled = draw(n) * 0x1p53;
    REQUIRE(scaled >= 0);
    REQUIRE(scaled < 0x1p53);
    REQUIRE(scaled == std::floor(scaled));
  }
}

TEST_CASE("normal draws have the moments of the normal distribution") {
  const Random random(12, 1);
  const Moments m = moments([&](int n) { return random.normal(static_cast<std::uint64_t>(n)); });
  CHECK(std::fabs(m.mean) < five_sigma(1));
  CHECK(std::fabs(m.variance - 1) < five_sigma(2));
  CHECK(std::fabs(m.skew) < five_sigma(15));
  CHECK(std::fabs(m.kurtosis - 3) < five_sigma(96));
}

TEST_CASE("a normal draw is the Box-Muller transform of its words") {
  const Random random(17, 5);
  for (std::uint64_t n = 0; n < 1000; ++n) {
    const Words w = random.words(n);
    const long double radius_word = std::ldexp(static_cast<long double>(w[1]), 32) + w[0];
    const long double angle_word = std::ldexp(static_cast<long double>(w[3]), 32) + w[2];
    const long double u = std::ldexp(std::floor(radius_word / 2048) + 0.5L, -53);
    const long double turn = std::ldexp(std::floor(angle_word / 2048), -53);
    const long double expected =
        std::sqrt(-2 * std::log(u)) * std::cos(turn * 6.283185307179586476925L);
    CHECK(std::fabs(random.normal(n) - static_cast<double>(expected)) < 1e-14);
  }
}

TEST_CASE("normal draws have the tails of the normal distribution") {
  const Random random(13);
  int above_one = 0, above_three = 0;
  for (std::uint64_t n = 0; n < kDraws; ++n) {
    const double x = random.normal(n);
    REQUIRE(std::isfinite(x));
    above_one += x > 1 ? 1 : 0;
    above_three += x > 3 ? 1 : 0;
  }
  const double p1 = std::erfc(std::sqrt(0.5)) / 2, p3 = std::erfc(3 * std::sqrt(0.5)) / 2;
  CHECK(std::fabs(above_one / double(kDraws) - p1) < five_sigma(p1 * (1 - p1)));
  CHECK(std::fabs(above_three / double(kDraws) - p3) < five_sigma(p3 * (1 - p3)));
}

TEST_CASE("below reaches every value about equally often") {
  const Random random(14);
  constexpr std::uint64_t kCount = 7;
  std::array<int, kCount> hits{};
  for (std::uint64_t n = 0; n < kDraws; ++n) {
    const std::uint64_t value = random.below(n, kCount);
    REQUIRE(value < kCount);
    ++hits[value];
  }
  double chi_squared = 0;
  for (const int hit : hits) {
    const double expected = double(kDraws) / kCount;
    chi_squared += (hit - expected) * (hit - expected) / expected;
  }
  CHECK(chi_squared < 30);  // six degrees of freedom: exceeded with probability 4e-5
}

TEST_CASE("below is the high part of 64 random bits times count") {
  const Random random(15);
  for (std::uint64_t n = 0; n < 1000; ++n) {
    const Words w = random.words(n);
    CHECK(random.below(n, 1) == 0);
    CHECK(random.below(n, 2) == w[1] >> 31);
    CHECK(random.below(n, 1u << 20) == w[1] >> 12);
    CHECK(random.below(n, 0xffffffffu) <= w[1]);
    CHECK(random.below(n, 0xffffffffu) + 1 >= w[1]);
  }
}

TEST_CASE("two streams are not correlated") {
  const Random first(16, 0), second(16, 1);
  double sum = 0;
  for (std::uint64_t n = 0; n < kDraws; ++n) sum += first.normal(n) * second.normal(n);
  CHECK(std::fabs(sum / kDraws) < five_sigma(1));
}
