// SPDX-License-Identifier: Apache-2.0
#include "mole/kernels/chain_product.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "mole/core/half.hpp"
#include "mole/core/random.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/matrix.hpp"

using mole::ChainProduct;
using mole::Index;
using mole::Isa;
using mole::MatView;
using test::bit_difference;
using test::Matrix;

namespace {

/// Signs, zeros of both signs and exponents so far apart that products leave the normal range.
template <class T>
Matrix<T> wild(Index rows, Index cols, Index padding, std::uint64_t seed) {
  const mole::Random random(seed, 3);
  Matrix<T> m(rows, cols, padding);
  for (Index r = 0; r < rows; ++r) {
    for (Index c = 0; c < cols; ++c) {
      const auto n = static_cast<std::uint64_t>(4 * (r * cols + c));
      const int lowest = std::numeric_limits<T>::min_exponent / 2 - 4;
      const int exponent = random.below(n, 8) == 0 ? lowest : 4 - static_cast<int>(n % 7);
      const T value = static_cast<T>(std::ldexp(random.normal(n + 1), exponent));
      m(r, c) = random.below(n + 2, 16) == 0 ? std::copysign(T(0), value) : value;
    }
  }
  return m;
}

/// `count` distinct rows out of `count + 2`, in a scrambled order.
std::vector<std::int32_t> scrambled(Index count, std::int32_t step) {
  std::vector<std::int32_t> rows(static_cast<std::size_t>(count));
  const auto modulus = static_cast<std::int32_t>(count + 2);
  while (std::gcd(step, modulus) != 1) ++step;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    rows[i] = static_cast<std::int32_t>((static_cast<std::int32_t>(i) * step + 1) % modulus);
  }
  return rows;
}

struct Form {
  bool by_depth, from_zero, indexed;
};

/// The definition: one loop, one chain.
template <class T>
void plain(const ChainProduct<T>& p) {
  for (Index m = 0; m < p.rows; ++m) {
    for (Index n = 0; n < p.cols; ++n) {
      T sum = p.from_zero ? T(0) : p.c.row(m)[n];
      for (Index k = 0; k < p.depth; ++k) {
        const T a = p.a_by_depth ? p.a.row(k)[m] : p.a.row(m)[k];
        sum = std::fma(a, p.b.row(k)[n], sum);
      }
      p.c.row(m)[n] = sum;
    }
  }
}

/// Empty if chain_product and the plain loop agree in every bit of c and of its surroundings.
template <class T>
std::string error(Index rows, Index depth, Index cols, Form form, Index padding, Isa isa) {
  const Index extra = form.indexed ? 2 : 0;
  const Matrix<T> a = form.by_depth ? wild<T>(depth + extra, rows, padding, 1)
                                    : wild<T>(rows + extra, depth, padding, 1);
  const Matrix<T> b = wild<T>(depth + (form.by_depth ? extra : 0), cols, padding, 2);
  const Matrix<T> start = wild<T>(rows + extra, cols, padding, 3);
  const auto a_rows = scrambled(form.by_depth ? depth : rows, 3), b_rows = scrambled(depth, 5),
             c_rows = scrambled(rows, 7);
  const auto list = [&](const std::vector<std::int32_t>& rows_of) {
    return form.indexed ? rows_of.data() : nullptr;
  };
  const auto run = [&](Matrix<T>& c, auto&& product) {
    ChainProduct<T> p;
    p.rows = rows;
    p.depth = depth;
    p.cols = cols;
    p.a = {a.view(), list(a_rows)};
    p.b = {b.view(), form.by_depth ? list(b_rows) : nullptr};
    p.c = {c.view(), list(c_rows)};
    p.a_by_depth = form.by_depth;
    p.from_zero = form.from_zero;
    product(p);
  };
  Matrix<T> got = start, want = start;
  run(got, [&](const ChainProduct<T>& p) { mole::chain_product(p, isa); });
  run(want, plain<T>);
  return got.padding_is_intact() ? bit_difference(got, want) : "padding was written";
}

std::vector<Isa> levels() {
  std::vector<Isa> all;
  for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
    if (mole::isa_available(isa)) all.push_back(isa);
  }
  return all;
}

}  // namespace

TEMPLATE_TEST_CASE("a chain product is the plain loop, bit for bit", "[kernels]", float, double) {
  const std::vector<Index> cols = {1,  2,  3,  4,  5,  7,  8,  9,  13, 15, 16,
                                   17, 23, 31, 32, 33, 47, 61, 64, 65, 67, 131};
  for (const Isa isa : levels()) {
    for (int bits = 0; bits < 8; ++bits) {
      const Form form{(bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0};
      for (const Index rows : {1, 2, 3, 4, 5, 6, 7, 11, 13}) {
        for (const Index n : cols) {
          const Index depth = std::vector<Index>{1, 2, 5, 19}[(rows + n) % 4];
          CAPTURE(static_cast<int>(isa), bits, rows, depth, n);
          REQUIRE(error<TestType>(rows, depth, n, form, (rows + n) % 2 * 3, isa) == "");
        }
      }
    }
  }
}

TEMPLATE_TEST_CASE("long chains and many rows", "[kernels]", float, double) {
  for (const Isa isa : levels()) {
    for (int bits = 0; bits < 8; ++bits) {
      const Form form{(bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0};
      CAPTURE(static_cast<int>(isa), bits);
      REQUIRE(error<TestType>(67, 131, 149, form, 5, isa) == "");
      REQUIRE(error<TestType>(1, 1031, 61, form, 0, isa) == "");
    }
  }
}

TEMPLATE_TEST_CASE("empty products", "[kernels]", float, double) {
  for (const Isa isa : levels()) {
    for (const bool from_zero : {false, true}) {
      const Form form{false, from_zero, false};
      CHECK(error<TestType>(5, 0, 17, form, 3, isa) == "");  // depth 0 keeps c, or makes it +0
      CHECK(error<TestType>(0, 3, 17, form, 3, isa) == "");
      CHECK(error<TestType>(5, 3, 0, form, 3, isa) == "");
    }
  }
}

TEMPLATE_TEST_CASE("a chain that stops and goes on is the same chain", "[kernels]", float, double) {
  using T = TestType;
  const Matrix<T> a = wild<T>(7, 29, 3, 1), b = wild<T>(29, 37, 3, 2);
  for (const Isa isa : levels()) {
    Matrix<T> whole(7, 37), parts(7, 37);
    ChainProduct<T> p;
    p.rows = 7;
    p.cols = 37;
    p.from_zero = true;
    p.depth = 29;
    p.a = a.view();
    p.b = b.view();
    p.c = whole.view();
    mole::chain_product(p, isa);
    p.c = parts.view();
    p.depth = 11;
    mole::chain_product(p, isa);
    p.from_zero = false;
    p.a = a.view().col_block(11, 18);
    p.b = b.view().row_block(11, 18);
    p.depth = 18;
    mole::chain_product(p, isa);
    CHECK(bit_difference(parts, whole) == "");
  }
}

TEMPLATE_TEST_CASE("rows outside the operands' lists are not read", "[kernels]", float, double) {
  using T = TestType;
  const T nan = std::numeric_limits<T>::quiet_NaN();
  Matrix<T> a = wild<T>(9, 13, 3, 1), b = wild<T>(13, 19, 3, 2), c(7, 19);
  const auto rows = scrambled(7, 3);
  for (std::int32_t r = 0; r < 9; ++r) {
    if (std::find(rows.begin(), rows.end(), r) != rows.end()) continue;
    for (Index k = 0; k < 13; ++k) a(r, k) = nan;
  }
  for (const Isa isa : levels()) {
    ChainProduct<T> p;
    p.rows = 7;
    p.depth = 13;
    p.cols = 19;
    p.a = {MatView<const T>(a.view()), rows.data()};
    p.b = MatView<const T>(b.view());
    p.c = c.view();
    p.from_zero = true;
    mole::chain_product(p, isa);
    for (Index r = 0; r < 7; ++r) {
      for (Index n = 0; n < 19; ++n) REQUIRE_FALSE(std::isnan(c(r, n)));
    }
  }
}

TEMPLATE_TEST_CASE("packed panels hold the transposed weight", "[kernels]", float, double) {
  using T = TestType;
  for (const Index cols : {1, 63, 64, 65, 131}) {
    const Matrix<mole::bf16> weight = test::converted<mole::bf16>(
        test::random_matrix<float>(cols, 5, static_cast<std::uint64_t>(cols)));
    std::vector<T> memory(static_cast<std::size_t>(5 * cols));
    const mole::Panels<T> panels = mole::pack_panels(weight.view(), memory.data());
    REQUIRE(panels.depth == 5);
    REQUIRE(panels.cols == cols);
    Index seen = 0;
    for (Index p = 0; p < panels.count(); ++p) {
      const MatView<const T> panel = panels.panel(p);
      seen += panel.cols;
      for (Index k = 0; k < 5; ++k) {
        for (Index n = 0; n < panel.cols; ++n) {
          REQUIRE(panel(k, n) == mole::widen<T>(weight(p * mole::kPanel + n, k)));
        }
      }
    }
    CHECK(seen == cols);
  }
}

TEMPLATE_TEST_CASE("rows packed one after another are the weights side by side", "[kernels]", float,
                   double) {
  using T = TestType;
  const Matrix<T> all = test::random_matrix<T>(67, 9, 1);
  std::vector<T> parts(67 * 9), whole(67 * 9);
  const mole::Panels<T> panels{parts.data(), 9, 67};
  for (const auto& [first, count] : {std::pair<Index, Index>{0, 2}, {2, 0}, {2, 7}}) {
    mole::pack_rows(all.view().col_block(first, count), first, panels);
  }
  mole::pack_panels(all.view(), whole.data());
  CHECK(bit_difference(parts, whole) == "");
}

TEMPLATE_TEST_CASE("a panel product touches the columns of its panels", "[kernels]", float,
                   double) {
  using T = TestType;
  const Matrix<T> weight = wild<T>(131, 13, 3, 1), a = wild<T>(7, 13, 3, 2);
  const Matrix<T> start = wild<T>(7, 131, 3, 3);
  std::vector<T> memory(131 * 13);
  const mole::Panels<T> panels = mole::pack_panels(weight.view(), memory.data());
  Matrix<T> got = start, want = start;
  mole::panel_product<T>(a.view(), 7, panels, 1, 2, got.view(), false, mole::best_isa());
  for (Index r = 0; r < 7; ++r) {
    for (Index n = 64; n < 128; ++n) {
      for (Index k = 0; k < 13; ++k) want(r, n) = std::fma(a(r, k), weight(n, k), want(r, n));
    }
  }
  CHECK(bit_difference(got, want) == "");
}
