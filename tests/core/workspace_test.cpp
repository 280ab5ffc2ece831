// SPDX-License-Identifier: Apache-2.0
#include "mole/core/workspace.hpp"

#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "mole/core/half.hpp"
#include "support/catch.hpp"

using mole::ByteCounter;
using mole::Errc;
using mole::Index;
using mole::kAlignment;
using mole::Workspace;

namespace {

std::size_t misalignment(const void* address) {
  return reinterpret_cast<std::uintptr_t>(address) % kAlignment;
}

/// `size` bytes that start `offset` bytes after a multiple of the alignment.
class Block {
 public:
  Block(std::size_t size, std::size_t offset) : bytes_(size + offset + kAlignment), size_(size) {
    first_ = bytes_.data() + (kAlignment - misalignment(bytes_.data())) % kAlignment + offset;
  }
  std::span<std::byte> span() { return {first_, size_}; }

 private:
  std::vector<std::byte> bytes_;
  std::byte* first_;
  std::size_t size_;
};

/// One layout for both kinds of arena.
template <class Arena>
void layout(Arena& arena) {
  arena.template take<std::byte>(1);
  arena.template take<double>(17);
  arena.template take<float>(3, 11);
  arena.template take<mole::bf16>(0);
  arena.template take<std::int32_t>(16);
  arena.template take<double>(0, 5);
}

template <class F>
Errc code_of(F&& f) {
  try {
    f();
  } catch (const mole::Error& error) {
    return error.code();
  }
  return Errc::internal;
}

}  // namespace

TEST_CASE("pieces of a workspace are aligned and do not overlap") {
  Block block(1000, 5);
  Workspace workspace(block.span());
  const auto bytes = workspace.take<std::byte>(3);
  const auto numbers = workspace.take<double>(9);
  const auto matrix = workspace.take<float>(3, 7);
  CHECK(misalignment(bytes.data()) == 0);
  CHECK(misalignment(numbers.data()) == 0);
  CHECK(misalignment(matrix.data) == 0);
  CHECK(bytes.size() == 3);
  CHECK(numbers.size() == 9);
  CHECK(matrix.rows == 3);
  CHECK(matrix.cols == 7);
  CHECK(matrix.stride == 7);
  CHECK(static_cast<void*>(bytes.data() + 3) <= static_cast<void*>(numbers.data()));
  CHECK(static_cast<void*>(numbers.data() + 9) <= static_cast<void*>(matrix.data));
  const auto end = reinterpret_cast<std::byte*>(matrix.data + 21);
  CHECK(end <= block.span().data() + block.span().size());
}

TEST_CASE("a frame gives back what was taken inside it") {
  Block block(1024, 0);
  Workspace workspace(block.span());
  const auto before = workspace.take<int>(1);
  const std::size_t free = workspace.free_bytes();
  int* first = nullptr;
  {
    const Workspace::Frame outer(workspace);
    first = workspace.take<int>(4).data();
    const std::size_t inside = workspace.free_bytes();
    {
      const Workspace::Frame inner(workspace);
      workspace.take<int>(100);
      CHECK(workspace.free_bytes() < inside);
    }
    CHECK(workspace.free_bytes() == inside);
  }
  CHECK(workspace.free_bytes() == free);
  CHECK(workspace.take<int>(4).data() == first);
  CHECK(before.data() < first);
}

TEST_CASE("a frame gives back also when an exception leaves it") {
  Block block(256, 0);
  Workspace workspace(block.span());
  const std::size_t free = workspace.free_bytes();
  const auto overrun = [&] {
    const Workspace::Frame frame(workspace);
    workspace.take<std::byte>(200);
    workspace.take<std::byte>(200);
  };
  CHECK(code_of(overrun) == Errc::out_of_memory);
  CHECK(workspace.free_bytes() == free);
}

TEST_CASE("an exhausted workspace keeps its state") {
  Block block(256, 0);
  Workspace workspace(block.span());
  const auto kept = workspace.take<std::byte>(64);
  const std::size_t free = workspace.free_bytes();
  CHECK(free == 192);
  CHECK_THROWS_WITH(workspace.take<float>(49),
                    "workspace: 49 elements of 4 bytes needed, 192 of 256 bytes are free");
  CHECK(code_of([&] { workspace.take<float>(7, 7); }) == Errc::out_of_memory);
  CHECK(workspace.free_bytes() == free);
  CHECK(workspace.take<float>(48).size() == 48);
  CHECK(workspace.free_bytes() == 0);
  CHECK(workspace.take<float>(0).empty());
  CHECK(misalignment(kept.data()) == 0);
}

TEST_CASE("impossible counts are refused, they do not wrap around") {
  Block block(4096, 0);
  Workspace workspace(block.span());
  constexpr Index kMost = std::numeric_limits<Index>::max();
  for (const Index count : {Index{-1}, -kMost, kMost, kMost / 2 + 1, kMost / 4 + 1}) {
    CAPTURE(count);
    CHECK(code_of([&] { workspace.take<double>(count); }) == Errc::out_of_memory);
    CHECK(code_of([&] { workspace.take<std::byte>(count); }) == Errc::out_of_memory);
  }
  CHECK(workspace.free_bytes() == 4096);
}

TEST_CASE("a workspace without memory holds nothing") {
  Workspace nothing;
  CHECK(nothing.free_bytes() == 0);
  CHECK(nothing.take<double>(0).empty());
  CHECK(code_of([&] { nothing.take<std::byte>(1); }) == Errc::out_of_memory);
  Block block(10, 1);
  Workspace lost(block.span());  // too short to reach an aligned address
  CHECK(lost.free_bytes() == 0);
}

TEST_CASE("ByteCounter asks for enough memory at any alignment, and for no more") {
  ByteCounter counter;
  layout(counter);
  const std::size_t bytes = counter.bytes();
  for (std::size_t offset = 0; offset < 2 * kAlignment; ++offset) {
    CAPTURE(offset);
    Block block(bytes, offset);
    Workspace workspace(block.span());
    CHECK_NOTHROW(layout(workspace));
  }
  Block tight(bytes - kAlignment, 0);
  Workspace fitting(tight.span());
  CHECK_NOTHROW(layout(fitting));
  CHECK(fitting.free_bytes() == 0);
  Block short_of_one(bytes - kAlignment - 1, 0);
  Workspace failing(short_of_one.span());
  CHECK_THROWS_AS(layout(failing), mole::Error);
}

TEST_CASE("ByteCounter of nothing is nothing") {
  ByteCounter counter;
  CHECK(counter.bytes() == 0);
  counter.take<float>(0);
  CHECK(counter.bytes() == 0);
  const auto view = counter.take<float>(2, 3);
  CHECK(view.data == nullptr);
  CHECK(view.rows == 2);
  CHECK(view.cols == 3);
  CHECK(counter.bytes() == 2 * kAlignment);
}

TEST_CASE("a Buffer owns its bytes and hands them on") {
  mole::Buffer empty;
  CHECK(empty.size() == 0);
  mole::Buffer first(100);
  std::byte* const memory = first.span().data();
  CHECK(first.span().size() == 100);
  mole::Buffer second = std::move(first);
  CHECK(second.span().data() == memory);
  CHECK(second.size() == 100);
  CHECK(first.span().empty());  // NOLINT(bugprone-use-after-move): that is the question
}
