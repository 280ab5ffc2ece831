// SPDX-License-Identifier: Apache-2.0
// Rows 125-128: numbers of workers without meaning, loops inside loops, threads that share.
#include <atomic>
#include <thread>

#include "bad_inputs/rows.hpp"
#include "layers/layer_case.hpp"
#include "mole/layers/session.hpp"
#include "support/compare.hpp"
#include "support/thread_pool.hpp"

namespace test::bad_inputs {
namespace {

using mole::Index;
using Layer = TopKMixture<float>;

constexpr Index kIn = 13, kOut = 11, kExperts = 4, kTokens = 37;

Layer mixture() {
  return Layer(mole::TopKRouter<float>({.width = kIn, .experts = kExperts, .k = 2}),
               make_bank<float>(kIn, kOut, kExperts));
}

/// x, y0 and the y of a layer that one thread computes.
struct Problem {
  LayerCase<Layer> layer{mixture(), kTokens};
  Matrix<float> x = normal_matrix<float>(kTokens, kIn, 1);
  Matrix<float> y0 = normal_matrix<float>(kTokens, kOut, 2);
  Matrix<float> y = layer.infer(x, y0);

  /// Forward in memory of its own; empty if the bits are those of y.
  std::string run(mole::Context context, Index tokens = kTokens) const {
    mole::Buffer block(layer.layer.scratch_bytes(tokens, context.workers));
    mole::Workspace scratch(block.span());
    const mole::Context own{.scratch = scratch,
                            .workers = context.workers,
                            .hook = context.hook,
                            .pool = context.pool,
                            .isa = context.isa};
    Matrix<float> result = y0;
    layer.layer.forward(layer.prepared, x.view().row_block(0, tokens),
                        result.view().row_block(0, tokens), nullptr, own);
    return bit_difference(result.view().row_block(0, tokens), y.view().row_block(0, tokens));
  }
};

Case bad_workers(std::string name, int workers, std::vector<std::string> words) {
  return works(std::move(name), [=] {
    const Problem problem;
    check_refused({Errc::invalid_argument,
                   words,
                   [&] {
                     mole::Session(problem.layer.layer, problem.layer.weights(),
                                   {.max_tokens = kTokens, .workers = workers});
                   },
                   nullptr,
                   0,
                   {}});
  });
}

void accept_any_workers() {
  const Problem problem;
  for (const int workers : {-1, 0, 1, 5, 64, 1'000'000}) {
    for (const Index tokens : {Index{1}, Index{3}, kTokens}) {
      CAPTURE(workers, tokens);
      CHECK(problem.run({.scratch = problem.layer.context.scratch, .workers = workers}, tokens) ==
            "");
    }
  }
  mole::Session session(problem.layer.layer, problem.layer.weights(),
                        {.max_tokens = kTokens, .workers = 100'000});
  Matrix<float> y = problem.y0;
  session.forward(problem.x, y);
  CHECK(bit_difference(y, problem.y) == "");
}

/// Forward in every iteration of a loop of the host's.
void run_inside(const mole::Context& outer) {
  const Problem problem;
  std::atomic<int> wrong{0};
  mole::parallel_for(outer, 12, 1, [&](Index, Index, int) {
    mole::Context inner = outer;
    inner.workers = 3;
    if (!problem.run(inner).empty()) ++wrong;
  });
  CHECK(wrong == 0);
}

void share_a_layer() {
  const Problem problem;
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&] {
      for (int round = 0; round < 20; ++round) {
        if (!problem.run({.scratch = problem.layer.context.scratch}).empty()) ++wrong;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == 0);
}

/// 64 threads call with one workspace. While another call runs they are refused and y stays; the
/// others get the right bits.
void share_a_workspace() {
  Problem problem;
  std::atomic<int> refused{0}, wrong{0};
  const auto call = [&] {
    Matrix<float> y = problem.y0;
    try {
      problem.layer.layer.forward(problem.layer.prepared, problem.x, y, nullptr,
                                  problem.layer.context);
      if (!bit_difference(y, problem.y).empty()) ++wrong;
    } catch (const mole::Error& error) {
      const bool named = std::string(error.what()).find("another thread") != std::string::npos;
      if (error.code() != Errc::state_error || !named) ++wrong;
      if (!bit_difference(y, problem.y0).empty()) ++wrong;
      ++refused;
    }
  };
  const auto run_threads = [&] {
    std::vector<std::thread> threads;
    for (int i = 0; i < 64; ++i) threads.emplace_back(call);
    for (std::thread& thread : threads) thread.join();
  };
  {
    const mole::Workspace::Frame busy(problem.layer.context.scratch);
    run_threads();
    CHECK(refused == 64);
  }
  run_threads();
  CHECK(wrong == 0);
  refused = 0;
  call();
  CHECK(refused == 0);
}

}  // namespace

std::vector<Row> thread_rows() {
  return {
      {125,
       "workers: none and fewer are refused by a session and count as one in a context; more than "
       "there is work are fine",
       {bad_workers("0", 0, {"workers", "got 0"}), bad_workers("-1", -1, {"workers", "got -1"}),
        works("in a context", accept_any_workers)}},
      {126,
       "inside a parallel loop of the host: serial there, the same bits",
       {works("built-in loop",
              [] {
                mole::Workspace none;
                run_inside({.scratch = none, .workers = 3});
              }),
        works("the host's pool",
              [] {
                mole::Workspace none;
                ThreadPool pool(3);
                run_inside(
                    {.scratch = none, .workers = 3, .hook = &ThreadPool::run, .pool = &pool});
              })}},
      {127, "threads share a layer: no locks, the same bits", {works("", share_a_layer)}},
      {128, "64 threads share a workspace by mistake", {works("", share_a_workspace)}},
  };
}

TEST_CASE("bad inputs: threads", "[bad_inputs][threads]") {
  run(thread_rows());
}

}  // namespace test::bad_inputs
