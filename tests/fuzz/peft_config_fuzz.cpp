// SPDX-License-Identifier: Apache-2.0
#include "fuzz/mutate.hpp"
#include "fuzz/targets.hpp"

using namespace test::fuzz;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  run_peft_config(bytes_of(data, size));
  return 0;
}

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size,
                                               std::size_t max, unsigned seed) {
  Dice dice(seed);
  std::string input(reinterpret_cast<const char*>(data), size);
  mutate_json(input, max - size, dice);
  return put_back(input, data, size, max);
}
