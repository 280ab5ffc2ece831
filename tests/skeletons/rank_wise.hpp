// SPDX-License-Identifier: Apache-2.0
// Every rank is an expert, and its content decides whether it works: the router reads X Aᵀ, which
// is also what the bank computes (the rule of MoRAM, "Mixture of Rank-1 Associative Memories").
//
//   z = x Aᵀ      s = z / max(‖z‖, epsilon)      S = the k largest s (earlier rank first)
//   w = softmax over S of s / temperature        then dropped, not renormalised, where s <
//   threshold y = x Wᵀ + b + (w ∘ scale ∘ z) Bᵀ
//
// x [tokens, in]   A [ranks, in]   B [out, ranks]   z, s, w [tokens, ranks]
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <vector>

#include "mole/experts/lora_bank.hpp"
#include "mole/kernels/dense.hpp"
#include "mole/layers/adapted_linear.hpp"
#include "mole/layers/mixture.hpp"
#include "mole/routing/call.hpp"
#include "mole/routing/router.hpp"
#include "mole/routing/stages.hpp"

namespace skeleton {

using mole::Index;
using mole::MatView;
using mole::None;

/// From z to gates. Tokens::x is z; the router owns nothing.
template <class T>
class ContentRouter {
 public:
  struct Config {
    Index ranks = 0, k = 2;
    T temperature = T(1);
    T threshold = T(0);  ///< on s; 0 = none
    T epsilon = T(1e-12);
  };

  using Scalar = T;
  template <class V>
  using Params = mole::NoParams<V>;
  using Prepared = None;
  using Buffers = None;
  template <class V>
  using Carry = None;
  using Tape = mole::RouterTape<T>;  ///< logits: s; prob: w before the threshold
  static constexpr mole::Scope scope = mole::Scope::token;
  static constexpr mole::GradientKind gradient = mole::GradientKind::exact;

  explicit ContentRouter(const Config& config) : config_(config) {}

  Index input_width() const noexcept { return config_.ranks; }
  Index experts() const noexcept { return config_.ranks; }
  Index max_per_token() const noexcept { return std::min(config_.k, config_.ranks); }
  std::size_t params_bytes() const noexcept { return 0; }
  Params<T> make_params(mole::Workspace&) const { return {}; }
  std::size_t prepared_bytes() const noexcept { return 0; }
  std::size_t scratch_bytes(Index, int) const noexcept {
    mole::ByteCounter counter;
    take_rows(counter);
    return counter.bytes();
  }
  std::size_t tape_bytes(Index max_tokens) const noexcept {
    mole::ByteCounter counter;
    mole::take_tape<T>(counter, shape(), max_tokens);
    return counter.bytes();
  }
  Tape make_tape(mole::Workspace& memory, Index max_tokens) const {
    return mole::take_tape<T>(memory, shape(), max_tokens);
  }
  Prepared prepare(const Params<const T>&, mole::Workspace&) const { return {}; }

  void forward(None, None, const mole::Tokens<T>& tokens, const mole::Overrides<T>& overrides, None,
               mole::RoutingTable<T>& table, None, Tape* tape, const mole::Context& context) const {
    mole::check_forward(shape(), tokens, overrides, table, tape);
    const mole::Workspace::Frame frame(context.scratch);
    const Rows scratch = take_rows(context.scratch);
    table.begin(tokens.count());
    for (Index t = 0; t < tokens.count(); ++t) {
      Rows rows = scratch;
      if (tape != nullptr) {
        rows.key = tape->logits.row(t);
        rows.share = tape->prob.row(t);
      }
      const T divisor = norm(tokens.x.row(t));
      for (std::size_t i = 0; i < rows.key.size(); ++i) {
        rows.key[i] = tokens.x.row(t)[i] / divisor;
      }
      mole::stages::override_logits<T>(overrides, t, rows.key);
      share(rows);
      select(t, rows, table);
    }
    table.finish();
    if (tape != nullptr) mole::record_gates(table.view(), *tape);
  }

  void backward(const Params<const T>&, None, const Tape& saved, const mole::Tokens<T>& tokens,
                const mole::Overrides<T>&, None, const mole::Routing<T>& routing,
                const Tape& d_tape, None, MatView<T> dx, const Params<T>&, None,
                const mole::Context& context) const {
    mole::check_backward(shape(), saved, tokens, routing, d_tape, dx);
    const mole::Workspace::Frame frame(context.scratch);
    const Rows rows = take_rows(context.scratch);
    for (Index t = 0; t < tokens.count(); ++t) {
      std::ranges::copy(d_tape.prob.row(t), rows.share.begin());
      for (Index s = routing.token_begin[t]; s < routing.token_begin[t + 1]; ++s) {
        rows.share[routing.expert[s]] += d_tape.gate(0, s);
      }
      std::ranges::fill(rows.key, T(0));
      mole::stages::softmax_backward<T>(saved.prob.row(t), rows.share, rows.key);
      const std::span<T> d_key = d_tape.logits.row(t);
      for (std::size_t i = 0; i < d_key.size(); ++i) d_key[i] += rows.key[i] / config_.temperature;
      mole::stages::override_logits_backward<T>(saved.logits.row(t), d_key);
      if (dx.data != nullptr) normalise_backward(tokens.x.row(t), d_key, dx.row(t));
    }
  }

 private:
  struct Rows {
    std::span<T> key, share, work;
    std::span<std::int32_t> chosen;
  };
  template <class Arena>
  Rows take_rows(Arena& arena) const {
    Rows rows;
    rows.key = arena.template take<T>(config_.ranks);
    rows.share = arena.template take<T>(config_.ranks);
    rows.work = arena.template take<T>(config_.ranks);
    rows.chosen = arena.template take<std::int32_t>(config_.ranks);
    return rows;
  }
  mole::RouterShape shape() const noexcept {
    return {config_.ranks, config_.ranks, max_per_token()};
  }
  T norm(std::span<const T> z) const noexcept {
    return std::max(std::sqrt(mole::gated::dot<T>(z, z)), config_.epsilon);
  }

  /// rows.share = softmax over the largest keys, 0 elsewhere.
  void share(const Rows& rows) const noexcept {
    const auto k = static_cast<std::size_t>(max_per_token());
    const Index found = mole::stages::select_top_k<T>(rows.key, rows.chosen.first(k));
    std::ranges::fill(rows.work, -std::numeric_limits<T>::infinity());
    for (Index i = 0; i < found; ++i) {
      const std::int32_t rank = rows.chosen[i];
      rows.work[rank] = rows.key[rank] / config_.temperature;
    }
    mole::stages::softmax<T>(rows.work, rows.share);
  }

  void select(Index t, const Rows& rows, mole::RoutingTable<T>& table) const {
    std::size_t slots = 0;
    for (std::size_t i = 0; i < rows.share.size(); ++i) {
      const bool passes = config_.threshold == T(0) || rows.key[i] >= config_.threshold;
      if (rows.share[i] == T(0) || !passes) continue;
      rows.chosen[slots] = static_cast<std::int32_t>(i);
      rows.work[slots++] = rows.share[i];
    }
    table.select(t, rows.chosen.first(slots), rows.work.first(slots));
  }

  /// dz += the gradient by s = z / max(‖z‖, epsilon).
  void normalise_backward(std::span<const T> z, std::span<const T> ds,
                          std::span<T> dz) const noexcept {
    const T divisor = norm(z);
    const bool constant = divisor == config_.epsilon;
    const T along = constant ? T(0) : mole::gated::dot<T>(z, ds) / divisor;
    for (std::size_t i = 0; i < dz.size(); ++i) {
      dz[i] += std::fma(-(z[i] / divisor), along, ds[i]) / divisor;
    }
  }

  Config config_;
};

static_assert(mole::Router<ContentRouter<float>>);
static_assert(mole::Router<ContentRouter<double>>);

/// A linear map with a content-routed pool of ranks. The layer, not the router, computes z: as an
/// input of the router it has a gradient, and that goes into A and x.
template <class T>
class RankWise {
 public:
  using Bank = mole::LoraBank<T>;
  using Mixture = mole::Mixture<ContentRouter<T>, Bank>;
  using Layer = mole::AdaptedLinear<Mixture>;
  using Tape = typename Layer::Tape;
  using RouterTape = typename Layer::RouterTape;

  template <class V>
  struct Params {
    MatView<V> weight, bias;  ///< [out, in], [1, out] or empty
    MatView<V> down;          ///< A [ranks, in]
    MatView<V> up;            ///< B [out, ranks]

    template <class F, class... P>
    static void visit(F&& f, P&... p) {
      f(mole::Leaf{"weight"}, p.weight...);
      f(mole::Leaf{"bias"}, p.bias...);
      f(mole::Leaf{"down"}, p.down...);
      f(mole::Leaf{"up"}, p.up...);
    }
    operator Params<const V>() const noexcept requires(!std::is_const_v<V>) {
      return {weight, bias, down, up};
    }
  };

  RankWise(Index in, Index out, std::vector<T> scale,
           const typename ContentRouter<T>::Config& config)
      : rank_(scale.size(), 1),
        layer_(Mixture(ContentRouter<T>(config), Bank({in, out, rank_, std::move(scale)}))) {}

  Tape make_tape(mole::Workspace& memory, Index tokens) const {
    return layer_.make_tape(memory, tokens);
  }
  RouterTape make_router_tape(mole::Workspace& memory, Index tokens) const {
    return layer_.router().make_tape(memory, tokens);
  }

  void forward(const Params<const T>& params, MatView<const T> x, MatView<T> y, Tape* tape,
               mole::Workspace& memory, const mole::Context& context) const {
    const mole::Workspace::Frame frame(memory);
    const Pointers<const T> ranks(rank_, params.down, params.up);
    const auto prepared = layer_.prepare({params.weight, params.bias, {{}, ranks.params}}, memory);
    mole::LayerInput<T> input = x;
    input.router_x = content(params, x, memory, context);
    layer_.forward(prepared, input, y, tape, context);
  }

  void backward(const Params<const T>& params, const Tape& saved, MatView<const T> x,
                MatView<const T> dy, const RouterTape& d_tape, MatView<T> dx, const Params<T>& grad,
                mole::Workspace& memory, const mole::Context& context) const {
    const mole::Workspace::Frame frame(memory);
    const Pointers<const T> ranks(rank_, params.down, params.up);
    const Pointers<T> d_ranks(rank_, grad.down, grad.up);
    mole::LayerInput<T> input = x;
    input.router_x = content(params, x, memory, context);
    const MatView<T> d_content = memory.take<T>(x.rows, params.down.rows);
    std::fill_n(d_content.data, d_content.size(), T(0));
    layer_.backward({params.weight, params.bias, {{}, ranks.params}}, saved, input, dy, d_tape,
                    {.x = dx, .router_x = d_content},
                    {grad.weight, grad.bias, {{}, d_ranks.params}}, context);
    mole::dense::input_gradient<T>(params.down, d_content, dx, context);
    mole::dense::weight_gradient<T>(x, d_content, grad.down, context);
  }

 private:
  /// One expert per row of A and column of B.
  template <class V>
  struct Pointers {
    std::vector<V*> down_of, up_of;
    mole::LoraBankParams<V> params;

    Pointers(std::span<const Index> rank, MatView<V> down, MatView<V> up) {
      for (Index i = 0; i < down.rows; ++i) {
        down_of.push_back(down.row(i).data());
        up_of.push_back(up.data + i);
      }
      params = {down.cols, up.rows, rank, down_of, up_of, {}, down.stride, up.stride};
    }
    Pointers(const Pointers&) = delete;
  };

  static MatView<T> content(const Params<const T>& params, MatView<const T> x,
                            mole::Workspace& memory, const mole::Context& context) {
    const MatView<T> z = memory.take<T>(x.rows, params.down.rows);
    const mole::Panels<T> panels =
        mole::pack_panels(params.down, memory.take<T>(params.down.size()).data());
    mole::dense::forward<T>(panels, {}, x, z, context);
    return z;
  }

  std::vector<Index> rank_;
  Layer layer_;
};

}  // namespace skeleton
