# SPDX-License-Identifier: Apache-2.0
# MOLE_SOURCES        the compiled library
# MOLE_HEADERS        public headers
# MOLE_EIGEN_HEADERS  public headers that include Eigen, or definitions of the header-only build
include_guard()

file(GLOB_RECURSE MOLE_SOURCES CONFIGURE_DEPENDS RELATIVE "${PROJECT_SOURCE_DIR}"
     "${PROJECT_SOURCE_DIR}/src/*.cpp")
file(GLOB_RECURSE MOLE_HEADERS CONFIGURE_DEPENDS RELATIVE "${PROJECT_SOURCE_DIR}"
     "${PROJECT_SOURCE_DIR}/include/*.hpp" "${PROJECT_SOURCE_DIR}/include/*.h")
set(MOLE_EIGEN_HEADERS ${MOLE_HEADERS})
list(FILTER MOLE_EIGEN_HEADERS INCLUDE REGEX "_portable\\.hpp$|mole/eigen\\.hpp$")
list(FILTER MOLE_HEADERS EXCLUDE REGEX "_portable\\.hpp$|mole/eigen\\.hpp$")
