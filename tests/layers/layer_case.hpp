// SPDX-License-Identifier: Apache-2.0
// A layer with parameters, gradients and memory of its own, and the same layer in plain loops.
#pragma once

#include <cmath>
#include <concepts>
#include <functional>
#include <limits>
#include <utility>

#include "mole/core/random.hpp"
#include "mole/experts/lora_bank.hpp"
#include "mole/layers/adapted_linear.hpp"
#include "mole/layers/lora.hpp"
#include "mole/layers/mixture.hpp"
#include "mole/losses/balance.hpp"
#include "mole/routers/dense.hpp"
#include "mole/routers/top_k.hpp"
#include "support/gradcheck.hpp"
#include "support/matrix.hpp"
#include "support/reference.hpp"
#include "support/reference_bank.hpp"

namespace test {

template <class T>
using TopKMixture = mole::Mixture<mole::TopKRouter<T>, mole::LoraBank<T>>;
template <class T>
using DenseMixture = mole::Mixture<mole::DenseRouter<T>, mole::LoraBank<T>>;

/// Experts of ranks 3, 0, 8, 1, 3, 0, ... with scales of either sign.
template <class T>
mole::LoraBank<T> make_bank(Index in, Index out, Index experts, bool bias = false) {
  constexpr Index kRanks[] = {3, 0, 8, 1};
  typename mole::LoraBank<T>::Config config;
  config.in = in;
  config.out = out;
  config.bias = bias;
  for (Index e = 0; e < experts; ++e) {
    config.rank.push_back(kRanks[e % 4]);
    config.scale.push_back((e % 2 == 0 ? T(1.5) : T(-0.75)) / static_cast<T>(e + 1));
  }
  return mole::LoraBank<T>(config);
}

/// Standard normal numbers that every type holds alike.
template <class T>
Matrix<T> normal_matrix(Index rows, Index cols, std::uint64_t seed) {
  const mole::Random random(seed, 31);
  return Matrix<T>(rows, cols, [&](Index r, Index c) {
    return static_cast<float>(random.normal(static_cast<std::uint64_t>(r * cols + c)));
  });
}

template <class Layer>
class LayerCase {
 public:
  using T = typename Layer::Scalar;
  using Params = typename Layer::template Params<T>;
  static constexpr bool kHasBase = requires(const Layer& l) { l.mixture(); };

  explicit LayerCase(Layer of, Index most_tokens, int workers = 1, bool fan_in_fan_out = false)
      : layer(std::move(of)),
        max_tokens(most_tokens),
        turned(fan_in_fan_out),
        block_(bytes()),
        memory_(block_.span()),
        scratch_block_(layer.scratch_bytes(most_tokens, workers)),
        scratch_(scratch_block_.span()),
        params(make_params()),
        grad(make_params()),
        context{.scratch = scratch_, .workers = workers} {
    const mole::Random random(99);
    std::uint64_t next = 0;
    mole::params::zip([&](T& value) { value = static_cast<float>(0.4 * random.normal(next++)); },
                      params);
    prepared = layer.prepare(weights(), memory_);
    tape = layer.make_tape(memory_, max_tokens);
    d_tape = layer.router().make_tape(memory_, max_tokens);
    mole::params::zero(d_tape);
    mole::params::zero(grad);
  }

  LayerCase(const LayerCase&) = delete;  // the context points into it
  LayerCase& operator=(const LayerCase&) = delete;

  auto& mixture_of(Params& all) const {
    if constexpr (kHasBase) {
      return all.mixture;
    } else {
      return all;
    }
  }

  typename Layer::Weights weights() const {
    typename Layer::Weights made;
    if constexpr (kHasBase) {
      made.weight = params.weight;
      made.bias = params.bias;
      set_mixture(made.mixture, params.mixture);
    } else {
      set_mixture(made, params);
    }
    return made;
  }

  /// Packs the parameters again, into the place of the last packing.
  void prepare() {
    if (prepared_block_.size() == 0) prepared_block_ = mole::Buffer(layer.prepared_bytes());
    mole::Workspace memory(prepared_block_.span());
    prepared = layer.prepare(weights(), memory);
  }

  /// y as the layer writes it over `y0`, without a tape.
  Matrix<T> infer(const mole::LayerInput<T>& input, const Matrix<T>& y0,
                  const typename Layer::Buffers& buffers = {}) {
    Matrix<T> y = y0;
    layer.forward(prepared, buffers, input, {}, y, {}, nullptr, context);
    return y;
  }
  Matrix<T> record(const mole::LayerInput<T>& input, const Matrix<T>& y0,
                   const typename Layer::Buffers& buffers = {}) {
    Matrix<T> y = y0;
    layer.forward(prepared, buffers, input, {}, y, {}, &tape, context);
    return y;
  }

  /// Backward of the last recorded call, gradients from zero.
  void backward(const mole::LayerInput<T>& input, MatView<const T> dy,
                const mole::LayerInputGradient<T>& d_input,
                const typename Layer::Buffers& buffers = {}) {
    mole::params::zero(grad);
    layer.backward(weights(), buffers, tape, input, {}, dy, d_tape, {}, d_input, grad, {}, context);
  }

  Layer layer;
  Index max_tokens;
  bool turned;  // the base weight is stored [in, out]

 private:
  mole::Buffer block_;
  mole::Workspace memory_;
  mole::Buffer scratch_block_, prepared_block_;
  mole::Workspace scratch_;

 public:
  Params params, grad;
  mole::Context context;
  typename Layer::Prepared prepared;
  typename Layer::Tape tape;
  typename Layer::RouterTape d_tape;

 private:
  const auto& experts() const {
    if constexpr (kHasBase) {
      return layer.mixture().experts();
    } else {
      return layer.experts();
    }
  }

  /// Routers without parameters have nothing to convert.
  static void set_mixture(auto& weights, const auto& from) {
    if constexpr (std::convertible_to<decltype(from.router), decltype(weights.router)>) {
      weights.router = from.router;
    }
    weights.experts = from.experts;
  }

  std::size_t bytes() const {
    std::size_t params_bytes = experts().template params_bytes<T>() + 1024;
    if constexpr (requires { layer.router().params_bytes(); }) {
      params_bytes += layer.router().params_bytes();
    }
    if (kHasBase) params_bytes += (layer.input_width() + 1) * layer.output_width() * sizeof(T);
    return 2 * params_bytes + layer.prepared_bytes() + layer.tape_bytes(max_tokens) +
           layer.router().tape_bytes(max_tokens);
  }

  Params make_params() {
    Params made;
    const Index in = layer.input_width(), out = layer.output_width();
    if constexpr (kHasBase) {
      made.weight = memory_.take<T>(turned ? in : out, turned ? out : in);
      made.bias = memory_.take<T>(1, out);
    }
    if constexpr (requires { layer.router().make_params(memory_); }) {
      mixture_of(made).router = layer.router().make_params(memory_);
    }
    mixture_of(made).experts = experts().template make_params<T>(memory_);
    return made;
  }
};

template <class T>
Matrix<double> widened(MatView<const T> view) {
  return Matrix<double>(view.rows, view.cols, [&](Index r, Index c) { return view(r, c); });
}

/// Logits of one token to gates over all experts.
using Gates = std::function<reference::Row(const reference::Row&)>;

/// The gates [tokens, experts] of a linear router.
template <class T>
Matrix<double> reference_gates(const mole::LinearParams<T>& router, MatView<const T> x,
                               const Gates& gates) {
  reference::Row bias;
  if (!router.bias.empty()) bias = reference::row_of(widened<T>(router.bias), 0);
  const Matrix<double> logits = reference::logits(widened<T>(x), widened<T>(router.weight), bias);
  Matrix<double> made(logits.rows(), logits.cols());
  for (Index t = 0; t < logits.rows(); ++t) {
    const reference::Row row = gates(reference::row_of(logits, t));
    for (Index e = 0; e < logits.cols(); ++e) made(t, e) = row[e];
  }
  return made;
}

/// The experts of a bank at work with the given gates; those of 0 have no slot.
template <class T>
ReferenceCall reference_call(const mole::LoraBank<T>& bank, const mole::LoraBankParams<T>& weights,
                             const Matrix<double>& x, const Matrix<double>& gate,
                             const Matrix<double>& y0) {
  ReferenceCall call;
  for (Index e = 0; e < bank.experts(); ++e) {
    call.experts.push_back({widened<T>(weights.down_of(e)), widened<T>(weights.up_of(e)),
                            widened<T>(weights.bias_of(e)),
                            static_cast<double>(bank.config().scale[e])});
  }
  call.slots.resize(static_cast<std::size_t>(x.rows()));
  for (Index t = 0; t < gate.rows(); ++t) {
    for (Index e = 0; e < gate.cols(); ++e) {
      if (gate(t, e) == 0) continue;
      call.slots[t].push_back({static_cast<std::int32_t>(e), gate(t, e)});
    }
  }
  call.x = x;
  call.y = y0;
  call.dy = Matrix<double>(y0.rows(), y0.cols());
  return call;
}

/// x Wᵀ + b; `turned`: the weight is stored [in, out].
inline Matrix<double> reference_base(const Matrix<double>& weight, bool turned,
                                     const Matrix<double>& bias, const Matrix<double>& x) {
  return Matrix<double>(x.rows(), turned ? weight.cols() : weight.rows(), [&](Index t, Index n) {
    double sum = bias.rows() == 0 ? 0 : bias(0, n);
    for (Index i = 0; i < x.cols(); ++i) sum += x(t, i) * (turned ? weight(i, n) : weight(n, i));
    return sum;
  });
}

inline Matrix<double> absolute(const Matrix<double>& m) {
  return Matrix<double>(m.rows(), m.cols(), [&](Index r, Index c) { return std::fabs(m(r, c)); });
}

/// What rounding may add up to in one output, in units of the sum of its terms' absolute values:
/// the chains over the inputs (base, A x, logits) and what the logits do to the gates.
template <class T>
double rounding_units(Index in) {
  return 8.0 * static_cast<double>(in + 32) * std::numeric_limits<T>::epsilon();
}

}  // namespace test
