// SPDX-License-Identifier: Apache-2.0
// Every allocation fails in turn: the first, the second, and so on until the call succeeds; each
// once alone, and once with all that follow. The caller sees std::bad_alloc or out_of_memory, and
// nothing is left behind, neither memory nor open files.
#include <filesystem>
#include <iterator>
#include <new>

#include "bad_inputs/adapter_case.hpp"
#include "layers/layer_case.hpp"
#include "mole/io/peft_bank.hpp"
#include "mole/io/peft_writer.hpp"
#include "mole/io/safetensors_writer.hpp"
#include "mole/layers/any_layer.hpp"
#include "mole/layers/session.hpp"
#include "support/alloc_counter.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"

namespace {

using namespace test;
using bad_inputs::AdapterCase;
using bad_inputs::kQ;
using mole::Index;
using mole::test::TemporaryFolder;

long open_files() {
  namespace fs = std::filesystem;
  return std::distance(fs::directory_iterator("/proc/self/fd"), fs::directory_iterator());
}

enum class Result { done, out_of_memory, other };

template <class F>
Result result_of(F&& attempt) {
  try {
    attempt();
    return Result::done;
  } catch (const std::bad_alloc&) {
    return Result::out_of_memory;
  } catch (const mole::Error& error) {
    return error.code() == mole::Errc::out_of_memory ? Result::out_of_memory : Result::other;
  }
}

/// Returns how many allocations `attempt` makes.
template <class F>
long fail_every_allocation(F&& attempt) {
  REQUIRE(result_of(attempt) == Result::done);  // makes what is made once
  long n = 0;
  for (const bool for_ever : {false, true}) {
    bool came = true;
    for (n = 0; came && n < 100'000; ++n) {
      const long live = live_allocations(), bytes = live_bytes(), files = open_files();
      Result result = Result::other;
      {
        const FailingAllocations failing(n + 1, for_ever);
        result = result_of(attempt);
        came = failing.came();
      }
      const long left = live_allocations() - live, left_bytes = live_bytes() - bytes;
      CAPTURE(n, for_ever);
      CHECK(left == 0);
      CHECK(left_bytes == 0);
      CHECK(open_files() == files);
      CHECK(result != Result::other);
      CHECK((came || result == Result::done));  // stable_sort does without its memory
      if (result == Result::other) return n;
    }
    CHECK_FALSE(came);
  }
  return n - 1;
}

constexpr Index kIn = 13, kOut = 11, kTokens = 5;

TopKMixture<float> mixture() {
  return TopKMixture<float>(mole::TopKRouter<float>({.width = kIn, .experts = 4, .k = 2}),
                            make_bank<float>(kIn, kOut, 4));
}

}  // namespace

TEST_CASE("out of memory: loading an adapter", "[bad_inputs][io]") {
  const AdapterCase adapter;
  const TemporaryFolder folder;
  adapter.write(folder);
  CHECK(fail_every_allocation([&] { adapter.load(folder); }) > 50);
  CHECK(adapter.load(folder).modules().size() == 2);
}

TEST_CASE("out of memory: reporting on an adapter", "[bad_inputs][io]") {
  const AdapterCase adapter;
  const TemporaryFolder folder;
  adapter.write(folder);
  const mole::PeftAdapter loaded = adapter.load(folder);
  const std::string report = loaded.report().to_json();
  CHECK(fail_every_allocation([&] { static_cast<void>(loaded.report().to_json()); }) > 20);
  CHECK(loaded.report().to_json() == report);
}

TEST_CASE("out of memory: reading and writing a file", "[bad_inputs][io]") {
  const AdapterCase adapter;
  const TemporaryFolder folder;
  const std::string bytes = mole::test::container(adapter.tensors);
  const std::string path = folder.write("file", bytes);
  const auto span = mole::test::as_bytes(bytes);
  CHECK(fail_every_allocation([&] { mole::SafeTensors::open(path); }) > 20);
  CHECK(fail_every_allocation([&] { mole::SafeTensors::map(path); }) > 20);
  CHECK(fail_every_allocation([&] { mole::SafeTensors::parse(span, "file"); }) > 20);
  const auto file = mole::SafeTensors::open(path);
  const std::string copy = folder.write("copy", "old");
  CHECK(fail_every_allocation([&] {
          mole::SafeTensorsWriter writer;
          writer.set_metadata("key", "value");
          for (const mole::StoredTensor& tensor : file.tensors()) writer.add(tensor);
          writer.save(copy);
        }) > 20);
  CHECK(mole::SafeTensors::open(copy).tensors().size() == file.tensors().size());
  namespace fs = std::filesystem;
  CHECK(std::distance(fs::directory_iterator(folder.path()), fs::directory_iterator()) == 2);
}

TEST_CASE("out of memory: writing an adapter's folder", "[bad_inputs][io]") {
  namespace fs = std::filesystem;
  const AdapterCase adapter;
  const TemporaryFolder folder, saved;
  adapter.write(folder);
  const mole::PeftAdapter loaded = adapter.load(folder);
  const std::string target = saved.path() + "/adapter";
  mole::PeftSaveOptions options;
  options.overwrite = true;
  CHECK(fail_every_allocation([&] { mole::save_peft(target, loaded, options); }) > 50);
  saved.write("adapter/README.md", "a card");
  CHECK(fail_every_allocation([&] { mole::save_peft(target, loaded, options); }) > 50);
  CHECK(mole::load_peft(target).modules().size() == 2);
  CHECK(fs::exists(target + "/README.md"));
  CHECK(std::distance(fs::directory_iterator(saved.path()), fs::directory_iterator()) == 1);
}

TEST_CASE("out of memory: a bank of adapters", "[bad_inputs][io]") {
  const AdapterCase adapter;
  const TemporaryFolder folder;
  adapter.write(folder);
  const std::vector<mole::PeftAdapter> adapters = {adapter.load(folder), adapter.load(folder)};
  CHECK(fail_every_allocation([&] { mole::AdapterBank<float>(adapters, kQ); }) >= 3);
  CHECK(mole::AdapterBank<float>(adapters, kQ).weights().down_of(1)(0, 1) == 0.5f);
}

TEST_CASE("out of memory: layers, sessions, layers of any type", "[bad_inputs][layers]") {
  LayerCase<TopKMixture<float>> layer(mixture(), kTokens);
  const auto weights = layer.weights();
  CHECK(fail_every_allocation(mixture) >= 3);
  CHECK(fail_every_allocation([&] { mole::AdaptedLinear<TopKMixture<float>>{mixture()}; }) >= 3);
  for (const bool training : {false, true}) {
    const mole::SessionOptions options = {.max_tokens = kTokens, .training = training};
    CHECK(fail_every_allocation([&] { mole::Session(layer.layer, weights, options); }) >= 3);
  }
  CHECK(fail_every_allocation([&] { mole::AnyLayer<float>(layer.layer, weights); }) >= 3);
}

TEST_CASE("out of memory: a session works where nothing can be allocated", "[bad_inputs][layers]") {
  LayerCase<TopKMixture<float>> layer(mixture(), kTokens);
  const Matrix<float> x = normal_matrix<float>(kTokens, kIn, 1);
  const Matrix<float> y0 = normal_matrix<float>(kTokens, kOut, 2);
  const Matrix<float> want = layer.infer(x, y0);
  const auto weights = layer.weights();
  Matrix<float> y = y0, dx(kTokens, kIn);
  mole::Session session(layer.layer, weights, {.max_tokens = kTokens, .training = true});
  {
    const FailingAllocations failing(1, true);
    session.update(weights);
    session.forward(x, y);
    session.backward(weights, x, y0, {.x = dx}, layer.grad);
  }
  CHECK(bit_difference(y, want) == "");
}

TEST_CASE("out of memory: what was read before stays usable", "[bad_inputs][io]") {
  const AdapterCase adapter;
  const TemporaryFolder folder;
  adapter.write(folder);
  const mole::PeftAdapter loaded = adapter.load(folder);
  const std::string& tensor = loaded.at(kQ).down_tensor;
  CHECK(fail_every_allocation([&] { loaded.file().read<float>(tensor); }) == 1);
  CHECK(fail_every_allocation([&] { const mole::PeftAdapter copy = loaded; }) > 10);
  CHECK(loaded.file().read<float>(tensor)[1] == 0.5f);
}
