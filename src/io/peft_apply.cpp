// SPDX-License-Identifier: Apache-2.0
#include "mole/io/peft_apply.hpp"

#include <vector>

#include "io/text.hpp"
#include "mole/algebra/merge.hpp"
#include "mole/algebra/residual_base.hpp"

namespace mole::inline MOLE_ABI {
namespace {

// A matrix of its own.
template <class T>
struct Matrix {
  std::vector<T> values;
  MatView<T> view;

  Matrix(Index rows, Index cols) : values(static_cast<std::size_t>(rows * cols)) {
    view = MatView<T>(values.data(), rows, cols);
  }
};

template <class T>
void copy(MatView<const T> from, MatView<T> to) {
  for (Index r = 0; r < from.rows; ++r) {
    for (Index c = 0; c < from.cols; ++c) to(r, c) = from(r, c);
  }
}

template <class T>
Matrix<T> copied(MatView<const T> from) {
  Matrix<T> made(from.rows, from.cols);
  copy<T>(from, made.view);
  return made;
}

// The changed parameter, which is copied to its place when nothing can go wrong any more.
template <class T>
struct Change {
  Matrix<T> result{0, 0};
  MatView<T> place;

  void finish() const { copy<T>(result.view, place); }
};

std::string shown(const PeftAdapter& adapter, std::string_view path) {
  return io::shown_path(adapter.report().folder) + ": " + io::in_quotes(path);
}

template <class T>
void replace(const PeftAdapter& adapter, std::string_view path, const char* parameter,
             Change<T>& change) {
  const Replacement* found = adapter.find_replacement(path, parameter);
  if (found == nullptr) return;
  require(change.place.data != nullptr, Errc::shape_mismatch, shown(adapter, path), " has a saved ",
          parameter, ", but no ", parameter, " was given to hold it");
  adapter.read_replacement(*found, change.result.view);
}

template <class T>
void take_part_off(const LoraModule& module, MatView<T> weight) {
  if (module.base_change == BaseChange::pissa) {
    pissa_residual<T>(weight, module.rank, weight);
  } else if (module.base_change == BaseChange::olora) {
    olora_residual<T>(weight, module.rank, module.scale, weight);
  }
}

template <class T>
void add_low_rank(const PeftAdapter& adapter, const LoraModule& module, MatView<T> weight,
                  MatView<T> bias) {
  const auto scale = static_cast<T>(module.scale);
  const Matrix<T> down(module.rank, module.d_in), up(module.d_out, module.rank);
  adapter.read_down(module, down.view);
  adapter.read_up(module, up.view);
  merge_lora(down.view, up.view, scale, weight, module.kind == ModuleKind::conv1d);
  if (module.bias_tensor.empty()) return;
  require(bias.data != nullptr, Errc::shape_mismatch, shown(adapter, module.path),
          " has a lora_bias, but no bias was given to hold it");
  const Matrix<T> beta(1, module.d_out);
  adapter.read_bias(module, beta.view);
  merge_lora_bias(beta.view, scale, bias);
}

template <class T>
void apply(const PeftAdapter& adapter, std::string_view path, bool merge, MatView<T> weight,
           MatView<T> bias) {
  const LoraModule* module = adapter.find(path);
  if (!changes_base(adapter, path) && (module == nullptr || !merge)) return;
  if (module != nullptr) {
    const bool turned = module->kind == ModuleKind::conv1d;
    require_shape("weight", weight, turned ? module->d_in : module->d_out,
                  turned ? module->d_out : module->d_in);
    if (bias.data != nullptr) require_shape("bias", bias, 1, module->d_out);
  }
  Change<T> new_weight{copied<T>(weight), weight}, new_bias{copied<T>(bias), bias};
  replace(adapter, path, "weight", new_weight);
  replace(adapter, path, "bias", new_bias);
  if (module != nullptr) take_part_off(*module, new_weight.result.view);
  if (module != nullptr && merge) {
    add_low_rank(adapter, *module, new_weight.result.view,
                 bias.data != nullptr ? new_bias.result.view : MatView<T>{});
  }
  new_weight.finish();
  new_bias.finish();
}

}  // namespace

bool changes_base(const PeftAdapter& adapter, std::string_view path) noexcept {
  const LoraModule* module = adapter.find(path);
  return (module != nullptr && module->base_change != BaseChange::none) ||
         adapter.find_replacement(path, "weight") != nullptr ||
         adapter.find_replacement(path, "bias") != nullptr;
}

template <class T>
void apply_base_changes(const PeftAdapter& adapter, std::string_view path, MatView<T> weight,
                        MatView<T> bias) {
  apply(adapter, path, false, weight, bias);
}

template <class T>
void merge_adapter(const PeftAdapter& adapter, std::string_view path, MatView<T> weight,
                   MatView<T> bias) {
  apply(adapter, path, true, weight, bias);
}

#define MOLE_APPLY_IN(T)                                                                \
  template void apply_base_changes<T>(const PeftAdapter&, std::string_view, MatView<T>, \
                                      MatView<T>);                                      \
  template void merge_adapter<T>(const PeftAdapter&, std::string_view, MatView<T>, MatView<T>);
MOLE_APPLY_IN(float)
MOLE_APPLY_IN(double)
#undef MOLE_APPLY_IN

}  // namespace mole::inline MOLE_ABI
