#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The shortest way to see the library at work: installs what is missing, builds it with the
# examples, runs the first one and says where its picture is.
set -eu
cd "$(dirname "$0")/.."
sh cmake/install_dependencies.sh
mkdir -p out
log=out/examples.log
if ! { cmake --preset examples && cmake --build --preset examples -j "${JOBS:-$(nproc)}"; } \
  >"$log" 2>&1; then
  tail -n 60 "$log"
  exit 1
fi
cd out/examples/examples
./01_quickstart
picture=$(find "$PWD" -maxdepth 1 -name '01_*' \( -name '*.svg' -o -name '*.ppm' -o -name '*.png' \))
[ -n "$picture" ] || { echo "01_quickstart drew no picture"; exit 1; }
echo "The picture: $picture"
