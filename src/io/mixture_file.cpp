// SPDX-License-Identifier: Apache-2.0
#include "mole/io/mixture_file.hpp"

#include <algorithm>
#include <charconv>
#include <set>

#include "io/description_json.hpp"
#include "io/json.hpp"
#include "io/text.hpp"

namespace mole::inline MOLE_ABI {
namespace {

using io::in_quotes;
using io::Json;

constexpr const char* kFormatKey = "mole.format";
constexpr const char* kKindKey = "mole.kind";
constexpr const char* kConfigKey = "mole.config";
constexpr const char* kKind = "mixtures";
constexpr std::string_view kReserved = "mole.";

std::string joined(const std::vector<std::string_view>& names) {
  std::string text;
  for (const std::string_view name : names) {
    text.append(text.empty() ? "" : ", ").append(in_quotes(name));
    if (text.size() > 300) return text + ", ...";
  }
  return text;
}

/// Whether `start`, or `start` and a dot and more, is `name`. The empty name is before all.
bool is_start_of(std::string_view start, std::string_view name) {
  return name.starts_with(start) &&
         (start.empty() || name.size() == start.size() || name[start.size()] == '.');
}

/// Whether tensors of the two mixtures could have one name.
bool collide(std::string_view a, std::string_view b) {
  return is_start_of(a, b) || is_start_of(b, a);
}

std::string collision_text(std::string_view a, std::string_view b) {
  if (a.empty() || b.empty()) return "a mixture without a name must be alone in its file";
  if (a == b) return "mixture " + in_quotes(a) + " is there twice";
  const bool a_first = a.size() < b.size();
  return "mixture " + in_quotes(a_first ? a : b) + " is the start of mixture " +
         in_quotes(a_first ? b : a) + ", their tensors could have the same names";
}

const std::string& metadata(const SafeTensors& file, const char* key) {
  const auto place = file.metadata().find(key);
  require(place != file.metadata().end(), Errc::format_error, file.name(),
          ": is no mixture file, the metadata lack ", in_quotes(key));
  return place->second;
}

/// Digits without leading zero; the number, or -1.
int format_number(std::string_view text) {
  int number = -1;
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, number);
  const bool plain = error == std::errc() && stop == end && !text.starts_with('-') &&
                     (text == "0" || !text.starts_with('0'));
  return plain ? number : -1;
}

int known_format(const SafeTensors& file) {
  const std::string& text = metadata(file, kFormatKey);
  const int format = format_number(text);
  require(format >= 0, Errc::format_error, file.name(), ": mole.format is ", in_quotes(text),
          ", expected a number");
  require(format >= 1, Errc::format_error, file.name(),
          ": mole.format is 0, which never existed: the first is 1");
  require(format <= kMixtureFormat, Errc::unsupported, file.name(), ": mole.format is ", format,
          ", the newest that this library reads is ", kMixtureFormat);
  return format;
}

/// The object that mole.config holds in format 1.
class RecordsReader {
 public:
  RecordsReader(const std::string& text, const std::string& file)
      : where_(file + ": mole.config"), root_(io::parse_json_object(text, where_)) {}

  std::vector<MixtureRecord> read() const {
    require_members(root_, where_, {"mixtures"});
    const Json& list = member(root_, where_, "mixtures");
    require(list.is_array(), Errc::config_error, where_, ": \"mixtures\": expected a list, found ",
            io::json_kind(list));
    std::vector<MixtureRecord> records;
    for (const Json& entry : list) records.push_back(record(entry, records.size()));
    return records;
  }

 private:
  static void require_members(const Json& object, const std::string& where,
                              const std::vector<std::string_view>& known) {
    require(object.is_object(), Errc::config_error, where, ": expected an object, found ",
            io::json_kind(object));
    for (const auto& item : object.items()) {
      require(std::find(known.begin(), known.end(), item.key()) != known.end(), Errc::config_error,
              where, ": ", in_quotes(item.key()), " is unknown, expected ", joined(known));
    }
  }

  static const Json& member(const Json& object, const std::string& where, const char* name) {
    const auto place = object.find(name);
    require(place != nullptr, Errc::config_error, where, ": ", in_quotes(name), " is missing");
    return *place;
  }

  static std::string text(const Json& value, const std::string& where, const char* what) {
    require(value.is_string(), Errc::config_error, where, ": \"", what,
            "\": expected a string, found ", io::json_kind(value));
    return value.get<std::string>();
  }

  MixtureRecord record(const Json& entry, std::size_t number) const {
    const std::string where = where_ + ": mixture " + std::to_string(number);
    require_members(entry, where, {"name", "layer", "optional_tensors"});
    MixtureRecord record;
    record.name = text(member(entry, where, "name"), where, "name");
    const Json& layer = member(entry, where, "layer");
    require(layer.is_object(), Errc::config_error, where, ": \"layer\": expected an object, found ",
            io::json_kind(layer));
    record.layer = io::description_of(layer, where);
    const Json& optional = member(entry, where, "optional_tensors");
    require(optional.is_array(), Errc::config_error, where,
            ": \"optional_tensors\": expected a list, found ", io::json_kind(optional));
    for (const Json& path : optional) {
      record.optional_tensors.push_back(text(path, where, "optional_tensors"));
    }
    return record;
  }

  std::string where_;
  Json root_;
};

void check_names(const std::vector<MixtureRecord>& records, const std::string& file) {
  std::vector<std::string_view> names;
  for (const MixtureRecord& record : records) names.push_back(record.name);
  std::sort(names.begin(), names.end());
  std::set<std::string_view> seen;
  for (const std::string_view name : names) {
    if (name.empty() && names.size() > 1) {
      fail(Errc::config_error, file, ": ", collision_text(name, names.back()));
    }
    require(!seen.contains(name), Errc::config_error, file, ": ", collision_text(name, name));
    for (std::size_t dot = name.find('.'); dot != name.npos; dot = name.find('.', dot + 1)) {
      const std::string_view start = name.substr(0, dot);
      require(!seen.contains(start), Errc::config_error, file, ": ", collision_text(start, name));
    }
    seen.insert(name);
  }
}

/// The name of the mixture whose tensor this is, or nothing.
std::optional<std::string_view> owner(std::string_view tensor,
                                      const std::set<std::string_view>& names) {
  if (names.contains("")) return "";
  for (std::size_t dot = tensor.find('.'); dot != tensor.npos; dot = tensor.find('.', dot + 1)) {
    const auto place = names.find(tensor.substr(0, dot));
    if (place != names.end()) return *place;
  }
  return std::nullopt;
}

void check_tensors(const SafeTensors& file, const std::vector<MixtureRecord>& records) {
  std::set<std::string_view> names;
  for (const MixtureRecord& record : records) names.insert(record.name);
  for (const StoredTensor& tensor : file.tensors()) {
    require(owner(tensor.name, names).has_value(), Errc::config_error, file.name(), ": tensor ",
            in_quotes(tensor.name), " belongs to no mixture of the file");
  }
}

void check_metadata(const SafeTensors& file) {
  for (const auto& [key, value] : file.metadata()) {
    const bool known = key == kFormatKey || key == kKindKey || key == kConfigKey;
    require(known || !key.starts_with(kReserved), Errc::format_error, file.name(),
            ": the metadata have the unknown key ", in_quotes(key));
  }
  const std::string& kind = metadata(file, kKindKey);
  require(kind == kKind, Errc::unsupported, file.name(), ": mole.kind: expected ", in_quotes(kKind),
          ", found ", in_quotes(kind));
}

bool holds_exactly(Dtype target, Dtype stored) {
  if (target == stored) return true;
  const bool is_half = stored == Dtype::f16 || stored == Dtype::bf16;
  return (target == Dtype::f64 && (stored == Dtype::f32 || is_half)) ||
         (target == Dtype::f32 && is_half);
}

}  // namespace

bool MixtureRecord::has(std::string_view path) const noexcept {
  return std::find(optional_tensors.begin(), optional_tensors.end(), path) !=
         optional_tensors.end();
}

std::string MixtureRecord::tensor(std::string_view path) const {
  return name.empty() ? std::string(path) : name + "." + std::string(path);
}

std::string MixtureRecord::where() const {
  return "mixture " + in_quotes(name);
}

namespace detail {

void require_leaves(const std::vector<LeafShape>& expected, const std::vector<LeafShape>& given,
                    std::span<const std::string_view> optional) {
  for (std::size_t i = 0; i < std::max(expected.size(), given.size()); ++i) {
    require(i < given.size(), Errc::shape_mismatch, expected[std::min(i, expected.size() - 1)].path,
            " is missing");
    require(i < expected.size() && given[i].path == expected[i].path, Errc::shape_mismatch,
            given[i].path, " is not a parameter of this layer");
    const bool absent = given[i].rows == 0 && given[i].cols == 0;
    if (absent && std::find(optional.begin(), optional.end(), given[i].path) != optional.end()) {
      continue;
    }
    require(given[i] == expected[i], Errc::shape_mismatch, given[i].path, ": expected [",
            expected[i].rows, ", ", expected[i].cols, "], got [", given[i].rows, ", ",
            given[i].cols, "]");
  }
}

const StoredTensor& TensorPlan::find(const std::string& path, std::optional<Dtype> target) {
  const StoredTensor* tensor = file_.find(record_.tensor(path));
  require(tensor != nullptr, Errc::config_error, where(), ": tensor ",
          in_quotes(record_.tensor(path)), " is missing");
  require(is_weight(tensor->dtype), Errc::unsupported, where(), ": tensor ",
          in_quotes(tensor->name), " is stored as ", mole::name(tensor->dtype),
          ", expected F64, F32, F16 or BF16");
  require(!target.has_value() || holds_exactly(*target, tensor->dtype), Errc::unsupported, where(),
          ": tensor ", in_quotes(tensor->name), " is stored as ", mole::name(tensor->dtype),
          ", which the layer's ", mole::name(target.value_or(tensor->dtype)),
          " cannot hold without rounding");
  return *tensor;
}

void TensorPlan::expect(const std::string& path, Index rows, Index cols,
                        std::optional<Dtype> target) {
  if (rows == 0 && cols == 0) return;
  const StoredTensor& tensor = find(path, target);
  parameters_.push_back(tensor.name);
  require(tensor.shape == std::vector<Index>{rows, cols}, Errc::shape_mismatch, where(),
          ": tensor ", in_quotes(tensor.name), ": expected [", rows, ", ", cols, "], found ",
          io::shape_text(tensor.shape));
}

bool TensorPlan::expect_buffer(const std::string& path, std::optional<Dtype> target) {
  if (!record_.has(path)) return false;
  const StoredTensor& tensor = find(path, target);
  buffers_.push_back(tensor.name);
  require(tensor.shape.size() == 1, Errc::shape_mismatch, where(), ": tensor ",
          in_quotes(tensor.name), ": expected one dimension, found ", io::shape_text(tensor.shape));
  return true;
}

void TensorPlan::finish() const {
  std::set<std::string_view> names(parameters_.begin(), parameters_.end());
  names.insert(buffers_.begin(), buffers_.end());
  for (const StoredTensor& tensor : file_.tensors()) {
    const bool is_own = is_start_of(record_.name, tensor.name);
    require(!is_own || names.contains(tensor.name), Errc::config_error, where(), ": tensor ",
            in_quotes(tensor.name), " is no part of this layer");
  }
  for (const std::string& path : record_.optional_tensors) {
    require(names.contains(record_.tensor(path)), Errc::config_error, where(),
            ": optional_tensors: ", in_quotes(path), " is no part of this layer");
  }
}

}  // namespace detail

MixtureFile MixtureFile::open(const std::string& path, const SafeTensorsLimits& limits) {
  return MixtureFile(SafeTensors::open(path, limits));
}

bool MixtureFile::is_mixture_file(const SafeTensors& file) noexcept {
  return file.metadata().contains(kFormatKey);
}

MixtureFile::MixtureFile(SafeTensors file) : file_(std::move(file)) {
  format_ = known_format(file_);
  switch (format_) {
    case 1:
      check_metadata(file_);
      records_ = RecordsReader(metadata(file_, kConfigKey), file_.name()).read();
      break;
    default: fail(Errc::internal, "format ", format_, " has no reader");
  }
  check_names(records_, file_.name());
  check_tensors(file_, records_);
}

std::vector<std::string> MixtureFile::names() const {
  std::vector<std::string> names;
  for (const MixtureRecord& record : records_) names.push_back(record.name);
  return names;
}

const MixtureRecord& MixtureFile::at(std::string_view name) const {
  std::vector<std::string_view> names;
  for (const MixtureRecord& record : records_) {
    if (record.name == name) return record;
    names.emplace_back(record.name);
  }
  fail(Errc::not_found, file_.name(), ": has no mixture ", in_quotes(name),
       io::nearest_text(name, names));
}

const MixtureRecord& MixtureFile::only() const {
  std::vector<std::string_view> names;
  for (const MixtureRecord& record : records_) names.emplace_back(record.name);
  require(names.size() == 1, Errc::invalid_argument, file_.name(), ": holds ", names.size(),
          " mixtures, load one by name: ", joined(names));
  return records_.front();
}

void MixtureFile::require_plausible(const std::string& where, std::size_t bytes) const {
  std::size_t stored = 0;
  for (const StoredTensor& tensor : file_.tensors()) stored += tensor.bytes.size();
  constexpr std::size_t kSlack = std::size_t{1} << 24;
  require(bytes <= kSlack || (bytes - kSlack) / 16 <= stored, Errc::config_error, where,
          ": its config asks for ", bytes, " bytes of weights, the file holds ", stored);
}

void MixtureFileWriter::check_name(const std::string& name) const {
  require(io::first_invalid_utf8(name) == std::string_view::npos &&
              name.find('\0') == std::string::npos,
          Errc::invalid_argument, "mixture ", in_quotes(name), ": a name is UTF-8 without NUL");
  for (const MixtureRecord& record : records_) {
    require(!collide(record.name, name), Errc::invalid_argument, collision_text(record.name, name));
  }
}

void MixtureFileWriter::set_metadata(std::string key, std::string value) {
  require(!key.starts_with(kReserved), Errc::invalid_argument, "metadata key ", in_quotes(key),
          ": keys that start with \"mole.\" are reserved");
  writer_.set_metadata(std::move(key), std::move(value));
}

SafeTensorsWriter MixtureFileWriter::complete() const {
  Json list = Json::array();
  for (const MixtureRecord& record : records_) {
    Json& entry = list.push_back(Json::object());
    entry.add("name", record.name);
    entry.add("layer", io::json_of(record.layer));
    entry.add("optional_tensors", record.optional_tensors);
  }
  Json config = Json::object();
  config.add("mixtures", std::move(list));
  SafeTensorsWriter file = writer_;
  file.set_metadata(kFormatKey, std::to_string(kMixtureFormat));
  file.set_metadata(kKindKey, kKind);
  file.set_metadata(kConfigKey, config.dump());
  return file;
}

}  // namespace mole::inline MOLE_ABI
