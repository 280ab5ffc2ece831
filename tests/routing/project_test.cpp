// SPDX-License-Identifier: Apache-2.0
#include "mole/routing/project.hpp"

#include <cmath>
#include <limits>
#include <string>

#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/matrix.hpp"
#include "support/reference.hpp"

namespace {

using mole::Index;
using mole::LinearParams;
using test::Matrix;

constexpr Index kTokens = 53, kWidth = 131, kExperts = 67;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

template <class T>
struct Layer {
  Matrix<T> x = test::random_matrix<T>(kTokens, kWidth, 1);
  Matrix<T> weight = test::random_matrix<T>(kExperts, kWidth, 2);
  Matrix<T> bias = test::random_matrix<T>(1, kExperts, 3);
  Matrix<T> dlogits = test::random_matrix<T>(kTokens, kExperts, 4);
  Matrix<T> dx{kTokens, kWidth}, dweight{kExperts, kWidth}, dbias{1, kExperts};

  Matrix<T> logits() const {
    const mole::Linear<T> head{kWidth, kExperts, true};
    mole::Buffer memory(head.prepared_bytes());
    mole::Workspace workspace(memory.span());
    const auto prepared = head.prepare({weight, bias}, workspace);
    Matrix<T> out(kTokens, kExperts);
    mole::stages::project<T>(prepared, x, out, mole::Context{workspace});
    CHECK(out.padding_is_intact());
    return out;
  }
  void backward() {
    mole::Buffer memory(mole::stages::project_backward_bytes(kExperts));
    mole::Workspace workspace(memory.span());
    mole::stages::project_backward<T>({weight, bias}, x, dlogits, dx.view(),
                                      LinearParams<T>{dweight.view(), dbias.view()},
                                      mole::Context{workspace});
    CHECK((dx.padding_is_intact() && dweight.padding_is_intact() && dbias.padding_is_intact()));
  }
};

template <class T>
Matrix<double> transposed(const Matrix<T>& m) {
  return Matrix<double>(m.cols(), m.rows(), [&](Index r, Index c) { return m(c, r); });
}

}  // namespace

TEST_CASE("project is x Wᵀ + b", "[routing]") {
  const Layer<double> layer;
  const auto want =
      test::reference::logits(layer.x, layer.weight, test::reference::row_of(layer.bias, 0));
  CHECK(test::difference(layer.logits(), want, {1e-13, 1e-13}) == "");
  const Layer<float> single;
  CHECK(test::difference(single.logits(), want, {1e-5, 1e-5}) == "");
}

TEST_CASE("project_backward adds all three gradients", "[routing]") {
  Layer<double> layer;
  layer.dx(1, 2) = layer.dweight(1, 2) = layer.dbias(0, 2) = 100;
  layer.backward();
  layer.dx(1, 2) -= 100, layer.dweight(1, 2) -= 100, layer.dbias(0, 2) -= 100;
  // x Wᵀ with other roles: dx = dlogits W, dW = dlogitsᵀ x, db = dlogitsᵀ 1.
  const auto dx = test::reference::logits(layer.dlogits, transposed(layer.weight), {});
  CHECK(test::difference(layer.dx, dx, {1e-12, 1e-12}) == "");
  const auto dweight = test::reference::logits(transposed(layer.dlogits), transposed(layer.x), {});
  CHECK(test::difference(layer.dweight, dweight, {1e-12, 1e-12}) == "");
  const Matrix<double> ones(1, kTokens, [](Index, Index) { return 1; });
  const auto dbias = test::reference::logits(ones, transposed(layer.dlogits), {});
  CHECK(test::difference(layer.dbias, dbias, {1e-12, 1e-12}) == "");
}

TEST_CASE("tokens and experts without gradient may hold anything", "[routing]") {
  Layer<double> clean, dirty;
  for (Index e = 0; e < kExperts; ++e) clean.dlogits(7, e) = dirty.dlogits(7, e) = 0;
  for (Index t = 0; t < kTokens; ++t) {
    clean.dlogits(t, 0) = dirty.dlogits(t, 0) = 0;
    clean.dlogits(t, 30) = dirty.dlogits(t, 30) = 0;
  }
  dirty.x(7, 3) = kNan;
  dirty.weight(0, 1) = dirty.weight(30, 130) = std::numeric_limits<double>::infinity();
  clean.backward();
  dirty.backward();
  CHECK(test::bit_difference(dirty.dx, clean.dx) == "");
  CHECK(test::bit_difference(dirty.dweight, clean.dweight) == "");
  CHECK(test::bit_difference(dirty.dbias, clean.dbias) == "");
}

TEST_CASE("prepared weights are a copy", "[routing]") {
  const mole::Linear<float> head{3, 2, true};
  Matrix<float> weight(2, 3, [](Index, Index) { return 1; }), bias(1, 2);
  mole::Buffer memory(head.prepared_bytes());
  mole::Workspace workspace(memory.span());
  const auto prepared = head.prepare({weight, bias}, workspace);
  weight(0, 0) = bias(0, 0) = 100;
  const Matrix<float> x(1, 3, [](Index, Index) { return 1; });
  Matrix<float> logits(1, 2);
  mole::stages::project<float>(prepared, x, logits.view(), mole::Context{workspace});
  CHECK(logits(0, 0) == 3);
}

TEST_CASE("the gradient of a bias is refused where there is no bias", "[routing]") {
  Matrix<double> bias(1, kExperts);
  const LinearParams<double> grad{{}, bias.view()};
  CHECK_NOTHROW(mole::Linear<double>{kWidth, kExperts, true}.check_gradient(grad));
  try {
    mole::Linear<double>{kWidth, kExperts, false}.check_gradient(grad);
    FAIL("accepted");
  } catch (const mole::Error& error) {
    CHECK(error.code() == mole::Errc::shape_mismatch);
    CHECK(std::string(error.what()) == "grad.bias: expected [0, 0], got [1, 67]");
  }
}
