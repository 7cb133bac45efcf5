"""What makes two engines answer alike: the hash of an engine's recipe, by which gate file and profile know it.

It covers the model's files, the weights, and the arguments that change what is computed. It leaves out what only
changes how fast (slots, graphs, KV cache size, environment), so that tuning an engine does not void its certificate.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import msgspec
from msgspec import Struct

from msd.config import Config, EngineConfig, QualityConfig
from msd.domain import Mode
from msd.gate import GateFile

_WHOLE_BYTES = 64 << 20
_SAMPLE_BYTES = 1 << 20
_NUM_SAMPLES = 16
_ONLY_SPEED = frozenset(
    {
        "enforce_eager", "gpu_memory_utilization", "kv_cache_memory_bytes", "max_model_len", "max_num_batched_tokens",
        "enable_chunked_prefill", "compilation_config", "swap_space", "enable_sleep_mode", "async_scheduling",
    }
)  # fmt: skip
_ONLY_CACHES_AND_GRAPHS = frozenset(
    {
        "block_size", "prefix_caching_hash_algo", "num_gpu_blocks_override", "cudagraph_capture_sizes",
        "max_cudagraph_capture_size", "cudagraph_metrics", "kv_cache_metrics", "disable_log_stats",
    }
)  # fmt: skip
"""They stay in the hash, and keep a mode lossless."""
_SPECULATIVE = frozenset(
    {
        "method", "num_speculative_tokens", "model", "revision", "quantization", "max_model_len", "enforce_eager",
        "draft_tensor_parallel_size", "prompt_lookup_max", "prompt_lookup_min", "rejection_sample_method",
        "draft_sample_method",
    }
)  # fmt: skip
"""Keys that say what is proposed; vLLM's standard rejection sampling decides what is taken."""
_METHODS = frozenset({"ngram", "draft_model", "eagle", "eagle3", "mtp", "suffix"})
_DTYPES = {
    "fp32": ("float32", "float"),
    "bf16": ("bfloat16",),
    "fp16": ("float16", "half"),
}


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


class References(Struct, frozen=True):
    """The reference modes, as indices into the modes."""

    home: int
    """What the gate compares all others with; -1: there is none here."""
    of_model: dict[str, int]


def find_references(
    modes: Sequence[Mode],
    config: QualityConfig,
    gate: GateFile | None = None,
    recipes: Mapping[str, str] | None = None,
) -> References:
    """The mode that others are compared with: `quality.reference`, else the gate file's, else the first lossless one.

    Of each further model: its first lossless mode. One that speculates is it only where no other is lossless.
    """
    of_model = dict[str, int]()
    for arm, mode in enumerate(modes):
        if mode.lossless:
            before = modes[of_model.setdefault(mode.model, arm)]
            if before.speculation != "none" and mode.speculation == "none":
                of_model[mode.model] = arm
    home = _find_home(modes, config, gate, recipes or {})
    if home is None:
        home = next(iter(of_model.values()), -1)
    if home >= 0:
        of_model[modes[home].model] = home
    return References(home, of_model)


def _find_home(
    modes: Sequence[Mode], config: QualityConfig, gate: GateFile | None, recipes: Mapping[str, str]
) -> int | None:
    """As somebody has said it; None: nobody has."""
    if config.reference:
        return next((arm for arm, mode in enumerate(modes) if mode.name == config.reference), -1)
    if gate is None:
        return None
    fits = [arm for arm, mode in enumerate(modes) if recipes.get(mode.name) == gate.reference_recipe]
    return next((arm for arm in fits if modes[arm].name == gate.reference), fits[0] if fits else None)


def is_lossless(engine: EngineConfig) -> bool:
    """Whether the recipe computes what the model's own weights say: graphs, caching and speculation change nothing.

    Whatever is not known to keep the answers has to pass the gate: other weights, fewer bits, and any argument that is
    not listed above.
    """
    dtypes = _DTYPES.get(engine.precision)
    if engine.weights or dtypes is None:
        return False
    for name, value in engine.args.items():
        if name in _ONLY_SPEED or name in _ONLY_CACHES_AND_GRAPHS:
            continue
        if name == "dtype" and str(value).removeprefix("torch.") in dtypes:
            continue
        if name == "kv_cache_dtype" and str(value) == "auto":
            continue
        if name == "speculative_config" and _keeps_answers(value):
            continue
        return False
    return True


def _keeps_answers(speculative: object) -> bool:
    """Whether every proposed token is checked as the model would have drawn it."""
    if not speculative:
        return True
    return (
        isinstance(speculative, dict)
        and speculative.keys() <= _SPECULATIVE
        and speculative.get("method", "draft_model") in _METHODS
        and speculative.get("rejection_sample_method", "standard") == "standard"
    )
