// SPDX-License-Identifier: Apache-2.0
// Golden cases: one safetensors file holds inputs and the true answers. A kind is a function on
// Case<T>, run once with T = double and, where the case has a tolerance for it, with T = float:
//
//   template <class T>
//   void dense(golden::Case<T>& c) {
//     const mole::MatView<const T> x = c.matrix("in.x");
//     ...
//     c.expect("out.y", y);
//   }
//   GOLDEN_KIND("layer.dense", dense);
//
// A run fails when a value is out of tolerance, when something throws, and when a tensor `out.*` or
// `grad.*` of the case was neither expected nor excused.
#pragma once

#include <cmath>
#include <concepts>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <ranges>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "mole/core/context.hpp"
#include "mole/core/view.hpp"
#include "mole/core/workspace.hpp"

namespace golden {

using mole::Index;
using mole::MatView;

struct Tolerance {
  double rel = 0, abs = 0;
};

enum class Dtype { f32, f64, i64, u8 };

struct Tensor {
  Dtype dtype = Dtype::f32;
  std::vector<Index> shape;
  std::vector<std::byte> bytes;

  Index size() const;
  /// Element i in row-major order as double; integers above 2^53 do not occur.
  double at(Index i) const;
  bool is_integer() const { return dtype == Dtype::i64 || dtype == Dtype::u8; }
};

/// One file. Throws std::exception where it breaks the format.
struct CaseFile {
  explicit CaseFile(const std::filesystem::path& path);

  std::filesystem::path folder;  ///< where the file lies
  std::string name;              ///< file name without extension
  std::string kind;
  nlohmann::json config;
  std::optional<Tolerance> f64, f32;
  std::map<std::string, Tensor, std::less<>> tensors;
};

/// What one run found: independent of the compute type.
class Record {
 public:
  Record(const CaseFile& file, Tolerance tolerance) : file_(file), tolerance_(tolerance) {}

  const std::string& name() const { return file_.name; }
  const std::filesystem::path& folder() const { return file_.folder; }
  const nlohmann::json& config() const { return file_.config; }
  template <class V>
  V config(const std::string& key) const {
    return file_.config.at(key).get<V>();
  }
  /// Without the option, or where it is null, `otherwise`.
  template <class V>
  V config(const std::string& key, const V& otherwise) const {
    const auto found = file_.config.find(key);
    return found == file_.config.end() || found->is_null() ? otherwise : found->get<V>();
  }
  /// An option for which this kind knows one value: fails with any other.
  template <class V>
  void expect_option(const std::string& key, const V& known) {
    const auto found = file_.config.find(key);
    if (found == file_.config.end() || *found == nlohmann::json(known)) return;
    failures_.push_back("option " + key + ": only " + nlohmann::json(known).dump() +
                        " is known, got " + found->dump());
  }

  bool has(std::string_view tensor) const { return file_.tensors.contains(tensor); }
  const std::vector<Index>& shape(std::string_view tensor) const { return at(tensor).shape; }
  Index extent(std::string_view tensor, std::size_t axis) const { return shape(tensor).at(axis); }

  /// Elements as any arithmetic type: I64 and U8 tensors, or F32 inputs.
  template <class V>
  std::vector<V> copy(std::string_view tensor) const {
    const Tensor& t = at(tensor);
    std::vector<V> values(static_cast<std::size_t>(t.size()));
    for (Index i = 0; i < t.size(); ++i) values[i] = static_cast<V>(t.at(i));
    return values;
  }
  std::vector<std::int32_t> ints(std::string_view tensor) const {
    return copy<std::int32_t>(tensor);
  }
  std::vector<std::uint8_t> mask(std::string_view tensor) const {
    return copy<std::uint8_t>(tensor);
  }
  double scalar(std::string_view tensor) const { return at(tensor).at(0); }

  /// Compares with the tensor of the case, in row-major order: floats at the tolerance (NaN must
  /// meet NaN, infinity the same infinity), integers exactly.
  template <class V>
  void expect(std::string_view tensor, MatView<V> got) {
    std::vector<double> values;
    for (Index r = 0; r < got.rows; ++r) {
      for (Index c = 0; c < got.cols; ++c) values.push_back(static_cast<double>(got(r, c)));
    }
    compare(tensor, values);
  }
  template <std::ranges::contiguous_range Range>
  void expect(std::string_view tensor, const Range& got) {
    compare(tensor, std::vector<double>(std::ranges::begin(got), std::ranges::end(got)));
  }
  template <class V>
  requires std::is_arithmetic_v<V>
  void expect(std::string_view tensor, V got) { compare(tensor, {static_cast<double>(got)}); }

  /// A tensor of the case that this kind has no counterpart for.
  void excuse(std::string_view tensor) { settled_.emplace(tensor); }

  /// Anything else that must hold.
  void check(bool condition, std::string_view what) {
    if (!condition) failures_.emplace_back(what);
  }
  template <std::ranges::contiguous_range Range>
  void check_same_bits(const Range& a, const Range& b, std::string_view what) {
    const auto bytes = std::ranges::size(a) * sizeof(std::ranges::range_value_t<Range>);
    check(std::ranges::size(a) == std::ranges::size(b) &&
              (bytes == 0 || std::memcmp(std::ranges::data(a), std::ranges::data(b), bytes) == 0),
          what);
  }

  /// Adds a failure for every answer of the case that was not looked at.
  void finish();

  double worst() const { return worst_; }  ///< largest error over its tolerance
  const std::vector<std::string>& failures() const { return failures_; }

  mole::Workspace& memory() { return memory_; }  ///< 64 MiB for tables, tapes, prepared weights
  mole::Context context(int workers = 1) { return {scratch_, workers}; }  ///< its own 64 MiB

 protected:
  const Tensor& at(std::string_view tensor) const;

 private:
  void compare(std::string_view tensor, const std::vector<double>& got);

  const CaseFile& file_;
  Tolerance tolerance_;
  std::set<std::string, std::less<>> settled_;
  std::vector<std::string> failures_;
  double worst_ = 0;
  mole::Buffer memory_block_{std::size_t{1} << 26}, scratch_block_{std::size_t{1} << 26};
  mole::Workspace memory_{memory_block_.span()}, scratch_{scratch_block_.span()};
};

/// A run in compute type T.
template <class T>
class Case : public Record {
 public:
  using Scalar = T;
  using Record::Record;

  /// Elements in row-major order. Valid as long as the case.
  std::span<const T> values(std::string_view tensor) {
    auto found = converted_.find(tensor);
    if (found == converted_.end()) {
      found = converted_.emplace(std::string(tensor), this->template copy<T>(tensor)).first;
    }
    return found->second;
  }

  /// [product of the leading dimensions, last dimension]; a vector is one row.
  MatView<const T> matrix(std::string_view tensor) {
    const std::vector<Index>& shape = this->shape(tensor);
    Index rows = 1;
    for (std::size_t i = 0; i + 1 < shape.size(); ++i) rows *= shape[i];
    return {values(tensor).data(), rows, shape.empty() ? 1 : shape.back()};
  }

  /// Entry `i` of the leading dimension of a tensor of three or more, as `matrix`.
  MatView<const T> slice(std::string_view tensor, Index i) {
    const MatView<const T> all = matrix(tensor);
    const Index rows = all.rows / this->shape(tensor).front();
    return all.row_block(i * rows, rows);
  }

 private:
  std::map<std::string, std::vector<T>, std::less<>> converted_;
};

using RunFloat = void (*)(Case<float>&);
using RunDouble = void (*)(Case<double>&);

/// Makes a kind known; false if it already is.
bool add_kind(std::string kind, RunFloat in_float, RunDouble in_double);

/// Its cases are skipped in this build.
bool skip_kind(std::string kind);

}  // namespace golden

#define GOLDEN_JOIN_(a, b) a##b
#define GOLDEN_NAME_(line) GOLDEN_JOIN_(golden_kind_, line)
/// A kind that needs more than the headers; the build without the compiled library skips it.
#ifdef MOLE_HEADER_ONLY
#define GOLDEN_COMPILED_KIND(kind, run) \
  [[maybe_unused]] static const bool GOLDEN_NAME_(__LINE__) = golden::skip_kind(kind)
#else
#define GOLDEN_COMPILED_KIND(kind, run) GOLDEN_KIND(kind, run)
#endif
/// Registers `run`, a function template or generic lambda on Case<T>&. Once per kind, at namespace
/// scope.
#define GOLDEN_KIND(kind, run)                                                  \
  [[maybe_unused]] static const bool GOLDEN_NAME_(__LINE__) = golden::add_kind( \
      kind, [](golden::Case<float>& c) { run(c); }, [](golden::Case<double>& c) { run(c); })
