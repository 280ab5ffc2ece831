// SPDX-License-Identifier: Apache-2.0
// Runs every committed input of the fuzz targets once, without a fuzzer.
#include <filesystem>
#include <fstream>
#include <iterator>

#include "fuzz/targets.hpp"
#include "support/catch.hpp"

namespace {

std::string contents(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

int replay(const std::string& target, void (*run)(std::span<const std::byte>)) {
  int count = 0;
  const std::string folder = std::string(MOLE_TEST_DATA) + "/fuzz/corpus/" + target;
  for (const auto& item : std::filesystem::directory_iterator(folder)) {
    INFO(item.path().filename().string());
    const std::string input = contents(item.path());
    CHECK_NOTHROW(run(mole::test::as_bytes(input)));
    ++count;
  }
  return count;
}

}  // namespace

TEST_CASE("fuzz: every input of the corpus of safetensors", "[fuzz][io]") {
  CHECK(replay("safetensors", test::fuzz::run_safetensors) >= 20);
}
TEST_CASE("fuzz: every input of the corpus of peft_config", "[fuzz][io]") {
  CHECK(replay("peft_config", test::fuzz::run_peft_config) >= 20);
}
TEST_CASE("fuzz: every input of the corpus of peft_folder", "[fuzz][io]") {
  CHECK(replay("peft_folder", test::fuzz::run_peft_folder) >= 10);
}
