// SPDX-License-Identifier: Apache-2.0
// Placed: an object of any trivial type in memory of a Workspace, with its type remembered.
#pragma once

#include <memory>
#include <type_traits>
#include <typeinfo>

#include "mole/core/config.hpp"
#include "mole/core/workspace.hpp"

namespace mole::inline MOLE_ABI {

/// A cheap value: copies share the object, which lives as long as the memory.
class Placed {
 public:
  Placed() = default;

  /// A copy of `object`. Throws out_of_memory.
  template <class X>
  Placed(Workspace& memory, const X& object)
      : type_(&typeid(X)), object_(std::construct_at(memory.take<X>(1).data(), object)) {
    static_assert(std::is_trivially_copyable_v<X> && std::is_trivially_destructible_v<X>);
  }

  /// What `Placed(memory, X)` takes.
  template <class X>
  static std::size_t bytes() noexcept {
    ByteCounter counter;
    counter.take<X>(1);
    return counter.bytes();
  }

  /// nullptr if there is no object, or one of another type.
  template <class X>
  X* get() const noexcept {
    return type_ != nullptr && *type_ == typeid(X) ? static_cast<X*>(object_) : nullptr;
  }

 private:
  const std::type_info* type_ = nullptr;
  void* object_ = nullptr;
};

}  // namespace mole::inline MOLE_ABI
