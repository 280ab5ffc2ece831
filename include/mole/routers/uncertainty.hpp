// SPDX-License-Identifier: Apache-2.0
// UncertaintyRouter: gates from several dropout passes of one linear router (Monte Carlo dropout).
//
//   z^m = W (x ∘ f_m) + b (+ overrides)      p^m = softmax of the k largest z^m, all with k = 0
//   μ = mean_m p^m      C = Σ_m (p^m - μ)(p^m - μ)ᵀ / (samples - 1)
//   mean     g = μ
//   snr      s = μ / (sqrt(diag C) + epsilon)      g = s / Σ s
//   whiten   q^m = (C + ridge I)⁻¹ (p^m - μ)       g = mean_m q^m / (|q^m| + epsilon)
//
// Shapes: x [tokens, width], W [experts, width], b [1, experts], f (buffers.factor) [samples ·
// tokens, width], 0 or 1 / (1 - p), the rows of one sample together; without it every factor is 1.
// Every available expert has a slot. The gates of `whiten` are near 0 and of either sign: a
// diagnosis, not weights. The tape's logits are mean_m z^m and its prob is μ; losses may use both.
// Statistics are in double.
//
// Zhang et al., "Efficient Deweather Mixture-of-Experts with Uncertainty-Aware Feature-Wise Linear
// Modulation" (MoFME), AAAI 2024: the uncertainty-aware router.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <span>
#include <string_view>

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/kernels/rows.hpp"
#include "mole/routing/call.hpp"
#include "mole/routing/head.hpp"
#include "mole/routing/router.hpp"
#include "mole/routing/stages.hpp"

namespace mole::inline MOLE_ABI {

enum class UncertaintyGates { mean, snr, whiten };
constexpr std::array<std::string_view, 3> enum_names(UncertaintyGates) noexcept {
  return {"mean", "snr", "whiten"};
}

template <class T>
struct UncertaintyTape : RouterTape<T> {
  MatView<T> samples;   ///< [tokens · samples, experts], p^m; the samples of a token together
  MatView<T> variance;  ///< [tokens, experts], diag C
  MatView<T> whitened;  ///< like samples: q^m / (|q^m| + epsilon); empty unless whiten
};

template <class T>
class UncertaintyRouter {
 public:
  using Scalar = T;
  template <class V>
  using Params = LinearParams<V>;
  using Prepared = LinearPrepared<T>;
  template <class V>
  using Carry = None;
  using Tape = UncertaintyTape<T>;
  static constexpr Scope scope = Scope::token;
  static constexpr GradientKind gradient = GradientKind::exact;

  struct Buffers {
    MatView<const T> factor = {};  ///< [samples · tokens, width], or empty: ones

    /// Of one call: not saved with the router.
    template <class F, class... B>
    static void visit(F&&, B&...) {}
  };

  struct Config {
    Index width = 0, experts = 0;
    Index samples = 2;  ///< 1 or more; 2 or more unless the gates are mean
    Index k = 0;        ///< 0 ... experts, 0: all
    UncertaintyGates gates = UncertaintyGates::mean;
    T epsilon = T(1e-5);
    T ridge = T(1e-5);
    bool bias = true;

    static constexpr std::string_view kind() noexcept { return "uncertainty"; }
    template <class F, class... C>
    static void visit(F&& f, C&... c) {
      f(Field::required("width"), c.width...);
      f(Field::required("experts"), c.experts...);
      f(Field::required("samples"), c.samples...);
      f(Field{"k"}, c.k...);
      f(Field{"gates"}, c.gates...);
      f(Field{"epsilon"}, c.epsilon...);
      f(Field{"ridge"}, c.ridge...);
      f(Field{"bias"}, c.bias...);
    }
  };

  /// Throws invalid_argument, naming the field.
  explicit UncertaintyRouter(const Config& config);

  const Config& config() const noexcept { return config_; }
  Index input_width() const noexcept { return config_.width; }
  Index experts() const noexcept { return config_.experts; }
  Index max_per_token() const noexcept { return config_.experts; }

  std::size_t params_bytes() const noexcept { return linear_.params_bytes(); }
  std::size_t prepared_bytes() const noexcept { return linear_.prepared_bytes(); }
  std::size_t scratch_bytes(Index max_tokens, int workers) const noexcept;
  std::size_t tape_bytes(Index max_tokens) const noexcept;
  Params<T> make_params(Workspace& memory) const { return linear_.make_params(memory); }
  Prepared prepare(const Params<const T>& params, Workspace& memory) const {
    return linear_.prepare(params, memory);
  }
  Tape make_tape(Workspace& memory, Index max_tokens) const { return take(memory, max_tokens); }

  void forward(const Prepared& prepared, const Buffers& buffers, const Tokens<T>& tokens,
               const Overrides<T>& overrides, None, RoutingTable<T>& table, None, Tape* tape,
               const Context& context) const;

  void backward(const Params<const T>& params, const Buffers& buffers, const Tape& saved,
                const Tokens<T>& tokens, const Overrides<T>& overrides, None,
                const Routing<T>& routing, const Tape& d_tape, None, MatView<T> dx,
                const Params<T>& grad, None, const Context& context) const;

 private:
  /// What one worker needs for one token.
  struct Row {
    std::span<double> mean, d_mean, sum, direction;  // [experts]
    std::span<double> factor, d_covariance;          // [experts · experts]
    std::span<double> centred, d_centred;            // [samples · experts]
    std::span<T> gate;                               // [experts]
    std::span<std::int32_t> chosen;                  // [experts]
  };
  struct Rows {
    WorkerRows<double> vectors, squares, samples;
    WorkerRows<T> gate;
    WorkerRows<std::int32_t> chosen;
  };
  template <class Arena>
  Tape take(Arena& arena, Index tokens) const;
  template <class Arena>
  Rows take_rows(Arena& arena, int workers) const;
  static Row row_of(const Rows& rows, int worker) noexcept;

  RouterShape shape() const noexcept { return {config_.width, config_.experts, config_.experts}; }
  void check_call(const Tokens<T>& tokens, const Buffers& buffers) const;
  /// x ∘ f_m into `scaled`, or x itself.
  MatView<const T> sample_input(Index m, const Tokens<T>& tokens, const Buffers& buffers,
                                MatView<T> scaled) const noexcept;
  /// p^m of one token from its logits, which the overrides have seen.
  void sample(std::span<const T> logits, std::span<T> p, const Row& row) const noexcept;
  /// Mean and variance of the samples of token t.
  void moments(Index t, const Tape& tape, const Row& row) const noexcept;
  void decide(Index t, const Tape& tape, const Row& row) const noexcept;
  void whiten(Index t, const Tape& tape, const Row& row) const noexcept;
  /// The gradient of p^m, by token, into row.d_centred.
  void decide_backward(Index t, const Tape& tape, std::span<const T> dgate,
                       std::span<const T> dprob, const Row& row) const noexcept;
  void snr_backward(Index t, const Tape& tape, std::span<const T> dgate,
                    const Row& row) const noexcept;
  void whiten_backward(std::span<const T> dgate, const Row& row) const noexcept;
  /// Cholesky factor of C + ridge I, lower, and the solution of (C + ridge I) x = x in place.
  void factorise(const Row& row) const noexcept;
  void solve(const Row& row, std::span<double> x) const noexcept;

  Config config_;
  Linear<T> linear_;
};

template <class T>
UncertaintyRouter<T>::UncertaintyRouter(const Config& config)
    : config_(config),
      linear_(
          linear_head<T>("UncertaintyRouter", config.width, config.experts, config.bias).linear) {
  constexpr const char* kName = "UncertaintyRouter";
  const bool mean = config.gates == UncertaintyGates::mean;
  require_field(config.samples >= (mean ? 1 : 2), kName, "samples",
                mean ? "at least 1" : "at least 2", config.samples);
  require_field(config.k >= 0 && config.k <= config.experts, kName, "k", "0 ... experts", config.k);
  require_positive(kName, "epsilon", config.epsilon);
  require_positive(kName, "ridge", config.ridge);
}

template <class T>
template <class Arena>
auto UncertaintyRouter<T>::take(Arena& arena, Index tokens) const -> Tape {
  Tape tape;
  static_cast<RouterTape<T>&>(tape) = take_tape<T>(arena, shape(), tokens);
  const Index samples = saturating_product(tokens, config_.samples);
  tape.samples = arena.template take<T>(samples, config_.experts);
  tape.variance = arena.template take<T>(tokens, config_.experts);
  if (config_.gates == UncertaintyGates::whiten) {
    tape.whitened = arena.template take<T>(samples, config_.experts);
  }
  return tape;
}

template <class T>
template <class Arena>
auto UncertaintyRouter<T>::take_rows(Arena& arena, int workers) const -> Rows {
  const Index experts = config_.experts;
  return {WorkerRows<double>(arena, workers, 4, experts),
          WorkerRows<double>(arena, workers, 2, saturating_product(experts, experts)),
          WorkerRows<double>(arena, workers, 2, saturating_product(config_.samples, experts)),
          WorkerRows<T>(arena, workers, 1, experts),
          WorkerRows<std::int32_t>(arena, workers, 1, experts)};
}

template <class T>
auto UncertaintyRouter<T>::row_of(const Rows& rows, int worker) noexcept -> Row {
  return {rows.vectors(worker, 0), rows.vectors(worker, 1), rows.vectors(worker, 2),
          rows.vectors(worker, 3), rows.squares(worker, 0), rows.squares(worker, 1),
          rows.samples(worker, 0), rows.samples(worker, 1), rows.gate(worker, 0),
          rows.chosen(worker, 0)};
}

template <class T>
std::size_t UncertaintyRouter<T>::tape_bytes(Index max_tokens) const noexcept {
  ByteCounter counter;
  take(counter, max_tokens);
  return counter.bytes();
}

template <class T>
std::size_t UncertaintyRouter<T>::scratch_bytes(Index max_tokens, int workers) const noexcept {
  ByteCounter counter;
  take(counter, max_tokens);
  take_rows(counter, workers);
  counter.take<T>(max_tokens, config_.width);
  counter.take<T>(max_tokens, config_.width);
  counter.take<T>(max_tokens, config_.experts);
  counter.take<T>(saturating_product(max_tokens, config_.samples), config_.experts);
  return counter.bytes() + stages::project_backward_bytes(config_.experts);
}

template <class T>
void UncertaintyRouter<T>::check_call(const Tokens<T>& tokens, const Buffers& buffers) const {
  check_tokens(tokens);
  if (buffers.factor.data == nullptr) return;
  require_shape("buffers.factor", buffers.factor, config_.samples * tokens.count(), config_.width);
}

template <class T>
MatView<const T> UncertaintyRouter<T>::sample_input(Index m, const Tokens<T>& tokens,
                                                    const Buffers& buffers,
                                                    MatView<T> scaled) const noexcept {
  if (buffers.factor.data == nullptr) return tokens.x;
  const MatView<const T> factor = buffers.factor.row_block(m * scaled.rows, scaled.rows);
  for (Index t = 0; t < scaled.rows; ++t) {
    for (Index i = 0; i < scaled.cols; ++i) scaled(t, i) = tokens.x(t, i) * factor(t, i);
  }
  return scaled;
}

template <class T>
void UncertaintyRouter<T>::sample(std::span<const T> logits, std::span<T> p,
                                  const Row& row) const noexcept {
  if (config_.k == 0) return stages::softmax<T>(logits, p);
  const std::span<std::int32_t> room = row.chosen.first(static_cast<std::size_t>(config_.k));
  const Index count = stages::select_top_k<T>(logits, room);
  const std::span<const std::int32_t> chosen = room.first(static_cast<std::size_t>(count));
  const std::span<T> share = row.gate.first(static_cast<std::size_t>(count));
  stages::share_of_selection<T>({}, logits, chosen, share);
  std::ranges::fill(p, T(0));
  for (Index i = 0; i < count; ++i) p[chosen[i]] = share[i];
}

template <class T>
void UncertaintyRouter<T>::moments(Index t, const Tape& tape, const Row& row) const noexcept {
  const Index samples = config_.samples, experts = config_.experts;
  const double less = std::max<double>(1, static_cast<double>(samples - 1));
  std::ranges::fill(row.mean, 0.0);
  std::ranges::fill(row.sum, 0.0);
  for (Index m = 0; m < samples; ++m) {
    for (Index e = 0; e < experts; ++e) row.mean[e] += tape.samples(t * samples + m, e);
  }
  for (double& mean : row.mean) mean /= static_cast<double>(samples);
  for (Index m = 0; m < samples; ++m) {
    for (Index e = 0; e < experts; ++e) {
      const double away = tape.samples(t * samples + m, e) - row.mean[e];
      row.centred[m * experts + e] = away;
      row.sum[e] = std::fma(away, away, row.sum[e]);
    }
  }
  for (Index e = 0; e < experts; ++e) {
    row.sum[e] /= less;  // the variance
    tape.prob(t, e) = static_cast<T>(row.mean[e]);
    tape.variance(t, e) = static_cast<T>(row.sum[e]);
  }
}

template <class T>
void UncertaintyRouter<T>::factorise(const Row& row) const noexcept {
  const Index n = config_.experts;
  const double less = static_cast<double>(config_.samples - 1);
  for (Index i = 0; i < n; ++i) {
    for (Index j = 0; j <= i; ++j) {
      double sum = 0;
      for (Index m = 0; m < config_.samples; ++m) {
        sum = std::fma(row.centred[m * n + i], row.centred[m * n + j], sum);
      }
      sum /= less;
      if (i == j) sum += config_.ridge;
      for (Index k = 0; k < j; ++k) {
        sum = std::fma(-row.factor[i * n + k], row.factor[j * n + k], sum);
      }
      row.factor[i * n + j] = i == j ? std::sqrt(sum) : sum / row.factor[j * n + j];
    }
  }
}

template <class T>
void UncertaintyRouter<T>::solve(const Row& row, std::span<double> x) const noexcept {
  const Index n = config_.experts;
  for (Index i = 0; i < n; ++i) {
    for (Index k = 0; k < i; ++k) x[i] = std::fma(-row.factor[i * n + k], x[k], x[i]);
    x[i] /= row.factor[i * n + i];
  }
  for (Index i = n - 1; i >= 0; --i) {
    for (Index k = i + 1; k < n; ++k) x[i] = std::fma(-row.factor[k * n + i], x[k], x[i]);
    x[i] /= row.factor[i * n + i];
  }
}

template <class T>
void UncertaintyRouter<T>::whiten(Index t, const Tape& tape, const Row& row) const noexcept {
  const Index samples = config_.samples, experts = config_.experts;
  factorise(row);
  std::ranges::fill(row.sum, 0.0);
  for (Index m = 0; m < samples; ++m) {
    const std::span<double> q = row.direction;
    std::copy_n(row.centred.begin() + m * experts, experts, q.begin());
    solve(row, q);
    double square = 0;
    for (const double value : q) square = std::fma(value, value, square);
    const double size = std::sqrt(square) + config_.epsilon;
    for (Index e = 0; e < experts; ++e) {
      tape.whitened(t * samples + m, e) = static_cast<T>(q[e] / size);
      row.sum[e] += q[e] / size;
    }
  }
  for (Index e = 0; e < experts; ++e) {
    row.gate[e] = static_cast<T>(row.sum[e] / static_cast<double>(samples));
  }
}

template <class T>
void UncertaintyRouter<T>::decide(Index t, const Tape& tape, const Row& row) const noexcept {
  moments(t, tape, row);
  if (config_.gates == UncertaintyGates::whiten) return whiten(t, tape, row);
  double sum = 0;
  for (Index e = 0; e < config_.experts; ++e) {
    const bool snr = config_.gates == UncertaintyGates::snr;
    row.direction[e] = snr ? row.mean[e] / (std::sqrt(row.sum[e]) + config_.epsilon) : row.mean[e];
    sum += row.direction[e];
  }
  if (config_.gates == UncertaintyGates::mean || sum == 0) sum = 1;
  for (Index e = 0; e < config_.experts; ++e) {
    row.gate[e] = static_cast<T>(row.direction[e] / sum);
  }
}

template <class T>
void UncertaintyRouter<T>::forward(const Prepared& prepared, const Buffers& buffers,
                                   const Tokens<T>& tokens, const Overrides<T>& overrides, None,
                                   RoutingTable<T>& table, None, Tape* tape,
                                   const Context& context) const {
  const Index count = tokens.count(), samples = config_.samples, experts = config_.experts;
  check_forward(shape(), tokens, overrides, table, tape);
  check_call(tokens, buffers);
  const Workspace::Frame frame(context.scratch);
  const Tape kept = tape != nullptr ? *tape : take(context.scratch, count);
  const Rows rows = take_rows(context.scratch, context.workers);
  const MatView<T> scaled = context.scratch.template take<T>(count, config_.width);
  const MatView<T> logits = context.scratch.template take<T>(count, experts);
  table.begin(count);
  rows::fill(kept.logits.row_block(0, count), 0);
  for (Index m = 0; m < samples; ++m) {
    stages::project<T>(prepared, sample_input(m, tokens, buffers, scaled), logits, context);
    parallel_for(context, count, kTokensPerTask, [&](Index begin, Index end, int worker) {
      for (Index t = begin; t < end; ++t) {
        stages::override_logits<T>(overrides, t, logits.row(t));
        sample(logits.row(t), kept.samples.row(t * samples + m), row_of(rows, worker));
        for (Index e = 0; e < experts; ++e) {
          kept.logits(t, e) += logits(t, e) / static_cast<T>(samples);
        }
      }
    });
  }
  parallel_for(context, count, kTokensPerTask, [&](Index begin, Index end, int worker) {
    const Row row = row_of(rows, worker);
    for (Index t = begin; t < end; ++t) {
      decide(t, kept, row);
      std::size_t slots = 0;
      for (Index e = 0; e < experts; ++e) {
        if (!(kept.logits(t, e) > -std::numeric_limits<T>::infinity())) continue;
        row.chosen[slots] = static_cast<std::int32_t>(e);
        row.gate[slots++] = row.gate[e];
      }
      table.select(t, row.chosen.first(slots), row.gate.first(slots));
    }
  });
  table.finish();
  if (tape != nullptr) record_gates(table.view(), *tape);
}

template <class T>
void UncertaintyRouter<T>::snr_backward(Index t, const Tape& tape, std::span<const T> dgate,
                                        const Row& row) const noexcept {
  const Index samples = config_.samples, experts = config_.experts;
  const double less = static_cast<double>(samples - 1);
  double sum = 0, mean = 0;
  for (Index e = 0; e < experts; ++e) {
    row.direction[e] = row.mean[e] / (std::sqrt(row.sum[e]) + config_.epsilon);
    sum += row.direction[e];
  }
  if (sum == 0) return;
  for (Index e = 0; e < experts; ++e) {
    mean = std::fma(row.direction[e] / sum, static_cast<double>(dgate[e]), mean);
  }
  for (Index e = 0; e < experts; ++e) {
    const double deviation = std::sqrt(row.sum[e]), size = deviation + config_.epsilon;
    const double d = (dgate[e] - mean) / sum;
    row.d_mean[e] += d / size;
    if (deviation == 0) continue;
    const double d_variance = -d * row.direction[e] / size / (2 * deviation);
    for (Index m = 0; m < samples; ++m) {
      const double away = tape.samples(t * samples + m, e) - row.mean[e];
      row.d_centred[m * experts + e] += 2 * d_variance * away / less;
    }
  }
}

template <class T>
void UncertaintyRouter<T>::whiten_backward(std::span<const T> dgate,
                                           const Row& row) const noexcept {
  const Index samples = config_.samples, n = config_.experts;
  const double less = static_cast<double>(samples - 1);
  factorise(row);
  std::ranges::fill(row.d_covariance, 0.0);
  const std::span<double> q = row.direction, d = row.sum;
  for (Index m = 0; m < samples; ++m) {
    std::copy_n(row.centred.begin() + m * n, n, q.begin());
    solve(row, q);
    double square = 0, along = 0;
    for (Index e = 0; e < n; ++e) {
      d[e] = static_cast<double>(dgate[e]) / static_cast<double>(samples);
      square = std::fma(q[e], q[e], square);
      along = std::fma(q[e], d[e], along);
    }
    const double length = std::sqrt(square), size = length + config_.epsilon;
    const double back = length > 0 ? along / (length * size * size) : 0;
    for (Index e = 0; e < n; ++e) d[e] = std::fma(-back, q[e], d[e] / size);
    solve(row, d);
    for (Index i = 0; i < n; ++i) {
      row.d_centred[m * n + i] += d[i];
      for (Index j = 0; j < n; ++j) {
        row.d_covariance[i * n + j] = std::fma(-d[i], q[j], row.d_covariance[i * n + j]);
      }
    }
  }
  for (Index m = 0; m < samples; ++m) {
    for (Index i = 0; i < n; ++i) {
      double sum = 0;
      for (Index j = 0; j < n; ++j) {
        const double both = row.d_covariance[i * n + j] + row.d_covariance[j * n + i];
        sum = std::fma(both, row.centred[m * n + j], sum);
      }
      row.d_centred[m * n + i] += sum / less;
    }
  }
  for (Index m = 0; m < samples; ++m) {
    for (Index e = 0; e < n; ++e) row.d_mean[e] -= row.d_centred[m * n + e];
  }
}

template <class T>
void UncertaintyRouter<T>::decide_backward(Index t, const Tape& tape, std::span<const T> dgate,
                                           std::span<const T> dprob,
                                           const Row& row) const noexcept {
  const Index samples = config_.samples, experts = config_.experts;
  moments(t, tape, row);
  std::ranges::fill(row.d_centred, 0.0);
  for (Index e = 0; e < experts; ++e) row.d_mean[e] = dprob[e];
  if (config_.gates == UncertaintyGates::snr) {
    snr_backward(t, tape, dgate, row);
  } else if (config_.gates == UncertaintyGates::whiten) {
    whiten_backward(dgate, row);
  } else {
    for (Index e = 0; e < experts; ++e) row.d_mean[e] += dgate[e];
  }
  for (Index m = 0; m < samples; ++m) {
    for (Index e = 0; e < experts; ++e) {
      row.d_centred[m * experts + e] += row.d_mean[e] / static_cast<double>(samples);
    }
  }
}

template <class T>
void UncertaintyRouter<T>::backward(const Params<const T>& params, const Buffers& buffers,
                                    const Tape& saved, const Tokens<T>& tokens, const Overrides<T>&,
                                    None, const Routing<T>& routing, const Tape& d_tape, None,
                                    MatView<T> dx, const Params<T>& grad, None,
                                    const Context& context) const {
  const Index count = tokens.count(), samples = config_.samples, experts = config_.experts;
  check_backward(shape(), saved, tokens, routing, d_tape, dx);
  check_call(tokens, buffers);
  linear_.check(params);
  linear_.check_gradient(grad);
  const Workspace::Frame frame(context.scratch);
  const Rows rows = take_rows(context.scratch, context.workers);
  const MatView<T> d_samples = context.scratch.template take<T>(count * samples, experts);
  parallel_for(context, count, kTokensPerTask, [&](Index begin, Index end, int worker) {
    const Row row = row_of(rows, worker);
    for (Index t = begin; t < end; ++t) {
      std::ranges::fill(row.gate, T(0));
      for (Index s = routing.token_begin[t]; s < routing.token_begin[t + 1]; ++s) {
        row.gate[routing.expert[s]] = d_tape.gate(0, s);
      }
      decide_backward(t, saved, row.gate, d_tape.prob.row(t), row);
      const std::span<T> d_logits = d_tape.logits.row(t);
      stages::override_logits_backward<T>(saved.logits.row(t), d_logits);
      for (Index m = 0; m < samples; ++m) {
        const Index at = t * samples + m;
        for (Index e = 0; e < experts; ++e) {
          row.gate[e] = static_cast<T>(row.d_centred[m * experts + e]);
          d_samples(at, e) = T(0);
        }
        stages::softmax_backward<T>(saved.samples.row(at), row.gate, d_samples.row(at));
        stages::override_logits_backward<T>(saved.logits.row(t), d_samples.row(at));
      }
      for (Index e = 0; e < experts; ++e) {
        const T of_mean = d_logits[e] / static_cast<T>(samples);
        for (Index m = 0; m < samples; ++m) {
          d_logits[e] += d_samples(t * samples + m, e);
          d_samples(t * samples + m, e) += of_mean;
        }
      }
    }
  });
  const MatView<T> scaled = context.scratch.template take<T>(count, config_.width);
  const MatView<T> d_scaled = context.scratch.template take<T>(count, config_.width);
  const bool dropped = buffers.factor.data != nullptr;
  for (Index m = 0; m < samples && count > 0; ++m) {
    const MatView<T> d_logits(d_samples.row(m).data(), count, experts, samples * experts);
    rows::fill(d_scaled, 0);
    const MatView<T> to = dx.data == nullptr ? MatView<T>() : dropped ? d_scaled : dx;
    stages::project_backward<T>(params, sample_input(m, tokens, buffers, scaled), d_logits, to,
                                grad, context);
    if (dx.data == nullptr || !dropped) continue;
    const MatView<const T> factor = buffers.factor.row_block(m * count, count);
    for (Index t = 0; t < count; ++t) {
      for (Index i = 0; i < dx.cols; ++i) {
        dx(t, i) = std::fma(d_scaled(t, i), factor(t, i), dx(t, i));
      }
    }
  }
}

#ifndef MOLE_HEADER_ONLY
extern template class UncertaintyRouter<float>;
extern template class UncertaintyRouter<double>;
#endif

static_assert(Router<UncertaintyRouter<float>>);
static_assert(Router<UncertaintyRouter<double>>);

}  // namespace mole::inline MOLE_ABI
