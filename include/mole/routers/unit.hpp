// SPDX-License-Identifier: Apache-2.0
// UnitRouter: every expert works on every token with gate 1; experts that the overrides forbid do
// not. A plain LoRA is one expert behind it, several active adapters are several.
//
//   gate(t, e) = 1        no parameters, no gradient
#pragma once

#include "mole/core/description.hpp"
#include "mole/routing/call.hpp"
#include "mole/routing/router.hpp"

namespace mole::inline MOLE_ABI {

template <class T>
class UnitRouter {
 public:
  using Scalar = T;
  struct Config {
    Index width = 0;  ///< input width; only reported
    Index experts = 1;

    static constexpr std::string_view kind() noexcept { return "unit"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field{"width"}, c.width...);
      f(Field{"experts"}, c.experts...);
    }
  };
  template <class V>
  using Params = NoParams<V>;
  using Prepared = None;
  using Buffers = None;
  template <class V>
  using Carry = None;
  using Tape = RouterTape<T>;
  static constexpr Scope scope = Scope::token;
  static constexpr GradientKind gradient = GradientKind::exact;

  /// Throws invalid_argument naming the field.
  explicit UnitRouter(Config config);

  const Config& config() const noexcept { return config_; }
  Index input_width() const noexcept { return config_.width; }
  Index experts() const noexcept { return config_.experts; }
  Index max_per_token() const noexcept { return config_.experts; }
  std::size_t params_bytes() const noexcept { return 0; }
  Params<T> make_params(Workspace&) const { return {}; }
  std::size_t prepared_bytes() const noexcept { return 0; }
  std::size_t scratch_bytes(Index max_tokens, int workers) const noexcept;
  std::size_t tape_bytes(Index max_tokens) const noexcept;
  Prepared prepare(const Params<const T>&, Workspace&) const { return {}; }
  Tape make_tape(Workspace& memory, Index max_tokens) const;

  void forward(const Prepared&, const Buffers&, const Tokens<T>& tokens,
               const Overrides<T>& overrides, const Carry<const T>&, RoutingTable<T>& table,
               const Carry<T>&, Tape* tape, const Context& context) const;

  /// The gates are constants: adds nothing.
  void backward(const Params<const T>&, const Buffers&, const Tape&, const Tokens<T>&,
                const Overrides<T>&, const Carry<const T>&, const Routing<T>&, const Tape&,
                const Carry<T>&, MatView<T>, const Params<T>&, const Carry<T>&,
                const Context&) const {}

 private:
  bool available(const Overrides<T>& overrides, Index token, Index expert) const noexcept;

  Config config_;
};

template <class T>
UnitRouter<T>::UnitRouter(Config config) : config_(config) {
  require(config.experts > 0, Errc::invalid_argument, "UnitRouter: experts must be positive, got ",
          config.experts);
  require(config.width >= 0, Errc::invalid_argument, "UnitRouter: width must not be negative, got ",
          config.width);
}

template <class T>
std::size_t UnitRouter<T>::scratch_bytes(Index, int) const noexcept {
  ByteCounter counter;
  counter.take<std::int32_t>(config_.experts);
  counter.take<T>(config_.experts);
  return counter.bytes();
}

template <class T>
std::size_t UnitRouter<T>::tape_bytes(Index max_tokens) const noexcept {
  ByteCounter counter;
  counter.take<T>(max_tokens, config_.experts);
  return counter.bytes();
}

template <class T>
auto UnitRouter<T>::make_tape(Workspace& memory, Index max_tokens) const -> Tape {
  Tape tape;
  tape.gate = memory.take<T>(1, saturating_product(max_tokens, config_.experts));
  return tape;
}

template <class T>
bool UnitRouter<T>::available(const Overrides<T>& overrides, Index token,
                              Index expert) const noexcept {
  const auto& forbidden = overrides.forbidden;
  if (forbidden.data != nullptr && forbidden(forbidden.rows == 1 ? 0 : token, expert) != 0) {
    return false;
  }
  return overrides.forced.empty() || overrides.forced[token] < 0 ||
         overrides.forced[token] == expert;
}

template <class T>
void UnitRouter<T>::forward(const Prepared&, const Buffers&, const Tokens<T>& tokens,
                            const Overrides<T>& overrides, const Carry<const T>&,
                            RoutingTable<T>& table, const Carry<T>&, Tape* tape,
                            const Context& context) const {
  check_forward({-1, config_.experts, config_.experts}, tokens, overrides, table, tape);
  require(overrides.logit_bias.data == nullptr && overrides.gates.data == nullptr,
          Errc::invalid_argument, "UnitRouter: has no logits to bias and takes no gates");
  Workspace::Frame frame(context.scratch);
  const std::span<std::int32_t> ids = context.scratch.take<std::int32_t>(config_.experts);
  const std::span<T> ones = context.scratch.take<T>(config_.experts);
  std::fill(ones.begin(), ones.end(), T(1));
  table.begin(tokens.count());
  for (Index t = 0; t < tokens.count(); ++t) {
    std::size_t count = 0;
    for (Index e = 0; e < config_.experts; ++e) {
      if (available(overrides, t, e)) ids[count++] = static_cast<std::int32_t>(e);
    }
    table.select(t, ids.first(count), ones.first(count));
  }
  table.finish();
  if (tape != nullptr) std::ranges::copy(table.view().gate, tape->gate.data);
}

#ifndef MOLE_HEADER_ONLY
extern template class UnitRouter<float>;
extern template class UnitRouter<double>;
#endif

static_assert(Router<UnitRouter<float>>);
static_assert(Router<UnitRouter<double>>);

}  // namespace mole::inline MOLE_ABI
