// SPDX-License-Identifier: Apache-2.0
// Checks for layers of any make. A trial holds one problem:
//
//   template <class T> struct MyTrial : LayerTrial<T> {
//     MyTrial()                               registers every tensor that has a gradient
//     std::size_t scratch_bytes(int workers)
//     void forward(const Context&)            packs the parameters, says packed(), writes y
//     void backward(const Context&)           adds into the gradients, for dy
//   };
//
//   check_layer<MyTrial>();
#pragma once

#include <algorithm>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "mole/core/context.hpp"
#include "mole/core/params.hpp"
#include "mole/core/random.hpp"
#include "mole/core/workspace.hpp"
#include "support/alloc_counter.hpp"
#include "support/catch.hpp"
#include "support/gradcheck.hpp"
#include "support/thread_pool.hpp"

namespace test {

template <class T>
struct LayerTrial {
  using Scalar = T;
  struct Tensor {
    std::string name;
    MatView<T> value, gradient;
    bool is_parameter = false;
  };

  LayerTrial() = default;
  LayerTrial(const LayerTrial&) = delete;
  LayerTrial& operator=(const LayerTrial&) = delete;

  MatView<T> zeros(Index rows, Index cols) {
    const MatView<T> view = memory.template take<T>(rows, cols);
    std::fill_n(view.data, view.size(), T(0));
    return view;
  }
  /// Normal numbers of the given size that float holds too.
  void fill(MatView<T> view, double size) {
    const mole::Random random(7, 31);
    for (Index r = 0; r < view.rows; ++r) {
      for (Index c = 0; c < view.cols; ++c) {
        view(r, c) = static_cast<T>(static_cast<float>(size * random.normal(next_++)));
      }
    }
  }
  MatView<T> normal(Index rows, Index cols, double size = 1) {
    const MatView<T> view = zeros(rows, cols);
    fill(view, size);
    return view;
  }
  /// An input of normal numbers with a gradient of its own.
  Tensor input(const char* name, Index rows, Index cols) {
    tensors.push_back({name, normal(rows, cols), zeros(rows, cols)});
    return tensors.back();
  }
  /// Parameters of normal numbers, and their gradients.
  template <class P>
  void adopt(const P& params, const P& grad, double size = 0.5) {
    P::visit(
        [&](const mole::Leaf& leaf, const auto& value, const auto& gradient) {
          if (value.empty()) return;
          fill(value, size);
          tensors.push_back({leaf.path(), value, gradient, true});
        },
        params, grad);
  }
  /// Said by `forward` once the parameters are packed.
  void packed() const {
    for (const Tensor& tensor : tensors) {
      if (!spoils || !tensor.is_parameter) continue;
      for (Index r = 0; r < tensor.value.rows; ++r) {
        std::ranges::fill(tensor.value.row(r), std::numeric_limits<T>::quiet_NaN());
      }
    }
  }
  /// Memory of exactly the size that the layer says it needs, filled with NaN.
  mole::Workspace& exact(std::size_t bytes) {
    blocks_.push_back(std::make_unique<Exact>(bytes));
    return blocks_.back()->memory;
  }
  /// The same for packed parameters, from its start.
  mole::Workspace packing(std::size_t bytes) {
    if (packing_.size() != bytes) packing_ = mole::Buffer(bytes);
    return mole::Workspace(packing_.span());
  }

  std::vector<T> results() const {
    std::vector<T> all;
    const auto append = [&](MatView<T> view) {
      for (Index r = 0; r < view.rows; ++r) {
        all.insert(all.end(), view.row(r).begin(), view.row(r).end());
      }
    };
    append(y);
    for (const Tensor& tensor : tensors) append(tensor.gradient);
    return all;
  }

 private:
  struct Exact {
    explicit Exact(std::size_t bytes) : block(bytes), memory(block.span()) {
      std::ranges::fill(block.span(), std::byte{0xff});
    }
    mole::Buffer block;
    mole::Workspace memory;
  };
  std::vector<std::unique_ptr<Exact>> blocks_;
  mole::Buffer block_{std::size_t{1} << 22}, packing_;
  std::uint64_t next_ = 0;

 public:
  mole::Workspace memory{block_.span()};
  std::vector<Tensor> tensors;
  MatView<T> y, dy;
  bool spoils = false;  ///< packed parameters become NaN where they came from
};

/// One forward and backward with exactly the scratch memory that the layer asks for.
template <class Trial>
void run(Trial& trial, bool backward, int workers = 1, ThreadPool* pool = nullptr) {
  mole::Buffer block(trial.scratch_bytes(workers));
  std::ranges::fill(block.span(), std::byte{0xff});
  mole::Workspace scratch(block.span());
  mole::Context context{.scratch = scratch, .workers = workers};
  if (pool != nullptr) context.hook = &ThreadPool::run, context.pool = pool;
  trial.forward(context);
  if (!backward) return;
  for (const auto& tensor : trial.tensors) {
    for (Index r = 0; r < tensor.gradient.rows; ++r) {
      for (auto& value : tensor.gradient.row(r)) value = 0;
    }
  }
  trial.backward(context);
}

template <template <class> class Trial>
void check_gradients() {
  Trial<double> trial;
  run(trial, true);
  for (const auto& tensor : trial.tensors) {
    INFO(tensor.name);
    const auto loss = [&] {
      run(trial, false);
      return weighted_sum(trial.dy, trial.y);
    };
    CHECK(gradient_error(tensor.value, tensor.gradient, loss) == "");
  }
}

template <class Trial>
void check_workers() {
  Trial trial;
  run(trial, true);
  const auto expected = trial.results();
  for (const int workers : {2, 3, 7}) {
    INFO(workers << " workers");
    ThreadPool pool(workers);
    run(trial, true, workers, &pool);
    CHECK(bit_difference(trial.results(), expected) == "");
  }
}

template <class Trial>
void check_allocations() {
  if (!kCountsAllocations) return;
  Trial trial;
  run(trial, true);
  mole::Buffer block(trial.scratch_bytes(1));
  mole::Workspace scratch(block.span());
  const mole::Context context{.scratch = scratch};
  const std::size_t free = scratch.free_bytes();
  const long before = allocations();
  trial.forward(context);
  trial.backward(context);
  CHECK(allocations() - before == 0);
  CHECK(scratch.free_bytes() == free);
}

/// Packed parameters are a copy: what becomes of the others changes no bit.
template <class Trial>
void check_snapshot() {
  Trial trial;
  run(trial, false);
  const auto expected = trial.results();
  trial.spoils = true;
  run(trial, false);
  CHECK(bit_difference(trial.results(), expected) == "");
}

/// A call with less scratch than the layer needs is refused before anything is written; with what
/// the layer asks for, it is not.
template <class Trial>
void check_scratch(bool backward) {
  Trial trial;
  run(trial, true);
  for (MatView<typename Trial::Scalar> view : {trial.y, trial.dy}) trial.fill(view, 1);
  const auto call = [&](const mole::Context& context) {
    backward ? trial.backward(context) : trial.forward(context);
  };
  const auto before = trial.results();
  const std::size_t enough = trial.scratch_bytes(1), step = enough / 97 + 1;
  int refused = 0;
  for (std::size_t bytes = 0; bytes + mole::kAlignment < enough; bytes += step) {
    mole::Buffer block(bytes);
    mole::Workspace scratch(block.span());
    mole::Errc code{};
    try {
      call(mole::Context{.scratch = scratch});
    } catch (const mole::Error& error) {
      code = error.code();
    }
    if (code == mole::Errc{}) break;
    REQUIRE(code == mole::Errc::out_of_memory);
    REQUIRE(bit_difference(trial.results(), before) == "");
    ++refused;
  }
  CHECK(refused > 10);
  mole::Buffer block(enough);
  mole::Workspace scratch(block.span());
  call(mole::Context{.scratch = scratch});
  CHECK(bit_difference(trial.results(), before) != "");
}

/// Exact gradients, the same bits for any number of workers, no allocation.
template <template <class> class Trial>
void check_layer() {
  check_gradients<Trial>();
  check_workers<Trial<float>>();
  check_workers<Trial<double>>();
  check_allocations<Trial<float>>();
}

}  // namespace test
