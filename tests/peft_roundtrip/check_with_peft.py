#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""check_with_peft.py PEFT_RESAVE ADAPTER...

PEFT itself reads what the library wrote. Every adapter folder is loaded and saved by the program
peft_resave, once as it is and once as a new adapter from matrices. PEFT loads the original and the
copies into the same small model, in double, and the outputs of all modules are compared, as are the
scales and the adapter's tensors. Exit status 1 if an output differs by more than 1e-12 (relative to
the largest), or a scale or tensor of the plain copy differs at all.
"""
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

PREFIX = "base_model.model."
LIMIT = 1e-12


def base_model(folder: Path) -> tuple[torch.nn.Module, dict[str, str]]:
    """A tree of random modules with the paths and shapes of the adapter, and their kinds."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    shapes = {name.removeprefix(PREFIX): t.shape for name, t in tensors.items()}
    root, kinds = torch.nn.Module(), {}

    def put(path: str, module: torch.nn.Module, kind: str) -> None:
        place = root
        *parents, last = path.split(".")
        for parent in parents:
            if parent not in place._modules:
                place.add_module(parent, torch.nn.Module())
            place = place._modules[parent]
        place.add_module(last, module)
        kinds[path] = kind

    torch.manual_seed(7)
    for name in sorted(shapes):
        if not name.endswith(".lora_A.weight"):
            continue
        path = name.removesuffix(".lora_A.weight")
        d_in, d_out = shapes[name][1], shapes[path + ".lora_B.weight"][0]
        conv1d = config.get("fan_in_fan_out", False)
        put(path, Conv1D(d_out, d_in) if conv1d else torch.nn.Linear(d_in, d_out), "linear")
    for name, shape in sorted(shapes.items()):
        path, parameter = name.rsplit(".", 1)
        if "lora_" in name or path.endswith("base_layer") or path in kinds:
            continue
        if parameter == "weight" and "embed" in path:
            put(path, torch.nn.Embedding(*shape), "embedding")
        elif parameter == "weight":
            put(path, torch.nn.Linear(shape[1], shape[0], bias=False), "linear")
        elif parameter == "bias":
            put(path, torch.nn.Linear(11, shape[0]), "linear")
    return root, kinds


def outputs(folder: Path, original: Path) -> tuple[dict, dict, dict]:
    """What every module of the model computes with the adapter, its tensors and its scales."""
    model, kinds = base_model(original)
    config = PeftConfig.from_pretrained(folder)
    config.task_type = None  # the small model generates nothing
    residual = config.init_lora_weights in ("pissa", "olora")
    model = model if residual else model.double()  # PEFT makes residual bases in fp32 only
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", r".*adapter keys.*\.lora_[AB]\.(default\.)?(weight|bias)'")
        loaded = PeftModel.from_pretrained(
            model, folder, config=config, autocast_adapter_dtype=False)
    loaded = loaded.double().eval()
    y, scales = {}, {}
    for path, kind in kinds.items():
        module = loaded.base_model.model.get_submodule(path)
        generator = torch.Generator().manual_seed(len(path))
        if kind == "embedding":
            x = torch.arange(3)
        else:
            base = module.original_module if hasattr(module, "original_module") else module
            base = base.base_layer if hasattr(base, "base_layer") else base
            width = base.weight.shape[0 if isinstance(base, Conv1D) else 1]
            x = torch.randn(5, width, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            y[path] = module(x)
        if hasattr(module, "scaling"):
            scales[path] = module.scaling["default"]
    weights = {k: v for k, v in loaded.state_dict().items() if "lora_" in k}
    return y, weights, scales


def largest_difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max(((a[k] - b[k]).abs().max() / a[k].abs().max()).item() for k in a)


def check(resave: str, folder: Path, scratch: Path) -> bool:
    y, weights, scales = outputs(folder, folder)
    good = True
    for how, mode in (("copy", []), ("new", ["new"])):
        target = scratch / how
        subprocess.run([resave, folder, target, *mode], check=True)
        replaces = len(y) > len(scales) or any(
            ".base_layer." in k for k in load_file(folder / "adapter_model.safetensors"))
        residual = PeftConfig.from_pretrained(folder).init_lora_weights in ("pissa", "olora")
        if how == "new" and (replaces or residual):
            continue  # layers alone do not carry changes of the base
        y2, weights2, scales2 = outputs(target, folder)
        difference = largest_difference(y, y2)
        same_scales = scales == scales2
        same_weights = weights.keys() == weights2.keys() and all(
            torch.equal(weights[k], weights2[k]) for k in weights)
        good = good and difference <= LIMIT and same_scales and same_weights
        print(f"{folder.name:24} {how:5} {len(scales):3} layers  output difference {difference:.1e}"
              f"  scales {'equal' if same_scales else 'DIFFER'}"
              f"  tensors {'equal' if same_weights else 'DIFFER'}")
    return good


def main() -> int:
    if len(sys.argv) < 3:
        print(__doc__)
        return 2
    good = True
    for folder in sys.argv[2:]:
        with tempfile.TemporaryDirectory() as scratch:
            good = check(sys.argv[1], Path(folder), Path(scratch)) and good
    print("all equal" if good else "DIFFERENT")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
