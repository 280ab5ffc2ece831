// SPDX-License-Identifier: Apache-2.0
#include "io/peft_keys.hpp"

#include "io/peft_refused.hpp"
#include "io/text.hpp"

namespace mole::inline MOLE_ABI {
namespace io {
namespace {

constexpr std::string_view kBaseLayer = ".base_layer";

// A module and its parameter: what stands before and after the last dot.
struct Parameter {
  std::string_view path, name;
};

Parameter split(std::string_view name) {
  const std::size_t dot = name.rfind('.');
  if (dot == std::string_view::npos) return {{}, name};
  return {name.substr(0, dot), name.substr(dot + 1)};
}

class Sorter {
 public:
  Sorter(const PeftConfig& config, const PeftMatcher& matcher,
         const std::map<std::string_view, const HostModule*>& modules, ModuleKind kind)
      : config_(config), matcher_(matcher), modules_(modules), kind_(kind) {}

  PeftTensors sort(const SafeTensors& file) {
    for (const StoredTensor& tensor : file.tensors()) {
      const std::string_view name = tensor.name;
      const bool prefixed = name.starts_with(kPeftPrefix);
      result_.has_prefix = result_.has_prefix || prefixed;
      const bool placed = prefixed && place(tensor, name.substr(kPeftPrefix.size()));
      if (!placed) result_.unused.push_back(&tensor);
    }
    return std::move(result_);
  }

 private:
  bool place(const StoredTensor& tensor, std::string_view name) {
    if (method_of_tensor(name) != nullptr) {
      result_.refused.push_back(&tensor);
      return true;
    }
    return place_lora(tensor, name, kDownSuffix, &LoraTensors::down) ||
           place_lora(tensor, name, kUpSuffix, &LoraTensors::up) ||
           (config_.lora_bias && place_lora(tensor, name, kBiasSuffix, &LoraTensors::bias)) ||
           place_base(tensor, name) || place_second_copy(tensor, name) || place_saved(tensor, name);
  }

  bool place_lora(const StoredTensor& tensor, std::string_view name, std::string_view suffix,
                  const StoredTensor* LoraTensors::*member) {
    if (!name.ends_with(suffix)) return false;
    const std::string_view path = name.substr(0, name.size() - suffix.size());
    if (matcher_.saved_by(split(name).path) >= 0 && !is_target(path)) return false;
    result_.lora[std::string(path)].*member = &tensor;
    return true;
  }

  // Base parameters of a target, which PEFT keeps in its base_layer.
  bool place_base(const StoredTensor& tensor, std::string_view name) {
    auto [path, parameter] = split(name);
    if (!path.ends_with(kBaseLayer)) return false;
    path.remove_suffix(kBaseLayer.size());
    if (!is_target(path)) return false;
    if (parameter == "bias" && config_.bias != SavedBiases::none) {
      save(path, parameter, bias_setting(), tensor);
    } else if (parameter == "weight") {
      save(path, parameter, "base_layer", tensor);
    } else {
      return false;
    }
    return true;
  }

  bool place_second_copy(const StoredTensor& tensor, std::string_view name) {
    if (config_.bias != SavedBiases::all || split(name).name != "bias") return false;
    for (const std::string_view element : {".modules_to_save.", ".original_module."}) {
      const std::size_t at = name.rfind(element);
      if (at == std::string_view::npos || matcher_.saved_by(name.substr(0, at)) < 0) continue;
      result_.redundant.push_back(&tensor);
      return true;
    }
    return false;
  }

  bool place_saved(const StoredTensor& tensor, std::string_view name) {
    const auto [path, parameter] = split(name);
    if (path.empty()) return false;
    const int entry = matcher_.saved_by(path);
    if (entry >= 0) {
      const std::string& text = config_.modules_to_save[static_cast<std::size_t>(entry)];
      save(path, parameter, "modules_to_save " + in_quotes(text), tensor);
    } else if (parameter == "bias" && config_.bias == SavedBiases::all && !is_target(path)) {
      save(path, parameter, bias_setting(), tensor);
    } else if (parameter == "weight" && is_vocabulary(path) && !is_target(path)) {
      save(path, parameter, "saved embedding", tensor);
    } else {
      return false;
    }
    return true;
  }

  void save(std::string_view path, std::string_view parameter, std::string from,
            const StoredTensor& tensor) {
    result_.saved.push_back({std::string(path), std::string(parameter), std::move(from), &tensor});
  }

  std::string bias_setting() const {
    return config_.bias == SavedBiases::all ? "bias \"all\"" : "bias \"lora_only\"";
  }

  bool is_target(std::string_view path) const {
    const auto host = modules_.find(path);
    return matcher_.matches(path, host == modules_.end() ? kind_ : host->second->kind);
  }

  // PEFT saves them unasked where the vocabulary was resized.
  bool is_vocabulary(std::string_view path) const {
    const auto host = modules_.find(path);
    if (host != modules_.end() && host->second->kind == ModuleKind::embedding) return true;
    const std::string_view last = split(path).name;
    return last == "embed_tokens" || last == "lm_head";
  }

  const PeftConfig& config_;
  const PeftMatcher& matcher_;
  const std::map<std::string_view, const HostModule*>& modules_;
  ModuleKind kind_;
  PeftTensors result_;
};

}  // namespace

std::string peft_key(std::string_view path, std::string_view suffix) {
  return std::string(kPeftPrefix).append(path).append(suffix);
}

PeftTensors sort_peft_tensors(const SafeTensors& file, const PeftConfig& config,
                              const PeftMatcher& matcher,
                              const std::map<std::string_view, const HostModule*>& modules,
                              ModuleKind kind) {
  return Sorter(config, matcher, modules, kind).sort(file);
}

}  // namespace io
}  // namespace mole::inline MOLE_ABI
