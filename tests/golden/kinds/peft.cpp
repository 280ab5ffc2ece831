// SPDX-License-Identifier: Apache-2.0
// lora.match: which modules an adapter's settings name. lora.scale_ops: scales changed between
// calls. checkpoint.lora: adapter folders on the linear layers of a small model.
#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "golden/golden.hpp"
#include "mole/algebra/adapter_scales.hpp"
#include "mole/layers/adapted_linear.hpp"
#include "mole/layers/lora.hpp"
#include "mole/routers/given.hpp"

#ifndef MOLE_HEADER_ONLY
#include "io/peft_match.hpp"
#include "mole/io/peft.hpp"
#include "mole/io/peft_apply.hpp"
#include "mole/io/peft_bank.hpp"
#endif

namespace {

using golden::Case;
using mole::Index;
using mole::MatView;
using Json = nlohmann::json;

template <class T>
MatView<T> copied(Case<T>& c, MatView<const T> from) {
  const MatView<T> made = c.memory().template take<T>(from.rows, from.cols);
  for (Index i = 0; i < from.size(); ++i) made.data[i] = from.data[i];
  return made;
}

/// y = x Wᵀ + b + mixture(x), from a y full of NaN.
template <class T, class M>
MatView<T> forward(Case<T>& c, const M& mixture, const typename M::Weights& weights, bool turned,
                   MatView<const T> weight, MatView<const T> bias,
                   const mole::LayerInput<T>& input) {
  const mole::AdaptedLinear<M> layer(mixture, {.fan_in_fan_out = turned});
  const MatView<T> y = c.memory().template take<T>(input.x.rows, mixture.output_width());
  std::fill_n(y.data, y.size(), std::numeric_limits<T>::quiet_NaN());
  const auto prepared = layer.prepare({weight, bias, weights}, c.memory());
  layer.forward(prepared, input, y, nullptr, c.context());
  return y;
}

void apply(const Json& op, mole::AdapterScales& scales) {
  const auto call = op.at(0).get<std::string>();
  if (call == "set_scale") {
    scales.set_scale(op.at(1).get<std::string>(), op.at(2).get<double>());
  } else if (call == "scale_layer") {
    scales.scale_layer(op.at(1).get<double>());
  } else if (call == "unscale_layer" && op.at(1).is_null()) {
    scales.unscale_layer();
  } else if (call == "unscale_layer") {
    scales.unscale_layer(op.at(1).get<double>());
  } else if (call == "set_adapter" && op.at(1).is_string()) {
    scales.set_adapter(op.at(1).get<std::string>());
  } else if (call == "set_adapter") {
    scales.set_adapter(op.at(1).get<std::vector<std::string>>());
  } else {
    throw std::runtime_error("unknown call " + call);
  }
}

template <class T>
void scale_ops(Case<T>& c) {
  using Mixture = mole::Mixture<mole::GivenRouter<T>, mole::LoraBank<T>>;
  const MatView<const T> x = c.matrix("in.x"), weight = c.matrix("param.weight");
  typename mole::LoraBank<T>::Config config{weight.cols, weight.rows, {}, {}};
  std::vector<mole::AdapterScales::Adapter> adapters;
  std::vector<const T*> down, up;
  for (const Json& adapter : c.config().at("adapters")) {
    const auto name = adapter.at("name").get<std::string>();
    const auto rank = adapter.at("r").get<Index>();
    const double scale = mole::lora_scale(adapter.at("lora_alpha").get<double>(), rank,
                                          adapter.at("use_rslora").get<bool>());
    adapters.push_back({name, scale});
    config.rank.push_back(rank);
    config.scale.push_back(static_cast<T>(scale));
    down.push_back(c.matrix("param.A." + name).data);
    up.push_back(c.matrix("param.B." + name).data);
  }
  const auto count = static_cast<Index>(adapters.size());
  const Mixture mixture(mole::GivenRouter<T>({weight.cols, count}), mole::LoraBank<T>(config));
  const typename Mixture::Weights weights{{}, {config.in, config.out, config.rank, down, up, {}}};
  const MatView<const T> bias = c.has("param.bias") ? c.matrix("param.bias") : MatView<const T>{};
  const MatView<T> gates = c.memory().template take<T>(x.rows, count);

  mole::AdapterScales scales(adapters);
  const Json& active = c.config().at("active");
  if (active.is_string()) {
    scales.set_adapter(active.get<std::string>());
  } else {
    scales.set_adapter(active.get<std::vector<std::string>>());
  }
  std::vector<double> all_scales, all_y;
  const auto record = [&] {
    scales.fill_gates(gates);
    mole::LayerInput<T> input(x);
    input.overrides.gates = gates;
    const MatView<T> y = forward<T>(c, mixture, weights, false, weight, bias, input);
    all_y.insert(all_y.end(), y.data, y.data + y.size());
    for (Index a = 0; a < count; ++a) all_scales.push_back(scales.scale(a));
  };
  record();
  for (const Json& op : c.config().at("ops")) {
    apply(op, scales);
    record();
  }
  c.expect("out.scaling", all_scales);
  c.expect("out.y", all_y);
}

GOLDEN_KIND("lora.scale_ops", scale_ops);

#ifndef MOLE_HEADER_ONLY

mole::ModuleKind module_kind(const std::string& type) {
  if (type == "linear") return mole::ModuleKind::linear;
  if (type == "conv1d") return mole::ModuleKind::conv1d;
  return type == "embedding" ? mole::ModuleKind::embedding : mole::ModuleKind::other;
}

mole::ModuleNames module_names(const Json& value) {
  if (value.is_null()) return {};
  if (value.is_string()) return {mole::ModuleNames::Form::pattern, {value.get<std::string>()}};
  return {mole::ModuleNames::Form::list, value.get<std::vector<std::string>>()};
}

template <class V>
std::vector<V> one_or_many(const Json& value) {
  if (value.is_null()) return {};
  return value.is_array() ? value.get<std::vector<V>>() : std::vector<V>{value.get<V>()};
}

mole::PeftConfig settings_of(const Json& config) {
  mole::PeftConfig settings;
  settings.rank = config.at("r");
  settings.alpha = config.at("lora_alpha");
  settings.use_rslora = config.at("use_rslora");
  settings.target_modules = module_names(config.at("target_modules"));
  settings.exclude_modules = module_names(config.at("exclude_modules"));
  settings.modules_to_save = one_or_many<std::string>(config.at("modules_to_save"));
  settings.layers_to_transform = one_or_many<std::int64_t>(config.at("layers_to_transform"));
  settings.layers_pattern = one_or_many<std::string>(config.at("layers_pattern"));
  for (const Json& item : config.at("rank_pattern")) {
    settings.rank_pattern.emplace_back(item.at(0), item.at(1).get<Index>());
  }
  for (const Json& item : config.at("alpha_pattern")) {
    settings.alpha_pattern.emplace_back(item.at(0), item.at(1).get<double>());
  }
  return settings;
}

template <class T>
void match(Case<T>& c) {
  const mole::PeftConfig settings = settings_of(c.config());
  const mole::io::PeftMatcher matcher(settings, c.name());
  std::vector<std::int64_t> matched, ranks;
  std::vector<double> scales;
  for (const Json& module : c.config().at("modules")) {
    const auto found = matcher.match(module.at(0).get<std::string>(),
                                     module_kind(module.at(1).get<std::string>()));
    matched.push_back(found.matched ? 1 : 0);
    ranks.push_back(found.rank);
    scales.push_back(found.scale);
  }
  const bool any = std::count(matched.begin(), matched.end(), 1) > 0;
  c.check(any != c.template config<bool>("expect_error"), "expect_error");
  c.expect("out.matched", matched);
  c.expect("out.r", ranks);
  c.expect("out.scaling", scales);
}

/// The model before loading.
template <class T>
std::vector<mole::HostModule> host_modules(Case<T>& c) {
  std::vector<mole::HostModule> modules;
  for (const auto& [path, module] : c.config().at("modules").items()) {
    mole::HostModule host{path, module_kind(module.at("type").template get<std::string>()), 1, 1};
    if (host.kind != mole::ModuleKind::other) {
      const std::vector<Index>& shape = c.shape("param.base." + path + ".weight");
      host.d_in = shape.at(0), host.d_out = shape.at(1);
      if (host.kind == mole::ModuleKind::linear) std::swap(host.d_in, host.d_out);
    }
    modules.push_back(host);
  }
  return modules;
}

/// A model of conv1d layers whose embedding is adapted as well: LoRA on an embedding cannot be
/// read, so the other modules are loaded by name. Empty for any other model.
template <class T>
std::vector<std::string> conv1d_without_embedding(Case<T>& c) {
  std::vector<std::string> names;
  bool embedding = false, conv1d = false;
  for (const auto& [path, module] : c.config().at("modules").items()) {
    const bool targeted = module.value("targeted", false);
    const bool is_embedding = module.at("type") == "embedding";
    embedding = embedding || (is_embedding && targeted);
    conv1d = conv1d || module.at("type") == "conv1d";
    if (!is_embedding && (targeted || module.contains("replaced"))) names.push_back(path);
  }
  return embedding && conv1d ? names : std::vector<std::string>{};
}

void check_module(golden::Record& c, const std::string& path, const Json& module,
                  const mole::PeftAdapter& adapter) {
  const mole::LoraModule* found = adapter.find(path);
  c.check((found != nullptr) == module.at("targeted").get<bool>(), path + ": targeted");
  for (const char* parameter : {"weight", "bias"}) {
    const Json replaced = module.value("replaced", Json::array());
    const bool wanted = std::find(replaced.begin(), replaced.end(), parameter) != replaced.end();
    c.check((adapter.find_replacement(path, parameter) != nullptr) == wanted,
            path + ": replaced " + parameter);
  }
  if (found == nullptr) return;
  c.check(found->rank == module.at("r").get<Index>(), path + ": rank");
  c.check(found->alpha == module.at("lora_alpha").get<double>(), path + ": alpha");
  c.check(found->scale == module.at("scaling").get<double>(), path + ": scale");
}

template <class T>
void run_linear(Case<T>& c, const std::string& path, bool turned,
                const mole::PeftAdapter& adapter) {
  const std::string base = "param.base." + path;
  const MatView<const T> x = c.matrix("in.x." + path);
  const MatView<T> weight = copied(c, c.matrix(base + ".weight"));
  const MatView<T> merged = copied<T>(c, weight);
  const bool has_bias = c.has(base + ".bias");
  const MatView<T> bias = has_bias ? copied(c, c.matrix(base + ".bias")) : MatView<T>{};
  const MatView<T> merged_bias = has_bias ? copied<T>(c, bias) : MatView<T>{};
  mole::apply_base_changes(adapter, path, weight, bias);

  const Index in = turned ? weight.rows : weight.cols, out = turned ? weight.cols : weight.rows;
  const mole::Lora<T> idle({in, out, {0}, {T(1)}});
  const T* const nothing = nullptr;
  const Index no_rank = 0;
  const typename mole::Lora<T>::Weights no_weights{
      {}, {in, out, {&no_rank, 1}, {&nothing, 1}, {&nothing, 1}, {}}};
  if (adapter.find(path) == nullptr) {
    c.expect("out.y." + path, forward<T>(c, idle, no_weights, turned, weight, bias, x));
    return;
  }
  const mole::AdapterBank<T> bank({&adapter, 1}, path);
  c.expect("out.y." + path, forward<T>(c, mole::Lora<T>(bank.bank().config()), {{}, bank.weights()},
                                       turned, weight, bias, x));
  if (!has_bias && bank.bank().config().bias) return;
  mole::merge_adapter(adapter, path, merged, merged_bias);
  c.expect("out.y." + path, forward<T>(c, idle, no_weights, turned, merged, merged_bias, x));
}

template <class T>
void run_embedding(Case<T>& c, const std::string& path, const mole::PeftAdapter& adapter) {
  const MatView<T> weight = copied(c, c.matrix("param.base." + path + ".weight"));
  mole::apply_base_changes(adapter, path, weight);
  const std::vector<std::int32_t> ids = c.ints("in.ids." + path);
  const MatView<T> y = c.memory().template take<T>(static_cast<Index>(ids.size()), weight.cols);
  for (Index t = 0; t < y.rows; ++t) {
    std::ranges::copy(weight.row(ids[static_cast<std::size_t>(t)]), y.row(t).begin());
  }
  c.expect("out.y." + path, y);
}

template <class T>
void checkpoint(Case<T>& c) {
  mole::PeftOptions options;
  options.residual_base = true;
  options.exact_svd = true;
  options.only = conv1d_without_embedding(c);
  const std::string folder = (c.folder() / c.template config<std::string>("checkpoint")).string();
  const mole::PeftAdapter adapter = mole::load_peft(folder, host_modules(c), options);
  for (const auto& [path, module] : c.config().at("modules").items()) {
    const auto kind = module_kind(module.at("type").template get<std::string>());
    if (kind == mole::ModuleKind::embedding && !options.only.empty()) {
      c.excuse("out.y." + path);
      continue;
    }
    check_module(c, path, module, adapter);
    if (kind == mole::ModuleKind::embedding) {
      run_embedding(c, path, adapter);
    } else {
      run_linear(c, path, kind == mole::ModuleKind::conv1d, adapter);
    }
  }
}

#endif

GOLDEN_COMPILED_KIND("lora.match", match);
GOLDEN_COMPILED_KIND("checkpoint.lora", checkpoint);

}  // namespace
