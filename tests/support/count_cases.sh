#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# count_cases.sh <output of ctest -V>: prints the failed and skipped tests with their output, and
# on the last line the cases that passed and that failed. A Catch2 or golden program counts with the
# cases of its closing line, any other test as one. Fails if there are none.
exec awk '
  function number(text) { return match(text, /[0-9]+/) ? substr(text, RSTART, RLENGTH) + 0 : 0 }

  # What a program itself said, on lines that ctest -V begins with the number of the test.
  /^[0-9]+: / {
    test = $1 + 0
    line = $0; sub(/^[0-9]+: ?/, "", line)
    output[test] = output[test] line "\n"
    if (line ~ /^All tests passed \([0-9]+ assertions? in [0-9]+ test cases?\)/) {
      sub(/.* in /, "", line); ran[test] = 1; good[test] += number(line)
    } else if (line ~ /^test cases: +[0-9]+ \|/) {
      ran[test] = 1
      n = split(line, part, "|")
      for (i = 2; i <= n; i++) {
        if (part[i] ~ /passed/) good[test] += number(part[i])
        else if (part[i] ~ /failed as expected/) good[test] += number(part[i])
        else if (part[i] ~ /failed/) bad[test] += number(part[i])
      }
    } else if (line ~ /^[0-9]+ passed, [0-9]+ failed(, [0-9]+ skipped)?$/) {
      ran[test] = 1
      split(line, part, ", ")
      good[test] += number(part[1]); bad[test] += number(part[2])
    }
    next
  }

  # The verdict of ctest: "3/9 Test #3: name ....***Failed  0.17 sec"
  /^ *[0-9]+\/[0-9]+ Test +#[0-9]+: / {
    line = $0; sub(/^[^#]*#/, "", line)
    test = line + 0; sub(/^[0-9]+: /, "", line)
    name = line; sub(/ .*/, "", name)
    if (line ~ /Skipped/) { printf "skipped: %s\n%s", name, output[test]; next }
    tests++
    if (line ~ / Passed /) {
      if (!ran[test]) good[test] = 1
      else if (good[test] == 0) { bad[test]++; printf "FAILED: %s ran no cases\n", name }
    } else {
      if (bad[test] == 0) bad[test] = 1
      printf "FAILED: %s\n%s", name, output[test]
    }
    passed += good[test]; failed += bad[test]
  }
  END { print passed + 0, failed + 0; exit tests == 0 }
' "$1"
