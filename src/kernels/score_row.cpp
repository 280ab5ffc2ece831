// SPDX-License-Identifier: Apache-2.0
#include "mole/kernels/score_row.hpp"

#include <type_traits>

#include "kernels/score_row_simd.hpp"
#include "mole/kernels/score_row_portable.hpp"

namespace mole::inline MOLE_ABI {
namespace {

// From here on insertion beats one pass a choice.
constexpr std::size_t kMostPasses = 8;
// Up to here a vector would be mostly empty.
constexpr std::size_t kFewScores = 4;

// The best level that is allowed and there.
Isa level(Isa isa) noexcept {
  if (isa == Isa::avx512 && isa_available(Isa::avx512)) return isa;
  return isa != Isa::portable && isa_available(Isa::avx2) ? Isa::avx2 : Isa::portable;
}

}  // namespace

template <class T>
bool softmax_row(std::span<const T> u, std::span<T> p, Isa isa) noexcept {
  if constexpr (std::is_same_v<T, float>) {
    const Isa best = u.size() > kFewScores ? level(isa) : Isa::portable;
    if (best == Isa::avx512) return simd::softmax_row_avx512(u, p);
    if (best == Isa::avx2) return simd::softmax_row_avx2(u, p);
  }
  return portable::softmax_row(u, p);
}

template <class T>
Index top_row(std::span<const T> key, std::span<std::int32_t> chosen, Isa isa) noexcept {
  if constexpr (std::is_same_v<T, float>) {
    const Isa best = chosen.size() <= kMostPasses ? level(isa) : Isa::portable;
    if (best == Isa::avx512) return simd::top_row_avx512(key, chosen);
    if (best == Isa::avx2) return simd::top_row_avx2(key, chosen);
  }
  return portable::top_row(key, chosen);
}

template <class T>
Index sort_row(std::span<const T> key, std::span<std::int32_t> order, Isa isa) noexcept {
  if constexpr (std::is_same_v<T, float>) {
    const Isa best = key.size() <= simd::kMostRanked ? level(isa) : Isa::portable;
    if (best == Isa::avx512) return simd::sort_row_avx512(key, order);
    if (best == Isa::avx2) return simd::sort_row_avx2(key, order);
  }
  return portable::sort_row(key, order);
}

template bool softmax_row(std::span<const float>, std::span<float>, Isa) noexcept;
template bool softmax_row(std::span<const double>, std::span<double>, Isa) noexcept;
template Index top_row(std::span<const float>, std::span<std::int32_t>, Isa) noexcept;
template Index top_row(std::span<const double>, std::span<std::int32_t>, Isa) noexcept;
template Index sort_row(std::span<const float>, std::span<std::int32_t>, Isa) noexcept;
template Index sort_row(std::span<const double>, std::span<std::int32_t>, Isa) noexcept;

}  // namespace mole::inline MOLE_ABI
