// SPDX-License-Identifier: Apache-2.0
// mole_inspect: what is in adapters and mixtures, and is it sound. docs/inspect.md explains it.
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <map>
#include <new>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include "mole/core/error.hpp"
#include "mole/io/description_json.hpp"
#include "mole/io/mixture_file.hpp"
#include "mole/io/peft.hpp"
#include "mole/io/safetensors.hpp"
#include "mole/version.hpp"

namespace {

using Json = nlohmann::ordered_json;

constexpr int kSound = 0, kUnsound = 1, kWrongUse = 2, kNoOutput = 3;

constexpr std::string_view kHelp =
    R"(Usage: mole_inspect [--json] [--modules FILE] FILE_OR_FOLDER...

Shows what is in PEFT adapters (folders), mixtures and other safetensors files, and checks them.

  --json          one JSON document: a list with an entry for every argument
  --modules FILE  the modules of the base model, which adapters must fit; a JSON object
                  {"PATH": {"type": "linear", "d_in": 8, "d_out": 8}, ...}
                  with the types linear, conv1d, embedding and other
  --              what follows are files and folders
  --help          this text
  --version       the version of mole

Exit status: 0 all is sound, 1 something is unsound or cannot be read, 2 wrong use, 3 the output
cannot be written.
)";

/// Printable ASCII stays, every other byte becomes \xNN; cut after `limit` bytes.
std::string printable(std::string_view text, std::size_t limit = 200) {
  std::string result;
  for (const char c : text) {
    if (result.size() >= limit) return result + "...";
    const auto byte = static_cast<unsigned char>(c);
    const bool plain = byte >= 0x20 && byte <= 0x7e;
    result += plain ? std::string(1, c) : fmt::format("\\x{:02x}", byte);
  }
  return result;
}

void complain(std::string_view message) {
  fmt::print(stderr, "mole_inspect: {}\n", message);
}

/// What is known about one argument, for programs and for people.
struct Finding {
  Json document;
  std::string text;
  bool sound = true;
};

Json error_entry(const mole::Error& error) {
  return {{"category", std::string(name(error.code()))}, {"message", error.what()}};
}

/// What this library cannot read may be sound all the same.
const char* verdict(const mole::Error& error) {
  return error.code() == mole::Errc::unsupported ? "cannot be judged" : "unsound";
}

std::uint64_t bytes_of(const std::vector<const mole::StoredTensor*>& tensors) {
  std::uint64_t bytes = 0;
  for (const mole::StoredTensor* tensor : tensors) bytes += tensor->bytes.size();
  return bytes;
}

/// The tensors of the mixture, or of the whole file for an empty name.
std::vector<const mole::StoredTensor*> tensors_below(const mole::SafeTensors& file,
                                                     const std::string& name) {
  std::vector<const mole::StoredTensor*> below;
  for (const mole::StoredTensor& tensor : file.tensors()) {
    if (name.empty() || tensor.name.starts_with(name + ".")) below.push_back(&tensor);
  }
  return below;
}

// "top_k: width 1536, experts 4, k 2", and the parts of a layer below it.
void describe(const Json& description, int indent, std::string& text) {
  std::string fields, parts;
  for (const auto& item : description.items()) {
    const Json& value = item.value();
    if (item.key() == "kind") continue;
    if (value.is_object()) {
      parts += fmt::format("{:{}}{}: ", "", indent + 2, printable(item.key()));
      describe(value, indent + 2, parts);
    } else {
      fields += fmt::format("{}{} {}", fields.empty() ? ": " : ", ", printable(item.key()),
                            printable(value.is_string() ? value.get<std::string>() : value.dump()));
    }
  }
  text += printable(description.at("kind").get<std::string>()) + fields + "\n" + parts;
}

void add_mixture(const mole::MixtureFile& file, const mole::MixtureRecord& record,
                 Finding& finding) {
  const auto tensors = tensors_below(file.file(), record.name);
  const Json layer = Json::parse(to_json(record.layer));
  Json entry = {{"name", record.name},
                {"layer", layer},
                {"optional_tensors", record.optional_tensors},
                {"tensors", tensors.size()},
                {"bytes", bytes_of(tensors)},
                {"sound", true}};
  finding.text += fmt::format("mixture \"{}\": {} tensors, {} bytes\n  ", printable(record.name),
                              tensors.size(), bytes_of(tensors));
  describe(layer, 2, finding.text);
  try {
    file.check(record);
    finding.text += "  sound\n";
  } catch (const mole::Error& error) {
    entry["sound"] = finding.sound = false;
    entry["error"] = error_entry(error);
    finding.text += fmt::format("  {}: {}\n", verdict(error), error.what());
    complain(error.what());
  }
  finding.document["mixtures"].push_back(entry);
}

void add_tensors(const mole::SafeTensors& file, Finding& finding) {
  const auto tensors = tensors_below(file, "");
  finding.document["bytes"] = bytes_of(tensors);
  finding.document["metadata"] = file.metadata();
  finding.document["tensors"] = Json::array();
  for (const auto& [key, value] : file.metadata()) {
    finding.text += fmt::format("metadata {}: {}\n", printable(key), printable(value));
  }
  finding.text += fmt::format("tensors: {}, {} bytes\n", tensors.size(), bytes_of(tensors));
  for (const mole::StoredTensor* tensor : tensors) {
    finding.document["tensors"].push_back({{"name", tensor->name},
                                           {"dtype", std::string(name(tensor->dtype))},
                                           {"shape", tensor->shape},
                                           {"bytes", tensor->bytes.size()}});
    finding.text +=
        fmt::format("  {} {} [{}] {} bytes\n", printable(tensor->name), name(tensor->dtype),
                    fmt::join(tensor->shape, ", "), tensor->bytes.size());
  }
}

void inspect_file(const std::string& path, Finding& finding) {
  const mole::SafeTensors file = mole::SafeTensors::open(path);
  finding.document["kind"] = "safetensors";
  finding.text = fmt::format("safetensors {}\n", printable(path));
  add_tensors(file, finding);
  if (!mole::MixtureFile::is_mixture_file(file)) return;
  finding.document["kind"] = "mixtures";
  finding.document["mixtures"] = Json::array();
  const mole::MixtureFile mixtures(file);
  finding.document["format"] = mixtures.format();
  for (const mole::MixtureRecord& record : mixtures.records()) {
    add_mixture(mixtures, record, finding);
  }
}

bool is_folder(const std::string& path) {
  struct stat status {};
  return ::stat(path.c_str(), &status) == 0 && S_ISDIR(status.st_mode);
}

bool exists(const std::string& path) {
  struct stat status {};
  return ::stat(path.c_str(), &status) == 0;
}

/// Modules with the same rank and scale from the same settings, counted.
std::string summary(const std::vector<mole::LoraModule>& modules) {
  std::map<std::string, int> counts;
  for (const mole::LoraModule& module : modules) {
    counts[fmt::format("rank {} ({}), alpha {} ({}), scale {}", module.rank,
                       printable(module.rank_from), module.alpha, printable(module.alpha_from),
                       module.scale)] += 1;
  }
  std::string text;
  for (const auto& [what, count] : counts) {
    text += fmt::format("{} modules: {}\n", count, what);
  }
  return text;
}

void inspect_folder(const std::string& path, const std::vector<mole::HostModule>& modules,
                    Finding& finding) {
  mole::require(exists(path + "/adapter_config.json"), mole::Errc::not_found, printable(path, 1000),
                ": is a folder without adapter_config.json, not a PEFT adapter");
  const mole::PeftAdapter adapter = mole::load_peft(path, modules);
  finding.document["kind"] = "peft";
  finding.document["report"] = Json::parse(adapter.report().to_json());
  finding.text = adapter.report().to_text() + summary(adapter.modules());
}

Finding inspect(const std::string& path, const std::vector<mole::HostModule>& modules) {
  Finding finding;
  finding.document = {{"path", path}, {"kind", nullptr}, {"sound", true}};
  try {
    if (is_folder(path)) {
      inspect_folder(path, modules, finding);
    } else {
      inspect_file(path, finding);
    }
  } catch (const mole::Error& error) {
    finding.sound = false;
    finding.document["error"] = error_entry(error);
    finding.text += fmt::format("{}: {}\n", verdict(error), error.what());
    complain(error.what());
  }
  if (finding.sound) finding.text += "sound\n";
  finding.document["sound"] = finding.sound;
  return finding;
}

struct Arguments {
  bool json = false, help = false, version = false;
  std::string modules;
  std::vector<std::string> paths;
  std::string fault;  ///< of wrong use; empty: none
};

Arguments parse(const std::vector<std::string>& words) {
  Arguments arguments;
  bool options_end = false;
  for (std::size_t i = 0; i < words.size() && arguments.fault.empty(); ++i) {
    const std::string& word = words[i];
    if (options_end || word.size() < 2 || word[0] != '-') {
      arguments.paths.push_back(word);
    } else if (word == "--") {
      options_end = true;
    } else if (word == "--json") {
      arguments.json = true;
    } else if (word == "--help" || word == "-h") {
      arguments.help = true;
    } else if (word == "--version") {
      arguments.version = true;
    } else if (word == "--modules" && i + 1 < words.size()) {
      arguments.modules = words[++i];
    } else if (word == "--modules") {
      arguments.fault = "--modules needs a file";
    } else {
      arguments.fault = "unknown option \"" + printable(word) + "\"";
    }
  }
  const bool idle = arguments.paths.empty() && !arguments.help && !arguments.version;
  if (idle && arguments.fault.empty()) arguments.fault = "no file or folder";
  return arguments;
}

mole::ModuleKind kind_of(const std::string& type) {
  if (type == "linear") return mole::ModuleKind::linear;
  if (type == "conv1d") return mole::ModuleKind::conv1d;
  if (type == "embedding") return mole::ModuleKind::embedding;
  return mole::ModuleKind::other;
}

/// Throws std::exception with the words of the JSON library.
std::vector<mole::HostModule> read_modules(const std::string& path) {
  std::vector<mole::HostModule> modules;
  if (path.empty()) return modules;
  std::ifstream file(path);
  if (!file) throw std::system_error(errno, std::generic_category(), "cannot be opened");
  const std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  const Json document = Json::parse(text);
  for (const auto& item : document.items()) {
    const Json& module = item.value();
    modules.push_back({item.key(), kind_of(module.at("type").get<std::string>()),
                       module.at("d_in").get<mole::Index>(),
                       module.at("d_out").get<mole::Index>()});
  }
  return modules;
}

/// False, with a complaint, if the output cannot be written.
bool write(std::string_view text) {
  errno = 0;
  const bool written =
      std::fwrite(text.data(), 1, text.size(), stdout) == text.size() && std::fflush(stdout) == 0;
  if (!written) {
    complain("the output cannot be written: " + std::generic_category().message(errno));
  }
  return written;
}

int run(const Arguments& arguments) {
  std::vector<mole::HostModule> modules;
  try {
    modules = read_modules(arguments.modules);
  } catch (const std::exception& error) {
    complain(
        fmt::format("--modules {}: {}", printable(arguments.modules), printable(error.what())));
    return kWrongUse;
  }
  bool sound = true;
  Json documents = Json::array();
  for (const std::string& path : arguments.paths) {
    Finding finding = inspect(path, modules);
    sound = sound && finding.sound;
    if (arguments.json) {
      documents.push_back(std::move(finding.document));
    } else if (!write(finding.text)) {
      return kNoOutput;
    }
  }
  // Nothing but ASCII is written, so nothing steers a terminal.
  constexpr int kIndent = 2;
  constexpr bool kAsciiOnly = true;
  const bool written =
      !arguments.json ||
      write(documents.dump(kIndent, ' ', kAsciiOnly, Json::error_handler_t::replace) + "\n");
  if (!written) return kNoOutput;
  return sound ? kSound : kUnsound;
}

}  // namespace

int main(int count, char** words) {
  std::signal(SIGPIPE, SIG_IGN);  // a broken pipe is an error of `write`
  if (::fcntl(STDOUT_FILENO, F_GETFD) == -1) {
    complain("the output is closed");
    return kNoOutput;
  }
  try {
    const Arguments arguments = parse({words + (count > 0 ? 1 : 0), words + count});
    if (!arguments.fault.empty()) {
      complain(arguments.fault + "; see mole_inspect --help");
      return kWrongUse;
    }
    if (arguments.help) return write(kHelp) ? kSound : kNoOutput;
    if (arguments.version) {
      return write(fmt::format("mole {}.{}.{}\n", mole::kVersionMajor, mole::kVersionMinor,
                               mole::kVersionPatch))
                 ? kSound
                 : kNoOutput;
    }
    return run(arguments);
  } catch (const std::bad_alloc&) {
    complain("out of memory");
  } catch (const std::exception& error) {
    complain(printable(error.what()));
  }
  return kUnsound;
}
