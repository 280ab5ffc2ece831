// SPDX-License-Identifier: Apache-2.0
// What the fuzz targets do with one input. An input is accepted or refused with a mole::Error that
// names why; anything else that happens is a defect and is thrown as std::logic_error.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "io/file_builder.hpp"
#include "io/peft_config.hpp"
#include "io/peft_match.hpp"
#include "mole/io/peft.hpp"
#include "mole/io/peft_bank.hpp"
#include "mole/io/safetensors.hpp"
#include "mole/io/safetensors_writer.hpp"
#include "support/alloc_counter.hpp"

namespace test::fuzz {

using mole::Errc;
using mole::Index;
using mole::SafeTensors;

inline std::span<const std::byte> bytes_of(const std::uint8_t* data, std::size_t size) {
  return {reinterpret_cast<const std::byte*>(data), size};
}

inline void demand(bool holds, const std::string& what) {
  if (!holds) throw std::logic_error(what);
}

/// Runs `read`; a refusal must be of one of these categories and fit on one printable line.
/// Returns whether the input was accepted. What reading takes at most is bounded by its size.
template <class F>
bool accepted(std::size_t input_bytes, const std::vector<Errc>& allowed, F&& read) {
  const long before = live_bytes();
  reset_peak();
  bool good = true;
  try {
    read();
  } catch (const mole::Error& error) {
    good = false;
    const std::string message = error.what();
    const bool printable =
        std::all_of(message.begin(), message.end(), [](char c) { return c >= 0x20 && c <= 0x7e; });
    demand(printable && message.size() < 4000, "message is not one printable line");
    demand(std::find(allowed.begin(), allowed.end(), error.code()) != allowed.end(),
           "unexpected category: " + message);
  }
  const long bound = 1'000'000 + 100 * static_cast<long>(input_bytes);
  demand(peak_bytes() - before <= bound, "takes too much memory");
  return good;
}

inline bool same_contents(const SafeTensors& a, const SafeTensors& b) {
  const auto same = [](const mole::StoredTensor& x, const mole::StoredTensor& y) {
    return x.name == y.name && x.dtype == y.dtype && x.shape == y.shape &&
           std::equal(x.bytes.begin(), x.bytes.end(), y.bytes.begin(), y.bytes.end());
  };
  return a.metadata() == b.metadata() && std::equal(a.tensors().begin(), a.tensors().end(),
                                                    b.tensors().begin(), b.tensors().end(), same);
}

/// Tensors lie inside the file, one after the other, and are as large as their shape says.
inline void check_tensors(const SafeTensors& file, std::span<const std::byte> bytes) {
  std::size_t covered = 0;
  for (const mole::StoredTensor& tensor : file.tensors()) {
    const bool inside = tensor.bytes.empty() ||
                        (tensor.bytes.data() >= bytes.data() + 8 &&
                         tensor.bytes.data() + tensor.bytes.size() <= bytes.data() + bytes.size());
    demand(inside, "a tensor lies outside the file");
    const auto bits = static_cast<std::size_t>(tensor.elements()) *
                      static_cast<std::size_t>(info(tensor.dtype).bits);
    demand(bits == tensor.bytes.size() * 8, "a tensor is not as large as its shape says");
    covered += tensor.bytes.size();
    demand(file.find(tensor.name) == &tensor, "a tensor is not found by its name");
    if (is_weight(tensor.dtype)) file.read<float>(tensor.name);
  }
  demand(covered <= bytes.size() - 8, "the tensors are larger than the file");
}

/// A file that was accepted can be written, is accepted again, and is then written alike.
inline void check_rewriting(const SafeTensors& file) {
  mole::SafeTensorsWriter writer;
  for (const auto& [key, value] : file.metadata()) writer.set_metadata(key, value);
  for (const mole::StoredTensor& tensor : file.tensors()) writer.add(tensor);
  const std::vector<std::byte> first = writer.bytes();
  const SafeTensors again = SafeTensors::parse(first, "again");
  demand(same_contents(file, again), "written and read again it differs");
  mole::SafeTensorsWriter second;
  for (const auto& [key, value] : again.metadata()) second.set_metadata(key, value);
  for (const mole::StoredTensor& tensor : again.tensors()) second.add(tensor);
  demand(second.bytes() == first, "written twice it differs");
}

/// The input is a file.
inline void run_safetensors(std::span<const std::byte> input) {
  SafeTensors file;
  const std::vector<Errc> allowed = {Errc::format_error, Errc::limit_exceeded, Errc::unsupported};
  const bool good =
      accepted(input.size(), allowed, [&] { file = SafeTensors::parse(input, "input"); });
  if (!good) return;
  check_tensors(file, input);
  check_rewriting(file);
}

inline const std::vector<mole::HostModule>& host_modules() {
  static const std::vector<mole::HostModule> modules = {
      {"model.embed_tokens", mole::ModuleKind::embedding, 5, 6},
      {"model.layers.0.self_attn.q_proj", mole::ModuleKind::linear, 6, 6},
      {"model.layers.0.self_attn.v_proj", mole::ModuleKind::linear, 6, 4},
      {"model.layers.10.mlp.up_proj", mole::ModuleKind::conv1d, 6, 7},
      {"lm_head", mole::ModuleKind::linear, 6, 5},
  };
  return modules;
}

inline std::string_view as_text(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

inline const std::vector<Errc>& adapter_refusals() {
  static const std::vector<Errc> codes = {
      Errc::format_error, Errc::limit_exceeded, Errc::unsupported,  Errc::config_error,
      Errc::not_found,    Errc::shape_mismatch, Errc::numeric_error};
  return codes;
}

/// The input is the text of adapter_config.json.
inline void run_peft_config(std::span<const std::byte> input) {
  mole::PeftOptions options;
  options.peft_defaults = true;
  accepted(input.size(), adapter_refusals(), [&] {
    const mole::PeftConfig config =
        mole::io::parse_peft_config(as_text(input), "adapter_config.json", options);
    demand(config.rank >= 1 && config.alpha > 0 && std::isfinite(config.alpha),
           "rank or alpha have no meaning");
    const mole::io::PeftMatcher matcher(config, "adapter_config.json");
    for (const mole::HostModule& module : host_modules()) {
      const mole::io::PeftMatch match = matcher.match(module.path, module.kind);
      demand(!match.matched || (match.rank >= 1 && match.scale > 0), "a match has no meaning");
    }
    matcher.useless_pattern(host_modules());
  });
}

/// The two files of an adapter in one input: 4 bytes little-endian length of the settings, the
/// settings, the tensors.
struct FolderInput {
  std::span<const std::byte> config, tensors;
};
inline FolderInput split_folder(std::span<const std::byte> input) {
  std::size_t length = 0;
  for (std::size_t i = 0; i < 4 && i < input.size(); ++i) {
    length |= std::to_integer<std::size_t>(input[i]) << (8 * i);
  }
  const auto rest = input.subspan(std::min<std::size_t>(4, input.size()));
  length = std::min(length, rest.size());
  return {rest.first(length), rest.subspan(length)};
}

/// Folder of this process, in memory where the system has such a place.
inline const mole::test::TemporaryFolder& fuzz_folder() {
  static const bool in_memory = ::access("/dev/shm", W_OK) == 0 &&
                                std::getenv("TMPDIR") == nullptr &&
                                ::setenv("TMPDIR", "/dev/shm", 1) == 0;
  static const mole::test::TemporaryFolder folder;
  if (in_memory) ::unsetenv("TMPDIR");
  return folder;
}

/// Every weight of an accepted adapter can be read, and a bank of it made.
inline void check_adapter(const mole::PeftAdapter& adapter) {
  const std::string report = adapter.report().to_text();
  demand(std::all_of(report.begin(), report.end(),
                     [](char c) { return c == '\n' || (c >= 0x20 && c <= 0x7e); }),
         "the report is not printable");
  for (const mole::LoraModule& module : adapter.modules()) {
    demand(module.rank >= 1 && module.d_in >= 1 && module.d_out >= 1 && module.scale > 0,
           "a module has no meaning");
    demand(&adapter.at(module.path) == &module, "a module is not found by its path");
    std::vector<double> down(static_cast<std::size_t>(module.rank * module.d_in));
    adapter.read_down(module, mole::MatView<double>(down.data(), module.rank, module.d_in));
    for (const double value : down) demand(std::isfinite(value), "a weight is not finite");
    const mole::AdapterBank<double> bank({&adapter, 1}, module.path);
    demand(bank.bank().largest_rank() == module.rank, "a bank has another rank");
  }
}

inline void run_peft_folder(std::span<const std::byte> input) {
  const FolderInput parts = split_folder(input);
  const mole::test::TemporaryFolder& folder = fuzz_folder();
  folder.write("adapter_config.json", std::string(as_text(parts.config)));
  folder.write("adapter_model.safetensors", std::string(as_text(parts.tensors)));
  const std::string path = folder.path();
  for (const bool with_host : {false, true}) {
    accepted(input.size(), adapter_refusals(), [&] {
      const auto& modules = host_modules();
      check_adapter(with_host ? mole::load_peft(path, modules) : mole::load_peft(path));
    });
  }
}

}  // namespace test::fuzz
