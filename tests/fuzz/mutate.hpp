// SPDX-License-Identifier: Apache-2.0
// Mutations that know the structure of an input, so that most mutants get past the first check.
#pragma once

#include <array>
#include <cstdint>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "io/file_builder.hpp"

extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t max);

namespace test::fuzz {

using Dice = std::minstd_rand;

inline std::size_t below(Dice& dice, std::size_t limit) {
  return limit == 0 ? 0 : dice() % limit;
}

/// libFuzzer's own mutation, up to `room` more bytes.
inline void mutate_bytes(std::string& text, std::size_t room) {
  const std::size_t size = text.size();
  text.resize(size + room);
  text.resize(LLVMFuzzerMutate(reinterpret_cast<std::uint8_t*>(text.data()), size, text.size()));
}

/// Where the runs of digits are.
inline std::vector<std::pair<std::size_t, std::size_t>> numbers_of(const std::string& text) {
  std::vector<std::pair<std::size_t, std::size_t>> numbers;
  const std::string_view digits = "0123456789";
  for (std::size_t at = text.find_first_of(digits); at != std::string::npos;) {
    const std::size_t end = std::min(text.find_first_not_of(digits, at), text.size());
    numbers.emplace_back(at, end - at);
    at = text.find_first_of(digits, end);
  }
  return numbers;
}

/// Replaces one number by one that programs get wrong.
inline void change_number(std::string& text, Dice& dice) {
  static constexpr std::array<std::string_view, 18> kNumbers = {"0",
                                                                "1",
                                                                "2",
                                                                "3",
                                                                "4",
                                                                "6",
                                                                "8",
                                                                "24",
                                                                "-1",
                                                                "1.0",
                                                                "1e2",
                                                                "9",
                                                                "2147483648",
                                                                "4294967296",
                                                                "281474976710656",
                                                                "9223372036854775807",
                                                                "18446744073709551615",
                                                                "18446744073709551616"};
  const auto numbers = numbers_of(text);
  if (numbers.empty()) return;
  const auto [at, length] = numbers[below(dice, numbers.size())];
  text.replace(at, length, kNumbers[below(dice, kNumbers.size())]);
}

/// Doubles, removes or moves a piece between two separators.
inline void change_member(std::string& text, Dice& dice) {
  std::vector<std::size_t> cuts;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] == ',' || text[i] == '{' || text[i] == '[' || text[i] == '}') cuts.push_back(i + 1);
  }
  if (cuts.size() < 2) return;
  std::size_t from = cuts[below(dice, cuts.size())], to = cuts[below(dice, cuts.size())];
  if (from > to) std::swap(from, to);
  const std::string piece = text.substr(from, to - from);
  switch (below(dice, 3)) {
    case 0: text.insert(from, piece); break;
    case 1: text.erase(from, piece.size()); break;
    default: text.insert(cuts[below(dice, cuts.size())], piece);
  }
}

inline void mutate_json(std::string& text, std::size_t room, Dice& dice) {
  switch (below(dice, 4)) {
    case 0: return change_number(text, dice);
    case 1: return change_member(text, dice);
    default: return mutate_bytes(text, room);
  }
}

/// A safetensors file: its header with the length corrected, its data, or its bytes as they are.
inline void mutate_file(std::string& file, std::size_t room, Dice& dice) {
  std::uint64_t length = 0;
  for (std::size_t i = 0; i < 8 && i < file.size(); ++i) {
    length |= std::uint64_t{static_cast<unsigned char>(file[i])} << (8 * i);
  }
  const bool whole = file.size() >= 8 && length <= file.size() - 8;
  if (!whole || below(dice, 8) == 0) return mutate_bytes(file, room);
  std::string header = file.substr(8, length), data = file.substr(8 + length);
  switch (below(dice, 5)) {
    case 0: mutate_bytes(data, room); break;
    case 1: data.resize(below(dice, data.size() + 32)); break;
    default: mutate_json(header, room, dice);
  }
  file = mole::test::container(header, data);
}

/// Copies a mutant into libFuzzer's buffer; the bytes before it stay if it does not fit.
inline std::size_t put_back(const std::string& mutant, std::uint8_t* data, std::size_t size,
                            std::size_t max) {
  if (mutant.size() > max) return size;
  std::copy(mutant.begin(), mutant.end(), data);
  return mutant.size();
}

}  // namespace test::fuzz
