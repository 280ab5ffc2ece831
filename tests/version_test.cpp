// SPDX-License-Identifier: Apache-2.0
#include "mole/version.hpp"

#include <string>

#include "support/catch.hpp"

TEST_CASE("the build and the headers agree on the version", "[version]") {
  const std::string from_header = std::to_string(mole::kVersionMajor) + "." +
                                  std::to_string(mole::kVersionMinor) + "." +
                                  std::to_string(mole::kVersionPatch);
  CHECK(from_header == MOLE_TEST_VERSION);
}
