// SPDX-License-Identifier: Apache-2.0
// MixtureFile::check: what `load` checks, for a layer whose type is known only from the file.
#include <string>
#include <type_traits>
#include <vector>

#include "mole/io/mixture_file.hpp"
#include "mole/layers/kinds.hpp"

namespace mole::inline MOLE_ABI {
namespace {

using T = double;  // holds every storage type
using SomeMixture = Mixture<DenseRouter<T>, LoraBank<T>>;

/// What a layer is made of, by its description alone.
struct Parts {
  const Description* router = nullptr;
  const Description* experts = nullptr;
  bool has_base = false, fan_in_fan_out = false;
};

const Description& part(const Description& whole, std::string_view name) {
  const Description* found = whole.part(name);
  require(found != nullptr, Errc::config_error, detail::shown(whole.kind), ": part ",
          detail::shown(name), " is missing");
  return *found;
}

void check_experts(const Parts& parts) {
  Index router_experts = 0, bank_experts = 0;
  with_kind(RouterTypes<T>(), parts.router->kind, [&]<class R>(std::type_identity<R>) {
    router_experts = from_description<R>(*parts.router).experts();
  });
  with_kind(BankTypes<T>(), parts.experts->kind, [&]<class B>(std::type_identity<B>) {
    bank_experts = from_description<B>(*parts.experts).experts();
  });
  require(router_experts == bank_experts, Errc::config_error, "the router has ", router_experts,
          " experts, the bank has ", bank_experts);
}

Parts split(const Description& layer) {
  using Linear = AdaptedLinear<SomeMixture>;
  Parts parts;
  const Description* mixture = &layer;
  if (layer.kind == Linear::Config::kind()) {
    parts.has_base = true;
    parts.fan_in_fan_out = DescriptionOf<Linear>::own_config(layer).fan_in_fan_out;
    mixture = &part(layer, "mixture");
  }
  DescriptionOf<SomeMixture>::require_form(*mixture);
  parts.router = &part(*mixture, "router");
  parts.experts = &part(*mixture, "experts");
  check_experts(parts);
  return parts;
}

template <class P>
void expect_leaves(const char* group, const P& params, detail::TensorPlan& plan) {
  for (const detail::LeafShape& leaf : detail::leaf_shapes(params)) {
    plan.expect(std::string(group) + "." + leaf.path, leaf.rows, leaf.cols, std::nullopt);
  }
}

template <class R>
void expect_buffers(const R& router, const SafeTensors& file, const MixtureRecord& record,
                    detail::TensorPlan& plan) {
  std::vector<std::vector<T>> memory;
  typename R::Buffers buffers = {};
  detail::visit_buffers(buffers, [&](const std::string& path, std::span<const T>& values) {
    if (!plan.expect_buffer(path, std::nullopt)) return;
    memory.push_back(file.read<T>(record.tensor(path)));
    values = memory.back();
  });
  detail::require_read_buffers(plan.where(), router, buffers);
}

}  // namespace

void MixtureFile::check(const MixtureRecord& record) const {
  detail::TensorPlan plan(file_, record);
  const std::string where = plan.where();
  const Parts parts = detail::with_context(where, [&] { return split(record.layer); });
  with_kind(RouterTypes<T>(), parts.router->kind, [&]<class R>(std::type_identity<R>) {
    const auto router = from_description<R>(*parts.router);
    require_plausible(where, router.params_bytes());
    Buffer memory(router.params_bytes());
    Workspace workspace(memory.span());
    expect_leaves("router", router.make_params(workspace), plan);
    expect_buffers(router, file_, record, plan);
  });
  with_kind(BankTypes<T>(), parts.experts->kind, [&]<class B>(std::type_identity<B>) {
    const auto bank = from_description<B>(*parts.experts);
    require_plausible(where, bank.template params_bytes<T>());
    Buffer memory(bank.template params_bytes<T>());
    Workspace workspace(memory.span());
    expect_leaves("experts", bank.template make_params<T>(workspace), plan);
    if (!parts.has_base) return;
    const Index in = bank.input_width(), out = bank.output_width();
    plan.expect("weight", parts.fan_in_fan_out ? in : out, parts.fan_in_fan_out ? out : in,
                std::nullopt);
    if (record.has("bias")) plan.expect("bias", 1, out, std::nullopt);
  });
  plan.finish();
  for (const std::string& tensor : plan.parameters()) {
    const std::vector<T> values = file_.read<T>(tensor);
    detail::require_finite(where + ": tensor " + detail::shown(tensor),
                           as_row(std::span<const T>(values)));
  }
}

}  // namespace mole::inline MOLE_ABI
