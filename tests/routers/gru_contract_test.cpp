// SPDX-License-Identifier: Apache-2.0
// The router contract for GruRouter, driven without its carry.
#include "contracts/router_contract.hpp"
#include "mole/routers/gru.hpp"

namespace {

using mole::Index;
using mole::MatView;
using mole::None;

/// A GruRouter that owns its cell and starts from no state: what the contract can drive.
template <class T>
class SingleGru {
 public:
  using Scalar = T;
  using Inner = mole::GruRouter<T>;
  using Config = typename Inner::Config;
  template <class V>
  struct Params {
    typename Inner::template Params<V> all;

    template <class F, class... P>
    static void visit(F&& f, P&... p) {
      Inner::template Params<V>::visit(f, p.all...);
      mole::CellParams<V>::visit(f, p.all.cell...);
    }
    operator Params<const V>() const noexcept requires(!std::is_const_v<V>) { return {all}; }
  };
  using Prepared = typename Inner::Prepared;
  using Buffers = None;
  template <class V>
  using Carry = None;
  using Tape = typename Inner::Tape;
  static constexpr mole::Scope scope = Inner::scope;
  static constexpr mole::GradientKind gradient = Inner::gradient;

  explicit SingleGru(const Config& config) : inner_(config) {}

  Index input_width() const noexcept { return inner_.input_width(); }
  Index experts() const noexcept { return inner_.experts(); }
  Index max_per_token() const noexcept { return inner_.max_per_token(); }
  std::size_t params_bytes() const noexcept { return inner_.params_bytes() + inner_.cell_bytes(); }
  Params<T> make_params(mole::Workspace& memory) const {
    Params<T> params{inner_.make_params(memory)};
    params.all.cell = inner_.make_cell(memory);
    return params;
  }
  std::size_t prepared_bytes() const noexcept { return inner_.prepared_bytes(); }
  std::size_t scratch_bytes(Index tokens, int workers) const noexcept {
    return inner_.scratch_bytes(tokens, workers);
  }
  std::size_t tape_bytes(Index tokens) const noexcept { return inner_.tape_bytes(tokens); }
  Prepared prepare(const Params<const T>& params, mole::Workspace& memory) const {
    return inner_.prepare(params.all, memory);
  }
  Tape make_tape(mole::Workspace& memory, Index tokens) const {
    return inner_.make_tape(memory, tokens);
  }
  void forward(const Prepared& prepared, None, const mole::Tokens<T>& tokens,
               const mole::Overrides<T>& overrides, None, mole::RoutingTable<T>& table, None,
               Tape* tape, const mole::Context& context) const {
    inner_.forward(prepared, {}, tokens, overrides, {}, table, {}, tape, context);
  }
  void backward(const Params<const T>& params, None, const Tape& saved,
                const mole::Tokens<T>& tokens, const mole::Overrides<T>& overrides, None,
                const mole::Routing<T>& routing, const Tape& d_tape, None, MatView<T> dx,
                const Params<T>& grad, None, const mole::Context& context) const {
    inner_.backward(params.all, {}, saved, tokens, overrides, {}, routing, d_tape, {}, dx, grad.all,
                    {}, context);
  }

 private:
  Inner inner_;
};

}  // namespace

TEMPLATE_TEST_CASE("GruRouter keeps the router contract", "[routers]", float, double) {
  test::router_contract(SingleGru<TestType>({.width = 13, .experts = 7, .state = 5, .k = 3}));
  test::router_contract(SingleGru<TestType>(
      {.width = 13, .experts = 7, .state = 5, .cell = mole::CellKind::rnn, .bias = true}));
}

TEMPLATE_TEST_CASE("GruRouter gives the same bits on threads", "[routers][threads]", float,
                   double) {
  test::router_threads_contract(
      SingleGru<TestType>({.width = 13, .experts = 7, .state = 5, .k = 3}));
}
