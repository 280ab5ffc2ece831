// SPDX-License-Identifier: Apache-2.0
#include "product.hpp"

#include "mole/kernels/chain_product.hpp"

void consumer_product(const float* a, const float* b, float* c) {
  mole::ChainProduct<float> task;
  task.rows = 2;
  task.depth = 3;
  task.cols = 2;
  task.a = mole::MatView<const float>(a, 2, 3);
  task.b = mole::MatView<const float>(b, 3, 2);
  task.c = mole::MatView<float>(c, 2, 2);
  task.from_zero = true;
  mole::chain_product(task, mole::best_isa());
}
