// SPDX-License-Identifier: Apache-2.0
#include "mole/core/parallel.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "mole/core/context.hpp"
#include "support/catch.hpp"
#include "support/thread_pool.hpp"

using mole::Context;
using mole::Index;
using mole::Workspace;

namespace {

/// What one loop did. Every iteration counts on its own plain cell, so that a thread sanitizer sees
/// an iteration that runs twice at once.
struct Record {
  std::vector<int> hits;
  std::vector<std::atomic<int>> inside;  ///< calls that run now, by worker
  std::atomic<bool> fits = true;         ///< chunks and worker numbers are within their bounds
  std::atomic<bool> alone = true;        ///< never two calls at once for one worker number

  Record(Index count, int workers)
      : hits(static_cast<std::size_t>(count)), inside(static_cast<std::size_t>(workers)) {}

  void chunk(Index begin, Index end, int worker, Index grain) {
    const auto workers = static_cast<int>(inside.size());
    const auto count = static_cast<Index>(hits.size());
    if (begin < 0 || end > count || begin >= end || end - begin > grain || worker < 0 ||
        worker >= workers) {
      fits = false;
      return;
    }
    auto& calls = inside[static_cast<std::size_t>(worker)];
    if (calls.fetch_add(1) != 0) alone = false;
    for (Index i = begin; i < end; ++i) ++hits[static_cast<std::size_t>(i)];
    calls.fetch_sub(1);
  }

  bool each_once() const {
    return std::all_of(hits.begin(), hits.end(), [](int hit) { return hit == 1; });
  }
};

void check_loops(const Context& context) {
  for (const Index count : {0, 1, 2, 7, 64, 1009}) {
    for (const Index grain : {1, 3, 64, 5000}) {
      CAPTURE(context.workers, count, grain);
      Record record(count, context.workers);
      mole::parallel_for(context, count, grain, [&](Index begin, Index end, int worker) {
        record.chunk(begin, end, worker, grain);
      });
      CHECK(record.each_once());
      CHECK(record.fits);
      CHECK(record.alone);
    }
  }
}

/// Every inner loop must stay on the thread that runs its outer chunk, as worker 0, in order.
bool nested_loops_are_serial(const Context& context) {
  constexpr Index kOuter = 24, kInner = 40;
  std::atomic<bool> serial = true;
  std::atomic<Index> done = 0;
  mole::parallel_for(context, kOuter, 1, [&](Index, Index, int) {
    const auto thread = std::this_thread::get_id();
    mole::parallel_for(context, kInner, 1, [&](Index, Index, int worker) {
      if (worker != 0 || std::this_thread::get_id() != thread) serial = false;
      ++done;
    });
  });
  return serial && done == kOuter * kInner;
}

/// Waits until `all` threads have come here; gives up after 20 seconds.
void meet(std::atomic<int>& arrived, int all) {
  ++arrived;
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (arrived < all && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
}

std::vector<Index> starts(mole::ParallelFor hook, Index count, Index grain) {
  std::vector<Index> begins;
  Workspace none;
  const Context context{.scratch = none, .workers = 3, .hook = hook};
  mole::parallel_for(context, count, grain,
                     [&](Index begin, Index, int) { begins.push_back(begin); });
  return begins;
}

}  // namespace

TEST_CASE("the built-in loop runs every iteration once", "[threads]") {
  Workspace none;
  for (const int workers : {1, 2, 3, 8}) check_loops({.scratch = none, .workers = workers});
}

TEST_CASE("the serial and the reversed loop run every iteration once", "[threads]") {
  Workspace none;
  check_loops({.scratch = none, .workers = 4, .hook = &mole::serial_loop});
  check_loops({.scratch = none, .workers = 4, .hook = &mole::reversed_loop});
}

TEST_CASE("the serial loop goes up, the reversed loop goes down", "[threads]") {
  CHECK(starts(&mole::serial_loop, 10, 4) == std::vector<Index>{0, 4, 8});
  CHECK(starts(&mole::reversed_loop, 10, 4) == std::vector<Index>{8, 4, 0});
  CHECK(starts(&mole::reversed_loop, 8, 4) == std::vector<Index>{4, 0});
  CHECK(starts(&mole::reversed_loop, 0, 4).empty());
}

TEST_CASE("a host's pool runs every iteration once", "[threads]") {
  Workspace none;
  for (const int workers : {1, 2, 5}) {
    ThreadPool pool(workers);
    check_loops({.scratch = none, .workers = workers, .hook = &ThreadPool::run, .pool = &pool});
  }
}

TEST_CASE("a host's pool uses all of its workers", "[threads]") {
  constexpr int kWorkers = 3;
  Workspace none;
  ThreadPool pool(kWorkers);
  const Context context{
      .scratch = none, .workers = kWorkers, .hook = &ThreadPool::run, .pool = &pool};
  std::atomic<int> arrived = 0;
  std::vector<int> chunks(kWorkers);
  mole::parallel_for(context, kWorkers, 1, [&](Index, Index, int worker) {
    ++chunks[static_cast<std::size_t>(worker)];
    meet(arrived, kWorkers);
  });
  CHECK(chunks == std::vector<int>{1, 1, 1});
}

TEST_CASE("the built-in loop uses several threads where it says so", "[threads]") {
  if (!mole::built_in_loop_is_parallel()) return;
  Workspace none;
  const Context context{.scratch = none, .workers = 2};
  std::atomic<int> arrived = 0;
  std::vector<std::thread::id> ids(2);
  mole::parallel_for(context, 2, 1, [&](Index begin, Index, int) {
    ids[static_cast<std::size_t>(begin)] = std::this_thread::get_id();
    meet(arrived, 2);
  });
  CHECK(ids[0] != ids[1]);
}

TEST_CASE("a loop inside a parallel loop is serial", "[threads]") {
  Workspace none;
  CHECK(nested_loops_are_serial({.scratch = none, .workers = 3}));
  ThreadPool pool(3);
  CHECK(nested_loops_are_serial(
      {.scratch = none, .workers = 3, .hook = &ThreadPool::run, .pool = &pool}));
}

TEST_CASE("the built-in loop on one worker runs in reverse where asserts are on") {
  std::vector<Index> begins;
  Workspace none;
  mole::parallel_for({.scratch = none}, 10, 3,
                     [&](Index begin, Index, int) { begins.push_back(begin); });
#ifdef NDEBUG
  CHECK(begins == std::vector<Index>{0, 3, 6, 9});
#else
  CHECK(begins == std::vector<Index>{9, 6, 3, 0});
#endif
}

TEST_CASE("the body of a loop is called in place, not copied") {
  struct Sum {
    Index total = 0;
    Sum() = default;
    Sum(const Sum&) = delete;
    Sum& operator=(const Sum&) = delete;
    void operator()(Index begin, Index end, int) { total += end - begin; }
  } sum;
  Workspace none;
  mole::parallel_for({.scratch = none, .hook = &mole::serial_loop}, 11, 4, sum);
  CHECK(sum.total == 11);
}

TEST_CASE("the best instruction set is one that runs") {
  CHECK(mole::isa_available(mole::Isa::portable));
  CHECK(mole::isa_available(mole::best_isa()));
}
