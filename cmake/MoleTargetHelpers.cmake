# SPDX-License-Identifier: Apache-2.0
# What the targets of this project share. Nothing here reaches a user's targets.
include_guard()

# Language level, warnings and sanitizers, all PRIVATE.
function(mole_set_up_target target)
  set_target_properties(${target} PROPERTIES CXX_EXTENSIONS OFF)
  target_compile_features(${target} PRIVATE cxx_std_20)
  target_compile_options(
    ${target}
    PRIVATE -Wall
            -Wextra
            -Wpedantic
            -Wnon-virtual-dtor
            -Woverloaded-virtual
            -Wcast-qual
            $<$<BOOL:${MOLE_WERROR}>:-Werror>)
  if(MOLE_SANITIZE)
    list(JOIN MOLE_SANITIZE "," names)
    target_compile_options(
      ${target} PRIVATE -fsanitize=${names} -fno-sanitize-recover=all -fno-omit-frame-pointer)
    target_link_options(${target} PRIVATE -fsanitize=${names})
  endif()
endfunction()

# Uses the headers of a dependency without a trace of it in the link line or the exported target.
function(mole_use_headers_of target dependency)
  target_include_directories(
    ${target} SYSTEM PRIVATE $<TARGET_PROPERTY:${dependency},INTERFACE_INCLUDE_DIRECTORIES>)
  target_compile_definitions(
    ${target} PRIVATE $<TARGET_PROPERTY:${dependency},INTERFACE_COMPILE_DEFINITIONS>)
endfunction()

# GCC 12 warns about its own AVX-512 intrinsics where Eigen uses them.
set(MOLE_NO_AVX512_NOISE $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized$<SEMICOLON>-Wno-uninitialized>)
