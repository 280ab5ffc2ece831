// SPDX-License-Identifier: Apache-2.0
// Memory without allocation: a Workspace hands out pieces of a block that the caller owns, a Frame
// gives back everything taken inside it, a ByteCounter answers how large the block must be.
#pragma once

#include <cstdint>
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

/// Same `take` as Workspace, but only counts. A layout written once as a function of either one
/// gives both the size and the pieces.
class ByteCounter {
 public:
  template <class T>
  std::span<T> take(Index count) noexcept {
    bytes_ += aligned_bytes(static_cast<std::size_t>(count) * sizeof(T));
    return {};
  }
  template <class T>
  MatView<T> take(Index rows, Index cols) noexcept {
    take<T>(rows * cols);
    return {nullptr, rows, cols};
  }
  /// Bytes a Workspace needs, whatever the alignment of its memory.
  std::size_t bytes() const noexcept { return bytes_ == 0 ? 0 : bytes_ + kAlignment; }

 private:
  std::size_t bytes_ = 0;
};

/// Bump arena over caller memory.
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
    return {take<T>(rows * cols).data(), rows, cols};
  }

  std::size_t free_bytes() const noexcept { return memory_.size() - used_; }

  /// Gives back at its end everything taken since its start.
  class Frame {
   public:
    explicit Frame(Workspace& workspace) noexcept : owner_(workspace), mark_(workspace.used_) {}
    ~Frame() { owner_.used_ = mark_; }
    Frame(const Frame&) = delete;
    Frame& operator=(const Frame&) = delete;

   private:
    Workspace& owner_;
    std::size_t mark_;
  };

 private:
  std::span<std::byte> memory_;
  std::size_t used_ = 0;
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
