// SPDX-License-Identifier: Apache-2.0
#include "mole/algebra/soft_merge.hpp"

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

Merged merge(Example& example) {
  Merged merged;
  mole::soft_merge<double>(example.gate, example.params(), example.scale, merged.views());
  return merged;
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
  for (Matrix<double>* m : {&grad.down, &grad.up, &grad.bias}) {
    for (Index r = 0; r < m->rows(); ++r) std::ranges::fill(m->view().row(r), 8.0);
  }
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
