// SPDX-License-Identifier: Apache-2.0
#include "io/peft_settings.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>

#include "io/json.hpp"
#include "io/peft_config.hpp"
#include "io/peft_match.hpp"
#include "io/text.hpp"
#include "mole/core/error.hpp"

namespace mole::inline MOLE_ABI {
namespace io {
namespace {

// A pattern that matches this path and nothing else.
std::string anchored(const std::string& path) {
  constexpr std::string_view kSpecial = "\\.^$*+?{}[]|()";
  std::string pattern = "^";
  for (const char c : path) {
    if (kSpecial.find(c) != std::string_view::npos) pattern += '\\';
    pattern += c;
  }
  return pattern;
}

// The value that most layers have; the smallest of several.
template <class V>
V most_common(std::span<const LayerSettings> layers, V LayerSettings::*member) {
  std::map<V, int> counts;
  for (const LayerSettings& layer : layers) ++counts[layer.*member];
  const auto fewer = [](const auto& a, const auto& b) { return a.second < b.second; };
  const auto most = std::max_element(counts.begin(), counts.end(), fewer);
  return most == counts.end() ? V(1) : most->first;
}

// 8 rather than 8.0: alpha is an integer in most files.
Json number(double value) {
  constexpr double kExact = 9007199254740992.0;  // 2^53
  if (value == std::floor(value) && std::fabs(value) < kExact) {
    return static_cast<std::int64_t>(value);
  }
  return value;
}

Json text_or_null(const std::string& text) {
  return text.empty() ? Json(nullptr) : Json(text);
}

const char* start_of(BaseChange change) {
  return change == BaseChange::pissa ? "pissa" : "olora";
}

const char* name_of(SavedBiases bias) {
  switch (bias) {
    case SavedBiases::all: return "all";
    case SavedBiases::lora_only: return "lora_only";
    default: return "none";
  }
}

Json to_json(const PeftConfig& config) {
  Json json;
  json["peft_type"] = "LORA";
  json["r"] = config.rank;
  json["lora_alpha"] = number(config.alpha);
  json["use_rslora"] = config.use_rslora;
  json["use_dora"] = false;
  json["fan_in_fan_out"] = config.fan_in_fan_out;
  json["lora_bias"] = config.lora_bias;
  json["lora_dropout"] = 0.0;
  json["bias"] = name_of(config.bias);
  json["inference_mode"] = true;
  json["init_lora_weights"] =
      config.base_change == BaseChange::none ? Json(true) : Json(start_of(config.base_change));
  json["target_modules"] = config.target_modules.names;
  json["modules_to_save"] =
      config.modules_to_save.empty() ? Json(nullptr) : Json(config.modules_to_save);
  json["base_model_name_or_path"] = text_or_null(config.base_model);
  json["task_type"] = text_or_null(config.task_type);
  json["rank_pattern"] = Json::object();
  for (const auto& [key, rank] : config.rank_pattern) json["rank_pattern"][key] = rank;
  json["alpha_pattern"] = Json::object();
  for (const auto& [key, alpha] : config.alpha_pattern) json["alpha_pattern"][key] = number(alpha);
  return json;
}

// Reads the text as load_peft does.
void check(const std::string& text, std::span<const LayerSettings> layers) {
  const std::string file = "the settings to write";
  PeftOptions options;
  options.residual_base = true;
  const PeftConfig config = parse_peft_config(text, file, options);
  const PeftMatcher matcher(config, file);
  for (const LayerSettings& layer : layers) {
    const PeftMatch match = matcher.match(layer.path, ModuleKind::linear);
    const bool same = match.matched && match.rank == layer.rank && match.alpha == layer.alpha &&
                      static_cast<float>(match.scale) == static_cast<float>(layer.scale);
    require(same, Errc::invalid_argument, in_quotes(layer.path), ": rank ", layer.rank,
            " and scale ", number_text(layer.scale), " would be read as rank ", match.rank,
            " and scale ", number_text(match.scale));
  }
}

}  // namespace

double alpha_for_scale(double scale, Index rank, bool use_rslora, const std::string& what) {
  const bool fits = scale >= static_cast<double>(std::numeric_limits<float>::min()) &&
                    scale <= static_cast<double>(std::numeric_limits<float>::max());
  require(fits, Errc::invalid_argument, what, ": scale is ", number_text(scale),
          ", must be positive and fit a float (a sign belongs into up)");
  const auto r = static_cast<double>(rank);
  const double divisor = use_rslora ? std::sqrt(r) : r;
  const double nearest = scale * divisor;
  double below = nearest, above = nearest;
  constexpr int kSteps = 3;  // further away, the scale is further away
  for (int step = 0; step <= kSteps; ++step) {
    if (below / divisor == scale) return below;
    if (above / divisor == scale) return above;
    below = std::nextafter(below, 0.0);
    above = std::nextafter(above, std::numeric_limits<double>::infinity());
  }
  require(static_cast<float>(nearest / divisor) == static_cast<float>(scale),
          Errc::invalid_argument, what, ": no alpha gives the scale ", number_text(scale),
          " at rank ", rank);
  return nearest;
}

std::string settings_text(PeftConfig config, std::span<const LayerSettings> layers) {
  config.rank = most_common(layers, &LayerSettings::rank);
  config.alpha = most_common(layers, &LayerSettings::alpha);
  config.target_modules = {ModuleNames::Form::list, {}};
  config.rank_pattern.clear();
  config.alpha_pattern.clear();
  for (const LayerSettings& layer : layers) {
    config.target_modules.names.push_back(layer.path);
    if (layer.rank != config.rank) {
      config.rank_pattern.emplace_back(anchored(layer.path), layer.rank);
    }
    if (layer.alpha != config.alpha) {
      config.alpha_pattern.emplace_back(anchored(layer.path), layer.alpha);
    }
  }
  constexpr int kIndent = 2;
  Json json = to_json(config);
  json.sort();
  const std::string text = json.dump(kIndent, true) + "\n";
  check(text, layers);
  return text;
}

}  // namespace io
}  // namespace mole::inline MOLE_ABI
