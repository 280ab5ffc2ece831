# SPDX-License-Identifier: Apache-2.0
include_guard()

file(GLOB_RECURSE MOLE_SOURCES CONFIGURE_DEPENDS RELATIVE "${PROJECT_SOURCE_DIR}"
     "${PROJECT_SOURCE_DIR}/src/*.cpp")
