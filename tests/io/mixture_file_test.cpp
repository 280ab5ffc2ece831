// SPDX-License-Identifier: Apache-2.0
#include "mole/io/mixture_file.hpp"

#include <cstring>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "io/file_builder.hpp"
#include "mole/core/random.hpp"
#include "mole/layers/kinds.hpp"
#include "mole/layers/session.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/matrix.hpp"

using mole::bf16;
using mole::Errc;
using mole::Error;
using mole::Index;
using mole::MatView;
using mole::MixtureFile;
using mole::MixtureFileWriter;
using mole::SafeTensors;
using mole::SafeTensorsWriter;
using mole::StoredTensor;
using nlohmann::json;

namespace {

using TopKRagged = mole::Mixture<mole::TopKRouter<float>, mole::LoraBank<float>>;
using TopKHalf = mole::Mixture<mole::TopKRouter<float>, mole::LoraBank<float, bf16>>;
using DenseShared = mole::Mixture<mole::DenseRouter<double>, mole::SharedDownBank<double>>;
using GivenShared = mole::Mixture<mole::GivenRouter<float>, mole::SharedUpBank<float>>;
using Noisy = mole::Mixture<mole::NoisyTopKRouter<float>, mole::LoraBank<float>>;
using Linear = mole::AdaptedLinear<DenseShared>;
using MixLora = mole::Mixture<mole::TopKRouter<float>, mole::FfnBank<float>>;

constexpr Index kIn = 13, kOut = 7, kTokens = 11;

template <class L>
L make_layer();

template <>
TopKRagged make_layer() {
  return {mole::TopKRouter<float>({.width = kIn, .experts = 4, .k = 2, .bias = true}),
          mole::LoraBank<float>({.in = kIn,
                                 .out = kOut,
                                 .rank = {3, 0, 5, 1},
                                 .scale = {0.1f, 1, 2, -0.3f},
                                 .bias = true})};
}
template <>
TopKHalf make_layer() {
  return {mole::TopKRouter<float>({.width = kIn, .experts = 3, .k = 2}),
          mole::LoraBank<float, bf16>(
              {.in = kIn, .out = kOut, .rank = {2, 4, 1}, .scale = {2, 0.5f, 0.7f}})};
}
template <>
DenseShared make_layer() {
  return {mole::DenseRouter<double>({.width = kIn, .experts = 3, .temperature = 0.7}),
          mole::SharedDownBank<double>({.in = kIn, .out = kOut, .rank = 3, .scale = {0.1, 2, 3}})};
}
template <>
Linear make_layer() {
  return Linear(make_layer<DenseShared>(), {.fan_in_fan_out = true});
}
template <>
Noisy make_layer() {
  return {mole::NoisyTopKRouter<float>({.width = kIn, .experts = 3, .k = 2}),
          mole::LoraBank<float>({.in = kIn, .out = kOut, .rank = {1, 2, 3}, .scale = {1, 2, 3}})};
}
template <>
MixLora make_layer() {
  return {mole::TopKRouter<float>({.width = kIn, .experts = 3, .k = 2}),
          mole::FfnBank<float>({.in = kIn,
                                .inner = 9,
                                .out = kOut,
                                .experts = 3,
                                .activation = mole::Activation::gelu,
                                .inner_bias = true,
                                .up = {{1, 0, 2}, {1, 1, -0.5f}}})};
}
template <>
GivenShared make_layer() {
  return {mole::GivenRouter<float>({.width = kIn, .experts = 2}),
          mole::SharedUpBank<float>({.in = kIn, .out = kOut, .rank = 3, .scale = {1, 2}})};
}
template <>
mole::Lora<float> make_layer() {
  return mole::Lora<float>({.in = kIn, .out = kOut, .rank = {2}, .scale = {4}});
}

template <class Layer>
mole::OwnedWeights<Layer> random_weights(const Layer& layer, std::uint64_t seed = 5) {
  mole::OwnedWeights<Layer> weights(layer);
  const mole::Random random(seed, 3);
  std::uint64_t n = 0;
  mole::params::zip(
      [&]<class V>(V& value) {
        value = static_cast<V>(static_cast<float>(2 * random.uniform(n++) - 1));
      },
      weights.params());
  return weights;
}

/// The output for the same tokens, in one block.
template <class Layer>
std::vector<typename Layer::Scalar> output(const Layer& layer,
                                           const typename Layer::Weights& weights,
                                           const typename Layer::Buffers& buffers = {}) {
  using T = typename Layer::Scalar;
  const auto x = test::random_matrix<T>(kTokens, layer.input_width(), 8);
  std::vector<T> y(static_cast<std::size_t>(kTokens * layer.output_width()), T(0.25));
  mole::Session session(layer, weights, {.max_tokens = kTokens});
  session.forward(x.view(), {y.data(), kTokens, layer.output_width()}, buffers);
  return y;
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

/// What a call throws: "category: message", or "nothing".
template <class F>
std::string thrown(F&& call) {
  try {
    call();
  } catch (const Error& error) {
    return std::string(name(error.code())) + ": " + error.what();
  }
  return "nothing";
}

/// A file in pieces, to be changed and put together again.
struct Pieces {
  std::vector<std::byte> memory;
  std::map<std::string, StoredTensor> tensors;
  std::map<std::string, std::string> metadata;

  explicit Pieces(std::vector<std::byte> bytes) : memory(std::move(bytes)) {
    const SafeTensors file = SafeTensors::parse(memory, "whole");
    for (const StoredTensor& tensor : file.tensors()) tensors[tensor.name] = tensor;
    metadata = file.metadata();
  }
  /// The JSON of mole.config, changed by f.
  template <class F>
  void config(F&& f) {
    json document = json::parse(metadata.at("mole.config"));
    f(document);
    metadata["mole.config"] = document.dump();
  }
  json& layer(json& document, std::size_t i = 0) { return document["mixtures"][i]["layer"]; }

  std::vector<std::byte> bytes() const {
    SafeTensorsWriter writer;
    for (const auto& [name, tensor] : tensors) {
      StoredTensor renamed = tensor;
      renamed.name = name;
      writer.add(renamed);
    }
    for (const auto& [key, value] : metadata) writer.set_metadata(key, value);
    return writer.bytes();
  }
};

MixtureFile parse(const std::vector<std::byte>& bytes) {
  return MixtureFile(SafeTensors::parse(bytes, "f"));
}

/// Pieces of a file with one layer of this type.
template <class Layer>
Pieces pieces_of(const std::string& name = "a", const typename Layer::Buffers& buffers = {}) {
  const Layer layer = make_layer<Layer>();
  const auto weights = random_weights(layer);
  MixtureFileWriter writer;
  writer.add(name, layer, weights.params(), buffers);
  return Pieces(writer.bytes());
}

/// What loading the only mixture of the file throws. `check` must throw the same category.
template <class Layer>
std::string load_error(const Pieces& pieces) {
  const auto bytes = pieces.bytes();
  const std::string checked = thrown([&] {
    const MixtureFile file = parse(bytes);
    file.check(file.only());
  });
  const std::string loaded = thrown([&] {
    const MixtureFile file = parse(bytes);
    file.load<Layer>(file.only());
  });
  INFO(checked);
  INFO(loaded);
  CHECK(checked.substr(0, checked.find(':')) == loaded.substr(0, loaded.find(':')));
  return loaded;
}

constexpr auto kTwoNames = [](auto&& add) {
  const auto a = make_layer<TopKRagged>();
  const auto b = make_layer<Linear>();
  const auto weights_a = random_weights(a), weights_a2 = random_weights(a, 6);
  const auto weights_b = random_weights(b);
  add(a, weights_a, weights_a2, b, weights_b);
};

}  // namespace

TEMPLATE_TEST_CASE("what is saved and loaded computes the same bits", "", TopKRagged, TopKHalf,
                   DenseShared, Linear, Noisy, MixLora, mole::Lora<float>) {
  const auto layer = make_layer<TestType>();
  const auto weights = random_weights(layer);
  const mole::test::TemporaryFolder folder;
  const std::string path = folder.path() + "/moe.safetensors";
  mole::save_mixture(path, layer, weights.params());
  const auto loaded = mole::load_mixture<TestType>(path);

  CHECK(describe(loaded.layer()) == describe(layer));
  const auto y = output(layer, weights.params());
  CHECK(same_bits(output(loaded.layer(), loaded.weights()), y));
  const auto others = random_weights(layer, 6);
  CHECK_FALSE(same_bits(output(layer, others.params()), y));
}

TEST_CASE("a selection bias is saved, loaded and steers the routing with the same bits") {
  const auto layer = make_layer<TopKRagged>();
  const auto weights = random_weights(layer);
  const float bias[] = {0, 0.7f, -std::numeric_limits<float>::infinity(), 0.1f};
  const mole::test::TemporaryFolder folder;
  const std::string path = folder.path() + "/moe.safetensors";
  mole::save_mixture(path, layer, weights.params(), {bias});
  const auto loaded = mole::load_mixture<TopKRagged>(path);

  const auto loaded_bias = loaded.buffers().selection_bias;
  REQUIRE(loaded_bias.size() == 4);
  CHECK(std::memcmp(loaded_bias.data(), bias, sizeof bias) == 0);
  const auto y = output(layer, weights.params(), {bias});
  CHECK(same_bits(output(loaded.layer(), loaded.weights(), loaded.buffers()), y));
  CHECK_FALSE(same_bits(output(layer, weights.params()), y));
}

TEST_CASE("a loaded mixture can be moved and trained") {
  auto source = pieces_of<Linear>();
  const auto bytes = source.bytes();
  auto loaded = parse(bytes).load<Linear>("a");
  const auto y = output(loaded.layer(), loaded.weights());
  const auto moved = std::move(loaded);
  CHECK(same_bits(output(moved.layer(), moved.weights()), y));
  const Linear::Params<double> params = moved.params();
  params.mixture.router.weight(0, 0) += 1;
  CHECK_FALSE(same_bits(output(moved.layer(), moved.weights()), y));
}

TEST_CASE("the file has the documented names, shapes, types and metadata") {
  const float bias[] = {0, 1, 2, 3};
  const Pieces ragged = pieces_of<TopKRagged>("model.layers.0", {bias});
  std::string listing;
  for (const auto& [name, tensor] : ragged.tensors) {
    listing += name + " " + std::string(mole::name(tensor.dtype));
    for (const Index dimension : tensor.shape) listing += " " + std::to_string(dimension);
    listing += "\n";
  }
  CHECK(listing ==
        "model.layers.0.buffers.selection_bias F32 4\n"
        "model.layers.0.experts.0.bias F32 1 7\n"
        "model.layers.0.experts.0.down F32 3 13\n"
        "model.layers.0.experts.0.up F32 7 3\n"
        "model.layers.0.experts.1.bias F32 1 7\n"
        "model.layers.0.experts.1.down F32 0 13\n"
        "model.layers.0.experts.1.up F32 7 0\n"
        "model.layers.0.experts.2.bias F32 1 7\n"
        "model.layers.0.experts.2.down F32 5 13\n"
        "model.layers.0.experts.2.up F32 7 5\n"
        "model.layers.0.experts.3.bias F32 1 7\n"
        "model.layers.0.experts.3.down F32 1 13\n"
        "model.layers.0.experts.3.up F32 7 1\n"
        "model.layers.0.router.bias F32 1 4\n"
        "model.layers.0.router.weight F32 4 13\n");
  CHECK(ragged.metadata.size() == 3);
  CHECK(ragged.metadata.at("mole.format") == "1");
  CHECK(ragged.metadata.at("mole.kind") == "mixtures");

  const Pieces linear = pieces_of<Linear>("");
  std::string names;
  for (const auto& [name, tensor] : linear.tensors) names += name + " ";
  CHECK(names == "bias experts.0.up experts.1.up experts.2.up experts.down router.weight weight ");
  CHECK(linear.metadata.at("mole.config") ==
        R"({"mixtures":[{"name":"","layer":{"kind":"adapted_linear","fan_in_fan_out":true,)"
        R"("mixture":{"kind":"mixture","router":{"kind":"dense","width":13,"experts":3,)"
        R"("temperature":0.7,"bias":false},"experts":{"kind":"shared_down_bank","in":13,"out":7,)"
        R"("rank":3,"scale":[0.1,2.0,3.0]}}},"optional_tensors":["bias"]}]})");
  const Pieces noisy = pieces_of<Noisy>("n");
  CHECK(noisy.tensors.contains("n.router.router.weight"));
  CHECK(noisy.tensors.contains("n.router.side.weight"));
  CHECK(load_error<Noisy>(noisy) == "nothing");
  names.clear();
  const Pieces shared = pieces_of<GivenShared>("");
  for (const auto& [name, tensor] : shared.tensors) names += name + " ";
  CHECK(names == "experts.0.down experts.1.down experts.up ");
  CHECK(load_error<GivenShared>(pieces_of<GivenShared>("g")) == "nothing");
  CHECK(pieces_of<TopKHalf>().tensors.at("a.experts.1.up").dtype == mole::Dtype::bf16);
}

TEST_CASE("several mixtures share a file, each under its name") {
  kTwoNames([](const auto& a, const auto& wa, const auto& wa2, const auto& b, const auto& wb) {
    MixtureFileWriter writer;
    writer.add("m.1", a, wa.params());
    writer.add("m.10", b, wb.params());
    writer.add("m.0", a, wa2.params());
    writer.set_metadata("note", "trained on Tuesday");
    const auto bytes = writer.bytes();
    const MixtureFile file = parse(bytes);
    CHECK(file.names() == std::vector<std::string>{"m.1", "m.10", "m.0"});
    CHECK(file.file().metadata().at("note") == "trained on Tuesday");
    const auto one = file.load<TopKRagged>("m.1"), zero = file.load<TopKRagged>("m.0");
    const auto ten = file.load<Linear>("m.10");
    CHECK(same_bits(output(one.layer(), one.weights()), output(a, wa.params())));
    CHECK(same_bits(output(zero.layer(), zero.weights()), output(a, wa2.params())));
    CHECK(same_bits(output(ten.layer(), ten.weights()), output(b, wb.params())));
    for (const auto& record : file.records()) CHECK_NOTHROW(file.check(record));
    CHECK(thrown([&] { file.load<TopKRagged>("m.2"); }) ==
          R"(not_found: f: has no mixture "m.2" (nearest: "m.0", "m.1", "m.10"))");
    CHECK(thrown([&] { file.only(); }) ==
          R"(invalid_argument: f: holds 3 mixtures, load one by name: "m.1", "m.10", "m.0")");
  });
}

TEST_CASE("names that would mix up tensors are refused when writing") {
  kTwoNames([](const auto& a, const auto& wa, const auto&, const auto&, const auto&) {
    MixtureFileWriter writer;
    writer.add("m.1", a, wa.params());
    const auto before = writer.bytes();
    const auto error = [&](std::string name) {
      return thrown([&] { writer.add(name, a, wa.params()); });
    };
    CHECK(error("m.1") == R"(invalid_argument: mixture "m.1" is there twice)");
    CHECK(error("m.1.router") ==
          R"(invalid_argument: mixture "m.1" is the start of mixture "m.1.router", )"
          "their tensors could have the same names");
    CHECK(error("m").starts_with(R"(invalid_argument: mixture "m" is the start of mixture "m.1")"));
    CHECK(error("") == "invalid_argument: a mixture without a name must be alone in its file");
    CHECK(error(std::string("a\0b", 3)).ends_with("a name is UTF-8 without NUL"));
    CHECK(error("\xff").ends_with("a name is UTF-8 without NUL"));
    CHECK(thrown([&] { writer.set_metadata("mole.format", "7"); }).ends_with("are reserved"));
    CHECK(writer.bytes() == before);
    writer.add("m.11", a, wa.params());
    CHECK(parse(writer.bytes()).names().size() == 2);
  });
}

TEST_CASE("weights that are not those of the layer are refused, and nothing is added") {
  const auto layer = make_layer<TopKRagged>();
  const auto weights = random_weights(layer);
  const TopKRagged::Weights good = weights.params();
  MixtureFileWriter writer;
  const auto before = writer.bytes();
  const auto error = [&](const TopKRagged::Weights& bad, const TopKRagged::Buffers& buffers = {}) {
    return thrown([&] { writer.add("a", layer, bad, buffers); });
  };
  auto bad = good;
  bad.router.weight.cols -= 1;
  CHECK(error(bad) ==
        R"(shape_mismatch: mixture "a": router.weight: expected [4, 13], got [4, 12])");
  bad = good;
  bad.router.bias = {};
  CHECK(error(bad) == R"(shape_mismatch: mixture "a": router.bias: expected [1, 4], got [0, 0])");
  bad = good;
  bad.experts.rank = bad.experts.rank.first(3);
  CHECK(error(bad) == R"(shape_mismatch: mixture "a": experts.3.down is missing)");
  bad = good;
  bad.router.weight.data = nullptr;
  CHECK(error(bad).starts_with(R"(invalid_argument: mixture "a": router.weight: needs memory)"));
  const float three[] = {1, 2, 3};
  CHECK(error(good, {three}) ==
        R"(shape_mismatch: mixture "a": selection_bias: expected 4 values, got 3)");
  weights.params().router.weight(2, 1) = std::numeric_limits<float>::quiet_NaN();
  CHECK(
      error(good) ==
      R"(numeric_error: mixture "a": router.weight: expected finite weights, found nan at [2, 1])");
  CHECK(writer.bytes() == before);
}

TEST_CASE("weights may be stored in a narrower type than the layer's, not in a wider one") {
  using Wide = mole::Mixture<mole::TopKRouter<double>, mole::LoraBank<double>>;
  const auto bytes = pieces_of<TopKHalf>().bytes();
  const MixtureFile file = parse(bytes);
  const auto half = file.load<TopKHalf>("a");
  const auto wide = file.load<Wide>("a");
  CHECK(wide.weights().experts.up[1][3] ==
        static_cast<double>(static_cast<float>(half.weights().experts.up[1][3])));

  MixtureFileWriter writer;
  writer.add("a", wide.layer(), wide.weights());
  const auto wide_bytes = writer.bytes();
  CHECK(thrown([&] { parse(wide_bytes).load<TopKHalf>("a"); }) ==
        R"(unsupported: f: mixture "a": tensor "a.router.weight" is stored as F64, )"
        "which the layer's F32 cannot hold without rounding");
}

TEST_CASE("formats: the known one is read, newer ones and others are refused") {
  Pieces pieces = pieces_of<DenseShared>();
  const auto with_format = [&](const char* format) {
    pieces.metadata["mole.format"] = format;
    return load_error<DenseShared>(pieces);
  };
  CHECK(with_format("1") == "nothing");
  CHECK(with_format("2") ==
        "unsupported: f: mole.format is 2, the newest that this library reads is 1");
  CHECK(with_format("0") ==
        "format_error: f: mole.format is 0, which never existed: the first is 1");
  for (const char* text : {"", "-1", "01", "1 ", " 1", "1.0", "one", "99999999999"}) {
    CHECK(with_format(text) ==
          std::string("format_error: f: mole.format is \"") + text + "\", expected a number");
  }
  pieces.metadata.erase("mole.format");
  CHECK(load_error<DenseShared>(pieces) ==
        "format_error: f: is no mixture file, the metadata lack \"mole.format\"");
  CHECK_FALSE(MixtureFile::is_mixture_file(SafeTensors::parse(pieces.bytes(), "f")));
}

TEST_CASE("metadata other than those of the format are refused") {
  Pieces pieces = pieces_of<DenseShared>();
  pieces.metadata["note"] = "anything";
  CHECK(load_error<DenseShared>(pieces) == "nothing");
  pieces.metadata["mole.requires"] = "[]";
  CHECK(load_error<DenseShared>(pieces) ==
        "format_error: f: the metadata have the unknown key \"mole.requires\"");
  pieces.metadata.erase("mole.requires");
  pieces.metadata["mole.kind"] = "optimizer";
  CHECK(load_error<DenseShared>(pieces) ==
        "unsupported: f: mole.kind: expected \"mixtures\", found \"optimizer\"");
  pieces.metadata.erase("mole.kind");
  CHECK(load_error<DenseShared>(pieces).ends_with("the metadata lack \"mole.kind\""));
  pieces = pieces_of<DenseShared>();
  pieces.metadata.erase("mole.config");
  CHECK(load_error<DenseShared>(pieces).ends_with("the metadata lack \"mole.config\""));
}

TEST_CASE("a config of another form is refused by its place") {
  const auto error = [](auto&& change) {
    Pieces pieces = pieces_of<DenseShared>();
    pieces.config(change);
    return load_error<DenseShared>(pieces);
  };
  CHECK(error([](json& d) { d["more"] = 1; }) ==
        R"(config_error: f: mole.config: "more" is unknown, expected "mixtures")");
  CHECK(error([](json& d) { d = json::object(); }) ==
        R"(config_error: f: mole.config: "mixtures" is missing)");
  CHECK(error([](json& d) { d["mixtures"] = 3; }) ==
        R"(config_error: f: mole.config: "mixtures": expected a list, found 3)");
  CHECK(error([](json& d) { d["mixtures"][0] = nullptr; }) ==
        "config_error: f: mole.config: mixture 0: expected an object, found null");
  CHECK(error([](json& d) { d["mixtures"][0]["name"] = 3; }) ==
        R"(config_error: f: mole.config: mixture 0: "name": expected a string, found 3)");
  CHECK(error([](json& d) { d["mixtures"][0].erase("layer"); }) ==
        R"(config_error: f: mole.config: mixture 0: "layer" is missing)");
  CHECK(error([](json& d) { d["mixtures"][0]["layer"] = "x"; }) ==
        R"(config_error: f: mole.config: mixture 0: "layer": expected an object, found a string)");
  CHECK(
      error([](json& d) { d["mixtures"][0]["optional_tensors"] = {3}; }) ==
      R"(config_error: f: mole.config: mixture 0: "optional_tensors": expected a string, found 3)");
  CHECK(error([](json& d) { d["mixtures"].push_back(d["mixtures"][0]); }) ==
        R"(config_error: f: mixture "a" is there twice)");
  CHECK(error([](json& d) {
          d["mixtures"].push_back(d["mixtures"][0]);
          d["mixtures"][1]["name"] = "a.b";
        }).starts_with(R"(config_error: f: mixture "a" is the start of mixture "a.b")"));
  CHECK(error([](json& d) {
          d["mixtures"].push_back(d["mixtures"][0]);
          d["mixtures"][1]["name"] = "";
        }) == "config_error: f: a mixture without a name must be alone in its file");
  Pieces pieces = pieces_of<DenseShared>();
  pieces.metadata["mole.config"] = "{\"mixtures\":[],\"mixtures\":[]}";
  CHECK(load_error<DenseShared>(pieces) ==
        "format_error: f: mole.config: has the key \"mixtures\" twice");
}

TEST_CASE("a file of another layer is refused by kind and field") {
  const auto bytes = pieces_of<TopKRagged>().bytes();
  const MixtureFile file = parse(bytes);
  CHECK(thrown([&] { file.load<DenseShared>("a"); }) ==
        R"(config_error: f: mixture "a": kind: expected "dense", found "top_k")");
  CHECK(thrown([&] { file.load<Linear>("a"); }) ==
        R"(config_error: f: mixture "a": "mixture": part "router" is unknown, )"
        "expected one of mixture");
  const auto error = [](auto&& change) {
    Pieces pieces = pieces_of<TopKRagged>();
    pieces.config([&](json& d) { change(pieces.layer(d)); });
    return load_error<TopKRagged>(pieces);
  };
  CHECK(error([](json& layer) { layer["router"]["k"] = 5; }) ==
        R"(config_error: f: mixture "a": "top_k": TopKRouter: k: expected 1 ... experts, got 5)");
  CHECK(error([](json& layer) { layer["router"].erase("width"); }) ==
        R"(config_error: f: mixture "a": "top_k": field "width" is missing)");
  CHECK(error([](json& layer) { layer.erase("experts"); }) ==
        R"(config_error: f: mixture "a": "mixture": part "experts" is missing)");
  CHECK(error([](json& layer) { layer["router"]["experts"] = 5; }) ==
        R"(config_error: f: mixture "a": "mixture": Mixture: the router has 5 experts, )"
        "the bank has 4");
  CHECK(error([](json& layer) { layer["router"]["width"] = 12; }) ==
        R"(shape_mismatch: f: mixture "a": tensor "a.router.weight": expected [4, 12], )"
        "found [4, 13]");
  CHECK(error([](json& layer) { layer["experts"]["rank"][2] = 4; }) ==
        R"(shape_mismatch: f: mixture "a": tensor "a.experts.2.down": expected [4, 13], )"
        "found [5, 13]");
  CHECK(error([](json& layer) { layer["experts"]["bias"] = false; }) ==
        R"(config_error: f: mixture "a": tensor "a.experts.0.bias" is no part of this layer)");
  CHECK(error([](json& layer) { layer["router"]["width"] = 2'000'000'000; }) ==
        R"(config_error: f: mixture "a": its config asks for 32000001664 bytes of weights, )"
        "the file holds 1056");
}

TEST_CASE("tensors that are missing, too many, or of another shape or type are named") {
  const float bias[] = {0, 1, 2, 3};
  const auto error = [&](auto&& change) {
    Pieces pieces = pieces_of<TopKRagged>("a", {bias});
    change(pieces);
    return load_error<TopKRagged>(pieces);
  };
  CHECK(error([](Pieces&) {}) == "nothing");
  CHECK(error([](Pieces& p) { p.tensors.erase("a.experts.2.up"); }) ==
        R"(config_error: f: mixture "a": tensor "a.experts.2.up" is missing)");
  CHECK(error([](Pieces& p) { p.tensors.erase("a.experts.1.down"); }) ==
        R"(config_error: f: mixture "a": tensor "a.experts.1.down" is missing)");
  CHECK(error([](Pieces& p) { p.tensors.erase("a.buffers.selection_bias"); }) ==
        R"(config_error: f: mixture "a": tensor "a.buffers.selection_bias" is missing)");
  CHECK(error([](Pieces& p) { p.tensors["a.router.extra"] = p.tensors["a.router.bias"]; }) ==
        R"(config_error: f: mixture "a": tensor "a.router.extra" is no part of this layer)");
  CHECK(error([](Pieces& p) { p.tensors["b.router"] = p.tensors["a.router.bias"]; }) ==
        R"(config_error: f: tensor "b.router" belongs to no mixture of the file)");
  CHECK(error([](Pieces& p) { p.tensors["a.router.bias"].shape = {4}; }) ==
        R"(shape_mismatch: f: mixture "a": tensor "a.router.bias": expected [1, 4], found [4])");
  CHECK(error([](Pieces& p) {
          p.tensors["a.buffers.selection_bias"].shape = {1, 4};
        }) == R"(shape_mismatch: f: mixture "a": tensor "a.buffers.selection_bias": )"
              "expected one dimension, found [1, 4]");
  CHECK(error([](Pieces& p) {
          p.tensors["a.buffers.selection_bias"] = p.tensors["a.experts.0.down"];
          p.tensors["a.buffers.selection_bias"].shape = {39};
        }) == R"(shape_mismatch: f: mixture "a": selection_bias: expected 4 values, got 39)");
  CHECK(error([](Pieces& p) { p.tensors["a.router.bias"].dtype = mole::Dtype::i32; }) ==
        R"(unsupported: f: mixture "a": tensor "a.router.bias" is stored as I32, )"
        "expected F64, F32, F16 or BF16");
  CHECK(error([](Pieces& p) {
          p.config([](json& d) { d["mixtures"][0]["optional_tensors"].push_back("bias"); });
        }) == R"(config_error: f: mixture "a": optional_tensors: "bias" is no part of this layer)");
  CHECK(error([](Pieces& p) {
          p.config([](json& d) { d["mixtures"][0]["optional_tensors"] = json::array(); });
        }) == R"(config_error: f: mixture "a": tensor "a.buffers.selection_bias" )"
              "is no part of this layer");
}

TEST_CASE("NaN and infinity in a parameter are refused, in a buffer they are data") {
  const float bias[] = {0, 1, 2, 3};
  Pieces pieces = pieces_of<TopKRagged>("a", {bias});
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const auto poison = [&](const char* tensor) {
    const std::byte* place = pieces.tensors.at(tensor).bytes.data();
    std::memcpy(pieces.memory.data() + (place - pieces.memory.data()) + 8, &nan, 4);
  };
  poison("a.buffers.selection_bias");
  CHECK(load_error<TopKRagged>(pieces) == "nothing");
  poison("a.experts.2.down");
  CHECK(load_error<TopKRagged>(pieces) ==
        R"(numeric_error: f: mixture "a": tensor "a.experts.2.down": )"
        "expected finite weights, found nan at [0, 2]");
}

TEST_CASE("a base weight with and without bias") {
  const auto layer = make_layer<Linear>();
  const auto weights = random_weights(layer);
  Linear::Weights without = weights.params();
  without.bias = {};
  MixtureFileWriter writer;
  writer.add("a", layer, without);
  Pieces pieces(writer.bytes());
  CHECK_FALSE(pieces.tensors.contains("a.bias"));
  const auto bytes = pieces.bytes();
  const auto loaded = parse(bytes).load<Linear>("a");
  CHECK(loaded.weights().bias.data == nullptr);
  CHECK(same_bits(output(loaded.layer(), loaded.weights()), output(layer, without)));

  Pieces whole = pieces_of<Linear>();
  CHECK(load_error<Linear>(whole) == "nothing");
  whole.tensors.erase("a.bias");
  CHECK(load_error<Linear>(whole) == R"(config_error: f: mixture "a": tensor "a.bias" is missing)");
  whole = pieces_of<Linear>();
  std::swap(whole.tensors["a.weight"].shape[0], whole.tensors["a.weight"].shape[1]);
  CHECK(load_error<Linear>(whole) ==
        R"(shape_mismatch: f: mixture "a": tensor "a.weight": expected [13, 7], found [7, 13])");
}

TEST_CASE("kinds that only the caller knows are loaded, not checked") {
  Pieces pieces = pieces_of<TopKRagged>();
  pieces.config([&](json& d) { pieces.layer(d)["router"]["kind"] = "mine"; });
  const auto bytes = pieces.bytes();
  const MixtureFile file = parse(bytes);
  const std::string start =
      R"(unsupported: f: mixture "a": kind "mine" is unknown, expected one of attention, base, )";
  CHECK(thrown([&] { file.check(file.only()); }).starts_with(start));
}

TEST_CASE("no change of a byte of the header does more than throw an error") {
  const auto good = pieces_of<DenseShared>().bytes();
  const std::size_t header = good.size() - 600;
  int refused = 0, read = 0;
  for (std::size_t at = 0; at < std::min<std::size_t>(header, 1600); ++at) {
    for (const int change : {1, 2, 16, 0x80}) {
      auto bytes = good;
      bytes[at] ^= static_cast<std::byte>(change);
      const std::string result = thrown([&] {
        const MixtureFile file = parse(bytes);
        for (const auto& record : file.records()) file.check(record);
        for (const auto& name : file.names()) file.load<DenseShared>(name);
      });
      (result == "nothing" ? read : refused) += 1;
    }
  }
  CHECK(refused > 1000);
  CHECK(read > 0);
}
