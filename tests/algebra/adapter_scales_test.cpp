// SPDX-License-Identifier: Apache-2.0
#include "mole/algebra/adapter_scales.hpp"

#include <limits>
#include <vector>

#include "support/catch.hpp"

namespace {

using mole::AdapterScales;
using mole::Index;
using mole::MatView;

AdapterScales three() {
  return AdapterScales({{"a", 2.0}, {"b", -1.5}, {"zero", 0.0}});
}

std::vector<double> gates_of(const AdapterScales& scales) {
  std::vector<double> gates;
  for (Index a = 0; a < scales.adapters(); ++a) gates.push_back(scales.gate(a));
  return gates;
}

}  // namespace

TEST_CASE("adapter scales: each call changes what its rule says", "[algebra]") {
  AdapterScales scales = three();
  CHECK(gates_of(scales) == std::vector<double>{0, 0, 0});
  scales.set_adapter("a");
  CHECK(gates_of(scales) == std::vector<double>{1, 0, 0});
  scales.set_scale("b", 4);
  CHECK(scales.scale(1) == -6.0);
  CHECK(scales.gate(1) == 0.0);
  scales.scale_layer(0.5);
  CHECK(scales.scale(0) == 1.0);
  CHECK(scales.scale(1) == -6.0);
  scales.set_adapter(std::vector<std::string>{"b", "a", "elsewhere"});
  CHECK(gates_of(scales) == std::vector<double>{0.5, 4, 0});
  scales.unscale_layer(2);
  CHECK(gates_of(scales) == std::vector<double>{0.25, 2, 0});
  scales.set_scale("a", 3);
  scales.set_scale("a", -1);
  scales.set_scale("elsewhere", 7);
  CHECK(scales.scale(0) == -2.0);
  scales.set_adapter("b");
  scales.unscale_layer();
  CHECK(scales.scale(1) == -1.5);
  CHECK(scales.scale(0) == -2.0);
}

TEST_CASE("adapter scales: every token gets the same gates", "[algebra]") {
  AdapterScales scales = three();
  scales.set_adapter("b");
  scales.scale_layer(3);
  std::vector<float> memory(12, -1.0f);
  scales.fill_gates(MatView<float>(memory.data(), 3, 3, 4));
  CHECK(memory == std::vector<float>{0, 3, 0, -1, 0, 3, 0, -1, 0, 3, 0, -1});
  CHECK_THROWS_AS(scales.fill_gates(MatView<float>(memory.data(), 3, 2, 4)), mole::Error);
}

TEST_CASE("adapter scales: a scale of zero stays zero", "[algebra]") {
  AdapterScales scales = three();
  scales.set_adapter("zero");
  scales.scale_layer(5);
  CHECK(scales.gate(2) == 0.0);
}

TEST_CASE("adapter scales: names given twice and factors without meaning are refused",
          "[algebra]") {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  CHECK_THROWS_AS(AdapterScales({{"a", 1}, {"a", 2}}), mole::Error);
  CHECK_THROWS_AS(AdapterScales({{"a", kInfinity}}), mole::Error);
  AdapterScales scales = three();
  scales.set_adapter("a");
  CHECK_THROWS_AS(scales.set_adapter(std::vector<std::string>{"b", "b"}), mole::Error);
  CHECK_THROWS_AS(scales.set_scale("a", kInfinity), mole::Error);
  CHECK_THROWS_AS(scales.scale_layer(kInfinity), mole::Error);
  CHECK_THROWS_AS(scales.unscale_layer(0), mole::Error);
  CHECK(gates_of(scales) == std::vector<double>{1, 0, 0});
}
