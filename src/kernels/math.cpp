// SPDX-License-Identifier: Apache-2.0
#include "mole/kernels/math.hpp"

namespace mole::inline MOLE_ABI::math {
namespace {

using Function = float (*)(float) noexcept;

// std::fma is a call where the compiler may not assume the instruction. Everything is inlined into
// a function that may, and taken if the processor has it; fused is fused, so the bits are the same.
#if defined(__x86_64__) && !defined(__FMA__)
template <Function kFunction>
[[gnu::target("fma"), gnu::flatten]] float with_hardware_fma(float x) noexcept {
  return kFunction(x);
}

template <Function kFunction>
float best(float x) noexcept {
  return __builtin_cpu_supports("fma") ? with_hardware_fma<kFunction>(x) : kFunction(x);
}
#else
template <Function kFunction>
float best(float x) noexcept {
  return kFunction(x);
}
#endif

}  // namespace

template <>
float exp(float x) noexcept {
  return best<single::exp<float>>(x);
}
template <>
float expm1(float x) noexcept {
  return best<single::expm1<float>>(x);
}
template <>
float log(float x) noexcept {
  return best<single::log<float>>(x);
}
template <>
float log1p(float x) noexcept {
  return best<single::log1p<float>>(x);
}
template <>
float tanh(float x) noexcept {
  return best<single::tanh<float>>(x);
}

template float sigmoid(float) noexcept;
template float softplus(float) noexcept;
template float sqrt(float) noexcept;
template double exp(double) noexcept;
template double expm1(double) noexcept;
template double log(double) noexcept;
template double log1p(double) noexcept;
template double tanh(double) noexcept;
template double sigmoid(double) noexcept;
template double softplus(double) noexcept;
template double sqrt(double) noexcept;

}  // namespace mole::inline MOLE_ABI::math
