// SPDX-License-Identifier: Apache-2.0
// Rows with Google Highway, compiled once per instruction set. Levels without a fused multiply-add
// are left out: they could not give the same bits.
#include "kernels/score_row_simd.hpp"

#include <limits>
#include <type_traits>
#include <utility>

#include "mole/kernels/math.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/score_row_simd.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace mole::inline MOLE_ABI::simd::HWY_NAMESPACE {

#if HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_AVX3

namespace hn = hwy::HWY_NAMESPACE;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// f(first, vector) over the row; lanes beyond its end hold `padding`.
template <class D, class F>
HWY_INLINE void for_vectors(D d, std::span<const float> row, float padding, F f) {
  const size_t lanes = hn::Lanes(d), size = row.size();
  size_t e = 0;
  for (; e + lanes <= size; e += lanes) f(e, hn::LoadU(d, row.data() + e));
  if (e == size) return;
  const auto tail = hn::FirstN(d, size - e);
  f(e, hn::IfThenElse(tail, hn::MaskedLoad(tail, d, row.data() + e), hn::Set(d, padding)));
}

// math::single::exp for x <= 0, operation by operation.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V exp_of_negative(D d, V x) {
  using namespace math::single;
  const hn::RebindToSigned<D> di;
  const auto to_integer = hn::Set(d, 0x1.8p23f);
  const auto shifted = hn::MulAdd(x, hn::Set(d, 0x1.715476p0f), to_integer);
  const auto n = hn::Sub(hn::BitCast(di, shifted), hn::BitCast(di, to_integer));
  const auto count = hn::ConvertTo(d, n);
  V r = hn::NegMulAdd(count, hn::Set(d, kLn2High), x);
  r = hn::NegMulAdd(count, hn::Set(d, kLn2Low), r);
  V tail = hn::Set(d, kExpTail[4]);
  HWY_UNROLL(4)
  for (int i = 3; i >= 0; --i) tail = hn::MulAdd(tail, r, hn::Set(d, kExpTail[i]));
  const auto one = hn::Set(d, 1.0f);
  const V value = hn::MulAdd(hn::MulAdd(tail, r, one), r, one);
  const auto power_of_two = [&](auto m) {
    return hn::BitCast(d, hn::ShiftLeft<23>(hn::Add(m, hn::Set(di, 127))));
  };
  const auto half = hn::ShiftRight<1>(n);
  const V scaled = hn::Mul(hn::Mul(value, power_of_two(half)), power_of_two(hn::Sub(n, half)));
  return hn::IfThenElse(hn::Lt(x, hn::Set(d, kExpZeroBelow)), hn::Zero(d),
                        hn::IfThenElse(hn::Ne(x, x), x, scaled));
}

// sum + v, eight lanes after eight.
template <class D, class V>
HWY_INLINE auto add_by_eight(D eight, hn::Vec<D> sum, V v) {
#if HWY_TARGET == HWY_AVX3
  return hn::Add(hn::Add(sum, hn::LowerHalf(eight, v)), hn::UpperHalf(eight, v));
#else
  return hn::Add(sum, v);
#endif
}

bool softmax_row(std::span<const float> u, std::span<float> p) {
  const hn::ScalableTag<float> d;
  const hn::CappedTag<float, 8> eight;
  using V = hn::Vec<decltype(d)>;
  V most = hn::Set(d, -kInfinity);
  for_vectors(d, u, -kInfinity,
              [&](size_t, V v) { most = hn::IfThenElse(hn::Gt(v, most), v, most); });
  const V largest = hn::MaxOfLanes(d, most);
  if (hn::GetLane(largest) == kInfinity || hn::GetLane(largest) == -kInfinity) return false;
  const size_t lanes = hn::Lanes(d), full = u.size() / lanes * lanes;
  auto sum = hn::Zero(eight);
  V last = hn::Zero(d);  // the last vector, if part of it, never leaves its register
  for_vectors(d, u, -kInfinity, [&](size_t e, V v) {
    last = exp_of_negative(d, hn::Sub(v, largest));
    sum = add_by_eight(eight, sum, last);
    if (e < full) hn::StoreU(last, d, p.data() + e);
  });
  HWY_ALIGN float s[8];
  hn::Store(sum, eight, s);
  const V total = hn::Set(d, ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7])));
  for (size_t e = 0; e < full; e += lanes) {
    hn::StoreU(hn::Div(hn::LoadU(d, p.data() + e), total), d, p.data() + e);
  }
  if (full == u.size()) return true;
  hn::BlendedStore(hn::Div(last, total), hn::FirstN(d, u.size() - full), d, p.data() + full);
  return true;
}

// The first e >= first with key[e] == value; there is one.
template <class D>
HWY_INLINE std::int32_t find(D d, std::span<const float> key, float value, size_t first) {
  const auto wanted = hn::Set(d, value);
  for (const size_t lanes = hn::Lanes(d);; first += lanes) {
    const auto tail = hn::FirstN(d, key.size() - first);
    const auto equal = hn::Eq(hn::MaskedLoad(tail, d, key.data() + first), wanted);
    const intptr_t lane = hn::FindFirstTrue(d, hn::And(tail, equal));
    if (lane >= 0) return static_cast<std::int32_t>(first) + static_cast<std::int32_t>(lane);
  }
}

Index top_row(std::span<const float> key, std::span<std::int32_t> chosen) {
  const hn::ScalableTag<float> d;
  const hn::RebindToSigned<decltype(d)> di;
  using V = hn::Vec<decltype(d)>;
  const V none = hn::Set(d, -kInfinity);
  const auto lane = hn::Iota(di, 0);
  float last = kInfinity;
  std::int32_t last_index = -1;
  for (size_t i = 0; i < chosen.size(); ++i) {
    V best = none;
    const V previous = hn::Set(d, last);
    const auto previous_index = hn::Set(di, last_index);
    for_vectors(d, key, -kInfinity, [&](size_t e, V v) {
      const auto index = hn::Add(lane, hn::Set(di, static_cast<std::int32_t>(e)));
      const auto later = hn::RebindMask(d, hn::Gt(index, previous_index));
      const auto left = hn::Or(hn::Lt(v, previous), hn::And(hn::Eq(v, previous), later));
      best = hn::Max(hn::IfThenElse(left, v, none), best);
    });
    const float value = hn::GetLane(hn::MaxOfLanes(d, best));
    if (value == -kInfinity) return static_cast<Index>(i);
    last_index = find(d, key, value, value == last ? static_cast<size_t>(last_index + 1) : 0);
    last = value;
    chosen[i] = last_index;
  }
  return static_cast<Index>(chosen.size());
}

// body(0), ..., body(kCount - 1), the numbers as constants.
template <class Body, size_t... i>
HWY_INLINE void unrolled(std::index_sequence<i...>, Body body) {
  (body(std::integral_constant<size_t, i>()), ...);
}

// rank[e] for the kVectors vectors from `first` on: how many keys come before key[e].
template <size_t kVectors, class D>
HWY_INLINE void rank_vectors(D d, std::span<const float> key, size_t first, std::int32_t* rank) {
  const hn::RebindToSigned<D> di;
  const std::make_index_sequence<kVectors> vectors;
  const size_t lanes = hn::Lanes(d), size = key.size();
  const auto lane = hn::Iota(di, 0);
  hn::Vec<D> v[kVectors];
  hn::Vec<decltype(di)> before[kVectors];
  unrolled(vectors, [&](auto i) {
    const auto here = hn::FirstN(d, size - (first + i * lanes));
    const auto loaded = hn::MaskedLoad(here, d, key.data() + first + i * lanes);
    v[i] = hn::IfThenElse(here, loaded, hn::Set(d, -kInfinity));
    before[i] = hn::Zero(di);
  });
  const auto count = [&](auto i, auto mask) {
#if HWY_TARGET == HWY_AVX3
    const auto one_more = hn::Add(before[i], hn::Set(di, 1));
    before[i] = hn::IfThenElse(hn::RebindMask(di, mask), one_more, before[i]);
#else
    before[i] = hn::Sub(before[i], hn::BitCast(di, hn::VecFromMask(d, mask)));
#endif
  };
  for (size_t j = 0; j < first; ++j) {
    const auto other = hn::Set(d, key[j]);
    unrolled(vectors, [&](auto i) { count(i, hn::Ge(other, v[i])); });
  }
  unrolled(vectors, [&](auto own) {
    const size_t begin = first + own * lanes, end = HWY_MIN(begin + lanes, size);
    for (size_t j = begin; j < end; ++j) {
      const auto other = hn::Set(d, key[j]);
      const auto lower = hn::Gt(lane, hn::Set(di, static_cast<std::int32_t>(j - begin)));
      unrolled(vectors, [&](auto i) {
        if constexpr (i() > own()) {
          count(i, hn::Ge(other, v[i]));
        } else if constexpr (i() < own()) {
          count(i, hn::Gt(other, v[i]));
        } else {
          const auto tied = hn::And(hn::Eq(other, v[i]), hn::RebindMask(d, lower));
          count(i, hn::Or(hn::Gt(other, v[i]), tied));
        }
      });
    }
  });
  for (size_t j = first + kVectors * lanes; j < size; ++j) {
    const auto other = hn::Set(d, key[j]);
    unrolled(vectors, [&](auto i) { count(i, hn::Gt(other, v[i])); });
  }
  unrolled(vectors, [&](auto i) { hn::Store(before[i], di, rank + first + i * lanes); });
}

Index sort_row(std::span<const float> key, std::span<std::int32_t> order) {
  const hn::ScalableTag<float> d;
  const size_t lanes = hn::Lanes(d), size = key.size();
  HWY_ALIGN std::int32_t rank[kMostRanked];
  size_t first = 0;
  for (; first + 3 * lanes < size; first += 4 * lanes) rank_vectors<4>(d, key, first, rank);
  for (; first + lanes < size; first += 2 * lanes) rank_vectors<2>(d, key, first, rank);
  if (first < size) rank_vectors<1>(d, key, first, rank);
  Index found = 0;
  for (size_t e = 0; e < size; ++e) {
    if (!(key[e] > -kInfinity)) continue;
    order[rank[e]] = static_cast<std::int32_t>(e);
    ++found;
  }
  return found;
}

#endif

}  // namespace mole::inline MOLE_ABI::simd::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

namespace mole::inline MOLE_ABI::simd {

#if HWY_TARGETS & HWY_AVX2
bool softmax_row_avx2(std::span<const float> u, std::span<float> p) noexcept {
  return N_AVX2::softmax_row(u, p);
}
Index top_row_avx2(std::span<const float> key, std::span<std::int32_t> chosen) noexcept {
  return N_AVX2::top_row(key, chosen);
}
Index sort_row_avx2(std::span<const float> key, std::span<std::int32_t> order) noexcept {
  return N_AVX2::sort_row(key, order);
}
#else
bool softmax_row_avx2(std::span<const float>, std::span<float>) noexcept {
  return false;
}
Index top_row_avx2(std::span<const float>, std::span<std::int32_t>) noexcept {
  return 0;
}
Index sort_row_avx2(std::span<const float>, std::span<std::int32_t>) noexcept {
  return 0;
}
#endif

#if HWY_TARGETS & HWY_AVX3
bool softmax_row_avx512(std::span<const float> u, std::span<float> p) noexcept {
  return N_AVX3::softmax_row(u, p);
}
Index top_row_avx512(std::span<const float> key, std::span<std::int32_t> chosen) noexcept {
  return N_AVX3::top_row(key, chosen);
}
Index sort_row_avx512(std::span<const float> key, std::span<std::int32_t> order) noexcept {
  return N_AVX3::sort_row(key, order);
}
#else
bool softmax_row_avx512(std::span<const float>, std::span<float>) noexcept {
  return false;
}
Index top_row_avx512(std::span<const float>, std::span<std::int32_t>) noexcept {
  return 0;
}
Index sort_row_avx512(std::span<const float>, std::span<std::int32_t>) noexcept {
  return 0;
}
#endif

}  // namespace mole::inline MOLE_ABI::simd
#endif
