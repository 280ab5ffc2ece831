// SPDX-License-Identifier: Apache-2.0
// Parameter structs of LoraBank with absent tensors: what is absent is frozen, never looked at.

#include "mole/experts/lora_bank.hpp"
#include "mole/optim/adamw.hpp"
#include "support/catch.hpp"

namespace {

using mole::Index;
using Bank = mole::LoraBank<double>;

struct Owned {
  explicit Owned(const Bank& bank) : memory(bank.params_bytes<double>()) {
    mole::Workspace workspace(memory.span());
    params = bank.make_params<double>(workspace);
    mole::params::zip([](double& value) { value = 1; }, params);
  }
  mole::Buffer memory;
  mole::LoraBankParams<double> params;
};

const Bank kBank({.in = 5, .out = 3, .rank = {2, 0, 1}, .scale = {1, 1, 1}});

}  // namespace

TEST_CASE("A kind of tensor that is absent counts nothing and is not written", "[experts]") {
  Owned owned(kBank);
  auto only_up = owned.params;
  only_up.down = {};

  CHECK(mole::params::count(owned.params) == 3 * 5 + 3 * 3);
  CHECK(mole::params::count(only_up) == 3 * 3);
  CHECK(mole::params::norm(only_up) == 3);
  mole::params::zero(only_up);
  CHECK(mole::params::norm(owned.params) == std::sqrt(15.0));
  mole::params::zero(mole::LoraBankParams<double>{});
}

TEST_CASE("Copying between banks of other sizes is refused before a write", "[experts]") {
  Owned few(Bank({.in = 5, .out = 3, .rank = {2}, .scale = {1}})), many(kBank);
  mole::params::zero(many.params);

  CHECK_THROWS_AS(mole::params::copy(few.params, mole::LoraBankParams<double>{}), mole::Error);
  CHECK_THROWS_AS(mole::params::copy(many.params, few.params), mole::Error);
  CHECK(mole::params::norm(few.params) == std::sqrt(2.0 * 5 + 3 * 2));
}

TEST_CASE("AdamW leaves experts alone whose gradient is absent", "[experts]") {
  Owned weights(kBank), grad(kBank), first(kBank), second(kBank);
  mole::params::zero(first.params);
  mole::params::zero(second.params);
  auto only_up = grad.params;
  only_up.down = {};

  mole::adamw_step(weights.params, only_up, first.params, second.params, {}, 1);

  CHECK(weights.params.down_of(0)(0, 0) == 1);
  CHECK(weights.params.up_of(0)(0, 0) < 1);
}
