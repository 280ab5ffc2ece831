// SPDX-License-Identifier: Apache-2.0
#include "io/peft_config.hpp"

#include <algorithm>
#include <cmath>
#include <iterator>

#include "io/json.hpp"
#include "io/peft_refused.hpp"
#include "io/text.hpp"

namespace mole::inline MOLE_ABI {
namespace io {
namespace {

constexpr std::int64_t kMaxRank = 1'000'000;
constexpr std::int64_t kDefaultRank = 8;
constexpr double kDefaultAlpha = 8;

// Values of init_lora_weights after which the adapter belongs to the unchanged base weights.
constexpr std::string_view kHarmlessStarts[] = {"gaussian", "eva", "orthogonal", "mica"};
constexpr std::string_view kPissaSteps = "pissa_niter_";

std::string lower_case(std::string text) {
  for (char& c : text) {
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  }
  return text;
}

// Settings that are read below, or that say nothing about the result.
constexpr std::string_view kKnown[] = {"r",
                                       "lora_alpha",
                                       "use_rslora",
                                       "fan_in_fan_out",
                                       "lora_bias",
                                       "bias",
                                       "init_lora_weights",
                                       "modules_to_save",
                                       "rank_pattern",
                                       "alpha_pattern",
                                       "target_modules",
                                       "exclude_modules",
                                       "layers_to_transform",
                                       "layers_pattern",
                                       "peft_type",
                                       "auto_mapping",
                                       "base_model_name_or_path",
                                       "revision",
                                       "task_type",
                                       "inference_mode",
                                       "peft_version",
                                       "ensure_weight_tying",
                                       "lora_dropout",
                                       "megatron_core",
                                       "qalora_group_size",
                                       "eva_config",
                                       "corda_config",
                                       "loftq_config",
                                       "lora_ga_config",
                                       "runtime_config"};

class ConfigReader {
 public:
  ConfigReader(const Json& root, const std::string& file) : root_(root), file_(file) {}

  PeftConfig read(const PeftOptions& options) const {
    refuse_methods(root_, file_);
    PeftConfig config;
    read_scale(options, config);
    config.use_rslora = boolean("use_rslora");
    config.fan_in_fan_out = boolean("fan_in_fan_out");
    config.lora_bias = boolean("lora_bias");
    config.bias = saved_biases();
    config.base_change = base_change(options);
    if (const Json* saved = find("modules_to_save")) {
      config.modules_to_save = list("modules_to_save", *saved);
    }
    config.base_model = remark("base_model_name_or_path");
    config.task_type = remark("task_type");
    config.target_modules = module_names("target_modules");
    config.exclude_modules = module_names("exclude_modules");
    if (config.target_modules.form == ModuleNames::Form::none) {
      wrong("\"target_modules\" is missing, so no module is adapted");
    }
    read_layers(config);
    each("rank_pattern", [&](const std::string& key, const std::string& what, const Json& value) {
      config.rank_pattern.emplace_back(key, integer(what, value));
    });
    each("alpha_pattern", [&](const std::string& key, const std::string& what, const Json& value) {
      config.alpha_pattern.emplace_back(key, positive(what, value));
    });
    collect_unknown(config);
    return config;
  }

 private:
  template <class... Parts>
  [[noreturn]] void wrong(const Parts&... parts) const {
    fail(Errc::config_error, file_, ": ", parts...);
  }

  // nullptr where the setting is absent or null, which means its default.
  const Json* find(const char* field) const {
    const Json* place = root_.find(field);
    return place == nullptr || place->is_null() ? nullptr : place;
  }

  SavedBiases saved_biases() const {
    const Json* value = find("bias");
    if (value == nullptr || *value == "none") return SavedBiases::none;
    if (*value == "all") return SavedBiases::all;
    if (*value == "lora_only") return SavedBiases::lora_only;
    wrong("\"bias\" is ", value_text(*value), ", must be \"none\", \"all\" or \"lora_only\"");
  }

  BaseChange base_change(const PeftOptions& options) const {
    const Json* value = find("init_lora_weights");
    if (value == nullptr || value->is_boolean()) return BaseChange::none;
    if (!value->is_string()) {
      wrong("\"init_lora_weights\" is ", json_kind(*value), ", must be true, false or text");
    }
    const std::string start = lower_case(value->get<std::string>());
    const auto* harmless = std::find(std::begin(kHarmlessStarts), std::end(kHarmlessStarts), start);
    if (harmless != std::end(kHarmlessStarts)) return BaseChange::none;
    const std::string what = "\"init_lora_weights\" is " + value_text(*value);
    const bool steps = start.starts_with(kPissaSteps) && start.size() > kPissaSteps.size() &&
                       start.find_first_not_of("0123456789", kPissaSteps.size()) == start.npos;
    if (!steps && start != "pissa" && start != "olora") {
      fail(Errc::unsupported, file_, ": ", what,
           ": an initialisation that changes the base weights cannot be read");
    }
    require(options.residual_base, Errc::unsupported, file_, ": ", what,
            ": the adapter belongs to changed base weights (ok with the option residual_base, ",
            "if the base is changed by apply_base_changes)");
    require(!steps || options.exact_svd, Errc::unsupported, file_, ": ", what,
            ": the randomised decomposition cannot be repeated (ok with the option exact_svd)");
    return start == "olora" ? BaseChange::olora : BaseChange::pissa;
  }

  // Text that is kept and never looked at.
  std::string remark(const char* field) const {
    const Json* value = find(field);
    return value != nullptr && value->is_string() ? value->get<std::string>() : std::string();
  }

  void read_scale(const PeftOptions& options, PeftConfig& config) const {
    const Json* rank = find("r");
    if (rank != nullptr) {
      config.rank = integer("\"r\"", *rank);
    } else if (options.peft_defaults) {
      config.rank = kDefaultRank;
      config.rank_from = "option peft_defaults";
    } else {
      wrong("\"r\" is missing (ok with the option peft_defaults)");
    }
    const Json* alpha = find("lora_alpha");
    if (alpha != nullptr) {
      config.alpha = positive("\"lora_alpha\"", *alpha);
    } else if (options.lora_alpha.has_value()) {
      config.alpha = *options.lora_alpha;
      config.alpha_from = "option lora_alpha";
      require(std::isfinite(config.alpha) && config.alpha > 0, Errc::invalid_argument,
              "option lora_alpha is ", number_text(config.alpha), ", must be positive");
    } else if (options.peft_defaults) {
      config.alpha = kDefaultAlpha;
      config.alpha_from = "option peft_defaults";
    } else {
      wrong("\"lora_alpha\" is missing (ok with the option peft_defaults or lora_alpha)");
    }
  }

  Index integer(const std::string& what, const Json& value) const {
    if (!value.is_number_integer()) wrong(what, " is ", json_kind(value), ", must be an integer");
    const bool too_large =
        value.is_number_unsigned() && value.get<std::uint64_t>() > std::uint64_t{kMaxRank};
    if (too_large) wrong(what, " is ", value.dump(), ", must be at most ", kMaxRank);
    const auto number = value.get<std::int64_t>();
    if (number < 1) wrong(what, " is ", number, ", must be at least 1");
    return static_cast<Index>(number);
  }

  double positive(const std::string& what, const Json& value) const {
    if (!value.is_number()) wrong(what, " is ", json_kind(value), ", must be a number");
    const auto number = value.get<double>();
    if (!std::isfinite(number) || number <= 0)
      wrong(what, " is ", value.dump(), ", must be positive");
    return number;
  }

  bool boolean(const char* field) const {
    const Json* value = find(field);
    if (value == nullptr) return false;
    if (!value->is_boolean()) {
      wrong("\"", field, "\" is ", json_kind(*value), ", must be true or false");
    }
    return value->get<bool>();
  }

  std::vector<std::string> list(const char* field, const Json& value) const {
    std::vector<std::string> names;
    if (!value.is_array())
      wrong("\"", field, "\" is ", json_kind(value), ", must be a list or text");
    for (const Json& name : value) {
      if (!name.is_string()) wrong("\"", field, "\" holds ", json_kind(name), ", must hold text");
      names.push_back(name.get<std::string>());
    }
    return names;
  }

  ModuleNames module_names(const char* field) const {
    const Json* value = find(field);
    if (value == nullptr) return {};
    if (value->is_string()) return {ModuleNames::Form::pattern, {value->get<std::string>()}};
    return {ModuleNames::Form::list, list(field, *value)};
  }

  void read_layers(PeftConfig& config) const {
    if (const Json* pattern = find("layers_pattern")) {
      if (*pattern != "") {
        config.layers_pattern = pattern->is_string()
                                    ? std::vector<std::string>{pattern->get<std::string>()}
                                    : list("layers_pattern", *pattern);
      }
    }
    const Json* layers = find("layers_to_transform");
    if (layers == nullptr) return;
    const auto add = [&](const Json& layer) {
      if (!layer.is_number_integer()) {
        wrong("\"layers_to_transform\" holds ", json_kind(layer), ", must hold integers");
      }
      config.layers_to_transform.push_back(layer.get<std::int64_t>());
    };
    if (!layers->is_array()) return add(*layers);
    for (const Json& layer : *layers) add(layer);
  }

  template <class F>
  void each(const char* field, F f) const {
    const Json* value = find(field);
    if (value == nullptr) return;
    if (!value->is_object()) wrong("\"", field, "\" is ", json_kind(*value), ", must be an object");
    for (const auto& item : value->items()) {
      f(item.key(), std::string(field) + " " + in_quotes(item.key()), item.value());
    }
  }

  // An unknown switch or method block that is on may change the result: refused. Unknown remarks
  // are reported.
  void collect_unknown(PeftConfig& config) const {
    for (const auto& item : root_.items()) {
      const std::string& field = item.key();
      if (is_off(item.value()) ||
          std::find(std::begin(kKnown), std::end(kKnown), field) != std::end(kKnown) ||
          is_method_setting(field)) {
        continue;
      }
      if (field.starts_with("use_") || field.ends_with("_config")) {
        fail(Errc::unsupported, file_, ": ", in_quotes(field), " is set and unknown");
      }
      config.unknown_fields.push_back(field);
    }
  }

  const Json& root_;
  const std::string& file_;
};

}  // namespace

PeftConfig parse_peft_config(std::string_view text, const std::string& file,
                             const PeftOptions& options) {
  const Json root = parse_json_object(text, file);
  return ConfigReader(root, file).read(options);
}

}  // namespace io
}  // namespace mole::inline MOLE_ABI
