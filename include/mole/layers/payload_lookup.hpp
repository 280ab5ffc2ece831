// SPDX-License-Identifier: Apache-2.0
// PayloadLookup: a bank of key and payload, whose payload is adapted to the query by a mixture.
//
//   S_b = the `take` entries whose keys are most like the query q_b, best first (prototype.hpp)
//   y = for every query, for every entry i of S_b: P_i + Σ_e gate_e(q_b) f_e(P_i), row by row
//
// Shapes: q [queries, query width], keys [entries, query width], P [entries · rows, width], y
// [queries · take · rows, width]. `rows` are the rows of one payload, prompts to be put before a
// sequence for example. The mixture's router reads the query, its experts the rows. The selection
// is a constant: keys learn from pull_loss (losses/pull.hpp) alone. Where a query finds fewer
// entries, NaN in a key for one, the rows that are left are 0 and nothing learns from them. An
// entry that is appended changes nothing for queries that do not select it.
//
// Uni-RAG's bank of prompts by style (2025), derived from its text; no code is published.
#pragma once

#include <algorithm>
#include <utility>

#include "mole/core/config.hpp"
#include "mole/core/context.hpp"
#include "mole/core/params.hpp"
#include "mole/kernels/rows.hpp"
#include "mole/layers/layer_checks.hpp"
#include "mole/layers/layer_input.hpp"
#include "mole/layers/mixture.hpp"
#include "mole/routers/prototype.hpp"

namespace mole::inline MOLE_ABI {

/// M: a Mixture whose router has no carry and no buffers.
template <class M>
class PayloadLookup {
 public:
  static_assert(!M::needs_base, "PayloadLookup hands no base product to its adapter");
  using Scalar = typename M::Scalar;
  using T = Scalar;
  using Lookup = PrototypeRouter<T>;

  struct Weights {
    PrototypeParams<const T> lookup;
    MatView<const T> payload;  ///< [entries · rows, width]
    typename M::Weights adapter;

    template <class F, class... P>
    static void visit(F&& f, P&... p) {
      visit_group<PrototypeParams<const T>>(Leaf{"lookup"}, f, p.lookup...);
      f(Leaf{"payload"}, p.payload...);
      visit_group<typename M::Weights>(Leaf{"adapter"}, f, p.adapter...);
    }
  };
  /// Weights, gradients or moments.
  template <class V>
  struct Params {
    PrototypeParams<V> lookup;
    MatView<V> payload;
    typename M::template Params<V> adapter;

    template <class F, class... P>
    static void visit(F&& f, P&... p) {
      visit_group<PrototypeParams<V>>(Leaf{"lookup"}, f, p.lookup...);
      f(Leaf{"payload"}, p.payload...);
      visit_group<typename M::template Params<V>>(Leaf{"adapter"}, f, p.adapter...);
    }
  };
  struct Prepared {
    typename Lookup::Prepared lookup;
    MatView<const T> payload;
    typename M::Prepared adapter;
  };
  struct Tape {
    typename Lookup::Tape lookup;
    RoutingTable<T> found;
    std::span<std::int32_t> entry;  ///< [queries · take], best first; -1 = none
    MatView<T> rows, queries;       ///< [queries · take · rows, .], what the mixture reads
    typename M::Tape adapter;
  };

  /// Throws shape_mismatch or invalid_argument unless the parts fit: the lookup selects the entries
  /// (weight unit, no unconditional one), the adapter maps rows to rows and routes by queries.
  PayloadLookup(Lookup lookup, M adapter, Index rows);

  const Lookup& lookup() const noexcept { return lookup_; }
  const M& adapter() const noexcept { return adapter_; }
  Index width() const noexcept { return adapter_.output_width(); }
  Index take() const noexcept { return lookup_.max_per_token(); }
  /// Rows of y for so many queries.
  Index output_rows(Index queries) const noexcept {
    return saturating_product(saturating_product(queries, take()), rows_);
  }

  std::size_t prepared_bytes() const noexcept;
  std::size_t tape_bytes(Index max_queries) const noexcept;
  std::size_t scratch_bytes(Index max_queries, int workers) const noexcept;
  Prepared prepare(const Weights& weights, Workspace& memory) const;
  Tape make_tape(Workspace& memory, Index max_queries) const;

  /// Writes y. `tape` null is inference. Throws shape_mismatch, limit_exceeded or out_of_memory
  /// before it writes y.
  void forward(const Prepared& prepared, MatView<const T> query, MatView<T> y, Tape* tape,
               const Context& context) const;

  /// d_lookup holds what losses added to the logits of the lookup, d_adapter what they added to the
  /// tape of the adapter's router. Adds into dquery and grad, each where it has memory. Throws
  /// before it adds anything.
  void backward(const Weights& weights, const Tape& saved, MatView<const T> query,
                MatView<const T> dy, const typename Lookup::Tape& d_lookup,
                const typename M::RouterTape& d_adapter, MatView<T> dquery, const Params<T>& grad,
                const Context& context) const;

 private:
  Index rows_of_query() const noexcept { return saturating_product(take(), rows_); }
  void check_payload(MatView<const T> payload) const {
    require_shape("payload", payload, saturating_product(lookup_.experts(), rows_), width());
  }
  template <class Arena>
  void take_rows(Arena& arena, Index queries, Tape& tape) const;
  LayerInput<T> adapter_input(const Tape& tape, Index queries) const;
  /// Zeros the rows that are left where a query found fewer entries.
  void clear_missing(const Tape& tape, MatView<T> rows) const;
  /// Orders the entries of every query and copies their rows.
  void gather(MatView<const T> payload, MatView<const T> query, const Tape& tape) const;
  void scatter(const Tape& saved, MatView<const T> d_rows, MatView<const T> d_queries,
               MatView<T> dpayload, MatView<T> dquery) const;

  Lookup lookup_;
  M adapter_;
  Index rows_ = 0;
};

template <class M>
PayloadLookup<M>::PayloadLookup(Lookup lookup, M adapter, Index rows)
    : lookup_(std::move(lookup)), adapter_(std::move(adapter)), rows_(rows) {
  require(rows >= 1, Errc::invalid_argument, "PayloadLookup: rows: expected at least 1, got ",
          rows);
  require(!lookup_.config().unconditional, Errc::invalid_argument,
          "PayloadLookup: lookup: expected no unconditional entry");
  require(lookup_.config().weight == PrototypeWeight::unit, Errc::invalid_argument,
          "PayloadLookup: lookup: expected the weight unit");
  require(adapter_.input_width() == adapter_.output_width(), Errc::shape_mismatch,
          "PayloadLookup: adapter: expected as many inputs as outputs, got ",
          adapter_.input_width(), " and ", adapter_.output_width());
  require(adapter_.router().input_width() == lookup_.input_width(), Errc::shape_mismatch,
          "PayloadLookup: adapter: expected a router for queries of ", lookup_.input_width(),
          ", got ", adapter_.router().input_width());
}

template <class M>
std::size_t PayloadLookup<M>::prepared_bytes() const noexcept {
  ByteCounter counter;
  counter.take<T>(saturating_product(lookup_.experts(), rows_), width());
  return counter.bytes() + lookup_.prepared_bytes() + adapter_.prepared_bytes();
}

template <class M>
template <class Arena>
void PayloadLookup<M>::take_rows(Arena& arena, Index queries, Tape& tape) const {
  tape.entry = arena.template take<std::int32_t>(saturating_product(queries, take()));
  tape.rows = arena.template take<T>(output_rows(queries), width());
  tape.queries = arena.template take<T>(output_rows(queries), lookup_.input_width());
}

template <class M>
std::size_t PayloadLookup<M>::tape_bytes(Index max_queries) const noexcept {
  ByteCounter counter;
  Tape tape;
  take_rows(counter, max_queries, tape);
  return counter.bytes() + lookup_.tape_bytes(max_queries) +
         RoutingTable<T>::bytes(max_queries, lookup_.experts(), take()) +
         adapter_.tape_bytes(output_rows(max_queries));
}

template <class M>
std::size_t PayloadLookup<M>::scratch_bytes(Index max_queries, int workers) const noexcept {
  ByteCounter counter;
  Tape gradients;
  take_rows(counter, max_queries, gradients);
  return counter.bytes() + tape_bytes(max_queries) + lookup_.scratch_bytes(max_queries, workers) +
         adapter_.scratch_bytes(output_rows(max_queries), workers);
}

template <class M>
auto PayloadLookup<M>::prepare(const Weights& weights, Workspace& memory) const -> Prepared {
  check_payload(weights.payload);
  const MatView<T> payload = memory.take<T>(weights.payload.rows, width());
  for (Index r = 0; r < payload.rows; ++r) {
    std::ranges::copy(weights.payload.row(r), payload.row(r).begin());
  }
  return {lookup_.prepare(weights.lookup, memory), payload,
          adapter_.prepare(weights.adapter, memory)};
}

template <class M>
auto PayloadLookup<M>::make_tape(Workspace& memory, Index max_queries) const -> Tape {
  Tape tape;
  take_rows(memory, max_queries, tape);
  tape.lookup = lookup_.make_tape(memory, max_queries);
  tape.found = RoutingTable<T>(memory, max_queries, lookup_.experts(), take());
  tape.adapter = adapter_.make_tape(memory, output_rows(max_queries));
  return tape;
}

template <class M>
auto PayloadLookup<M>::adapter_input(const Tape& tape, Index queries) const -> LayerInput<T> {
  const Index count = queries * rows_of_query();
  LayerInput<T> input(tape.rows.row_block(0, count));
  input.router_x = tape.queries.row_block(0, count);
  return input;
}

template <class M>
void PayloadLookup<M>::gather(MatView<const T> payload, MatView<const T> query,
                              const Tape& tape) const {
  const Routing<T> found = tape.found.view();
  for (Index b = 0; b < query.rows; ++b) {
    const auto entries =
        tape.entry.subspan(static_cast<std::size_t>(b * take()), static_cast<std::size_t>(take()));
    std::ranges::fill(entries, -1);
    Index count = 0;
    for (Index s = found.token_begin[b]; s < found.token_begin[b + 1]; ++s, ++count) {
      Index at = count;
      const T likeness = tape.lookup.logits(b, found.expert[s]);
      for (; at > 0 && tape.lookup.logits(b, entries[at - 1]) < likeness; --at) {
        entries[at] = entries[at - 1];
      }
      entries[at] = found.expert[s];
    }
    for (Index i = 0; i < rows_of_query(); ++i) {
      const Index to = b * rows_of_query() + i, entry = entries[i / rows_];
      std::ranges::copy(query.row(b), tape.queries.row(to).begin());
      if (entry < 0) {
        std::ranges::fill(tape.rows.row(to), T(0));
      } else {
        std::ranges::copy(payload.row(entry * rows_ + i % rows_), tape.rows.row(to).begin());
      }
    }
  }
}

template <class M>
void PayloadLookup<M>::clear_missing(const Tape& tape, MatView<T> rows) const {
  for (Index r = 0; r < rows.rows; ++r) {
    if (tape.entry[r / rows_] < 0) std::ranges::fill(rows.row(r), T(0));
  }
}

template <class M>
void PayloadLookup<M>::forward(const Prepared& prepared, MatView<const T> query, MatView<T> y,
                               Tape* tape, const Context& context) const {
  require_shape("y", y, output_rows(query.rows), width());
  require_apart("y", y, "query", query);
  const Workspace::Frame frame(context.scratch);
  Tape own;
  if (tape == nullptr) own = make_tape(context.scratch, query.rows);
  Tape& used = tape != nullptr ? *tape : own;
  lookup_.forward(prepared.lookup, {}, {.x = query}, {}, {}, used.found, {}, &used.lookup, context);
  gather(prepared.payload, query, used);
  require_scratch(context, adapter_.scratch_bytes(y.rows, context.workers));
  rows::copy<T>(used.rows.row_block(0, y.rows), y);
  adapter_.forward(prepared.adapter, adapter_input(used, query.rows), y, &used.adapter, context);
  clear_missing(used, y);
}

template <class M>
void PayloadLookup<M>::scatter(const Tape& saved, MatView<const T> d_rows,
                               MatView<const T> d_queries, MatView<T> dpayload,
                               MatView<T> dquery) const {
  for (Index r = 0; r < d_rows.rows; ++r) {
    const Index entry = saved.entry[r / rows_];
    for (Index i = 0; dquery.data != nullptr && i < dquery.cols; ++i) {
      dquery(r / rows_of_query(), i) += d_queries(r, i);
    }
    if (entry < 0 || dpayload.data == nullptr) continue;
    for (Index i = 0; i < dpayload.cols; ++i) {
      dpayload(entry * rows_ + r % rows_, i) += d_rows(r, i);
    }
  }
}

template <class M>
void PayloadLookup<M>::backward(const Weights& weights, const Tape& saved, MatView<const T> query,
                                MatView<const T> dy, const typename Lookup::Tape& d_lookup,
                                const typename M::RouterTape& d_adapter, MatView<T> dquery,
                                const Params<T>& grad, const Context& context) const {
  const Index count = output_rows(query.rows);
  require_shape("dy", dy, count, width());
  check_payload(weights.payload);
  if (grad.payload.data != nullptr) check_payload(grad.payload);
  if (dquery.data != nullptr) require_shape("dquery", dquery, query.rows, query.cols);
  lookup_.require_backward(weights.lookup, saved.lookup, {.x = query}, saved.found.view(), d_lookup,
                           dquery, grad.lookup);
  const Workspace::Frame frame(context.scratch);
  require_scratch(context, scratch_bytes(query.rows, context.workers));
  const MatView<T> d_rows = context.scratch.template take<T>(count, width());
  const MatView<T> d_adapted = context.scratch.template take<T>(count, width());
  const MatView<T> d_queries = context.scratch.template take<T>(count, query.cols);
  rows::fill(d_queries, 0);
  rows::copy(dy, d_rows);
  rows::copy(dy, d_adapted);
  clear_missing(saved, d_adapted);
  adapter_.backward(weights.adapter, saved.adapter, adapter_input(saved, query.rows), d_adapted,
                    d_adapter, {.x = d_rows, .router_x = d_queries}, grad.adapter, context);
  scatter(saved, d_rows, d_queries, grad.payload, dquery);
  lookup_.backward(weights.lookup, {}, saved.lookup, {.x = query}, {}, {}, saved.found.view(),
                   d_lookup, {}, dquery, grad.lookup, {}, context);
}

}  // namespace mole::inline MOLE_ABI
