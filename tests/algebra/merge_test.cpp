// SPDX-License-Identifier: Apache-2.0
#include "mole/algebra/merge.hpp"

#include <cmath>
#include <limits>
#include <vector>

#include "mole/core/random.hpp"
#include "support/catch.hpp"

namespace {

using mole::Index;
using mole::MatView;

/// A matrix whose rows have a gap of 3 elements; the gaps hold 77.
template <class T>
struct Gapped {
  std::vector<T> memory;
  MatView<T> view;

  Gapped(Index rows, Index cols, std::uint64_t stream)
      : memory(static_cast<std::size_t>(rows * (cols + 3)), T(77.0f)),
        view(memory.data(), rows, cols, cols + 3) {
    const mole::Random random(11, stream);
    for (Index r = 0; r < rows; ++r) {
      for (Index c = 0; c < cols; ++c) {
        view(r, c) = T(static_cast<float>(random.normal(static_cast<std::uint64_t>(r * cols + c))));
      }
    }
  }
};

/// s (B A)(o, i) in double.
template <class W>
double product(MatView<W> down, MatView<W> up, double scale, Index o, Index i) {
  double sum = 0;
  for (Index r = 0; r < down.rows; ++r) {
    sum += mole::widen<double>(up(o, r)) * mole::widen<double>(down(r, i));
  }
  return scale * sum;
}

/// |s| Σ |B| |A|: what one relative rounding of the product may be measured against.
template <class W>
double magnitude(MatView<W> down, MatView<W> up, double scale, Index o, Index i) {
  double sum = 0;
  for (Index r = 0; r < down.rows; ++r) {
    sum += std::fabs(mole::widen<double>(up(o, r)) * mole::widen<double>(down(r, i)));
  }
  return std::fabs(scale) * sum;
}

template <class T, class W>
void check_merge(bool fan_in_fan_out) {
  constexpr Index kIn = 7, kOut = 5, kRank = 3;
  constexpr T kScale = T(-1.25);
  const Gapped<W> down(kRank, kIn, 1), up(kOut, kRank, 2);
  const Gapped<T> before(fan_in_fan_out ? kIn : kOut, fan_in_fan_out ? kOut : kIn, 3);
  Gapped<T> weight = before;
  weight.view.data = weight.memory.data();
  mole::merge_lora(down.view, up.view, kScale, weight.view, fan_in_fan_out);

  const double epsilon = static_cast<double>(std::numeric_limits<T>::epsilon());
  for (Index o = 0; o < kOut; ++o) {
    for (Index i = 0; i < kIn; ++i) {
      const Index r = fan_in_fan_out ? i : o, c = fan_in_fan_out ? o : i;
      const double w = static_cast<double>(before.view(r, c));
      const double expected = w + product(down.view, up.view, kScale, o, i);
      const double size = std::fabs(w) + magnitude(down.view, up.view, kScale, o, i);
      INFO("output " << o << ", input " << i);
      CHECK(std::fabs(static_cast<double>(weight.view(r, c)) - expected) <=
            (kRank + 2) * epsilon * size);
    }
  }
  CHECK(weight.memory[static_cast<std::size_t>(weight.view.cols)] == T(77));
}

}  // namespace

TEST_CASE("merge_lora adds s B A to a weight of either orientation and any storage", "[algebra]") {
  for (const bool fan_in_fan_out : {false, true}) {
    INFO("fan_in_fan_out " << fan_in_fan_out);
    check_merge<double, double>(fan_in_fan_out);
    check_merge<float, float>(fan_in_fan_out);
    check_merge<float, mole::bf16>(fan_in_fan_out);
    check_merge<double, mole::f16>(fan_in_fan_out);
  }
}

TEST_CASE("merging with the opposite scale takes the adapter out again", "[algebra]") {
  const Gapped<double> down(3, 7, 1), up(5, 3, 2), before(5, 7, 3);
  Gapped<double> weight = before;
  weight.view.data = weight.memory.data();
  mole::merge_lora(down.view, up.view, 2.5, weight.view);
  CHECK(weight.memory != before.memory);
  mole::merge_lora(down.view, up.view, -2.5, weight.view);
  for (Index i = 0; i < 5 * 7; ++i) {
    const Index r = i / 7, c = i % 7;
    CHECK(weight.view(r, c) == Catch::Approx(before.view(r, c)).margin(1e-14));
  }
}

TEST_CASE("an adapter of rank 0 merges into nothing", "[algebra]") {
  Gapped<double> weight(5, 7, 3);
  const std::vector<double> before = weight.memory;
  mole::merge_lora(MatView<double>(nullptr, 0, 7), MatView<double>(nullptr, 5, 0), 2.0,
                   weight.view);
  CHECK(weight.memory == before);
}

TEST_CASE("merge_lora refuses wrong shapes and leaves the weight alone", "[algebra]") {
  const Gapped<double> down(3, 7, 1), up(5, 3, 2), narrow(5, 2, 2);
  Gapped<double> weight(5, 7, 3);
  const std::vector<double> before = weight.memory;
  CHECK_THROWS_WITH(mole::merge_lora(down.view, narrow.view, 1.0, weight.view),
                    "up: expected [5, 3], got [5, 2]");
  CHECK_THROWS_WITH(mole::merge_lora(down.view, up.view, 1.0, weight.view, true),
                    "weight: expected [7, 5], got [5, 7]");
  CHECK(weight.memory == before);
}
