// SPDX-License-Identifier: Apache-2.0
// Trained mixtures in safetensors files: router, experts, base weight, buffers and config.
//
//   mole::save_mixture("moe.safetensors", layer, {{router}, experts.weights()});
//
//   const auto loaded = mole::load_mixture<Layer>("moe.safetensors");
//   mole::Session session(loaded.layer(), loaded.weights());
//   session.forward(x, y, loaded.buffers());
//
// Several layers of a model share a file, each under its name:
//
//   mole::MixtureFileWriter writer;
//   writer.add("model.layers.0.mlp", layer0, weights0);
//   writer.add("model.layers.1.mlp", layer1, weights1, buffers1);
//   writer.save("moe.safetensors");
//
//   const auto file = mole::MixtureFile::open("moe.safetensors");      // file.names()
//   const auto loaded = file.load<Layer>("model.layers.1.mlp");
//
// What is saved and loaded computes the same bits. docs/mixture_file.md says what is in the file.
//
// Needs the compiled library.
#pragma once

#include <cmath>
#include <cstddef>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "mole/core/config.hpp"
#include "mole/core/description.hpp"
#include "mole/core/error.hpp"
#include "mole/core/half.hpp"
#include "mole/core/params.hpp"
#include "mole/core/view.hpp"
#include "mole/io/description_json.hpp"
#include "mole/io/safetensors.hpp"
#include "mole/io/safetensors_writer.hpp"
#include "mole/layers/description.hpp"
#include "mole/layers/owned_weights.hpp"

namespace mole::inline MOLE_ABI {

/// The format that is written, and the newest that is read.
inline constexpr int kMixtureFormat = 1;

/// What the file says about one mixture.
struct MixtureRecord {
  std::string name;
  Description layer;
  /// Tensors that are there although the description does not ask for them: the bias of a base
  /// weight, buffers. Paths below the name.
  std::vector<std::string> optional_tensors;

  bool has(std::string_view path) const noexcept;
  /// The name of a tensor in the file.
  std::string tensor(std::string_view path) const;
  /// `mixture "name"`, for messages.
  std::string where() const;
};

/// A layer with the parameters and buffers that were in a file. Move-only.
template <class Layer>
class LoadedMixture {
 public:
  using T = typename Layer::Scalar;

  explicit LoadedMixture(Layer layer) : layer_(std::move(layer)), weights_(layer_) {}

  const Layer& layer() const noexcept { return layer_; }
  typename Layer::Weights weights() const { return weights_.params(); }
  typename Layer::Buffers buffers() const noexcept { return buffers_; }

  /// Writable views of the same memory: Layer::Params<T> where experts are stored as T.
  const StoredParams<Layer>& params() const noexcept { return weights_.params(); }

 private:
  friend class MixtureFile;

  Layer layer_;
  OwnedWeights<Layer> weights_;
  std::map<std::string, std::vector<T>> buffer_memory_;
  typename Layer::Buffers buffers_ = {};
};

namespace detail {

/// call(), whose errors then start with `where`.
template <class F>
auto with_context(const std::string& where, F call) {
  try {
    return call();
  } catch (const Error& error) {
    fail(error.code(), where, ": ", error.what());
  }
}

/// Asks the router whether buffers that were read from a file fit. What it calls an invalid
/// argument is a fault of the file here: config_error.
template <class R, class Buffers>
void require_read_buffers(const std::string& where, const R& router, const Buffers& buffers) {
  if constexpr (requires { router.require_buffers(buffers); }) {
    try {
      router.require_buffers(buffers);
    } catch (const Error& error) {
      const bool is_argument = error.code() == Errc::invalid_argument;
      fail(is_argument ? Errc::config_error : error.code(), where, ": ", error.what());
    }
  }
}

/// f(path, values) for every buffer; a router without buffers has none.
template <class Buffers, class F>
void visit_buffers(Buffers& buffers, F&& f) {
  if constexpr (!std::is_same_v<std::remove_const_t<Buffers>, None>) {
    const Leaf group{"buffers"};
    visit_group<std::remove_const_t<Buffers>>(
        group, [&](const Leaf& leaf, auto& values) { f(leaf.path(), values); }, buffers);
  }
}

/// The tensors that one mixture must have, compared with those that the file has.
class TensorPlan {
 public:
  TensorPlan(const SafeTensors& file, const MixtureRecord& record) : file_(file), record_(record) {}

  /// A parameter [rows, cols] that `target` can hold without rounding; without a target, of any
  /// weight type.
  void expect(const std::string& path, Index rows, Index cols, std::optional<Dtype> target);
  /// A buffer; false if the record does not name it.
  bool expect_buffer(const std::string& path, std::optional<Dtype> target);
  /// Names in the file of the parameters expected so far.
  const std::vector<std::string>& parameters() const noexcept { return parameters_; }
  /// Throws if the file has other tensors of this mixture, or the record names unknown ones.
  void finish() const;
  /// `file: mixture "name"`, the start of every message.
  std::string where() const { return file_.name() + ": " + record_.where(); }

 private:
  const StoredTensor& find(const std::string& path, std::optional<Dtype> target);

  const SafeTensors& file_;
  const MixtureRecord& record_;
  std::vector<std::string> parameters_, buffers_;  // names in the file
};

/// A parameter by its path. One that is absent is 0 x 0.
struct LeafShape {
  std::string path;
  Index rows = 0, cols = 0;
  bool operator==(const LeafShape&) const = default;
};

template <class P>
std::vector<LeafShape> leaf_shapes(const P& params) {
  std::vector<LeafShape> shapes;
  P::visit(
      [&](const Leaf& leaf, const auto& view) {
        shapes.push_back({leaf.path(), view.rows, view.cols});
      },
      params);
  return shapes;
}

/// Throws shape_mismatch unless `given` are the parameters expected; those in `optional` may be
/// absent.
void require_leaves(const std::vector<LeafShape>& expected, const std::vector<LeafShape>& given,
                    std::span<const std::string_view> optional);

/// Throws numeric_error if a parameter is not finite.
template <class V>
void require_finite(const std::string& what, MatView<const V> values) {
  for (Index r = 0; r < values.rows; ++r) {
    for (Index c = 0; c < values.cols; ++c) {
      const auto value = widen<std::conditional_t<is_half<V>, float, V>>(values(r, c));
      require(std::isfinite(value), Errc::numeric_error, what, ": expected finite weights, found ",
              value, " at [", r, ", ", c, "]");
    }
  }
}

}  // namespace detail

/// The mixtures of one file. A value: copies share the memory.
class MixtureFile {
 public:
  /// Checks the format, the records and that every tensor belongs to a mixture. Throws format_error
  /// (no mixture file, or a broken one), unsupported (a newer format), config_error (records and
  /// tensors do not fit), and what SafeTensors::open throws.
  static MixtureFile open(const std::string& path, const SafeTensorsLimits& limits = {});
  /// Of a file that is read already; takes it over.
  explicit MixtureFile(SafeTensors file);
  /// Whether the file says that it holds mixtures, of whatever format.
  static bool is_mixture_file(const SafeTensors& file) noexcept;

  int format() const noexcept { return format_; }
  const SafeTensors& file() const noexcept { return file_; }
  /// In the order in which they were added.
  const std::vector<MixtureRecord>& records() const noexcept { return records_; }
  std::vector<std::string> names() const;

  /// Throws not_found with the nearest names.
  const MixtureRecord& at(std::string_view name) const;
  /// Of a file that holds a single mixture, whatever its name. Throws invalid_argument naming all
  /// if there are several.
  const MixtureRecord& only() const;

  /// Builds the layer and reads its tensors: all of it, or nothing. Weights may be stored in a type
  /// that converts to the layer's without rounding. Throws config_error (another kind, a field, a
  /// tensor that is missing or too much), shape_mismatch, unsupported (stored in a wider type),
  /// numeric_error (NaN or infinity in a parameter), not_found.
  template <class Layer>
  LoadedMixture<Layer> load(std::string_view name) const {
    return load<Layer>(at(name));
  }
  template <class Layer>
  LoadedMixture<Layer> load(const MixtureRecord& record) const;

  /// Checks what `load` checks, for any mixture of kinds the library knows. Throws as `load`;
  /// unsupported for an unknown kind.
  void check(const MixtureRecord& record) const;

 private:
  /// Throws config_error if the config asks for much more memory than the file holds.
  void require_plausible(const std::string& where, std::size_t bytes) const;
  void parse(int format);

  int format_ = 0;
  SafeTensors file_;
  std::vector<MixtureRecord> records_;
};

/// Collects mixtures and writes them. Keeps views: weights and buffers must outlive the last
/// `bytes` or `save`. A call that throws changes nothing.
class MixtureFileWriter {
 public:
  /// Throws invalid_argument (a name that is taken or is, up to a dot, the start of another; an
  /// empty name beside others), shape_mismatch (weights that are not those of the layer),
  /// numeric_error (a parameter that is not finite), and what `to_json` throws.
  template <class Layer>
  void add(std::string name, const Layer& layer, const typename Layer::Weights& weights,
           const typename Layer::Buffers& buffers = {});

  /// Metadata of the caller. Throws invalid_argument for keys that start with "mole.", and what
  /// SafeTensorsWriter::set_metadata throws.
  void set_metadata(std::string key, std::string value);

  std::vector<std::byte> bytes() const { return complete().bytes(); }
  /// Throws what SafeTensorsWriter::save throws.
  void save(const std::string& path) const { complete().save(path); }

 private:
  void check_name(const std::string& name) const;
  SafeTensorsWriter complete() const;

  SafeTensorsWriter writer_;
  std::vector<MixtureRecord> records_;
};

/// Saves one mixture without a name. Throws what MixtureFileWriter throws.
template <class Layer>
void save_mixture(const std::string& path, const Layer& layer,
                  const typename Layer::Weights& weights,
                  const typename Layer::Buffers& buffers = {}) {
  MixtureFileWriter writer;
  writer.add("", layer, weights, buffers);
  writer.save(path);
}

/// Loads the only mixture of a file. Throws what MixtureFile throws.
template <class Layer>
LoadedMixture<Layer> load_mixture(const std::string& path, const SafeTensorsLimits& limits = {}) {
  const MixtureFile file = MixtureFile::open(path, limits);
  return file.load<Layer>(file.only());
}

template <class Layer>
LoadedMixture<Layer> MixtureFile::load(const MixtureRecord& record) const {
  using T = typename Layer::Scalar;
  detail::TensorPlan plan(file_, record);
  Layer layer =
      detail::with_context(plan.where(), [&] { return from_description<Layer>(record.layer); });
  require_plausible(plan.where(), StoredParams<Layer>::bytes(layer));
  LoadedMixture<Layer> loaded(std::move(layer));
  for (const std::string_view path : StoredParams<Layer>::kOptional) {
    if (!record.has(path)) loaded.weights_.leave_out(path);
  }
  StoredParams<Layer>::visit(
      [&]<class V>(const Leaf& leaf, const MatView<V>& view) {
        plan.expect(leaf.path(), view.rows, view.cols, dtype_of<V>);
      },
      loaded.weights_.params());
  detail::visit_buffers(loaded.buffers_, [&](const std::string& path, std::span<const T>& values) {
    if (!plan.expect_buffer(path, dtype_of<T>)) return;
    values = loaded.buffer_memory_.emplace(path, file_.read<T>(record.tensor(path))).first->second;
  });
  plan.finish();
  detail::require_read_buffers(plan.where(), loaded.layer_.router(), loaded.buffers_);
  StoredParams<Layer>::visit(
      [&]<class V>(const Leaf& leaf, const MatView<V>& view) {
        if (view.rows == 0 && view.cols == 0) return;
        const std::string tensor = record.tensor(leaf.path());
        file_.read<V>(tensor, view);
        detail::require_finite<V>(plan.where() + ": tensor " + detail::shown(tensor), view);
      },
      loaded.weights_.params());
  return loaded;
}

template <class Layer>
void MixtureFileWriter::add(std::string name, const Layer& layer,
                            const typename Layer::Weights& weights,
                            const typename Layer::Buffers& buffers) {
  using T = typename Layer::Scalar;
  check_name(name);
  MixtureRecord record{std::move(name), describe(layer), {}};
  const auto context = [&](auto&& call) { return detail::with_context(record.where(), call); };
  context([&] {
    const OwnedWeights<Layer> expected(layer);
    detail::require_leaves(detail::leaf_shapes(expected.params()), detail::leaf_shapes(weights),
                           StoredParams<Layer>::kOptional);
    if constexpr (requires { layer.router().require_buffers(buffers); }) {
      layer.router().require_buffers(buffers);
    }
    Layer::Weights::visit(
        [&]<class V>(const Leaf& leaf, const MatView<const V>& view) {
          require_shape(leaf.path(), view, view.rows, view.cols);
          detail::require_finite(leaf.path(), view);
        },
        weights);
    to_json(record.layer);
  });
  for (const std::string_view path : StoredParams<Layer>::kOptional) {
    for (const detail::LeafShape& leaf : detail::leaf_shapes(weights)) {
      if (leaf.path == path && leaf.rows > 0) record.optional_tensors.emplace_back(path);
    }
  }
  SafeTensorsWriter next = writer_;
  Layer::Weights::visit(
      [&]<class V>(const Leaf& leaf, const MatView<const V>& view) {
        if (view.rows > 0 || view.cols > 0) next.add<V>(record.tensor(leaf.path()), view);
      },
      weights);
  detail::visit_buffers(buffers, [&](const std::string& path, std::span<const T> values) {
    if (values.empty()) return;
    next.add<T>(record.tensor(path), as_row(values), {static_cast<Index>(values.size())});
    record.optional_tensors.push_back(path);
  });
  records_.push_back(std::move(record));
  writer_ = std::move(next);
}

}  // namespace mole::inline MOLE_ABI
