# SPDX-License-Identifier: Apache-2.0
# Programs that are installed beside the library.
include_guard()

if(NOT MOLE_COMPILED OR NOT MOLE_BUILD_TOOLS)
  return()
endif()

add_executable(mole_inspect "${PROJECT_SOURCE_DIR}/examples/mole_inspect.cpp")
mole_set_up_target(mole_inspect)
mole_use_headers_of(mole_inspect nlohmann_json::nlohmann_json)
target_link_libraries(mole_inspect PRIVATE mole::mole fmt::fmt)
