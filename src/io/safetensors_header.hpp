// SPDX-License-Identifier: Apache-2.0
// The header of a safetensors file, parsed and checked against the size of its data.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "mole/io/safetensors.hpp"

namespace mole::inline MOLE_ABI {
namespace io {

inline constexpr std::uint64_t kHeaderStart = 8;
inline constexpr std::uint64_t kFormatMaxHeader = 100'000'000;
inline constexpr std::size_t kMaxRank = 8;
inline constexpr std::uint64_t kMaxDimension = std::uint64_t{1} << 48;

/// Bits of a tensor; nothing if they overflow 64 bits.
std::optional<std::uint64_t> stored_bits(Dtype dtype, const std::vector<Index>& shape) noexcept;

struct HeaderEntry {
  std::string name;
  Dtype dtype = Dtype::f32;
  std::vector<Index> shape;
  std::uint64_t begin = 0, end = 0;  ///< bytes from the start of the data
};

struct Header {
  std::vector<HeaderEntry> entries;  ///< sorted by name
  std::map<std::string, std::string> metadata;
};

/// The header length in the first 8 bytes, checked against the file's size and the limits. The byte
/// after them, if there is one, helps to recognise other formats.
std::uint64_t header_length(std::span<const std::byte> start, std::uint64_t file_bytes,
                            const std::string& file, const SafeTensorsLimits& limits);

/// `file` is the name that starts every message.
Header parse_header(std::string_view text, std::uint64_t data_bytes, const std::string& file,
                    const SafeTensorsLimits& limits);

}  // namespace io
}  // namespace mole::inline MOLE_ABI
