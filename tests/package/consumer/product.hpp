// SPDX-License-Identifier: Apache-2.0
#pragma once

/// Writes the 2 x 2 product of the 2 x 3 matrix `a` and the 3 x 2 matrix `b` to `c`.
void consumer_product(const float* a, const float* b, float* c);
