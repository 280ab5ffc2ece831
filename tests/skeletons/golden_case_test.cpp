// SPDX-License-Identifier: Apache-2.0
#include "skeletons/golden_case.hpp"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "support/catch.hpp"
#include "support/compare.hpp"

namespace skeleton {

namespace {

const char* const kFolder = MOLE_TEST_DATA "/skeletons/cases/";

template <class V>
std::vector<double> widened(const char* data, std::size_t bytes) {
  std::vector<double> values(bytes / sizeof(V));
  for (std::size_t i = 0; i < values.size(); ++i) {
    V value;
    std::memcpy(&value, data + i * sizeof(V), sizeof(V));
    values[i] = static_cast<double>(value);
  }
  return values;
}

std::vector<double> widened(const std::string& dtype, const char* data, std::size_t bytes) {
  if (dtype == "F32") return widened<float>(data, bytes);
  if (dtype == "F64") return widened<double>(data, bytes);
  if (dtype == "I64") return widened<std::int64_t>(data, bytes);
  if (dtype == "U8") return widened<std::uint8_t>(data, bytes);
  throw std::runtime_error("unknown dtype " + dtype);
}

}  // namespace

GoldenCase::GoldenCase(const std::string& name) {
  std::ifstream file(kFolder + name + ".safetensors", std::ios::binary);
  const std::string all{std::istreambuf_iterator<char>(file), {}};
  std::uint64_t size = 0;
  if (all.size() < sizeof size) throw std::runtime_error(name + ": cannot be read");
  std::memcpy(&size, all.data(), sizeof size);
  const auto header = nlohmann::json::parse(all.substr(sizeof size, size));
  const std::string data = all.substr(sizeof size + size);
  for (const auto& [key, entry] : header.items()) {
    if (key == "__metadata__") continue;
    const std::size_t begin = entry.at("data_offsets").at(0), end = entry.at("data_offsets").at(1);
    if (begin > end || end > data.size()) throw std::runtime_error(name + ": too short");
    tensors_[key] = {entry.at("shape").get<std::vector<Index>>(),
                     widened(entry.at("dtype"), data.data() + begin, end - begin)};
  }
  const auto about = nlohmann::json::parse(header.at("__metadata__").at("case").get<std::string>());
  relative_ = about.at("tolerance").at("f64").at("rel");
  absolute_ = about.at("tolerance").at("f64").at("abs");
  for (const auto& [key, value] : about.at("config").items()) {
    if (value.is_string()) texts_[key] = value;
    if (value.is_number()) numbers_[key] = value;
    if (value.is_boolean()) numbers_[key] = value.get<bool>() ? 1 : 0;
  }
}

std::vector<std::string> GoldenCase::names(const std::string& prefix) {
  std::vector<std::string> found;
  for (const auto& entry : std::filesystem::directory_iterator(kFolder)) {
    const std::string name = entry.path().stem().string();
    if (name.starts_with(prefix)) found.push_back(name);
  }
  std::sort(found.begin(), found.end());
  return found;
}

Index GoldenCase::extent(const std::string& tensor, std::size_t axis) const {
  return tensors_.at(tensor).shape.at(axis);
}

MatView<const double> GoldenCase::matrix(const std::string& tensor) const {
  const auto found = tensors_.find(tensor);
  if (found == tensors_.end()) return {};
  const std::vector<Index>& shape = found->second.shape;
  Index rows = 1;
  for (std::size_t i = 0; i + 1 < shape.size(); ++i) rows *= shape[i];
  return {found->second.values.data(), rows, shape.empty() ? 1 : shape.back()};
}

MatView<const double> GoldenCase::slice(const std::string& tensor, Index i) const {
  const MatView<const double> all = matrix(tensor);
  const Index rows = all.rows / extent(tensor, 0);
  return all.row_block(i * rows, rows);
}

std::string GoldenCase::compare(const std::string& what, MatView<const double> expected,
                                MatView<const double> got) const {
  const std::string text = test::difference(got, expected, {relative_, absolute_});
  return text.empty() ? text : what + text;
}

std::string GoldenCase::difference(const std::string& tensor, MatView<const double> got) const {
  return has(tensor) ? compare(tensor, matrix(tensor), got) : tensor + ": not in the case";
}

std::string GoldenCase::slice_difference(const std::string& tensor, Index i,
                                         MatView<const double> got) const {
  if (!has(tensor)) return tensor + ": not in the case";
  return compare(tensor + "[" + std::to_string(i) + "]", slice(tensor, i), got);
}

TEST_CASE("a golden case names the worst element", "[skeletons]") {
  const GoldenCase c("router.expert_choice__tie");
  CHECK(c.number("capacity") == 2);
  CHECK(c.text("score") == "softmax_experts");
  const MatView<const double> gate = c.matrix("out.gate");
  REQUIRE(gate.rows == 4);
  CHECK(c.difference("out.gate", gate).empty());
  std::vector<double> other(gate.data, gate.data + gate.size());
  other[5] += 1e-6;
  CHECK_THAT(c.difference("out.gate", MatView<const double>(other.data(), 4, 2)),
             Catch::Matchers::ContainsSubstring("out.gate[2, 1]"));
  CHECK_THROWS(GoldenCase("router.expert_choice__absent"));
}

}  // namespace skeleton
