// SPDX-License-Identifier: Apache-2.0
#include "io/peft_tensors.hpp"

#include <cmath>

#include "io/convert.hpp"
#include "io/text.hpp"

namespace mole::inline MOLE_ABI {
namespace io {
namespace {

void check_dtype(const StoredTensor& tensor, const std::string& file) {
  require(is_weight(tensor.dtype), Errc::unsupported, file, ": ", in_quotes(tensor.name),
          " has the dtype \"", name(tensor.dtype), "\", weights must be F64, F32, F16 or BF16");
}

void check_dimensions(const StoredTensor& tensor, std::size_t dimensions, const std::string& file) {
  check_dtype(tensor, file);
  require(tensor.shape.size() == dimensions, Errc::shape_mismatch, file, ": ",
          in_quotes(tensor.name), " has ", tensor.shape.size(), " dimensions, expected ",
          dimensions);
  require(tensor.elements() > 0, Errc::shape_mismatch, file, ": ", in_quotes(tensor.name), " is ",
          shape_text(tensor.shape), ", it holds nothing");
}

// True if any value is not zero; every one must be finite.
bool check_values(const StoredTensor& tensor, const std::string& file) {
  Index non_finite = 0, first = -1;
  bool any = false;
  with_weight_type(tensor, file, [&]<class W>(W) {
    for (Index i = 0; i < tensor.elements(); ++i) {
      const auto value = convert<double>(load<W>(tensor.bytes.data(), i));
      any = any || value != 0;
      if (!std::isfinite(value) && non_finite++ == 0) first = i;
    }
  });
  require(non_finite == 0, Errc::numeric_error, file, ": ", in_quotes(tensor.name), " holds ",
          non_finite, " non-finite values, first at index ", first);
  return any;
}

void check_pair(const StoredTensor& down_tensor, const StoredTensor& up_tensor,
                const PeftMatch& match, const HostModule* host, const std::string& file) {
  const std::vector<Index>& down = down_tensor.shape;
  const std::vector<Index>& up = up_tensor.shape;
  const bool turned =
      down[0] != match.rank && down[1] == match.rank && (host == nullptr || down[0] == host->d_in);
  require(!turned, Errc::shape_mismatch, file, ": ", in_quotes(down_tensor.name), " is ",
          shape_text(down), ", expected [", down[1], ", ", down[0], "]: transposed?");
  require(down[0] == match.rank, Errc::shape_mismatch, file, ": ", in_quotes(down_tensor.name),
          " has rank ", down[0], ", ", match.rank_pattern < 0 ? "the config" : "rank_pattern",
          " says ", match.rank);
  require(up[1] == match.rank, Errc::shape_mismatch, file, ": ", in_quotes(up_tensor.name),
          " has rank ", up[1], ", its lora_A has rank ", down[0]);
  if (host == nullptr) return;
  require(down[1] == host->d_in, Errc::shape_mismatch, file, ": ", in_quotes(down_tensor.name),
          " has width ", down[1], ", the base layer has d_in ", host->d_in);
  require(up[0] == host->d_out, Errc::shape_mismatch, file, ": ", in_quotes(up_tensor.name),
          " has height ", up[0], ", the base layer has d_out ", host->d_out);
}

// Of the parameters whose shape the host's description settles; empty for any other.
std::vector<Index> expected_shape(const SavedTensor& saved, const HostModule& host) {
  if (host.kind == ModuleKind::other) return {};
  if (saved.parameter == "bias") return {host.d_out};
  if (saved.parameter != "weight") return {};
  if (host.kind == ModuleKind::linear) return {host.d_out, host.d_in};
  return {host.d_in, host.d_out};
}

}  // namespace

bool check_lora(const LoraTensors& tensors, const PeftMatch& match, const HostModule* host,
                const std::string& file) {
  check_dimensions(*tensors.down, 2, file);
  check_dimensions(*tensors.up, 2, file);
  check_pair(*tensors.down, *tensors.up, match, host, file);
  check_values(*tensors.down, file);
  bool effect = check_values(*tensors.up, file);
  if (tensors.bias != nullptr) {
    check_dimensions(*tensors.bias, 1, file);
    require(tensors.bias->shape[0] == tensors.up->shape[0], Errc::shape_mismatch, file, ": ",
            in_quotes(tensors.bias->name), " has ", tensors.bias->shape[0],
            " elements, its lora_B has height ", tensors.up->shape[0]);
    effect = check_values(*tensors.bias, file) || effect;
  }
  return effect;
}

void check_saved(const SavedTensor& saved, const HostModule* host, const std::string& file) {
  const StoredTensor& tensor = *saved.tensor;
  check_dtype(tensor, file);
  require(tensor.elements() > 0, Errc::shape_mismatch, file, ": ", in_quotes(tensor.name), " is ",
          shape_text(tensor.shape), ", it holds nothing");
  if (host != nullptr) {
    const std::vector<Index> expected = expected_shape(saved, *host);
    require(expected.empty() || tensor.shape == expected, Errc::shape_mismatch, file, ": ",
            in_quotes(tensor.name), " is ", shape_text(tensor.shape), ", the base model has ",
            shape_text(expected));
  }
  check_values(tensor, file);
}

}  // namespace io
}  // namespace mole::inline MOLE_ABI
