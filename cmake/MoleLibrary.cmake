# SPDX-License-Identifier: Apache-2.0
# mole::mole, the compiled library, and mole::header_only.
include_guard()

# Every public header must compile on its own.
set(CMAKE_VERIFY_INTERFACE_HEADER_SETS ${PROJECT_IS_TOP_LEVEL})

if(MOLE_COMPILED)
  add_library(mole ${MOLE_SOURCES})
  add_library(mole::mole ALIAS mole)
  mole_set_up_target(mole)
  target_compile_features(mole PUBLIC cxx_std_20)
  # The sources write fused multiply-adds themselves; this keeps the compiler from adding others.
  target_compile_options(mole PRIVATE -ffp-contract=off)
  target_sources(
    mole
    PUBLIC FILE_SET HEADERS BASE_DIRS "${PROJECT_SOURCE_DIR}/include" FILES ${MOLE_HEADERS}
    PUBLIC FILE_SET eigen_headers TYPE HEADERS BASE_DIRS "${PROJECT_SOURCE_DIR}/include"
           FILES ${MOLE_EIGEN_HEADERS})
  target_include_directories(mole PRIVATE "${PROJECT_SOURCE_DIR}/src")
  set_target_properties(
    mole
    PROPERTIES INTERFACE_HEADER_SETS_TO_VERIFY HEADERS
               POSITION_INDEPENDENT_CODE ON
               SOVERSION ${PROJECT_VERSION_MAJOR}.${PROJECT_VERSION_MINOR}
               VERSION ${PROJECT_VERSION})
  # Sources that only instantiate templates, eight of a folder in one unit.
  set_target_properties(mole PROPERTIES UNITY_BUILD ${MOLE_UNITY_BUILD} UNITY_BUILD_MODE GROUP)
  foreach(folder IN ITEMS losses routers routing)
    set(sources ${MOLE_SOURCES})
    list(FILTER sources INCLUDE REGEX "^src/${folder}/")
    set(count 0)
    foreach(source IN LISTS sources)
      math(EXPR group "${count} / 8")
      math(EXPR count "${count} + 1")
      set_source_files_properties("${source}" PROPERTIES UNITY_GROUP ${folder}_${group})
    endforeach()
  endforeach()
  # Much code that runs seldom: what sanitizers add to it need not be optimised.
  if(MOLE_SANITIZE)
    set_source_files_properties(src/algebra/residual_base.cpp src/layers/any_router.cpp
                                PROPERTIES COMPILE_OPTIONS -O0)
  endif()
  # Clang works for many minutes on this one; GCC's sanitizers cover it.
  if(MOLE_SANITIZE AND CMAKE_CXX_COMPILER_ID MATCHES Clang)
    set_source_files_properties(src/kernels/chain_product_simd.cpp PROPERTIES COMPILE_OPTIONS
                                                                              -fno-sanitize=all)
  endif()
  target_link_libraries(mole PRIVATE hwy::hwy fmt::fmt)
  mole_use_headers_of(mole Eigen3::Eigen)
  mole_use_headers_of(mole nlohmann_json::nlohmann_json)
endif()

add_library(mole_header_only INTERFACE)
add_library(mole::header_only ALIAS mole_header_only)
set_target_properties(mole_header_only PROPERTIES EXPORT_NAME header_only)
target_compile_features(mole_header_only INTERFACE cxx_std_20)
target_compile_definitions(mole_header_only INTERFACE MOLE_HEADER_ONLY)
target_sources(
  mole_header_only INTERFACE FILE_SET HEADERS BASE_DIRS "${PROJECT_SOURCE_DIR}/include"
                             FILES ${MOLE_HEADERS} ${MOLE_EIGEN_HEADERS})
target_link_libraries(mole_header_only INTERFACE Eigen3::Eigen)

if(mole_openmp)
  if(TARGET mole)
    # One source has pragmas; the others need not be compiled anew without OpenMP.
    set_source_files_properties(src/core/parallel.cpp PROPERTIES COMPILE_OPTIONS "${OpenMP_CXX_FLAGS}")
    target_link_libraries(mole PRIVATE $<LINK_ONLY:OpenMP::OpenMP_CXX>)
  endif()
  target_link_libraries(mole_header_only INTERFACE OpenMP::OpenMP_CXX)
endif()
