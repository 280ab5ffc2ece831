// SPDX-License-Identifier: Apache-2.0
#include "mole/io/peft_writer.hpp"

#include <sys/stat.h>
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <set>
#include <vector>

#include "io/new_folder.hpp"
#include "io/peft_fixture.hpp"
#include "io/peft_settings.hpp"

namespace {

namespace fs = std::filesystem;
using mole::Errc;
using mole::Index;
using mole::LoraModule;
using mole::LoraWeights;
using mole::MatView;
using mole::ModuleKind;
using mole::PeftAdapter;
using mole::PeftSaveOptions;
using mole::save_peft;
using mole::StoredTensor;
using mole::test::Adapter;
using mole::test::Json;
using mole::test::refused;
using mole::test::TemporaryFolder;

std::string text_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::set<std::string> entries_of(const std::string& folder) {
  std::set<std::string> names;
  for (const auto& entry : fs::directory_iterator(folder)) names.insert(entry.path().filename());
  return names;
}

/// Same tensors, bit by bit, under the same names.
void check_same_tensors(const PeftAdapter& a, const PeftAdapter& b) {
  const std::vector<StoredTensor>&x = a.file().tensors(), &y = b.file().tensors();
  REQUIRE(x.size() == y.size());
  int different = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const bool same = x[i].name == y[i].name && x[i].dtype == y[i].dtype &&
                      x[i].shape == y[i].shape && std::ranges::equal(x[i].bytes, y[i].bytes);
    different += same ? 0 : 1;
  }
  CHECK(different == 0);
}

void check_same_modules(const PeftAdapter& a, const PeftAdapter& b) {
  REQUIRE(a.modules().size() == b.modules().size());
  for (std::size_t i = 0; i < a.modules().size(); ++i) {
    const LoraModule &x = a.modules()[i], &y = b.modules()[i];
    INFO(x.path);
    CHECK(x.path == y.path);
    CHECK(x.kind == y.kind);
    CHECK(x.rank == y.rank);
    CHECK(x.alpha == y.alpha);
    CHECK(x.scale == y.scale);
    CHECK(x.base_change == y.base_change);
  }
}

/// Saves, loads, and compares with what was saved.
PeftAdapter round_trip(const PeftAdapter& adapter, const mole::PeftOptions& options = {}) {
  const TemporaryFolder folder;
  save_peft(folder.path() + "/copy", adapter);
  PeftAdapter copy = mole::load_peft(folder.path() + "/copy", {}, options);
  check_same_tensors(adapter, copy);
  check_same_modules(adapter, copy);
  CHECK(entries_of(folder.path()) == std::set<std::string>{"copy"});
  CHECK(entries_of(folder.path() + "/copy") ==
        std::set<std::string>{"adapter_config.json", "adapter_model.safetensors"});
  return copy;
}

/// Two layers of ranks 2 and 3 in memory of their own.
template <class T>
struct Layers {
  std::vector<T> a, b, wide_a;
  std::vector<LoraWeights<T>> list;

  Layers() : a(10), b(8), wide_a(3 * 9, T(-9)) {
    for (std::size_t i = 0; i < a.size(); ++i) a[i] = T(0.5f * static_cast<float>(i) - 1.0f);
    for (std::size_t i = 0; i < b.size(); ++i) b[i] = T(1.0f / static_cast<float>(i + 1));
    const MatView<T> strided(wide_a.data(), 3, 4, 9);
    for (Index r = 0; r < 3; ++r) {
      for (Index c = 0; c < 4; ++c) strided(r, c) = T(static_cast<float>(10 * r + c));
    }
    list.push_back({.path = "h.0.proj",
                    .scale = 2,
                    .down = MatView<const T>(a.data(), 2, 5),
                    .up = MatView<const T>(b.data(), 4, 2)});
    list.push_back({.path = "h.10.proj",
                    .scale = 0.75,
                    .down = strided,
                    .up = MatView<const T>(b.data(), 2, 3)});
  }
};

template <class Edit>
void layers_refused(Errc code, const std::vector<std::string>& words, Edit edit) {
  const TemporaryFolder folder;
  Layers<float> layers;
  edit(layers);
  refused(code, words, [&] { save_peft<float>(folder.path() + "/new", layers.list); });
  CHECK(entries_of(folder.path()).empty());
}

}  // namespace

TEST_CASE("peft writer: the trained adapters survive a round trip bit by bit", "[io]") {
  for (const char* name : {"german", "kjv", "python", "cpp"}) {
    INFO(name);
    const std::string data = MOLE_TEST_DATA "/../examples/data/adapters/";
    const PeftAdapter adapter = mole::load_peft(data + name);
    const PeftAdapter copy = round_trip(adapter);
    CHECK(copy.config().base_model == adapter.config().base_model);
    CHECK(copy.config().task_type == adapter.config().task_type);
  }
}

TEST_CASE("peft writer: every readable golden folder survives a round trip", "[io][golden]") {
  const std::string folders = MOLE_TEST_DATA "/golden/cases/peft_adapters/checkpoints";
  mole::PeftOptions options;
  options.residual_base = true;
  int loaded = 0;
  for (const auto& item : fs::directory_iterator(folders)) {
    INFO(item.path().filename());
    std::optional<PeftAdapter> adapter;
    try {
      adapter = mole::load_peft(item.path().string(), {}, options);
    } catch (const mole::Error&) {
      continue;
    }
    ++loaded;
    if (!adapter->report().redundant.empty()) continue;
    const PeftAdapter copy = round_trip(*adapter, options);
    CHECK(copy.replacements().size() == adapter->replacements().size());
    CHECK(copy.config().bias == adapter->config().bias);
    CHECK(copy.config().lora_bias == adapter->config().lora_bias);
  }
  CHECK(loaded == 20);
}

TEST_CASE("peft writer: new layers are read back as they were written", "[io]") {
  const TemporaryFolder folder;
  const Layers<mole::bf16> layers;
  PeftSaveOptions options;
  options.base_model = "some/model";
  options.task_type = "CAUSAL_LM";
  save_peft<mole::bf16>(folder.path() + "/deep/er", layers.list, options);
  const PeftAdapter read = mole::load_peft(folder.path() + "/deep/er");
  REQUIRE(read.modules().size() == 2);
  CHECK(read.config().base_model == "some/model");
  CHECK(read.at("h.0.proj").scale == 2.0);
  CHECK(read.at("h.10.proj").scale == 0.75);
  CHECK(read.at("h.10.proj").rank == 3);
  CHECK(read.at("h.0.proj").stored_down == mole::Dtype::bf16);
  std::vector<float> down(12);
  read.read_down(read.at("h.10.proj"), MatView<float>(down.data(), 3, 4));
  CHECK(down == std::vector<float>{0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23});
  CHECK(read.file().metadata().at("format") == "pt");
}

TEST_CASE("peft writer: settings are sorted and do not depend on the order of patterns", "[io]") {
  const TemporaryFolder folder;
  Layers<float> layers;
  layers.list[0].path = "a.b";
  layers.list[1].path = "x.a.b";  // an unanchored pattern of the first would match it
  save_peft<float>(folder.path() + "/new", layers.list);
  const std::string text = text_of(folder.path() + "/new/adapter_config.json");
  Json config = Json::parse(text);
  std::vector<std::string> keys;
  for (const auto& item : config.items()) keys.push_back(item.key());
  CHECK(std::is_sorted(keys.begin(), keys.end()));
  CHECK(text.find("\n  \"alpha_pattern\": {\n    \"^a\\\\.b\": 4\n") != std::string::npos);
  CHECK(config.at("lora_alpha") == 2.25);
  CHECK(config.at("rank_pattern") == Json({{"^x\\.a\\.b", 3}}));
  CHECK(config.at("target_modules") == Json({"a.b", "x.a.b"}));
  CHECK(mole::load_peft(folder.path() + "/new").at("x.a.b").scale == 0.75);
}

TEST_CASE("peft writer: biases and conv1d layers", "[io]") {
  const TemporaryFolder folder;
  Layers<double> layers;
  const std::vector<double> bias = {1, 2, 3, 4};
  layers.list[0].bias = MatView<const double>(bias.data(), 1, 4);
  layers.list[1].bias = MatView<const double>(bias.data(), 1, 2);
  for (auto& layer : layers.list) layer.kind = ModuleKind::conv1d;
  save_peft<double>(folder.path() + "/new", layers.list);
  const PeftAdapter read = mole::load_peft(folder.path() + "/new");
  std::vector<double> values(4);
  read.read_bias(read.at("h.0.proj"), MatView<double>(values.data(), 1, 4));
  CHECK(values == bias);
  CHECK(read.config().lora_bias);
  CHECK(read.at("h.10.proj").kind == ModuleKind::conv1d);
}

TEST_CASE("peft writer: a scale is written exactly, or to the same float", "[io]") {
  const auto scale_of = [](double alpha, Index rank, bool rslora) {
    const auto r = static_cast<double>(rank);
    return alpha / (rslora ? std::sqrt(r) : r);
  };
  int exact = 0, all = 0;
  for (const bool rslora : {false, true}) {
    for (Index rank = 1; rank <= 70; ++rank) {
      for (const double scale : {1.0, 2.0, 0.1, 1.0 / 3, 0.7312345678901234, 1e-20, 123456.789}) {
        const double alpha = mole::io::alpha_for_scale(scale, rank, rslora, "layer");
        const double read = scale_of(alpha, rank, rslora);
        CHECK(static_cast<float>(read) == static_cast<float>(scale));
        CHECK(std::fabs(read - scale) <= scale * std::numeric_limits<double>::epsilon());
        exact += read == scale ? 1 : 0;
        ++all;
      }
      // A scale that came from an alpha is always found.
      const double from_file = scale_of(16, rank, rslora);
      CHECK(scale_of(mole::io::alpha_for_scale(from_file, rank, rslora, ""), rank, rslora) ==
            from_file);
    }
  }
  CHECK(exact > all * 8 / 10);
}

TEST_CASE("peft writer: layers that cannot be written leave nothing behind", "[io]") {
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  using L = Layers<float>;
  layers_refused(Errc::invalid_argument, {"at least one"}, [](L& l) { l.list.clear(); });
  layers_refused(Errc::invalid_argument, {"h.0.proj", "twice"},
                 [](L& l) { l.list[1].path = "h.0.proj"; });
  layers_refused(Errc::invalid_argument, {"UTF-8"}, [](L& l) { l.list[0].path = "a\xff"; });
  layers_refused(Errc::invalid_argument, {"not empty"}, [](L& l) { l.list[0].path.clear(); });
  layers_refused(Errc::unsupported, {"h.0.proj", "conv1d"},
                 [](L& l) { l.list[0].kind = ModuleKind::embedding; });
  layers_refused(Errc::shape_mismatch, {"h.10.proj", "up", "[2, 3]"},
                 [](L& l) { l.list[1].up.cols = 2; });
  layers_refused(Errc::shape_mismatch, {"h.0.proj"}, [](L& l) { l.list[0].down = {}; });
  layers_refused(Errc::numeric_error, {"h.0.proj", "down [1, 2]"}, [&](L& l) { l.a[7] = kNaN; });
  for (const double scale : {0.0, -1.0, 1e-300, 1e300, static_cast<double>(kNaN)}) {
    layers_refused(Errc::invalid_argument, {"h.0.proj", "scale"},
                   [&](L& l) { l.list[0].scale = scale; });
  }
  layers_refused(Errc::invalid_argument, {"h.10.proj", "bias"},
                 [](L& l) { l.list[0].bias = MatView<const float>(l.a.data(), 1, 4); });
}

TEST_CASE("peft writer: a folder with something in it is replaced on request only", "[io]") {
  const TemporaryFolder folder;
  const std::string target = folder.path() + "/style";
  const Layers<float> layers;
  fs::create_directory(target);
  save_peft<float>(target, layers.list);
  refused(Errc::state_error, {"/style", "not empty", "overwrite"},
          [&] { save_peft<float>(target, layers.list); });
  folder.write("style/README.md", "a card");
  fs::create_directory(target + "/other");
  folder.write("style/other/adapter_config.json", "{}");
  ::chmod(target.c_str(), 0750);
  PeftSaveOptions options;
  options.overwrite = true;
  save_peft(target, Adapter().load(), options);
  CHECK(mole::load_peft(target).modules().size() == 2);
  CHECK(mole::load_peft(target).find("h.0.proj") == nullptr);
  CHECK(text_of(target + "/README.md") == "a card");
  CHECK(text_of(target + "/other/adapter_config.json") == "{}");
  CHECK((fs::status(target).permissions() & fs::perms::all) == static_cast<fs::perms>(0750));
  CHECK(entries_of(folder.path()) == std::set<std::string>{"style"});
}

TEST_CASE("peft writer: an adapter with a name goes into its subfolder", "[io]") {
  const TemporaryFolder folder;
  const Layers<float> layers;
  PeftSaveOptions options;
  options.adapter_name = "tone";
  save_peft<float>(folder.path(), layers.list, options);
  mole::PeftOptions reading;
  reading.adapter_name = "tone";
  CHECK(mole::load_peft(folder.path(), {}, reading).modules().size() == 2);
  options.adapter_name = "..";
  refused(Errc::invalid_argument, {"adapter_name"},
          [&] { save_peft<float>(folder.path(), layers.list, options); });
}

TEST_CASE("peft writer: a target that is no folder is refused", "[io]") {
  const TemporaryFolder folder;
  folder.write("file", "text");
  const Layers<float> layers;
  PeftSaveOptions options;
  options.overwrite = true;
  refused(Errc::io_error, {"/file", "no folder"},
          [&] { save_peft<float>(folder.path() + "/file", layers.list, options); });
  refused(Errc::io_error, {"/file"},
          [&] { save_peft<float>(folder.path() + "/file/below", layers.list, options); });
  CHECK(text_of(folder.path() + "/file") == "text");
}

TEST_CASE("peft writer: what is not committed was never there", "[io]") {
  const TemporaryFolder folder;
  const std::string target = folder.path() + "/kept";
  fs::create_directory(target);
  folder.write("kept/old", "old");
  {
    const mole::io::NewFolder unfinished(target, true);
    std::ofstream(unfinished.path() + "/new") << "new";
    CHECK(entries_of(folder.path()).size() == 2);
  }
  CHECK(entries_of(folder.path()) == std::set<std::string>{"kept"});
  CHECK(entries_of(target) == std::set<std::string>{"old"});
}

TEST_CASE("peft writer: an empty folder keeps its permissions and its owner", "[io]") {
  const TemporaryFolder folder;
  const std::string target = folder.path() + "/private";
  fs::create_directory(target);
  ::chmod(target.c_str(), 0700);
  const bool is_given = ::chown(target.c_str(), 12345, 12346) == 0;  // only root can
  save_peft<float>(target, Layers<float>().list);
  struct stat status {};
  REQUIRE(::stat(target.c_str(), &status) == 0);
  CHECK((status.st_mode & 07777u) == 0700);
  CHECK(status.st_uid == (is_given ? 12345 : ::geteuid()));
  if (is_given) CHECK(status.st_gid == 12346);
}

TEST_CASE("peft writer: the current directory is not replaced under the process", "[io]") {
  const TemporaryFolder folder;
  const fs::path before = fs::current_path();
  const Layers<float> layers;
  PeftSaveOptions options;
  options.overwrite = true;
  fs::current_path(folder.path());
  const auto all_refused = [&] {
    for (const std::string& name : {std::string("."), folder.path(), folder.path() + "/none/.."}) {
      refused(Errc::state_error, {fs::path(folder.path()).filename(), "current directory"},
              [&] { save_peft<float>(name, layers.list, options); });
    }
  };
  all_refused();
  folder.write("card", "a card");
  all_refused();
  save_peft<float>("below", layers.list, options);
  save_peft<float>("below", layers.list, options);
  CHECK(fs::exists("below/adapter_config.json"));
  CHECK(entries_of(".") == std::set<std::string>{"below", "card"});
  fs::current_path(before);
}

TEST_CASE("peft writer: a folder may have the longest of names", "[io]") {
  const TemporaryFolder folder;
  const std::string name(255, 'n');
  const Layers<float> layers;
  PeftSaveOptions options;
  options.overwrite = true;
  for (int round = 0; round < 2; ++round) {
    save_peft<float>(folder.path() + "/" + name, layers.list, options);
    CHECK(entries_of(folder.path()) == std::set<std::string>{name});
  }
}

TEST_CASE("peft writer: a file that moves along overwrites no new one", "[io]") {
  const TemporaryFolder folder;
  const std::string target = folder.path() + "/kept";
  fs::create_directory(target);
  folder.write("kept/card", "old card");
  folder.write("kept/other", "other");
  {
    mole::io::NewFolder made(target, true);
    std::ofstream(made.path() + "/card") << "new card";
    refused(Errc::io_error, {"/kept: is written", made.path(), "File exists"},
            [&] { made.commit({}); });
    CHECK(text_of(made.path() + "/card") == "old card");
  }
  CHECK(text_of(target + "/card") == "new card");
  CHECK(text_of(target + "/other") == "other");
}

TEST_CASE("peft writer: a partial load is written as what it is", "[io]") {
  Adapter adapter;
  adapter.options.only = {"model.layers.0.self_attn.v_proj"};
  const PeftAdapter part = adapter.load();
  const TemporaryFolder folder;
  save_peft(folder.path() + "/part", part);
  adapter.options = {};
  const PeftAdapter read = mole::load_peft(folder.path() + "/part", adapter.base);
  REQUIRE(read.modules().size() == 1);
  CHECK(read.modules()[0].scale == part.modules()[0].scale);
  CHECK(read.report().missing.empty());
}
