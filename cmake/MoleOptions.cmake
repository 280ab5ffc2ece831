# SPDX-License-Identifier: Apache-2.0
# Every switch of the build, each with the reason it exists.
include_guard()

# Embedders want the library alone; people who work on it want everything.
option(MOLE_BUILD_TESTS "Build the tests" ${PROJECT_IS_TOP_LEVEL})
option(MOLE_BUILD_BENCHMARKS "Build the benchmarks" ${PROJECT_IS_TOP_LEVEL})
option(MOLE_BUILD_EXAMPLES "Build the examples" ${PROJECT_IS_TOP_LEVEL})
option(MOLE_BUILD_TOOLS "Build the programs that are installed" ${PROJECT_IS_TOP_LEVEL})

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
option(MOLE_UNITY_BUILD "Compile the small sources of the library several at a time" OFF)

# A sanitizer instruments whole programs, so it is chosen for all targets at once.
set(MOLE_SANITIZE "" CACHE STRING "Sanitizers: empty, address;undefined or thread")

# Optimising the tests, and some checks of pointers in them, takes longer than they run. The library
# keeps its flags.
set(MOLE_TEST_COMPILE_OPTIONS "" CACHE STRING "More compile options for the tests, such as -O0")

# A thread sanitizer is slow and needs the threaded tests alone: compile no others.
option(MOLE_TEST_THREADS_ONLY "Build only the tests that are tagged [threads]" OFF)

# Fuzz targets need Clang and a library that is instrumented for them: a build of their own, without
# the other tests.
option(MOLE_BUILD_FUZZERS "Build the fuzz targets and no other tests" OFF)

# mole::header_only needs Eigen alone; who wants nothing else leaves the compiled library out. The
# tests are then those that both builds share.
option(MOLE_COMPILED "Provide the compiled library mole::mole" ON)

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

# Repeated builds of the same files: used where it is installed, never for an embedding project.
if(PROJECT_IS_TOP_LEVEL AND NOT DEFINED CMAKE_CXX_COMPILER_LAUNCHER)
  find_program(MOLE_CCACHE ccache)
  mark_as_advanced(MOLE_CCACHE)
  if(MOLE_CCACHE)
    set(CMAKE_CXX_COMPILER_LAUNCHER "${MOLE_CCACHE}")
  endif()
endif()
