// SPDX-License-Identifier: Apache-2.0
// Runs the program mole_inspect and looks at its output and exit status.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "io/file_builder.hpp"
#include "mole/io/mixture_file.hpp"
#include "mole/layers/kinds.hpp"
#include "support/catch.hpp"

using Catch::Matchers::ContainsSubstring;
using mole::test::TemporaryFolder;
using nlohmann::json;

namespace {

const std::string kAdapters = MOLE_TEST_DATA "/../examples/data/adapters/";
const std::string kBad = MOLE_TEST_DATA "/golden/cases/peft_adapters/bad/";

std::string text_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

struct Run {
  int status = -1;
  std::string out, err;
};

/// Runs the program by the shell; `redirection` replaces that of its output.
Run inspect(const std::string& arguments, const std::string& redirection = "") {
  const TemporaryFolder folder;
  const std::string out = folder.path() + "/out", err = folder.path() + "/err";
  const std::string command = MOLE_TEST_PROGRAMS "/mole_inspect " + arguments + " " +
                              (redirection.empty() ? ">" + out : redirection) + " 2>" + err;
  const int status = std::system(command.c_str());  // NOLINT(cert-env33-c): what is tested
  return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, text_of(out), text_of(err)};
}

/// One complaint, and nothing like a trace.
bool is_one_line(const std::string& text) {
  return text.starts_with("mole_inspect: ") && std::count(text.begin(), text.end(), '\n') == 1 &&
         text.ends_with('\n');
}

bool is_harmless(const std::string& text) {
  return std::all_of(text.begin(), text.end(),
                     [](char c) { return c == '\n' || (c >= 0x20 && c <= 0x7e); });
}

/// A file with a mixture of two experts, whose router selects `k` if the file is patched.
std::string mixture_file(const std::string& name) {
  using Layer = mole::Mixture<mole::TopKRouter<float>, mole::LoraBank<float, mole::bf16>>;
  const Layer layer(
      mole::TopKRouter<float>({.width = 3, .experts = 2, .k = 1}),
      mole::LoraBank<float, mole::bf16>({.in = 3, .out = 5, .rank = {2, 1}, .scale = {2, 0.5f}}));
  const mole::OwnedWeights<Layer> weights(layer);
  mole::params::zero(weights.params());
  mole::MixtureFileWriter writer;
  writer.add(name, layer, weights.params());
  writer.add("z", layer, weights.params());
  const auto bytes = writer.bytes();
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

}  // namespace

TEST_CASE("mole_inspect shows ranks and scales of the example adapters") {
  const Run run = inspect(kAdapters + "german " + kAdapters + "kjv " + kAdapters + "python " +
                          kAdapters + "cpp");
  CHECK(run.status == 0);
  CHECK(run.err.empty());
  const char* const summaries[] = {
      "\n90 modules: rank 8 (r), alpha 16 (lora_alpha), scale 2\nsound\n",
      "\n90 modules: rank 4 (r), alpha 8 (lora_alpha), scale 4\nsound\n",
      R"(
30 modules: rank 16 (rank_pattern "down_proj"), alpha 32 (alpha_pattern "down_proj"), scale 2
60 modules: rank 8 (r), alpha 8 (lora_alpha), scale 1
sound
)",
      "\n60 modules: rank 4 (r), alpha 8 (lora_alpha), scale 2\nsound\n"};
  std::size_t place = 0;
  for (const char* summary : summaries) {
    INFO(summary);
    place = run.out.find(summary, place);
    REQUIRE(place != std::string::npos);
  }
  CHECK_THAT(run.out, ContainsSubstring("  model.layers.20.mlp.down_proj: rank 4 (r), alpha 8 "
                                        "(lora_alpha), scale 4, 1536 -> 576, BF16/BF16\n"));
}

TEST_CASE("mole_inspect --json says it to programs") {
  const Run run = inspect("--json " + kAdapters + "german " + kAdapters + "kjv " + kAdapters +
                          "python " + kAdapters + "cpp");
  CHECK(run.status == 0);
  const json documents = json::parse(run.out);
  REQUIRE(documents.size() == 4);
  std::string ranks;
  for (const json& document : documents) {
    CHECK(document.at("sound") == true);
    CHECK(document.at("kind") == "peft");
    std::vector<std::string> found;
    for (const json& module : document.at("report").at("applied")) {
      found.push_back(module.at("rank").dump() + " -> " + module.at("scale").dump());
    }
    std::sort(found.begin(), found.end());
    found.erase(std::unique(found.begin(), found.end()), found.end());
    for (const std::string& one : found) ranks += one + ", ";
    ranks += "\n";
  }
  CHECK(ranks == "8 -> 2.0, \n4 -> 4.0, \n16 -> 2.0, 8 -> 1.0, \n4 -> 2.0, \n");
}

TEST_CASE("mole_inspect shows mixtures and names the unsound one") {
  const TemporaryFolder folder;
  std::string bytes = mixture_file("a.b");
  const std::string good = folder.write("good.safetensors", bytes);
  Run run = inspect(good);
  CHECK(run.status == 0);
  CHECK_THAT(run.out, ContainsSubstring("mixture \"a.b\": 5 tensors, 72 bytes\n  mixture\n"
                                        "    router: top_k: width 3, experts 2, k 1,"));
  CHECK_THAT(run.out, ContainsSubstring("    experts: lora_bank: in 3, out 5, rank [2,1], "
                                        "scale [2.0,0.5],"));
  CHECK_THAT(run.out, ContainsSubstring("a.b.experts.0.down BF16 [2, 3] 12 bytes"));
  CHECK_THAT(run.out, ContainsSubstring("metadata mole.format: 1\n"));

  const std::string k = R"(\"k\":1)";
  bytes.replace(bytes.find(k), k.size(), R"(\"k\":3)");
  const std::string bad = folder.write("bad.safetensors", bytes);
  run = inspect("--json " + good + " " + bad);
  CHECK(run.status == 1);
  CHECK(is_one_line(run.err));
  CHECK_THAT(run.err, ContainsSubstring("mixture \"a.b\""));
  const json documents = json::parse(run.out);
  CHECK(documents[0]["sound"] == true);
  CHECK(documents[0]["format"] == 1);
  CHECK(documents[0]["mixtures"][0]["layer"]["router"]["k"] == 1);
  CHECK(documents[1]["sound"] == false);
  CHECK(documents[1]["mixtures"][0]["sound"] == false);
  CHECK(documents[1]["mixtures"][0]["error"]["category"] == "config_error");
  CHECK(documents[1]["mixtures"][1]["sound"] == true);
  CHECK_THAT(inspect(bad).out, ContainsSubstring("\n  unsound: "));

  const std::string kind = R"(\"kind\":\"top_k\")";
  bytes.replace(bytes.find(kind), kind.size(), R"(\"kind\":\"top_z\")");
  run = inspect(folder.write("own.safetensors", bytes));
  CHECK(run.status == 1);
  CHECK_THAT(run.out, ContainsSubstring("\n  cannot be judged: "));
}

TEST_CASE("mole_inspect lists the tensors and metadata of any safetensors file") {
  const Run run = inspect(MOLE_TEST_DATA "/../examples/data/layer.safetensors");
  CHECK(run.status == 0);
  CHECK_THAT(run.out, ContainsSubstring("metadata case: "));
  CHECK_THAT(run.out, ContainsSubstring("\n  in.x F16 [64, 1536] 196608 bytes\n"));
}

TEST_CASE("mole_inspect says in one line why something is unsound, and goes on") {
  const TemporaryFolder folder;
  const std::string truncated =
      folder.write("t.safetensors", mole::test::container("{}", "").substr(0, 9));
  Run run = inspect(truncated + " " + kAdapters + "cpp");
  CHECK(run.status == 1);
  CHECK(is_one_line(run.err));
  CHECK_THAT(run.err, ContainsSubstring("t.safetensors"));
  CHECK_THAT(run.out, ContainsSubstring("scale 2"));
  run = inspect(folder.path() + "/missing");
  CHECK(run.status == 1);
  CHECK(is_one_line(run.err));
  run = inspect("--json " + folder.path());
  CHECK(run.status == 1);
  CHECK(is_one_line(run.err));
  CHECK_THAT(run.err, ContainsSubstring("is a folder without adapter_config.json"));
  CHECK(json::parse(run.out)[0]["error"]["category"] == "not_found");
}

TEST_CASE("mole_inspect refuses wrong use in one line") {
  const TemporaryFolder folder;
  const std::string broken = folder.write("m.json", "{\"a\": 3}");
  for (const std::string& arguments :
       {std::string(), std::string("--json"), std::string("--jsno x"), std::string("x --modules"),
        "--modules " + folder.path() + "/missing x", "--modules " + broken + " x"}) {
    INFO(arguments);
    const Run run = inspect(arguments);
    CHECK(run.status == 2);
    CHECK(is_one_line(run.err));
    CHECK(run.out.empty());
  }
  CHECK_THAT(inspect("--jsno x").err, ContainsSubstring("unknown option \"--jsno\""));
}

TEST_CASE("mole_inspect helps") {
  for (const char* arguments : {"--help", "-h", "x --help"}) {
    const Run run = inspect(arguments);
    CHECK(run.status == 0);
    CHECK(run.out.starts_with("Usage: mole_inspect"));
  }
  CHECK(inspect("--version").out == "mole " MOLE_TEST_VERSION "\n");
  CHECK_THAT(inspect("-- --help").err, ContainsSubstring("--help: stat failed"));
}

TEST_CASE("mole_inspect notices that nobody gets its output") {
  for (const char* arguments : {"--help", "--json ", ""}) {
    const std::string all = arguments + (" " + kAdapters) + "cpp";
    INFO(all);
    Run run = inspect(all, ">&-");
    CHECK(run.status == 3);
    CHECK(is_one_line(run.err));
    run = inspect(all, ">/dev/full");
    CHECK(run.status == 3);
    CHECK(is_one_line(run.err));

    int ends[2] = {};
    REQUIRE(::pipe(ends) == 0);
    ::close(ends[0]);
    constexpr int kOneDigit = 9;  // all that the shell can name
    const int kept = ::dup(kOneDigit);
    REQUIRE(::dup2(ends[1], kOneDigit) == kOneDigit);
    run = inspect(all, ">&9");
    ::close(ends[1]);
    ::close(kOneDigit);
    if (kept >= 0) {
      ::dup2(kept, kOneDigit);
      ::close(kept);
    }
    CHECK(run.status == 3);
    CHECK(is_one_line(run.err));
  }
}

TEST_CASE("mole_inspect writes no byte that steers a terminal") {
  const TemporaryFolder folder;
  const std::string name = "a\\u001b[31m\\u009b\xc2\x9b\xc3\xa9";
  const std::string file = folder.write(
      "n.safetensors", mole::test::container({{name, "F32", "[1]", std::string(4, '\0')}}));
  const std::string mixture = folder.write("m.safetensors", mixture_file("a\x1b[1m\xc2\x9b"));
  for (const char* option : {"", "--json "}) {
    const Run run = inspect(option + file + " " + mixture + " '\x1b[2J'");
    CHECK(run.status == 1);
    CHECK(is_harmless(run.out));
    CHECK(is_harmless(run.err));
    CHECK(is_one_line(run.err));
  }
  CHECK_THAT(inspect(file).out, ContainsSubstring("a\\x1b[31m"));
}

TEST_CASE("mole_inspect refuses every bad adapter and accepts the good twin") {
  int folders = 0;
  for (const auto& entry : std::filesystem::directory_iterator(kBad)) {
    if (!entry.is_directory()) continue;
    ++folders;
    const std::string folder = entry.path().filename().string();
    INFO(folder);
    const Run run = inspect("--modules " + kBad + "BASE.json " + entry.path().string());
    CHECK(is_harmless(run.out));
    CHECK(run.status == (folder == "control_good" ? 0 : 1));
    if (run.status == 1) CHECK(is_one_line(run.err));
  }
  CHECK(folders > 60);
}
