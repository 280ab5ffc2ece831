#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# source_tree.sh <source directory>
# The top level holds what the layout says and nothing else, and every source file opens with its
# license.
set -eu
cd "$1"
expected="CMakeLists.txt CMakePresets.json LICENSE README.md benchmarks cmake docs examples include
  src tests build out"
failures=0
for entry in *; do
  case " $(echo $expected) " in
    *" $entry "*) ;;
    *) echo "unexpected at the top level: $entry"; failures=$((failures + 1)) ;;
  esac
done

for file in $(find include src tests examples benchmarks cmake -name '*.hpp' -o -name '*.cpp' \
  -o -name '*.h' -o -name '*.c' -o -name '*.sh' -o -name '*.cmake' -o -name CMakeLists.txt); do
  head -n 2 "$file" | grep -q 'SPDX-License-Identifier: Apache-2.0' || {
    echo "no license line: $file"
    failures=$((failures + 1))
  }
done
echo "$failures findings"
[ "$failures" -eq 0 ]
