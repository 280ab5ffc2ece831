// SPDX-License-Identifier: Apache-2.0
#include "contracts/bank_contract.hpp"
#include "mole/experts/ffn_bank.hpp"
#include "mole/experts/linear_bank.hpp"
#include "support/thread_pool.hpp"

namespace {

using mole::Activation;
using mole::ExpertBase;
using mole::FfnBank;
using mole::FfnForm;
using mole::Index;
using mole::LinearBank;

/// Ragged ranks with an empty expert; more output columns than one panel holds.
template <class T>
LinearBank<T> linear(ExpertBase base, bool bias, bool adapted, Index in = 11, Index out = 67) {
  typename LinearBank<T>::Config config;
  config.in = in;
  config.out = out;
  config.experts = 4;
  config.base = base;
  config.bias = bias;
  if (adapted) config.rank = {3, 2, 0, 5};
  if (adapted) config.scale = {T(0.5), T(2), T(1), T(-0.75)};
  return LinearBank<T>(config);
}

template <class T>
FfnBank<T> ffn(FfnForm form, Activation activation, ExpertBase base, bool bias, Index in = 11,
               Index inner = 7, Index out = 67) {
  typename FfnBank<T>::Config config;
  config.in = in;
  config.inner = inner;
  config.out = out;
  config.experts = 4;
  config.form = form;
  config.activation = activation;
  config.base = base;
  config.inner_bias = config.outer_bias = bias;
  if (form == FfnForm::gated) config.gate = {{2, 1, 0, 3}, {T(0.5), T(2), T(1), T(-0.75)}};
  config.up = {{1, 2, 3, 0}, {T(1), T(0.5), T(-0.25), T(1)}};
  if (!bias) config.down = {{0, 3, 2, 1}, {T(1), T(2), T(0.5), T(1.5)}};
  return FfnBank<T>(config);
}

}  // namespace

TEST_CASE("LinearBank keeps the bank contract", "[bank]") {
  SECTION("shared") {
    test::bank_contract(linear<double>(ExpertBase::shared, false, true));
  }
  SECTION("shared with bias, in float") {
    test::bank_contract(linear<float>(ExpertBase::shared, true, true));
  }
  SECTION("shared without adapters") {
    test::bank_contract(linear<double>(ExpertBase::shared, true, false));
  }
  SECTION("own with bias") {
    test::bank_contract(linear<double>(ExpertBase::own, true, true));
  }
  SECTION("own without adapters, in float") {
    test::bank_contract(linear<float>(ExpertBase::own, false, false));
  }
}

TEST_CASE("FfnBank keeps the bank contract", "[bank]") {
  SECTION("gated, shared") {
    test::bank_contract(ffn<double>(FfnForm::gated, Activation::silu, ExpertBase::shared, false));
  }
  SECTION("gated, own, with biases") {
    test::bank_contract(ffn<double>(FfnForm::gated, Activation::gelu_tanh, ExpertBase::own, true));
  }
  SECTION("fused, shared, with biases") {
    test::bank_contract(ffn<double>(FfnForm::fused, Activation::gelu, ExpertBase::shared, true));
  }
  SECTION("plain, own") {
    test::bank_contract(ffn<double>(FfnForm::plain, Activation::gelu, ExpertBase::own, false));
  }
  SECTION("gated, shared, with biases, in float") {
    test::bank_contract(ffn<float>(FfnForm::gated, Activation::gelu, ExpertBase::shared, true));
  }
  SECTION("fused, own, in float") {
    test::bank_contract(ffn<float>(FfnForm::fused, Activation::silu, ExpertBase::own, false));
  }
}

TEST_CASE("feed-forward banks allocate nothing at width 4096", "[bank]") {
  test::BankContract(
      ffn<float>(FfnForm::gated, Activation::silu, ExpertBase::shared, true, 4096, 512, 4096))
      .allocates_nothing(5);
}

TEST_CASE("feed-forward banks give the same bits on any number of threads", "[bank][threads]") {
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
  check(linear<float>(ExpertBase::shared, true, true));
  check(linear<double>(ExpertBase::own, true, true));
  check(ffn<float>(FfnForm::gated, Activation::silu, ExpertBase::shared, true));
  check(ffn<double>(FfnForm::fused, Activation::gelu, ExpertBase::own, false));
}
