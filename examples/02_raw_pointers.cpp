// SPDX-License-Identifier: Apache-2.0
// Inside somebody else's engine: raw float pointers, the engine's own buffers and its own threads.
// The engine has computed y = x Wᵀ; the mixture is added to it in place, without allocation.
#include <fmt/core.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "mole/io/peft_bank.hpp"
#include "mole/layers/mixture.hpp"
#include "mole/routers/top_k.hpp"
#include "support/recording.hpp"

using namespace mole;

// The engine's pool: here, threads that take chunks from a counter until none is left.
struct EnginePool {
  int threads;

  static void parallel_for(void* pool, Index count, Index grain, RangeBody body, void* closure) {
    std::atomic<Index> next{0};
    const auto work = [&](int worker) {
      for (Index begin; (begin = next.fetch_add(grain)) < count;) {
        body(closure, begin, std::min(begin + grain, count), worker);
      }
    };
    std::vector<std::thread> others;
    const int threads = static_cast<EnginePool*>(pool)->threads;
    for (int worker = 1; worker < threads; ++worker) others.emplace_back(work, worker);
    work(0);
    for (auto& thread : others) thread.join();
  }
};

int main() {
  const std::string data = MOLE_EXAMPLE_DATA;
  const Recording recorded(data + "/layer.safetensors");
  std::vector<PeftAdapter> adapters;
  for (const char* name : {"german", "kjv", "python", "cpp"})
    adapters.push_back(load_peft(data + "/adapters/" + name));
  const AdapterBank<float> experts(adapters, "model.layers.20.mlp.down_proj");
  const auto router = recorded.matrix("router.weight"), x = recorded.matrix("in.x");

  // Setup, once: ask for sizes, hand over memory, pack the weights.
  const Index tokens = 64, in = 1536, out = 576;
  const int workers = 3;
  const Mixture layer(TopKRouter<float>({.width = in, .experts = 4, .k = 2}), experts.bank());
  std::vector<std::byte> prepared_memory(layer.prepared_bytes());
  std::vector<std::byte> scratch_memory(layer.scratch_bytes(tokens, workers));
  Workspace packing(prepared_memory), scratch(scratch_memory);
  const auto prepared = layer.prepare({{router.view(), {}}, experts.weights()}, packing);

  // Every step of the engine: its y gets the mixture added. Rows may have any stride.
  const float* engine_x = x.view().data;
  const Index engine_stride = out + 24;
  std::vector<float> engine_y(static_cast<std::size_t>(tokens * engine_stride));
  EnginePool pool{workers};
  const Context on_pool{
      .scratch = scratch, .workers = workers, .hook = &EnginePool::parallel_for, .pool = &pool};
  layer.forward(prepared, MatView<const float>(engine_x, tokens, in),
                MatView<float>(engine_y.data(), tokens, out, engine_stride), nullptr, on_pool);

  // The same tokens one at a time on one thread: the same bits.
  const Context alone{.scratch = scratch};
  Index different = 0, untouched = 0;
  for (Index t = 0; t < tokens; ++t) {
    float y[576] = {};
    layer.forward(prepared, MatView<const float>(engine_x + t * in, 1, in),
                  MatView<float>(y, 1, out), nullptr, alone);
    untouched += std::ranges::count(y, 0.0f) == out;
    different += std::memcmp(y, engine_y.data() + t * engine_stride, sizeof(y)) != 0;
  }
  fmt::print("{} tokens on {} threads of a foreign pool; {} of them differ from a token alone\n",
             tokens, workers, different);
  return different + untouched == 0 ? 0 : 1;
}
