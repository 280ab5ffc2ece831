// SPDX-License-Identifier: Apache-2.0
// Session: the everyday way to use a layer. Owns the packed weights, the workspace, the routing
// table and, for training, the tape. Adds no feature: each method is one call of the layer.
#pragma once

#include <concepts>
#include <utility>

#include "mole/core/config.hpp"
#include "mole/core/context.hpp"
#include "mole/core/params.hpp"
#include "mole/layers/layer_input.hpp"
#include "mole/routing/routing.hpp"

namespace mole::inline MOLE_ABI {

struct SessionOptions {
  Index max_tokens = 512;  ///< tokens of the largest call
  int workers = 1;
  bool training = false;  ///< keep a tape, so that `backward` works
};

/// For layers whose router has no carry. Not for use by two threads at a time.
template <class Layer>
requires std::same_as<typename Layer::template Carry<typename Layer::Scalar>, None>
class Session {
 public:
  using T = typename Layer::Scalar;
  using Buffers = typename Layer::Buffers;

  Session(Layer layer, const typename Layer::Weights& weights, SessionOptions options = {});
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  const Layer& layer() const noexcept { return layer_; }
  Context& context() noexcept { return context_; }

  /// Packs changed weights again; `forward` uses the last ones packed.
  void update(const typename Layer::Weights& weights);

  /// Throws limit_exceeded above max_tokens.
  void forward(const LayerInput<T>& input, MatView<T> y, const Buffers& buffers = {});

  /// Who worked on which token in the last forward.
  Routing<T> routing() const noexcept { return table().view(); }
  const typename Layer::Tape& tape() const noexcept { return tape_; }

  /// Where losses add their gradients between forward and backward; zero after every forward.
  const typename Layer::RouterTape& d_tape() const noexcept { return d_tape_; }

  /// Gradients of the last forward, added into d_input and grad; once per forward. Throws
  /// state_error without training, or without a forward before it.
  void backward(const typename Layer::Weights& weights, const LayerInput<T>& input,
                MatView<const T> dy, const LayerInputGradient<T>& d_input,
                const typename Layer::template Params<T>& grad, const Buffers& buffers = {});

 private:
  static SessionOptions checked(const Layer& layer, SessionOptions options) {
    require(options.max_tokens >= 0, Errc::invalid_argument,
            "Session: max_tokens must not be negative, got ", options.max_tokens);
    require(options.workers >= 1, Errc::invalid_argument,
            "Session: workers must be at least 1, got ", options.workers);
    RoutingTable<T>::check_size(options.max_tokens, layer.router().experts(),
                                layer.router().max_per_token());
    return options;
  }
  const RoutingTable<T>& table() const noexcept {
    return options_.training ? tape_.routing : table_;
  }

  Layer layer_;
  SessionOptions options_;
  Buffer prepared_memory_, scratch_memory_, tape_memory_;
  Workspace scratch_;
  Context context_;
  typename Layer::Prepared prepared_{};
  typename Layer::Tape tape_{};
  typename Layer::RouterTape d_tape_{};
  RoutingTable<T> table_;
  bool forward_done_ = false;
};

template <class Layer>
requires std::same_as<typename Layer::template Carry<typename Layer::Scalar>, None>
Session<Layer>::Session(Layer layer, const typename Layer::Weights& weights, SessionOptions options)
    : layer_(std::move(layer)),
      options_(checked(layer_, options)),
      prepared_memory_(layer_.prepared_bytes()),
      scratch_memory_(layer_.scratch_bytes(options.max_tokens, options.workers)),
      scratch_(scratch_memory_.span()),
      context_{.scratch = scratch_, .workers = options.workers} {
  update(weights);
  if (options.training) {
    tape_memory_ = Buffer(layer_.tape_bytes(options.max_tokens) +
                          layer_.router().tape_bytes(options.max_tokens));
    Workspace memory(tape_memory_.span());
    tape_ = layer_.make_tape(memory, options.max_tokens);
    d_tape_ = layer_.router().make_tape(memory, options.max_tokens);
  } else {
    tape_memory_ = Buffer(RoutingTable<T>::bytes(options.max_tokens, layer_.router().experts(),
                                                 layer_.router().max_per_token()));
    Workspace memory(tape_memory_.span());
    table_ = layer_.make_table(memory, options.max_tokens);
  }
}

template <class Layer>
requires std::same_as<typename Layer::template Carry<typename Layer::Scalar>, None>
void Session<Layer>::update(const typename Layer::Weights& weights) {
  Workspace memory(prepared_memory_.span());
  prepared_ = layer_.prepare(weights, memory);
}

template <class Layer>
requires std::same_as<typename Layer::template Carry<typename Layer::Scalar>, None>
void Session<Layer>::forward(const LayerInput<T>& input, MatView<T> y, const Buffers& buffers) {
  require(input.x.rows <= options_.max_tokens, Errc::limit_exceeded, "Session: ", input.x.rows,
          " tokens, max_tokens is ", options_.max_tokens);
  forward_done_ = false;
  if (options_.training) {
    params::zero(d_tape_);
    layer_.forward(prepared_, buffers, input, {}, y, {}, &tape_, context_);
    forward_done_ = true;
  } else {
    layer_.route(prepared_, buffers, input, {}, table_, {}, nullptr, context_);
    layer_.apply(prepared_, input, table_.view(), y, nullptr, context_);
  }
}

template <class Layer>
requires std::same_as<typename Layer::template Carry<typename Layer::Scalar>, None>
void Session<Layer>::backward(const typename Layer::Weights& weights, const LayerInput<T>& input,
                              MatView<const T> dy, const LayerInputGradient<T>& d_input,
                              const typename Layer::template Params<T>& grad,
                              const Buffers& buffers) {
  require(options_.training, Errc::state_error,
          "Session::backward: the session was made without training");
  require(forward_done_, Errc::state_error,
          "Session::backward: needs a forward since the last backward");
  forward_done_ = false;
  layer_.backward(weights, buffers, tape_, input, {}, dy, d_tape_, {}, d_input, grad, {}, context_);
}

}  // namespace mole::inline MOLE_ABI
