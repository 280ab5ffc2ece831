# SPDX-License-Identifier: Apache-2.0
# Install rules, the package for find_package (installed and in the build tree), pkg-config files.
include_guard()

if(MOLE_FETCHED)
  list(JOIN MOLE_FETCHED ", " names)
  message(STATUS "mole: no install rules, because ${names} became part of this build")
  return()
endif()

include(CMakePackageConfigHelpers)
include(GNUInstallDirs)
set(package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/mole")

# One export set per target: a user of one must not need the dependencies of the other.
set(exported_header_only mole_header_only)
if(MOLE_COMPILED)
  set(exported_compiled mole)
endif()
foreach(component IN ITEMS compiled header_only)
  if(exported_${component})
    install(
      TARGETS ${exported_${component}}
      EXPORT mole-${component}-targets
      FILE_SET HEADERS
      FILE_SET eigen_headers)
    install(
      EXPORT mole-${component}-targets
      NAMESPACE mole::
      DESTINATION "${package_dir}")
    export(
      EXPORT mole-${component}-targets
      NAMESPACE mole::
      FILE "${PROJECT_BINARY_DIR}/mole-${component}-targets.cmake")
  endif()
endforeach()

if(TARGET mole_inspect)
  file(RELATIVE_PATH up "${CMAKE_INSTALL_FULL_BINDIR}" "${CMAKE_INSTALL_FULL_LIBDIR}")
  set_target_properties(mole_inspect PROPERTIES INSTALL_RPATH "$ORIGIN/${up}")
  install(TARGETS mole_inspect)
endif()

# A shared library has its dependencies inside; the users of a static one link them.
set(header_only_dependencies Eigen3)
if(mole_openmp)
  list(APPEND header_only_dependencies OpenMP)
endif()
if(MOLE_COMPILED)
  get_target_property(type mole TYPE)
  if(type STREQUAL "STATIC_LIBRARY")
    set(compiled_dependencies hwy fmt)
    if(mole_openmp)
      list(APPEND compiled_dependencies OpenMP)
    endif()
  endif()
endif()
configure_package_config_file(
  "${PROJECT_SOURCE_DIR}/cmake/mole-config.cmake.in" "${PROJECT_BINARY_DIR}/mole-config.cmake"
  INSTALL_DESTINATION "${package_dir}")
write_basic_package_version_file(
  "${PROJECT_BINARY_DIR}/mole-config-version.cmake" COMPATIBILITY SameMinorVersion)
install(FILES "${PROJECT_BINARY_DIR}/mole-config.cmake"
              "${PROJECT_BINARY_DIR}/mole-config-version.cmake" DESTINATION "${package_dir}")
install(FILES "${PROJECT_SOURCE_DIR}/LICENSE" DESTINATION "${CMAKE_INSTALL_DOCDIR}")

# Joined, because packagers may set absolute install directories; relative ones can be moved.
set(pc_prefix "${CMAKE_INSTALL_PREFIX}")
cmake_path(IS_ABSOLUTE CMAKE_INSTALL_LIBDIR libdir_is_absolute)
if(NOT libdir_is_absolute)
  file(RELATIVE_PATH up "/${CMAKE_INSTALL_LIBDIR}/pkgconfig" "/")
  set(pc_prefix "\${pcfiledir}/${up}")
endif()
set(pc_libdir "\${prefix}")
set(pc_includedir "\${prefix}")
cmake_path(APPEND pc_libdir "${CMAKE_INSTALL_LIBDIR}")
cmake_path(APPEND pc_includedir "${CMAKE_INSTALL_INCLUDEDIR}")
if(mole_openmp)
  set(pc_openmp " ${OpenMP_CXX_FLAGS}")
endif()
set(pc_mole mole)
set(pc_header_only mole-header-only)
if(NOT MOLE_COMPILED)
  unset(pc_mole)
endif()
foreach(name IN LISTS pc_mole pc_header_only)
  configure_file("${PROJECT_SOURCE_DIR}/cmake/${name}.pc.in" "${PROJECT_BINARY_DIR}/${name}.pc"
                 @ONLY)
  install(FILES "${PROJECT_BINARY_DIR}/${name}.pc"
          DESTINATION "${CMAKE_INSTALL_LIBDIR}/pkgconfig")
endforeach()
