// SPDX-License-Identifier: Apache-2.0
#include "mole/core/description.hpp"

#include <cstdint>
#include <cstring>
#include <limits>
#include <set>
#include <string>
#include <vector>

#include "mole/io/description_json.hpp"
#include "mole/layers/description.hpp"
#include "mole/layers/kinds.hpp"
#include "mole/routing/rule_router.hpp"
#include "support/catch.hpp"

using mole::describe;
using mole::Description;
using mole::Errc;
using mole::Error;
using mole::from_description;
using mole::Index;

namespace {

using TopK = mole::TopKRouter<float>;
using Bank = mole::LoraBank<float>;

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

/// A valid description with one field changed or added.
Description with(Description description, const std::string& name, Description::Value value) {
  for (Description::Entry& entry : description.fields) {
    if (entry.name != name) continue;
    entry.value = std::move(value);
    return description;
  }
  description.fields.push_back({name, std::move(value)});
  return description;
}

Description without(Description description, const std::string& name) {
  std::erase_if(description.fields, [&](const auto& entry) { return entry.name == name; });
  return description;
}

Description top_k_description() {
  return describe(TopK({.width = 5, .experts = 7, .k = 3}));
}

std::string top_k_error(const Description& description) {
  return thrown([&] { from_description<TopK>(description); });
}

/// A rule with a field of its own.
struct AboveRule {
  double threshold = 0.25;

  static constexpr std::string_view kind() noexcept { return "above"; }
  template <class F, class... C>
  static void visit(F&& f, C&... c) {
    f(mole::Field::required("threshold"), c.threshold...);
  }
  Index max_per_token(Index experts) const noexcept { return experts; }
  void forward(std::span<const double>, std::span<double>, std::span<double>) const noexcept {}
  void backward(std::span<const double>, std::span<const double>, std::span<const double>,
                std::span<const double>, std::span<const double>,
                std::span<double>) const noexcept {}
};

struct SilentRule : AboveRule {
  static void kind() = delete;
};

}  // namespace

TEST_CASE("every field of a config is described by name, in order") {
  const Description d = describe(TopK({.width = 5,
                                       .experts = 7,
                                       .k = 3,
                                       .score = mole::Score::sigmoid,
                                       .order = TopK::Order::topk_then_score,
                                       .renormalise = false,
                                       .scale = 2.5f,
                                       .bias = true}));
  CHECK(d.kind == "top_k");
  CHECK(to_json(d) == R"({"kind":"top_k","width":5,"experts":7,"k":3,"score":"sigmoid",)"
                      R"("order":"topk_then_score","renormalise":false,"renorm_epsilon":0.0,)"
                      R"("temperature":1.0,"scale":2.5,"bias":true,"probes":false})");
}

TEST_CASE("a description builds the same router again") {
  TopK::Config config{.width = 5, .experts = 7, .k = 3, .score = mole::Score::sqrt_softplus};
  config.temperature = 0.1f;  // not a short number in binary
  config.probes = true;
  const Description d = describe(TopK(config));
  const TopK again = from_description<TopK>(mole::description_from_json(to_json(d), "test"));
  CHECK(describe(again) == d);
  CHECK(again.config().temperature == 0.1f);
  CHECK(again.config().score == mole::Score::sqrt_softplus);
  CHECK(again.max_per_token() == 7);
}

TEST_CASE("a bank of ragged ranks keeps every rank and the bits of every scale") {
  const Bank bank({.in = 11,
                   .out = 13,
                   .rank = {3, 0, 8},
                   .scale = {0.1f, -0.0f, 1e-38f},
                   .bias = true,
                   .path = mole::BankPath::sparse});
  const Bank again =
      from_description<Bank>(mole::description_from_json(to_json(describe(bank)), "test"));
  CHECK(again.config().rank == std::vector<Index>{3, 0, 8});
  REQUIRE(again.config().scale.size() == 3);
  CHECK(std::memcmp(again.config().scale.data(), bank.config().scale.data(), 12) == 0);
  CHECK(again.config().bias);
  CHECK(again.config().path == mole::BankPath::sparse);
}

TEST_CASE("fields that are left out have their default") {
  const auto d =
      mole::description_from_json(R"({"kind": "top_k", "experts": 7, "k": 3, "width": 5})", "test");
  CHECK(describe(from_description<TopK>(d)) == top_k_description());
}

TEST_CASE("a number may be written as an integer") {
  const Description d = with(top_k_description(), "scale", std::int64_t{3});
  CHECK(from_description<TopK>(d).config().scale == 3.0f);
  const auto json = R"({"kind":"lora_bank","in":2,"out":3,"rank":[1,2],"scale":[2,0.5]})";
  const auto bank = from_description<Bank>(mole::description_from_json(json, "test"));
  CHECK(bank.config().scale == std::vector<float>{2.0f, 0.5f});
}

TEST_CASE("wrong descriptions are refused by field, expectation and finding") {
  const Description good = top_k_description();
  Description other = good;
  other.kind = "top\x1b_p";
  CHECK(top_k_error(other) == R"(config_error: kind: expected "top_k", found "top\x1b_p")");
  CHECK(top_k_error(without(good, "k")) == R"(config_error: "top_k": field "k" is missing)");
  CHECK(
      top_k_error(with(good, "kk", true)) ==
      R"(config_error: "top_k": field "kk" is unknown, expected one of width, experts, k, score, )"
      "order, renormalise, renorm_epsilon, temperature, scale, bias, probes");
  CHECK(top_k_error(with(good, "k", std::string("two"))) ==
        R"(config_error: "top_k": field "k": expected an integer, found "two")");
  CHECK(top_k_error(with(good, "k", 2.0)) ==
        R"(config_error: "top_k": field "k": expected an integer, found 2)");
  CHECK(top_k_error(with(good, "bias", std::int64_t{1})) ==
        R"(config_error: "top_k": field "bias": expected true or false, found 1)");
  CHECK(top_k_error(with(good, "scale", true)) ==
        R"(config_error: "top_k": field "scale": expected a number, found true)");
  CHECK(top_k_error(with(good, "score", std::string("relu"))) ==
        R"(config_error: "top_k": field "score": expected one of "softmax", "sigmoid", )"
        R"("sqrt_softplus", found "relu")");
  Description twice = good;
  twice.fields.push_back(good.fields.front());
  CHECK(top_k_error(twice) == R"(config_error: "top_k": field "width" is there twice)");
  Description nested = good;
  nested.parts.push_back({"head", good});
  CHECK(top_k_error(nested) == R"(config_error: "top_k": part "head" is unknown, expected none)");
}

TEST_CASE("values out of range are refused by name") {
  const Description good = top_k_description();
  CHECK(top_k_error(with(good, "k", std::int64_t{8})) ==
        R"(config_error: "top_k": TopKRouter: k: expected 1 ... experts, got 8)");
  CHECK(top_k_error(with(good, "width", std::int64_t{1} << 40)) ==
        R"(config_error: "top_k": field "width": expected an integer in )"
        "-2147483647 ... 2147483647, found 1099511627776");
  CHECK(top_k_error(with(good, "scale", 1e39))
            .starts_with(
                R"(config_error: "top_k": field "scale": expected a finite number, at most 3.4)"));
  const double nan = std::numeric_limits<double>::quiet_NaN();
  CHECK(top_k_error(with(good, "scale", nan)).ends_with("in size, found nan"));
  const Description bank = describe(Bank({.in = 2, .out = 3, .rank = {1}, .scale = {1}}));
  CHECK(thrown([&] {
          from_description<Bank>(with(bank, "rank", std::vector<std::int64_t>{1, -2}));
        }) == R"(config_error: "lora_bank": LoraBank: rank has 2 experts, scale has 1)");
  CHECK(thrown([&] { from_description<Bank>(with(bank, "rank", std::vector<double>{1.5})); }) ==
        R"(config_error: "lora_bank": field "rank": expected a list of integers, )"
        "found a list of 1: 1.5");
}

TEMPLATE_TEST_CASE("every kind of the registry is unique and comes back from JSON", "", float,
                   double) {
  std::set<std::string_view> kinds;
  const auto check = [&]<class... X>(mole::TypeList<X...> list) {
    const auto one = [&]<class Type>(std::type_identity<Type>) {
      INFO(Type::Config::kind());
      CHECK(kinds.insert(Type::Config::kind()).second);
      const Description d = mole::describe_config(typename Type::Config{});
      const Description again = mole::description_from_json(to_json(d), "test");
      CHECK(mole::describe_config(mole::config_from_description<typename Type::Config>(again)) ==
            d);
      bool found = false;
      mole::with_kind(list, d.kind, [&]<class Found>(std::type_identity<Found>) {
        found = std::is_same_v<Found, Type>;
      });
      CHECK(found);
    };
    (one(std::type_identity<X>()), ...);
  };
  check(mole::RouterTypes<TestType>());
  check(mole::BankTypes<TestType>());
  CHECK(kinds.size() == 47);
  CHECK(thrown([&] { with_kind(mole::BankTypes<TestType>(), "dora", [](auto) {}); }) ==
        "unsupported: kind \"dora\" is unknown, expected one of ffn_bank, film_bank, linear_bank, "
        "lora_bank, modulated_bank, shared_down_bank, shared_up_bank");
}

TEST_CASE("a layer is described by its parts") {
  using Layer =
      mole::AdaptedLinear<mole::Mixture<mole::DenseRouter<float>, mole::SharedDownBank<float>>>;
  const Layer layer(
      mole::Mixture(mole::DenseRouter<float>({.width = 5, .experts = 2}),
                    mole::SharedDownBank<float>({.in = 5, .out = 3, .rank = 2, .scale = {1, 2}})),
      {.fan_in_fan_out = true});
  const std::string json = to_json(describe(layer));
  CHECK(json ==
        R"({"kind":"adapted_linear","fan_in_fan_out":true,"mixture":{"kind":"mixture",)"
        R"("router":{"kind":"dense","width":5,"experts":2,"temperature":1.0,"bias":false},)"
        R"("experts":{"kind":"shared_down_bank","in":5,"out":3,"rank":2,"scale":[1.0,2.0]}}})");
  const Layer again = from_description<Layer>(mole::description_from_json(json, "test"));
  CHECK(describe(again) == describe(layer));
  CHECK(again.config().fan_in_fan_out);

  Description broken = describe(layer);
  broken.parts[0].description.parts.pop_back();
  CHECK(thrown([&] { from_description<Layer>(broken); }) ==
        R"(config_error: "mixture": part "experts" is missing)");
  broken = describe(layer);
  broken.parts[0].description.parts[0].description.kind = "top_k";
  CHECK(thrown([&] { from_description<Layer>(broken); }) ==
        R"(config_error: kind: expected "dense", found "top_k")");
  broken = describe(layer);
  broken.parts[0].description.parts[0].description =
      with(broken.parts[0].description.parts[0].description, "experts", std::int64_t{3});
  CHECK(thrown([&] { from_description<Layer>(broken); }) ==
        R"(config_error: "mixture": Mixture: the router has 3 experts, the bank has 2)");
}

TEST_CASE("a Lora is described as a mixture and comes back as a Lora") {
  using Lora = mole::Lora<float>;
  const Lora lora({.in = 3, .out = 4, .rank = {2, 1}, .scale = {2, 4}});
  const Description d = describe(lora);
  CHECK(d.kind == "mixture");
  REQUIRE(d.part("router") != nullptr);
  CHECK(d.part("router")->kind == "unit");
  CHECK(describe(from_description<Lora>(d)) == d);
}

TEST_CASE("a rule with kind and fields makes its router describable, one without does not") {
  using Router = mole::RuleRouter<double, AboveRule>;
  const Router router({.width = 3, .experts = 2, .bias = true, .rule = {.threshold = 0.75}});
  const Description d = describe(router);
  CHECK(to_json(d) == R"({"kind":"above","width":3,"experts":2,"bias":true,"threshold":0.75})");
  CHECK(from_description<Router>(d).config().rule.threshold == 0.75);
  CHECK(thrown([&] { from_description<Router>(without(d, "threshold")); }) ==
        R"(config_error: "above": field "threshold" is missing)");
  STATIC_REQUIRE(mole::DescribableConfig<Router::Config>);
  STATIC_REQUIRE_FALSE(mole::DescribableConfig<mole::RuleRouter<double, SilentRule>::Config>);
}

TEST_CASE("JSON that is no description is refused") {
  const auto error = [](std::string_view json) {
    return thrown([&] { mole::description_from_json(json, "f.json"); });
  };
  CHECK(error("{\"kind\":\"a\",\"kind\":\"b\"}") ==
        "format_error: f.json: has the key \"kind\" twice");
  CHECK(error("{}") == "config_error: f.json: \"kind\" is missing");
  CHECK(error("[]") == "format_error: f.json: must hold an object");
  CHECK(error("{\"kind\":3}") == "config_error: f.json: \"kind\": expected a string, found 3");
  CHECK(error("{\"kind\":\"a\",\"x\":null}") ==
        "config_error: f.json: field \"x\": expected true, false, a number, a string or a list, "
        "found null");
  CHECK(error("{\"kind\":\"a\",\"x\":[1,\"b\"]}") ==
        "config_error: f.json: field \"x\": expected a list of numbers, found a string");
  CHECK(error("{\"kind\":\"a\",\"x\":9223372036854775808}") ==
        "config_error: f.json: field \"x\": expected an integer of 64 bits with sign, found "
        "9223372036854775808");
  CHECK(error("{\"kind\":\"a\",\"x\":NaN}").starts_with("format_error: f.json: holds NaN"));
  CHECK(error("{\"kind\":\"a\",\"x\":1e999}").starts_with("format_error: f.json: is not JSON"));
  CHECK(error("{\"kind\":\"\xff\"}").starts_with("format_error: f.json: is not UTF-8"));
  std::string deep = "{\"kind\":\"a\",\"p\":";
  for (int i = 0; i < 40; ++i) deep += "{\"kind\":\"a\",\"p\":";
  CHECK(error(deep).starts_with("format_error: f.json: nested deeper than"));
}

TEST_CASE("what JSON cannot hold is not written") {
  Description d{
      .kind = "a", .fields = {{"x", std::numeric_limits<double>::infinity()}}, .parts = {}};
  CHECK(thrown([&] { to_json(d); }) ==
        "numeric_error: field \"x\": expected a finite number, got inf");
  d.fields = {{"x", std::string("\xc3")}};
  CHECK(thrown([&] { to_json(d); }) == "format_error: \"\\xc3\" is not UTF-8");
  d.fields = {{"kind", std::string("b")}};
  CHECK(thrown([&] { to_json(d); }) == "config_error: the name \"kind\" is there twice");
}
