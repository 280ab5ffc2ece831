// SPDX-License-Identifier: Apache-2.0
// The gated loops against the plain loops that define their order of summation: equal in every bit.
#include "mole/kernels/gated_low_rank.hpp"

#include <cmath>
#include <vector>

#include "mole/kernels/shared_low_rank.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/matrix.hpp"
#include "support/slots.hpp"

namespace gated = mole::gated;
using mole::Index;
using mole::MatView;
using mole::Panels;
using mole::RowsBy;
using test::bit_difference;
using test::Matrix;

namespace {

/// Numbers with full significands, so that every order of summation gives other bits.
template <class T>
Matrix<T> rough(Index rows, Index cols, std::uint64_t seed) {
  const mole::Random random(seed, 9);
  return Matrix<T>(rows, cols, [&](Index r, Index c) {
    return random.normal(static_cast<std::uint64_t>(r * cols + c));
  });
}

/// Tasks that share a sum would show here.
void single_steps_reversed(void*, Index count, Index, mole::RangeBody body, void* closure) {
  mole::reversed_loop(nullptr, count, 1, body, closure);
}

/// Experts of ragged rank and one call of them, rows by slot on the side of x.
template <class T>
struct Setup {
  static constexpr Index kIn = 37, kOut = 131;
  Index tokens;
  std::vector<Index> rank = {3, 2, 0, 17, 1}, rank_begin = {0, 3, 5, 5, 22, 23};
  std::vector<T> scale = {T(0.7), T(2.1), T(1), T(-0.3), T(1.9)};
  test::OwnedRouting<T> routing;
  RowsBy x_rows = RowsBy::slot, y_rows = RowsBy::token;
  std::vector<Matrix<T>> down, up;
  std::vector<std::vector<T>> packed_down;
  std::vector<T> packed_up = std::vector<T>(23 * kOut);
  std::vector<Panels<T>> down_panels;
  Panels<T> up_panels{packed_up.data(), 23, kOut};
  Matrix<T> x, bias = rough<T>(5, kOut, 5), y, dy;
  Matrix<T> hidden, scaled;
  mole::Workspace none;
  mole::Context context{none, 1, single_steps_reversed};

  explicit Setup(Index tokens = 101)
      : tokens(tokens),
        routing(test::random_slots(tokens, 5, 0.7, 2), 5),
        x(rough<T>(slots(), kIn, 4)),
        y(rough<T>(tokens, kOut, 6)),
        dy(rough<T>(tokens, kOut, 7)),
        hidden(slots(), 17),
        scaled(slots(), 17) {
    packed_down.resize(rank.size());
    for (std::size_t e = 0; e < rank.size(); ++e) {
      down.push_back(rough<T>(rank[e], kIn, 10 + e));
      up.push_back(rough<T>(kOut, rank[e], 20 + e));
      packed_down[e].resize(static_cast<std::size_t>(rank[e] * kIn));
      const auto& a = std::as_const(down[e]);
      down_panels.push_back(mole::pack_panels(a.view(), packed_down[e].data()));
      mole::pack_rows(std::as_const(up[e]).view(), rank_begin[e], up_panels);
    }
  }

  Index slots() const { return routing->slots(); }
  T q(Index s) const { return routing->gate[s] * scale[routing->expert[s]]; }
  bool active(Index s) const { return routing->gate[s] != T(0); }

  /// f(token, slot, expert) for all slots, ascending by token, then expert.
  template <class F>
  void each(F&& f) const {
    for (Index t = 0; t < routing->tokens; ++t) {
      for (Index s = routing->token_begin[t]; s < routing->token_begin[t + 1]; ++s) {
        f(t, s, static_cast<std::size_t>(routing->expert[s]));
      }
    }
  }
  static Index row(RowsBy by, Index t, Index s) { return by == RowsBy::token ? t : s; }

  /// hidden and scaled, by the plain loops.
  void fill() {
    each([&](Index t, Index s, std::size_t e) {
      for (Index r = 0; r < rank[e]; ++r) {
        T sum = 0;
        for (Index i = 0; i < kIn; ++i) {
          sum = std::fma(x(row(x_rows, t, s), i), down[e](r, i), sum);
        }
        hidden(s, r) = sum;
        if (active(s)) scaled(s, r) = q(s) * sum;
      }
    });
  }
};

template <class T>
std::vector<MatView<T>> views(std::vector<Matrix<T>>& matrices) {
  std::vector<MatView<T>> all;
  for (Matrix<T>& m : matrices) all.push_back(m.view());
  return all;
}
template <class T>
std::vector<MatView<const T>> const_views(const std::vector<Matrix<T>>& matrices) {
  std::vector<MatView<const T>> all;
  for (const Matrix<T>& m : matrices) all.push_back(m.view());
  return all;
}

}  // namespace

TEMPLATE_TEST_CASE("down: hidden is one chain over the inputs", "[kernels]", float, double) {
  Setup<TestType> s;
  s.fill();
  for (const gated::Slots which : {gated::Slots::all, gated::Slots::active}) {
    Matrix<TestType> got(s.slots(), 17), want(s.slots(), 17);
    s.each([&](Index, Index slot, std::size_t e) {
      if (which == gated::Slots::active && !s.active(slot)) return;
      for (Index r = 0; r < s.rank[e]; ++r) want(slot, r) = s.hidden(slot, r);
    });
    gated::down<TestType>(s.routing->lists, which, s.down_panels, s.x.view(), s.x_rows, got.view(),
                          s.context);
    CHECK(bit_difference(got, want) == "");
  }
}

TEMPLATE_TEST_CASE("apply_gates: one rounded product a rank", "[kernels]", float, double) {
  Setup<TestType> s;
  s.fill();
  Matrix<TestType> got(s.slots(), 17);
  gated::apply_gates<TestType>(s.routing->lists, s.routing->gate, s.scale, s.rank_begin,
                               s.hidden.view(), RowsBy::slot, got.view(), s.context);
  CHECK(bit_difference(got, s.scaled) == "");

  const Matrix<TestType> shared = rough<TestType>(s.tokens, 17, 8);
  Matrix<TestType> spread(s.slots(), 17), want(s.slots(), 17);
  gated::apply_gates<TestType>(s.routing->lists, s.routing->gate, s.scale, s.rank_begin,
                               shared.view(), RowsBy::token, spread.view(), s.context);
  s.each([&](Index t, Index slot, std::size_t e) {
    for (Index r = 0; s.active(slot) && r < s.rank[e]; ++r) {
      want(slot, r) = s.q(slot) * shared(t, r);
    }
  });
  CHECK(bit_difference(spread, want) == "");
}

TEMPLATE_TEST_CASE("up: one chain over experts, ranks and biases", "[kernels]", float, double) {
  Setup<TestType> s;
  s.fill();
  for (const bool with_bias : {false, true}) {
    Matrix<TestType> got = s.y, want = s.y;
    const MatView<const TestType> bias =
        with_bias ? std::as_const(s.bias).view() : MatView<const TestType>();
    gated::up<TestType>(s.routing->lists, s.routing->gate, s.scale, s.scaled.view(), s.up_panels,
                        s.rank_begin, bias, got.view(), s.y_rows, s.context);
    s.each([&](Index t, Index slot, std::size_t e) {
      for (Index n = 0; s.active(slot) && n < s.kOut; ++n) {
        for (Index r = 0; r < s.rank[e]; ++r) {
          want(t, n) = std::fma(s.scaled(slot, r), s.up[e](n, r), want(t, n));
        }
        if (with_bias) want(t, n) = std::fma(s.q(slot), s.bias(Index(e), n), want(t, n));
      }
    });
    CHECK(bit_difference(got, want) == "");
  }
}

TEMPLATE_TEST_CASE("dense_forward gives the bits of the sparse loops", "[kernels]", float, double) {
  using T = TestType;
  Setup<T> s;
  s.routing = test::OwnedRouting<T>(test::dense_slots(s.tokens, 5), 5);
  s.x_rows = RowsBy::token;
  s.x = rough<T>(s.tokens, s.kIn, 4);
  Matrix<T> hidden(s.slots(), 17), sparse = s.y, dense = s.y, all(s.tokens, 23);
  gated::down<T>(s.routing->lists, gated::Slots::active, s.down_panels, s.x.view(), s.x_rows,
                 hidden.view(), s.context);
  gated::apply_gates<T>(s.routing->lists, s.routing->gate, s.scale, s.rank_begin, hidden.view(),
                        RowsBy::slot, hidden.view(), s.context);
  gated::up<T>(s.routing->lists, s.routing->gate, s.scale, hidden.view(), s.up_panels, s.rank_begin,
               {}, sparse.view(), s.y_rows, s.context);
  gated::dense_forward<T>({s.routing->gate.data(), s.tokens, 5}, s.scale, s.x.view(), s.down_panels,
                          s.up_panels, s.rank_begin, all.view(), dense.view(), s.context);
  CHECK(bit_difference(dense, sparse) == "");
}

TEMPLATE_TEST_CASE("the transposed loops of backward", "[kernels]", float, double) {
  using T = TestType;
  Setup<T> s;
  Matrix<T> v(s.slots(), 17), want_v(s.slots(), 17);
  gated::up_transposed<T>(s.routing->lists, const_views(s.up), s.dy.view(), s.y_rows, v.view(),
                          s.context);
  s.each([&](Index t, Index slot, std::size_t e) {
    for (Index r = 0; r < s.rank[e]; ++r) {
      for (Index n = 0; n < s.kOut; ++n) {
        want_v(slot, r) = std::fma(s.dy(t, n), s.up[e](n, r), want_v(slot, r));
      }
    }
  });
  CHECK(bit_difference(v, want_v) == "");

  Matrix<T> dx = rough<T>(s.tokens, s.kIn, 8), want_dx = dx;
  gated::down_transposed<T>(s.routing->lists, v.view(), const_views(s.down), dx.view(),
                            RowsBy::token, s.context);
  s.each([&](Index t, Index slot, std::size_t e) {
    for (Index r = 0; s.active(slot) && r < s.rank[e]; ++r) {
      for (Index i = 0; i < s.kIn; ++i) {
        want_dx(t, i) = std::fma(v(slot, r), s.down[e](r, i), want_dx(t, i));
      }
    }
  });
  CHECK(bit_difference(dx, want_dx) == "");
}

TEMPLATE_TEST_CASE("parameter gradients are one chain over the tokens", "[kernels]", float,
                   double) {
  using T = TestType;
  const Index tokens = GENERATE(7, 101);  // few and many slots per expert
  Setup<T> s(tokens);
  s.fill();
  const Matrix<T> dscaled = rough<T>(s.slots(), 17, 8);
  std::vector<Matrix<T>> dup = s.up, want_up = s.up, ddown = s.down, want_down = s.down,
                         dbias(5, rough<T>(1, s.kOut, 9)), want_bias = dbias;
  gated::up_gradient<T>(s.routing->lists, s.dy.view(), s.y_rows, s.scaled.view(), views(dup),
                        s.context);
  gated::down_gradient<T>(s.routing->lists, dscaled.view(), s.x.view(), s.x_rows, views(ddown),
                          s.context);
  gated::bias_gradient<T>(s.routing->lists, s.routing->gate, s.scale, s.dy.view(), s.y_rows,
                          views(dbias), s.context);
  s.each([&](Index t, Index slot, std::size_t e) {
    if (!s.active(slot)) return;
    const Index xr = s.row(s.x_rows, t, slot);
    for (Index n = 0; n < s.kOut; ++n) {
      T& b = want_bias[e](0, n);
      b = std::fma(s.q(slot), s.dy(t, n), b);
      for (Index r = 0; r < s.rank[e]; ++r) {
        want_up[e](n, r) = std::fma(s.dy(t, n), s.scaled(slot, r), want_up[e](n, r));
      }
    }
    for (Index r = 0; r < s.rank[e]; ++r) {
      for (Index i = 0; i < s.kIn; ++i) {
        want_down[e](r, i) = std::fma(dscaled(slot, r), s.x(xr, i), want_down[e](r, i));
      }
    }
  });
  for (std::size_t e = 0; e < 5; ++e) {
    CHECK(bit_difference(dup[e], want_up[e]) == "");
    CHECK(bit_difference(ddown[e], want_down[e]) == "");
    CHECK(bit_difference(dbias[e], want_bias[e]) == "");
  }
}

TEMPLATE_TEST_CASE("mix is one chain from 0 over the experts of a row", "[kernels]", float,
                   double) {
  using T = TestType;
  Setup<T> s;
  const Matrix<T> from = rough<T>(s.slots(), 7, 8);
  for (const RowsBy by : {RowsBy::token, RowsBy::slot}) {
    const Index rows = by == RowsBy::token ? s.tokens : s.slots();
    Matrix<T> got(rows, 7), want(rows, 7);
    gated::mix<T>(s.routing->token_begin, s.routing->expert, s.routing->gate, s.scale, from.view(),
                  got.view(), by, s.context);
    s.each([&](Index t, Index slot, std::size_t) {
      for (Index r = 0; s.active(slot) && r < 7; ++r) {
        T& sum = want(s.row(by, t, slot), r);
        sum = std::fma(s.q(slot), from(slot, r), sum);
      }
    });
    CHECK(bit_difference(got, want) == "");
  }
}

TEMPLATE_TEST_CASE("mix takes any number of experts", "[kernels]", float, double) {
  using T = TestType;
  const Index experts = 2 * gated::kSlotTile + 5;
  const test::OwnedRouting<T> routing(test::dense_slots(2, experts), experts);
  const std::vector<T> scale(static_cast<std::size_t>(experts), T(0.7));
  const Matrix<T> from = rough<T>(2 * experts, 7, 8);
  Matrix<T> got(2, 7), want(2, 7);
  mole::Workspace none;
  gated::mix<T>(routing->token_begin, routing->expert, routing->gate, scale, from.view(),
                got.view(), RowsBy::token, {none});
  for (Index s = 0; s < 2 * experts; ++s) {
    const T q = routing->gate[s] * scale[0];
    for (Index r = 0; r < 7; ++r) {
      want(s / experts, r) = std::fma(q, from(s, r), want(s / experts, r));
    }
  }
  CHECK(bit_difference(got, want) == "");
}

TEMPLATE_TEST_CASE("products over a list of rows", "[kernels]", float, double) {
  using T = TestType;
  Setup<T> s;
  const std::vector<std::int32_t> rows = {0, 2, 3, 5, 7, 11, 13, 17, 19, 58, 60};
  const Matrix<T> from = rough<T>(61, 11, 1), weight = rough<T>(131, 11, 2),
                  plain = rough<T>(11, 131, 3), start = rough<T>(61, 131, 4);
  std::vector<T> memory(131 * 11);
  const Panels<T> packed = mole::pack_panels(weight.view(), memory.data());
  for (const bool add : {false, true}) {
    Matrix<T> got = start, want = start, got_plain = start, want_plain = start;
    gated::multiply<T>(rows, from.view(), packed, add, got.view(), s.context);
    gated::multiply<T>(rows, from.view(), plain.view(), add, got_plain.view(), s.context);
    for (const std::int32_t r : rows) {
      for (Index n = 0; n < 131; ++n) {
        if (!add) want(r, n) = want_plain(r, n) = 0;
        for (Index k = 0; k < 11; ++k) {
          want(r, n) = std::fma(from(r, k), weight(n, k), want(r, n));
          want_plain(r, n) = std::fma(from(r, k), plain(k, n), want_plain(r, n));
        }
      }
    }
    CHECK(bit_difference(got, want) == "");
    CHECK(bit_difference(got_plain, want_plain) == "");
  }

  Matrix<T> dweight = rough<T>(131, 11, 5), want = dweight;
  gated::outer<T>(rows, start.view(), from.view(), dweight.view(), s.context);
  for (const std::int32_t t : rows) {
    for (Index n = 0; n < 131; ++n) {
      for (Index k = 0; k < 11; ++k) want(n, k) = std::fma(start(t, n), from(t, k), want(n, k));
    }
  }
  CHECK(bit_difference(dweight, want) == "");
}

TEST_CASE("used_rows lists every row with a slot once", "[kernels]") {
  const test::OwnedRouting<float> routing({{}, {{0, 1}, {2, 0}}, {{1, 0}}, {{2, -1}}}, 3);
  std::vector<std::int32_t> memory(4);
  const auto rows = [&](RowsBy by, gated::Slots which) {
    const gated::Rows used =
        gated::used_rows<float>(routing->token_begin, routing->gate, by, which, memory);
    return std::vector<std::int32_t>(used.begin(), used.end());
  };
  using List = std::vector<std::int32_t>;
  CHECK(rows(RowsBy::token, gated::Slots::all) == List{1, 2, 3});
  CHECK(rows(RowsBy::token, gated::Slots::active) == List{1, 3});
  CHECK(rows(RowsBy::slot, gated::Slots::all) == List{0, 1, 2, 3});
  CHECK(rows(RowsBy::slot, gated::Slots::active) == List{0, 3});
}

TEST_CASE("slot loops visit every slot once, one expert at a time", "[kernels]") {
  const test::OwnedRouting<float> routing(test::random_slots(211, 5, 0.7, 2), 5);
  const mole::SlotLists& lists = routing->lists;
  mole::Workspace none;
  for (const Index work : {Index{1}, gated::kGrainWork}) {
    for (const gated::Slots which : {gated::Slots::active, gated::Slots::all}) {
      std::vector<int> visits(lists.slot_of.size());
      const auto body = [&](Index e, gated::SlotRange range) {
        CHECK(range.size() > 0);
        CHECK(range.size() <= gated::kSlotTile);
        for (Index i = range.begin; i < range.end; ++i) {
          CHECK(routing->expert[lists.slot_of[i]] == e);
          ++visits[lists.slot_of[i]];
        }
      };
      gated::for_each_slot_tile(lists, which, work, {none, 1, mole::reversed_loop}, body);
      for (std::size_t s = 0; s < visits.size(); ++s) {
        const bool wanted = which == gated::Slots::all || routing->gate[s] != 0;
        CHECK(visits[s] == (wanted ? 1 : 0));
      }
    }
  }
}

TEST_CASE("block loops cover their range once", "[kernels]") {
  mole::Workspace none;
  const mole::Context context{none, 1, mole::reversed_loop};
  for (const Index extent : {0, 1, 63, 64, 65, 640, 641}) {
    for (const Index work : {Index{1}, gated::kGrainWork}) {
      std::vector<int> visits(static_cast<std::size_t>(3 * extent));
      gated::for_each_block(extent, 64, work, context, [&](Index first, Index count) {
        CHECK(first % 64 == 0);
        for (Index i = first; i < first + count; ++i) ++visits[i];
      });
      gated::for_each_expert_block(2, extent, 64, work, context,
                                   [&](Index e, Index first, Index count) {
                                     for (Index i = first; i < first + count; ++i)
                                       ++visits[(e + 1) * extent + i];
                                   });
      CHECK(std::all_of(visits.begin(), visits.end(), [](int n) { return n == 1; }));
    }
  }
}
