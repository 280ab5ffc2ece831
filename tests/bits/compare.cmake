# SPDX-License-Identifier: Apache-2.0
# cmake -DPROGRAMS="a|b|..." -P compare.cmake: all print the same lines, and at least one.
string(REPLACE "|" ";" PROGRAMS "${PROGRAMS}")
foreach(program IN LISTS PROGRAMS)
  execute_process(
    COMMAND "${program}"
    OUTPUT_VARIABLE output
    COMMAND_ERROR_IS_FATAL ANY)
  if(NOT output MATCHES "[^ \n]")
    message(FATAL_ERROR "${program} printed nothing")
  endif()
  string(REGEX MATCHALL "[^\n]+" lines "${output}")
  if(NOT DEFINED expected)
    set(first "${program}")
    set(expected "${lines}")
  endif()
  set(differences "")
  foreach(have want IN ZIP_LISTS lines expected)
    if(NOT have STREQUAL want)
      string(APPEND differences "\n  ${want}\n  ${have}")
    endif()
  endforeach()
  if(differences)
    message(FATAL_ERROR "other bits in ${program} than in ${first}:${differences}")
  endif()
  list(LENGTH lines count)
  message(STATUS "${count} lines agree: ${program}")
endforeach()
