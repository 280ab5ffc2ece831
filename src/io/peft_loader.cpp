// SPDX-License-Identifier: Apache-2.0
// load_peft: settings, then names, then shapes, then values; the adapter exists only at the end.
#include <fmt/format.h>

#include <algorithm>
#include <iterator>
#include <map>
#include <set>
#include <tuple>

#include "io/file.hpp"
#include "io/peft_config.hpp"
#include "io/peft_folder.hpp"
#include "io/peft_keys.hpp"
#include "io/peft_match.hpp"
#include "io/peft_refused.hpp"
#include "io/peft_tensors.hpp"
#include "io/text.hpp"
#include "mole/io/peft.hpp"

namespace mole::inline MOLE_ABI {
namespace {

using io::in_quotes;

class Loader {
 public:
  Loader(const std::string& folder, const std::vector<HostModule>& modules,
         const PeftOptions& options)
      : folder_(io::find_adapter(folder, options.adapter_name)),
        modules_(modules),
        options_(options) {}

  PeftAdapter load() {
    check_arguments();
    config_file_ = io::shown_path(folder_ + "/" + io::kConfigFile);
    config_ = io::parse_peft_config(io::read_config_text(folder_, options_.max_config_bytes),
                                    config_file_, options_);
    const io::PeftMatcher matcher(config_, config_file_);
    check_settings(matcher);
    file_ = io::open_weights(folder_, options_.limits);
    kind_ = config_.fan_in_fan_out ? ModuleKind::conv1d : ModuleKind::linear;
    tensors_ = io::sort_peft_tensors(file_, config_, matcher, host_, kind_);
    check_names();
    add_modules(matcher);
    add_replacements();
    add_leftovers();
    find_missing(matcher);
    check_effect();
    note_checks_off();
    report_.folder = folder_;
    report_.unknown_fields = config_.unknown_fields;
    return PeftAdapter(config_, std::move(report_), std::move(file_));
  }

 private:
  void check_arguments() {
    for (const HostModule& module : modules_) {
      require(module.d_in > 0 && module.d_out > 0, Errc::invalid_argument,
              "modules: ", in_quotes(module.path), " has d_in ", module.d_in, " and d_out ",
              module.d_out, ", both must be positive");
      const bool is_new = host_.emplace(module.path, &module).second;
      require(is_new, Errc::invalid_argument, "modules: ", in_quotes(module.path), " comes twice");
    }
    only_.insert(options_.only.begin(), options_.only.end());
  }

  // Settings against the host's modules; a pattern without any module is a slip of the pen.
  void check_settings(const io::PeftMatcher& matcher) {
    for (const HostModule& module : modules_) {
      if (matcher.match(module.path, module.kind).matched) targets_.push_back(&module);
    }
    if (modules_.empty()) return;
    require(!targets_.empty() || options_.allow_no_effect, Errc::config_error, config_file_,
            ": target_modules matches no module of the base model");
    const std::string useless = matcher.useless_pattern(modules_);
    require(useless.empty(), Errc::config_error, config_file_, ": ", useless,
            " matches no target module");
  }

  bool wanted(std::string_view path) const {
    return only_.empty() || only_.find(path) != only_.end();
  }

  // Whether a tensor's name begins with the path of a wanted module.
  bool concerns_wanted(std::string_view name) const {
    if (only_.empty()) return true;
    return std::any_of(only_.begin(), only_.end(), [name](const std::string& path) {
      return name.starts_with(io::peft_key(path, "."));
    });
  }

  const HostModule* host_of(std::string_view path) const {
    const auto place = host_.find(path);
    return place == host_.end() ? nullptr : place->second;
  }

  void check_names() const {
    for (const StoredTensor* tensor : tensors_.refused) {
      if (!concerns_wanted(tensor->name)) continue;
      fail(Errc::unsupported, file_.name(), ": ", in_quotes(tensor->name), " is ",
           io::method_of_tensor(tensor->name), ", which cannot be read");
    }
    check_found();
    for (const std::string& path : only_) check_only(path);
    for (const auto& [path, tensors] : tensors_.lora) {
      if (wanted(path)) check_complete(path, tensors);
    }
  }

  void check_found() const {
    const bool excused = options_.allow_partial && !tensors_.saved.empty();
    if (!tensors_.lora.empty() || options_.allow_no_effect || excused) return;
    const std::string found =
        modules_.empty() ? "no LoRA tensors found"
                         : fmt::format("0 of {} target modules found in the file", targets_.size());
    fail(Errc::config_error, file_.name(), ": ", found,
         tensors_.has_prefix ? std::string()
                             : fmt::format(", its keys lack the prefix \"{}\"", io::kPeftPrefix));
  }

  void check_only(const std::string& path) const {
    const auto is_saved = [&path](const io::SavedTensor& saved) { return saved.path == path; };
    if (tensors_.lora.contains(path) ||
        std::any_of(tensors_.saved.begin(), tensors_.saved.end(), is_saved)) {
      return;
    }
    std::vector<std::string_view> paths;
    for (const auto& [known, tensors] : tensors_.lora) paths.emplace_back(known);
    fail(Errc::not_found, file_.name(), ": option only names ", in_quotes(path),
         ", which the adapter does not touch", io::nearest_text(path, paths));
  }

  void check_complete(const std::string& path, const io::LoraTensors& tensors) const {
    const std::string down = io::peft_key(path, io::kDownSuffix);
    const std::string up = io::peft_key(path, io::kUpSuffix);
    const auto lacks = [this](const std::string& lost, const std::string& there) {
      fail(Errc::config_error, file_.name(), ": ", in_quotes(lost), " is missing, ",
           in_quotes(there), " is present");
    };
    if (tensors.down == nullptr) lacks(down, tensors.up != nullptr ? up : tensors.bias->name);
    if (tensors.up == nullptr) lacks(up, down);
    if (config_.lora_bias && tensors.bias == nullptr)
      lacks(io::peft_key(path, io::kBiasSuffix), up);
  }

  void add_modules(const io::PeftMatcher& matcher) {
    for (const auto& [path, tensors] : tensors_.lora) {
      if (!wanted(path)) {
        report_.skipped.push_back(path);
        continue;
      }
      const HostModule* host = host_of(path);
      const io::PeftMatch match = matcher.match(path, host != nullptr ? host->kind : kind_);
      if (!modules_.empty() && host == nullptr) {
        not_applied(tensors,
                    in_quotes(io::peft_key(path, "")) + " matches no module of the base model");
      } else if (!match.matched) {
        not_applied(tensors,
                    "tensors for " + in_quotes(path) + ", which target_modules does not name");
      } else {
        add_module(path, tensors, match, host);
      }
    }
  }

  void not_applied(const io::LoraTensors& tensors, const std::string& why) {
    require(options_.allow_partial, Errc::config_error, file_.name(), ": ", why);
    for (const StoredTensor* tensor : {tensors.down, tensors.up, tensors.bias}) {
      if (tensor != nullptr) report_.unused.push_back(tensor->name);
    }
  }

  void add_module(const std::string& path, const io::LoraTensors& tensors,
                  const io::PeftMatch& match, const HostModule* host) {
    LoraModule module;
    module.path = path;
    module.kind = host != nullptr ? host->kind : kind_;
    require(module.kind == ModuleKind::linear || module.kind == ModuleKind::conv1d,
            Errc::unsupported, file_.name(), ": ", in_quotes(path), " is no linear layer");
    has_effect_ = io::check_lora(tensors, match, host, file_.name()) || has_effect_;
    module.rank = match.rank;
    module.alpha = match.alpha;
    module.scale = match.scale;
    module.rank_from =
        source(match.rank_pattern, config_.rank_pattern, "rank_pattern ", config_.rank_from);
    module.alpha_from =
        source(match.alpha_pattern, config_.alpha_pattern, "alpha_pattern ", config_.alpha_from);
    module.d_in = tensors.down->shape[1];
    module.d_out = tensors.up->shape[0];
    module.down_tensor = tensors.down->name;
    module.up_tensor = tensors.up->name;
    module.stored_down = tensors.down->dtype;
    module.stored_up = tensors.up->dtype;
    if (tensors.bias != nullptr) {
      module.bias_tensor = tensors.bias->name;
      module.stored_bias = tensors.bias->dtype;
    }
    module.base_change = config_.base_change;
    report_.applied.push_back(std::move(module));
  }

  template <class Patterns>
  static std::string source(int pattern, const Patterns& patterns, const char* setting,
                            const std::string& otherwise) {
    if (pattern < 0) return otherwise;
    return setting + in_quotes(patterns[static_cast<std::size_t>(pattern)].first);
  }

  void add_replacements() {
    for (const io::SavedTensor& saved : tensors_.saved) {
      if (!wanted(saved.path)) {
        if (!tensors_.lora.contains(saved.path)) report_.skipped.push_back(saved.path);
        continue;
      }
      const HostModule* host = host_of(saved.path);
      if (!modules_.empty() && host == nullptr) {
        require(options_.allow_partial, Errc::config_error, file_.name(), ": ",
                in_quotes(saved.tensor->name), " matches no module of the base model");
        report_.unused.push_back(saved.tensor->name);
        continue;
      }
      io::check_saved(saved, host, file_.name());
      report_.replaced.push_back({saved.path, saved.parameter, saved.tensor->name,
                                  saved.tensor->dtype, saved.tensor->shape, saved.from});
      // The saved weight is what the adapter was trained on: nothing is left to subtract.
      if (saved.parameter == "weight") keep_base(saved.path);
    }
    const auto place = [](const Replacement& r) { return std::tie(r.path, r.parameter); };
    std::sort(report_.replaced.begin(), report_.replaced.end(),
              [&](const Replacement& a, const Replacement& b) { return place(a) < place(b); });
    std::sort(report_.skipped.begin(), report_.skipped.end());
    const auto end = std::unique(report_.skipped.begin(), report_.skipped.end());
    report_.skipped.erase(end, report_.skipped.end());
    has_effect_ = has_effect_ || !report_.replaced.empty();
  }

  void keep_base(std::string_view path) {
    for (LoraModule& module : report_.applied) {
      if (module.path == path) module.base_change = BaseChange::none;
    }
  }

  void add_leftovers() {
    for (const StoredTensor* tensor : tensors_.redundant) {
      if (concerns_wanted(tensor->name)) report_.redundant.push_back(tensor->name);
    }
    std::vector<std::string> unused;
    for (const StoredTensor* tensor : tensors_.unused) {
      if (concerns_wanted(tensor->name)) unused.push_back(tensor->name);
    }
    require(unused.empty() || options_.allow_partial, Errc::config_error, file_.name(),
            ": unused tensor ", unused.empty() ? std::string() : in_quotes(unused.front()), " (",
            unused.size(), " in all)");
    report_.unused.insert(report_.unused.end(), unused.begin(), unused.end());
  }

  void find_missing(const io::PeftMatcher& matcher) {
    for (const HostModule* target : targets_) {
      if (wanted(target->path) && !tensors_.lora.contains(target->path)) {
        missing(target->path, "target module ");
      }
    }
    for (const HostModule& module : modules_) {
      if (module.kind == ModuleKind::other || !wanted(module.path)) continue;
      const auto is_weight_of = [&module](const Replacement& r) {
        return r.path == module.path && r.parameter == "weight";
      };
      if (matcher.saved_by(module.path) >= 0 &&
          std::none_of(report_.replaced.begin(), report_.replaced.end(), is_weight_of)) {
        missing(module.path, "module to save ");
      }
    }
  }

  void missing(const std::string& path, const char* what) {
    require(options_.allow_partial, Errc::config_error, file_.name(), ": ", what, in_quotes(path),
            " has no tensors in the file");
    report_.missing.push_back(path);
  }

  void check_effect() const {
    if (options_.allow_no_effect) return;
    require(!report_.applied.empty() || !report_.replaced.empty(), Errc::config_error, file_.name(),
            ": no module was applied (ok with the option allow_no_effect)");
    require(has_effect_ || config_.base_change != BaseChange::none, Errc::config_error,
            file_.name(), ": every lora_B is zero, the adapter has ",
            "no effect (ok with the option allow_no_effect)");
  }

  void note_checks_off() {
    std::vector<std::string>& off = report_.checks_off;
    if (modules_.empty()) {
      const char* kind = config_.fan_in_fan_out ? "conv1d" : "linear";
      off.push_back("no host modules given: d_in and d_out come from the file");
      off.push_back(fmt::format("no host modules given: every module is taken as {}", kind));
      off.emplace_back("no host modules given: target modules without tensors are not noticed");
      off.emplace_back("no host modules given: patterns that match nothing are not noticed");
    }
    if (!only_.empty()) off.emplace_back("option only: other modules were not looked at");
    if (options_.allow_partial) {
      off.emplace_back("option allow_partial: unused tensors and missing modules are accepted");
    }
    if (options_.allow_no_effect) {
      off.emplace_back("option allow_no_effect: an adapter that changes nothing is accepted");
    }
    if (options_.residual_base && config_.base_change != BaseChange::none) {
      off.emplace_back("option residual_base: the caller changes the base weights");
    }
  }

  std::string folder_;
  const std::vector<HostModule>& modules_;
  const PeftOptions& options_;
  std::string config_file_;
  PeftConfig config_;
  ModuleKind kind_ = ModuleKind::linear;
  SafeTensors file_;
  std::map<std::string_view, const HostModule*> host_;
  std::set<std::string, std::less<>> only_;
  std::vector<const HostModule*> targets_;
  io::PeftTensors tensors_;
  bool has_effect_ = false;
  LoadReport report_;
};

}  // namespace

PeftAdapter load_peft(const std::string& folder, const std::vector<HostModule>& modules,
                      const PeftOptions& options) {
  return Loader(folder, modules, options).load();
}

}  // namespace mole::inline MOLE_ABI
