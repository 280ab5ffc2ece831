// SPDX-License-Identifier: Apache-2.0
// AnyRouter: a router of any kind behind one type, for a choice made at run time (a file, the
// command line, another language). It is a Router itself, so that mixtures, sessions, files and
// training work with it; the bits are those of the router inside.
//
//   AnyRouter<float> router(description_from_json(text, "router.json"));
//   Mixture<AnyRouter<float>, LoraBank<float>> layer(router, bank);
//
// Parameters have the paths of the router inside ("weight", "side.bias"); buffers are one struct
// for all kinds. A file of a mixture does not say by which of the two types it was saved.
#pragma once

#include <concepts>
#include <memory>
#include <string_view>
#include <type_traits>
#include <utility>

#include "mole/core/config.hpp"
#include "mole/core/context.hpp"
#include "mole/core/describe.hpp"
#include "mole/core/named_views.hpp"
#include "mole/core/placed.hpp"
#include "mole/layers/any_router_buffers.hpp"
#include "mole/layers/kinds.hpp"
#include "mole/routing/router.hpp"

namespace mole::inline MOLE_ABI {

/// The tape of an AnyRouter.
template <class T>
struct AnyRouterTape : RouterTape<T> {
  NamedViews<T> more;  ///< the further tensors of the tape of the router inside
  Placed inside;       ///< that tape, where it is more than a RouterTape

  template <class F, class... P>
  static void visit(F&& f, P&... p) {
    RouterTape<T>::visit(f, p...);
    NamedViews<T>::visit(f, p.more...);
  }
};

template <class T>
class AnyRouter {
 public:
  using Scalar = T;
  using Config = Description;
  template <class V>
  using Params = NamedViews<V>;
  struct Prepared {
    Placed inside;
  };
  using Buffers = AnyRouterBuffers<T>;
  template <class V>
  using Carry = None;
  using Tape = AnyRouterTape<T>;
  // The least that is known without the kind; see decision_scope() and gradient_kind().
  static constexpr Scope scope = Scope::batch;
  static constexpr GradientKind gradient = GradientKind::straight_through;

  /// The router that is described, of any kind in RouterTypes. Throws unsupported, naming the known
  /// kinds; config_error for its fields.
  explicit AnyRouter(const Description& description);

  /// A router without carry. Throws unsupported if it has buffers that AnyRouterBuffers lacks.
  template <class R>
  requires(!std::same_as<R, AnyRouter>) &&
      Router<R>&& std::same_as<typename R::Scalar, T>&& std::same_as<
          typename R::template Carry<T>, None> explicit AnyRouter(R router)
      : self_(std::make_shared<const Model<R>>(std::move(router))) {}

  /// Empty for a router whose config has none.
  std::string_view kind() const noexcept { return self_->kind(); }
  /// The description of the router inside. Throws unsupported if its config lists no fields.
  Description config() const { return self_->describe(); }
  Scope decision_scope() const noexcept { return self_->decision_scope(); }
  GradientKind gradient_kind() const noexcept { return self_->gradient_kind(); }
  /// The router inside, or nullptr if it has another type.
  template <class R>
  const R* as() const noexcept {
    const auto* model = dynamic_cast<const Model<R>*>(self_.get());
    return model != nullptr ? &model->router : nullptr;
  }

  Index input_width() const noexcept { return self_->input_width(); }
  Index experts() const noexcept { return self_->experts(); }
  Index max_per_token() const noexcept { return self_->max_per_token(); }
  std::size_t params_bytes() const noexcept { return self_->params_bytes(); }
  std::size_t prepared_bytes() const noexcept { return self_->prepared_bytes(); }
  std::size_t scratch_bytes(Index max_tokens, int workers) const noexcept {
    return self_->scratch_bytes(max_tokens, workers);
  }
  std::size_t tape_bytes(Index max_tokens) const noexcept { return self_->tape_bytes(max_tokens); }

  /// Uninitialised.
  Params<T> make_params(Workspace& memory) const { return self_->make_params(memory); }
  /// Throws shape_mismatch for the parameters of another router.
  Prepared prepare(const Params<const T>& params, Workspace& memory) const {
    return self_->prepare(params, memory);
  }
  Tape make_tape(Workspace& memory, Index max_tokens) const {
    return self_->make_tape(memory, max_tokens);
  }

  /// Throws invalid_argument for buffers that the router inside does not read, and what it throws.
  void require_buffers(const Buffers& buffers) const { self_->require_buffers(buffers); }

  /// `prepared` and `tape` are made by this router or one of its type. Throws invalid_argument if
  /// they are not.
  void forward(const Prepared& prepared, const Buffers& buffers, const Tokens<T>& tokens,
               const Overrides<T>& overrides, None, RoutingTable<T>& table, None, Tape* tape,
               const Context& context) const {
    self_->forward(prepared, buffers, tokens, overrides, table, tape, context);
  }
  void backward(const Params<const T>& params, const Buffers& buffers, const Tape& saved,
                const Tokens<T>& tokens, const Overrides<T>& overrides, None,
                const Routing<T>& routing, const Tape& d_tape, None, MatView<T> dx,
                const Params<T>& grad, None, const Context& context) const {
    self_->backward(params, buffers, saved, tokens, overrides, routing, d_tape, dx, grad, context);
  }
  /// What `backward` checks before it adds anything.
  void require_backward(const Params<const T>& params, const Tape& saved, const Tokens<T>& tokens,
                        const Routing<T>& routing, const Tape& d_tape, MatView<T> dx,
                        const Params<T>& grad) const {
    self_->require_backward(params, saved, tokens, routing, d_tape, dx, grad);
  }

 private:
  struct Interface {
    virtual ~Interface() = default;
    virtual std::string_view kind() const noexcept = 0;
    virtual Description describe() const = 0;
    virtual Scope decision_scope() const noexcept = 0;
    virtual GradientKind gradient_kind() const noexcept = 0;
    virtual Index input_width() const noexcept = 0;
    virtual Index experts() const noexcept = 0;
    virtual Index max_per_token() const noexcept = 0;
    virtual std::size_t params_bytes() const noexcept = 0;
    virtual std::size_t prepared_bytes() const noexcept = 0;
    virtual std::size_t scratch_bytes(Index max_tokens, int workers) const noexcept = 0;
    virtual std::size_t tape_bytes(Index max_tokens) const noexcept = 0;
    virtual Params<T> make_params(Workspace& memory) const = 0;
    virtual Prepared prepare(const Params<const T>& params, Workspace& memory) const = 0;
    virtual Tape make_tape(Workspace& memory, Index max_tokens) const = 0;
    virtual void require_buffers(const Buffers& buffers) const = 0;
    virtual void forward(const Prepared& prepared, const Buffers& buffers, const Tokens<T>& tokens,
                         const Overrides<T>& overrides, RoutingTable<T>& table, Tape* tape,
                         const Context& context) const = 0;
    virtual void backward(const Params<const T>& params, const Buffers& buffers, const Tape& saved,
                          const Tokens<T>& tokens, const Overrides<T>& overrides,
                          const Routing<T>& routing, const Tape& d_tape, MatView<T> dx,
                          const Params<T>& grad, const Context& context) const = 0;
    virtual void require_backward(const Params<const T>& params, const Tape& saved,
                                  const Tokens<T>& tokens, const Routing<T>& routing,
                                  const Tape& d_tape, MatView<T> dx,
                                  const Params<T>& grad) const = 0;
  };

  template <class R>
  struct Model;

  std::shared_ptr<const Interface> self_;
};

template <class T>
template <class R>
struct AnyRouter<T>::Model final : AnyRouter<T>::Interface {
  using OwnParams = typename R::template Params<T>;
  using OwnConstParams = typename R::template Params<const T>;
  using OwnTape = typename R::Tape;
  static constexpr bool has_larger_tape = !std::is_same_v<OwnTape, RouterTape<T>>;

  /// The tensors of the tape that RouterTape has not.
  struct More {
    OwnTape tape;

    template <class F, class... P>
    static void visit(F&& f, P&... p) {
      OwnTape::visit(
          [&](const Leaf& leaf, auto&... views) {
            const bool is_base =
                leaf.group == nullptr && leaf.index < 0 &&
                (leaf.name == "logits" || leaf.name == "prob" || leaf.name == "gate");
            if (!is_base) f(leaf, views...);
          },
          p.tape...);
    }
  };

  /// Makes the lists of names, so that no later call does.
  explicit Model(R r) : router(std::move(r)) {
    require(detail::covers_buffers<T, typename R::Buffers>(), Errc::unsupported,
            "AnyRouter: a router of kind ", kind(), " has buffers that AnyRouterBuffers lacks");
    leaf_paths<OwnParams>();
    leaf_paths<OwnConstParams>();
    leaf_paths<More>();
  }

  std::string_view kind() const noexcept override {
    if constexpr (DescribableConfig<typename R::Config>) {
      return R::Config::kind();
    } else {
      return {};
    }
  }
  Description describe() const override {
    if constexpr (DescribableConfig<typename R::Config>) {
      return mole::describe(router);
    } else {
      fail(Errc::unsupported, "AnyRouter: the config of its router lists no fields");
    }
  }
  Scope decision_scope() const noexcept override { return R::scope; }
  GradientKind gradient_kind() const noexcept override { return R::gradient; }
  Index input_width() const noexcept override { return router.input_width(); }
  Index experts() const noexcept override { return router.experts(); }
  Index max_per_token() const noexcept override { return router.max_per_token(); }
  std::size_t params_bytes() const noexcept override { return router.params_bytes(); }
  std::size_t prepared_bytes() const noexcept override {
    return router.prepared_bytes() + Placed::bytes<typename R::Prepared>();
  }
  std::size_t scratch_bytes(Index max_tokens, int workers) const noexcept override {
    return router.scratch_bytes(max_tokens, workers);
  }
  std::size_t tape_bytes(Index max_tokens) const noexcept override {
    return router.tape_bytes(max_tokens) + (has_larger_tape ? Placed::bytes<OwnTape>() : 0);
  }
  Params<T> make_params(Workspace& memory) const override {
    return Params<T>::of(router.make_params(memory));
  }
  Prepared prepare(const Params<const T>& params, Workspace& memory) const override {
    return {Placed(memory, router.prepare(params.template to<OwnConstParams>(), memory))};
  }
  Tape make_tape(Workspace& memory, Index max_tokens) const override {
    const OwnTape own = router.make_tape(memory, max_tokens);
    Tape tape;
    static_cast<RouterTape<T>&>(tape) = own;
    if constexpr (has_larger_tape) {
      tape.more = NamedViews<T>::of(More{own});
      tape.inside = Placed(memory, own);
    }
    return tape;
  }
  void require_buffers(const Buffers& buffers) const override;
  void forward(const Prepared& prepared, const Buffers& buffers, const Tokens<T>& tokens,
               const Overrides<T>& overrides, RoutingTable<T>& table, Tape* tape,
               const Context& context) const override;
  void backward(const Params<const T>& params, const Buffers& buffers, const Tape& saved,
                const Tokens<T>& tokens, const Overrides<T>& overrides, const Routing<T>& routing,
                const Tape& d_tape, MatView<T> dx, const Params<T>& grad,
                const Context& context) const override;
  void require_backward(const Params<const T>& params, const Tape& saved, const Tokens<T>& tokens,
                        const Routing<T>& routing, const Tape& d_tape, MatView<T> dx,
                        const Params<T>& grad) const override;

  typename R::Buffers own_buffers(const Buffers& buffers) const {
    return detail::own_buffers<typename R::Buffers>(kind(), buffers);
  }
  /// The tape as the router knows it. Throws invalid_argument if it was made by another one.
  OwnTape own_tape(const char* what, const Tape& tape) const {
    OwnTape own{};
    if constexpr (has_larger_tape) {
      const OwnTape* inside = tape.inside.template get<OwnTape>();
      require(inside != nullptr, Errc::invalid_argument, what,
              ": was not made by a router of kind ", kind());
      own = *inside;
    }
    static_cast<RouterTape<T>&>(own) = tape;
    return own;
  }

  R router;
};

template <class T>
template <class R>
void AnyRouter<T>::Model<R>::require_buffers(const Buffers& buffers) const {
  const typename R::Buffers own = own_buffers(buffers);
  if constexpr (requires { router.require_buffers(own); }) router.require_buffers(own);
}

template <class T>
template <class R>
void AnyRouter<T>::Model<R>::forward(const Prepared& prepared, const Buffers& buffers,
                                     const Tokens<T>& tokens, const Overrides<T>& overrides,
                                     RoutingTable<T>& table, Tape* tape,
                                     const Context& context) const {
  const auto* packed = prepared.inside.template get<typename R::Prepared>();
  require(packed != nullptr, Errc::invalid_argument, "prepared: was not made by a router of kind ",
          kind());
  const typename R::Buffers own = own_buffers(buffers);
  if (tape == nullptr) {
    return router.forward(*packed, own, tokens, overrides, {}, table, {}, nullptr, context);
  }
  OwnTape rows = own_tape("tape", *tape);
  router.forward(*packed, own, tokens, overrides, {}, table, {}, &rows, context);
  static_cast<RouterTape<T>&>(*tape) = rows;
  if constexpr (has_larger_tape) *tape->inside.template get<OwnTape>() = rows;
}

template <class T>
template <class R>
void AnyRouter<T>::Model<R>::backward(const Params<const T>& params, const Buffers& buffers,
                                      const Tape& saved, const Tokens<T>& tokens,
                                      const Overrides<T>& overrides, const Routing<T>& routing,
                                      const Tape& d_tape, MatView<T> dx, const Params<T>& grad,
                                      const Context& context) const {
  router.backward(params.template to<OwnConstParams>(), own_buffers(buffers),
                  own_tape("saved", saved), tokens, overrides, {}, routing,
                  own_tape("d_tape", d_tape), {}, dx, grad.template to<OwnParams>(), {}, context);
}

template <class T>
template <class R>
void AnyRouter<T>::Model<R>::require_backward(const Params<const T>& params, const Tape& saved,
                                              const Tokens<T>& tokens, const Routing<T>& routing,
                                              const Tape& d_tape, MatView<T> dx,
                                              const Params<T>& grad) const {
  const auto own_params = params.template to<OwnConstParams>();
  const auto own_grad = grad.template to<OwnParams>();
  const OwnTape own_saved = own_tape("saved", saved), own_d_tape = own_tape("d_tape", d_tape);
  if constexpr (requires { &R::require_backward; }) {
    router.require_backward(own_params, own_saved, tokens, routing, own_d_tape, dx, own_grad);
  }
}

template <class T>
AnyRouter<T>::AnyRouter(const Description& description) {
  with_kind(RouterTypes<T>(), description.kind, [&]<class R>(std::type_identity<R>) {
    self_ = std::make_shared<const Model<R>>(from_description<R>(description));
  });
}

template <class T>
struct DescriptionOf<AnyRouter<T>> {
  static Description describe(const AnyRouter<T>& router) { return router.config(); }
  static AnyRouter<T> build(const Description& description) { return AnyRouter<T>(description); }
};

#ifndef MOLE_HEADER_ONLY
extern template class AnyRouter<float>;
extern template class AnyRouter<double>;
#endif

static_assert(Router<AnyRouter<float>>);
static_assert(Router<AnyRouter<double>>);

}  // namespace mole::inline MOLE_ABI
