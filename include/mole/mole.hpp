// SPDX-License-Identifier: Apache-2.0
// Everything that both builds have, in the order in which it is built up. Reading and writing files
// (mole/io) needs the compiled library, mole/eigen.hpp needs Eigen: both are included by name.
#pragma once

#include "mole/version.hpp"

#include "mole/core/config.hpp"
#include "mole/core/context.hpp"
#include "mole/core/describe.hpp"
#include "mole/core/description.hpp"
#include "mole/core/error.hpp"
#include "mole/core/expected.hpp"
#include "mole/core/half.hpp"
#include "mole/core/parallel.hpp"
#include "mole/core/params.hpp"
#include "mole/core/random.hpp"
#include "mole/core/view.hpp"
#include "mole/core/workspace.hpp"

#include "mole/kernels/chain_product.hpp"
#include "mole/kernels/dense.hpp"
#include "mole/kernels/gated.hpp"
#include "mole/kernels/gated_low_rank.hpp"
#include "mole/kernels/math.hpp"
#include "mole/kernels/shared_low_rank.hpp"

#include "mole/routing/call.hpp"
#include "mole/routing/linear.hpp"
#include "mole/routing/router.hpp"
#include "mole/routing/routing.hpp"
#include "mole/routing/rule_router.hpp"
#include "mole/routing/stages.hpp"
#include "mole/routing/tokens.hpp"

#include "mole/routers/dense.hpp"
#include "mole/routers/given.hpp"
#include "mole/routers/top_k.hpp"
#include "mole/routers/unit.hpp"

#include "mole/experts/expert_bank.hpp"
#include "mole/experts/lora_bank.hpp"
#include "mole/experts/shared_down_bank.hpp"
#include "mole/experts/shared_up_bank.hpp"

#include "mole/losses/balance.hpp"

#include "mole/layers/adapted_linear.hpp"
#include "mole/layers/any_layer.hpp"
#include "mole/layers/description.hpp"
#include "mole/layers/kinds.hpp"
#include "mole/layers/layer_input.hpp"
#include "mole/layers/lora.hpp"
#include "mole/layers/mixture.hpp"
#include "mole/layers/owned_weights.hpp"
#include "mole/layers/session.hpp"

#include "mole/algebra/adapter_scales.hpp"
#include "mole/algebra/merge.hpp"

#include "mole/optim/adamw.hpp"
