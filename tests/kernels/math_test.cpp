// SPDX-License-Identifier: Apache-2.0
#include "mole/kernels/math.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <string>
#include <utility>

#include "mole/core/random.hpp"
#include "support/catch.hpp"

namespace {

namespace math = mole::math;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kTiny = std::numeric_limits<float>::denorm_min();

/// The functions as types, so that one sweep serves all of them in every precision.
// clang-format off
struct Exp   { template <class T> static T of(T x) { return math::exp(x); }
               template <class T> static T exact(T x) { return std::exp(x); } };
struct Expm1 { template <class T> static T of(T x) { return math::expm1(x); }
               template <class T> static T exact(T x) { return std::expm1(x); } };
struct Log   { template <class T> static T of(T x) { return math::log(x); }
               template <class T> static T exact(T x) { return std::log(x); } };
struct Log1p { template <class T> static T of(T x) { return math::log1p(x); }
               template <class T> static T exact(T x) { return std::log1p(x); } };
struct Tanh  { template <class T> static T of(T x) { return math::tanh(x); }
               template <class T> static T exact(T x) { return std::tanh(x); } };
struct Sigmoid {
  template <class T> static T of(T x) { return math::sigmoid(x); }
  template <class T> static T exact(T x) {
    return x < 0 ? std::exp(x) / (1 + std::exp(x)) : 1 / (1 + std::exp(-x));
  }
};
struct Softplus {
  template <class T> static T of(T x) { return math::softplus(x); }
  template <class T> static T exact(T x) {
    return x < 0 ? std::log1p(std::exp(x)) : x + std::log1p(std::exp(-x));
  }
};
// clang-format on

/// Distance in units of the last place that a T has at the exact value. Infinity counts as the
/// first power of two that T cannot hold; a NaN on one side only is infinitely wrong.
template <class T, class Wide>
double ulps(T got, Wide exact) {
  using Limits = std::numeric_limits<T>;
  if (std::isnan(got) || std::isnan(exact)) return std::isnan(got) == std::isnan(exact) ? 0 : kInf;
  const Wide top = std::ldexp(Wide(1), Limits::max_exponent);
  const Wide ideal = std::clamp(exact, -top, top);
  const Wide value = std::isinf(got) ? std::copysign(top, static_cast<Wide>(got)) : Wide(got);
  const Wide size = std::clamp(std::fabs(ideal), Wide(Limits::min()), Wide(Limits::max()));
  return static_cast<double>(std::fabs(value - ideal) /
                             std::ldexp(Wide(1), std::ilogb(size) + 1 - Limits::digits));
}

template <class T>
struct Worst {
  double error = -1;
  T input = 0, got = 0, exact = 0;

  std::string text() const {
    char line[256];
    std::snprintf(line, sizeof line, "worst %.4f ulp at %a: got %a, exact %a", error, double(input),
                  double(got), double(exact));
    return line;
  }
};

/// Adds the floats with the bits first, first + step, ... up to last, of one sign.
template <class Function>
void sweep(Worst<float>& worst, std::uint32_t first, std::uint32_t last, std::uint32_t step,
           bool negative) {
  for (std::uint64_t bits = first; bits <= last; bits += step) {
    const float magnitude = std::bit_cast<float>(static_cast<std::uint32_t>(bits));
    const float x = negative ? -magnitude : magnitude;
    const float got = Function::of(x);
    const double exact = Function::exact(static_cast<double>(x));
    if (const double error = ulps(got, exact); error > worst.error) {
      worst.error = error;
      worst.input = x;
      worst.got = got;
      worst.exact = static_cast<float>(exact);
    }
  }
}

/// Every 257th float, and every float around the seams of the algorithms.
template <class Function>
Worst<float> sweep_floats() {
  constexpr std::pair<float, float> kSeams[] = {
      {0.0f, 1e-42f},                // the smallest floats
      {1.1754e-38f, 1.1756e-38f},    // from subnormal to normal
      {0.29285f, 0.29295f},          // 1 - sqrt(1/2)
      {0.34653f, 0.34662f},          // ln(2) / 2
      {0.41418f, 0.41425f},          // sqrt(2) - 1
      {0.62495f, 0.62505f},          // tanh: from polynomial to exponential
      {0.70705f, 0.70715f},          // sqrt(1/2)
      {0.9999f, 1.0001f},            // log near 0, log1p near infinity
      {9.0f, 9.03f},                 // tanh becomes 1
      {17.3f, 17.35f},               // expm1 becomes -1
      {19.999f, 20.001f},            // expm1 becomes exp
      {87.3f, 87.4f},                // exp becomes subnormal
      {88.7f, 89.1f},                // exp overflows
      {103.9f, 104.1f},              // exp becomes 0
      {0x1.fff8p24f, 0x1.0008p25f},  // log1p becomes log
  };
  Worst<float> worst;
  for (const bool negative : {false, true}) {
    sweep<Function>(worst, 0, std::bit_cast<std::uint32_t>(kInf), 257, negative);
    for (const auto& [low, high] : kSeams) {
      sweep<Function>(worst, std::bit_cast<std::uint32_t>(low), std::bit_cast<std::uint32_t>(high),
                      1, negative);
    }
  }
  return worst;
}

template <class Function>
Worst<double> sweep_doubles() {
  const mole::Random random(20240117);
  Worst<double> worst;
  for (std::uint64_t n = 0; n < 400000; ++n) {
    const auto words = random.words(n);
    const std::uint64_t bits = std::uint64_t{words[1]} << 32 | words[0];
    const double everywhere = std::bit_cast<double>(bits);
    const double near = std::ldexp(words[2] - 0x1p31, -31 + int(n % 11));
    for (const double x : {everywhere, near}) {
      const long double exact = Function::exact(static_cast<long double>(x));
      const double got = Function::of(x);
      if (const double error = ulps(got, exact); error > worst.error) {
        worst.error = error;
        worst.input = x;
        worst.got = got;
        worst.exact = static_cast<double>(exact);
      }
    }
  }
  return worst;
}

template <class Function>
void check_float(double bound) {
  const Worst<float> worst = sweep_floats<Function>();
  INFO(worst.text());
  CHECK(worst.error <= bound);
}

template <class Function>
void check_double() {
  const Worst<double> worst = sweep_doubles<Function>();
  INFO(worst.text());
  CHECK(worst.error <= 4.0);
}

struct Special {
  const char* what;
  float got, expected;
};

}  // namespace

TEST_CASE("float exp is accurate", "[math]") {
  check_float<Exp>(2.0);
}
TEST_CASE("float expm1 is accurate", "[math]") {
  check_float<Expm1>(2.0);
}
TEST_CASE("float log is accurate", "[math]") {
  check_float<Log>(2.0);
}
TEST_CASE("float log1p is accurate", "[math]") {
  check_float<Log1p>(2.0);
}
TEST_CASE("float tanh is accurate", "[math]") {
  check_float<Tanh>(2.0);
}
TEST_CASE("float sigmoid is accurate", "[math]") {
  check_float<Sigmoid>(2.5);
}
TEST_CASE("float softplus is accurate", "[math]") {
  check_float<Softplus>(2.0);
}

TEST_CASE("double functions agree with long double", "[math]") {
  SECTION("exp") {
    check_double<Exp>();
  }
  SECTION("expm1") {
    check_double<Expm1>();
  }
  SECTION("log") {
    check_double<Log>();
  }
  SECTION("log1p") {
    check_double<Log1p>();
  }
  SECTION("tanh") {
    check_double<Tanh>();
  }
  SECTION("sigmoid") {
    check_double<Sigmoid>();
  }
  SECTION("softplus") {
    check_double<Softplus>();
  }
}

TEST_CASE("special inputs of the float functions", "[math]") {
  const Special specials[] = {
      {"exp(0)", math::exp(0.0f), 1},
      {"exp(-0)", math::exp(-0.0f), 1},
      {"exp(inf)", math::exp(kInf), kInf},
      {"exp(-inf)", math::exp(-kInf), 0},
      {"exp(89)", math::exp(89.0f), kInf},
      {"exp(-103.9)", math::exp(-103.9f), kTiny},
      {"exp(-1e30)", math::exp(-1e30f), 0},
      {"exp(1e30)", math::exp(1e30f), kInf},
      {"exp(nan)", math::exp(kNan), kNan},
      {"exp(tiny)", math::exp(kTiny), 1},
      {"expm1(0)", math::expm1(0.0f), 0},
      {"expm1(-0)", math::expm1(-0.0f), -0.0f},
      {"expm1(tiny)", math::expm1(kTiny), kTiny},
      {"expm1(-tiny)", math::expm1(-kTiny), -kTiny},
      {"expm1(inf)", math::expm1(kInf), kInf},
      {"expm1(-inf)", math::expm1(-kInf), -1},
      {"expm1(89)", math::expm1(89.0f), kInf},
      {"expm1(nan)", math::expm1(kNan), kNan},
      {"log(1)", math::log(1.0f), 0},
      {"log(0)", math::log(0.0f), -kInf},
      {"log(-0)", math::log(-0.0f), -kInf},
      {"log(-1)", math::log(-1.0f), kNan},
      {"log(-tiny)", math::log(-kTiny), kNan},
      {"log(inf)", math::log(kInf), kInf},
      {"log(-inf)", math::log(-kInf), kNan},
      {"log(nan)", math::log(kNan), kNan},
      {"log1p(0)", math::log1p(0.0f), 0},
      {"log1p(-0)", math::log1p(-0.0f), -0.0f},
      {"log1p(tiny)", math::log1p(kTiny), kTiny},
      {"log1p(-tiny)", math::log1p(-kTiny), -kTiny},
      {"log1p(-1)", math::log1p(-1.0f), -kInf},
      {"log1p(-2)", math::log1p(-2.0f), kNan},
      {"log1p(inf)", math::log1p(kInf), kInf},
      {"log1p(-inf)", math::log1p(-kInf), kNan},
      {"log1p(nan)", math::log1p(kNan), kNan},
      {"tanh(0)", math::tanh(0.0f), 0},
      {"tanh(-0)", math::tanh(-0.0f), -0.0f},
      {"tanh(tiny)", math::tanh(kTiny), kTiny},
      {"tanh(-tiny)", math::tanh(-kTiny), -kTiny},
      {"tanh(10)", math::tanh(10.0f), 1},
      {"tanh(inf)", math::tanh(kInf), 1},
      {"tanh(-inf)", math::tanh(-kInf), -1},
      {"tanh(nan)", math::tanh(kNan), kNan},
      {"sigmoid(0)", math::sigmoid(0.0f), 0.5f},
      {"sigmoid(-0)", math::sigmoid(-0.0f), 0.5f},
      {"sigmoid(inf)", math::sigmoid(kInf), 1},
      {"sigmoid(-inf)", math::sigmoid(-kInf), 0},
      {"sigmoid(30)", math::sigmoid(30.0f), 1},
      {"sigmoid(nan)", math::sigmoid(kNan), kNan},
      {"softplus(inf)", math::softplus(kInf), kInf},
      {"softplus(-inf)", math::softplus(-kInf), 0},
      {"softplus(1e30)", math::softplus(1e30f), 1e30f},
      {"softplus(40)", math::softplus(40.0f), 40},
      {"softplus(nan)", math::softplus(kNan), kNan},
      {"sqrt(-0)", math::sqrt(-0.0f), -0.0f},
      {"sqrt(-1)", math::sqrt(-1.0f), kNan},
      {"sqrt(2)", math::sqrt(2.0f), 0x1.6a09e6p0f},
  };
  for (const Special& special : specials) {
    INFO(special.what << " = " << special.got << ", expected " << special.expected);
    if (std::isnan(special.expected)) {
      CHECK(std::isnan(special.got));
    } else {
      CHECK(std::bit_cast<std::uint32_t>(special.got) ==
            std::bit_cast<std::uint32_t>(special.expected));
    }
  }
}

TEST_CASE("the tails of sigmoid and softplus are e^x and x", "[math]") {
  for (const float x : {-17.0f, -30.5f, -60.25f, -87.5f, -95.0f, -103.0f}) {
    CAPTURE(x);
    CHECK(math::sigmoid(x) == Catch::Approx(math::exp(x)).epsilon(1e-7));
    CHECK(math::softplus(x) == Catch::Approx(math::exp(x)).epsilon(1e-7));
    CHECK(math::softplus(-x) == -x);
  }
  CHECK(math::sigmoid(-745.0) == std::exp(-745.0));
  CHECK(math::softplus(-745.0) == std::exp(-745.0));
  CHECK(math::softplus(745.0) == 745.0);
  CHECK(math::sigmoid(-std::numeric_limits<double>::infinity()) == 0.0);
}

TEST_CASE("float results have the same bits in every build", "[math]") {
  std::uint64_t hash = 0xcbf29ce484222325u;
  const auto add = [&](float value) {
    const std::uint32_t bits = value != value ? 0x7fc00000u : std::bit_cast<std::uint32_t>(value);
    hash = (hash ^ bits) * 0x100000001b3u;
  };
  for (std::uint64_t bits = 0; bits <= 0xffffffffu; bits += 32771) {
    const float x = std::bit_cast<float>(static_cast<std::uint32_t>(bits));
    add(math::exp(x));
    add(math::expm1(x));
    add(math::log(x));
    add(math::log1p(x));
    add(math::tanh(x));
    add(math::sigmoid(x));
    add(math::softplus(x));
    add(math::sqrt(x));
  }
  CHECK(hash == 0x17838b28e8eea674u);
}
