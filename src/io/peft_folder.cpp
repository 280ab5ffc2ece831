// SPDX-License-Identifier: Apache-2.0
#include "io/peft_folder.hpp"

#include <algorithm>
#include <string_view>
#include <vector>

#include "io/directory.hpp"
#include "io/file.hpp"
#include "io/text.hpp"
#include "mole/core/error.hpp"

namespace mole::inline MOLE_ABI {
namespace io {
namespace {

// "; the option adapter_name takes "a", "b"" where subfolders hold adapters.
std::string named_adapters(const std::string& folder) {
  constexpr std::size_t kMostNamed = 5;
  std::vector<std::string> names;
  Directory entries(folder);
  while (const char* name = entries ? entries.next() : nullptr) {
    if (exists(folder + "/" + name + "/" + kConfigFile)) names.emplace_back(name);
    if (names.size() == kMostNamed) break;
  }
  std::sort(names.begin(), names.end());
  std::string text;
  for (const std::string& name : names) {
    text += (text.empty() ? "; the option adapter_name can be " : ", ") + in_quotes(name);
  }
  return text;
}

}  // namespace

std::string adapter_folder(const std::string& root, const std::string& adapter_name) {
  if (adapter_name.empty() || adapter_name == "default") return root;
  const bool plain = adapter_name != "." && adapter_name != ".." &&
                     adapter_name.find_first_of(std::string_view("/\0", 2)) == std::string::npos;
  require(plain, Errc::invalid_argument, "option adapter_name is ", in_quotes(adapter_name),
          ", must be the name of a subfolder");
  return root + "/" + adapter_name;
}

std::string find_adapter(const std::string& root, const std::string& adapter_name) {
  const std::string folder = adapter_folder(root, adapter_name);
  if (folder != root && is_folder(root) && !is_folder(folder)) {
    fail(Errc::not_found, shown_path(root), ": no adapter ", in_quotes(adapter_name),
         named_adapters(root));
  }
  return folder;
}

std::string read_config_text(const std::string& folder, std::uint64_t limit) {
  require(is_folder(folder), Errc::io_error, shown_path(folder), ": expected an adapter's folder");
  const std::string path = folder + "/" + kConfigFile;
  if (!exists(path)) {
    fail(Errc::config_error, shown_path(path), " not found", named_adapters(folder));
  }
  return read_text(path, limit, "max_config_bytes");
}

SafeTensors open_weights(const std::string& folder, const SafeTensorsLimits& limits) {
  const std::string path = folder + "/" + kWeightsFile;
  if (!exists(path)) {
    if (exists(folder + "/adapter_model.bin")) {
      fail(Errc::unsupported, shown_path(folder),
           ": adapter_model.bin is a pickle, which can run code; convert it to ", kWeightsFile);
    }
    if (exists(path + ".index.json")) {
      fail(Errc::unsupported, shown_path(folder), ": the weights are split over several files (",
           kWeightsFile, ".index.json)");
    }
    fail(Errc::not_found, shown_path(folder), ": no ", in_quotes(kWeightsFile));
  }
  SafeTensors file = SafeTensors::open(path, limits);
  require(!file.tensors().empty(), Errc::config_error, file.name(), ": the file holds no tensors");
  return file;
}

}  // namespace io
}  // namespace mole::inline MOLE_ABI
