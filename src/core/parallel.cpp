// SPDX-License-Identifier: Apache-2.0
#include "mole/core/parallel_built_in.hpp"
