# SPDX-License-Identifier: Apache-2.0
# Every switch of the build, each with the reason it exists.
include_guard()

# Embedders want the library alone; people who work on it want everything.
option(MOLE_BUILD_TESTS "Build the tests" ${PROJECT_IS_TOP_LEVEL})
option(MOLE_BUILD_BENCHMARKS "Build the benchmarks" ${PROJECT_IS_TOP_LEVEL})
option(MOLE_BUILD_EXAMPLES "Build the examples" ${PROJECT_IS_TOP_LEVEL})

# A project that embeds the library usually does not want to install it.
option(MOLE_INSTALL "Create install rules" ${PROJECT_IS_TOP_LEVEL})

# Threads of the built-in loop. AUTO takes OpenMP where the compiler has it; a host with its own
# thread pool wants OFF; a packager who must not lose it by accident wants ON.
set(MOLE_OPENMP AUTO CACHE STRING "Built-in loop with OpenMP: AUTO, ON or OFF")
set_property(CACHE MOLE_OPENMP PROPERTY STRINGS AUTO ON OFF)

# Builds must not reach for the network unasked; without it a missing dependency is an error.
option(MOLE_FETCH "Download pinned dependencies that are not installed" OFF)

# New compilers bring new warnings: an error for the project itself, never for its users.
option(MOLE_WERROR "Treat warnings as errors" OFF)

# The sanitizers change the ABI of a whole program, so they are chosen for all targets at once.
set(MOLE_SANITIZE "" CACHE STRING "Sanitizers: empty, address;undefined or thread")

# The two builds promise the same results; this one runs the shared suites on mole::header_only
# and leaves the compiled library out.
option(MOLE_TEST_HEADER_ONLY "Test mole::header_only in place of mole::mole" OFF)

if(NOT MOLE_OPENMP MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "MOLE_OPENMP is '${MOLE_OPENMP}'; expected AUTO, ON or OFF")
endif()
foreach(name IN LISTS MOLE_SANITIZE)
  if(NOT name MATCHES "^(address|undefined|thread)$")
    message(FATAL_ERROR "MOLE_SANITIZE has '${name}'; expected address, undefined or thread")
  endif()
endforeach()
if("address" IN_LIST MOLE_SANITIZE AND "thread" IN_LIST MOLE_SANITIZE)
  message(FATAL_ERROR "MOLE_SANITIZE: address and thread exclude each other")
endif()
