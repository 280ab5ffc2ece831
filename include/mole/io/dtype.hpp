// SPDX-License-Identifier: Apache-2.0
// The element types that a safetensors file can hold.
#pragma once

#include <cstdint>
#include <string_view>
#include <type_traits>

#include "mole/core/config.hpp"
#include "mole/core/half.hpp"

namespace mole::inline MOLE_ABI {

/// Element type of a stored tensor. Every one of them can be listed; arithmetic types can be read.
enum class Dtype : std::uint8_t {
  boolean,
  f4,
  f6_e2m3,
  f6_e3m2,
  u8,
  i8,
  f8_e5m2,
  f8_e4m3,
  f8_e8m0,
  f8_e4m3fnuz,
  f8_e5m2fnuz,
  i16,
  u16,
  f16,
  bf16,
  i32,
  u32,
  f32,
  c64,
  f64,
  i64,
  u64,
};

struct DtypeInfo {
  Dtype dtype;
  std::string_view name;  ///< as written in the file
  int bits;               ///< of one element
};

inline constexpr DtypeInfo kDtypes[] = {
    {Dtype::boolean, "BOOL", 8},
    {Dtype::f4, "F4", 4},
    {Dtype::f6_e2m3, "F6_E2M3", 6},
    {Dtype::f6_e3m2, "F6_E3M2", 6},
    {Dtype::u8, "U8", 8},
    {Dtype::i8, "I8", 8},
    {Dtype::f8_e5m2, "F8_E5M2", 8},
    {Dtype::f8_e4m3, "F8_E4M3", 8},
    {Dtype::f8_e8m0, "F8_E8M0", 8},
    {Dtype::f8_e4m3fnuz, "F8_E4M3FNUZ", 8},
    {Dtype::f8_e5m2fnuz, "F8_E5M2FNUZ", 8},
    {Dtype::i16, "I16", 16},
    {Dtype::u16, "U16", 16},
    {Dtype::f16, "F16", 16},
    {Dtype::bf16, "BF16", 16},
    {Dtype::i32, "I32", 32},
    {Dtype::u32, "U32", 32},
    {Dtype::f32, "F32", 32},
    {Dtype::c64, "C64", 64},
    {Dtype::f64, "F64", 64},
    {Dtype::i64, "I64", 64},
    {Dtype::u64, "U64", 64},
};

constexpr const DtypeInfo& info(Dtype dtype) noexcept {
  return kDtypes[static_cast<int>(dtype)];
}
constexpr std::string_view name(Dtype dtype) noexcept {
  return info(dtype).name;
}

/// True for the four types that weights may have: F64, F32, F16, BF16.
constexpr bool is_weight(Dtype dtype) noexcept {
  return dtype == Dtype::f64 || dtype == Dtype::f32 || dtype == Dtype::f16 || dtype == Dtype::bf16;
}

namespace detail {

template <class T>
struct DtypeOf;
template <Dtype dtype>
using DtypeConstant = std::integral_constant<Dtype, dtype>;
template <>
struct DtypeOf<double> : DtypeConstant<Dtype::f64> {};
template <>
struct DtypeOf<float> : DtypeConstant<Dtype::f32> {};
template <>
struct DtypeOf<f16> : DtypeConstant<Dtype::f16> {};
template <>
struct DtypeOf<bf16> : DtypeConstant<Dtype::bf16> {};
template <>
struct DtypeOf<std::uint8_t> : DtypeConstant<Dtype::u8> {};
template <>
struct DtypeOf<std::int32_t> : DtypeConstant<Dtype::i32> {};
template <>
struct DtypeOf<std::int64_t> : DtypeConstant<Dtype::i64> {};

}  // namespace detail

/// The stored type whose elements are exactly a T.
template <class T>
inline constexpr Dtype dtype_of = detail::DtypeOf<T>::value;

}  // namespace mole::inline MOLE_ABI
