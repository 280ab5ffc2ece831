// SPDX-License-Identifier: Apache-2.0
// AnyLayer: a prepared layer of any type behind one type, for a choice made at run time (a file,
// the command line, another language). Inference only; the layer's own bits.
#pragma once

#include <concepts>
#include <memory>
#include <utility>

#include "mole/core/config.hpp"
#include "mole/core/context.hpp"
#include "mole/layers/layer_input.hpp"
#include "mole/routing/routing.hpp"

namespace mole::inline MOLE_ABI {

template <class T>
class AnyLayer {
 public:
  /// Packs the weights into memory that the AnyLayer owns; copies share it. For layers whose router
  /// has no carry. Buffers are kept as they are: what they point to must outlive the AnyLayer.
  template <class Layer>
  requires std::same_as<typename Layer::Scalar, T> &&
      std::same_as<typename Layer::template Carry<T>, None>
      AnyLayer(Layer layer, const typename Layer::Weights& weights,
               const typename Layer::Buffers& buffers = {})
      : self_(std::make_shared<const Model<Layer>>(std::move(layer), weights, buffers)) {}

  Index input_width() const noexcept { return self_->input_width(); }
  Index output_width() const noexcept { return self_->output_width(); }
  Index experts() const noexcept { return self_->experts(); }
  std::size_t scratch_bytes(Index max_tokens, int workers) const noexcept {
    return self_->scratch_bytes(max_tokens, workers);
  }
  std::size_t table_bytes(Index max_tokens) const noexcept {
    return self_->table_bytes(max_tokens);
  }
  RoutingTable<T> make_table(Workspace& memory, Index max_tokens) const {
    return self_->make_table(memory, max_tokens);
  }

  /// Fills `table` with the routing and writes y (AdaptedLinear) or adds to it (Mixture).
  void forward(const LayerInput<T>& input, RoutingTable<T>& table, MatView<T> y,
               const Context& context) const {
    self_->forward(input, table, y, context);
  }

 private:
  struct Interface {
    virtual ~Interface() = default;
    virtual Index input_width() const noexcept = 0;
    virtual Index output_width() const noexcept = 0;
    virtual Index experts() const noexcept = 0;
    virtual std::size_t scratch_bytes(Index max_tokens, int workers) const noexcept = 0;
    virtual std::size_t table_bytes(Index max_tokens) const noexcept = 0;
    virtual RoutingTable<T> make_table(Workspace& memory, Index max_tokens) const = 0;
    virtual void forward(const LayerInput<T>& input, RoutingTable<T>& table, MatView<T> y,
                         const Context& context) const = 0;
  };

  template <class Layer>
  struct Model final : Interface {
    Model(Layer l, const typename Layer::Weights& weights, const typename Layer::Buffers& b)
        : layer(std::move(l)), buffers(b), memory(layer.prepared_bytes()) {
      Workspace workspace(memory.span());
      prepared = layer.prepare(weights, workspace);
    }
    Index input_width() const noexcept override { return layer.input_width(); }
    Index output_width() const noexcept override { return layer.output_width(); }
    Index experts() const noexcept override { return layer.router().experts(); }
    std::size_t scratch_bytes(Index max_tokens, int workers) const noexcept override {
      return layer.scratch_bytes(max_tokens, workers);
    }
    std::size_t table_bytes(Index max_tokens) const noexcept override {
      return RoutingTable<T>::bytes(max_tokens, experts(), layer.router().max_per_token());
    }
    RoutingTable<T> make_table(Workspace& workspace, Index max_tokens) const override {
      return layer.make_table(workspace, max_tokens);
    }
    void forward(const LayerInput<T>& input, RoutingTable<T>& table, MatView<T> y,
                 const Context& context) const override {
      layer.route(prepared, buffers, input, {}, table, {}, nullptr, context);
      layer.apply(prepared, input, table.view(), y, nullptr, context);
    }

    Layer layer;
    typename Layer::Buffers buffers;
    Buffer memory;
    typename Layer::Prepared prepared;
  };

  std::shared_ptr<const Interface> self_;
};

}  // namespace mole::inline MOLE_ABI
