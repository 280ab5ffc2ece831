// SPDX-License-Identifier: Apache-2.0
// What does loading an adapter of 100 MB (448 tensors, F32) cost?
//
//   open / read    SafeTensors::open against reading the file into memory allocated the same way
//   map / read     SafeTensors::map, without touching the tensors
//   allocated      bytes that one call asks of operator new
//
// The file lies in the page cache: nothing waits for a disk. Goals: open at most 1.3 x reading, a
// mapped load below 1 MB.
//
// usage: load_bench [folder]      where the file is put for the time of the run
#include <fcntl.h>
#include <fmt/core.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "interleaved.hpp"
#include "mole/core/workspace.hpp"
#include "mole/io/safetensors.hpp"
#include "mole/io/safetensors_writer.hpp"

namespace {

std::size_t allocated = 0;

void* counted(std::size_t bytes, std::size_t alignment) {
  allocated += bytes;
  void* memory = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  return memory != nullptr ? memory : throw std::bad_alloc();
}

}  // namespace

void* operator new(std::size_t bytes) {
  return counted(bytes, alignof(std::max_align_t));
}
void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return counted(bytes, static_cast<std::size_t>(alignment));
}
void operator delete(void* memory) noexcept {
  std::free(memory);
}
void operator delete(void* memory, std::size_t) noexcept {
  std::free(memory);
}
void operator delete(void* memory, std::align_val_t) noexcept {
  std::free(memory);
}
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept {
  std::free(memory);
}

namespace {

using mole::SafeTensors;

void write_adapter(const std::string& path) {
  constexpr mole::Index kRank = 14, kWidth = 4096;
  const std::vector<float> weights(kRank * kWidth, 0.25f);
  mole::SafeTensorsWriter writer;
  for (int layer = 0; layer < 32; ++layer) {
    for (const char* module :
         {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
          "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}) {
      const std::string name = fmt::format("base_model.model.model.layers.{}.{}", layer, module);
      writer.add<float>(name + ".lora_A.weight", {weights.data(), kRank, kWidth});
      writer.add<float>(name + ".lora_B.weight", {weights.data(), kWidth, kRank});
    }
  }
  writer.set_metadata("format", "pt");
  writer.save(path);
}

// The whole file in memory as aligned as the library's.
void read_plainly(const std::string& path, std::size_t bytes) {
  constexpr std::align_val_t kAlignment{mole::kAlignment};
  const auto free = [](void* memory) { ::operator delete(memory, kAlignment); };
  const std::unique_ptr<void, decltype(free)> memory(::operator new(bytes, kAlignment), free);
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  std::size_t done = 0;
  while (done < bytes) {
    const ssize_t count = ::read(file, static_cast<std::byte*>(memory.get()) + done, bytes - done);
    if (count <= 0) throw std::runtime_error("cannot read " + path);
    done += static_cast<std::size_t>(count);
  }
  ::close(file);
}

template <class F>
std::size_t allocated_by(F f) {
  const std::size_t before = allocated;
  f();
  return allocated - before;
}

}  // namespace

int main(int argc, char** argv) {
  const std::filesystem::path folder =
      argc > 1 ? std::filesystem::path(argv[1]) : std::filesystem::temp_directory_path();
  const std::string path = (folder / "mole_load_bench.safetensors").string();
  write_adapter(path);
  const auto bytes = static_cast<std::size_t>(std::filesystem::file_size(path));

  const auto read = [&] { read_plainly(path, bytes); };
  const auto open = [&] { SafeTensors::open(path); };
  const auto map = [&] { SafeTensors::map(path); };
  const auto time = bench::interleaved({read, open, map}, 31, 0.03);
  fmt::print("{:.1f} MB, {} tensors, medians of interleaved runs\n",
             static_cast<double>(bytes) * 1e-6, SafeTensors::map(path).tensors().size());
  fmt::print("       milliseconds   / read   allocated MB\n");
  const auto line = [&](const char* name, double seconds, std::size_t memory) {
    fmt::print("{:5} {:14.2f} {:8.2f} {:14.3f}\n", name, seconds * 1e3, seconds / time[0],
               static_cast<double>(memory) * 1e-6);
  };
  line("read", time[0], allocated_by(read));
  line("open", time[1], allocated_by(open));
  line("map", time[2], allocated_by(map));
  std::filesystem::remove(path);
}
