#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Installs what the build and the tests need and says nothing when nothing is missing. Debian and
# Ubuntu, as root or with sudo; elsewhere it names what it does not find.
set -eu

packages="g++ cmake ninja-build ccache pkg-config libeigen3-dev libhwy-dev libfmt-dev
  nlohmann-json3-dev catch2 librapidcheck-dev"

if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
  missing=""
  for tool in c++ cmake ninja pkg-config; do
    command -v "$tool" >/dev/null || missing="$missing $tool"
  done
  if [ -n "$missing" ]; then
    echo "not found:$missing" >&2
    echo "Install a C++20 compiler, CMake 3.25, Ninja, pkg-config, Eigen 3.4, Highway 1.0.3," \
      "fmt 9, nlohmann-json 3.11, Catch2 2.13 (or newer ones) and RapidCheck with your package" \
      "manager." >&2
    exit 1
  fi
  exit 0
fi

missing=""
for package in $packages; do
  status=$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null) || status=none
  [ "$status" = installed ] || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

if [ "$(id -u)" -eq 0 ]; then
  as_root="env"
elif command -v sudo >/dev/null; then
  as_root="sudo env"
else
  echo "Run this as root: apt-get install$missing" >&2
  exit 1
fi

echo "installing:$missing"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
apt() {
  $as_root DEBIAN_FRONTEND=noninteractive apt-get -q -y "$@" >"$log" 2>&1 || {
    cat "$log" >&2
    exit 1
  }
}
apt update
# shellcheck disable=SC2086  # a list of names
apt install --no-install-recommends $missing
