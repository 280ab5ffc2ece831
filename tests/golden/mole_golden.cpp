// SPDX-License-Identifier: Apache-2.0
// mole_golden DIR... [--cases GLOB]... [--supported FILE]
//
// Runs the golden cases below the folders. Without --cases, a case whose name matches a line of
// tests/golden/supported.txt must pass and any other is skipped; with --cases, exactly the cases
// that match run, and all of them must pass. Exit status 0 if nothing failed, 1 if something did,
// 2 for wrong use.
#include <fnmatch.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <stdexcept>

#include "golden/golden.hpp"

namespace golden {

namespace {

struct Runner {
  RunFloat in_float;
  RunDouble in_double;
};

std::map<std::string, Runner, std::less<>>& kinds() {
  static std::map<std::string, Runner, std::less<>> registry;
  return registry;
}

std::vector<std::byte> read_bytes(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::vector<std::byte> bytes(static_cast<std::size_t>(std::filesystem::file_size(path)));
  file.read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  if (!file) throw std::runtime_error("cannot be read");
  return bytes;
}

Dtype dtype_of(const std::string& text) {
  if (text == "F32") return Dtype::f32;
  if (text == "F64") return Dtype::f64;
  if (text == "I64") return Dtype::i64;
  if (text == "U8") return Dtype::u8;
  throw std::runtime_error("unknown dtype " + text);
}

std::size_t bytes_of(Dtype dtype) {
  return dtype == Dtype::u8 ? 1 : dtype == Dtype::f32 ? 4 : 8;
}

Tensor read_tensor(const nlohmann::json& entry, std::span<const std::byte> data) {
  Tensor tensor;
  tensor.dtype = dtype_of(entry.at("dtype").get<std::string>());
  tensor.shape = entry.at("shape").get<std::vector<Index>>();
  const auto [begin, end] = entry.at("data_offsets").get<std::pair<std::size_t, std::size_t>>();
  if (begin > end || end > data.size()) throw std::runtime_error("data beyond the file");
  std::size_t count = 1;
  for (const Index extent : tensor.shape) {
    const auto n = static_cast<std::size_t>(extent);
    if (extent < 0 || (n != 0 && count > data.size() / n)) throw std::runtime_error("bad shape");
    count *= n;
  }
  if (end - begin != count * bytes_of(tensor.dtype)) throw std::runtime_error("bad size");
  tensor.bytes.assign(data.begin() + begin, data.begin() + end);
  return tensor;
}

std::optional<Tolerance> read_tolerance(const nlohmann::json& all, const char* type) {
  if (!all.contains(type)) return std::nullopt;
  return Tolerance{all.at(type).at("rel").get<double>(), all.at(type).at("abs").get<double>()};
}

template <class V>
double element(const Tensor& tensor, Index i) {
  V value;
  std::memcpy(&value, tensor.bytes.data() + static_cast<std::size_t>(i) * sizeof(V), sizeof(V));
  return static_cast<double>(value);
}

/// Error over tolerance.
double ratio(double got, double want, Tolerance tolerance) {
  constexpr double kFar = std::numeric_limits<double>::infinity();
  if (got == want || (std::isnan(got) && std::isnan(want))) return 0;
  if (!std::isfinite(got) || !std::isfinite(want)) return kFar;
  return std::fabs(got - want) / (tolerance.abs + tolerance.rel * std::fabs(want));
}

std::string text_of(double value) {
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, "%.9g", value);
  return buffer;
}

std::string position(Index flat, const std::vector<Index>& shape) {
  std::string text;
  for (std::size_t axis = shape.size(); axis-- > 0; flat /= shape[axis]) {
    text = std::to_string(flat % shape[axis]) + (text.empty() ? "" : ", ") + text;
  }
  return "[" + text + "]";
}

}  // namespace

bool add_kind(std::string kind, RunFloat in_float, RunDouble in_double) {
  const bool added = kinds().emplace(kind, Runner{in_float, in_double}).second;
  if (!added) {
    std::fprintf(stderr, "kind %s is registered twice\n", kind.c_str());
    std::abort();
  }
  return added;
}

bool skip_kind(std::string kind) {
  return add_kind(std::move(kind), nullptr, nullptr);
}

Index Tensor::size() const {
  Index count = 1;
  for (const Index extent : shape) count *= extent;
  return count;
}

double Tensor::at(Index i) const {
  if (i < 0 || i >= size()) throw std::out_of_range("element " + std::to_string(i));
  switch (dtype) {
    case Dtype::f32: return element<float>(*this, i);
    case Dtype::f64: return element<double>(*this, i);
    case Dtype::i64: return element<std::int64_t>(*this, i);
    default: return element<std::uint8_t>(*this, i);
  }
}

CaseFile::CaseFile(const std::filesystem::path& path)
    : folder(path.parent_path()), name(path.stem().string()) {
  const std::vector<std::byte> bytes = read_bytes(path);
  std::uint64_t header_size = 0;
  if (bytes.size() < sizeof header_size) throw std::runtime_error("no header");
  std::memcpy(&header_size, bytes.data(), sizeof header_size);
  if (header_size > bytes.size() - sizeof header_size) throw std::runtime_error("header too long");
  const auto* text = reinterpret_cast<const char*>(bytes.data()) + sizeof header_size;
  const auto header = nlohmann::json::parse(text, text + header_size);
  const auto data = std::span(bytes).subspan(sizeof header_size + header_size);
  const auto about = nlohmann::json::parse(header.at("__metadata__").at("case").get<std::string>());
  kind = about.at("kind").get<std::string>();
  config = about.at("config");
  f64 = read_tolerance(about.at("tolerance"), "f64");
  f32 = read_tolerance(about.at("tolerance"), "f32");
  if (!f64) throw std::runtime_error("no tolerance for double");
  for (const auto& [key, entry] : header.items()) {
    if (key != "__metadata__") tensors.emplace(key, read_tensor(entry, data));
  }
}

const Tensor& Record::at(std::string_view tensor) const {
  const auto found = file_.tensors.find(tensor);
  if (found == file_.tensors.end()) {
    throw std::out_of_range("the case has no tensor " + std::string(tensor));
  }
  return found->second;
}

void Record::compare(std::string_view tensor, const std::vector<double>& got) {
  const Tensor& want = at(tensor);
  settled_.emplace(tensor);
  if (static_cast<Index>(got.size()) != want.size()) {
    failures_.push_back(std::string(tensor) + ": " + std::to_string(got.size()) +
                        " elements, expected " + std::to_string(want.size()));
    return;
  }
  const Tolerance tolerance = want.is_integer() ? Tolerance{} : tolerance_;
  double worst = 0;
  Index where = 0;
  for (Index i = 0; i < want.size(); ++i) {
    const double r = ratio(got[i], want.at(i), tolerance);
    if (r > worst) worst = r, where = i;
  }
  worst_ = std::max(worst_, worst);
  if (worst > 1) {
    failures_.push_back(std::string(tensor) + " " + position(where, want.shape) + ": got " +
                        text_of(got[where]) + ", expected " + text_of(want.at(where)) + ", " +
                        text_of(worst) + " times the tolerance");
  }
}

void Record::finish() {
  for (const auto& [name, tensor] : file_.tensors) {
    const bool is_answer = name.starts_with("out.") || name.starts_with("grad.");
    if (is_answer && !settled_.contains(name)) failures_.push_back(name + ": not checked");
  }
}

}  // namespace golden

namespace {

namespace fs = std::filesystem;

struct Arguments {
  std::vector<fs::path> folders;
  std::vector<std::string> cases;
  fs::path supported = MOLE_TEST_DATA "/golden/supported.txt";
};

/// One line of the table.
struct Line {
  int passed = 0, failed = 0, skipped = 0;
  double worst_double = 0, worst_float = 0;
};

struct Report {
  std::map<std::string, Line> kinds;
  Line total;
};

Arguments parse(int count, char** words) {
  Arguments arguments;
  for (int i = 1; i < count; ++i) {
    const std::string word = words[i];
    if (word == "--cases" || word == "--supported") {
      if (++i == count) throw std::invalid_argument(word + " needs a value");
      if (word == "--cases") arguments.cases.emplace_back(words[i]);
      if (word == "--supported") arguments.supported = words[i];
    } else if (word.starts_with("--cases=")) {
      arguments.cases.push_back(word.substr(std::strlen("--cases=")));
    } else if (word.starts_with("-")) {
      throw std::invalid_argument("unknown option " + word);
    } else if (!fs::is_directory(word)) {
      throw std::invalid_argument(word + " is not a folder");
    } else {
      arguments.folders.emplace_back(word);
    }
  }
  if (arguments.folders.empty()) throw std::invalid_argument("no folder given");
  return arguments;
}

std::vector<std::string> read_list(const fs::path& path) {
  std::ifstream file(path);
  if (!file) throw std::invalid_argument("cannot read the list " + path.string());
  std::vector<std::string> globs;
  for (std::string line; std::getline(file, line);) {
    line.erase(std::find(line.begin(), line.end(), '#'), line.end());
    line.erase(std::remove_if(line.begin(), line.end(), [](unsigned char c) { return c <= ' '; }),
               line.end());
    if (!line.empty()) globs.push_back(line);
  }
  return globs;
}

/// The last glob that fits the name decides; one that begins with ! takes it out again.
bool matches(const std::string& name, const std::vector<std::string>& globs) {
  bool matched = false;
  for (const std::string& glob : globs) {
    const bool takes_out = glob.starts_with("!");
    if (fnmatch(glob.c_str() + takes_out, name.c_str(), 0) == 0) matched = !takes_out;
  }
  return matched;
}

/// The weight files of adapter folders have the same extension and are no cases.
bool is_case_file(const fs::path& path) {
  return path.extension() == ".safetensors" && path.stem() != "adapter_model" &&
         path.stem() != "xlora_classifier";
}

std::vector<fs::path> find_cases(const std::vector<fs::path>& folders) {
  std::vector<fs::path> found;
  for (const fs::path& folder : folders) {
    for (const auto& entry : fs::recursive_directory_iterator(folder)) {
      if (is_case_file(entry.path())) found.push_back(entry.path());
    }
  }
  std::sort(found.begin(), found.end());
  return found;
}

/// Runs one case in compute type T; returns what is wrong with it.
template <class T>
std::vector<std::string> run_in(const golden::CaseFile& file, golden::Tolerance tolerance,
                                void (*run)(golden::Case<T>&), double& worst) {
  golden::Case<T> c(file, tolerance);
  std::vector<std::string> failures;
  try {
    run(c);
    c.finish();
  } catch (const std::exception& error) {
    failures.emplace_back(error.what());
  }
  failures.insert(failures.end(), c.failures().begin(), c.failures().end());
  worst = std::max(worst, c.worst());
  for (std::string& failure : failures) {
    failure = (sizeof(T) == sizeof(double) ? "double: " : "float: ") + failure;
  }
  return failures;
}

bool is_skipped(const std::string& kind) {
  const auto found = golden::kinds().find(kind);
  return found != golden::kinds().end() && found->second.in_double == nullptr;
}

std::vector<std::string> run_case(const golden::CaseFile& file, Line& line) {
  const auto found = golden::kinds().find(file.kind);
  if (found == golden::kinds().end()) return {"nothing runs the kind " + file.kind};
  std::vector<std::string> failures =
      run_in<double>(file, *file.f64, found->second.in_double, line.worst_double);
  if (file.f32) {
    const auto more = run_in<float>(file, *file.f32, found->second.in_float, line.worst_float);
    failures.insert(failures.end(), more.begin(), more.end());
  }
  return failures;
}

void note_failure(const std::string& name, const std::vector<std::string>& failures) {
  std::printf("FAILED %s\n", name.c_str());
  for (const std::string& failure : failures) std::printf("  %s\n", failure.c_str());
}

/// Reads and, if it is wanted, runs the case of one file.
void visit_file(const fs::path& path, const Arguments& arguments,
                const std::vector<std::string>& wanted, Report& report) {
  const std::string name = path.stem().string();
  const bool matched = matches(name, wanted);
  if (!matched && !arguments.cases.empty()) return;
  std::optional<golden::CaseFile> file;
  try {
    file.emplace(path);
  } catch (const std::exception& error) {
    ++report.kinds["(unreadable)"].failed;
    return note_failure(path.string(), {error.what()});
  }
  Line& line = report.kinds[file->kind];
  if (!matched) {
    ++line.skipped;
    return;
  }
  if (is_skipped(file->kind)) {
    ++line.skipped;
    return;
  }
  const std::vector<std::string> failures = run_case(*file, line);
  ++(failures.empty() ? line.passed : line.failed);
  if (!failures.empty()) note_failure(name, failures);
}

std::string cell(const Line& line, double worst) {
  if (line.passed + line.failed == 0) return "-";
  char text[32];
  std::snprintf(text, sizeof text, "%.2g", worst);
  return text;
}

void print(Report& report) {
  std::printf("%-32s %6s %6s %7s   worst error / tolerance\n", "", "", "", "");
  std::printf("%-32s %6s %6s %7s %10s %10s\n", "kind", "passed", "failed", "skipped", "double",
              "float");
  for (const auto& [kind, line] : report.kinds) {
    std::printf("%-32s %6d %6d %7d %10s %10s\n", kind.c_str(), line.passed, line.failed,
                line.skipped, cell(line, line.worst_double).c_str(),
                cell(line, line.worst_float).c_str());
    report.total.passed += line.passed;
    report.total.failed += line.failed;
    report.total.skipped += line.skipped;
  }
  std::printf("%d passed, %d failed, %d skipped\n", report.total.passed, report.total.failed,
              report.total.skipped);
}

int run(const Arguments& arguments) {
  const std::vector<std::string> wanted =
      arguments.cases.empty() ? read_list(arguments.supported) : arguments.cases;
  Report report;
  for (const fs::path& path : find_cases(arguments.folders)) {
    visit_file(path, arguments, wanted, report);
  }
  if (report.kinds.empty()) std::printf("no case found\n");
  print(report);
  return report.kinds.empty() || report.total.failed > 0 ? 1 : 0;
}

}  // namespace

int main(int count, char** words) {
  try {
    return run(parse(count, words));
  } catch (const std::exception& error) {
    std::fprintf(stderr,
                 "mole_golden: %s\nusage: mole_golden DIR... [--cases GLOB]... "
                 "[--supported FILE]\n",
                 error.what());
    return 2;
  }
}
