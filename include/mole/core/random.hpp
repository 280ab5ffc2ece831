// SPDX-License-Identifier: Apache-2.0
// Counter-based random numbers: the n-th number of a stream is a function of (seed, stream, n)
// alone, so any number of workers draws the same ones in any order.
//
// Generator: Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2,
// 3", SC 2011), counter (n low, n high, stream low, stream high), key = seed.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>

#include "mole/core/config.hpp"

namespace mole::inline MOLE_ABI {

class Random {
 public:
  explicit Random(std::uint64_t seed, std::uint64_t stream = 0) noexcept
      : seed_(seed), stream_(stream) {}

  /// Four independent 32-bit words for position n.
  std::array<std::uint32_t, 4> words(std::uint64_t n) const noexcept;

  /// Uniform in [0, 1), a multiple of 2^-53.
  double uniform(std::uint64_t n) const noexcept;

  /// Standard normal (Box-Muller on two word pairs of position n).
  double normal(std::uint64_t n) const noexcept;

  /// Uniform in 0 ... count - 1 for count < 2^32; the bias is below count / 2^64.
  std::uint64_t below(std::uint64_t n, std::uint64_t count) const noexcept;

 private:
  std::uint64_t seed_;
  std::uint64_t stream_;
};

inline std::array<std::uint32_t, 4> Random::words(std::uint64_t n) const noexcept {
  std::array<std::uint32_t, 4> c = {
      static_cast<std::uint32_t>(n), static_cast<std::uint32_t>(n >> 32),
      static_cast<std::uint32_t>(stream_), static_cast<std::uint32_t>(stream_ >> 32)};
  auto key0 = static_cast<std::uint32_t>(seed_);
  auto key1 = static_cast<std::uint32_t>(seed_ >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t{0xD2511F53u} * c[0];
    const std::uint64_t p1 = std::uint64_t{0xCD9E8D57u} * c[2];
    c = {static_cast<std::uint32_t>(p1 >> 32) ^ c[1] ^ key0, static_cast<std::uint32_t>(p1),
         static_cast<std::uint32_t>(p0 >> 32) ^ c[3] ^ key1, static_cast<std::uint32_t>(p0)};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c;
}

inline double Random::uniform(std::uint64_t n) const noexcept {
  const auto w = words(n);
  const std::uint64_t bits = (std::uint64_t{w[1]} << 32 | w[0]) >> 11;
  return static_cast<double>(bits) * 0x1p-53;
}

inline double Random::normal(std::uint64_t n) const noexcept {
  const auto w = words(n);
  const double u = (static_cast<double>((std::uint64_t{w[1]} << 32 | w[0]) >> 11) + 0.5) * 0x1p-53;
  const double v = static_cast<double>((std::uint64_t{w[3]} << 32 | w[2]) >> 11) * 0x1p-53;
  return std::sqrt(-2.0 * std::log(u)) * std::cos(6.283185307179586 * v);
}

inline std::uint64_t Random::below(std::uint64_t n, std::uint64_t count) const noexcept {
  const auto w = words(n);
  const std::uint64_t x = std::uint64_t{w[1]} << 32 | w[0];
  const std::uint64_t high = (x >> 32) * count + (((x & 0xffffffffu) * count) >> 32);
  return high >> 32;
}

}  // namespace mole::inline MOLE_ABI
