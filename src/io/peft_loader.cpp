// SPDX-License-Identifier: Apache-2.0
// load_peft: settings, then names, then shapes, then values; the adapter exists only at the end.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "io/convert.hpp"
#include "io/file.hpp"
#include "io/peft_config.hpp"
#include "io/peft_match.hpp"
#include "io/text.hpp"
#include "mole/io/peft.hpp"

namespace mole::inline MOLE_ABI {
namespace {

using io::in_quotes;

constexpr const char* kConfigFile = "adapter_config.json";
constexpr const char* kWeightsFile = "adapter_model.safetensors";
constexpr std::string_view kPrefix = "base_model.model.";
constexpr std::string_view kDownSuffix = ".lora_A.weight";
constexpr std::string_view kUpSuffix = ".lora_B.weight";

std::string down_name(std::string_view path) {
  return std::string(kPrefix).append(path).append(kDownSuffix);
}
std::string up_name(std::string_view path) {
  return std::string(kPrefix).append(path).append(kUpSuffix);
}

struct Values {
  Index non_finite = 0, first = -1;
  bool all_zero = true;
};

Values look_at_values(const StoredTensor& tensor, const std::string& file) {
  Values values;
  io::with_weight_type(tensor, file, [&]<class W>(W) {
    for (Index i = 0; i < tensor.elements(); ++i) {
      const auto value = io::convert<double>(io::load<W>(tensor.bytes.data(), i));
      if (value != 0) values.all_zero = false;
      if (!std::isfinite(value) && values.non_finite++ == 0) values.first = i;
    }
  });
  return values;
}

// The tensors of one module.
struct Pair {
  const StoredTensor* down = nullptr;
  const StoredTensor* up = nullptr;
};

class Loader {
 public:
  Loader(const std::string& folder, const std::vector<HostModule>& modules,
         const PeftOptions& options)
      : folder_(folder), modules_(modules), options_(options) {}

  PeftAdapter load() {
    check_arguments();
    const PeftConfig config = read_config();
    const io::PeftMatcher matcher(config, config_file_);
    check_settings(matcher);
    open_weights();
    group_tensors();
    check_found();
    for (const auto& [path, pair] : pairs_) {
      if (wanted(path)) {
        add_module(path, pair, matcher, config);
      } else {
        report_.skipped.push_back(path);
      }
    }
    find_missing();
    check_unused();
    check_effect();
    note_checks_off(config);
    report_.folder = folder_;
    report_.unknown_fields = config.unknown_fields;
    return PeftAdapter(config, std::move(report_), std::move(file_));
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

  PeftConfig read_config() {
    require(io::is_folder(folder_), Errc::io_error, io::shown_path(folder_),
            ": expected an adapter's folder");
    const std::string path = folder_ + "/" + kConfigFile;
    config_file_ = io::shown_path(path);
    require(io::exists(path), Errc::config_error, config_file_, " not found");
    const std::string text = io::read_text(path, options_.max_config_bytes, "max_config_bytes");
    return io::parse_peft_config(text, config_file_, options_);
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

  void open_weights() {
    const std::string path = folder_ + "/" + kWeightsFile;
    if (!io::exists(path)) {
      if (io::exists(folder_ + "/adapter_model.bin")) {
        fail(Errc::unsupported, io::shown_path(folder_),
             ": adapter_model.bin is a pickle, which can run code; convert it to ", kWeightsFile);
      }
      if (io::exists(path + ".index.json")) {
        fail(Errc::unsupported, io::shown_path(folder_), ": the weights are split over several ",
             "files (", kWeightsFile, ".index.json)");
      }
      fail(Errc::not_found, io::shown_path(folder_), ": no ", in_quotes(kWeightsFile));
    }
    file_ = SafeTensors::open(path, options_.limits);
    require(!file_.tensors().empty(), Errc::config_error, file_.name(),
            ": the file holds no tensors");
  }

  bool wanted(std::string_view path) const {
    return only_.empty() || only_.find(path) != only_.end();
  }

  // Module names may end like a tensor's name, so names are read from the right.
  void group_tensors() {
    for (const StoredTensor& tensor : file_.tensors()) {
      std::string_view name = tensor.name;
      if (!name.starts_with(kPrefix)) {
        if (only_.empty()) unused_.push_back(tensor.name);
        continue;
      }
      has_prefix_ = true;
      name.remove_prefix(kPrefix.size());
      if (name.ends_with(kDownSuffix)) {
        name.remove_suffix(kDownSuffix.size());
        pairs_[std::string(name)].down = &tensor;
      } else if (name.ends_with(kUpSuffix)) {
        name.remove_suffix(kUpSuffix.size());
        pairs_[std::string(name)].up = &tensor;
      } else {
        other_tensor(tensor, name);
      }
    }
  }

  void other_tensor(const StoredTensor& tensor, std::string_view name) {
    const auto belongs = [name](const std::string& path) { return name.starts_with(path + '.'); };
    if (!only_.empty() && std::none_of(only_.begin(), only_.end(), belongs)) return;
    const bool embedding =
        name.ends_with(".lora_embedding_A") || name.ends_with(".lora_embedding_B");
    require(!embedding, Errc::unsupported, file_.name(), ": ", in_quotes(tensor.name),
            " is LoRA on an embedding, which cannot be read");
    unused_.push_back(tensor.name);
  }

  void check_found() const {
    if (pairs_.empty() && !options_.allow_no_effect) {
      const std::string found =
          modules_.empty()
              ? "no LoRA tensors"
              : fmt::format("0 of {} target modules found in the file", targets_.size());
      fail(Errc::config_error, file_.name(), ": ", found,
           has_prefix_ ? "" : ", its keys lack the prefix \"base_model.model.\"");
    }
    for (const std::string& path : only_) {
      if (pairs_.find(path) != pairs_.end()) continue;
      std::vector<std::string_view> paths;
      for (const auto& [known, pair] : pairs_) paths.emplace_back(known);
      fail(Errc::not_found, file_.name(), ": option only names ", in_quotes(path),
           ", which the adapter does not touch", io::nearest_text(path, paths));
    }
    for (const auto& [path, pair] : pairs_) {
      if (wanted(path)) check_complete(path, pair);
    }
  }

  void check_complete(const std::string& path, const Pair& pair) const {
    if (pair.down != nullptr && pair.up != nullptr) return;
    const bool no_down = pair.down == nullptr;
    fail(Errc::config_error, file_.name(), ": ",
         in_quotes(no_down ? down_name(path) : up_name(path)), " is missing, ",
         in_quotes(no_down ? up_name(path) : down_name(path)), " is present");
  }

  void add_module(const std::string& path, const Pair& pair, const io::PeftMatcher& matcher,
                  const PeftConfig& config) {
    const auto place = host_.find(path);
    const HostModule* host = place == host_.end() ? nullptr : place->second;
    if (!modules_.empty() && host == nullptr) {
      return not_applied(
          pair, in_quotes(std::string(kPrefix) + path) + " matches no module of the base model");
    }
    LoraModule module;
    module.path = path;
    module.kind = config.fan_in_fan_out ? ModuleKind::conv1d : ModuleKind::linear;
    if (host != nullptr) module.kind = host->kind;
    const io::PeftMatch match = matcher.match(path, module.kind);
    if (!match.matched) {
      return not_applied(pair,
                         "tensors for " + in_quotes(path) + ", which target_modules does not name");
    }
    require(module.kind == ModuleKind::linear || module.kind == ModuleKind::conv1d,
            Errc::unsupported, file_.name(), ": ", in_quotes(path), " is no linear layer");
    module.rank = match.rank;
    module.alpha = match.alpha;
    module.scale = match.scale;
    module.rank_from = config.rank_from;
    if (match.rank_pattern >= 0) {
      const auto i = static_cast<std::size_t>(match.rank_pattern);
      module.rank_from = "rank_pattern " + in_quotes(config.rank_pattern[i].first);
    }
    module.alpha_from = config.alpha_from;
    if (match.alpha_pattern >= 0) {
      const auto i = static_cast<std::size_t>(match.alpha_pattern);
      module.alpha_from = "alpha_pattern " + in_quotes(config.alpha_pattern[i].first);
    }
    take_tensors(pair, match, host, module);
    report_.applied.push_back(std::move(module));
  }

  void not_applied(const Pair& pair, const std::string& why) {
    require(options_.allow_partial, Errc::config_error, file_.name(), ": ", why);
    unused_.push_back(pair.down->name);
    unused_.push_back(pair.up->name);
  }

  void take_tensors(const Pair& pair, const io::PeftMatch& match, const HostModule* host,
                    LoraModule& module) {
    check_matrix(*pair.down);
    check_matrix(*pair.up);
    check_shapes(pair, match, host);
    check_values(*pair.down);
    const Values up = check_values(*pair.up);
    has_effect_ = has_effect_ || !up.all_zero;
    module.down_tensor = pair.down->name;
    module.up_tensor = pair.up->name;
    module.stored_down = pair.down->dtype;
    module.stored_up = pair.up->dtype;
    module.d_in = pair.down->shape[1];
    module.d_out = pair.up->shape[0];
  }

  void check_matrix(const StoredTensor& tensor) const {
    require(is_weight(tensor.dtype), Errc::unsupported, file_.name(), ": ", in_quotes(tensor.name),
            " has the dtype \"", name(tensor.dtype), "\", weights must be F64, F32, F16 or BF16");
    require(tensor.shape.size() == 2, Errc::shape_mismatch, file_.name(), ": ",
            in_quotes(tensor.name), " has ", tensor.shape.size(), " dimensions, expected 2");
    require(tensor.elements() > 0, Errc::shape_mismatch, file_.name(), ": ", in_quotes(tensor.name),
            " is ", io::shape_text(tensor.shape), ", an empty matrix");
  }

  void check_shapes(const Pair& pair, const io::PeftMatch& match, const HostModule* host) const {
    const std::vector<Index>& down = pair.down->shape;
    const std::vector<Index>& up = pair.up->shape;
    const std::string start = file_.name() + ": ";
    const bool turned = down[0] != match.rank && down[1] == match.rank &&
                        (host == nullptr || down[0] == host->d_in);
    require(!turned, Errc::shape_mismatch, start, in_quotes(pair.down->name), " is ",
            io::shape_text(down), ", expected [", down[1], ", ", down[0], "]: transposed?");
    require(down[0] == match.rank, Errc::shape_mismatch, start, in_quotes(pair.down->name),
            " has rank ", down[0], ", ", match.rank_pattern < 0 ? "the config" : "rank_pattern",
            " says ", match.rank);
    require(up[1] == match.rank, Errc::shape_mismatch, start, in_quotes(pair.up->name),
            " has rank ", up[1], ", its lora_A has rank ", down[0]);
    if (host == nullptr) return;
    require(down[1] == host->d_in, Errc::shape_mismatch, start, in_quotes(pair.down->name),
            " has width ", down[1], ", the base layer has d_in ", host->d_in);
    require(up[0] == host->d_out, Errc::shape_mismatch, start, in_quotes(pair.up->name),
            " has height ", up[0], ", the base layer has d_out ", host->d_out);
  }

  Values check_values(const StoredTensor& tensor) const {
    const Values values = look_at_values(tensor, file_.name());
    require(values.non_finite == 0, Errc::numeric_error, file_.name(), ": ", in_quotes(tensor.name),
            " holds ", values.non_finite, " non-finite values, first at index ", values.first);
    return values;
  }

  void find_missing() {
    for (const HostModule* target : targets_) {
      if (!wanted(target->path) || pairs_.find(target->path) != pairs_.end()) continue;
      require(options_.allow_partial, Errc::config_error, file_.name(), ": target module ",
              in_quotes(target->path), " has no tensors in the file");
      report_.missing.push_back(target->path);
    }
  }

  void check_unused() {
    if (!unused_.empty() && !options_.allow_partial) {
      fail(Errc::config_error, file_.name(), ": unused tensor ", in_quotes(unused_.front()), " (",
           unused_.size(), " in all)");
    }
    report_.unused = std::move(unused_);
  }

  void check_effect() const {
    if (options_.allow_no_effect) return;
    require(!report_.applied.empty(), Errc::config_error, file_.name(),
            ": no module was applied (ok with the option allow_no_effect)");
    require(has_effect_, Errc::config_error, file_.name(),
            ": every lora_B is zero, the adapter has ",
            "no effect (ok with the option allow_no_effect)");
  }

  void note_checks_off(const PeftConfig& config) {
    std::vector<std::string>& off = report_.checks_off;
    if (modules_.empty()) {
      const char* kind = config.fan_in_fan_out ? "conv1d" : "linear";
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
  }

  const std::string& folder_;
  const std::vector<HostModule>& modules_;
  const PeftOptions& options_;
  std::string config_file_;
  SafeTensors file_;
  std::map<std::string_view, const HostModule*> host_;
  std::set<std::string, std::less<>> only_;
  std::vector<const HostModule*> targets_;
  std::map<std::string, Pair, std::less<>> pairs_;
  std::vector<std::string> unused_;
  bool has_prefix_ = false;
  bool has_effect_ = false;
  LoadReport report_;
};

}  // namespace

PeftAdapter load_peft(const std::string& folder, const std::vector<HostModule>& modules,
                      const PeftOptions& options) {
  return Loader(folder, modules, options).load();
}

}  // namespace mole::inline MOLE_ABI
