// SPDX-License-Identifier: Apache-2.0
#include "io/peft_match.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>

#include "io/text.hpp"

namespace mole::inline MOLE_ABI {
namespace io {
namespace {

constexpr std::size_t kMaxPatterns = 1000;  // in one setting

bool is_all_linear(std::string_view text) {
  constexpr std::string_view kWord = "all-linear";
  const auto same = [](char a, char b) { return (a >= 'A' && a <= 'Z' ? a - 'A' + 'a' : a) == b; };
  return std::equal(text.begin(), text.end(), kWord.begin(), kWord.end(), same);
}

bool is_end_after_dot(std::string_view path, std::string_view end) {
  return path.size() > end.size() && path.ends_with(end) &&
         path[path.size() - end.size() - 1] == '.';
}

bool is_listed(std::string_view path, const std::vector<std::string>& names) {
  const auto names_it = [path](const std::string& name) {
    return path == name || is_end_after_dot(path, name);
  };
  return std::any_of(names.begin(), names.end(), names_it);
}

// Only an exponent-free decimal that fits; a longer one is no layer that a list could hold.
std::optional<std::int64_t> as_number(std::string_view digits) {
  std::int64_t number = 0;
  const char* end = digits.data() + digits.size();
  const auto [stop, error] = std::from_chars(digits.data(), end, number);
  if (error != std::errc() || stop != end) return std::nullopt;
  return number;
}

int first_match(const std::vector<Pattern>& patterns, std::string_view path) {
  for (std::size_t i = 0; i < patterns.size(); ++i) {
    if (patterns[i].matches_start(path)) return static_cast<int>(i);
  }
  return -1;
}

}  // namespace

PeftMatcher::PeftMatcher(const PeftConfig& config, const std::string& file)
    : config_(config), file_(file) {
  const auto named = [&file](const char* setting, const std::string& pattern) {
    return file + ": " + setting + " " + in_quotes(pattern);
  };
  const auto compile = [&](const char* setting, const std::string& key, const std::string& before,
                           const std::string& after, std::vector<Pattern>& to) {
    require(to.size() < kMaxPatterns, Errc::limit_exceeded, file, ": ", setting,
            " holds more than ", kMaxPatterns, " patterns");
    to.emplace_back(before + key + after, named(setting, key));
  };
  if (config.exclude_modules.form == ModuleNames::Form::pattern) {
    const std::string& text = config.exclude_modules.names.front();
    exclude_.emplace(text, named("exclude_modules", text));
  }
  if (config.target_modules.form == ModuleNames::Form::pattern) {
    const std::string& text = config.target_modules.names.front();
    all_linear_ = is_all_linear(text);
    if (!all_linear_) target_.emplace(text, named("target_modules", text));
  }
  for (const std::string& name : config.modules_to_save) {
    compile("modules_to_save", name, "(^|.*\\.)", "($|\\..*)", saved_);
  }
  for (const std::string& name : config.layers_pattern) {
    compile("layers_pattern", name, "(?:^|.*?\\.)", "\\.(\\d+)\\.", layers_);
  }
  if (layers_.empty()) layers_.emplace_back(".*?\\.[^.]*\\.(\\d+)\\.", "layer number");
  for (const auto& [key, rank] : config.rank_pattern) {
    compile("rank_pattern", key, "(.*\\.)?(", ")$", ranks_);
  }
  for (const auto& [key, alpha] : config.alpha_pattern) {
    compile("alpha_pattern", key, "(.*\\.)?(", ")$", alphas_);
  }
}

bool PeftMatcher::excluded(std::string_view path) const {
  if (exclude_.has_value() && exclude_->matches_all(path)) return true;
  if (config_.exclude_modules.form == ModuleNames::Form::list &&
      is_listed(path, config_.exclude_modules.names)) {
    return true;
  }
  return saved_by(path) >= 0;
}

int PeftMatcher::saved_by(std::string_view path) const {
  return first_match(saved_, path);
}

bool PeftMatcher::targeted(std::string_view path, ModuleKind kind) const {
  if (all_linear_) return kind == ModuleKind::linear || kind == ModuleKind::conv1d;
  if (target_.has_value()) return target_->matches_all(path);
  const std::vector<std::string>& names = config_.target_modules.names;
  if (std::find(names.begin(), names.end(), path) != names.end()) return true;
  return is_listed(path, names) && layer_wanted(path);
}

bool PeftMatcher::layer_wanted(std::string_view path) const {
  const std::vector<std::int64_t>& wanted = config_.layers_to_transform;
  if (wanted.empty()) return true;
  for (const Pattern& pattern : layers_) {
    const std::optional<std::string_view> digits = pattern.group_at_start(path);
    if (!digits.has_value()) continue;
    const std::optional<std::int64_t> layer = as_number(*digits);
    return layer.has_value() && std::find(wanted.begin(), wanted.end(), *layer) != wanted.end();
  }
  return false;
}

PeftMatch PeftMatcher::match(std::string_view path, ModuleKind kind) const {
  PeftMatch match;
  if (!matches(path, kind)) return match;
  match.matched = true;
  match.rank_pattern = first_match(ranks_, path);
  match.alpha_pattern = first_match(alphas_, path);
  match.rank = match.rank_pattern < 0
                   ? config_.rank
                   : config_.rank_pattern[static_cast<std::size_t>(match.rank_pattern)].second;
  match.alpha = match.alpha_pattern < 0
                    ? config_.alpha
                    : config_.alpha_pattern[static_cast<std::size_t>(match.alpha_pattern)].second;
  const auto rank = static_cast<double>(match.rank);
  match.scale = match.alpha / (config_.use_rslora ? std::sqrt(rank) : rank);
  const double size = std::fabs(match.scale);
  require(size <= std::numeric_limits<float>::max() && size >= std::numeric_limits<float>::min(),
          Errc::config_error, file_, ": the scale of ", in_quotes(path), " is ",
          number_text(match.scale), " (alpha ", number_text(match.alpha), ", rank ", match.rank,
          "), which a float cannot hold");
  return match;
}

std::string PeftMatcher::useless_pattern(const std::vector<HostModule>& modules) const {
  const auto useless = [&modules](const Pattern& pattern) {
    return std::none_of(modules.begin(), modules.end(), [&pattern](const HostModule& module) {
      return pattern.matches_start(module.path);
    });
  };
  for (std::size_t i = 0; i < ranks_.size(); ++i) {
    if (useless(ranks_[i])) return "rank_pattern " + in_quotes(config_.rank_pattern[i].first);
  }
  for (std::size_t i = 0; i < alphas_.size(); ++i) {
    if (useless(alphas_[i])) return "alpha_pattern " + in_quotes(config_.alpha_pattern[i].first);
  }
  return {};
}

}  // namespace io
}  // namespace mole::inline MOLE_ABI
