// SPDX-License-Identifier: Apache-2.0
// Rows brought to mean 0 and size 1, the heart of layer and root-mean-square norms.
//
//   unit = (x - mean) · inverse      inverse = 1 / sqrt(mean of (x - mean)² + epsilon)
//
// mean is that of the row, or 0 if not centred. Sums are in double.
#pragma once

#include <cmath>
#include <span>

#include "mole/core/config.hpp"

namespace mole::inline MOLE_ABI::norm {

/// Writes unit; returns inverse. unit may be x.
template <class T>
T standardise(std::span<const T> x, double epsilon, bool centred, std::span<T> unit) noexcept;

/// dx += inverse (d - mean(d) if centred - unit · mean(d ∘ unit)), d the gradient of unit.
template <class T>
void standardise_backward(std::span<const T> unit, std::span<const T> d, T inverse, bool centred,
                          std::span<T> dx) noexcept;

template <class T>
T standardise(std::span<const T> x, double epsilon, bool centred, std::span<T> unit) noexcept {
  const auto count = static_cast<double>(x.size());
  double mean = 0, square = 0;
  if (centred) {
    for (const T value : x) mean += value;
    mean /= count;
  }
  for (const T value : x) {
    const double away = value - mean;
    square = std::fma(away, away, square);
  }
  const double inverse = 1 / std::sqrt(square / count + epsilon);
  for (std::size_t i = 0; i < x.size(); ++i) unit[i] = static_cast<T>((x[i] - mean) * inverse);
  return static_cast<T>(inverse);
}

template <class T>
void standardise_backward(std::span<const T> unit, std::span<const T> d, T inverse, bool centred,
                          std::span<T> dx) noexcept {
  const auto count = static_cast<double>(unit.size());
  double mean = 0, along = 0;
  for (std::size_t i = 0; i < unit.size(); ++i) {
    if (centred) mean += d[i];
    along = std::fma(static_cast<double>(d[i]), unit[i], along);
  }
  mean /= count;
  along /= count;
  for (std::size_t i = 0; i < unit.size(); ++i) {
    const double left = std::fma(-along, static_cast<double>(unit[i]), d[i] - mean);
    dx[i] = static_cast<T>(std::fma(static_cast<double>(inverse), left, dx[i]));
  }
}

#ifndef MOLE_HEADER_ONLY
extern template float standardise(std::span<const float>, double, bool, std::span<float>) noexcept;
extern template double standardise(std::span<const double>, double, bool,
                                   std::span<double>) noexcept;
extern template void standardise_backward(std::span<const float>, std::span<const float>, float,
                                          bool, std::span<float>) noexcept;
extern template void standardise_backward(std::span<const double>, std::span<const double>, double,
                                          bool, std::span<double>) noexcept;
#endif

}  // namespace mole::inline MOLE_ABI::norm
