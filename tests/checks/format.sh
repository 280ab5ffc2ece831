#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# format.sh <source directory>: holds the code to .clang-format. Exit code 77, skipped, without
# clang-format 14: others break lines differently. Compares the output, because --dry-run of this
# version complains about comments that it would not change.
set -eu
cd "$1"
format=$(command -v clang-format-14 || command -v clang-format || true)
if [ -z "$format" ] || ! "$format" --version | grep -q 'version 14\.'; then
  echo "clang-format 14 is not installed"
  exit 77
fi
failures=0
for file in $(find include src tests examples benchmarks -name '*.[hc]pp' -o -name '*.[hc]'); do
  "$format" "$file" | cmp -s - "$file" || {
    echo "not formatted: $file"
    failures=$((failures + 1))
  }
done
echo "$failures files need clang-format"
[ "$failures" -eq 0 ]
