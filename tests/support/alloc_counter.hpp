// SPDX-License-Identifier: Apache-2.0
// Watches every allocation of the process, of any thread, and can make some of them fail.
//
//   const long before = test::allocations();
//   ...
//   CHECK(test::allocations() - before == 0);
//
// Without a sanitizer these are malloc and its relatives, and operator new on top of them; only
// with glibc. With a sanitizer, which brings a malloc of its own, it is operator new alone, and
// kCountsAllocations is false.
#pragma once

#include <malloc.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define MOLE_TEST_SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || \
    __has_feature(memory_sanitizer)
#define MOLE_TEST_SANITIZED 1
#endif
#endif

namespace test {

#if defined(__GLIBC__) && !defined(MOLE_TEST_SANITIZED)
inline constexpr bool kCountsAllocations = true;
#else
inline constexpr bool kCountsAllocations = false;
#endif

inline std::atomic<long> allocation_count{0};  ///< since the program started
inline std::atomic<long> live_count{0};        ///< not yet freed
inline std::atomic<long> live_size{0};         ///< their bytes, rounded up by the allocator
inline std::atomic<long> peak_size{0};         ///< most live bytes since reset_peak
inline std::atomic<long> until_failure{0};     ///< allocations up to the one that fails; 0: none
inline std::atomic<bool> fails_for_ever{false};

inline long allocations() {
  return allocation_count.load();
}
inline long live_allocations() {
  return live_count.load();
}
inline long live_bytes() {
  return live_size.load();
}
inline long peak_bytes() {
  return peak_size.load();
}
inline void reset_peak() {
  peak_size = live_size.load();
}

/// The n-th allocation from now on fails, n = 1, 2, 3, ...; or that one and all after it. Ends with
/// the object.
class FailingAllocations {
 public:
  FailingAllocations(long n, bool for_ever) {
    fails_for_ever = for_ever;
    until_failure = n;
  }
  ~FailingAllocations() {
    until_failure = 0;
    fails_for_ever = false;
  }
  FailingAllocations(const FailingAllocations&) = delete;
  FailingAllocations& operator=(const FailingAllocations&) = delete;

  /// Whether the n-th allocation was asked for.
  bool came() const { return until_failure <= 0; }
};

/// True, as malloc with errno, if the allocation that is asked for now must fail.
inline bool must_fail() {
  allocation_count.fetch_add(1);
  if (until_failure <= 0 && !fails_for_ever) return false;
  if (until_failure > 0 && until_failure.fetch_sub(1) != 1) return false;
  if (!fails_for_ever) until_failure = -1;
  errno = ENOMEM;
  return true;
}

inline void* taken(void* block) {
  if (block == nullptr) return nullptr;
  live_count.fetch_add(1);
  const long size = static_cast<long>(malloc_usable_size(block));
  const long live = live_size.fetch_add(size) + size;
  long peak = peak_size;
  while (live > peak && !peak_size.compare_exchange_weak(peak, live)) {
  }
  return block;
}
inline void given_back(void* block) {
  if (block == nullptr) return;
  live_count.fetch_sub(1);
  live_size.fetch_sub(static_cast<long>(malloc_usable_size(block)));
}

}  // namespace test

// Weak, so that every test file may include this and the program holds one copy.
#define MOLE_TEST_HOOK __attribute__((weak))

#if defined(__GLIBC__) && !defined(MOLE_TEST_SANITIZED)
extern "C" {
void* __libc_malloc(std::size_t size);
void* __libc_calloc(std::size_t count, std::size_t size);
void* __libc_realloc(void* old, std::size_t size);
void* __libc_memalign(std::size_t alignment, std::size_t size);
void __libc_free(void* block);

MOLE_TEST_HOOK void* malloc(std::size_t size) noexcept {
  return test::must_fail() ? nullptr : test::taken(__libc_malloc(size));
}
MOLE_TEST_HOOK void* calloc(std::size_t count, std::size_t size) noexcept {
  return test::must_fail() ? nullptr : test::taken(__libc_calloc(count, size));
}
MOLE_TEST_HOOK void* realloc(void* old, std::size_t size) noexcept {
  if (test::must_fail()) return nullptr;
  test::given_back(old);
  return test::taken(__libc_realloc(old, size));
}
MOLE_TEST_HOOK void* memalign(std::size_t alignment, std::size_t size) noexcept {
  return test::must_fail() ? nullptr : test::taken(__libc_memalign(alignment, size));
}
MOLE_TEST_HOOK void* aligned_alloc(std::size_t alignment, std::size_t size) noexcept {
  return memalign(alignment, size);
}
MOLE_TEST_HOOK int posix_memalign(void** to, std::size_t alignment, std::size_t size) noexcept {
  *to = memalign(alignment, size);
  return *to == nullptr ? ENOMEM : 0;
}
MOLE_TEST_HOOK void free(void* block) noexcept {
  test::given_back(block);
  __libc_free(block);
}
}
#elif defined(MOLE_TEST_SANITIZED)
namespace test {
inline void* allocate(std::size_t size, std::size_t alignment) noexcept {
  if (must_fail()) return nullptr;
  void* block = nullptr;
  if (posix_memalign(&block, alignment, size) != 0) return nullptr;
  return taken(block);
}
inline void* allocate_or_throw(std::size_t size, std::size_t alignment) {
  void* block = allocate(size, alignment);
  return block != nullptr ? block : throw std::bad_alloc();
}
inline void release(void* block) noexcept {
  given_back(block);
  std::free(block);
}
inline constexpr std::size_t kPlain = alignof(std::max_align_t);
}  // namespace test

MOLE_TEST_HOOK void* operator new(std::size_t n) {
  return test::allocate_or_throw(n, test::kPlain);
}
MOLE_TEST_HOOK void* operator new[](std::size_t n) {
  return test::allocate_or_throw(n, test::kPlain);
}
MOLE_TEST_HOOK void* operator new(std::size_t n, std::align_val_t a) {
  return test::allocate_or_throw(n, static_cast<std::size_t>(a));
}
MOLE_TEST_HOOK void* operator new[](std::size_t n, std::align_val_t a) {
  return test::allocate_or_throw(n, static_cast<std::size_t>(a));
}
MOLE_TEST_HOOK void* operator new(std::size_t n, const std::nothrow_t&) noexcept {
  return test::allocate(n, test::kPlain);
}
MOLE_TEST_HOOK void* operator new[](std::size_t n, const std::nothrow_t&) noexcept {
  return test::allocate(n, test::kPlain);
}
MOLE_TEST_HOOK void* operator new(std::size_t n, std::align_val_t a,
                                  const std::nothrow_t&) noexcept {
  return test::allocate(n, static_cast<std::size_t>(a));
}
MOLE_TEST_HOOK void* operator new[](std::size_t n, std::align_val_t a,
                                    const std::nothrow_t&) noexcept {
  return test::allocate(n, static_cast<std::size_t>(a));
}
MOLE_TEST_HOOK void operator delete(void* p) noexcept {
  test::release(p);
}
MOLE_TEST_HOOK void operator delete[](void* p) noexcept {
  test::release(p);
}
MOLE_TEST_HOOK void operator delete(void* p, std::size_t) noexcept {
  test::release(p);
}
MOLE_TEST_HOOK void operator delete[](void* p, std::size_t) noexcept {
  test::release(p);
}
MOLE_TEST_HOOK void operator delete(void* p, std::align_val_t) noexcept {
  test::release(p);
}
MOLE_TEST_HOOK void operator delete[](void* p, std::align_val_t) noexcept {
  test::release(p);
}
MOLE_TEST_HOOK void operator delete(void* p, std::size_t, std::align_val_t) noexcept {
  test::release(p);
}
MOLE_TEST_HOOK void operator delete[](void* p, std::size_t, std::align_val_t) noexcept {
  test::release(p);
}
#endif
#undef MOLE_TEST_HOOK
