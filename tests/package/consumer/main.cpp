// SPDX-License-Identifier: Apache-2.0
#include <cstdio>
#include <string_view>

#include "mole/core/error.hpp"
#include "mole/core/view.hpp"
#include "mole/kernels/chain_product.hpp"
#include "mole/version.hpp"
#include "product.hpp"

#ifdef CONSUMER_OTHER_PRODUCT
void consumer_other_product(const float* a, const float* b, float* c);
#else
constexpr auto consumer_other_product = consumer_product;
#endif

namespace {

constexpr float kA[] = {1, 2, 3, 4, 5, 6};
constexpr float kB[] = {1, 0, 0, 1, 2, 2};
constexpr float kProduct[] = {7, 8, 16, 17};

bool product_is_right(void (*multiply)(const float*, const float*, float*)) {
  float c[4] = {};
  multiply(kA, kB, c);
  bool right = true;
  for (int i = 0; i < 4; ++i) right = right && c[i] == kProduct[i];
  return right;
}

bool error_names_the_shapes() {
  try {
    mole::require_shape("a", mole::MatView<const float>(kA, 2, 3), 3, 2);
  } catch (const mole::Error& error) {
    return error.code() == mole::Errc::shape_mismatch &&
           std::string_view(error.what()) == "a: expected [3, 2], got [2, 3]";
  }
  return false;
}

}  // namespace

int main() {
  const bool right = product_is_right(consumer_product) &&
                     product_is_right(consumer_other_product) && error_names_the_shapes() &&
                     mole::isa_available(mole::best_isa());
  std::printf("mole %d.%d.%d: %s\n", mole::kVersionMajor, mole::kVersionMinor, mole::kVersionPatch,
              right ? "right" : "wrong");
  return right ? 0 : 1;
}
