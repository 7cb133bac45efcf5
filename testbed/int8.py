"""Derive INT8 W8A8 variants (compressed-tensors) of the testbed's models: `python -m testbed.int8 --all`.

Every linear layer but the head gets int8 weights with one symmetric scale per output channel, `scale = max|w| / 127`,
rounded to nearest; activations are quantised per token while serving. A variant that is newer than its source is kept.
"""

import argparse
import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from testbed.export import MODELS, write_json

VARIANTS: Final = Path("build/testbed")
SUFFIX: Final = "-int8"
FORMAT_VERSION: Final = 1
"""Raise it when this script writes something else for the same source."""

QUANTIZATION_CONFIG: Final[dict[str, Any]] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "global_compression_ratio": None,
    "kv_cache_scheme": None,
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "channel",
                "group_size": None,
                "block_structure": None,
                "dynamic": False,
                "actorder": None,
                "observer": "minmax",
                "observer_kwargs": {},
            },
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "group_size": None,
                "block_structure": None,
                "dynamic": True,
                "actorder": None,
                "observer": None,
                "observer_kwargs": {},
            },
            "output_activations": None,
        }
    },
}


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 weights [out, in] and bf16 scales [out, 1] with `weight ~ int8 * scale`, off by scale / 2 at most.

    The scale is rounded to bf16 before it divides, upwards, so that what is stored is what was used and nothing clips.
    """
    exact = weight.float().abs().amax(dim=1, keepdim=True).clamp_min(1e-8) / 127
    rounded = exact.bfloat16()
    scale = torch.where(rounded.float() < exact, torch.nextafter(rounded, torch.full_like(rounded, torch.inf)), rounded)
    return (weight.float() / scale.float()).round().to(torch.int8), scale


def dequantize(weight: Tensor, scale: Tensor) -> Tensor:
    """Return the fp32 weights that an int8 matrix stands for."""
    return weight.float() * scale.float()


def is_quantized(name: str) -> bool:
    """Say whether a parameter of the bf16 model becomes int8."""
    return name.endswith("_proj.weight")


def convert(source: Path, target: Path) -> bool:
    """Write the INT8 variant of the model in `source` to `target`; return False when it was already there."""
    weights = source / "model.safetensors"
    fingerprint = (
        f"{FORMAT_VERSION}:" + hashlib.sha256(weights.read_bytes() + (source / "config.json").read_bytes()).hexdigest()
    )
    stamp = target / "source.json"
    if stamp.exists() and json.loads(stamp.read_text(encoding="utf-8"))["fingerprint"] == fingerprint:
        return False
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(weights).items():
        if is_quantized(name):
            tensors[name], tensors[name + "_scale"] = quantize(tensor)
        else:
            tensors[name] = tensor
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix == ".json":
            shutil.copyfile(file, partial / file.name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    write_json(partial / "config.json", config | {"quantization_config": QUANTIZATION_CONFIG})
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    (partial / "model.safetensors").chmod(0o644)
    write_json(partial / "source.json", {"source": source.name, "fingerprint": fingerprint})
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    return True


def main() -> None:
    known = sorted(path.parent.name for path in MODELS.glob("*/model.safetensors"))
    parser = argparse.ArgumentParser(description="Derive INT8 W8A8 variants of the testbed's models.")
    parser.add_argument("names", nargs="*", metavar="name", help=f"models to convert: {', '.join(known)}")
    parser.add_argument("--all", action="store_true", help="convert every model")
    parser.add_argument("--out", type=Path, default=VARIANTS, help="folder for the variants (default: %(default)s)")
    arguments = parser.parse_args()
    names = known if arguments.all else arguments.names
    if not names or set(names) - set(known):
        parser.error(f"name models out of {', '.join(known)}, or say --all")
    for name in names:
        target = arguments.out / (name + SUFFIX)
        began_s = time.monotonic()
        is_new = convert(MODELS / name, target)
        took_s = time.monotonic() - began_s
        print(f"{target}: INT8 W8A8 " + (f"written in {took_s:.1f} s" if is_new else "is up to date"), flush=True)


if __name__ == "__main__":
    main()
