// SPDX-License-Identifier: Apache-2.0
#include "fuzz/mutate.hpp"
#include "fuzz/targets.hpp"

using namespace test::fuzz;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  run_peft_folder(bytes_of(data, size));
  return 0;
}

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size,
                                               std::size_t max, unsigned seed) {
  Dice dice(seed);
  const FolderInput parts = split_folder(bytes_of(data, size));
  std::string config(as_text(parts.config)), file(as_text(parts.tensors));
  if (below(dice, 2) == 0) {
    mutate_json(config, max - size, dice);
  } else {
    mutate_file(file, max - size, dice);
  }
  const std::string input = mole::test::length_bytes(config.size()).substr(0, 4) + config + file;
  return put_back(input, data, size, max);
}
