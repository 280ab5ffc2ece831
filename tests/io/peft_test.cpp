// SPDX-License-Identifier: Apache-2.0
#include "mole/io/peft.hpp"

#include <cmath>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>

#include "io/peft_fixture.hpp"
#include "support/catch.hpp"

namespace {

using Json = nlohmann::ordered_json;
using mole::Errc;
using mole::HostModule;
using mole::Index;
using mole::load_peft;
using mole::LoraModule;
using mole::MatView;
using mole::ModuleKind;
using mole::PeftAdapter;
using mole::PeftOptions;
using mole::test::Adapter;
using mole::test::container;
using mole::test::kQ;
using mole::test::raw;
using mole::test::refused;
using mole::test::TemporaryFolder;
using mole::test::TestTensor;

const std::string kData = MOLE_TEST_DATA;

PeftAdapter real_adapter(const std::string& name) {
  return load_peft(kData + "/../examples/data/adapters/" + name);
}

}  // namespace

TEST_CASE("peft: the trained adapters load with their ranks and scales", "[io]") {
  struct Expected {
    const char* name;
    Index modules, rank, down_rank;
    double scale, down_scale;
    mole::Dtype dtype;
  };
  const Expected expected[] = {
      {"german", 90, 8, 8, 2.0, 2.0, mole::Dtype::f16},
      {"kjv", 90, 4, 4, 4.0, 4.0, mole::Dtype::bf16},
      {"python", 90, 8, 16, 1.0, 2.0, mole::Dtype::f16},
      {"cpp", 60, 4, 4, 2.0, 2.0, mole::Dtype::f32},
  };
  for (const Expected& e : expected) {
    INFO(e.name);
    const PeftAdapter adapter = real_adapter(e.name);
    CHECK(static_cast<Index>(adapter.modules().size()) == e.modules);
    for (const LoraModule& module : adapter.modules()) {
      INFO(module.path);
      const bool down = module.path.ends_with("mlp.down_proj");
      CHECK(module.rank == (down ? e.down_rank : e.rank));
      CHECK(module.scale == (down ? e.down_scale : e.scale));
      CHECK(module.d_in == (down ? 1536 : 576));
      CHECK(module.d_out == (module.path.ends_with("v_proj") ? 192 : 576));
      CHECK(module.stored_down == e.dtype);
      CHECK(module.stored_up == e.dtype);
    }
  }
  CHECK(real_adapter("python").at("model.layers.3.mlp.down_proj").rank_from ==
        "rank_pattern \"down_proj\"");
  const PeftAdapter cpp = real_adapter("cpp");
  CHECK(cpp.find("model.layers.0.self_attn.v_proj") == nullptr);
  CHECK(cpp.find("model.layers.0.self_attn.q_proj") != nullptr);
}

TEST_CASE("peft: weights are copied into the caller's views", "[io]") {
  const PeftAdapter adapter = real_adapter("kjv");
  const LoraModule& module = adapter.at("model.layers.20.mlp.down_proj");
  const Index stride = module.d_in + 3;
  std::vector<float> memory(static_cast<std::size_t>(module.rank * stride), -1.0f);
  std::vector<double> up(static_cast<std::size_t>(module.d_out * module.rank));
  adapter.read_down(module, MatView<float>(memory.data(), module.rank, module.d_in, stride));
  adapter.read_up(module, MatView<double>(up.data(), module.d_out, module.rank));

  // The file is BF16: a stored element is the upper half of the float.
  const auto stored = adapter.file().view<mole::bf16>(module.down_tensor);
  const auto stored_up = adapter.file().view<mole::bf16>(module.up_tensor);
  int wrong = 0;
  for (Index r = 0; r < module.rank; ++r) {
    for (Index i = 0; i < module.d_in; ++i) {
      const auto bits =
          std::bit_cast<std::uint32_t>(memory[static_cast<std::size_t>(r * stride + i)]);
      wrong += bits == std::uint32_t{stored(r, i).bits} << 16 ? 0 : 1;
    }
    for (Index o = 0; o < module.d_out; ++o) {
      wrong += up[static_cast<std::size_t>(o * module.rank + r)] ==
                       static_cast<double>(static_cast<float>(stored_up(o, r)))
                   ? 0
                   : 1;
    }
    CHECK(memory[static_cast<std::size_t>(r * stride + module.d_in)] == -1.0f);
  }
  CHECK(wrong == 0);
  CHECK_THROWS_AS(adapter.read_up(module, MatView<double>(up.data(), module.rank, module.d_out)),
                  mole::Error);
}

namespace {

// Changes one thing in the good adapter.
template <class F>
void change(Errc code, const std::vector<std::string>& words, F edit) {
  Adapter adapter;
  edit(adapter);
  refused(code, words, [&] { adapter.load(); });
}

void setting(const std::string& field, const Json& value, Errc code,
             const std::vector<std::string>& words) {
  INFO(field << " = " << value.dump());
  change(code, words, [&](Adapter& a) { a.config[field] = value; });
}

void config_text(const std::string& text, Errc code, const std::vector<std::string>& words) {
  INFO(text);
  const TemporaryFolder folder;
  Adapter().write(folder);
  folder.write("adapter_config.json", text);
  refused(code, words, [&] { load_peft(folder.path()); });
}

}  // namespace

TEST_CASE("peft: a good adapter loads, and the report says how", "[io]") {
  Adapter adapter;
  adapter.config["alpha_pattern"] = Json::parse(R"({"v_proj":3,"layers.0.*":1})");
  adapter.config["author"] = "somebody";
  const PeftAdapter loaded = adapter.load();
  REQUIRE(loaded.modules().size() == 2);
  const LoraModule& q = loaded.at("model.layers.0.self_attn.q_proj");
  CHECK(q.scale == 0.5);
  CHECK(q.rank_from == "r");
  CHECK(q.alpha_from == "alpha_pattern \"layers.0.*\"");
  const LoraModule& v = loaded.at("model.layers.0.self_attn.v_proj");
  CHECK(v.scale == 1.5);
  CHECK(v.alpha_from == "alpha_pattern \"v_proj\"");
  CHECK(loaded.report().checks_off.empty());
  CHECK(loaded.report().unknown_fields == std::vector<std::string>{"author"});
  const std::string text = loaded.report().to_text();
  CHECK(
      text.find("model.layers.0.self_attn.v_proj: rank 2 (r), alpha 3 (alpha_pattern \"v_proj\"), "
                "scale 1.5, 6 -> 4, F32/F32\n") != std::string::npos);
  CHECK(text.find("unused tensors: none\n") != std::string::npos);
  CHECK(text.find("author") != std::string::npos);

  const PeftAdapter alone = adapter.load_without_base();
  CHECK(alone.modules().size() == 2);
  CHECK(alone.report().checks_off.size() == 4);
  refused(Errc::not_found, {"\"model.layers.0.self_attn.k_proj\"", "nearest", "q_proj", "v_proj"},
          [&] { loaded.at("model.layers.0.self_attn.k_proj"); });
}

TEST_CASE("peft: settings that are not followed are refused by name", "[io]") {
  const std::vector<std::pair<std::string, Json>> settings = {
      {"use_dora", true},
      {"trainable_token_indices", {1, 2}},
      {"layer_replication", Json::parse("[[0,1],[0,1]]")},
      {"target_parameters", {"experts.w"}},
      {"use_qalora", true},
      {"use_bdlora", Json::parse("{\"blocks\":2}")},
      {"arrow_config", Json::parse("{\"top_k\":2}")},
      {"alora_invocation_tokens", {1}},
      {"kasa_config", Json::parse("{\"a\":1}")},
      {"monteclora_config", Json::parse("{\"a\":1}")},
      {"velora_config", Json::parse("{\"a\":1}")},
      {"megatron_config", Json::parse("{\"a\":1}")},
      {"use_something_new", true},
      {"something_new_config", Json::parse("{\"a\":1}")},
  };
  for (const auto& [field, value] : settings) {
    setting(field, value, Errc::unsupported, {"adapter_config.json", "\"" + field + "\""});
  }
  for (const char* method : {"corda", "loftq", "lora_ga", "x"}) {
    setting("init_lora_weights", method, Errc::unsupported,
            {"\"init_lora_weights\"", mole::test::enclosed("\"", method, "\""),
             "changes the base weights"});
  }
  setting("peft_type", "LOHA", Errc::unsupported, {"peft_type \"LOHA\""});
  setting("peft_type", nullptr, Errc::config_error, {"\"peft_type\" is missing"});
}

TEST_CASE("peft: settings at their defaults and remarks are accepted", "[io]") {
  Adapter adapter;
  for (const char* field : {"use_dora", "lora_bias", "use_qalora"}) adapter.config[field] = false;
  for (const char* field : {"modules_to_save", "layer_replication", "arrow_config", "use_bdlora",
                            "megatron_config", "rank_pattern", "layers_pattern", "use_new"}) {
    adapter.config[field] = nullptr;
  }
  adapter.config["bias"] = "none";
  adapter.config["init_lora_weights"] = "gaussian";
  adapter.config["loftq_config"] = Json::object();
  adapter.config["task_type"] = "CAUSAL_LM";
  adapter.config["lora_dropout"] = 0.1;
  CHECK(adapter.load().modules().size() == 2);
  CHECK(adapter.load().report().unknown_fields.empty());
}

TEST_CASE("peft: wrong settings are config errors", "[io]") {
  setting("r", 2.0, Errc::config_error, {"\"r\" is 2.0", "integer"});
  setting("r", "2", Errc::config_error, {"\"r\" is a string", "integer"});
  setting("r", 0, Errc::config_error, {"\"r\" is 0", "at least 1"});
  setting("r", -8, Errc::config_error, {"\"r\" is -8", "at least 1"});
  setting("r", 2147483648u, Errc::config_error, {"2147483648", "at most"});
  setting("r", 18446744073709551615u, Errc::config_error, {"18446744073709551615"});
  setting("r", true, Errc::config_error, {"\"r\" is true"});
  setting("r", nullptr, Errc::config_error, {"\"r\" is missing", "peft_defaults"});
  setting("lora_alpha", nullptr, Errc::config_error,
          {"\"lora_alpha\" is missing", "peft_defaults"});
  setting("lora_alpha", "4", Errc::config_error, {"\"lora_alpha\" is a string", "number"});
  setting("lora_alpha", 0, Errc::config_error, {"\"lora_alpha\" is 0", "positive"});
  setting("lora_alpha", -4, Errc::config_error, {"\"lora_alpha\" is -4", "positive"});
  setting("lora_alpha", 1e308, Errc::config_error, {"scale", "5e+307"});
  setting("lora_alpha", 1e-60, Errc::config_error, {"scale", "5e-61"});
  setting("bias", "some", Errc::config_error, {"\"bias\" is \"some\"", "lora_only"});
  setting("lora_bias", 1, Errc::config_error, {"\"lora_bias\" is 1"});
  setting("modules_to_save", 1, Errc::config_error, {"\"modules_to_save\" is 1"});
  setting("init_lora_weights", 1, Errc::config_error, {"\"init_lora_weights\" is 1"});
  setting("use_rslora", 1, Errc::config_error, {"\"use_rslora\" is 1"});
  setting("rank_pattern", {{"q_proj", 2.5}}, Errc::config_error,
          {"rank_pattern \"q_proj\" is 2.5"});
  setting("rank_pattern", {"q_proj"}, Errc::config_error, {"\"rank_pattern\" is a list"});
  setting("rank_pattern", {{"q_proj(", 2}}, Errc::config_error,
          {"rank_pattern \"q_proj(\" is not a valid regular expression"});
  setting("alpha_pattern", {{"q_proj", 0}}, Errc::config_error, {"alpha_pattern \"q_proj\" is 0"});
  setting("alpha_pattern", {{"k_proj", 1}}, Errc::config_error,
          {"alpha_pattern \"k_proj\" matches no target module"});
  setting("alpha_pattern", {{"(?=q)", 1}}, Errc::unsupported, {"alpha_pattern \"(?=q)\""});
  setting("target_modules", nullptr, Errc::config_error, {"\"target_modules\" is missing"});
  setting("target_modules", 3, Errc::config_error, {"\"target_modules\" is 3"});
  setting("target_modules", {1}, Errc::config_error, {"\"target_modules\" holds 1"});
  setting("target_modules", "*.q_proj", Errc::config_error,
          {"target_modules \"*.q_proj\" is not a valid regular expression"});
  setting("target_modules", {"query"}, Errc::config_error, {"matches no module of the base model"});
  setting("target_modules", {"q_proj"}, Errc::config_error,
          {"tensors for \"model.layers.0.self_attn.v_proj\"", "target_modules does not name"});
  setting("target_modules", {"q_proj", "v_proj", "up_proj"}, Errc::config_error,
          {"target module \"model.layers.0.mlp.up_proj\" has no tensors"});
  setting("layers_to_transform", "0", Errc::config_error,
          {"\"layers_to_transform\" holds a string"});
}

TEST_CASE("peft: files that are no configuration are format errors", "[io]") {
  config_text("", Errc::format_error, {"adapter_config.json", "not JSON"});
  config_text("{\"r\": 2,}", Errc::format_error, {"not JSON", "byte 9"});
  config_text("[1]", Errc::format_error, {"must hold an object"});
  config_text("{\"lora_alpha\": NaN}", Errc::format_error, {"NaN", "not JSON"});
  config_text("{\"lora_alpha\": -Infinity}", Errc::format_error, {"Infinity", "not JSON"});
  config_text("{\"r\":2,\"r\":4}", Errc::format_error, {"key \"r\" twice"});
  config_text("{\"r\":2,\"\\u0072\":4}", Errc::format_error, {"key \"r\" twice"});
  config_text("{\"rank_pattern\":{\"a\":1,\"a\":2}}", Errc::format_error, {"key \"a\" twice"});
  config_text("{\"a\":\"\xff\"}", Errc::format_error, {"UTF-8", "byte 6"});
  config_text(std::string("{}\0", 3), Errc::format_error, {"NUL", "byte 2"});
  config_text("{\"a\":" + std::string(100000, '['), Errc::format_error, {"nested deeper"});
  config_text("\xef\xbb\xbf{}", Errc::format_error, {"must hold an object"});
}

TEST_CASE("peft: missing settings can come from the options", "[io]") {
  Adapter adapter;
  adapter.config.erase("lora_alpha");
  adapter.options.lora_alpha = 3;
  CHECK(adapter.load().modules()[0].scale == 1.5);
  CHECK(adapter.load().modules()[0].alpha_from == "option lora_alpha");
  adapter.options.lora_alpha = std::nullopt;
  adapter.options.peft_defaults = true;
  CHECK(adapter.load().modules()[0].scale == 4.0);
  CHECK(adapter.load().modules()[0].alpha_from == "option peft_defaults");
  adapter.options.lora_alpha = std::numeric_limits<double>::quiet_NaN();
  refused(Errc::invalid_argument, {"lora_alpha"}, [&] { adapter.load(); });
}

TEST_CASE("peft: what lies in the folder is named", "[io]") {
  const TemporaryFolder folder;
  const auto load = [&folder] { load_peft(folder.path()); };
  refused(Errc::io_error, {"/none"}, [&folder] { load_peft(folder.path() + "/none"); });
  refused(Errc::config_error, {"adapter_config.json not found"}, load);
  folder.write("adapter_config.json", Adapter().config.dump());
  refused(Errc::not_found, {"adapter_model.safetensors"}, load);
  const std::string index = folder.write("adapter_model.safetensors.index.json", "{}");
  refused(Errc::unsupported, {"split", "index.json"}, load);
  std::filesystem::remove(index);
  folder.write("adapter_model.bin", "\x80\x02");
  refused(Errc::unsupported, {"adapter_model.bin", "pickle"}, load);
  folder.write("adapter_model.safetensors", container(Adapter().tensors));
  CHECK(load_peft(folder.path()).modules().size() == 2);
  PeftOptions small;
  small.max_config_bytes = 10;
  refused(Errc::limit_exceeded, {"max_config_bytes"}, [&] { load_peft(folder.path(), {}, small); });
}

TEST_CASE("peft: tensors must come in pairs and belong to targets", "[io]") {
  change(Errc::config_error,
         {"\"" + kQ + ".lora_A.weight\" is missing", "\"" + kQ + ".lora_B.weight\" is present"},
         [](Adapter& a) { a.tensors.erase(a.tensors.begin()); });
  change(Errc::config_error,
         {"\"" + kQ + ".lora_B.weight\" is missing", "\"" + kQ + ".lora_A.weight\" is present"},
         [](Adapter& a) { a.tensors.erase(a.tensors.begin() + 1); });
  change(Errc::config_error, {"the file holds no tensors"}, [](Adapter& a) { a.tensors.clear(); });
  change(Errc::config_error, {"0 of 2", "prefix \"base_model.model.\""}, [](Adapter& a) {
    for (TestTensor& t : a.tensors) t.name = t.name.substr(std::string("base_model.model.").size());
  });
  for (const char* suffix :
       {".lora_C.weight", ".lora_magnitude_vector", ".lora_B.bias", ".alpha"}) {
    change(Errc::config_error, {"unused tensor \"" + kQ + suffix + "\""}, [&](Adapter& a) {
      a.tensors.push_back({kQ + suffix, "F32", "[1]", Adapter::floats(1)});
    });
  }
  change(Errc::unsupported, {"embed_tokens.lora_embedding_A", "embedding"}, [](Adapter& a) {
    const std::string name = "base_model.model.model.embed_tokens.lora_embedding_A";
    a.tensors.push_back({name, "F32", "[1]", Adapter::floats(1)});
  });
  change(Errc::config_error, {"layers.7.self_attn.q_proj", "no module of the base model"},
         [](Adapter& a) {
           const std::string path = "base_model.model.model.layers.7.self_attn.q_proj";
           a.tensors.push_back({path + ".lora_A.weight", "F32", "[2,6]", Adapter::floats(12)});
           a.tensors.push_back({path + ".lora_B.weight", "F32", "[6,2]", Adapter::floats(12)});
         });
  change(Errc::unsupported, {"v_proj", "no linear layer"},
         [](Adapter& a) { a.base[2].kind = ModuleKind::other; });
}

TEST_CASE("peft: shapes must agree with each other, the settings and the base model", "[io]") {
  const std::string down = "\"" + kQ + ".lora_A.weight\"", up = "\"" + kQ + ".lora_B.weight\"";
  setting("r", 5, Errc::shape_mismatch, {down, "rank 2", "the config says 5"});
  setting("rank_pattern", {{"v_proj", 3}}, Errc::shape_mismatch,
          {"v_proj.lora_A.weight", "rank 2", "rank_pattern says 3"});
  const auto shape = [](Errc code, const std::vector<std::string>& words, auto edit) {
    change(code, words, edit);
  };
  shape(Errc::shape_mismatch, {up, "rank 3", "lora_A has rank 2"},
        [](Adapter& a) { a.q_up().shape = "[4,3]"; });
  shape(Errc::shape_mismatch, {down, "[6, 2]", "[2, 6]", "transposed"},
        [](Adapter& a) { a.q_down().shape = "[6,2]"; });
  shape(Errc::shape_mismatch, {down, "3 dimensions", "expected 2"},
        [](Adapter& a) { a.q_down().shape = "[2,3,2]"; });
  shape(Errc::shape_mismatch, {down, "[0, 6]"}, [](Adapter& a) {
    a.q_down().shape = "[0,6]";
    a.q_down().bytes.clear();
  });
  shape(Errc::shape_mismatch, {down, "width 6", "d_in 7"}, [](Adapter& a) { a.base[1].d_in = 7; });
  shape(Errc::shape_mismatch, {up, "height 6", "d_out 5"}, [](Adapter& a) { a.base[1].d_out = 5; });
  shape(Errc::unsupported, {down, "\"I32\""}, [](Adapter& a) { a.q_down().dtype = "I32"; });
  shape(Errc::invalid_argument, {"modules", "twice"},
        [](Adapter& a) { a.base.push_back(a.base.front()); });
  shape(Errc::invalid_argument, {"modules", "d_in 0"}, [](Adapter& a) { a.base[0].d_in = 0; });
}

TEST_CASE("peft: weights must be finite and have an effect", "[io]") {
  change(Errc::numeric_error,
         {"v_proj.lora_B.weight\" holds 2 non-finite values, first at index 3"}, [](Adapter& a) {
           std::vector<float> values(8, 1.0f);
           values[3] = std::numeric_limits<float>::infinity();
           values[6] = std::numeric_limits<float>::quiet_NaN();
           a.v_up().bytes = raw(values);
         });
  Adapter adapter;
  adapter.q_up().bytes = std::string(48, '\0');
  CHECK(adapter.load().modules().size() == 2);
  adapter.v_up().bytes = std::string(32, '\0');
  refused(Errc::config_error, {"every lora_B is zero", "allow_no_effect"}, [&] { adapter.load(); });
  adapter.options.allow_no_effect = true;
  CHECK(adapter.load().modules().size() == 2);
}

TEST_CASE("peft: a weight that overflows the wanted type is refused before a copy", "[io]") {
  Adapter adapter;
  adapter.q_down() = {kQ + ".lora_A.weight", "F64", "[2,6]", raw(std::vector<double>(12, 1e39))};
  const PeftAdapter loaded = adapter.load();
  const LoraModule& module = loaded.at("model.layers.0.self_attn.q_proj");
  std::vector<float> out(12, 7.0f);
  refused(Errc::numeric_error, {"q_proj.lora_A.weight", "1e+39", "index 0", "F32"},
          [&] { loaded.read_down(module, MatView<float>(out.data(), 2, 6)); });
  CHECK(out == std::vector<float>(12, 7.0f));
  std::vector<double> wide(12);
  loaded.read_down(module, MatView<double>(wide.data(), 2, 6));
  CHECK(wide == std::vector<double>(12, 1e39));
}

TEST_CASE("peft: only loads what it names and looks at nothing else", "[io]") {
  Adapter adapter;
  adapter.v_up().shape = "[2,4]";
  refused(Errc::shape_mismatch, {"v_proj"}, [&] { adapter.load(); });
  adapter.options.only = {"model.layers.0.self_attn.q_proj"};
  const PeftAdapter loaded = adapter.load();
  REQUIRE(loaded.modules().size() == 1);
  CHECK(loaded.modules()[0].path == "model.layers.0.self_attn.q_proj");
  CHECK(loaded.report().skipped == std::vector<std::string>{"model.layers.0.self_attn.v_proj"});
  CHECK(loaded.report().checks_off.size() == 1);
  adapter.options.only = {"model.layers.0.self_attn.qproj"};
  refused(Errc::not_found, {"only", "qproj", "nearest: \"model.layers.0.self_attn.q_proj\""},
          [&] { adapter.load(); });
}

TEST_CASE("peft: allow_partial reports what it passes over", "[io]") {
  Adapter adapter;
  adapter.options.allow_partial = true;
  adapter.config["target_modules"] = {"q_proj", "up_proj"};
  adapter.tensors.push_back({kQ + ".lora_C.weight", "F32", "[1]", Adapter::floats(1)});
  const PeftAdapter loaded = adapter.load();
  CHECK(loaded.modules().size() == 1);
  CHECK(loaded.report().missing == std::vector<std::string>{"model.layers.0.mlp.up_proj"});
  CHECK(loaded.report().unused.size() == 3);
  adapter.config["target_modules"] = {"up_proj"};
  refused(Errc::config_error, {"no module was applied"}, [&] { adapter.load(); });
}

TEST_CASE("peft: names that end like tensor names are read from the right", "[io]") {
  Adapter adapter;
  adapter.base.clear();
  adapter.config["target_modules"] = {"lora_A", "weight", "q_proj", "v_proj"};
  for (const char* path : {"base_model.model.lora_B.lora_A", "base_model.model.x.weight"}) {
    adapter.tensors.push_back(
        {path + std::string(".lora_A.weight"), "F32", "[2,6]", Adapter::floats(12)});
    adapter.tensors.push_back(
        {path + std::string(".lora_B.weight"), "F32", "[6,2]", Adapter::floats(12)});
  }
  const PeftAdapter loaded = adapter.load();
  CHECK(loaded.modules().size() == 4);
  CHECK(loaded.find("lora_B.lora_A") != nullptr);
  CHECK(loaded.find("x.weight") != nullptr);
}

TEST_CASE("peft: a conv1d layer takes the same adapter", "[io]") {
  Adapter adapter;
  adapter.config["fan_in_fan_out"] = true;
  CHECK(adapter.load().modules()[0].kind == ModuleKind::linear);
  CHECK(adapter.load_without_base().modules()[0].kind == ModuleKind::conv1d);
  adapter.base[1].kind = ModuleKind::conv1d;
  CHECK(adapter.load().modules()[0].kind == ModuleKind::conv1d);
}

TEST_CASE("peft: an adapter outlives its folder", "[io]") {
  std::vector<PeftAdapter> adapters;
  adapters.push_back(Adapter().load());
  adapters.push_back(adapters.front());
  std::vector<float> down(12);
  const LoraModule& module = adapters.back().modules().front();
  adapters.back().read_down(module, MatView<float>(down.data(), 2, 6));
  CHECK(down[0] == 0.25f);
  CHECK(down[11] == 3.0f);
}
