// SPDX-License-Identifier: Apache-2.0
#include "mole/io/peft_bank.hpp"

#include <algorithm>
#include <string>

#include "io/text.hpp"
#include "mole/io/peft_apply.hpp"

namespace mole::inline MOLE_ABI {

namespace {

template <class T>
typename LoraBank<T>::Config bank_config(std::span<const PeftAdapter> adapters,
                                         std::string_view path) {
  typename LoraBank<T>::Config config;
  for (const PeftAdapter& adapter : adapters) {
    const LoraModule* module = adapter.find(path);
    config.rank.push_back(module != nullptr ? module->rank : 0);
    config.scale.push_back(module != nullptr ? static_cast<T>(module->scale) : T(1));
    require(adapters.size() == 1 || !changes_base(adapter, path), Errc::unsupported,
            io::shown_path(adapter.report().folder), ": changes the base layer of ",
            io::in_quotes(path), ", which the other adapters of the bank would share");
    if (module == nullptr) continue;
    config.bias = config.bias || !module->bias_tensor.empty();
    if (config.in == 0) {
      config.in = module->d_in;
      config.out = module->d_out;
    }
    require(module->d_in == config.in && module->d_out == config.out, Errc::shape_mismatch,
            io::shown_path(adapter.report().folder), ": ", io::in_quotes(path), " is ",
            module->d_in, " -> ", module->d_out, ", another adapter has ", config.in, " -> ",
            config.out);
  }
  require(config.in > 0, Errc::not_found, "no adapter of ", adapters.size(), " has the module ",
          io::in_quotes(path));
  return config;
}

}  // namespace

template <class T>
AdapterBank<T>::AdapterBank(std::span<const PeftAdapter> adapters, std::string_view module)
    : bank_(bank_config<T>(adapters, module)), memory_(bank_.template params_bytes<T>()) {
  Workspace workspace(memory_.span());
  params_ = bank_.template make_params<T>(workspace);
  for (std::size_t e = 0; e < adapters.size(); ++e) {
    const LoraModule* found = adapters[e].find(module);
    const MatView<T> bias = params_.bias_of(static_cast<Index>(e));
    if (found != nullptr && !found->bias_tensor.empty()) {
      adapters[e].read_bias(*found, bias);
    } else if (!bias.empty()) {
      std::ranges::fill(bias.row(0), T(0));
    }
    if (found == nullptr) continue;
    adapters[e].read_down(*found, params_.down_of(static_cast<Index>(e)));
    adapters[e].read_up(*found, params_.up_of(static_cast<Index>(e)));
  }
}

template class AdapterBank<float>;
template class AdapterBank<double>;

}  // namespace mole::inline MOLE_ABI
