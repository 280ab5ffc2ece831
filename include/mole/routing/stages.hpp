// SPDX-License-Identifier: Apache-2.0
// The stages a router is made of, in the order in which they run:
//
//   project   logits of all tokens                               project.hpp   project_backward
//   override  what the caller forces, NaN and infinity           override.hpp  …_backward
//   score     softmax, sigmoid, sqrt_softplus                    score.hpp     score_backward
//   key       what the selection ranks by: score or logit + bias select.hpp    constant
//   select    top-k, ties to the lower index                     select.hpp    constant
//   weight    gates of the selected, renormalised and scaled     weight.hpp    weigh_backward
//   limit     drops by threshold or capacity                     limit.hpp     constant
//
// All but `project` work on the row of one token. A router calls the few it needs.
#pragma once

#include "mole/routing/entropy.hpp"
#include "mole/routing/limit.hpp"
#include "mole/routing/override.hpp"
#include "mole/routing/project.hpp"
#include "mole/routing/score.hpp"
#include "mole/routing/select.hpp"
#include "mole/routing/weight.hpp"
