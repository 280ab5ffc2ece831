# SPDX-License-Identifier: Apache-2.0
# cmake -DROOT=<source directory> -P source_list.cmake
# The lists in cmake/MoleSources.cmake are sorted and name every file of the library.
cmake_minimum_required(VERSION 3.25)
include("${ROOT}/cmake/MoleSources.cmake")

set(failures "")
foreach(list IN ITEMS MOLE_SOURCES MOLE_HEADERS MOLE_EIGEN_HEADERS)
  set(sorted ${${list}})
  list(SORT sorted)
  if(NOT sorted STREQUAL "${${list}}")
    list(APPEND failures "${list} is not sorted")
  endif()
endforeach()

file(GLOB_RECURSE files RELATIVE "${ROOT}" "${ROOT}/src/*.cpp" "${ROOT}/include/*.hpp"
     "${ROOT}/include/*.h")
set(listed ${MOLE_SOURCES} ${MOLE_HEADERS} ${MOLE_EIGEN_HEADERS})
foreach(file IN LISTS files)
  if(NOT file IN_LIST listed)
    list(APPEND failures "not in cmake/MoleSources.cmake: ${file}")
  endif()
endforeach()
foreach(file IN LISTS listed)
  if(NOT file IN_LIST files)
    list(APPEND failures "in cmake/MoleSources.cmake, but not there: ${file}")
  endif()
endforeach()

if(failures)
  list(JOIN failures "\n  " failures)
  message(FATAL_ERROR "${failures}")
endif()
list(LENGTH listed count)
message(STATUS "${count} files, all listed")
