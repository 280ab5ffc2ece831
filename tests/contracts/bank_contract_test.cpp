// SPDX-License-Identifier: Apache-2.0
#include "contracts/bank_contract.hpp"

#include "mole/experts/film_bank.hpp"
#include "mole/experts/lora_bank.hpp"
#include "mole/experts/modulated_bank.hpp"
#include "mole/experts/shared_down_bank.hpp"
#include "mole/experts/shared_up_bank.hpp"
#include "support/thread_pool.hpp"

namespace {

using mole::bf16;
using mole::f16;
using mole::FilmBank;
using mole::Index;
using mole::LoraBank;
using mole::ModulatedBank;
using mole::SharedDownBank;
using mole::SharedUpBank;

/// Ragged ranks with an empty expert; more output columns than one panel holds.
template <class T, class W = T>
LoraBank<T, W> lora(bool bias = false, Index in = 11, Index out = 67) {
  typename LoraBank<T, W>::Config config;
  config.in = in;
  config.out = out;
  config.rank = {3, 2, 0, 5, 1};
  config.scale = {T(0.5), T(2), T(1), T(-0.75), T(1.5)};
  config.bias = bias;
  return LoraBank<T, W>(config);
}

template <class Bank>
Bank shared(Index in = 11, Index out = 67, Index rank = 3) {
  typename Bank::Config config;
  config.in = in;
  config.out = out;
  config.rank = rank;
  config.scale = {0.5, 2, -0.75, 1.5};
  return Bank(config);
}

}  // namespace

TEST_CASE("every bank keeps the bank contract", "[bank]") {
  SECTION("LoraBank<double>") {
    test::bank_contract(lora<double>());
  }
  SECTION("LoraBank<double> with bias") {
    test::bank_contract(lora<double>(true));
  }
  SECTION("LoraBank<double, float>") {
    test::bank_contract(lora<double, float>());
  }
  SECTION("LoraBank<float>") {
    test::bank_contract(lora<float>());
  }
  SECTION("LoraBank<float, bf16>") {
    test::bank_contract(lora<float, bf16>(true));
  }
  SECTION("LoraBank<float, f16>") {
    test::bank_contract(lora<float, f16>());
  }
  SECTION("SharedDownBank<double>") {
    test::bank_contract(shared<SharedDownBank<double>>());
  }
  SECTION("SharedDownBank<float>") {
    test::bank_contract(shared<SharedDownBank<float>>());
  }
  SECTION("SharedUpBank<double>") {
    test::bank_contract(shared<SharedUpBank<double>>());
  }
  SECTION("SharedUpBank<float>") {
    test::bank_contract(shared<SharedUpBank<float>>());
  }
  SECTION("FilmBank<double>") {
    test::bank_contract(FilmBank<double>({.width = 11, .experts = 5}));
  }
  SECTION("FilmBank<float>, shifted") {
    test::bank_contract(FilmBank<float>({.width = 67, .experts = 4, .shifted = true}));
    test::bank_contract(FilmBank<double>({.width = 5, .experts = 4, .shifted = true}));
  }
  SECTION("ModulatedBank<double>") {
    test::bank_contract(shared<ModulatedBank<double>>());
  }
  SECTION("ModulatedBank<float>") {
    test::bank_contract(shared<ModulatedBank<float>>());
  }
}

TEST_CASE("banks allocate nothing at width 4096", "[bank]") {
  const auto check = [](const auto& bank) { test::BankContract(bank).allocates_nothing(9); };
  check(lora<float>(true, 4096, 4096));
  check(lora<float, bf16>(false, 4096, 4096));
  check(shared<SharedDownBank<float>>(4096, 4096, 16));
  check(shared<SharedUpBank<float>>(4096, 4096, 16));
  check(shared<ModulatedBank<float>>(4096, 4096, 16));
}

TEST_CASE("banks give the same bits on any number of threads", "[bank][threads]") {
  const auto check = [](const auto& bank) {
    const test::BankContract contract(bank);
    for (const int workers : {1, 2, 3, 7}) {
      ThreadPool pool(workers);
      contract.does_not_see_the_workers(ThreadPool::run, &pool, workers);
      const auto single_steps = [](void* to, Index count, Index, mole::RangeBody body,
                                   void* closure) { ThreadPool::run(to, count, 1, body, closure); };
      contract.does_not_see_the_workers(single_steps, &pool, workers);
    }
  };
  check(lora<float>(true));
  check(lora<double>());
  check(shared<SharedDownBank<float>>());
  check(shared<SharedUpBank<float>>());
  check(shared<ModulatedBank<float>>());
  check(FilmBank<float>({.width = 67, .experts = 4, .shifted = true}));
}
