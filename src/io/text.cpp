// SPDX-License-Identifier: Apache-2.0
#include "io/text.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

namespace mole::inline MOLE_ABI {
namespace io {

std::string escaped(std::string_view text, std::size_t limit) {
  std::string result;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    const bool printable = byte >= 0x20 && byte <= 0x7e;
    const std::string piece = printable ? std::string(1, c) : fmt::format("\\x{:02x}", byte);
    if (result.size() + piece.size() > limit) return result + "...";
    result += piece;
  }
  return result;
}

std::string in_quotes(std::string_view text) {
  return '"' + escaped(text) + '"';
}

std::string shown_path(std::string_view path) {
  return escaped(path, 1000);
}

std::string shape_text(const std::vector<Index>& shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

std::string number_text(double value) {
  return fmt::format("{}", value);
}

namespace {

constexpr std::size_t kMaxCompared = 64;       // bytes of a name that take part in the distance
constexpr std::size_t kMaxCandidates = 20000;  // names that are looked at

void drop_common_ends(std::string_view& a, std::string_view& b) {
  const auto front = std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first - a.begin();
  a.remove_prefix(static_cast<std::size_t>(front));
  b.remove_prefix(static_cast<std::size_t>(front));
  const auto back = std::mismatch(a.rbegin(), a.rend(), b.rbegin(), b.rend()).first - a.rbegin();
  a.remove_suffix(static_cast<std::size_t>(back));
  b.remove_suffix(static_cast<std::size_t>(back));
}

// Levenshtein distance of what differs, cut to kMaxCompared bytes.
std::size_t edit_distance(std::string_view a, std::string_view b) {
  drop_common_ends(a, b);
  const std::size_t cut = std::max(a.size(), b.size()) - std::min(a.size(), b.size());
  if (a.size() > kMaxCompared || b.size() > kMaxCompared) return kMaxCompared + cut;
  std::size_t row[kMaxCompared + 1];
  for (std::size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (std::size_t i = 1; i <= a.size(); ++i) {
    std::size_t diagonal = std::exchange(row[0], i);
    for (std::size_t j = 1; j <= b.size(); ++j) {
      const std::size_t substituted = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({substituted, row[j] + 1, row[j - 1] + 1});
    }
  }
  return row[b.size()];
}

}  // namespace

std::string nearest_text(std::string_view wanted, const std::vector<std::string_view>& names) {
  std::vector<std::pair<std::size_t, std::string_view>> ranked;
  for (const std::string_view name : names) {
    if (ranked.size() == kMaxCandidates) break;
    ranked.emplace_back(edit_distance(wanted, name), name);
  }
  const std::size_t count = std::min<std::size_t>(3, ranked.size());
  std::partial_sort(ranked.begin(), ranked.begin() + static_cast<std::ptrdiff_t>(count),
                    ranked.end());
  if (count == 0) return {};
  std::string result = " (nearest: ";
  for (std::size_t i = 0; i < count; ++i) {
    result += (i == 0 ? "" : ", ") + in_quotes(ranked[i].second);
  }
  return result + ")";
}

namespace {

constexpr std::size_t kWord = sizeof(std::uint64_t);

// A whole word of ASCII, the usual case.
bool is_ascii(std::string_view word) noexcept {
  std::uint64_t bytes = 0;
  if (word.size() < kWord) return false;
  std::memcpy(&bytes, word.data(), kWord);
  return (bytes & 0x8080808080808080u) == 0;
}

}  // namespace

std::size_t first_invalid_utf8(std::string_view text) noexcept {
  const auto byte_at = [text](std::size_t i) {
    return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u;
  };
  for (std::size_t i = 0; i < text.size();) {
    if (is_ascii(text.substr(i, kWord))) {
      i += kWord;
      continue;
    }
    const unsigned lead = byte_at(i);
    const unsigned next = byte_at(i + 1);
    std::size_t length = 1;
    bool valid = lead < 0x80;
    if (lead >= 0xc2 && lead <= 0xdf) {
      length = 2;
      valid = next >= 0x80 && next <= 0xbf;
    } else if (lead >= 0xe0 && lead <= 0xef) {  // no overlong forms, no surrogates
      length = 3;
      valid = next >= (lead == 0xe0 ? 0xa0u : 0x80u) && next <= (lead == 0xed ? 0x9fu : 0xbfu);
    } else if (lead >= 0xf0 && lead <= 0xf4) {  // no overlong forms, nothing above U+10FFFF
      length = 4;
      valid = next >= (lead == 0xf0 ? 0x90u : 0x80u) && next <= (lead == 0xf4 ? 0x8fu : 0xbfu);
    }
    for (std::size_t k = 2; k < length; ++k) valid = valid && (byte_at(i + k) & 0xc0u) == 0x80u;
    if (!valid) return i;
    i += length;
  }
  return std::string_view::npos;
}

}  // namespace io
}  // namespace mole::inline MOLE_ABI
