#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# router_rows.sh SOURCE: every router of the registry is named in a test that runs the contract
# suite.
set -eu
cd "$1"
names=$(sed -n '/^using RouterTypes/,/;/p' include/mole/layers/kinds.hpp | grep -o '[A-Za-z]*Router<' |
  tr -d '<' | sort -u)
tests=$(grep -lE '(router_contract|keep_the_contract)\(' tests/routers/*.cpp)
count=0
missing=""
for name in $names; do
  # shellcheck disable=SC2086  # a list of files
  grep -qw "$name" $tests || missing="$missing $name"
  count=$((count + 1))
done
[ "$count" -gt 0 ] || { echo "no routers found"; exit 1; }
[ -z "$missing" ] || { echo "no contract test for:$missing"; exit 1; }
echo "$count routers, each with a contract test"
