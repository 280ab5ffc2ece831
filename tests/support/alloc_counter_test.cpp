// SPDX-License-Identifier: Apache-2.0
#include "support/alloc_counter.hpp"

#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "support/catch.hpp"

namespace {

/// Keeps the compiler from removing an allocation that nobody reads.
void* volatile sink;

template <class Body>
long allocations_of(Body&& body) {
  const long before = test::allocations();
  body();
  return test::allocations() - before;
}

void fill_a_vector() {
  std::vector<int> numbers(1000);
  sink = numbers.data();
}

}  // namespace

TEST_CASE("the allocation counter sees every way to allocate", "[support]") {
  if (!test::kCountsAllocations) return;
  CHECK(allocations_of([] { sink = nullptr; }) == 0);
  CHECK(allocations_of(fill_a_vector) == 1);
  CHECK(allocations_of([] {
          void* block = std::malloc(8);
          sink = block;
          std::free(block);
        }) == 1);
  CHECK(allocations_of([] {
          void* block = std::calloc(2, 8);
          sink = block;
          block = std::realloc(block, 1 << 20);
          sink = block;
          std::free(block);
        }) == 2);
  CHECK(allocations_of([] {
          void* block = std::aligned_alloc(64, 128);
          sink = block;
          std::free(block);
        }) == 1);
  struct alignas(128) Wide {
    double values[16];
  };
  CHECK(allocations_of([] {
          const auto wide = std::make_unique<Wide>();
          sink = wide.get();
        }) == 1);
}

TEST_CASE("the allocation counter sees other threads", "[support]") {
  if (!test::kCountsAllocations) return;
  long seen = 0;
  std::thread([&] { seen = allocations_of(fill_a_vector); }).join();
  CHECK(seen == 1);
}

TEST_CASE("the allocation counter knows what is live, and its peak", "[support]") {
  const long live = test::live_allocations(), bytes = test::live_bytes();
  test::reset_peak();
  {
    auto large = std::make_unique<char[]>(100'000);
    sink = large.get();
    CHECK(test::live_allocations() == live + 1);
    CHECK(test::live_bytes() >= bytes + 100'000);
    large.reset();
    large = std::make_unique<char[]>(1000);
    sink = large.get();
    CHECK(test::live_bytes() < bytes + 100'000);
    CHECK(test::peak_bytes() >= bytes + 100'000);
    CHECK(test::peak_bytes() < bytes + 200'000);
  }
  CHECK(test::live_allocations() == live);
  CHECK(test::live_bytes() == bytes);
}

TEST_CASE("allocations fail when they are told to, once or for ever", "[support]") {
  const auto failures = [](long n, bool for_ever) {
    int failed = 0;
    const test::FailingAllocations failing(n, for_ever);
    for (int i = 0; i < 4; ++i) {
      void* block = ::operator new(8, std::nothrow);
      sink = block;
      failed += block == nullptr;
      ::operator delete(block);
    }
    return failing.came() ? failed : -1;
  };
  CHECK(failures(1, false) == 1);
  CHECK(failures(4, false) == 1);
  CHECK(failures(5, false) == -1);
  CHECK(failures(1, true) == 4);
  CHECK(failures(3, true) == 2);
  CHECK(failures(5, true) == -1);
  void* block = ::operator new(8);
  CHECK(block != nullptr);
  ::operator delete(block);
}
