// SPDX-License-Identifier: Apache-2.0
// A host's thread pool in small, for tests of the ParallelFor hook:
//
//   ThreadPool pool(4);
//   Context context{.scratch = memory, .workers = 4, .hook = &ThreadPool::run, .pool = &pool};
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "mole/core/parallel.hpp"

/// The caller is worker 0, workers - 1 threads wait for it. A loop inside a loop runs serially.
class ThreadPool {
 public:
  explicit ThreadPool(int workers) {
    for (int worker = 1; worker < workers; ++worker) {
      threads_.emplace_back([this, worker] { serve(worker); });
    }
  }
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;
  ~ThreadPool() {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    start_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  static void run(void* pool, mole::Index count, mole::Index grain, mole::RangeBody body,
                  void* closure) {
    if (inside_) return mole::serial_loop(nullptr, count, grain, body, closure);
    static_cast<ThreadPool*>(pool)->run_loop({count, grain, body, closure});
  }

 private:
  struct Loop {
    mole::Index count, grain;
    mole::RangeBody body;
    void* closure;
  };

  void run_loop(const Loop& loop) {
    const std::lock_guard one_caller(callers_);
    {
      const std::lock_guard lock(mutex_);
      loop_ = loop;
      next_ = 0;
      busy_ = threads_.size();
      ++generation_;
    }
    start_.notify_all();
    work(loop, 0);
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
  }

  void serve(int worker) {
    for (long served = 0;; ++served) {
      std::unique_lock lock(mutex_);
      start_.wait(lock, [&] { return stopping_ || generation_ > served; });
      if (stopping_) return;
      const Loop loop = loop_;
      lock.unlock();
      work(loop, worker);
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  void work(const Loop& loop, int worker) {
    inside_ = true;
    for (;;) {
      const mole::Index begin = next_.fetch_add(loop.grain);
      if (begin >= loop.count) break;
      loop.body(loop.closure, begin, std::min(loop.count, begin + loop.grain), worker);
    }
    inside_ = false;
  }

  inline static thread_local bool inside_ = false;
  std::mutex callers_, mutex_;
  std::condition_variable start_, done_;
  Loop loop_{};
  std::atomic<mole::Index> next_{0};
  std::size_t busy_ = 0;
  long generation_ = 0;
  bool stopping_ = false;
  std::vector<std::thread> threads_;  // last: the threads use all of the above
};
