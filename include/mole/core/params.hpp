// SPDX-License-Identifier: Apache-2.0
// Parameters are structs of views with one static `visit`:
//
//   template <class F, class... P>
//   static void visit(F&& f, P&... p) { f(Leaf{"weight"}, p.weight...); }
//
// The same struct is weights, gradients and optimiser moments. `visit` with one argument zeroes,
// counts or saves; with two it copies; with four it is a step of AdamW.
#pragma once

#include <cmath>
#include <string>
#include <string_view>

#include "mole/core/config.hpp"
#include "mole/core/error.hpp"
#include "mole/core/half.hpp"
#include "mole/core/view.hpp"

namespace mole::inline MOLE_ABI {

/// Where a tensor stands in a parameter struct: a name, the expert it belongs to if any, the group
/// around it. `path()` joins them with dots, for example "experts.3.down".
struct Leaf {
  std::string_view name;
  Index index = -1;
  const Leaf* group = nullptr;

  std::string path() const {
    std::string text = group != nullptr ? group->path() : std::string();
    if (group != nullptr) text += '.';
    if (index >= 0) text += std::to_string(index) + ".";
    return text.append(name);
  }
};

/// Visits the members of `part` (the same member of several structs) below a group name. Groups
/// may have groups inside, four deep.
template <class Part, class F, class... P>
void visit_group(const Leaf& group, F&& f, P&... parts) {
  Part::visit(
      [&](Leaf leaf, auto&&... views) {
        Leaf chain[4];  // copies of the groups that the leaf is in, the nearest first
        Leaf* last = &leaf;
        for (Leaf* next = chain; last->group != nullptr; ++next) {
          require(next != chain + 4, Errc::internal, "parameters are grouped more than four deep");
          *next = *last->group;
          last->group = next;
          last = next;
        }
        last->group = &group;
        f(leaf, views...);
      },
      parts...);
}

namespace params {

/// require_shape with the path of the tensor in the message; no text is made unless it fails.
template <class T>
void require_leaf_shape(const Leaf& leaf, const MatView<T>& view, Index rows, Index cols) {
  const bool usable = view.empty() || (view.data != nullptr && view.stride >= cols);
  if (view.rows != rows || view.cols != cols || !usable) {
    require_shape(leaf.path(), view, rows, cols);
  }
}

/// Throws shape_mismatch unless every tensor of `more` has the shape it has in `first`.
template <class P, class... More>
void require_same_shapes(const P& first, const More&... more) {
  P::visit(
      [](const Leaf& leaf, const auto& view, const auto&... views) {
        (require_leaf_shape(leaf, views, view.rows, view.cols), ...);
      },
      first, more...);
}

/// f(element references...) for every element, all structs walked together.
/// Throws shape_mismatch, and then f was not called.
template <class F, class P, class... More>
void zip(F&& f, const P& first, const More&... more) {
  require_same_shapes(first, more...);
  P::visit(
      [&](const Leaf&, const auto& view, const auto&... views) {
        for (Index r = 0; r < view.rows; ++r) {
          for (Index c = 0; c < view.cols; ++c) f(view(r, c), views(r, c)...);
        }
      },
      first, more...);
}

template <class P>
void zero(const P& p) {
  zip([](auto& value) { value = std::remove_reference_t<decltype(value)>{}; }, p);
}

template <class From, class To>
void copy(const From& from, const To& to) {
  zip([](const auto& source, auto& target) { target = source; }, from, to);
}

/// Number of scalars.
template <class P>
Index count(const P& p) {
  Index total = 0;
  P::visit([&](const Leaf&, const auto& view) { total += view.size(); }, p);
  return total;
}

/// Euclidean norm over all scalars, summed in double in the order of `visit`.
template <class P>
double norm(const P& p) {
  double sum = 0;
  zip(
      [&](const auto& value) {
        const double v = widen<double>(value);
        sum = std::fma(v, v, sum);
      },
      p);
  return std::sqrt(sum);
}

}  // namespace params

}  // namespace mole::inline MOLE_ABI
