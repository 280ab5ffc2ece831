// SPDX-License-Identifier: Apache-2.0
// PrototypeRouter: every expert has a prototype, a token goes to those it is most like.
//
//   l = scale · cos(u, p_e) (+ overrides)     u = x, or x Qᵀ     S = the k largest, ties to the
//   lower expert
//
//   weight                   g on S                  prob, what losses see
//   cosine                   l, may be negative      softmax(l)
//   sigmoid                  σ(l)                    softmax(σ(l))
//   softmax                  softmax(l)              softmax(l)
//   softmax_of_selected      softmax of l over S     softmax(l)
//   unit                     1                       softmax(l)
//
// Shapes: x [tokens, width], Q [projection, width] if there is one, prototypes p [experts, width of
// u], one row less with an unconditional expert: tokens with the id `unconditional_id` have the
// last expert with gate 1 and no gradient, others never have it. The selection is a constant in
// backward; a prototype that is never chosen moves only by losses.
//
// ProMoE (Wei et al., "Routing Matters in MoE: Scaling Diffusion Transformers with Explicit
// Routing Guidance", 2025): cosine, k = 1, with routing_contrastive_loss
// (losses/routing_contrastive.hpp). Adapter banks that are looked up by key (Uni-RAG): x the query,
// prototypes the keys, k = experts with softmax, or the best k. X-MoE (Chi et al., "On the
// Representation Collapse of Sparse Mixture of Experts", 2022): a projection, a learned scale.
#pragma once

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/routing/head_router.hpp"
#include "mole/routing/prototype_rule.hpp"

namespace mole::inline MOLE_ABI {

template <class T>
class PrototypeRouter : public HeadRouter<T, PrototypeHead<T>, PrototypeRule<T>> {
 public:
  struct Config {
    Index width = 0;
    Index experts = 0;  ///< the unconditional one included
    Index k = 1;        ///< 1 ... experts with a prototype
    PrototypeWeight weight = PrototypeWeight::cosine;
    T scale = T(1);
    bool learned_scale = false;  ///< the scale is a parameter
    Index projection = 0;        ///< width in which tokens and prototypes are compared; 0: of x
    bool unconditional = false;  ///< the last expert is for tokens with unconditional_id
    std::int32_t unconditional_id = -1;

    static constexpr std::string_view kind() noexcept { return "prototype"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field::required("k"), c.k...);
      f(Field{"weight"}, c.weight...);
      f(Field{"scale"}, c.scale...);
      f(Field{"learned_scale"}, c.learned_scale...);
      f(Field{"projection"}, c.projection...);
      f(Field{"unconditional"}, c.unconditional...);
      f(Field{"unconditional_id"}, c.unconditional_id...);
    }
  };

  /// Throws invalid_argument, naming the field.
  explicit PrototypeRouter(const Config& config)
      : HeadRouter<T, PrototypeHead<T>, PrototypeRule<T>>(
            prototype_head<T>("PrototypeRouter", config),
            {config.k, config.weight, config.unconditional}),
        config_(config) {
    require_field(config.k >= 1 && config.k <= this->head().prototypes.experts, "PrototypeRouter",
                  "k", "1 ... experts with a prototype", config.k);
  }

  const Config& config() const noexcept { return config_; }

 private:
  Config config_;
};

#ifndef MOLE_HEADER_ONLY
extern template class HeadRouter<float, PrototypeHead<float>, PrototypeRule<float>>;
extern template class HeadRouter<double, PrototypeHead<double>, PrototypeRule<double>>;
#endif

static_assert(Router<PrototypeRouter<float>>);
static_assert(Router<PrototypeRouter<double>>);

}  // namespace mole::inline MOLE_ABI
