#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# light_headers.sh <source directory> <compiler>
# Whoever includes any header of the compiled library, the umbrella among them, gets neither Eigen,
# fmt, JSON nor Highway, nor the heavy parts of the standard library.
set -eu
cd "$1/include"
headers=$(find mole -name '*.hpp' ! -name '*_portable.hpp' ! -path mole/eigen.hpp | sort)
[ -n "$headers" ] || { echo "no headers found"; exit 1; }
reached=$(for header in $headers; do echo "#include \"$header\""; done |
  "$2" -std=c++20 -I . -x c++ -M - | tr -s ' \\' '\n\n')
echo "$reached" | grep -q 'mole/version\.hpp' || { echo "no list of headers from $2"; exit 1; }
heavy=$(echo "$reached" | grep -E \
  '/(Eigen|nlohmann|fmt|hwy)/|/(filesystem|functional|iostream|regex)$' || true)
if [ -n "$heavy" ]; then
  echo "public headers reach:"
  echo "$heavy"
  echo "through one of:"
  # shellcheck disable=SC2086  # a list of names
  grep -nE '# *include *<(Eigen|nlohmann|fmt|hwy|filesystem|functional|iostream|regex)' $headers
  exit 1
fi
echo "$(echo "$headers" | wc -l) headers reach nothing heavy"
