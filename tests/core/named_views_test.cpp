// SPDX-License-Identifier: Apache-2.0
#include "mole/core/named_views.hpp"

#include <algorithm>
#include <string>
#include <vector>

#include "mole/core/placed.hpp"
#include "support/catch.hpp"

using mole::Errc;
using mole::Error;
using mole::Index;
using mole::Leaf;
using mole::MatView;
using mole::NamedViews;

namespace {

template <class V>
struct Pair {
  MatView<V> a, b;
  template <class F, class... P>
  static void visit(F&& f, P&... p) {
    f(Leaf{"a"}, p.a...);
    f(Leaf{"b"}, p.b...);
  }
};

template <class V>
struct Nested {
  Pair<V> first;
  MatView<V> last;
  template <class F, class... P>
  static void visit(F&& f, P&... p) {
    mole::visit_group<Pair<V>>(Leaf{"first"}, f, p.first...);
    f(Leaf{"last"}, p.last...);
  }
};

struct Many {
  std::vector<MatView<float>> views = std::vector<MatView<float>>(mole::kMostNamedViews + 1);
  template <class F, class... P>
  static void visit(F&& f, P&... p) {
    for (std::size_t i = 0; i <= mole::kMostNamedViews; ++i) {
      f(Leaf{"v", static_cast<Index>(i)}, p.views[i]...);
    }
  }
};

/// As many tensors as it happens to have.
struct Listed {
  std::vector<MatView<float>> views;
  template <class F, class... P>
  static void visit(F&& f, P&... p) {
    const std::size_t count = std::min({p.views.size()...});
    for (std::size_t i = 0; i < count; ++i) f(Leaf{"v", static_cast<Index>(i)}, p.views[i]...);
  }
};

template <class F>
std::string thrown(F&& call) {
  try {
    call();
  } catch (const Error& error) {
    return std::string(name(error.code())) + ": " + error.what();
  }
  return "nothing";
}

template <class P>
std::string listing(const P& params) {
  std::string text;
  P::visit(
      [&](const Leaf& leaf, const auto& view) {
        text += leaf.path() + " " + std::to_string(view.rows) + "x" + std::to_string(view.cols);
        text += ";";
      },
      params);
  return text;
}

}  // namespace

TEST_CASE("named views have the paths, the order and the memory of the struct they are of") {
  float memory[12] = {};
  Nested<float> nested{{{memory, 2, 3}, {}}, {memory + 6, 1, 5}};
  const auto views = NamedViews<float>::of(nested);
  CHECK(listing(views) == "first.a 2x3;first.b 0x0;last 1x5;");
  CHECK(listing(views) == listing(nested));
  CHECK(views.at("last").data == memory + 6);
  mole::params::zip([](float& value) { value = 2; }, views);
  CHECK((memory[0] == 2 && memory[10] == 2 && memory[11] == 0));
  const auto back = views.to<Nested<float>>();
  CHECK((back.first.a.data == memory && back.last.cols == 5));
  CHECK(mole::params::count(views) == 11);

  const NamedViews<const float> constant = views;
  CHECK(listing(constant.to<Nested<const float>>()) == listing(nested));
}

TEST_CASE("views without names take those of the others, other names are refused") {
  float memory[6] = {1, 2, 3, 4, 5, 6}, copy[6] = {};
  const auto from = NamedViews<float>::of(Pair<float>{{memory, 2, 2}, {memory + 4, 1, 2}});
  NamedViews<float> empty,
      target = NamedViews<float>::of(Pair<float>{{copy, 2, 2}, {copy + 4, 1, 2}});
  mole::params::copy(from, target);
  CHECK((copy[3] == 4 && copy[5] == 6));
  CHECK(empty.paths().empty());
  NamedViews<float>::visit([](const Leaf&, const auto& view, auto& to) { to = view; }, from, empty);
  CHECK(listing(empty) == "a 2x2;b 1x2;");

  const NamedViews<float> none;
  CHECK(listing(none) == "");
  CHECK(thrown([&] { mole::params::copy(from, none); }) ==
        "shape_mismatch: a: expected [2, 2], got [0, 0]");
  CHECK(none.to<Nested<float>>().last.data == nullptr);
  CHECK(thrown([&] { from.to<Nested<float>>(); }) ==
        "shape_mismatch: parameters: expected first.a, first.b, last, got a, b");
  const auto nested = NamedViews<float>::of(Nested<float>{});
  CHECK(thrown([&] { mole::params::require_same_shapes(from, nested); }) ==
        "shape_mismatch: parameters: expected a, b, got first.a, first.b, last");
  CHECK(thrown([&] { from.at("c"); }) == "not_found: there is no tensor c, expected one of a, b");
  CHECK(thrown([&] { none.at("c"); }) == "not_found: there is no tensor c, expected one of none");
  CHECK(thrown([&] { NamedViews<float>::of(Many()); }) ==
        "limit_exceeded: named views: 13 tensors, at most 12 have room");
}

TEST_CASE("a struct whose tensors depend on its contents has no named views") {
  CHECK(NamedViews<float>::of(Listed()).paths().empty());
  for (const std::size_t count : {std::size_t{1}, mole::kMostNamedViews + 1}) {
    const Listed listed{std::vector<MatView<float>>(count)};
    CHECK(thrown([&] {
            NamedViews<float>::of(listed);
          }).starts_with("unsupported: named views: how many tensors there are depends"));
  }
}

TEST_CASE("a placed object is found by its type alone") {
  mole::Buffer block(mole::Placed::bytes<Index>());
  mole::Workspace memory(block.span());
  const mole::Placed placed(memory, Index{7});
  REQUIRE(placed.get<Index>() != nullptr);
  CHECK(*placed.get<Index>() == 7);
  CHECK(placed.get<double>() == nullptr);
  CHECK(mole::Placed().get<Index>() == nullptr);
  mole::Workspace full;
  CHECK(thrown([&] { mole::Placed(full, Index{8}); }).starts_with("out_of_memory: "));
}
