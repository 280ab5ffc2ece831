// SPDX-License-Identifier: Apache-2.0
#include "mole/kernels/score_row.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "mole/core/random.hpp"
#include "mole/kernels/math.hpp"
#include "support/catch.hpp"

using mole::Index;
using mole::Isa;

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

std::vector<Isa> levels() {
  std::vector<Isa> all = {Isa::portable};
  for (const Isa isa : {Isa::avx2, Isa::avx512}) {
    if (mole::isa_available(isa)) all.push_back(isa);
  }
  return all;
}

/// Values of every size, many of them equal; `special` mixes in what is no ordinary number.
template <class T>
std::vector<T> row_of(std::size_t size, std::uint64_t seed, bool special) {
  const mole::Random random(seed, 5);
  constexpr double kSpecial[] = {-kInfinity, std::numeric_limits<double>::quiet_NaN(), -0.0, 0.0};
  std::vector<T> row(size);
  for (std::size_t e = 0; e < size; ++e) {
    const double wide = std::exp2(random.below(4 * e, 9)) * random.normal(4 * e + 1);
    const double step = static_cast<double>(random.below(4 * e + 2, 7)) - 3;
    row[e] = static_cast<T>(seed % 2 == 0 ? wide : step);
    if (special && random.below(4 * e + 3, 4) == 0) {
      row[e] = static_cast<T>(kSpecial[random.below(4 * e + 3, 100) % 4]);
    }
  }
  return row;
}

template <class T>
std::vector<std::int32_t> expected_order(const std::vector<T>& key) {
  std::vector<std::int32_t> order;
  for (std::size_t e = 0; e < key.size(); ++e) {
    if (key[e] > -kInfinity) order.push_back(static_cast<std::int32_t>(e));
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](std::int32_t a, std::int32_t b) { return key[a] > key[b]; });
  return order;
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](T x, T y) {
    return (x == y && std::signbit(x) == std::signbit(y)) || (x != x && y != y);
  });
}

template <class F>
void for_rows(F f) {
  for (std::size_t size = 0; size <= 280; size += size < 40 ? 1 : 11) {
    for (std::uint64_t seed = 0; seed < 4; ++seed) f(size, 4 * size + seed, seed >= 2);
  }
}

}  // namespace

TEMPLATE_TEST_CASE("score row: softmax is the formula", "[kernels]", float, double) {
  using T = TestType;
  for_rows([](std::size_t size, std::uint64_t seed, bool) {
    const std::vector<T> u = row_of<T>(size, seed, false);
    std::vector<T> p(size, T(7));
    CHECK(mole::softmax_row<T>(u, p, mole::best_isa()) == (size > 0));
    if (size == 0) return;
    const T largest = *std::max_element(u.begin(), u.end());
    double sum = 0;
    for (const T value : u) sum += std::exp(static_cast<double>(value - largest));
    for (std::size_t e = 0; e < size; ++e) {
      const double want = std::exp(static_cast<double>(u[e] - largest)) / sum;
      CHECK(static_cast<double>(p[e]) == Approx(want).epsilon(2e-6).margin(1e-37));
    }
  });
}

TEMPLATE_TEST_CASE("score row: softmax has the same bits on every level", "[kernels]", float,
                   double) {
  using T = TestType;
  for_rows([](std::size_t size, std::uint64_t seed, bool special) {
    const std::vector<T> u = row_of<T>(size, seed, special);
    std::vector<T> want(size, T(7));
    const bool wrote = mole::softmax_row<T>(u, want, Isa::portable);
    for (const Isa isa : levels()) {
      CAPTURE(size, seed, static_cast<int>(isa));
      std::vector<T> p(size, T(7)), in_place = u;
      CHECK(mole::softmax_row<T>(u, p, isa) == wrote);
      CHECK(same_bits(p, want));
      mole::softmax_row<T>(in_place, in_place, isa);
      CHECK(same_bits(in_place, wrote ? want : u));
    }
  });
}

TEMPLATE_TEST_CASE("score row: softmax refuses a maximum that is not finite", "[kernels]", float,
                   double) {
  using T = TestType;
  for (const Isa isa : levels()) {
    for (const double value : {kInfinity, -kInfinity, std::nan("")}) {
      std::vector<T> u(11, static_cast<T>(-kInfinity)), p(11, T(7));
      u[5] = static_cast<T>(value);
      CHECK_FALSE(mole::softmax_row<T>(u, p, isa));
      CHECK(p == std::vector<T>(11, T(7)));
    }
  }
}

TEMPLATE_TEST_CASE("score row: all keys in order", "[kernels]", float, double) {
  using T = TestType;
  for_rows([](std::size_t size, std::uint64_t seed, bool special) {
    const std::vector<T> key = row_of<T>(size, seed, special);
    const std::vector<std::int32_t> want = expected_order(key);
    for (const Isa isa : levels()) {
      CAPTURE(size, seed, static_cast<int>(isa));
      std::vector<std::int32_t> order(size, -1);
      order.resize(static_cast<std::size_t>(mole::sort_row<T>(key, order, isa)));
      CHECK(order == want);
    }
  });
}

TEMPLATE_TEST_CASE("score row: the largest keys", "[kernels]", float, double) {
  using T = TestType;
  for_rows([](std::size_t size, std::uint64_t seed, bool special) {
    const std::vector<T> key = row_of<T>(size, seed, special);
    const std::vector<std::int32_t> order = expected_order(key);
    for (const Isa isa : levels()) {
      for (const std::size_t k : {0, 1, 2, 3, 8, 9, 20}) {
        if (k > size) continue;
        CAPTURE(size, seed, k, static_cast<int>(isa));
        std::vector<std::int32_t> chosen(k, -1);
        chosen.resize(static_cast<std::size_t>(mole::top_row<T>(key, chosen, isa)));
        const std::size_t count = std::min(k, order.size());
        CHECK(chosen == std::vector<std::int32_t>(order.begin(), order.begin() + count));
      }
    }
  });
}

TEST_CASE("score row: vector softmax takes the whole range of exp", "[kernels]") {
  for (int i = 0; i < 120'000; i += 8) {
    std::vector<float> u(9, 0.0f), want(9), p(9);
    for (int j = 1; j < 9; ++j) u[j] = -0.001f * static_cast<float>(i + j);
    REQUIRE(mole::softmax_row<float>(u, want, Isa::portable));
    for (const Isa isa : levels()) {
      REQUIRE(mole::softmax_row<float>(u, p, isa));
      if (!same_bits(p, want)) FAIL("u down to " << u[8]);
    }
  }
}
