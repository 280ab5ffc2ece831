// SPDX-License-Identifier: Apache-2.0
// Rows 57-74 and 78-82: adapter folders whose settings or tensors are wrong.
#include <unistd.h>

#include <cmath>

#include "bad_inputs/adapter_case.hpp"
#include "bad_inputs/rows.hpp"
#include "mole/io/peft_bank.hpp"

namespace test::bad_inputs {
namespace {

using mole::Index;
using mole::LoraModule;
using mole::PeftAdapter;
using mole::test::TemporaryFolder;

using Words = std::vector<std::string>;
using Edit = std::function<void(AdapterCase&)>;

/// The good adapter with one thing changed must be refused.
Case bad(std::string name, Errc code, Words words, const Edit& edit, Bounds bounds = {}) {
  return works(std::move(name), [=] {
    AdapterCase adapter;
    edit(adapter);
    const TemporaryFolder folder;
    adapter.write(folder);
    const auto size =
        static_cast<long>(adapter.config().size() + mole::test::container(adapter.tensors).size());
    check_refused({code, words, [&] { adapter.load(folder); }, nullptr, size, bounds});
  });
}
Case bad_setting(const std::string& field, const std::string& value, Errc code, Words words) {
  return bad(field + " = " + value, code, std::move(words),
             [=](AdapterCase& a) { a.set(field, value); });
}
Case bad_config(std::string name, Errc code, Words words, const std::string& text) {
  return works(std::move(name), [=] {
    const TemporaryFolder folder;
    AdapterCase().write(folder);
    folder.write("adapter_config.json", text);
    check_refused({code, words, [&] { mole::load_peft(folder.path()); }, nullptr, 0, {}});
  });
}

/// The good adapter with one thing changed must load; `check` looks at it.
Case good(std::string name, const Edit& edit,
          const std::function<void(const PeftAdapter&)>& check) {
  return works(std::move(name), [=] {
    AdapterCase adapter;
    edit(adapter);
    const TemporaryFolder folder;
    adapter.write(folder);
    check(adapter.load(folder));
  });
}
std::function<void(const PeftAdapter&)> has_scale(double scale) {
  return [scale](const PeftAdapter& loaded) {
    REQUIRE(loaded.modules().size() == 2);
    CHECK(loaded.at(kQ).scale == scale);
  };
}

void refuse_without_config() {
  const TemporaryFolder folder;
  AdapterCase().write(folder);
  REQUIRE(::unlink((folder.path() + "/adapter_config.json").c_str()) == 0);
  check_refused({Errc::config_error,
                 {"adapter_config.json", "not found"},
                 [&] { mole::load_peft(folder.path()); },
                 nullptr,
                 0,
                 {}});
}
void refuse_large_config() {
  const TemporaryFolder folder;
  AdapterCase().write(folder);
  const std::string path = folder.path() + "/adapter_config.json";
  REQUIRE(::truncate(path.c_str(), 1'000'000'000) == 0);
  check_refused({Errc::limit_exceeded,
                 {"1000000000", "1000000", "max_config_bytes"},
                 [&] { mole::load_peft(folder.path()); },
                 nullptr,
                 0,
                 {}});
}

std::vector<Row> config_rows() {
  const auto ce = Errc::config_error, fe = Errc::format_error, us = Errc::unsupported;
  const auto rank = [&](const char* value, Words words) {
    return bad_setting("r", value, Errc::config_error, std::move(words));
  };
  const auto alpha = [&](const char* value, Words words) {
    return bad_setting("lora_alpha", value, Errc::config_error, std::move(words));
  };
  const auto remove = [](const char* field) {
    return [field](AdapterCase& a) { a.set(field, ""); };
  };
  return {
      {57,
       "adapter_config.json is missing, empty, no JSON, 1 GB",
       {works("missing", refuse_without_config), bad_config("empty", fe, {"not JSON"}, ""),
        bad_config("no JSON", fe, {"not JSON", "byte 2"}, "{r:2}"),
        bad_config("a list", fe, {"object"}, "[]"),
        bad_config("a key twice", fe, {"\"r\" twice"}, R"({"r":2,"r":3})"),
        bad_config("deep", fe, {"deeper"}, std::string(100'000, '[')),
        works("1 GB", refuse_large_config)}},
      {58,
       "peft_type: missing, or a method that is not read",
       {bad("missing", ce, {"\"peft_type\" is missing"}, remove("peft_type")),
        bad_setting("peft_type", "\"LOHA\"", us, {"peft_type \"LOHA\""}),
        bad_setting("peft_type", "\"LORAX\"", us, {"peft_type \"LORAX\""}),
        bad_setting("peft_type", "7", us, {"peft_type 7"})}},
      {59,
       "r is no positive integer; a float with an integer's value counts as a float",
       {bad("missing", ce, {"\"r\" is missing", "peft_defaults"}, remove("r")),
        rank("0", {"\"r\" is 0", "at least 1"}), rank("-8", {"\"r\" is -8", "at least 1"}),
        rank("8.0", {"\"r\" is 8.0", "integer"}), rank("\"8\"", {"\"r\" is a string", "integer"}),
        rank("2147483648", {"2147483648", "at most"}),
        rank("18446744073709551616", {"\"r\"", "integer"}),
        bad_setting("r", "NaN", fe, {"NaN", "not JSON"})}},
      {60,
       "lora_alpha is missing: refused unless the caller gives one",
       {bad("", ce, {"\"lora_alpha\" is missing", "lora_alpha"}, remove("lora_alpha")),
        good(
            "given by the caller",
            [](AdapterCase& a) {
              a.set("lora_alpha", "");
              a.options.lora_alpha = 3.0;
            },
            has_scale(1.5)),
        bad("given as 0", Errc::invalid_argument, {"lora_alpha is 0"},
            [](AdapterCase& a) {
              a.set("lora_alpha", "");
              a.options.lora_alpha = 0.0;
            })}},
      {61,
       "lora_alpha 0 or negative (both would be mistakes: refused), beyond float, fractional",
       {alpha("0", {"\"lora_alpha\" is 0", "positive"}),
        alpha("-4", {"\"lora_alpha\" is -4", "positive"}), alpha("1e308", {"scale", "float"}),
        alpha("1e-300", {"scale", "float"}), alpha("\"4\"", {"\"lora_alpha\" is a string"}),
        good(
            "12.5", [](AdapterCase& a) { a.set("lora_alpha", "12.5"); }, has_scale(6.25))}},
      {62,
       "use_rslora: alpha / sqrt(r)",
       {good(
            "", [](AdapterCase& a) { a.set("use_rslora", "true"); },
            has_scale(4.0 / std::sqrt(2.0))),
        bad_setting("use_rslora", "1", ce, {"\"use_rslora\" is 1", "true or false"})}},
      {63,
       "settings that change the result and are not followed",
       {bad_setting("layer_replication", "[[0,1],[0,1]]", us, {"\"layer_replication\""}),
        bad_setting("megatron_config", "{\"a\":1}", us, {"\"megatron_config\""}),
        bad_setting("trainable_token_indices", "[1]", us, {"\"trainable_token_indices\""}),
        bad_setting("alora_invocation_tokens", "[1]", us, {"\"alora_invocation_tokens\""}),
        bad_setting("use_qalora", "true", us, {"\"use_qalora\""}),
        bad_setting("init_lora_weights", "\"loftq\"", us, {"\"loftq\"", "changes the base"}),
        bad_setting("use_something_new", "true", us, {"\"use_something_new\""}),
        bad_setting("fan_in_fan_out", "\"yes\"", ce, {"\"fan_in_fan_out\"", "true or false"})}},
  };
}

/// Every pattern against one long path: what a backtracking matcher would take hours for.
Case slow_pattern(const char* name, const std::string& pattern) {
  return works(name, [pattern] {
    AdapterCase adapter;
    adapter.set("target_modules", "\"" + pattern + "\"");
    adapter.base.push_back({std::string(4000, 'a') + "!", mole::ModuleKind::linear, 6, 6});
    const TemporaryFolder folder;
    adapter.write(folder);
    check_refused({Errc::config_error,
                   {"target_modules", "no module"},
                   [&] { adapter.load(folder); },
                   nullptr,
                   0,
                   {1000, 4'000'000}});
  });
}

std::vector<Row> pattern_rows() {
  const auto ce = Errc::config_error;
  const auto targets = [](const std::string& value, std::size_t modules) {
    return good(
        "target_modules = " + value,
        [value](AdapterCase& a) {
          a.set("target_modules", value);
          std::erase_if(a.base,
                        [](const mole::HostModule& m) { return m.path.ends_with("up_proj"); });
        },
        [modules](const PeftAdapter& loaded) { CHECK(loaded.modules().size() == modules); });
  };
  return {
      {64,
       "patterns of rank and alpha: without a module, or with several",
       {bad_setting("alpha_pattern", "{\"k_proj\":8}", ce, {"alpha_pattern \"k_proj\"", "no"}),
        bad_setting("rank_pattern", "{\"k_proj\":8}", ce, {"rank_pattern \"k_proj\"", "no"}),
        bad_setting("rank_pattern", "{\"q_proj(\":8}", ce, {"\"q_proj(\"", "regular expression"}),
        good(
            "the first in the file wins and is reported",
            [](AdapterCase& a) { a.set("alpha_pattern", "{\"layers.0.*\":1,\"q_proj\":3}"); },
            [](const PeftAdapter& loaded) {
              CHECK(loaded.at(kQ).scale == 0.5);
              CHECK(loaded.at(kQ).alpha_from == "alpha_pattern \"layers.0.*\"");
            })}},
      {65,
       "patterns that make other matchers slow, on a path of 4000 characters",
       {slow_pattern("nested stars", "(a*)*b"), slow_pattern("nested plus", "(a+)+$b"),
        slow_pattern("alternatives", "(a|aa|aaa)*b"), slow_pattern("counted", "(a{1,30}){1,30}b"),
        bad_setting("target_modules", "\"((a{1,1000}){1,1000}){1,1000}\"", Errc::unsupported,
                    {"target_modules"})}},
      {66,
       "target_modules: a pattern, a list, all-linear, null, what names nothing",
       {targets("\".*_proj\"", 2), targets("[\"q_proj\",\"self_attn.v_proj\"]", 2),
        targets("\"all-linear\"", 2), bad_setting("target_modules", "null", ce, {"missing"}),
        bad_setting("target_modules", "7", ce, {"\"target_modules\" is 7"}),
        bad_setting("target_modules", "[7]", ce, {"\"target_modules\" holds 7"}),
        bad_setting("target_modules", "[\"k_proj\"]", ce, {"target_modules", "no module"}),
        bad_setting("target_modules", "\"*.q_proj\"", ce, {"\"*.q_proj\"", "regular"})}},
  };
}

std::vector<Row> shape_rows() {
  const auto ce = Errc::config_error, sm = Errc::shape_mismatch;
  const auto shape = [](std::size_t tensor, std::string text) {
    return [=](AdapterCase& a) { a.tensors[tensor].shape = text; };
  };
  return {
      {67,
       "the rank of the shapes is not that of the settings",
       {bad_setting("r", "5", sm, {kQ, "rank 2", "config says 5"}),
        bad_setting("rank_pattern", "{\"v_proj\":3}", sm, {kV, "rank 2", "rank_pattern says 3"})}},
      {68,
       "A without B, B without A",
       {bad("B", ce, {up_name(kQ) + "\" is missing", down_name(kQ)},
            [](AdapterCase& a) { a.tensors.erase(a.tensors.begin() + 1); }),
        bad("A", ce, {down_name(kQ) + "\" is missing", up_name(kQ)},
            [](AdapterCase& a) { a.tensors.erase(a.tensors.begin()); })}},
      {69,
       "A is transposed",
       {bad("", sm, {down_name(kQ), "[6, 2]", "[2, 6]", "transposed"}, shape(0, "[6,2]"))}},
      {70,
       "a square A, where transposition cannot be seen: read as [rank, d_in]",
       {good(
           "",
           [](AdapterCase& a) {
             a.set("r", "6");
             a.tensors = {{down_name(kQ), "F32", "[6,6]", floats(36)},
                          {up_name(kQ), "F32", "[6,6]", floats(36)}};
             a.set("target_modules", "[\"q_proj\"]");
           },
           [](const PeftAdapter& loaded) {
             std::vector<float> down(36);
             loaded.read_down(loaded.at(kQ), mole::MatView<float>(down.data(), 6, 6));
             CHECK(down[1] == 0.5f);
           })}},
      {71,
       "A and B have different ranks",
       {bad("", sm, {up_name(kQ), "rank 3", "rank 2"},
            [](AdapterCase& a) {
              a.tensors[1].shape = "[6,3]";
              a.tensors[1].bytes = floats(18);
            })}},
      {72,
       "the base layer has other widths",
       {bad("d_in", sm, {down_name(kQ), "width 6", "d_in 7"},
            [](AdapterCase& a) { a.base[1].d_in = 7; }),
        bad("d_out", sm, {up_name(kV), "height 4", "d_out 5"},
            [](AdapterCase& a) { a.base[2].d_out = 5; }),
        bad("three dimensions", sm, {down_name(kQ), "3 dimensions"}, shape(0, "[2,3,2]"))}},
      {73,
       "A and B are stored in different types",
       {good(
           "",
           [](AdapterCase& a) {
             a.tensors[0].dtype = "BF16";
             a.tensors[0].bytes = mole::test::raw(std::vector<std::uint16_t>(12, 0x3fc0));  // 1.5
           },
           [](const PeftAdapter& loaded) {
             const LoraModule& q = loaded.at(kQ);
             CHECK(q.stored_down == mole::Dtype::bf16);
             CHECK(q.stored_up == mole::Dtype::f32);
             std::vector<float> down(12), up(12);
             loaded.read_down(q, mole::MatView<float>(down.data(), 2, 6));
             loaded.read_up(q, mole::MatView<float>(up.data(), 6, 2));
             CHECK(down == std::vector<float>(12, 1.5f));
             CHECK(up[11] == 3.0f);
           })}},
  };
}

/// Experts of rank 2 and 3 in one bank: every weight arrives at its place.
void keep_ragged_ranks() {
  AdapterCase two, three;
  three.set("r", "3");
  three.tensors = {{down_name(kQ), "F32", "[3,6]", floats(18)},
                   {up_name(kQ), "F32", "[6,3]", floats(18)}};
  three.set("target_modules", "[\"q_proj\"]");
  const TemporaryFolder first, second;
  two.write(first);
  three.write(second);
  const std::vector<PeftAdapter> adapters = {two.load(first), three.load(second)};
  const mole::AdapterBank<float> bank(adapters, kQ);
  CHECK(bank.bank().config().rank == std::vector<Index>{2, 3});
  for (Index e = 0; e < 2; ++e) {
    const auto down = bank.weights().down_of(e), up = bank.weights().up_of(e);
    CHECK(down.rows == 2 + e);
    CHECK(down(down.rows - 1, 5) == 0.25f * static_cast<float>(down.size()));
    CHECK(up(5, up.cols - 1) == 0.25f * static_cast<float>(up.size()));
  }
  const mole::AdapterBank<float> other(adapters, kV);  // the second adapter does not touch it
  CHECK(other.bank().config().rank == std::vector<Index>{2, 0});
  check_refused({Errc::not_found,
                 {"model.layers.0.mlp.up_proj"},
                 [&] { mole::AdapterBank<float>(adapters, "model.layers.0.mlp.up_proj"); },
                 nullptr,
                 0,
                 {}});
}

/// CPU time of loading an adapter with `modules` modules.
double time_to_load(int modules) {
  AdapterCase adapter;
  adapter.tensors.clear();
  adapter.base.clear();
  for (int i = 0; i < modules; ++i) {
    const std::string path = "model.layers." + std::to_string(i) + ".self_attn.q_proj";
    adapter.tensors.push_back({down_name(path), "F32", "[2,1]", floats(2)});
    adapter.tensors.push_back({up_name(path), "F32", "[1,2]", floats(2)});
    adapter.base.push_back({path, mole::ModuleKind::linear, 1, 1});
  }
  const TemporaryFolder folder;
  adapter.write(folder);
  const double start = milliseconds_now();
  const PeftAdapter loaded = adapter.load(folder);
  const double taken = milliseconds_now() - start;
  CHECK(loaded.modules().size() == static_cast<std::size_t>(modules));
  return taken;
}

std::vector<Row> whole_rows() {
  const auto ce = Errc::config_error;
  const auto extra = [](AdapterCase& a) {
    a.tensors.push_back({"base_model.model." + kQ + ".lora_C.weight", "F32", "[1]", floats(1)});
  };
  const auto rename = [](const std::string& from, const std::string& to) {
    return [=](AdapterCase& a) {
      for (auto& tensor : a.tensors) tensor.name.replace(0, from.size(), to);
    };
  };
  return {
      {74, "experts of different ranks", {works("", keep_ragged_ranks)}},
      {78,
       "tensors that nobody uses",
       {bad("refused", ce, {"unused", "lora_C.weight"}, extra),
        good(
            "reported on request",
            [extra](AdapterCase& a) {
              extra(a);
              a.options.allow_partial = true;
            },
            [](const PeftAdapter& loaded) {
              REQUIRE(loaded.report().unused.size() == 1);
              CHECK(loaded.report().unused[0].ends_with("lora_C.weight"));
              CHECK(loaded.modules().size() == 2);
            })}},
      {79,
       "no name matches",
       {bad("without the prefix", ce, {"0 of 2", "base_model.model."},
            rename("base_model.model.", "")),
        bad("the prefix twice", ce, {"base_model.model.base_model.model.model"},
            rename("", "base_model.model.")),
        bad("a module that the base model lacks", ce, {"layers.7", "no module"},
            [](AdapterCase& a) {
              const std::string path = "model.layers.7.self_attn.q_proj";
              a.tensors.push_back({down_name(path), "F32", "[2,6]", floats(12)});
              a.tensors.push_back({up_name(path), "F32", "[6,2]", floats(12)});
            }),
        bad("a module without tensors", ce, {kV, "no tensors"},
            [](AdapterCase& a) { a.tensors.resize(2); })}},
      {80,
       "one module through two prefixes",
       {bad("", ce, {"unused", kQ},
            [](AdapterCase& a) {
              a.tensors.push_back({kQ + ".lora_A.weight", "F32", "[2,6]", floats(12)});
              a.tensors.push_back({kQ + ".lora_B.weight", "F32", "[6,2]", floats(12)});
            })}},
      {81,
       "an adapter of another base model: names are remarks, shapes decide",
       {good(
            "the same shapes",
            [](AdapterCase& a) { a.set("base_model_name_or_path", "\"somebody/else\""); },
            has_scale(2.0)),
        bad("other shapes", Errc::shape_mismatch, {kQ, "width 6", "d_in 8"},
            [](AdapterCase& a) {
              a.set("base_model_name_or_path", "\"somebody/else\"");
              a.base[1].d_in = 8;
              a.base[2].d_in = 8;
            })}},
      {82,
       "many tensors: limited by an option, and linear in time",
       {bad("limit", Errc::limit_exceeded, {"3 header entries", "max_entries"},
            [](AdapterCase& a) { a.options.limits.max_entries = 3; }),
        works("linear",
              [] {
                time_to_load(500);  // warm
                const double few = time_to_load(2000), many = time_to_load(16'000);
                INFO(few << " ms, 8 times as many: " << many << " ms");
                CHECK(many < 8 * 4 * few);
              })}},
  };
}

}  // namespace

std::vector<Row> adapter_rows() {
  std::vector<Row> all;
  for (const auto& part : {config_rows(), pattern_rows(), shape_rows(), whole_rows()}) {
    all.insert(all.end(), part.begin(), part.end());
  }
  return all;
}

TEST_CASE("bad inputs: adapters", "[bad_inputs][io]") {
  run(adapter_rows());
}

}  // namespace test::bad_inputs
