// SPDX-License-Identifier: Apache-2.0
#include "mole/algebra/soft_merge.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "support/catch.hpp"
#include "support/gradcheck.hpp"
#include "support/matrix.hpp"

namespace {

using mole::Index;
using test::Matrix;

constexpr Index kExperts = 3, kRank = 2, kIn = 4, kOut = 5;

/// Experts in contiguous memory.
struct Example {
  Matrix<double> down = packed(kExperts * kRank, kIn, 1), up = packed(kExperts * kOut, kRank, 2),
                 bias = packed(kExperts, kOut, 3);
  std::vector<double> gate = {0.5, 0.125, -0.25}, scale = {2, 1, 0.5};
  std::vector<Index> rank = {kRank, kRank, kRank};

  static Matrix<double> packed(Index rows, Index cols, std::uint64_t seed) {
    Matrix<double> m(rows, cols, Index{0});
    const auto values = test::random_matrix(rows, cols, seed);
    for (Index r = 0; r < rows; ++r) {
      for (Index c = 0; c < cols; ++c) m(r, c) = values(r, c);
    }
    return m;
  }
  static std::vector<double*> lists(Matrix<double>& m, Index rows) {
    std::vector<double*> list;
    for (Index e = 0; e < kExperts; ++e) list.push_back(&m(e * rows, 0));
    return list;
  }
  std::vector<double*> downs = lists(down, kRank), ups = lists(up, kOut), biases = lists(bias, 1);
  mole::LoraBankParams<double> params() { return {kIn, kOut, rank, downs, ups, biases}; }
};

struct Merged {
  Matrix<double> down{kRank, kIn}, up{kOut, kRank}, bias{1, kOut};
  mole::MergedExpert<double> views() { return {down, up, bias}; }
};

void fill(Matrix<double>& m, double value) {
  for (Index r = 0; r < m.rows(); ++r) std::ranges::fill(m.view().row(r), value);
}

bool is_full_of(const Matrix<double>& m, double value) {
  for (Index r = 0; r < m.rows(); ++r) {
    const auto row = m.view().row(r);
    if (std::ranges::count(row, value) != std::ssize(row)) return false;
  }
  return true;
}

Merged merge(Example& example) {
  Merged merged;
  mole::soft_merge<double>(example.gate, example.params(), example.scale, merged.views());
  return merged;
}

/// That backward refuses these parameters after `edit`, and writes nothing.
template <class Edit>
void check_backward_refuses(mole::Errc code, Edit edit) {
  const Merged incoming;
  Example example, memory;
  for (Matrix<double>* m : {&memory.down, &memory.up, &memory.bias}) fill(*m, 8);
  std::vector<double> dgate(kExperts, 8.0);
  mole::LoraBankParams<double> experts = example.params(), grad = memory.params();
  edit(experts, grad);
  try {
    mole::soft_merge_backward<double>(example.gate, experts, example.scale,
                                      {incoming.down, incoming.up, incoming.bias}, dgate, grad);
    FAIL_CHECK("accepted");
  } catch (const mole::Error& error) {
    INFO(error.what());
    CHECK(error.code() == code);
  }
  CHECK(is_full_of(memory.down, 8));
  CHECK(is_full_of(memory.up, 8));
  CHECK(is_full_of(memory.bias, 8));
  CHECK(dgate == std::vector<double>(kExperts, 8.0));
}

}  // namespace

TEST_CASE("A soft merge averages the parameters", "[algebra]") {
  Example example;
  const Merged merged = merge(example);
  for (Index r = 0; r < kRank; ++r) {
    for (Index i = 0; i < kIn; ++i) {
      double sum = 0;
      for (Index e = 0; e < kExperts; ++e) sum += example.gate[e] * example.down(e * kRank + r, i);
      CHECK(merged.down(r, i) == Catch::Approx(sum).margin(1e-15));
    }
    for (Index o = 0; o < kOut; ++o) {
      double sum = 0;
      for (Index e = 0; e < kExperts; ++e) {
        sum += example.gate[e] * example.scale[e] * example.up(e * kOut + o, r);
      }
      CHECK(merged.up(o, r) == Catch::Approx(sum).margin(1e-15));
    }
  }
  CHECK(merged.down.padding_is_intact());
  CHECK(merged.up.padding_is_intact());
}

TEST_CASE("The gate of one expert alone gives that expert", "[algebra]") {
  Example example;
  example.gate = {0, 1, 0};
  const Merged merged = merge(example);
  for (Index r = 0; r < kRank; ++r) {
    for (Index i = 0; i < kIn; ++i) CHECK(merged.down(r, i) == example.down(kRank + r, i));
    for (Index o = 0; o < kOut; ++o) CHECK(merged.up(o, r) == example.up(kOut + o, r));
  }
  for (Index o = 0; o < kOut; ++o) CHECK(merged.bias(0, o) == example.bias(1, o));
}

TEST_CASE("The gradients of a soft merge are its derivatives, and are added", "[algebra]") {
  Example example;
  const auto ddown = test::random_matrix(kRank, kIn, 7), dup = test::random_matrix(kOut, kRank, 8),
             dbias = test::random_matrix(1, kOut, 9);
  const auto loss = [&] {
    const Merged merged = merge(example);
    return test::weighted_sum(ddown, merged.down) + test::weighted_sum(dup, merged.up) +
           test::weighted_sum(dbias, merged.bias);
  };
  Example grad;
  for (Matrix<double>* m : {&grad.down, &grad.up, &grad.bias}) fill(*m, 8);
  std::vector<double> dgate(kExperts, 8.0);
  mole::soft_merge_backward<double>(example.gate, example.params(), example.scale,
                                    {ddown, dup, dbias}, dgate, grad.params());
  for (Matrix<double>* m : {&grad.down, &grad.up, &grad.bias}) {
    for (Index r = 0; r < m->rows(); ++r) {
      for (double& v : m->view().row(r)) v -= 8;
    }
  }
  for (double& v : dgate) v -= 8;
  CHECK(test::gradient_error(example.down, grad.down.view(), loss) == "");
  CHECK(test::gradient_error(example.up, grad.up.view(), loss) == "");
  CHECK(test::gradient_error(example.bias, grad.bias.view(), loss) == "");
  const mole::MatView<double> gates(example.gate.data(), 1, kExperts);
  CHECK(test::gradient_error(gates, mole::MatView<const double>(dgate.data(), 1, kExperts), loss) ==
        "");
}

TEST_CASE("A soft merge refuses experts of different ranks and wrong shapes", "[algebra]") {
  Example example;
  example.gate.pop_back();
  CHECK_THROWS_AS(merge(example), mole::Error);
  example.gate.push_back(1);
  example.rank[2] = 1;
  CHECK_THROWS_AS(merge(example), mole::Error);
  example.rank[2] = kRank;
  Merged merged;
  merged.up = Matrix<double>(kOut, kRank + 1);
  CHECK_THROWS_AS(
      mole::soft_merge<double>(example.gate, example.params(), example.scale, merged.views()),
      mole::Error);
}

TEST_CASE("A soft merge refuses lists that are too short and matrices without memory",
          "[algebra]") {
  for (const bool is_short : {false, true}) {
    for (const int list : {0, 1, 2}) {
      Example example;
      std::vector<double*>& pointers = list == 0   ? example.downs
                                       : list == 1 ? example.ups
                                                   : example.biases;
      if (is_short) {
        pointers.pop_back();
      } else {
        pointers.back() = nullptr;
      }
      Merged merged;
      fill(merged.down, 3);
      try {
        mole::soft_merge<double>(example.gate, example.params(), example.scale, merged.views());
        FAIL_CHECK("accepted");
      } catch (const mole::Error& error) {
        INFO(error.what());
        CHECK(error.code() ==
              (is_short ? mole::Errc::shape_mismatch : mole::Errc::invalid_argument));
      }
      CHECK(is_full_of(merged.down, 3));
    }
  }
}

TEST_CASE("The gradients of a soft merge must have the shapes of the experts", "[algebra]") {
  using mole::Errc;
  using Params = mole::LoraBankParams<double>;
  const std::vector<Index> low = {kRank, kRank, kRank - 1};
  check_backward_refuses(Errc::shape_mismatch, [&](Params&, Params& grad) { grad.rank = low; });
  check_backward_refuses(Errc::shape_mismatch, [](Params&, Params& grad) { --grad.in; });
  check_backward_refuses(Errc::shape_mismatch, [](Params&, Params& grad) { --grad.out; });
  check_backward_refuses(Errc::invalid_argument,
                         [](Params&, Params& grad) { grad.down_stride = kIn - 1; });
  check_backward_refuses(Errc::invalid_argument,
                         [](Params&, Params& grad) { grad.up_stride = kRank - 1; });
  check_backward_refuses(Errc::shape_mismatch,
                         [](Params& experts, Params&) { experts.up = experts.up.first(2); });
}

TEST_CASE("The gate 0 keeps an expert's NaN out of a soft merge and its gradients", "[algebra]") {
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  Example example;
  example.gate[1] = 0;
  const Merged clean = merge(example);
  for (Index i = 0; i < kIn; ++i) example.down(kRank, i) = kNaN;
  example.up(kOut, 0) = example.bias(1, 0) = kInfinity;
  const Merged merged = merge(example);
  CHECK(test::bit_difference(merged.down, clean.down) == "");
  CHECK(test::bit_difference(merged.up, clean.up) == "");
  CHECK(test::bit_difference(merged.bias, clean.bias) == "");

  Merged incoming;
  fill(incoming.down, kInfinity);
  fill(incoming.up, 1);
  fill(incoming.bias, kNaN);
  Example sound, grad;
  sound.gate[1] = 0;
  for (Matrix<double>* m : {&grad.down, &grad.up, &grad.bias}) fill(*m, 8);
  std::vector<double> dgate(kExperts, 0.0);
  mole::soft_merge_backward<double>(sound.gate, sound.params(), sound.scale,
                                    {incoming.down, incoming.up, incoming.bias}, dgate,
                                    grad.params());
  for (Index i = 0; i < kIn; ++i) CHECK(grad.down(kRank, i) == 8);
  CHECK(grad.bias(1, 2) == 8);
  CHECK(std::isinf(grad.down(0, 0)));
  CHECK_FALSE(std::isfinite(dgate[1]));  // the derivative of the gate itself is what it is
}
