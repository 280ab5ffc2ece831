// SPDX-License-Identifier: Apache-2.0
#include "io/peft_config.hpp"

#include <algorithm>
#include <cmath>
#include <iterator>

#include "io/json.hpp"
#include "io/text.hpp"

namespace mole::inline MOLE_ABI {
namespace io {
namespace {

constexpr std::int64_t kMaxRank = 1'000'000;
constexpr std::int64_t kDefaultRank = 8;
constexpr double kDefaultAlpha = 8;

bool is_off(const Json& value) {
  return value.is_null() || value == false || value == "" ||
         (value.is_structured() && value.empty());
}
bool is_no_bias(const Json& value) {
  return value.is_null() || value == "none";
}

// Initialisations after which the adapter belongs to the unchanged base weights.
bool keeps_the_base(const Json& value) {
  static constexpr std::string_view kHarmless[] = {"gaussian", "eva", "orthogonal", "mica"};
  if (value.is_null() || value.is_boolean()) return true;
  const auto same = [&value](std::string_view name) { return value == name; };
  return std::any_of(std::begin(kHarmless), std::end(kHarmless), same);
}

std::string value_text(const Json& value) {
  return value.is_string() ? in_quotes(value.get<std::string>()) : escaped(value.dump());
}

// The one list of settings that change the result and that this reader does not follow.
struct RefusedSetting {
  const char* field;
  bool (*is_harmless)(const Json&);
  const char* meaning;
};
constexpr RefusedSetting kRefused[] = {
    {"use_dora", is_off, "a magnitude per output (DoRA)"},
    {"lora_bias", is_off, "a bias beside lora_B"},
    {"bias", is_no_bias, "trained biases of the base model"},
    {"init_lora_weights", keeps_the_base, "an initialisation that changes the base weights"},
    {"modules_to_save", is_off, "modules that replace the base model's"},
    {"trainable_token_indices", is_off, "embedding rows that replace the base model's"},
    {"layer_replication", is_off, "repeated layers"},
    {"target_parameters", is_off, "LoRA on a parameter that is no module"},
    {"use_qalora", is_off, "pooled inputs (QALoRA)"},
    {"use_bdlora", is_off, "block-diagonal factors"},
    {"arrow_config", is_off, "Arrow routing"},
    {"alora_invocation_tokens", is_off, "an adapter that starts at a token (aLoRA)"},
    {"kasa_config", is_off, "KaSA"},
    {"monteclora_config", is_off, "MonteCLoRA"},
    {"velora_config", is_off, "VeLoRA"},
    {"megatron_config", is_off, "Megatron layers"},
};

// Settings that are read below, or that say nothing about the result.
constexpr std::string_view kKnown[] = {"r",
                                       "lora_alpha",
                                       "use_rslora",
                                       "fan_in_fan_out",
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
    check_type();
    check_refused();
    PeftConfig config;
    read_scale(options, config);
    config.use_rslora = boolean("use_rslora");
    config.fan_in_fan_out = boolean("fan_in_fan_out");
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
    const auto place = root_.find(field);
    return place == root_.end() || place->is_null() ? nullptr : &*place;
  }

  void check_type() const {
    const Json* type = find("peft_type");
    if (type == nullptr) wrong("\"peft_type\" is missing");
    if (*type == "LORA") return;
    fail(Errc::unsupported, file_, ": peft_type ", value_text(*type),
         ", only \"LORA\" can be read");
  }

  void check_refused() const {
    for (const RefusedSetting& setting : kRefused) {
      const Json* value = find(setting.field);
      if (value == nullptr || setting.is_harmless(*value)) continue;
      fail(Errc::unsupported, file_, ": \"", setting.field, "\" is ", value_text(*value), ": ",
           setting.meaning, " cannot be read");
    }
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
    for (const Json& layer : layers->is_array() ? *layers : Json::array({*layers})) {
      if (!layer.is_number_integer()) {
        wrong("\"layers_to_transform\" holds ", json_kind(layer), ", must hold integers");
      }
      config.layers_to_transform.push_back(layer.get<std::int64_t>());
    }
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
      const auto refused = [&field](const RefusedSetting& s) { return field == s.field; };
      if (is_off(item.value()) ||
          std::find(std::begin(kKnown), std::end(kKnown), field) != std::end(kKnown) ||
          std::any_of(std::begin(kRefused), std::end(kRefused), refused)) {
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
