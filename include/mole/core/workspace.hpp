// SPDX-License-Identifier: Apache-2.0
// Memory without allocation: a Workspace hands out pieces of a block that the caller owns, a Frame
// gives back everything taken inside it, a ByteCounter answers how large the block must be.
#pragma once

#include <atomic>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>
#include <span>
#include <type_traits>
#include <utility>

#include "mole/core/config.hpp"
#include "mole/core/error.hpp"
#include "mole/core/view.hpp"

namespace mole::inline MOLE_ABI {

/// Every piece starts on its own cache line, and so at a multiple of every vector width.
inline constexpr std::size_t kAlignment = 64;

constexpr std::size_t aligned_bytes(std::size_t bytes) noexcept {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

/// a * b for sizes that are not negative; the largest Index where that overflows.
constexpr Index saturating_product(Index a, Index b) noexcept {
  Index product = 0;
  return __builtin_mul_overflow(a, b, &product) ? std::numeric_limits<Index>::max() : product;
}

/// Same `take` as Workspace, but only counts. A layout written once as a function of either one
/// gives both the size and the pieces.
class ByteCounter {
 public:
  template <class T>
  std::span<T> take(Index count) noexcept {
    const auto wanted = static_cast<std::size_t>(count);
    const bool fits = wanted <= kTooMany / sizeof(T);
    bytes_ = fits ? bytes_ + aligned_bytes(wanted * sizeof(T)) : kTooMany;
    if (bytes_ > kTooMany) bytes_ = kTooMany;
    return {};
  }
  template <class T>
  MatView<T> take(Index rows, Index cols) noexcept {
    take<T>(saturating_product(rows, cols));
    return {nullptr, rows, cols};
  }
  /// Bytes a Workspace needs, whatever the alignment of its memory. Sizes that no machine has come
  /// out as 2^56, so that sums of answers do not overflow and no allocator grants them.
  std::size_t bytes() const noexcept { return bytes_ == 0 ? 0 : bytes_ + kAlignment; }

 private:
  static constexpr std::size_t kTooMany = std::size_t{1} << 56;
  std::size_t bytes_ = 0;
};

/// Bump arena over caller memory. Serves one call at a time: while a Frame is open, only its thread
/// may open another.
class Workspace {
 public:
  Workspace() = default;
  explicit Workspace(std::span<std::byte> memory) noexcept : memory_(memory) {
    const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
    const std::size_t skip = aligned_bytes(address) - address;
    memory_ = memory.subspan(skip < memory.size() ? skip : memory.size());
  }

  /// Uninitialised elements. Throws out_of_memory, and then nothing has been taken.
  template <class T>
  std::span<T> take(Index count) {
    static_assert(std::is_trivially_copyable_v<T> && alignof(T) <= kAlignment);
    const auto wanted = static_cast<std::size_t>(count);
    const std::size_t bytes = aligned_bytes(wanted * sizeof(T));
    require(count >= 0 && wanted <= free_bytes() / sizeof(T) && bytes <= free_bytes(),
            Errc::out_of_memory, "workspace: ", count, " elements of ", sizeof(T),
            " bytes needed, ", free_bytes(), " of ", memory_.size(), " bytes are free");
    T* first = reinterpret_cast<T*>(memory_.data() + used_);
    used_ += bytes;
    return {first, static_cast<std::size_t>(count)};
  }
  template <class T>
  MatView<T> take(Index rows, Index cols) {
    return {take<T>(saturating_product(rows, cols)).data(), rows, cols};
  }

  std::size_t free_bytes() const noexcept { return memory_.size() - used_; }

  /// Gives back at its end everything taken since its start. Throws state_error while another
  /// thread has a frame open.
  class Frame {
   public:
    explicit Frame(Workspace& workspace) : owner_(workspace), mark_(workspace.enter()) {}
    ~Frame() { owner_.leave(mark_); }
    Frame(const Frame&) = delete;
    Frame& operator=(const Frame&) = delete;

   private:
    Workspace& owner_;
    std::size_t mark_;
  };

 private:
  /// The thread with open frames, and how many. A copy of a workspace starts without.
  struct User {
    User() = default;
    User(const User&) noexcept {}
    User& operator=(const User&) noexcept { return *this; }
    const void* thread = nullptr;
    int frames = 0;
  };
  static const void* this_thread() noexcept {
    static thread_local const char mark = 0;
    return &mark;
  }
  std::size_t enter() {
    const void* thread = nullptr;
    const bool was_free =
        std::atomic_ref(user_.thread)
            .compare_exchange_strong(thread, this_thread(), std::memory_order_acquire,
                                     std::memory_order_relaxed);
    require(was_free || thread == this_thread(), Errc::state_error,
            "workspace: another thread is using it, it serves one call at a time");
    ++user_.frames;
    return used_;
  }
  void leave(std::size_t mark) noexcept {
    used_ = mark;
    if (--user_.frames > 0) return;
    std::atomic_ref(user_.thread).store(nullptr, std::memory_order_release);
  }

  std::span<std::byte> memory_;
  std::size_t used_ = 0;
  User user_;
};

/// Owning, movable memory for everyday use.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::size_t bytes) : bytes_(new std::byte[bytes]), size_(bytes) {}
  Buffer(Buffer&& other) noexcept
      : bytes_(std::move(other.bytes_)), size_(std::exchange(other.size_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    bytes_ = std::move(other.bytes_);
    size_ = std::exchange(other.size_, 0);
    return *this;
  }
  std::span<std::byte> span() noexcept { return {bytes_.get(), size_}; }
  std::size_t size() const noexcept { return size_; }

 private:
  std::unique_ptr<std::byte[]> bytes_;
  std::size_t size_ = 0;
};

}  // namespace mole::inline MOLE_ABI
