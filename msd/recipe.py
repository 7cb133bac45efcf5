"""What makes two engines answer alike: the hash of an engine's recipe, by which gate file and profile know it.

It covers the model's files, the weights, and the arguments that change what is computed. It leaves out what only
changes how fast (slots, graphs, KV cache size, environment), so that tuning an engine does not void its certificate.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

import msgspec

from msd.config import Config, EngineConfig

_WHOLE_BYTES = 64 << 20
_SAMPLE_BYTES = 1 << 20
_NUM_SAMPLES = 16
_ONLY_SPEED = frozenset(
    {
        "enforce_eager", "gpu_memory_utilization", "kv_cache_memory_bytes", "max_model_len", "max_num_batched_tokens",
        "enable_chunked_prefill", "compilation_config", "swap_space", "enable_sleep_mode", "async_scheduling",
    }
)  # fmt: skip


def recipe_hash(engine: EngineConfig, config: Config, base_dir: Path) -> str:
    """16 hex digits, equal for engines whose answers to the same prompts have the same distribution."""
    model = next((model for model in config.model if model.name == engine.model), None)
    folder = engine.weights or (model.path if model is not None else "")
    if engine.kind != "vllm":
        folder = ""  # filler, whatever lies on the disk
    parts: dict[str, object] = {
        "model": engine.model if not folder else fingerprint(base_dir / folder),
        "precision": engine.precision,
        "speculation": engine.speculation,
        "args": {name: value for name, value in engine.args.items() if name not in _ONLY_SPEED},
    }
    if engine.draft:
        parts["draft"] = fingerprint(base_dir / engine.draft)
    if engine.kind != "vllm":
        parts["kind"] = engine.kind
    return hashlib.blake2b(msgspec.json.encode(parts, order="sorted"), digest_size=8).hexdigest()


def recipe_hashes(config: Config, base_dir: Path) -> dict[str, str]:
    """The hash of every engine's recipe, by the engine's name."""
    return {engine.name: recipe_hash(engine, config, base_dir) for engine in config.engine}


@lru_cache(maxsize=64)
def fingerprint(folder: Path) -> str:
    """Hash of a model's folder: of each file its size and content; of a large one, samples spread over all of it."""
    digest = hashlib.blake2b(digest_size=8)
    if not folder.is_dir():
        return f"missing {folder.name}"
    for file in sorted(folder.iterdir()):
        if file.suffix not in (".json", ".safetensors", ".bin", ".model") or not file.is_file():
            continue
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            if size <= _WHOLE_BYTES:
                digest.update(stream.read())
                continue
            for sample in range(_NUM_SAMPLES):
                stream.seek((size - _SAMPLE_BYTES) * sample // (_NUM_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def is_lossless(engine: EngineConfig) -> bool:
    """Whether the recipe computes what the model's own weights say: graphs, caching and speculation change nothing.

    Other weights, 8- and 4-bit precisions and a quantised KV cache do; so they have to pass the gate.
    """
    return (
        not engine.weights
        and engine.precision in ("fp32", "bf16", "fp16")
        and "quantization" not in engine.args
        and str(engine.args.get("kv_cache_dtype", "auto")) == "auto"
    )
