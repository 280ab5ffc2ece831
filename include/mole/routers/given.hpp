// SPDX-License-Identifier: Apache-2.0
// GivenRouter: the caller brings the gates, Overrides::gates [tokens, experts].
//
//   g(t, e) = gates(t, e)
//
// Zeros become probes, so that backward has a gate gradient for every expert: it is added into
// d_tape.prob [tokens, experts]. Experts that are forbidden, not the forced one, or have a gate
// that is not finite have no slot and no gradient. The router has no parameters and does not read
// x.
#pragma once

#include <cmath>
#include <cstdint>
#include <span>

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/routing/call.hpp"
#include "mole/routing/override.hpp"
#include "mole/routing/router.hpp"

namespace mole::inline MOLE_ABI {

template <class T>
class GivenRouter {
 public:
  struct Config {
    Index width = 0;  ///< of the layer; only answered by input_width()
    Index experts = 0;

    static constexpr std::string_view kind() noexcept { return "given"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field{"width"}, c.width...);
      f(Field::required("experts"), c.experts...);
    }
  };

  using Scalar = T;
  template <class V>
  using Params = NoParams<V>;
  using Prepared = None;
  using Buffers = None;
  template <class V>
  using Carry = None;
  using Tape = RouterTape<T>;  ///< logits stay empty
  static constexpr Scope scope = Scope::token;
  static constexpr GradientKind gradient = GradientKind::exact;

  /// Throws invalid_argument, naming the field.
  explicit GivenRouter(const Config& config);

  const Config& config() const noexcept { return config_; }
  Index input_width() const noexcept { return config_.width; }
  Index experts() const noexcept { return config_.experts; }
  Index max_per_token() const noexcept { return config_.experts; }

  std::size_t params_bytes() const noexcept { return 0; }
  std::size_t prepared_bytes() const noexcept { return 0; }
  std::size_t scratch_bytes(Index max_tokens, int workers) const noexcept;
  std::size_t tape_bytes(Index max_tokens) const noexcept;

  Params<T> make_params(Workspace&) const { return {}; }
  Prepared prepare(const Params<const T>&, Workspace&) const { return {}; }
  Tape make_tape(Workspace& memory, Index max_tokens) const;

  /// Throws invalid_argument without Overrides::gates, or with a logit bias: there are no logits.
  void forward(None prepared, None buffers, const Tokens<T>& tokens, const Overrides<T>& overrides,
               None carry_in, RoutingTable<T>& table, None carry_out, Tape* tape,
               const Context& context) const;

  void backward(const Params<const T>& params, None buffers, const Tape& saved,
                const Tokens<T>& tokens, const Overrides<T>& overrides, None carry_in,
                const Routing<T>& routing, const Tape& d_tape, None d_carry_out, MatView<T> dx,
                const Params<T>& grad, None d_carry_in, const Context& context) const;

 private:
  RouterShape shape() const noexcept { return {-1, config_.experts, config_.experts}; }

  Config config_;
};

template <class T>
GivenRouter<T>::GivenRouter(const Config& config) : config_(config) {
  require(config.width >= 0, Errc::invalid_argument,
          "GivenRouter: width: expected at least 0, got ", config.width);
  require(config.experts >= 1, Errc::invalid_argument,
          "GivenRouter: experts: expected at least 1, got ", config.experts);
}

template <class T>
std::size_t GivenRouter<T>::scratch_bytes(Index, int workers) const noexcept {
  ByteCounter counter;
  WorkerRows<T>(counter, workers, 1, config_.experts);
  WorkerRows<std::int32_t>(counter, workers, 1, config_.experts);
  return counter.bytes();
}

template <class T>
std::size_t GivenRouter<T>::tape_bytes(Index max_tokens) const noexcept {
  ByteCounter counter;
  counter.take<T>(max_tokens, config_.experts);
  counter.take<T>(max_tokens, config_.experts);
  return counter.bytes();
}

template <class T>
auto GivenRouter<T>::make_tape(Workspace& memory, Index max_tokens) const -> Tape {
  Tape tape;
  tape.prob = memory.take<T>(max_tokens, config_.experts);
  tape.gate = memory.take<T>(1, saturating_product(max_tokens, config_.experts));
  return tape;
}

template <class T>
void GivenRouter<T>::forward(None, None, const Tokens<T>& tokens, const Overrides<T>& overrides,
                             None, RoutingTable<T>& table, None, Tape* tape,
                             const Context& context) const {
  const Index count = tokens.count();
  check_forward(shape(), tokens, overrides, table, tape);
  require(count == 0 || overrides.gates.data != nullptr, Errc::invalid_argument,
          "overrides.gates: a GivenRouter needs them, expected [", count, ", ", config_.experts,
          "]");
  require(overrides.logit_bias.data == nullptr, Errc::invalid_argument,
          "overrides.logit_bias: a GivenRouter has no logits");
  const Workspace::Frame frame(context.scratch);
  const WorkerRows<T> rows(context.scratch, context.workers, 1, config_.experts);
  const WorkerRows<std::int32_t> ids(context.scratch, context.workers, 1, config_.experts);
  table.begin(count);
  parallel_for(context, count, kTokensPerTask, [&](Index begin, Index end, int worker) {
    const std::span<T> gate = rows(worker, 0);
    const std::span<std::int32_t> chosen = ids(worker, 0);
    for (Index t = begin; t < end; ++t) {
      std::size_t slots = 0;
      for (Index e = 0; e < config_.experts; ++e) {
        const T given = overrides.gates(t, e);
        const bool taken = std::isfinite(given) && stages::is_allowed(overrides, t, e);
        if (tape != nullptr) tape->prob(t, e) = taken ? given : T(0);
        if (!taken) continue;
        chosen[slots] = static_cast<std::int32_t>(e);
        gate[slots++] = given;
      }
      table.select(t, chosen.first(slots), gate.first(slots));
    }
  });
  table.finish();
  if (tape != nullptr) record_gates(table.view(), *tape);
}

template <class T>
void GivenRouter<T>::backward(const Params<const T>&, None, const Tape& saved,
                              const Tokens<T>& tokens, const Overrides<T>&, None,
                              const Routing<T>& routing, const Tape& d_tape, None, MatView<T> dx,
                              const Params<T>&, None, const Context&) const {
  check_backward(shape(), saved, tokens, routing, d_tape, dx);
  for (Index t = 0; t < routing.tokens; ++t) {
    for (Index slot = routing.token_begin[t]; slot < routing.token_begin[t + 1]; ++slot) {
      d_tape.prob(t, routing.expert[slot]) += d_tape.gate(0, slot);
    }
  }
}

#ifndef MOLE_HEADER_ONLY
extern template class GivenRouter<float>;
extern template class GivenRouter<double>;
#endif

static_assert(Router<GivenRouter<float>>);
static_assert(Router<GivenRouter<double>>);

}  // namespace mole::inline MOLE_ABI
