"""What `make gpu` measures: engines, conditions and families; on a GPU with dummy weights, or rehearsed on a CPU."""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec import Struct

from tests.gpu import shapes

ROOT = Path(__file__).resolve().parents[2]
ACCEPTANCE_LENGTH = 3.4
"""Tokens per step of the paper's speculation (modeswitch spec, section 6: 34.6 ms a step / 10.3 ms TPOT). Forced."""
ALL, NO_GPTQ = "all_certified", "gptq_uncertified"
"""Tasks of the stated gate file: with every mode, and with only those that the paper's quality test let pass."""


class Family(Struct, frozen=True, kw_only=True):
    """One deployment family (prompt sizes: modeswitch spec, section 2, real tokens). `shared`: tokens of its prefix."""

    name: str
    prompt_tokens: int
    output_tokens: int
    shared: int = 0
    fill_memory: bool = False


class Condition(Struct, frozen=True, kw_only=True):
    """Who chooses: a policy, or one mode for all. `task` says which rows of the gate file count."""

    name: str
    mode: str = ""
    policy: str = ""
    task: str = ALL


class Plan(Struct, frozen=True, kw_only=True):
    """One run of the whole."""

    title: str
    config: str
    engines: tuple[str, ...]
    conditions: tuple[Condition, ...]
    families: tuple[Family, ...]
    vocab: tuple[int, int]
    """Token ids of prompts are drawn from [first, last)."""
    eager: str
    graphs: str
    """The two baselines, as conditions."""
    safe: tuple[str, ...]
    """Fixed conditions that are quality-safe by the stated gate file."""


FAMILIES = (
    Family(name="short_short", prompt_tokens=229, output_tokens=32),
    Family(name="short_long", prompt_tokens=234, output_tokens=128),
    Family(name="long_short", prompt_tokens=1_380, output_tokens=32),
    Family(name="long_long", prompt_tokens=1_380, output_tokens=128),
    Family(name="shared_prefix", prompt_tokens=1_452, output_tokens=128, shared=1_424),
    Family(name="memory_pressure", prompt_tokens=2_722, output_tokens=128, fill_memory=True),
)


def gpu(folder: Path, speculative_fields: frozenset[str]) -> Plan:
    """Seven engines of an 8B shape with dummy weights. `speculative_fields`: what this vLLM's SpeculativeConfig has."""
    shapes.make_all(folder / "models")
    draft: dict[str, object] = {"method": "draft_model", "model": str(folder / "models/draft")}
    draft["num_speculative_tokens"] = 5
    if "synthetic_acceptance_length" in speculative_fields:
        draft |= {"rejection_sample_method": "synthetic", "synthetic_acceptance_length": ACCEPTANCE_LENGTH}
    elif "synthetic_acceptance_rate" in speculative_fields:
        draft |= {"rejection_sample_method": "synthetic", "synthetic_acceptance_rate": (ACCEPTANCE_LENGTH - 1) / 5}
    # Prefix caching is the default of vLLM, and the FP16 + graphs reference of the paper has it: no weak baselines.
    engines = {
        "fp16": engine("fp16", prefix_caching=True),
        "int8": engine("int8", weights="int8", prefix_caching=True),
        "gptq_prefix": engine("int4", weights="gptq", prefix_caching=True),
        "fp8": engine("fp8", prefix_caching=True),
        "speculative": engine("fp16", speculation="draft", prefix_caching=True, args={"speculative_config": draft}),
        "gptq": engine("int4", weights="gptq"),
        "fp16_eager": engine("fp16", args={"enforce_eager": True}),
    }
    uncertified = ("gptq", "gptq_prefix")
    return Plan(
        title="Llama-3.1-8B's shape, dummy weights",
        config=config_text(folder, "../models/fp16", engines),
        engines=tuple(engines),
        conditions=(
            *(Condition(name=name, mode=name) for name in engines),
            Condition(name="rules", policy="rules"),
            Condition(name="cost", policy="cost"),
            Condition(name="cost_no_gptq", policy="cost", task=NO_GPTQ),
        ),
        families=FAMILIES,
        vocab=(1_000, 120_000),
        eager="fp16_eager",
        graphs="fp16",
        safe=tuple(name for name in engines if name not in uncertified),
    )


def rehearsal(folder: Path) -> Plan:
    """The same steps on a CPU with the testbed's tiny model: proves the runner, says nothing of a GPU."""
    args: dict[str, object] = {"max_model_len": 2_048, "enforce_eager": True, "kv_cache_memory_bytes": 134_217_728}
    ngram = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}
    engines: dict[str, dict[str, object]] = {
        "bf16": {"precision": "bf16", "prefix_caching": True, "max_num_seqs": 8, "args": args},
        "ngram": {
            "precision": "bf16",
            "speculation": "ngram",
            "max_num_seqs": 8,
            "args": args | {"speculative_config": ngram},
        },
    }
    families = tuple(
        msgspec.structs.replace(
            family,
            prompt_tokens=family.prompt_tokens // 8,
            output_tokens=family.output_tokens // 8,
            shared=family.shared // 8 // 16 * 16,
            fill_memory=False,
        )
        for family in FAMILIES
    )
    return Plan(
        title="REHEARSAL on a CPU with a tiny model: no figure of this says anything of a GPU",
        config=config_text(folder, str(ROOT / "testbed/models/tiny-large"), engines, probe="auto"),
        engines=tuple(engines),
        conditions=(
            *(Condition(name=name, mode=name) for name in engines),
            Condition(name="rules", policy="rules"),
            Condition(name="cost", policy="cost"),
        ),
        families=families,
        vocab=(5, 40),
        eager="bf16",
        graphs="bf16",
        safe=tuple(engines),
    )


def engine(
    precision: str,
    *,
    weights: str = "",
    speculation: str = "none",
    prefix_caching: bool = False,
    args: dict[str, object] | None = None,
) -> dict[str, object]:
    """One engine of 8B shape: 4 GiB of KV cache, graphs for up to 32 requests."""
    common: dict[str, object] = {
        "max_model_len": 4_096,
        "load_format": "dummy",
        "kv_cache_memory_bytes": 4 * 1024**3,
        "gpu_memory_utilization": 0.1,
    }
    return {
        "precision": precision,
        "speculation": speculation,
        "prefix_caching": prefix_caching,
        "max_num_seqs": 32,
        "start_timeout_s": 400.0,
        **({"weights": f"../models/{weights}"} if weights else {}),
        "args": common | (args or {}),
    }


def config_text(folder: Path, model: str, engines: dict[str, dict[str, object]], probe: str = "nvml") -> str:
    """config.toml of the run."""
    import tomlkit

    run = folder / "run"
    document: dict[str, object] = {
        "daemon": {"run_dir": str(run), "state_dir": str(run), "drain_s": 5},
        "ingress": {"zmq": {"endpoints": [f"ipc://{run}/msd.sock"]}},
        "model": [{"name": "model", "path": model}],
        "engine": [{"name": name, "model": "model", "kind": "vllm", **made} for name, made in engines.items()],
        "policy": {"name": "cost"},
        "quality": {"gate": "gate.json", "shadow_share": 0.0},
        "telemetry": {"probe": probe},
    }
    return tomlkit.dumps(document)
