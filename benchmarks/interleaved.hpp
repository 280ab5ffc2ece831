// SPDX-License-Identifier: Apache-2.0
// Side-by-side timing: the candidates take turns within one run, so that drift of the machine hits
// all of them alike. Results are medians; compare ratios, not times.
#pragma once

#include <algorithm>
#include <chrono>
#include <functional>
#include <vector>

namespace bench {

inline double seconds(const std::function<void()>& call, int repeats) {
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < repeats; ++i) call();
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  return elapsed.count() / repeats;
}

/// Median seconds per call of every candidate over `rounds` turns of at least `turn` seconds each.
inline std::vector<double> interleaved(const std::vector<std::function<void()>>& candidates,
                                       int rounds = 9, double turn = 0.004) {
  std::vector<std::vector<double>> times(candidates.size());
  std::vector<int> repeats;
  for (const auto& call : candidates) {
    call();
    repeats.push_back(std::max(1, static_cast<int>(turn / std::max(seconds(call, 1), 1e-7))));
  }
  for (int round = 0; round < rounds; ++round) {
    for (std::size_t c = 0; c < candidates.size(); ++c) {
      times[c].push_back(seconds(candidates[c], repeats[c]));
    }
  }
  std::vector<double> medians;
  for (auto& t : times) {
    std::nth_element(t.begin(), t.begin() + static_cast<std::ptrdiff_t>(t.size() / 2), t.end());
    medians.push_back(t[t.size() / 2]);
  }
  return medians;
}

}  // namespace bench
