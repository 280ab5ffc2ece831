// SPDX-License-Identifier: Apache-2.0
// Home: the hierarchy of multi-gate experts of HoME, for several tasks at once.
//
//   x̃_g = 2 σ(FB_g FA_g x) ∘ x                 feature gate of a group g of experts
//   f_e = act(norm_e(W_e x̃ + b_e)), or act(norm_e(scale · B_e A_e x̃)) for low-rank experts
//   gate_n = softmax of V_n x over the experts that task n sees
//   self_n = softmax of S_n x over the experts that task n owns; σ if it owns exactly one
//   y_n = Σ_e (gate_n + self_n)_e f_e
//
// Shapes: x [tokens, width]; y [tasks · tokens, out], task by task; V, S [tasks · experts, width];
// W [experts · out, width]; A [experts · rank, width]; B [experts · out, rank]; b and the norm's
// scale and shift [experts, out]; FA [groups · feature rank, width]; FB [groups · width, feature
// rank]. Which experts a task sees and owns, and which group an expert is in (-1: it reads x), is
// the config. A task that sees no expert has no gate; one that owns none has no self gate. Experts
// without a gate get gradients of exactly 0.
//
// Norms: layer and rms over out; batch over the tokens, with the running statistics of the buffers
// unless training. `update` moves the running statistics after a training call.
//
// Wang et al., "HoME: Hierarchy of Multi-Gate Experts for Multi-Task Learning at Kuaishou", 2024.
// Low-rank experts are an extension.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "mole/core/config.hpp"
#include "mole/core/params.hpp"
#include "mole/kernels/activation.hpp"
#include "mole/kernels/dense.hpp"
#include "mole/kernels/gated_low_rank.hpp"
#include "mole/kernels/math.hpp"
#include "mole/kernels/norm.hpp"
#include "mole/kernels/rows.hpp"
#include "mole/routing/call.hpp"
#include "mole/routing/head.hpp"
#include "mole/routing/stages.hpp"

namespace mole::inline MOLE_ABI {

enum class HomeNorm { none, layer, rms, batch };
constexpr std::array<std::string_view, 4> enum_names(HomeNorm) noexcept {
  return {"none", "layer", "rms", "batch"};
}

/// Members that the config does not ask for are empty.
template <class V>
struct HomeParams {
  MatView<V> gate, self;                          ///< V, S
  MatView<V> weight = {}, bias = {};              ///< W, b
  MatView<V> down = {}, up = {};                  ///< A, B
  MatView<V> norm = {}, shift = {};               ///< scale and shift of the norms
  MatView<V> feature_down = {}, feature_up = {};  ///< FA, FB

  template <class F, class... P>
  static void visit(F&& f, P&... p) {
    f(Leaf{"gate"}, p.gate...);
    f(Leaf{"self"}, p.self...);
    f(Leaf{"weight"}, p.weight...);
    f(Leaf{"bias"}, p.bias...);
    f(Leaf{"down"}, p.down...);
    f(Leaf{"up"}, p.up...);
    f(Leaf{"norm"}, p.norm...);
    f(Leaf{"shift"}, p.shift...);
    f(Leaf{"feature_down"}, p.feature_down...);
    f(Leaf{"feature_up"}, p.feature_up...);
  }
  operator HomeParams<const V>() const noexcept  // NOLINT(google-explicit-constructor)
      requires(!std::is_const_v<V>) {
    return {gate, self, weight, bias, down, up, norm, shift, feature_down, feature_up};
  }
};

template <class T>
class Home {
 public:
  using Scalar = T;
  template <class V>
  using Params = HomeParams<V>;

  struct Config {
    Index width = 0, out = 0, experts = 0, tasks = 0;
    std::vector<std::uint8_t> visible = {};  ///< [tasks · experts], 1 = task n sees expert e
    std::vector<std::uint8_t> own = {};      ///< [tasks · experts], 1 = task n owns expert e
    Index rank = 0;                          ///< of low-rank experts; 0: full ones
    T scale = T(1);                          ///< of low-rank experts
    HomeNorm norm = HomeNorm::batch;
    T norm_epsilon = T(1e-5);
    T momentum = T(0.1);  ///< of the running statistics
    bool training = true;
    Activation activation = Activation::silu;
    Index groups = 0;                  ///< feature gates
    Index feature_rank = 0;            ///< of a feature gate
    std::vector<Index> group_of = {};  ///< [experts], -1: none; empty without groups
  };

  /// The running statistics of a batch norm; empty otherwise.
  struct Buffers {
    MatView<const T> mean = {}, variance = {};  ///< [experts, out]
  };

  struct Prepared {
    Panels<T> gate, self;
    std::span<Panels<T>> weight, down, up;          ///< [experts]
    std::span<Panels<T>> feature_down, feature_up;  ///< [groups]
    MatView<const T> bias, norm, shift;             ///< [experts, out], or empty
  };

  /// What forward leaves; blocks of rows by expert or group.
  struct Tape {
    MatView<T> gate, self;      ///< [tokens, tasks · experts]
    MatView<T> low;             ///< [experts · tokens, rank], A x̃
    MatView<T> unit, value;     ///< [experts · tokens, out], before and after scale and shift
    MatView<T> expert;          ///< [experts · tokens, out], f
    MatView<T> inverse;         ///< [experts, tokens or out], 1 / deviation
    MatView<T> mean, variance;  ///< [experts, out], of the batch
    MatView<T> feature_low;     ///< [groups · tokens, feature rank]
    MatView<T> share, gated;    ///< [groups · tokens, width], σ and x̃
    Index tokens = 0;
  };

  /// Throws invalid_argument or shape_mismatch, naming the field.
  explicit Home(Config config);

  const Config& config() const noexcept { return config_; }

  std::size_t params_bytes() const noexcept;
  /// Uninitialised parameters.
  Params<T> make_params(Workspace& memory) const { return take_params(memory); }
  std::size_t prepared_bytes() const noexcept;
  /// Throws shape_mismatch, naming the member.
  Prepared prepare(const Params<const T>& params, Workspace& memory) const;
  std::size_t scratch_bytes(Index max_tokens, int workers) const noexcept;
  std::size_t tape_bytes(Index max_tokens) const noexcept;
  Tape make_tape(Workspace& memory, Index max_tokens) const {
    return take_tape(memory, max_tokens);
  }

  /// y is overwritten. Throws shape_mismatch or limit_exceeded; invalid_argument for a training
  /// batch norm of no tokens.
  void forward(const Prepared& prepared, const Buffers& buffers, MatView<const T> x, MatView<T> y,
               Tape& tape, const Context& context) const;

  /// f of expert e [tokens, out].
  MatView<T> expert(const Tape& tape, Index e) const noexcept {
    return block(tape.expert, e, tape.tokens);
  }

  /// Running statistics after a training call: old + momentum (new - old), the variance unbiased.
  /// Throws shape_mismatch.
  void update(const Tape& tape, MatView<T> mean, MatView<T> variance) const;

  /// Adds into dx and grad, whose members may be empty.
  void backward(const Params<const T>& params, const Buffers& buffers, const Tape& tape,
                MatView<const T> x, MatView<const T> dy, MatView<T> dx, const Params<T>& grad,
                const Context& context) const;

 private:
  template <class Arena>
  Params<T> take_params(Arena& arena) const;
  template <class Arena>
  Tape take_tape(Arena& arena, Index tokens) const;
  /// Rows of one expert or group.
  static MatView<T> block(MatView<T> all, Index i, Index tokens) noexcept {
    return all.row_block(i * tokens, tokens);
  }
  bool has_shift() const noexcept {
    return config_.norm == HomeNorm::layer || config_.norm == HomeNorm::batch;
  }
  bool batch_statistics() const noexcept {
    return config_.norm == HomeNorm::batch && config_.training;
  }
  Index group_of(Index e) const noexcept { return config_.groups > 0 ? config_.group_of[e] : -1; }
  std::span<const std::uint8_t> row(const std::vector<std::uint8_t>& mask, Index task) const {
    return std::span(mask).subspan(static_cast<std::size_t>(task * config_.experts),
                                   static_cast<std::size_t>(config_.experts));
  }
  void check(const Params<const T>& params, bool optional) const;
  void check_buffers(const Buffers& buffers) const;
  MatView<const T> input_of(Index e, MatView<const T> x, const Tape& tape) const noexcept;
  void gate_features(const Prepared& prepared, MatView<const T> x, const Tape& tape,
                     const Context& context) const;
  void features_backward(const Params<const T>& params, MatView<const T> x, const Tape& tape,
                         MatView<const T> d_gated, MatView<T> dx, const Params<T>& grad,
                         const Context& context) const;
  void expert_forward(const Prepared& prepared, const Buffers& buffers, Index e, MatView<const T> x,
                      const Tape& tape, const Context& context) const;
  void expert_backward(const Params<const T>& params, Index e, MatView<const T> x, const Tape& tape,
                       MatView<T> d_value, MatView<T> d_unit, MatView<T> d_x, const Params<T>& grad,
                       const Context& context) const;
  void normalise(const Buffers& buffers, Index e, const Tape& tape) const noexcept;
  /// In place; `work` like d_unit.
  void normalise_backward(Index e, const Tape& tape, MatView<T> d_unit,
                          MatView<T> work) const noexcept;
  /// Logits of one token to gates, in place.
  void decide(std::span<T> gate, std::span<T> self) const noexcept;
  void decide_backward(std::span<const T> gate, std::span<const T> self, std::span<const T> d,
                       std::span<T> d_gate, std::span<T> d_self) const noexcept;

  Config config_;
};

template <class T>
Home<T>::Home(Config config) : config_(std::move(config)) {
  constexpr const char* kName = "Home";
  require_count(kName, "width", config_.width);
  require_count(kName, "out", config_.out);
  require_count(kName, "experts", config_.experts);
  require_count(kName, "tasks", config_.tasks);
  require_field(config_.rank >= 0, kName, "rank", "0 or more", config_.rank);
  require_field(config_.groups >= 0, kName, "groups", "0 or more", config_.groups);
  require_field(config_.groups == 0 || config_.feature_rank >= 1, kName, "feature_rank",
                "at least 1", config_.feature_rank);
  require_from_zero(kName, "norm_epsilon", config_.norm_epsilon);
  const auto masks = saturating_product(config_.tasks, config_.experts);
  const auto size = [](const auto& list) { return static_cast<Index>(list.size()); };
  require(size(config_.visible) == masks && size(config_.own) == masks, Errc::shape_mismatch,
          "Home: visible and own: expected ", masks, " values, got ", size(config_.visible),
          " and ", size(config_.own));
  require(size(config_.group_of) == (config_.groups > 0 ? config_.experts : 0),
          Errc::shape_mismatch, "Home: group_of: expected ",
          config_.groups > 0 ? config_.experts : 0, " values, got ", size(config_.group_of));
  for (const Index group : config_.group_of) {
    require_field(group >= -1 && group < config_.groups, kName, "group_of", "-1 ... groups - 1",
                  group);
  }
}

template <class T>
template <class Arena>
auto Home<T>::take_params(Arena& arena) const -> Params<T> {
  const Config& c = config_;
  const auto take = [&](bool wanted, Index count, Index rows, Index cols) {
    if (!wanted) return MatView<T>();
    return arena.template take<T>(saturating_product(count, rows), cols);
  };
  const bool low = c.rank > 0;
  Params<T> params;
  params.gate = take(true, c.tasks, c.experts, c.width);
  params.self = take(true, c.tasks, c.experts, c.width);
  params.weight = take(!low, c.experts, c.out, c.width);
  params.bias = take(!low, c.experts, 1, c.out);
  params.down = take(low, c.experts, c.rank, c.width);
  params.up = take(low, c.experts, c.out, c.rank);
  params.norm = take(c.norm != HomeNorm::none, c.experts, 1, c.out);
  params.shift = take(has_shift(), c.experts, 1, c.out);
  params.feature_down = take(c.groups > 0, c.groups, c.feature_rank, c.width);
  params.feature_up = take(c.groups > 0, c.groups, c.width, c.feature_rank);
  return params;
}

template <class T>
std::size_t Home<T>::params_bytes() const noexcept {
  ByteCounter counter;
  take_params(counter);
  return counter.bytes();
}

template <class T>
void Home<T>::check(const Params<const T>& params, bool optional) const {
  ByteCounter shapes;
  const Params<T> wanted = take_params(shapes);
  Params<T>::visit(
      [&](const Leaf& leaf, const MatView<T>& want, const MatView<const T>& got) {
        if (optional && got.data == nullptr) return;
        params::require_leaf_shape(leaf, got, want.rows, want.cols);
      },
      wanted, params);
}

template <class T>
void Home<T>::check_buffers(const Buffers& buffers) const {
  if (config_.norm != HomeNorm::batch || config_.training) return;
  require_shape("buffers.mean", buffers.mean, config_.experts, config_.out);
  require_shape("buffers.variance", buffers.variance, config_.experts, config_.out);
}

template <class T>
std::size_t Home<T>::prepared_bytes() const noexcept {
  ByteCounter counter;
  for (int part = 0; part < 3; ++part) counter.take<Panels<T>>(config_.experts);
  for (int part = 0; part < 2; ++part) counter.take<Panels<T>>(config_.groups);
  // Every matrix may start on a new cache line.
  const auto pieces = static_cast<std::size_t>(2 * (config_.experts + config_.groups));
  return counter.bytes() + params_bytes() + pieces * kAlignment;
}

template <class T>
auto Home<T>::prepare(const Params<const T>& params, Workspace& memory) const -> Prepared {
  check(params, false);
  const auto pack = [&](MatView<const T> stack, Index count) {
    const auto panels = memory.take<Panels<T>>(stack.empty() ? 0 : count);
    for (std::size_t i = 0; i < panels.size(); ++i) {
      const auto part = rows::block(stack, static_cast<Index>(i), stack.rows / count);
      panels[i] = rows::pack(part, memory);
    }
    return panels;
  };
  Prepared prepared;
  prepared.gate = rows::pack(params.gate, memory);
  prepared.self = rows::pack(params.self, memory);
  prepared.weight = pack(params.weight, config_.experts);
  prepared.down = pack(params.down, config_.experts);
  prepared.up = pack(params.up, config_.experts);
  prepared.feature_down = pack(params.feature_down, config_.groups);
  prepared.feature_up = pack(params.feature_up, config_.groups);
  prepared.bias = rows::clone(params.bias, memory);
  prepared.norm = rows::clone(params.norm, memory);
  prepared.shift = rows::clone(params.shift, memory);
  return prepared;
}

template <class T>
template <class Arena>
auto Home<T>::take_tape(Arena& arena, Index tokens) const -> Tape {
  const Config& c = config_;
  const Index by_expert = saturating_product(c.experts, tokens);
  const Index by_group = saturating_product(c.groups, tokens);
  const Index gates = saturating_product(c.tasks, c.experts);
  const auto take = [&](Index rows, Index cols) { return arena.template take<T>(rows, cols); };
  Tape tape;
  tape.gate = take(tokens, gates);
  tape.self = take(tokens, gates);
  tape.low = take(by_expert, c.rank);
  tape.unit = take(by_expert, c.out);
  tape.value = take(by_expert, c.out);
  tape.expert = take(by_expert, c.out);
  tape.inverse = take(c.experts, std::max(tokens, c.out));
  tape.mean = take(c.experts, c.out);
  tape.variance = take(c.experts, c.out);
  tape.feature_low = take(by_group, c.feature_rank);
  tape.share = take(by_group, c.width);
  tape.gated = take(by_group, c.width);
  return tape;
}

template <class T>
std::size_t Home<T>::tape_bytes(Index max_tokens) const noexcept {
  ByteCounter counter;
  take_tape(counter, max_tokens);
  return counter.bytes();
}

template <class T>
std::size_t Home<T>::scratch_bytes(Index max_tokens, int workers) const noexcept {
  const Config& c = config_;
  const Index gates = saturating_product(c.tasks, c.experts);
  ByteCounter counter;
  counter.take<std::int32_t>(max_tokens);
  counter.take<T>(saturating_product(c.experts, max_tokens), c.out);
  counter.take<T>(max_tokens, gates);
  counter.take<T>(max_tokens, gates);
  counter.take<T>(max_tokens, c.out);
  counter.take<T>(max_tokens, c.out);
  counter.take<T>(max_tokens, std::max(c.rank, c.feature_rank));
  counter.take<T>(saturating_product(c.groups, max_tokens), c.width);
  counter.take<T>(max_tokens, c.width);
  WorkerRows<T>(counter, workers, 1, gates);
  return counter.bytes() + stages::project_backward_bytes(gates);
}

template <class T>
MatView<const T> Home<T>::input_of(Index e, MatView<const T> x, const Tape& tape) const noexcept {
  const Index group = group_of(e);
  return group < 0 ? x : MatView<const T>(block(tape.gated, group, x.rows));
}

template <class T>
void Home<T>::gate_features(const Prepared& prepared, MatView<const T> x, const Tape& tape,
                            const Context& context) const {
  for (Index g = 0; g < config_.groups; ++g) {
    const MatView<T> low = block(tape.feature_low, g, x.rows);
    const MatView<T> share = block(tape.share, g, x.rows), gated = block(tape.gated, g, x.rows);
    dense::forward<T>(prepared.feature_down[g], {}, x, low, context);
    dense::forward<T>(prepared.feature_up[g], {}, low, share, context);
    for (Index t = 0; t < x.rows; ++t) {
      for (Index i = 0; i < x.cols; ++i) {
        share(t, i) = math::sigmoid<T>(share(t, i));
        gated(t, i) = T(2) * share(t, i) * x(t, i);
      }
    }
  }
}

template <class T>
void Home<T>::features_backward(const Params<const T>& params, MatView<const T> x, const Tape& tape,
                                MatView<const T> d_gated, MatView<T> dx, const Params<T>& grad,
                                const Context& context) const {
  const Index tokens = x.rows, rank = config_.feature_rank;
  for (Index g = 0; g < config_.groups; ++g) {
    const Workspace::Frame frame(context.scratch);
    const MatView<T> d_share = context.scratch.template take<T>(tokens, config_.width);
    const MatView<T> d_low = context.scratch.template take<T>(tokens, rank);
    const MatView<const T> d = d_gated.row_block(g * tokens, tokens);
    const MatView<T> share = block(tape.share, g, tokens), low = block(tape.feature_low, g, tokens);
    rows::fill(d_low, 0);
    for (Index t = 0; t < tokens; ++t) {
      for (Index i = 0; i < config_.width; ++i) {
        const T s = share(t, i);
        d_share(t, i) = T(2) * d(t, i) * x(t, i) * s * (T(1) - s);
        if (dx.data != nullptr) dx(t, i) = std::fma(T(2) * s, d(t, i), dx(t, i));
      }
    }
    dense::input_gradient<T>(rows::block(params.feature_up, g, config_.width), d_share, d_low,
                             context);
    if (dx.data != nullptr) {
      dense::input_gradient<T>(rows::block(params.feature_down, g, rank), d_low, dx, context);
    }
    if (grad.feature_up.data != nullptr) {
      dense::weight_gradient<T>(low, d_share, rows::block(grad.feature_up, g, config_.width),
                                context);
    }
    if (grad.feature_down.data != nullptr) {
      dense::weight_gradient<T>(x, d_low, rows::block(grad.feature_down, g, rank), context);
    }
  }
}

template <class T>
void Home<T>::normalise(const Buffers& buffers, Index e, const Tape& tape) const noexcept {
  const Index tokens = tape.tokens;
  const MatView<T> unit = block(tape.unit, e, tokens);
  if (config_.norm == HomeNorm::none) return;
  if (config_.norm != HomeNorm::batch) {
    const bool centred = config_.norm == HomeNorm::layer;
    for (Index t = 0; t < tokens; ++t) {
      tape.inverse(e, t) =
          norm::standardise<T>(unit.row(t), config_.norm_epsilon, centred, unit.row(t));
    }
    return;
  }
  for (Index i = 0; i < config_.out; ++i) {
    double mean = 0, variance = 0;
    if (config_.training) {
      for (Index t = 0; t < tokens; ++t) mean += unit(t, i);
      mean /= static_cast<double>(tokens);
      for (Index t = 0; t < tokens; ++t) {
        const double away = unit(t, i) - mean;
        variance = std::fma(away, away, variance);
      }
      variance /= static_cast<double>(tokens);
    } else {
      mean = buffers.mean(e, i);
      variance = buffers.variance(e, i);
    }
    tape.mean(e, i) = static_cast<T>(mean);
    tape.variance(e, i) = static_cast<T>(variance);
    const double inverse = 1 / std::sqrt(variance + config_.norm_epsilon);
    tape.inverse(e, i) = static_cast<T>(inverse);
    for (Index t = 0; t < tokens; ++t) {
      unit(t, i) = static_cast<T>((unit(t, i) - mean) * inverse);
    }
  }
}

template <class T>
void Home<T>::normalise_backward(Index e, const Tape& tape, MatView<T> d_unit,
                                 MatView<T> work) const noexcept {
  const Index tokens = tape.tokens;
  const MatView<const T> unit = block(tape.unit, e, tokens);
  if (config_.norm == HomeNorm::none) return;
  for (Index t = 0; t < tokens && config_.norm != HomeNorm::batch; ++t) {
    const std::span<T> kept = work.row(t);
    std::ranges::copy(d_unit.row(t), kept.begin());
    std::ranges::fill(d_unit.row(t), T(0));
    norm::standardise_backward<T>(unit.row(t), kept, tape.inverse(e, t),
                                  config_.norm == HomeNorm::layer, d_unit.row(t));
  }
  for (Index i = 0; i < config_.out && config_.norm == HomeNorm::batch; ++i) {
    double mean = 0, along = 0;
    for (Index t = 0; t < tokens && config_.training; ++t) {
      mean += d_unit(t, i);
      along = std::fma(static_cast<double>(d_unit(t, i)), unit(t, i), along);
    }
    mean /= static_cast<double>(tokens);
    along /= static_cast<double>(tokens);
    for (Index t = 0; t < tokens; ++t) {
      const double left = std::fma(-along, static_cast<double>(unit(t, i)), d_unit(t, i) - mean);
      d_unit(t, i) = static_cast<T>(left * tape.inverse(e, i));
    }
  }
}

template <class T>
void Home<T>::expert_forward(const Prepared& prepared, const Buffers& buffers, Index e,
                             MatView<const T> x, const Tape& tape, const Context& context) const {
  const Index tokens = x.rows;
  const MatView<T> unit = block(tape.unit, e, tokens), value = block(tape.value, e, tokens);
  if (config_.rank == 0) {
    dense::forward<T>(prepared.weight[e], prepared.bias.row_block(e, 1), x, unit, context);
  } else {
    const MatView<T> low = block(tape.low, e, tokens);
    dense::forward<T>(prepared.down[e], {}, x, low, context);
    dense::forward<T>(prepared.up[e], {}, low, unit, context);
    for (Index t = 0; t < tokens; ++t) {
      for (T& u : unit.row(t)) u *= config_.scale;
    }
  }
  normalise(buffers, e, tape);
  for (Index t = 0; t < tokens; ++t) {
    for (Index i = 0; i < config_.out; ++i) {
      const T scaled = prepared.norm.empty() ? unit(t, i) : prepared.norm(e, i) * unit(t, i);
      value(t, i) = prepared.shift.empty()
                        ? scaled
                        : std::fma(prepared.norm(e, i), unit(t, i), prepared.shift(e, i));
    }
  }
  gated::activate<T>(config_.activation, rows::every(tokens, context.scratch), value, {},
                     block(tape.expert, e, tokens), context);
}

template <class T>
void Home<T>::decide(std::span<T> gate, std::span<T> self) const noexcept {
  const auto experts = static_cast<std::size_t>(config_.experts);
  for (Index n = 0; n < config_.tasks; ++n) {
    const auto visible = row(config_.visible, n), own = row(config_.own, n);
    const std::span<T> g = gate.subspan(static_cast<std::size_t>(n) * experts, experts);
    const std::span<T> s = self.subspan(static_cast<std::size_t>(n) * experts, experts);
    const auto owned = std::ranges::count_if(own, [](std::uint8_t o) { return o != 0; });
    for (std::size_t e = 0; e < experts; ++e) {
      if (visible[e] == 0) g[e] = -std::numeric_limits<T>::infinity();
      if (own[e] == 0) s[e] = -std::numeric_limits<T>::infinity();
    }
    stages::softmax<T>(g, g);
    if (owned != 1) {
      stages::softmax<T>(s, s);
      continue;
    }
    for (std::size_t e = 0; e < experts; ++e) s[e] = own[e] != 0 ? math::sigmoid<T>(s[e]) : T(0);
  }
}

template <class T>
void Home<T>::decide_backward(std::span<const T> gate, std::span<const T> self,
                              std::span<const T> d, std::span<T> d_gate,
                              std::span<T> d_self) const noexcept {
  const auto experts = static_cast<std::size_t>(config_.experts);
  for (Index n = 0; n < config_.tasks; ++n) {
    const auto part = [&](auto all) {
      return all.subspan(static_cast<std::size_t>(n) * experts, experts);
    };
    const auto own = row(config_.own, n);
    stages::softmax_backward<T>(part(gate), part(d), part(d_gate));
    if (std::ranges::count_if(own, [](std::uint8_t o) { return o != 0; }) != 1) {
      stages::softmax_backward<T>(part(self), part(d), part(d_self));
      continue;
    }
    for (std::size_t e = 0; e < experts; ++e) {
      const T s = part(self)[e];
      if (own[e] != 0) part(d_self)[e] = part(d)[e] * s * (T(1) - s);
    }
  }
}

template <class T>
void Home<T>::forward(const Prepared& prepared, const Buffers& buffers, MatView<const T> x,
                      MatView<T> y, Tape& tape, const Context& context) const {
  const Index tokens = x.rows, experts = config_.experts;
  require_shape("x", x, tokens, config_.width);
  require_shape("y", y, config_.tasks * tokens, config_.out);
  require_apart("y", y, "x", x);
  require(tape.gate.rows >= tokens, Errc::limit_exceeded, "Home: ", tokens,
          " tokens, the tape was made for ", tape.gate.rows);
  check_buffers(buffers);
  require(!batch_statistics() || tokens > 0, Errc::invalid_argument,
          "Home: a batch norm in training needs a token");
  tape.tokens = tokens;
  gate_features(prepared, x, tape, context);
  for (Index e = 0; e < experts; ++e) {
    const Workspace::Frame frame(context.scratch);
    expert_forward(prepared, buffers, e, input_of(e, x, tape), tape, context);
  }
  dense::forward<T>(prepared.gate, {}, x, tape.gate.row_block(0, tokens), context);
  dense::forward<T>(prepared.self, {}, x, tape.self.row_block(0, tokens), context);
  parallel_for(context, tokens, kTokensPerTask, [&](Index begin, Index end, int) {
    for (Index t = begin; t < end; ++t) {
      decide(tape.gate.row(t), tape.self.row(t));
      for (Index n = 0; n < config_.tasks; ++n) {
        const std::span<T> out = y.row(n * tokens + t);
        std::ranges::fill(out, T(0));
        for (Index e = 0; e < experts; ++e) {
          const T weight = tape.gate(t, n * experts + e) + tape.self(t, n * experts + e);
          if (weight == T(0)) continue;
          const std::span<const T> f = tape.expert.row(e * tokens + t);
          for (Index i = 0; i < config_.out; ++i) out[i] = std::fma(weight, f[i], out[i]);
        }
      }
    }
  });
}

template <class T>
void Home<T>::update(const Tape& tape, MatView<T> mean, MatView<T> variance) const {
  require_shape("mean", mean, config_.experts, config_.out);
  require_shape("variance", variance, config_.experts, config_.out);
  const auto tokens = static_cast<double>(tape.tokens);
  const double unbiased = tape.tokens > 1 ? tokens / (tokens - 1) : 1;
  for (Index e = 0; e < config_.experts; ++e) {
    for (Index i = 0; i < config_.out; ++i) {
      mean(e, i) = std::fma(config_.momentum, tape.mean(e, i) - mean(e, i), mean(e, i));
      const T now = static_cast<T>(tape.variance(e, i) * unbiased);
      variance(e, i) = std::fma(config_.momentum, now - variance(e, i), variance(e, i));
    }
  }
}

template <class T>
void Home<T>::expert_backward(const Params<const T>& params, Index e, MatView<const T> x,
                              const Tape& tape, MatView<T> d_value, MatView<T> d_unit,
                              MatView<T> d_x, const Params<T>& grad, const Context& context) const {
  const Index tokens = tape.tokens, out = config_.out, rank = config_.rank;
  const MatView<const T> unit = block(tape.unit, e, tokens);
  for (Index t = 0; t < tokens; ++t) {
    for (Index i = 0; i < out; ++i) {
      const T d = d_value(t, i);
      if (grad.norm.data != nullptr) grad.norm(e, i) = std::fma(d, unit(t, i), grad.norm(e, i));
      if (grad.shift.data != nullptr) grad.shift(e, i) += d;
      d_unit(t, i) = params.norm.empty() ? d : d * params.norm(e, i);
    }
  }
  normalise_backward(e, tape, d_unit, d_value);
  if (rank == 0) {
    if (grad.bias.data != nullptr) dense::bias_gradient<T>(d_unit, rows::block(grad.bias, e, 1));
    if (grad.weight.data != nullptr) {
      dense::weight_gradient<T>(x, d_unit, rows::block(grad.weight, e, out), context);
    }
    if (d_x.data != nullptr) {
      dense::input_gradient<T>(rows::block(params.weight, e, out), d_unit, d_x, context);
    }
    return;
  }
  const MatView<T> d_low = context.scratch.template take<T>(tokens, rank);
  rows::fill(d_low, 0);
  for (Index t = 0; t < tokens; ++t) {
    for (T& d : d_unit.row(t)) d *= config_.scale;
  }
  dense::input_gradient<T>(rows::block(params.up, e, out), d_unit, d_low, context);
  if (grad.up.data != nullptr) {
    dense::weight_gradient<T>(block(tape.low, e, tokens), d_unit, rows::block(grad.up, e, out),
                              context);
  }
  if (grad.down.data != nullptr) {
    dense::weight_gradient<T>(x, d_low, rows::block(grad.down, e, rank), context);
  }
  if (d_x.data != nullptr) {
    dense::input_gradient<T>(rows::block(params.down, e, rank), d_low, d_x, context);
  }
}

template <class T>
void Home<T>::backward(const Params<const T>& params, const Buffers& buffers, const Tape& tape,
                       MatView<const T> x, MatView<const T> dy, MatView<T> dx,
                       const Params<T>& grad, const Context& context) const {
  const Index tokens = tape.tokens, experts = config_.experts, gates = config_.tasks * experts;
  check(params, false);
  check(grad, true);
  check_buffers(buffers);
  require_shape("x", x, tokens, config_.width);
  require_shape("dy", dy, config_.tasks * tokens, config_.out);
  if (dx.data != nullptr) require_shape("dx", dx, tokens, config_.width);
  const Workspace::Frame frame(context.scratch);
  const auto take = [&](Index rows, Index cols) {
    const MatView<T> taken = context.scratch.template take<T>(rows, cols);
    rows::fill(taken, 0);
    return taken;
  };
  const MatView<T> d_expert = take(experts * tokens, config_.out);
  const MatView<T> d_gate = take(tokens, gates), d_self = take(tokens, gates);
  const MatView<T> d_gated = take(config_.groups * tokens, config_.width);
  const WorkerRows<T> work(context.scratch, context.workers, 1, gates);
  parallel_for(context, tokens, kTokensPerTask, [&](Index begin, Index end, int worker) {
    const std::span<T> d = work(worker, 0);
    for (Index t = begin; t < end; ++t) {
      for (Index g = 0; g < gates; ++g) {
        const Index e = g % experts;
        const std::span<const T> out = dy.row(g / experts * tokens + t);
        const T weight = tape.gate(t, g) + tape.self(t, g);
        const bool used = config_.visible[g] != 0 || config_.own[g] != 0;
        d[g] = used ? gated::dot<T>(out, tape.expert.row(e * tokens + t)) : T(0);
        if (weight == T(0)) continue;
        const std::span<T> to = d_expert.row(e * tokens + t);
        for (Index i = 0; i < config_.out; ++i) to[i] = std::fma(weight, out[i], to[i]);
      }
      decide_backward(tape.gate.row(t), tape.self.row(t), d, d_gate.row(t), d_self.row(t));
    }
  });
  for (Index e = 0; e < experts; ++e) {
    const Workspace::Frame of_expert(context.scratch);
    const MatView<T> d_value = context.scratch.template take<T>(tokens, config_.out);
    const MatView<T> d_unit = context.scratch.template take<T>(tokens, config_.out);
    gated::activate_backward<T>(config_.activation, rows::every(tokens, context.scratch),
                                block(tape.value, e, tokens), {}, block(d_expert, e, tokens),
                                d_value, {}, context);
    const Index group = group_of(e);
    expert_backward(params, e, input_of(e, x, tape), tape, d_value, d_unit,
                    group < 0 ? dx : block(d_gated, group, tokens), grad, context);
  }
  features_backward(params, x, tape, d_gated, dx, grad, context);
  stages::project_backward<T>({params.gate, {}}, x, d_gate, dx, {grad.gate, {}}, context);
  stages::project_backward<T>({params.self, {}}, x, d_self, dx, {grad.self, {}}, context);
}

#ifndef MOLE_HEADER_ONLY
extern template class Home<float>;
extern template class Home<double>;
#endif

}  // namespace mole::inline MOLE_ABI
