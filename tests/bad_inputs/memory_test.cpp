// SPDX-License-Identifier: Apache-2.0
// Rows 113-124: memory that overlaps, is missing, misaligned or strided, and floating-point states.
// Rows 116 and 119 speak of C and Python; here they are what a MatView can express: a pointer off
// its alignment, and row strides. A column stride other than 1 has no form.
#ifdef __SSE__
#include <xmmintrin.h>  // before the allocation hooks: Clang's version declares one of them
#endif

#include <sys/mman.h>

#include <cfenv>
#include <limits>

#include "bad_inputs/rows.hpp"
#include "layers/layer_case.hpp"
#include "support/compare.hpp"

namespace test::bad_inputs {
namespace {

using mole::Index;
using mole::LayerInput;
using mole::MatView;
using Words = std::vector<std::string>;

constexpr Index kIn = 13, kOut = 11, kExperts = 4, kTokens = 5;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

template <class T = float>
TopKMixture<T> mixture(Index in = kIn, Index out = kOut) {
  return TopKMixture<T>(mole::TopKRouter<T>({.width = in, .experts = kExperts, .k = 2}),
                        make_bank<T>(in, out, kExperts));
}

/// A mixture with x, y0 and the y that it gives.
template <class T = float>
struct Problem {
  explicit Problem(Index in = kIn, Index out = kOut)
      : layer(mixture<T>(in, out), kTokens),
        x(normal_matrix<T>(kTokens, in, 1)),
        y0(normal_matrix<T>(kTokens, out, 2)),
        y(layer.infer(x, y0)) {}

  /// Forward with memory of the caller's.
  void run(MatView<const T> tokens, MatView<T> output) {
    layer.layer.forward(layer.prepared, LayerInput<T>(tokens), output, nullptr, layer.context);
  }

  LayerCase<TopKMixture<T>> layer;
  Matrix<T> x, y0, y;
};

void copy(MatView<const float> from, MatView<float> to) {
  for (Index t = 0; t < from.rows; ++t) std::ranges::copy(from.row(t), to.row(t).begin());
}

/// x and y in one block, y `shift` elements after x, with these strides.
Case overlapping(std::string name, Index shift, Index x_stride, Index y_stride, Words words) {
  return works(std::move(name), [=] {
    Problem problem(kIn, kIn);
    std::vector<float> block(static_cast<std::size_t>(64 + 3 * kTokens * kIn), 0.5f);
    float* start = block.data() + 32;
    const MatView<const float> x(start, kTokens, kIn, x_stride);
    const MatView<float> y(start + shift, kTokens, kIn, y_stride);
    const std::vector<float> before = block;
    check_refused({Errc::invalid_argument,
                   words,
                   [&] { problem.run(x, y); },
                   [&] { return block == before; },
                   0,
                   {}});
  });
}

void share_rows() {
  Problem problem(kIn, kIn);
  Matrix<float> both(kTokens, 2 * kIn);
  for (const bool x_first : {true, false}) {
    const auto x = both.view().col_block(x_first ? 0 : kIn, kIn);
    const auto y = both.view().col_block(x_first ? kIn : 0, kIn);
    copy(problem.x, x);
    copy(problem.y0, y);
    problem.run(x, y);
    CHECK(bit_difference(MatView<const float>(y), problem.y) == "");
    CHECK(bit_difference(MatView<const float>(x), problem.x) == "");
  }
}

void refuse_backward() {
  Problem problem(kIn, kIn);
  problem.layer.record(problem.x, problem.y0);
  Matrix<float> dy = problem.y0;
  const Matrix<float> before = dy;
  const auto differentiate = [&](MatView<float> dx) {
    problem.layer.backward(problem.x, dy, {.x = dx});
  };
  check_refused({Errc::invalid_argument,
                 {"dx", "overlaps dy"},
                 [&] { differentiate(dy); },
                 [&] { return bit_difference(dy, before).empty(); },
                 0,
                 {}});
  check_refused({Errc::invalid_argument,
                 {"dx", "overlaps x"},
                 [&] { differentiate(problem.x); },
                 nullptr,
                 0,
                 {}});
}

void write_over_weights() {
  Problem problem;
  const MatView<float> weight = problem.layer.params.router.weight;
  const MatView<float> y(weight.data, kTokens - 2, kOut);
  copy(problem.y0.view().row_block(0, y.rows), y);
  problem.run(problem.x.view().row_block(0, y.rows), y);
  CHECK(bit_difference(MatView<const float>(y), problem.y.view().row_block(0, y.rows)) == "");
}

std::vector<Row> overlap_rows() {
  const Words words = {"y: overlaps x", "260 bytes"};
  const auto overlaps = [&](const char* name, Index shift, Index x_stride = kIn,
                            Index y_stride = kIn) {
    return overlapping(name, shift, x_stride, y_stride, {"y", "overlaps x", "bytes"});
  };
  return {
      {113,
       "y is x: there is no entry that works in place",
       {overlapping("", 0, kIn, kIn, words),
        works("AdaptedLinear",
              [] {
                using Layer = mole::AdaptedLinear<TopKMixture<float>>;
                LayerCase<Layer> layer(Layer(mixture(kIn, kIn)), kTokens);
                Matrix<float> x = normal_matrix<float>(kTokens, kIn, 1);
                const Matrix<float> before = x;
                check_refused({Errc::invalid_argument,
                               {"y: overlaps x"},
                               [&] {
                                 layer.layer.forward(layer.prepared, x, x.view(), nullptr,
                                                     layer.context);
                               },
                               [&] { return bit_difference(x, before).empty(); },
                               0,
                               {}});
              }),
        works("dx is dy or x", refuse_backward)}},
      {114,
       "y overlaps x in part; columns of one matrix may lie side by side",
       {overlaps("one element", kTokens * kIn - 1), overlaps("one row", kIn),
        overlaps("one element before", 1 - kTokens * kIn),
        overlaps("one column", kIn - 1, 2 * kIn, 2 * kIn),
        overlaps("between the rows, at another stride", kIn, 3 * kIn, kIn),
        works("side by side", share_rows),
        works("over the weights: forward reads its packed copy", write_over_weights)}},
  };
}

/// A view that forward must refuse as x or as y; then nothing has been written.
Case bad_view(std::string name, Index stride, Words words, Index offset_bytes = 0) {
  return works(std::move(name), [=] {
    Problem problem;
    std::vector<float> block(400, 0.5f);
    auto* start = reinterpret_cast<float*>(reinterpret_cast<std::uintptr_t>(block.data() + 150) +
                                           static_cast<std::uintptr_t>(offset_bytes));
    const std::vector<float> before = block;
    Matrix<float> y = problem.y0;
    const MatView<const float> x(start, kTokens, kIn, stride);
    Words x_words = words, y_words = words;
    x_words.emplace_back("x: ");
    y_words.emplace_back("y: ");
    check_refused({Errc::invalid_argument,
                   x_words,
                   [&] { problem.run(x, y); },
                   [&] { return bit_difference(y, problem.y0).empty(); },
                   0,
                   {}});
    const MatView<float> output(start, kTokens, kOut, stride);
    check_refused({Errc::invalid_argument,
                   y_words,
                   [&] { problem.run(problem.x, output); },
                   [&] { return block == before; },
                   0,
                   {}});
  });
}

void refuse_null() {
  Problem problem;
  Matrix<float> y = problem.y0;
  check_refused({Errc::invalid_argument,
                 {"x: needs memory"},
                 [&] {
                   problem.run({nullptr, kTokens, kIn}, y);
                 },
                 [&] { return bit_difference(y, problem.y0).empty(); },
                 0,
                 {}});
  check_refused({Errc::invalid_argument,
                 {"y: needs memory"},
                 [&] {
                   problem.run(problem.x, {nullptr, kTokens, kOut});
                 },
                 nullptr,
                 0,
                 {}});
  problem.run({nullptr, 0, kIn}, {nullptr, 0, kOut});
}

void keep_bits_at_any_alignment() {
  Problem problem;
  std::vector<float> x_block(200), y_block(200);
  for (Index offset = 0; offset < 16; ++offset) {
    CAPTURE(offset);
    const MatView<float> x(x_block.data() + offset, kTokens, kIn);
    const MatView<float> y(y_block.data() + 15 - offset, kTokens, kOut);
    copy(problem.x, x);
    copy(problem.y0, y);
    problem.run(x, y);
    CHECK(bit_difference(MatView<const float>(y), problem.y) == "");
  }
}

void leave_padding_alone() {
  Problem problem;
  constexpr Index kStride = 20;
  std::vector<float> x_block(kTokens * kStride, kNan), y_block(kTokens * kStride, kNan);
  const MatView<float> x(x_block.data(), kTokens, kIn, kStride);
  const MatView<float> y(y_block.data(), kTokens, kOut, kStride);
  copy(problem.x, x);
  copy(problem.y0, y);
  problem.run(x, y);
  CHECK(bit_difference(MatView<const float>(y), problem.y) == "");
  for (Index t = 0; t < kTokens; ++t) {
    for (Index n = kOut; n < kStride; ++n) CHECK(std::isnan(y_block[t * kStride + n]));
  }
}

std::vector<Row> view_rows() {
  return {
      {115, "no memory: refused with tokens, fine without", {works("", refuse_null)}},
      {116,
       "a pointer off the alignment of its elements",
       {bad_view("1 byte", 20, {"1 bytes off"}, 1), bad_view("3 bytes", 20, {"3 bytes off"}, 3)}},
      {117,
       "any alignment of whole elements: the same bits",
       {works("", keep_bits_at_any_alignment)}},
      {118, "rows with NaN between them: not read, not written", {works("", leave_padding_alone)}},
      {119,
       "row strides that let rows overlap, for inputs too: a broadcast row is refused",
       {bad_view("0", 0, {"stride 0"}), bad_view("-20", -20, {"stride -20"}),
        bad_view("one less than the columns", kOut - 1, {"stride 10"})}},
  };
}

/// What the host has set in the floating-point unit, without the flags of what happened.
struct FloatState {
  int rounding = std::fegetround();
#ifdef __SSE__
  unsigned control = _mm_getcsr() & ~0x3fu;
#else
  unsigned control = 0;
#endif
  bool operator==(const FloatState&) const = default;
};

/// Sets an unusual state for a while: rounding upward, subnormals flushed to zero.
class UnusualState {
 public:
  UnusualState() {
    std::fegetenv(&before_);
    std::fesetround(FE_UPWARD);
#ifdef __SSE__
    _mm_setcsr(_mm_getcsr() | 0x8040u);
#endif
  }
  ~UnusualState() {
    std::fesetenv(&before_);
  }
  UnusualState(const UnusualState&) = delete;
  UnusualState& operator=(const UnusualState&) = delete;

 private:
  std::fenv_t before_{};
};

/// Forward, and a forward that is refused: neither changes the state.
template <class T>
void keep_state(Problem<T>& problem) {
  const FloatState before;
  Matrix<T> y = problem.y0;
  problem.run(problem.x, y);
  CHECK(FloatState() == before);
  CHECK_THROWS_AS(problem.run(problem.x, {nullptr, kTokens, kOut}), mole::Error);
  CHECK(FloatState() == before);
}

/// Subnormal x and y0, ordinary weights: the double layer on the same numbers is the reference.
void compute_with_subnormals() {
  Problem<float> problem;
  Problem<double> reference;
  for (Index t = 0; t < kTokens; ++t) {
    for (Index i = 0; i < kIn; ++i) reference.x(t, i) = problem.x(t, i) *= 0x1p-130f;
    for (Index n = 0; n < kOut; ++n) reference.y0(t, n) = problem.y0(t, n) *= 0x1p-130f;
  }
  const Matrix<float> y = problem.layer.infer(problem.x, problem.y0);
  const Matrix<double> want = reference.layer.infer(reference.x, reference.y0);
  // Every step of a chain rounds to a multiple of the smallest subnormal.
  constexpr double kBound = 64 * static_cast<double>(std::numeric_limits<float>::denorm_min());
  double worst = 0, largest = 0;
  for (Index t = 0; t < kTokens; ++t) {
    for (Index n = 0; n < kOut; ++n) {
      worst = std::max(worst, std::fabs(static_cast<double>(y(t, n)) - want(t, n)));
      largest = std::max(largest, std::fabs(want(t, n) - reference.y0(t, n)));
    }
  }
  CHECK(worst <= kBound);
  CHECK(largest > 1000 * kBound);
  keep_state(problem);
}

void keep_the_hosts_state() {
  Problem problem;
  {
    const UnusualState unusual;
    keep_state(problem);
    const Matrix<float> y = problem.layer.infer(problem.x, problem.y0);
    for (Index t = 0; t < kTokens; ++t) {
      for (const float value : y.view().row(t)) CHECK(std::isfinite(value));
    }
  }
  CHECK(bit_difference(problem.layer.infer(problem.x, problem.y0), problem.y) == "");
}

/// Rows 2^31 elements apart, in address space that is never filled.
void reach_beyond_31_bits() {
  constexpr std::size_t kStride = std::size_t{1} << 31;
  constexpr std::size_t kBytes = (2 * kStride + 64) * sizeof(float);
  void* block = ::mmap(nullptr, kBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (block == MAP_FAILED) {
    WARN("no address space of 16 GB here: not tested");
    return;
  }
  Problem problem;
  const MatView<float> x(static_cast<float*>(block), 3, kIn, kStride);
  copy(problem.x.view().row_block(0, 3), x);
  Matrix<float> y(3, kOut, [&](Index t, Index n) { return problem.y0(t, n); });
  problem.run(x, y);
  CHECK(bit_difference(y, problem.y.view().row_block(0, 3)) == "");

  const MatView<float> far(static_cast<float*>(block) + kIn, 3, kOut, kStride);
  copy(problem.y0.view().row_block(0, 3), far);
  problem.run(problem.x.view().row_block(0, 3), far);
  CHECK(bit_difference(MatView<const float>(far), y) == "");
  ::munmap(block, kBytes);
}

/// All tokens forced to expert 2: the bits of that expert alone, whatever the others hold.
void one_expert_for_all() {
  Problem problem;
  LayerCase<mole::Lora<float>> plain(
      mole::Lora<float>({.in = kIn, .out = kOut, .rank = {8}, .scale = {0.5f}}), kTokens);
  auto& experts = problem.layer.params.experts;
  std::copy_n(experts.down[2], 8 * kIn, plain.params.experts.down[0]);
  std::copy_n(experts.up[2], 8 * kOut, plain.params.experts.up[0]);
  plain.prepare();
  experts.down[0][0] = kNan;
  experts.up[3][0] = kNan;
  problem.layer.prepare();
  const std::vector<std::int32_t> forced(kTokens, 2);
  LayerInput<float> input = problem.x;
  input.overrides.forced = forced;
  CHECK(bit_difference(problem.layer.infer(input, problem.y0),
                       plain.infer(problem.x, problem.y0)) == "");
}

void overwrite_or_add() {
  Problem problem;
  Matrix<float> old = problem.y0;
  old(1, 2) = kNan;
  const Matrix<float> added = problem.layer.infer(problem.x, old);
  for (Index t = 0; t < kTokens; ++t) {
    for (Index n = 0; n < kOut; ++n) {
      CHECK((t == 1 && n == 2 ? std::isnan(added(t, n)) : added(t, n) == problem.y(t, n)));
    }
  }
  using Layer = mole::AdaptedLinear<TopKMixture<float>>;
  LayerCase<Layer> layer(Layer(mixture()), kTokens);
  const Matrix<float> nothing(kTokens, kOut);
  CHECK(bit_difference(layer.infer(problem.x, old), layer.infer(problem.x, nothing)) == "");
}

std::vector<Row> number_rows() {
  return {
      {120,
       "subnormal numbers: within rounding of double; the state of the unit stays",
       {works("", compute_with_subnormals)}},
      {121,
       "a host that rounds upward and flushes subnormals: its state stays, results are finite",
       {works("", keep_the_hosts_state)}},
      {122, "elements more than 2^31 apart", {works("", reach_beyond_31_bits)}},
      {123,
       "an expert that gets every token, others that get none",
       {works("", one_expert_for_all)}},
      {124,
       "NaN in the old y: AdaptedLinear overwrites it, a mixture adds to it",
       {works("", overwrite_or_add)}},
  };
}

}  // namespace

std::vector<Row> memory_rows() {
  std::vector<Row> all;
  for (const auto& part : {overlap_rows(), view_rows(), number_rows()}) {
    all.insert(all.end(), part.begin(), part.end());
  }
  return all;
}

TEST_CASE("bad inputs: memory and numbers", "[bad_inputs][layers]") {
  run(memory_rows());
}

}  // namespace test::bad_inputs
