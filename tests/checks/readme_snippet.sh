#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The first C++ block of the README is the marked part of examples/00_twelve_lines.cpp.
set -eu
cd "$1"
copy=$(mktemp)
trap 'rm -f "$copy"' EXIT
sed -n '/\/\/ \[readme/,/\/\/ readme\]/p' examples/00_twelve_lines.cpp | sed '1d;$d;s/^  //' >"$copy"
[ -s "$copy" ] || { echo "examples/00_twelve_lines.cpp has no marked part"; exit 1; }
sed -n '/^```cpp$/,/^```$/p' README.md | sed '1d;/^```$/,$d' | diff "$copy" - ||
  { echo "README.md differs from examples/00_twelve_lines.cpp"; exit 1; }
