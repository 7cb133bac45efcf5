"""From an engine's configuration to vLLM's `AsyncEngineArgs`, checked before a process is started.

vLLM is not imported: its argument names are read from the source of the installed version, so that checking a
configuration costs milliseconds and no torch.
"""

from __future__ import annotations

import ast
import importlib.util
from functools import lru_cache
from pathlib import Path

from msd.config import EngineConfig
from msd.config.presets import PRESETS
from msd.config.problems import close
from msd.errors import ConfigError

CLASSES = ("EngineArgs", "AsyncEngineArgs")
OWN = {
    "model": "the `[[model]]` and `weights` of the engine",
    "max_num_seqs": "`max_num_seqs` of the engine",
    "enable_prefix_caching": "`prefix_caching` of the engine",
}
"""Arguments that have a field of their own in `[[engine]]`, and where to set them instead."""
NOT_ON_CPU = {
    "cpu_offload_gb": "ignored by vLLM's CPU platform",
    "kv_offloading_size": "fails on vLLM's CPU platform",
    "kv_offloading_backend": "fails on vLLM's CPU platform",
}
FP8_ON_CPU = ("fp8_per_channel",)
"""What it emulates, slowly; for the others vLLM 0.32 meets a stub operator."""
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Of the other precisions the checkpoint or `quantization` says what they are."""
MAX_QUEUED_PER_SLOT = 2
MAX_QUEUED_TOKENS = 4_194_304


def check_arguments(config: EngineConfig) -> None:
    """Raise ConfigError for an argument that vLLM does not have, that has its own field, or that contradicts one."""
    known = known_arguments()
    for name in config.args:
        if name in OWN:
            raise ConfigError(f"engine {config.name}: args.{name} is set elsewhere", remedy=f"use {OWN[name]}")
        if known and name not in known:
            meant = close(name, known)
            remedy = f"did you mean `{meant}`?" if meant else "see vLLM's engine arguments"
            raise ConfigError(f"engine {config.name}: vLLM has no argument `{name}`", remedy=remedy)
    method = _speculative_method(config)
    if config.speculation == "none" and method:
        raise ConfigError(
            f'engine {config.name}: args.speculative_config says "{method}", speculation says "none"',
            remedy="policies go by `speculation`: name it there too",
        )
    if config.speculation != "none" and not method:
        raise ConfigError(
            f'engine {config.name}: speculation = "{config.speculation}" needs args.speculative_config',
            remedy='for instance {method = "ngram", num_speculative_tokens = 4, prompt_lookup_max = 4}',
        )


def build_arguments(config: EngineConfig, model: str, *, is_cpu: bool, base_dir: Path = Path()) -> dict[str, object]:
    """Arguments of `AsyncEngineArgs` for this engine. Raises ConfigError, also for what the platform cannot do.

    `base_dir`: what the path of the draft model counts from.
    """
    check_arguments(config)
    if is_cpu:
        for name in NOT_ON_CPU.keys() & config.args.keys():
            raise ConfigError(f"engine {config.name}: args.{name} is {NOT_ON_CPU[name]}", remedy="leave it out")
        if config.precision == "fp8" and config.args.get("quantization") not in FP8_ON_CPU:
            raise ConfigError(
                f"engine {config.name}: this CPU build of vLLM has no FP8 kernels", remedy="int8 weights work on a CPU"
            )
    arguments: dict[str, object] = {
        "model": model,
        "dtype": DTYPES.get(config.precision, "auto"),
        "max_num_seqs": config.max_num_seqs,
        "enable_prefix_caching": config.prefix_caching,
        "disable_log_stats": True,
        # The backlog is msd's: an engine that is asked for more than this is asked by mistake.
        "max_num_queued_reqs": MAX_QUEUED_PER_SLOT * config.max_num_seqs,
        "max_num_queued_tokens": MAX_QUEUED_TOKENS,
    }
    if config.residency == "auto" and not is_cpu:
        arguments["enable_sleep_mode"] = True  # on a CPU there is none: the engine is stopped and started instead
    if config.precision == "fp8" and not config.weights:
        arguments["quantization"] = "fp8"  # of bf16 weights, while they are loaded
    if config.preset in PRESETS and not is_cpu:
        arguments |= PRESETS[config.preset].gpu_args
    known = known_arguments()
    # The bounds of the queue are younger than the oldest vLLM that we run on.
    arguments = {name: value for name, value in arguments.items() if not known or name in known} | config.args
    speculative = config.args.get("speculative_config")
    if config.draft and isinstance(speculative, dict):
        arguments["speculative_config"] = speculative | {"model": str(base_dir / config.draft)}
    return arguments


@lru_cache(maxsize=1)
def known_arguments() -> frozenset[str]:
    """Names of the installed vLLM's engine arguments; empty when vLLM is not installed or is written another way."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return frozenset()
    path = Path(spec.submodule_search_locations[0]) / "engine" / "arg_utils.py"
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError):
        return frozenset()
    return frozenset(
        field.target.id
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name in CLASSES
        for field in node.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    )


def _speculative_method(config: EngineConfig) -> str:
    speculative = config.args.get("speculative_config")
    if not speculative:
        return ""
    if not isinstance(speculative, dict):
        raise ConfigError(f"engine {config.name}: args.speculative_config is not a table")
    # vLLM derives the method from a draft model when it is not named.
    return str(speculative.get("method") or "draft_model")
