#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# include_order.sh <source directory>
# Includes of the public headers point only downward: core, kernels, routing, then routers, experts
# and losses, then layers, then algebra, adapt, optim, stats and io, then c. Routers do not include
# each other, nor do experts: only top_k.hpp its own top_k_*.hpp, everybody the concept, and a bank
# those it is made of (made_of below).
# Definitions of the header-only build (*_portable.hpp under MOLE_HEADER_ONLY) are exempt, and so
# are the entry points directly in include/mole, which nobody below includes (but version.hpp).
set -eu
cd "$1/include/mole"
find . -name '*.h*' | sort | xargs awk '
  BEGIN {
    split("core kernels routing routers experts losses layers algebra adapt optim stats io c", name)
    split("1    2       3       4       4       4      5      6       6     6     6     6  7", level)
    for (i in name) rank[name[i]] = level[i]
    rank["version.hpp"] = 1
    made_of["ffn_bank linear_bank"] = made_of["linear_bank lora_bank"] = 1
  }
  function stem(path) { sub(/.*\//, "", path); sub(/\.h.*/, "", path); return path }
  function wrong(why) { print file ":" FNR ": includes " to ": " why; failures++ }
  FNR == 1 { file = substr(FILENAME, 3); header_only = 0; split(file, from_part, "/"); files++ }
  /^# *(ifdef|if defined\(?) *MOLE_HEADER_ONLY/ { header_only = 1 }
  /^# *(else|endif)/ { header_only = 0 }
  /^# *include "/ {
    to = $0; sub(/^[^"]*"/, "", to); sub(/".*/, "", to); includes++
    if (to !~ /^mole\//) { wrong("a public header includes mole/..., nothing else in quotes"); next }
    sub(/^mole\//, "", to); split(to, part, "/"); a = from_part[1]; b = part[1]
    if (a ~ /\.h/) next
    if (!(a in rank)) { wrong("the folder " a " has no place in the order"); next }
    if (!(b in rank)) { wrong("an entry point, or a folder without a place in the order"); next }
    if (header_only && to ~ /_portable\.hpp$/) next
    if (a != b && rank[b] >= rank[a]) wrong(b " is not below " a)
    if (a == b && (a == "routers" || a == "experts") && to !~ /^experts\/(expert_bank|bank_memory).hpp$/ &&
        index(stem(to), stem(file) "_") != 1 && index(stem(file), stem(to) "_") != 1 &&
        !((stem(file) " " stem(to)) in made_of))
      wrong("siblings in " a " do not include each other")
  }
  END {
    if (!includes) { print "no includes found"; exit 1 }
    printf "%d headers, %d includes, %d against the order\n", files, includes, failures
    exit failures > 0
  }'
