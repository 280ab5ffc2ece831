#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# router_pages.sh <source directory> <compiler>
# The example of every page of docs/routers compiles, as the body of a function that is given what
# docs/routers.md says examples name.
set -eu
cd "$1"
program() {
  cat <<'END'
#include <cstdint>
#include <span>

#include "mole/io/mixture_file.hpp"
#include "mole/mole.hpp"

template <class V>
using View = mole::MatView<V>;
extern const mole::LoraBank<float> bank;
extern const mole::LoraBank<float>::Weights experts;
extern const View<const float> weight, bias, threshold_weight, threshold_bias, noise_weight,
    hidden_weight, hidden_bias, down_weight, embedding, prototypes, threshold, query, key, value;
extern const mole::RecurrentStack<float>::Prepared stack_weights;
extern const View<const float> x, contexts, gates, noise, pathway;
extern const View<float> y, factor;
extern const View<const std::int32_t> table, assignment;
extern const View<const std::uint8_t> forbidden;
extern const std::span<const std::int32_t> ids, sequence_begin;
extern const std::span<const std::uint8_t> mask, rows;
extern const std::span<const float> selection_bias, uniform;
extern const std::uint64_t step;
extern mole::Workspace& memory;
extern const mole::Context& context;
END
  for page in docs/routers/*.md; do
    echo "void page_$(basename "$page" .md)() {"
    echo "#line 1 \"$page\""
    awk '/^```cpp$/ { inside = 1; print ""; next } /^```$/ { inside = 0 } { print inside ? $0 : "" }' \
      "$page"
    echo "}"
  done
}
[ "$(program | grep -c '^void page_')" -gt 1 ] || { echo "no pages found"; exit 1; }
program | "$2" -std=c++20 -I include -x c++ -fsyntax-only -
echo "$(program | grep -c '^void page_') examples compile"
