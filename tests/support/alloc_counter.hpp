// SPDX-License-Identifier: Apache-2.0
// Counts every allocation of the process, of any thread: malloc and its relatives, and operator new
// on top of them.
//
//   const long before = test::allocations();
//   ...
//   CHECK(test::allocations() - before == 0);
//
// Only with glibc and without a sanitizer; elsewhere kCountsAllocations is false.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define MOLE_TEST_SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || \
    __has_feature(memory_sanitizer)
#define MOLE_TEST_SANITIZED 1
#endif
#endif

namespace test {

inline std::atomic<long> allocation_count{0};

/// Allocations since the program started.
inline long allocations() {
  return allocation_count.load();
}

#if defined(__GLIBC__) && !defined(MOLE_TEST_SANITIZED)
inline constexpr bool kCountsAllocations = true;
#else
inline constexpr bool kCountsAllocations = false;
#endif

}  // namespace test

#if defined(__GLIBC__) && !defined(MOLE_TEST_SANITIZED)
// Weak, so that every test file may include this and the program holds one copy.
extern "C" {
void* __libc_malloc(std::size_t size);
void* __libc_calloc(std::size_t count, std::size_t size);
void* __libc_realloc(void* old, std::size_t size);
void* __libc_memalign(std::size_t alignment, std::size_t size);

__attribute__((weak)) void* malloc(std::size_t size) noexcept {
  test::allocation_count.fetch_add(1);
  return __libc_malloc(size);
}
__attribute__((weak)) void* calloc(std::size_t count, std::size_t size) noexcept {
  test::allocation_count.fetch_add(1);
  return __libc_calloc(count, size);
}
__attribute__((weak)) void* realloc(void* old, std::size_t size) noexcept {
  test::allocation_count.fetch_add(1);
  return __libc_realloc(old, size);
}
__attribute__((weak)) void* aligned_alloc(std::size_t alignment, std::size_t size) noexcept {
  test::allocation_count.fetch_add(1);
  return __libc_memalign(alignment, size);
}
__attribute__((weak)) int posix_memalign(void** to, std::size_t alignment,
                                         std::size_t size) noexcept {
  test::allocation_count.fetch_add(1);
  *to = __libc_memalign(alignment, size);
  return *to == nullptr ? 12 : 0;
}
}
#endif
