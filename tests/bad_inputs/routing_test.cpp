// SPDX-License-Identifier: Apache-2.0
// Rows 75-77, 111 and 112: a saved router that does not fit its experts, noise, capacity.
#include <algorithm>

#include "bad_inputs/rows.hpp"
#include "layers/layer_case.hpp"
#include "mole/io/mixture_file.hpp"
#include "mole/routers/noisy_top_k.hpp"
#include "mole/routers/switch.hpp"
#include "mole/stats/routing_stats.hpp"
#include "support/compare.hpp"

namespace test::bad_inputs {
namespace {

using mole::Index;
using Words = std::vector<std::string>;

constexpr Index kIn = 13, kOut = 11, kExperts = 4, kTokens = 6;

using Tensors = std::vector<mole::StoredTensor>;

/// A saved mixture with the tensors that `edit` makes of its own.
template <class Edit>
std::vector<std::byte> edited_file(Edit edit) {
  LayerCase<TopKMixture<float>> layer(
      TopKMixture<float>(mole::TopKRouter<float>({.width = kIn, .experts = kExperts, .k = 2}),
                         make_bank<float>(kIn, kOut, kExperts)),
      kTokens);
  mole::MixtureFileWriter writer;
  writer.add("", layer.layer, layer.weights());
  const auto bytes = writer.bytes();
  const auto file = mole::SafeTensors::parse(bytes, "saved");
  mole::SafeTensorsWriter changed;
  for (const auto& [key, value] : file.metadata()) changed.set_metadata(key, value);
  Tensors tensors(file.tensors().begin(), file.tensors().end());
  edit(tensors);
  for (const mole::StoredTensor& tensor : tensors) changed.add(tensor);
  return changed.bytes();
}

void load(const std::vector<std::byte>& bytes) {
  const mole::MixtureFile file(mole::SafeTensors::parse(bytes, "f"));
  file.load<TopKMixture<float>>(file.only());
}

template <class Edit>
Case bad_file(std::string name, mole::Errc code, Words words, Edit edit) {
  const auto bytes = edited_file(edit);
  Refusal refusal{code, std::move(words), [bytes] { load(bytes); }, nullptr, 0, {}};
  refusal.input_bytes = static_cast<long>(8 * bytes.size());
  return {std::move(name), [refusal = std::move(refusal)] { check_refused(refusal); }};
}

mole::StoredTensor& at(Tensors& tensors, const std::string& name) {
  return *std::ranges::find(tensors, name, &mole::StoredTensor::name);
}

void remove(Tensors& tensors, const std::string& name) {
  std::erase_if(tensors, [&](const mole::StoredTensor& tensor) { return tensor.name == name; });
}

std::vector<Row> file_rows() {
  using mole::Errc;
  return {
      {75,
       "experts with holes, or not counted from 0",
       {works("", [] { load(edited_file([](Tensors&) {})); }),
        bad_file("a hole", Errc::config_error, {"\"experts.2.down\"", "missing"},
                 [](Tensors& tensors) {
                   remove(tensors, "experts.2.down");
                   remove(tensors, "experts.2.up");
                 }),
        bad_file("from 1 on", Errc::config_error, {"\"experts.0.down\"", "missing"},
                 [](Tensors& tensors) {
                   at(tensors, "experts.0.down").name = "experts.4.down";
                   at(tensors, "experts.0.up").name = "experts.4.up";
                 })}},
      {76,
       "another number of experts than rows in the router",
       {bad_file("", Errc::shape_mismatch, {"\"router.weight\"", "expected [4, 13]", "[2, 26]"},
                 [](Tensors& tensors) {
                   at(tensors, "router.weight").shape = {2, 26};
                 })}},
      {77,
       "no router, or two",
       {bad_file("none", Errc::config_error, {"\"router.weight\"", "missing"},
                 [](Tensors& tensors) { remove(tensors, "router.weight"); }),
        bad_file("two", Errc::config_error, {"\"router.side.weight\"", "no part of this layer"},
                 [](Tensors& tensors) {
                   tensors.push_back(at(tensors, "router.weight"));
                   tensors.back().name = "router.side.weight";
                 })}},
  };
}

using NoisyMixture = mole::Mixture<mole::NoisyTopKRouter<float>, mole::LoraBank<float>>;

Matrix<float> noisy_output(const Matrix<float>& noise, int workers) {
  LayerCase<NoisyMixture> layer(
      NoisyMixture(mole::NoisyTopKRouter<float>({.width = kIn, .experts = kExperts, .k = 2}),
                   make_bank<float>(kIn, kOut, kExperts)),
      kTokens, workers);
  const Matrix<float> x = normal_matrix<float>(kTokens, kIn, 1);
  NoisyMixture::Buffers buffers;
  buffers.noise = noise;
  return layer.infer(x, normal_matrix<float>(kTokens, kOut, 2), buffers);
}

using SwitchLayer =
    mole::AdaptedLinear<mole::Mixture<mole::SwitchRouter<float>, mole::LoraBank<float>>>;

/// Every token wants expert 0; the first `capacity` of them get it.
void check_capacity(Index capacity) {
  LayerCase<SwitchLayer> layer(
      SwitchLayer(
          {mole::SwitchRouter<float>({.width = kIn, .experts = kExperts, .capacity = capacity}),
           make_bank<float>(kIn, kOut, kExperts)}),
      kTokens);
  const Matrix<float> x = normal_matrix<float>(kTokens, kIn, 1);
  const Matrix<float> nothing(kTokens, kOut);
  const Matrix<float> wants(kTokens, kExperts, [](Index, Index e) { return e == 0 ? 99.0f : 0; });
  const Matrix<std::uint8_t> all(1, kExperts, [](Index, Index) { return 1; });
  mole::LayerInput<float> routed = x, base = x;
  routed.overrides.logit_bias = wants;
  base.overrides.forbidden = all;
  const Matrix<float> y = layer.record(routed, nothing), y_base = layer.infer(base, nothing);
  for (Index t = 0; t < kTokens; ++t) {
    CAPTURE(t);
    const auto row = y.view().row(t), base_row = y_base.view().row(t);
    CHECK(std::equal(row.begin(), row.end(), base_row.begin()) == (t >= capacity));
  }
  mole::RoutingStats stats(kExperts);
  stats.add(layer.tape.routing.view());
  CHECK(stats.idle_tokens() == kTokens - capacity);
  CHECK(stats.count(0) == capacity);
}

std::vector<Row> call_rows() {
  using mole::Errc;
  const auto noise = [](Index rows, Index cols) { return normal_matrix<float>(rows, cols, 7); };
  return {
      {111,
       "gate noise: numbers of the caller, whenever it gives them; the same numbers, the same bits",
       {works("given",
              [=] {
                const auto once = noisy_output(noise(kTokens, kExperts), 1);
                CHECK(bit_difference(noisy_output(noise(kTokens, kExperts), 1), once) == "");
                CHECK(bit_difference(noisy_output(noise(kTokens, kExperts), 3), once) == "");
                CHECK(bit_difference(noisy_output({}, 1), once) != "");
              }),
        refused("of another shape", Errc::shape_mismatch,
                {"noise", "expected [6, 4]", "got [6, 3]"},
                [=] { noisy_output(noise(kTokens, kExperts - 1), 1); })}},
      {112,
       "a capacity that is used up: dropped tokens have the base output and are counted",
       {works("none", [] { check_capacity(0); }), works("two", [] { check_capacity(2); }),
        works("enough", [] { check_capacity(kTokens); }),
        refused("-1", Errc::invalid_argument, {"capacity", "got -1"},
                [] {
                  mole::SwitchRouter<float>({.width = kIn, .experts = kExperts, .capacity = -1});
                })}},
  };
}

}  // namespace

std::vector<Row> routing_rows() {
  std::vector<Row> all = file_rows();
  for (const Row& row : call_rows()) all.push_back(row);
  return all;
}

TEST_CASE("bad inputs: routing", "[bad_inputs][routers]") {
  run(routing_rows());
}

}  // namespace test::bad_inputs
