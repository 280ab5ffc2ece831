# SPDX-License-Identifier: Apache-2.0
# Dependencies: an installed package first; with MOLE_FETCH a pinned download in its place.
include_guard()
include(FetchContent)

# Packages that became part of this build: they are not installed, so the library is not either.
set(MOLE_FETCHED "")

# mole_dependency(<package> <target> VERSIONS <v>... REPOSITORY <url> COMMIT <id>)
# Tries the versions in order; without any takes what there is. A macro, because find_package sets
# variables in the caller.
macro(mole_dependency package target)
  cmake_parse_arguments(mole_dep "" "REPOSITORY;COMMIT" "VERSIONS" ${ARGN})
  if(NOT mole_dep_VERSIONS)
    find_package(${package} CONFIG QUIET)
  endif()
  foreach(mole_dep_version IN LISTS mole_dep_VERSIONS)
    if(NOT TARGET ${target})
      find_package(${package} ${mole_dep_version} CONFIG QUIET)
    endif()
  endforeach()
  if(NOT TARGET ${target} AND MOLE_FETCH)
    message(STATUS "mole: ${package} is not installed, it becomes part of this build")
    list(APPEND MOLE_FETCHED ${package})
    mole_fetch(${package} ${mole_dep_REPOSITORY} ${mole_dep_COMMIT})
  endif()
  if(NOT TARGET ${target})
    list(JOIN mole_dep_VERSIONS " or " mole_dep_versions)
    message(FATAL_ERROR "mole needs ${package} ${mole_dep_versions}. Install it (Debian and Ubuntu: "
                        "sh cmake/install_dependencies.sh) or configure with -DMOLE_FETCH=ON.")
  endif()
endmacro()

# A function, so that the settings below stay inside it.
function(mole_fetch package repository commit)
  set(CMAKE_POLICY_DEFAULT_CMP0077 NEW)
  set(BUILD_SHARED_LIBS OFF)
  set(BUILD_TESTING OFF)
  set(CMAKE_POSITION_INDEPENDENT_CODE ON)
  set(CMAKE_VERIFY_INTERFACE_HEADER_SETS OFF)
  set(EIGEN_BUILD_DOC OFF)
  set(EIGEN_BUILD_PKGCONFIG OFF)
  set(HWY_ENABLE_CONTRIB OFF)
  set(HWY_ENABLE_EXAMPLES OFF)
  set(HWY_ENABLE_INSTALL OFF)
  set(HWY_ENABLE_TESTS OFF)
  set(FMT_INSTALL OFF)
  set(JSON_BuildTests OFF)
  set(JSON_Install OFF)
  FetchContent_Declare(${package} GIT_REPOSITORY ${repository} GIT_TAG ${commit} SYSTEM)
  FetchContent_MakeAvailable(${package})
  if(package STREQUAL "hwy" AND NOT TARGET hwy::hwy)
    add_library(hwy::hwy ALIAS hwy)
  endif()
endfunction()

mole_dependency(
  Eigen3 Eigen3::Eigen
  VERSIONS 3.4 5
  REPOSITORY https://gitlab.com/libeigen/eigen.git
  COMMIT 3147391d946bb4b6c68edd901f2add6ac1f31f8c) # 3.4.0

if(MOLE_COMPILED)
  mole_dependency(
    hwy hwy::hwy
    VERSIONS 1.0.3
    REPOSITORY https://github.com/google/highway.git
    COMMIT 457c891775a7397bdb0376bb1031e6e027af1c48) # 1.2.0
  mole_dependency(
    fmt fmt::fmt
    VERSIONS 9
    REPOSITORY https://github.com/fmtlib/fmt.git
    COMMIT e69e5f977d458f2650bb346dadf2ad30c5320281) # 10.2.1
endif()
if(MOLE_COMPILED OR MOLE_BUILD_TESTS)
  mole_dependency(
    nlohmann_json nlohmann_json::nlohmann_json
    VERSIONS 3.11
    REPOSITORY https://github.com/nlohmann/json.git
    COMMIT 9cca280a4d0ccf0c08f47a99aa71d1b0e52f8d03) # 3.11.3
endif()

set(mole_openmp OFF)
if(NOT MOLE_OPENMP STREQUAL "OFF")
  find_package(OpenMP QUIET COMPONENTS CXX)
  if(TARGET OpenMP::OpenMP_CXX)
    set(mole_openmp ON)
  elseif(MOLE_OPENMP STREQUAL "ON")
    message(FATAL_ERROR "MOLE_OPENMP is ON, but this compiler has no OpenMP")
  endif()
endif()
if(mole_openmp)
  message(STATUS "mole: the built-in loop uses OpenMP ${OpenMP_CXX_VERSION}")
elseif(MOLE_OPENMP STREQUAL "AUTO")
  message(STATUS "mole: no OpenMP found, the built-in loop is serial")
else()
  message(STATUS "mole: OpenMP is off, the built-in loop is serial")
endif()
