#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# pkg_config.sh <pkg-config> <compiler> <prefix> <output directory>: builds the consumer by hand.
set -eu
pkg_config=$1
compiler=$2
output=$4
files=$(find "$3" -name 'mole*.pc')
[ -n "$files" ] || { echo "no .pc files under $3"; exit 1; }
PKG_CONFIG_PATH=$(for file in $files; do dirname "$file"; done | sort -u)
export PKG_CONFIG_PATH
cd "$(dirname "$0")/consumer"
for package in mole mole-header-only; do
  # shellcheck disable=SC2046  # lists of flags
  "$compiler" -std=c++20 $("$pkg_config" --cflags "$package") main.cpp product.cpp \
    $("$pkg_config" --libs --static "$package") -o "$output/pkg_config_$package"
  "$output/pkg_config_$package"
done
