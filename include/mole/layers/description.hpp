// SPDX-License-Identifier: Apache-2.0
// Descriptions of layers: their own fields, and the descriptions of what they are made of.
//
//   mixture         router, experts
//   adapted_linear  fan_in_fan_out; mixture
#pragma once

#include <concepts>
#include <string>
#include <string_view>
#include <utility>

#include "mole/core/describe.hpp"
#include "mole/layers/adapted_linear.hpp"
#include "mole/layers/lora.hpp"
#include "mole/layers/mixture.hpp"

namespace mole::inline MOLE_ABI {

namespace detail {

/// from_description of a part. Throws config_error if it is missing.
template <class X>
X part_from_description(const Description& whole, std::string_view name) {
  const Description* part = whole.part(name);
  require(part != nullptr, Errc::config_error, shown(whole.kind), ": part ", shown(name),
          " is missing");
  return from_description<X>(*part);
}

}  // namespace detail

template <Router R, ExpertBank B>
requires std::same_as<typename R::Scalar, typename B::Scalar>
struct DescriptionOf<Mixture<R, B>> {
  static constexpr std::string_view kKind = "mixture";

  static Description describe(const Mixture<R, B>& layer) {
    return {.kind = std::string(kKind),
            .fields = {},
            .parts = {{"router", mole::describe(layer.router())},
                      {"experts", mole::describe(layer.experts())}}};
  }
  /// Throws config_error for another kind, fields, or other parts.
  static void require_form(const Description& description) {
    detail::require_kind(description, kKind);
    detail::require_known(description, {}, {"router", "experts"});
  }
  static Mixture<R, B> build(const Description& description) {
    require_form(description);
    R router = detail::part_from_description<R>(description, "router");
    B experts = detail::part_from_description<B>(description, "experts");
    return detail::as_config_error(
        kKind, [&] { return Mixture<R, B>(std::move(router), std::move(experts)); });
  }
};

/// A Lora is described as the mixture that it is.
template <class T, class W>
struct DescriptionOf<Lora<T, W>> {
  using Base = Mixture<UnitRouter<T>, LoraBank<T, W>>;

  static Description describe(const Lora<T, W>& layer) {
    return DescriptionOf<Base>::describe(layer);
  }
  static Lora<T, W> build(const Description& description) {
    return Lora<T, W>(DescriptionOf<Base>::build(description).experts().config());
  }
};

template <class M>
struct DescriptionOf<AdaptedLinear<M>> {
  using Config = typename AdaptedLinear<M>::Config;

  static Description describe(const AdaptedLinear<M>& layer) {
    Description description = describe_config(layer.config());
    description.parts.push_back({"mixture", mole::describe(layer.mixture())});
    return description;
  }
  /// The config without the parts. Throws config_error, also for other parts.
  static Config own_config(const Description& description) {
    detail::require_known(description, detail::field_names<Config>(), {"mixture"});
    return config_from_description<Config>(
        {.kind = description.kind, .fields = description.fields, .parts = {}});
  }
  static AdaptedLinear<M> build(const Description& description) {
    const Config config = own_config(description);
    return AdaptedLinear<M>(detail::part_from_description<M>(description, "mixture"), config);
  }
};

}  // namespace mole::inline MOLE_ABI
