// SPDX-License-Identifier: Apache-2.0
#include "mole/stats/routing_svg.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <iterator>
#include <string_view>

namespace mole::inline MOLE_ABI {

namespace {

constexpr Index kCellWidth = 58, kCellHeight = 20, kLabelWidth = 92, kHeadHeight = 40;
constexpr Index kRowGap = 34, kMargin = 20;

// Okabe and Ito's palette: distinguishable with every common form of colour vision.
constexpr std::array<std::string_view, 7> kColours = {"#0072B2", "#D55E00", "#009E73", "#CC79A7",
                                                      "#E69F00", "#56B4E9", "#666666"};

/// XML text; with `show_space` white space becomes a visible sign.
std::string escaped(std::string_view text, bool show_space) {
  std::string shown;
  for (const char c : text) {
    switch (c) {
      case ' ': shown += show_space ? "␣" : " "; break;
      case '\n': shown += "⏎"; break;
      case '\t': shown += "⇥"; break;
      case '&': shown += "&amp;"; break;
      case '<': shown += "&lt;"; break;
      case '>': shown += "&gt;"; break;
      case '"': shown += "&quot;"; break;
      default:
        if (static_cast<unsigned char>(c) >= 0x20) shown += c;
    }
  }
  return shown;
}

/// Of UTF-8: the bytes that continue no other.
std::ptrdiff_t code_points(std::string_view text) {
  return std::ranges::count_if(
      text, [](char c) { return (static_cast<unsigned char>(c) & 0xc0u) != 0x80u; });
}

template <class... Args>
void add(std::string& out, fmt::format_string<Args...> format, Args&&... args) {
  fmt::format_to(std::back_inserter(out), format, std::forward<Args>(args)...);
}

template <class T>
void draw_token(std::string& svg, const Routing<T>& routing, Index token, std::string_view text,
                Index x, Index y) {
  const char* size = code_points(text) > 7 ? " style='font-size:10px'" : "";
  add(svg, "<text class='token' x='{}' y='{}'{}>{}</text>\n", x + kCellWidth / 2, y - 8, size,
      escaped(text, true));
  add(svg, "<rect class='frame' x='{}' y='{}' width='{}' height='{}'/>\n", x, y, kCellWidth,
      routing.experts * kCellHeight);
  for (auto s = routing.token_begin[token]; s < routing.token_begin[token + 1]; ++s) {
    const double gate = static_cast<double>(routing.gate[s]);
    if (gate == 0) continue;
    const Index top = y + routing.expert[s] * kCellHeight;
    add(svg, "<rect x='{}' y='{}' width='{}' height='{}' fill='{}' fill-opacity='{:.3f}'/>\n", x,
        top, kCellWidth, kCellHeight, kColours[routing.expert[s] % kColours.size()],
        std::clamp(gate, 0.0, 1.0));
    if (gate < 0.005) continue;  // would read 0.00
    add(svg, "<text class='{}' x='{}' y='{}'>{:.2f}</text>\n", gate > 0.65 ? "light" : "dark",
        x + kCellWidth / 2, top + 14, gate);
  }
}

}  // namespace

template <class T>
std::string routing_svg(const Routing<T>& routing, std::span<const std::string> token_text,
                        std::span<const std::string> expert_names,
                        const RoutingSvgOptions& options) {
  require(options.tokens_per_row > 0, Errc::invalid_argument,
          "routing_svg: tokens_per_row must be positive, got ", options.tokens_per_row);
  const Index per_row = std::min(options.tokens_per_row, std::max<Index>(routing.tokens, 1));
  const Index rows = (routing.tokens + per_row - 1) / per_row;
  require(static_cast<Index>(token_text.size()) == routing.tokens, Errc::shape_mismatch,
          "routing_svg: ", token_text.size(), " token texts for ", routing.tokens, " tokens");
  require(static_cast<Index>(expert_names.size()) == routing.experts, Errc::shape_mismatch,
          "routing_svg: ", expert_names.size(), " names for ", routing.experts, " experts");
  require(options.row_titles.empty() || static_cast<Index>(options.row_titles.size()) == rows,
          Errc::shape_mismatch, "routing_svg: ", options.row_titles.size(), " titles for ", rows,
          " rows");
  const Index row_height = kHeadHeight + routing.experts * kCellHeight + kRowGap;
  const Index width = 2 * kMargin + kLabelWidth + per_row * kCellWidth;
  const Index height = 2 * kMargin + 30 + rows * row_height;

  std::string svg;
  add(svg,
      "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {0} {1}' width='{0}' height='{1}'>\n"
      "<style>text{{font:13px 'DejaVu Sans',sans-serif;fill:#222}} .token{{font:13px "
      "'DejaVu Sans Mono',monospace;text-anchor:middle}} .title{{font-size:18px;font-weight:bold}} "
      ".row{{font-weight:bold}} .light{{fill:#fff;text-anchor:middle;font-size:11px}} "
      ".dark{{text-anchor:middle;font-size:11px}} .name{{text-anchor:end}} "
      ".frame{{fill:#fff;stroke:#ccc}}</style>\n<rect width='{0}' height='{1}' fill='#fff'/>\n",
      width, height);
  add(svg, "<text class='title' x='{}' y='{}'>{}</text>\n", kMargin, kMargin + 12,
      escaped(options.title, false));
  for (Index row = 0; row < rows; ++row) {
    const Index y = kMargin + 30 + row * row_height + kHeadHeight;
    if (!options.row_titles.empty()) {
      add(svg, "<text class='row' x='{}' y='{}'>{}</text>\n", kMargin, y - 8,
          escaped(options.row_titles[row], false));
    }
    for (Index e = 0; e < routing.experts; ++e) {
      add(svg, "<text class='name' x='{}' y='{}' style='fill:{}'>{}</text>\n",
          kMargin + kLabelWidth - 8, y + 14 + e * kCellHeight, kColours[e % kColours.size()],
          escaped(expert_names[e], false));
    }
    for (Index t = row * per_row; t < routing.tokens && t < (row + 1) * per_row; ++t) {
      draw_token(svg, routing, t, token_text[t], kMargin + kLabelWidth + (t % per_row) * kCellWidth,
                 y);
    }
  }
  return svg + "</svg>\n";
}

template std::string routing_svg(const Routing<float>&, std::span<const std::string>,
                                 std::span<const std::string>, const RoutingSvgOptions&);
template std::string routing_svg(const Routing<double>&, std::span<const std::string>,
                                 std::span<const std::string>, const RoutingSvgOptions&);

}  // namespace mole::inline MOLE_ABI
