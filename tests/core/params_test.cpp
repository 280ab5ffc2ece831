// SPDX-License-Identifier: Apache-2.0
#include "mole/core/params.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <vector>

#include "support/catch.hpp"

using mole::bf16;
using mole::Errc;
using mole::Index;
using mole::Leaf;
using mole::MatView;

namespace params = mole::params;

namespace {

template <class V>
struct Pair {
  MatView<V> down, up;

  template <class F, class... P>
  static void visit(F&& f, P&... p) {
    f(Leaf{"down"}, p.down...);
    f(Leaf{"up"}, p.up...);
  }
};

/// A matrix of its own and two experts in a group.
template <class V>
struct Layer {
  MatView<V> weight;
  std::array<Pair<V>, 2> experts;

  template <class F, class... P>
  static void visit(F&& f, P&... p) {
    f(Leaf{"weight"}, p.weight...);
    const Leaf group{"experts"};
    for (std::size_t e = 0; e < 2; ++e) {
      const auto named = [&](Leaf leaf, auto&... views) {
        leaf.index = static_cast<Index>(e);
        f(leaf, views...);
      };
      mole::visit_group<Pair<V>>(group, named, p.experts[e]...);
    }
  }
};

/// A Layer in a group of its own.
template <class V>
struct Block {
  Layer<V> layer;

  template <class F, class... P>
  static void visit(F&& f, P&... p) {
    mole::visit_group<Layer<V>>(Leaf{"layers", 7}, f, p.layer...);
  }
};

constexpr Index kRows = 3, kCols = 5, kStride = 7;

/// Memory of one Layer; every matrix is a window with a stride, and the gaps hold a mark.
template <class V>
class Model {
 public:
  explicit Model(V value, V mark) : mark_(mark), memory_(5 * kRows * kStride, mark) {
    V* next = memory_.data();
    for (MatView<V>* view : views()) {
      *view = {next, kRows, kCols, kStride};
      for (Index r = 0; r < kRows; ++r) std::fill_n(&(*view)(r, 0), kCols, value);
      next += kRows * kStride;
    }
  }
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  std::array<MatView<V>*, 5> views() {
    return {&layer.weight, &layer.experts[0].down, &layer.experts[0].up, &layer.experts[1].down,
            &layer.experts[1].up};
  }
  /// Every element of every matrix has this value, and the gaps still hold the mark.
  bool is_all(V value) {
    for (std::size_t i = 0; i < memory_.size(); ++i) {
      const bool gap = static_cast<Index>(i) % kStride >= kCols;
      if (!(memory_[i] == (gap ? mark_ : value))) return false;
    }
    return true;
  }
  const std::vector<V>& memory() const { return memory_; }

  Layer<V> layer;

 private:
  V mark_;
  std::vector<V> memory_;
};

Layer<const float> read_only(const Layer<float>& layer) {
  Layer<const float> result;
  result.weight = layer.weight;
  for (std::size_t e = 0; e < 2; ++e) {
    result.experts[e] = {layer.experts[e].down, layer.experts[e].up};
  }
  return result;
}

std::vector<std::string> paths(const Layer<float>& layer) {
  std::vector<std::string> result;
  Layer<float>::visit([&](const Leaf& leaf, const auto&) { result.push_back(leaf.path()); }, layer);
  return result;
}

}  // namespace

TEST_CASE("the path of a leaf joins groups, index and name") {
  const Leaf layers{"layers"}, router{"router", 3, &layers}, weight{"weight", -1, &router};
  CHECK(Leaf{"weight"}.path() == "weight");
  CHECK((Leaf{"down", 4}.path()) == "4.down");
  CHECK(router.path() == "layers.3.router");
  CHECK(weight.path() == "layers.3.router.weight");
}

TEST_CASE("visit names every tensor once, in order, groups included") {
  Model<float> model(1, -1);
  CHECK(paths(model.layer) == std::vector<std::string>{"weight", "experts.0.down", "experts.0.up",
                                                       "experts.1.down", "experts.1.up"});
}

TEST_CASE("groups inside groups keep all their names") {
  const Block<float> block;
  std::vector<std::string> paths;
  mole::visit_group<Block<float>>(
      Leaf{"model"}, [&](const Leaf& leaf, const auto&) { paths.push_back(leaf.path()); }, block);
  CHECK(paths == std::vector<std::string>{"model.7.layers.weight", "model.7.layers.experts.0.down",
                                          "model.7.layers.experts.0.up",
                                          "model.7.layers.experts.1.down",
                                          "model.7.layers.experts.1.up"});
}

TEST_CASE("zero clears every element and nothing between the rows") {
  Model<float> model(3, -1);
  params::zero(model.layer);
  CHECK(model.is_all(0));
  Model<double> wide(3, -1);
  params::zero(wide.layer);
  CHECK(wide.is_all(0));
}

TEST_CASE("zero clears half-precision weights") {
  std::vector<bf16> memory(6, bf16(2.0f));
  const Pair<bf16> pair{{memory.data(), 1, 3}, {memory.data() + 3, 3, 1}};
  params::zero(pair);
  for (const bf16 value : memory) CHECK(value.bits == 0);
}

TEST_CASE("copy writes every element and nothing between the rows") {
  Model<float> from(2.5f, -1), to(0, -2);
  params::copy(read_only(from.layer), to.layer);
  CHECK(to.is_all(2.5f));
  CHECK(from.is_all(2.5f));
  Model<double> wide(0, -3);
  params::copy(from.layer, wide.layer);
  CHECK(wide.is_all(2.5));
}

TEST_CASE("count is the number of scalars") {
  Model<float> model(1, -1);
  CHECK(params::count(model.layer) == 5 * kRows * kCols);
  CHECK(params::count(Layer<float>{}) == 0);
}

TEST_CASE("norm is the Euclidean norm over all scalars") {
  Model<float> model(2, 1000);
  CHECK(params::norm(model.layer) == Catch::Approx(2 * std::sqrt(75.0)));
  CHECK(params::norm(read_only(model.layer)) == params::norm(model.layer));
  std::vector<bf16> memory = {bf16(3.0f), bf16(4.0f)};
  const Pair<const bf16> pair{{memory.data(), 1, 1}, {memory.data() + 1, 1, 1}};
  CHECK(params::norm(pair) == 5);
  Model<float> large(1e30f, 0);
  CHECK(params::norm(large.layer) == Catch::Approx(1e30 * std::sqrt(75.0)));
}

TEST_CASE("zip walks the elements of several structs together") {
  Model<float> value(2, -1), gradient(3, -1), moment(5, -1);
  int calls = 0;
  params::zip(
      [&](float& v, const float& g, float& m) {
        m += g;
        v -= m;
        ++calls;
      },
      value.layer, read_only(gradient.layer), moment.layer);
  CHECK(calls == 75);
  CHECK(moment.is_all(8));
  CHECK(value.is_all(-6));
  CHECK(gradient.is_all(3));
}

TEST_CASE("zip visits elements in the order of visit, row by row") {
  Model<float> model(0, -1);
  float next = 0;
  params::zip([&](float& value) { value = next++; }, model.layer);
  CHECK(model.layer.weight(0, 0) == 0);
  CHECK(model.layer.weight(1, 0) == kCols);
  CHECK(model.layer.experts[1].up(2, 4) == 74);
}

TEST_CASE("structs of other shapes are refused before anything is written") {
  Model<float> from(1, -1), to(2, -2);
  const auto before = to.memory();
  SECTION("rows") {
    to.layer.experts[1].up.rows = kRows - 1;
    CHECK_THROWS_WITH(params::copy(from.layer, to.layer),
                      "experts.1.up: expected [3, 5], got [2, 5]");
  }
  SECTION("columns") {
    to.layer.experts[1].up.cols = kCols + 1;
    CHECK_THROWS_WITH(params::copy(from.layer, to.layer),
                      "experts.1.up: expected [3, 5], got [3, 6]");
  }
  SECTION("memory") {
    to.layer.experts[1].up.data = nullptr;
    CHECK_THROWS_AS(params::copy(from.layer, to.layer), mole::Error);
  }
  SECTION("stride") {
    to.layer.experts[1].up.stride = kCols - 1;
    CHECK_THROWS_AS(params::copy(from.layer, to.layer), mole::Error);
  }
  SECTION("the third of three") {
    Model<float> last(3, -3);
    last.layer.experts[1].up.rows = kRows - 1;
    const auto last_before = last.memory();
    int calls = 0;
    CHECK_THROWS_AS(
        params::zip([&](float&, float&, float&) { ++calls; }, from.layer, to.layer, last.layer),
        mole::Error);
    CHECK(calls == 0);
    CHECK(last.memory() == last_before);
  }
  CHECK(to.memory() == before);
  CHECK(from.is_all(1));
}
