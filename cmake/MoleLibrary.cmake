# SPDX-License-Identifier: Apache-2.0
# mole::mole, the compiled library, and mole::header_only.
include_guard()

add_library(mole ${MOLE_SOURCES})
add_library(mole::mole ALIAS mole)
mole_set_up_target(mole)
target_compile_features(mole PUBLIC cxx_std_20)
# The sources write fused multiply-adds themselves; this keeps the compiler from adding others.
target_compile_options(mole PRIVATE -ffp-contract=off)
target_include_directories(
  mole
  PUBLIC $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include>
  PRIVATE "${PROJECT_SOURCE_DIR}/src")
set_target_properties(mole PROPERTIES POSITION_INDEPENDENT_CODE ON)
target_link_libraries(
  mole PRIVATE hwy::hwy fmt::fmt $<BUILD_INTERFACE:Eigen3::Eigen>
               $<BUILD_INTERFACE:nlohmann_json::nlohmann_json>)

add_library(mole_header_only INTERFACE)
add_library(mole::header_only ALIAS mole_header_only)
target_compile_features(mole_header_only INTERFACE cxx_std_20)
target_compile_definitions(mole_header_only INTERFACE MOLE_HEADER_ONLY)
target_include_directories(mole_header_only
                           INTERFACE $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include>)
target_link_libraries(mole_header_only INTERFACE Eigen3::Eigen)

if(mole_openmp)
  target_link_libraries(mole PRIVATE OpenMP::OpenMP_CXX)
  target_link_libraries(mole_header_only INTERFACE OpenMP::OpenMP_CXX)
endif()
