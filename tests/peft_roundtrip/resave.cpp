// SPDX-License-Identifier: Apache-2.0
// peft_resave FROM TO        loads an adapter and saves it
// peft_resave FROM TO new    reads its layers into matrices and saves those as a new adapter
#include <cstdio>
#include <exception>
#include <string>
#include <vector>

#include "mole/io/peft_writer.hpp"

namespace {

using mole::Index;
using mole::MatView;

template <class T>
void save_as_new(const mole::PeftAdapter& adapter, const std::string& folder) {
  std::vector<std::vector<T>> memory;
  const auto matrix = [&memory](Index rows, Index cols) {
    std::vector<T>& elements = memory.emplace_back(static_cast<std::size_t>(rows * cols));
    return MatView<T>(elements.data(), rows, cols);
  };
  std::vector<mole::LoraWeights<T>> layers;
  for (const mole::LoraModule& module : adapter.modules()) {
    const MatView<T> down = matrix(module.rank, module.d_in);
    const MatView<T> up = matrix(module.d_out, module.rank);
    adapter.read_down(module, down);
    adapter.read_up(module, up);
    layers.push_back({module.path, module.kind, module.scale, down, up, {}});
    if (module.bias_tensor.empty()) continue;
    const MatView<T> bias = matrix(1, module.d_out);
    adapter.read_bias(module, bias);
    layers.back().bias = bias;
  }
  mole::PeftSaveOptions options;
  options.use_rslora = adapter.config().use_rslora;
  mole::save_peft<T>(folder, layers, options);
}

}  // namespace

int main(int count, char** words) {
  if (count < 3 || count > 4) {
    std::fprintf(stderr, "usage: peft_resave FROM TO [new]\n");
    return 2;
  }
  try {
    mole::PeftOptions options;
    options.residual_base = true;
    const mole::PeftAdapter adapter = mole::load_peft(words[1], {}, options);
    if (count == 3) {
      mole::save_peft(words[2], adapter);
    } else {
      save_as_new<double>(adapter, words[2]);
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
