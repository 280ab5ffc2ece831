// SPDX-License-Identifier: Apache-2.0
// Stored elements, one by one: loads that need no alignment, conversions that round once.
#pragma once

#include <bit>
#include <cmath>
#include <cstring>

#include "io/text.hpp"
#include "mole/io/safetensors.hpp"

namespace mole::inline MOLE_ABI {
namespace io {

static_assert(std::endian::native == std::endian::little, "the file's bytes are taken as they are");

template <class W>
W load(const std::byte* bytes, Index i) noexcept {
  W value;
  std::memcpy(&value, bytes + i * static_cast<Index>(sizeof(W)), sizeof(W));
  return value;
}

/// The float next to `value` that keeps, in its last bit, the fact that it is inexact: rounding it
/// once more to a half gives the half nearest to `value`.
inline float round_to_odd(double value) noexcept {
  const float nearest = static_cast<float>(value);
  if (std::isnan(nearest) || static_cast<double>(nearest) == value) return nearest;
  const auto bits = std::bit_cast<std::uint32_t>(nearest);
  if ((bits & 1u) != 0) return nearest;
  const bool above = std::fabs(static_cast<double>(nearest)) > std::fabs(value);
  return std::bit_cast<float>(above ? bits - 1u : bits + 1u);
}

template <class T, class W>
T convert(W stored) noexcept {
  if constexpr (std::is_same_v<T, W>) {
    return stored;
  } else if constexpr (!is_half<T>) {
    return widen<T>(stored);
  } else if constexpr (std::is_same_v<W, double>) {
    return T(round_to_odd(stored));
  } else {
    return T(static_cast<float>(stored));
  }
}

/// Calls f(W{}) with the C++ type of a stored weight. Throws unsupported, naming the dtype.
template <class F>
void with_weight_type(const StoredTensor& tensor, const std::string& file, F f) {
  switch (tensor.dtype) {
    case Dtype::f64: return f(double{});
    case Dtype::f32: return f(float{});
    case Dtype::f16: return f(f16{});
    case Dtype::bf16: return f(bf16{});
    default: break;
  }
  fail(Errc::unsupported, file, ": ", in_quotes(tensor.name), " has the dtype \"",
       name(tensor.dtype), "\", expected F64, F32, F16 or BF16");
}

/// The same for integers.
template <class F>
void with_integer_type(const StoredTensor& tensor, const std::string& file, F f) {
  switch (tensor.dtype) {
    case Dtype::boolean:
    case Dtype::u8: return f(std::uint8_t{});
    case Dtype::i8: return f(std::int8_t{});
    case Dtype::i16: return f(std::int16_t{});
    case Dtype::u16: return f(std::uint16_t{});
    case Dtype::i32: return f(std::int32_t{});
    case Dtype::u32: return f(std::uint32_t{});
    case Dtype::i64: return f(std::int64_t{});
    case Dtype::u64: return f(std::uint64_t{});
    default: break;
  }
  fail(Errc::unsupported, file, ": ", in_quotes(tensor.name), " has the dtype \"",
       name(tensor.dtype), "\", expected an integer type");
}

}  // namespace io
}  // namespace mole::inline MOLE_ABI
