"""GPU memory that an engine will take, before it is started: as configured, as measured, else estimated from its files.

The estimate is a lower bound to refuse by, not a plan: weights as large as their files, the KV cache that was asked
for (at least one longest request), and OVERHEAD_BYTES for context, graphs and activations.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from msgspec import Struct

from msd.config import Config, EngineConfig
from msd.core.memory import gpu_bytes_of, utilisation
from msd.profile import Profile

OVERHEAD_BYTES = 1_500_000_000
"""CUDA context, graphs and activations. 2 to 3 GB are usual for an 8 B model, less for small ones."""
HALVED = ("fp8", "int8")
WEIGHT_SUFFIXES = (".safetensors", ".bin")


class Need(Struct, frozen=True, kw_only=True):
    """What one engine takes (bytes), and where the figure comes from, for a person."""

    engine: str
    num_bytes: int
    origin: str


class Unfit(Struct, frozen=True, kw_only=True):
    """A finding: the engine (index in the configuration) and why it cannot be, with the numbers."""

    index: int
    message: str


def need(
    engine: EngineConfig, config: Config, base_dir: Path, device_bytes: int, profile: Profile | None = None
) -> Need:
    """GPU memory of the engine while it is resident, as the planner goes by it. 0 when nothing is known of it."""
    estimate = _estimate(engine, config, base_dir) if engine.kind == "vllm" else _nothing(engine)
    measured = profile.of(engine.name) if profile is not None else None
    num_bytes, origin = gpu_bytes_of(engine, measured, device_bytes, config.residency.reserve_bytes, estimate.num_bytes)
    match origin:
        case "estimate":
            return estimate
        case "profile":
            told = "measured by msd profile"
        case "utilisation" if "kv_cache_memory_bytes" in engine.args:
            return _nothing(engine)  # its weights are not here: the planner takes what vLLM would at most
        case "utilisation":
            told = (
                f"gpu_memory_utilization {utilisation(engine)} of the whole; args.kv_cache_memory_bytes would bound it"
            )
        case _:
            told = origin
    return Need(engine=engine.name, num_bytes=num_bytes, origin=told)


def estimates(config: Config, base_dir: Path) -> dict[str, int]:
    """What each engine will take by its files, for the planner; those of which nothing is known are left out."""
    made = {
        engine.name: _estimate(engine, config, base_dir).num_bytes for engine in config.engine if engine.kind == "vllm"
    }
    return {name: num_bytes for name, num_bytes in made.items() if num_bytes}


def unfit(
    config: Config, base_dir: Path, device_bytes: int, device: str, profile: Profile | None = None
) -> Iterator[Unfit]:
    """Engines that cannot fit: alone, or beside those that always stay. The reserve stays free.

    `device_bytes`: memory of the GPU that is called `device`.
    """
    reserve = config.residency.reserve_bytes
    room = device_bytes - reserve
    has = f"{device} has {gb(device_bytes)}, of which {gb(reserve)} stay free (residency.reserve_bytes)"
    always: list[Need] = []
    for index, engine in enumerate(config.engine):
        wants = need(engine, config, base_dir, device_bytes, profile)
        if not wants.num_bytes:
            continue
        says = f"{wants.engine} {gb(wants.num_bytes)} ({wants.origin})"
        if wants.num_bytes > room:
            yield Unfit(index=index, message=f"it cannot fit: it needs {says}, {has}")
        elif (before := sum(other.num_bytes for other in always)) + wants.num_bytes > room:
            beside = " + ".join(f"{other.engine} {gb(other.num_bytes)}" for other in always)
            short = gb(before + wants.num_bytes - room)
            yield Unfit(
                index=index,
                message=f"it cannot fit beside what always stays: {says} + {beside} is {short} too much, {has}; "
                'residency = "auto" lets modes take turns',
            )
        elif engine.residency == "always":
            always.append(wants)


def _nothing(engine: EngineConfig) -> Need:
    return Need(engine=engine.name, num_bytes=0, origin="unknown")


def _estimate(engine: EngineConfig, config: Config, base_dir: Path) -> Need:
    model = next((model for model in config.model if model.name == engine.model), None)
    folder = engine.weights or (model.path if model is not None else "")
    weights = file_bytes(base_dir / folder) if folder else 0
    if not weights:
        return _nothing(engine)
    if engine.precision in HALVED and not engine.weights:
        weights //= 2  # 16-bit files, quantised while they are loaded
    draft = file_bytes(base_dir / engine.draft) if engine.draft else 0
    cache = _cache_bytes(engine, base_dir / folder)
    parts = f"weights {gb(weights + draft)}, KV cache {gb(cache)}, overhead {gb(OVERHEAD_BYTES)}"
    return Need(engine=engine.name, num_bytes=weights + draft + cache + OVERHEAD_BYTES, origin=f"estimated: {parts}")


def file_bytes(folder: Path) -> int:
    """Size of the weight files in a model's folder; 0 when there are none."""
    if not folder.is_dir():
        return 0
    sizes = {
        suffix: sum(file.stat().st_size for file in folder.glob(f"*{suffix}") if file.is_file())
        for suffix in WEIGHT_SUFFIXES
    }
    return next((size for size in sizes.values() if size), 0)  # some folders hold the same weights in both formats


def _cache_bytes(engine: EngineConfig, folder: Path) -> int:
    """The KV cache that was asked for, else that of one longest request, without which vLLM does not start."""
    asked = engine.args.get("kv_cache_memory_bytes")
    if isinstance(asked, int) and not isinstance(asked, bool):
        return asked
    longest = engine.args.get("max_model_len")
    try:
        model: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
        heads = int(model["num_attention_heads"])
        head_dim = int(model.get("head_dim") or int(model["hidden_size"]) // heads)
        per_token = 2 * int(model["num_hidden_layers"]) * int(model.get("num_key_value_heads") or heads) * head_dim
        tokens = longest if isinstance(longest, int) else int(model["max_position_embeddings"])
    except (OSError, ValueError, TypeError, KeyError):
        return 0
    width = 1 if str(engine.args.get("kv_cache_dtype", "auto")).startswith("fp8") else 2
    return per_token * width * int(tokens)


def gb(num_bytes: int) -> str:
    """Bytes for a person."""
    return f"{num_bytes / 1e9:.1f} GB"
