#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Everything that a change must pass: installs what is missing, builds and tests every preset. Ends
# with one line, `N passed, N failed`, over all test cases and golden cases; fails if any failed or
# a stage ran nothing. With names of stages only those: sh tests/run.sh dev asan
set -u
cd "$(dirname "$0")/.." || exit 1

stages=${*:-dev headers asan tsan no-openmp header-only}
jobs=${JOBS:-$(nproc)}
passed=0
failed=0

# A stage adds to the sums, or fails as a whole.
failed_as_a_whole() {
  echo "== $1: FAILED: $2"
  failed=$((failed + 1))
}

build() {
  cmake --preset "$1" >"out/$1.log" 2>&1 && cmake --build --preset "${2:-$1}" -j "$jobs" \
    >>"out/$1.log" 2>&1 && return
  grep -E -A 4 'error: |CMake Error|undefined reference' "out/$1.log" | head -n 60
  return 1
}

run_tests() {
  build "$1" || { failed_as_a_whole "$1" "it does not build"; return; }
  ctest --preset "$1" -j "$jobs" -V >"out/$1.tests.log" 2>&1
  sh tests/support/count_cases.sh "out/$1.tests.log" >"out/$1.count" || {
    cat "out/$1.count"
    failed_as_a_whole "$1" "no tests ran"
    return
  }
  read -r stage_passed stage_failed <<COUNT
$(tail -n 1 "out/$1.count")
COUNT
  sed '$d' "out/$1.count"
  echo "== $1: $stage_passed passed, $stage_failed failed"
  passed=$((passed + stage_passed))
  failed=$((failed + stage_failed))
}

# One case: all headers of both targets.
check_headers() {
  build dev headers || { failed_as_a_whole headers "a header does not compile on its own"; return; }
  count=$(find out/dev -path '*verify_interface_header_sets*' -name '*.o' | wc -l)
  [ "$count" -gt 0 ] || { failed_as_a_whole headers "no headers"; return; }
  echo "== headers: $count times a header compiles on its own"
  passed=$((passed + 1))
}

# The same source is compiled in several folders, and by ctest without a locale.
export CCACHE_NOHASHDIR=1 CCACHE_SLOPPINESS=locale
mkdir -p out
sh cmake/install_dependencies.sh || exit 1
for stage in $stages; do
  started=$(date +%s)
  case $stage in
    headers) check_headers ;;
    *) run_tests "$stage" ;;
  esac
  echo "   $stage took $(($(date +%s) - started)) s"
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
