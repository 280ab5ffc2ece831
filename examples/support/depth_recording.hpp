// SPDX-License-Identifier: Apache-2.0
// examples/data/hidden.safetensors: what 64 tokens of four texts look like at every depth of a
// language model; and what is said and drawn about routers that follow them down.
#pragma once

#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "mole/io/safetensors.hpp"

/// Hidden states [depths, tokens, width], every row scaled to the mean square 1 as the layers' own
/// norms do it. The first 48 tokens, 12 of each text, are there to learn from, 16 to be tested on.
class DepthRecording {
 public:
  static constexpr mole::Index kDepths = 31, kTokens = 64, kLearning = 48, kWidth = 576;

  explicit DepthRecording(const std::string& path) {
    const mole::SafeTensors file = mole::SafeTensors::open(path);
    const auto hidden = file.read<float>("hidden");
    const auto label = file.read<std::int64_t>("label");
    std::vector<mole::Index> order;
    for (const bool learning : {true, false}) {
      for (mole::Index t = 0; t < kTokens; ++t) {
        if ((t % 4 != 3) == learning) order.push_back(t);
      }
    }
    for (const mole::Index t : order) label_.push_back(static_cast<std::int32_t>(label[t]));
    for (mole::Index depth = 0; depth < kDepths; ++depth) {
      for (const mole::Index t : order) add_row(hidden.data() + (depth * kTokens + t) * kWidth);
    }
  }

  /// The first `tokens` at one depth.
  mole::MatView<const float> at(mole::Index depth, mole::Index tokens) const {
    return {states_.data() + depth * kTokens * kWidth, tokens, kWidth};
  }
  std::span<const std::int32_t> labels(mole::Index tokens) const {
    return std::span(label_).first(static_cast<std::size_t>(tokens));
  }

 private:
  void add_row(const float* row) {
    double square = 0;
    for (mole::Index i = 0; i < kWidth; ++i) square += static_cast<double>(row[i]) * row[i];
    const auto scale = static_cast<float>(1 / std::sqrt(square / kWidth));
    for (mole::Index i = 0; i < kWidth; ++i) states_.push_back(scale * row[i]);
  }

  std::vector<float> states_;
  std::vector<std::int32_t> label_;
};

/// The expert that one router gave every token at every depth.
struct Choices {
  using R = DepthRecording;
  std::string name;
  std::vector<std::int32_t> expert = std::vector<std::int32_t>(R::kDepths * R::kTokens);

  std::int32_t& at(mole::Index depth, mole::Index token) {
    return expert[depth * R::kTokens + token];
  }
  std::int32_t at(mole::Index depth, mole::Index token) const {
    return expert[depth * R::kTokens + token];
  }

  /// Share of the tokens to be tested on that have the expert of their text.
  std::vector<double> accuracy(const R& recorded) const {
    std::vector<double> share(R::kDepths);
    const auto labels = recorded.labels(R::kTokens);
    for (mole::Index depth = 0; depth < R::kDepths; ++depth) {
      for (mole::Index t = R::kLearning; t < R::kTokens; ++t) {
        share[depth] += (at(depth, t) == labels[t]) / double(R::kTokens - R::kLearning);
      }
    }
    return share;
  }
  /// Share of all tokens that keep their expert from this depth to the next.
  std::vector<double> keeping() const {
    std::vector<double> share(R::kDepths - 1);
    for (mole::Index depth = 0; depth + 1 < R::kDepths; ++depth) {
      for (mole::Index t = 0; t < R::kTokens; ++t) {
        share[depth] += (at(depth, t) == at(depth + 1, t)) / double(R::kTokens);
      }
    }
    return share;
  }
  /// Mean number of depths that a token stays with an expert.
  double stay() const {
    double changes = 0;
    for (const double share : keeping()) changes += (1 - share) * R::kTokens;
    return R::kDepths * R::kTokens / (R::kTokens + changes);
  }
};

inline void print_by_depth(const DepthRecording& recorded, const Choices& a, const Choices& b) {
  fmt::print("Share of unseen tokens with the expert of their text\ndepth {:>14} {:>14}\n", a.name,
             b.name);
  const auto first = a.accuracy(recorded), second = b.accuracy(recorded);
  for (std::size_t depth = 0; depth < first.size(); depth += 3) {
    fmt::print("{:5} {:14.2f} {:14.2f}\n", depth, first[depth], second[depth]);
  }
  fmt::print("A token keeps its expert for {:.1f} depths ({}), {:.1f} ({})\n", a.stay(), a.name,
             b.stay(), b.name);
}

/// Lines from 0 to 1 over the depths, one panel below the other.
inline std::string depth_svg(const DepthRecording& recorded, const std::vector<Choices>& routers) {
  constexpr int kWidth = 640, kPanel = 220, kLeft = 50, kTop = 40, kPlot = 150, kStep = 18;
  const char* const colours[] = {"#0072B2", "#D55E00"};
  std::string svg = fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{}\" "
      "font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" "
      "fill=\"white\"/>\n",
      kWidth, 2 * kPanel);
  const auto panel = [&](int top, const char* title, auto values) {
    svg +=
        fmt::format("<text x=\"{}\" y=\"{}\" font-size=\"14\">{}</text>\n", kLeft, top - 16, title);
    for (int tenth = 0; tenth <= 10; tenth += 5) {
      const int y = top + kPlot - tenth * kPlot / 10;
      svg += fmt::format(
          "<text x=\"{}\" y=\"{}\">{:.1f}</text>\n<path d=\"M{} {}h{}\" stroke=\"#ccc\"/>\n",
          kLeft - 28, y + 4, tenth / 10.0, kLeft, y, kStep * 30);
    }
    for (int depth = 0; depth <= 30; depth += 5) {
      svg += fmt::format("<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>\n",
                         kLeft + kStep * depth, top + kPlot + 16, depth);
    }
    for (std::size_t i = 0; i < routers.size(); ++i) {
      std::string path;
      const std::vector<double> line = values(routers[i]);
      for (std::size_t depth = 0; depth < line.size(); ++depth) {
        path += fmt::format("{}{} {:.1f}", depth == 0 ? "M" : " L", kLeft + kStep * depth,
                            top + kPlot * (1 - line[depth]));
      }
      svg += fmt::format(
          "<path d=\"{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"2\"/>\n"
          "<text x=\"{}\" y=\"{}\" fill=\"{}\">{}</text>\n",
          path, colours[i], kLeft + 400, top + kPlot - 30 + 16 * i, colours[i], routers[i].name);
    }
  };
  panel(kTop, "Unseen tokens with the expert of their text, by depth",
        [&](const Choices& c) { return c.accuracy(recorded); });
  panel(kTop + kPanel, "Tokens that keep their expert to the next depth",
        [](const Choices& c) { return c.keeping(); });
  return svg + "</svg>\n";
}
