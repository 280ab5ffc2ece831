// SPDX-License-Identifier: Apache-2.0
// NamedViews: parameters whose names are known only at run time. Holds the views of any parameter
// struct and is one itself, with the same paths in the same order.
//
//   auto views = NamedViews<float>::of(params);      views.at("router.weight")(0, 0) = 1;
//   LinearParams<float> same = views.to<LinearParams<float>>();
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "mole/core/config.hpp"
#include "mole/core/error.hpp"
#include "mole/core/params.hpp"
#include "mole/core/view.hpp"

namespace mole::inline MOLE_ABI {

/// Most tensors that a NamedViews holds.
inline constexpr std::size_t kMostNamedViews = 12;

/// The paths of the tensors of a parameter struct, in the order of its `visit`. They are made at
/// the first call for P. Throws limit_exceeded above kMostNamedViews.
template <class P>
const std::vector<std::string>& leaf_paths() {
  static const std::vector<std::string> paths = [] {
    std::vector<std::string> found;
    P none{};
    P::visit([&](const Leaf& leaf, const auto&) { found.push_back(leaf.path()); }, none);
    require(found.size() <= kMostNamedViews, Errc::limit_exceeded, "named views: ", found.size(),
            " tensors, at most ", kMostNamedViews, " have room");
    return found;
  }();
  return paths;
}

template <class V>
class NamedViews {
 public:
  /// Without names: every tensor is absent.
  NamedViews() = default;

  /// The views of a parameter struct. Throws limit_exceeded above kMostNamedViews, unsupported if
  /// an empty struct of its type visits fewer tensors.
  template <class P>
  static NamedViews of(const P& params) {
    NamedViews views;
    views.paths_ = &leaf_paths<P>();
    std::size_t i = 0;
    P::visit(
        [&](const Leaf&, const auto& view) {
          views.require_room(i);
          views.views_[i++] = view;
        },
        params);
    return views;
  }

  /// The struct P with these views. Throws shape_mismatch unless the names are those of P, or there
  /// are none.
  template <class P>
  P to() const {
    P params{};
    if (paths_ == nullptr) return params;
    require_same_paths(leaf_paths<P>());
    std::size_t i = 0;
    P::visit(
        [&](const Leaf&, auto& view) {
          require_room(i);
          view = views_[i++];
        },
        params);
    return params;
  }

  std::span<const std::string> paths() const noexcept {
    return paths_ == nullptr ? std::span<const std::string>() : *paths_;
  }

  /// A tensor by its path. Throws not_found, naming those that there are.
  const MatView<V>& at(std::string_view path) const {
    const auto names = paths();
    const auto place = std::ranges::find(names, path);
    if (place != names.end()) return views_[static_cast<std::size_t>(place - names.begin())];
    fail(Errc::not_found, "there is no tensor ", path, ", expected one of ", joined(names));
  }

  operator NamedViews<const V>() const noexcept  // NOLINT(google-explicit-constructor)
      requires(!std::is_const_v<V>) {
    NamedViews<const V> views;
    views.paths_ = paths_;
    std::ranges::copy(views_, views.views_.begin());
    return views;
  }

  /// Those without names take the names of the others. Throws shape_mismatch if names differ.
  template <class F, class... P>
  static void visit(F&& f, P&... p) {
    const std::vector<std::string>* paths = nullptr;
    ((paths = paths == nullptr ? p.paths_ : paths), ...);
    if (paths == nullptr) return;
    (p.take_paths(*paths), ...);
    for (std::size_t i = 0; i < paths->size(); ++i) f(Leaf{(*paths)[i]}, p.views_[i]...);
  }

 private:
  template <class>
  friend class NamedViews;

  static std::string joined(std::span<const std::string> names) {
    std::string text;
    for (const std::string& name : names) text.append(text.empty() ? "" : ", ").append(name);
    return text.empty() ? "none" : text;
  }
  void require_room(std::size_t i) const {
    require(i < paths_->size(), Errc::unsupported,
            "named views: how many tensors there are depends on their contents, expected always ",
            paths_->size());
  }
  void require_same_paths(const std::vector<std::string>& paths) const {
    if (paths_ == &paths || *paths_ == paths) return;
    fail(Errc::shape_mismatch, "parameters: expected ", joined(paths), ", got ", joined(*paths_));
  }
  void take_paths(const std::vector<std::string>& paths) const {
    if (paths_ != nullptr) require_same_paths(paths);
  }
  void take_paths(const std::vector<std::string>& paths) {
    if (paths_ != nullptr) return require_same_paths(paths);
    paths_ = &paths;
  }

  const std::vector<std::string>* paths_ = nullptr;  // of static lifetime
  std::array<MatView<V>, kMostNamedViews> views_ = {};
};

}  // namespace mole::inline MOLE_ABI
