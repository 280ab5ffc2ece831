# SPDX-License-Identifier: Apache-2.0
# cmake -DCOMPILER=... -DFILE=... -DINCLUDES="a|b" -P compile_fail.cmake
string(REPLACE "|" ";" INCLUDES "${INCLUDES}")
list(TRANSFORM INCLUDES PREPEND -I)
set(compile "${COMPILER}" -std=c++20 -fsyntax-only ${INCLUDES} "${FILE}")

execute_process(
  COMMAND ${compile}
  RESULT_VARIABLE status
  ERROR_VARIABLE output)
if(NOT status EQUAL 0)
  message(FATAL_ERROR "the right version does not compile:\n${output}")
endif()

file(STRINGS "${FILE}" expected REGEX "^// expect: ")
if(NOT expected)
  message(FATAL_ERROR "${FILE} has no line '// expect: <regex>'")
endif()
string(REGEX REPLACE "^// expect: " "" expected "${expected}")

execute_process(
  COMMAND ${compile} -DMOLE_COMPILE_FAIL
  RESULT_VARIABLE status
  ERROR_VARIABLE output)
if(status EQUAL 0)
  message(FATAL_ERROR "the mistake compiles")
endif()
if(NOT output MATCHES "${expected}")
  message(FATAL_ERROR "refused for another reason than '${expected}':\n${output}")
endif()
