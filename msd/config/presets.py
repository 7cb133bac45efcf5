"""The mode catalogue: recipes by name, and how `preset = "NAME"` in an `[[engine]]` becomes plain settings.

Expansion happens while the file is read, so that everything below sees an ordinary EngineConfig: a preset is what you
would have written yourself, and what stands beside it wins. Arguments that only one platform has are added when the
engine's arguments are built (`msd.engine.vllm_arguments`). "paper" is arXiv 2605.23057.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from msgspec import Struct

from msd.domain import Precision, Speculation

Capability = tuple[int, int]


class Preset(Struct, frozen=True, kw_only=True):
    """One recipe: what policies take it for, vLLM's arguments, and what it asks of the operator and of the host."""

    name: str
    what: str
    when: str
    source: str
    lossless: bool
    """Computes what the model's own weights say: it needs no certificate of the quality gate."""
    precision: Precision | None = None
    speculation: Speculation = "none"
    prefix_caching: bool = False
    max_num_seqs: int | None = None
    args: Mapping[str, object] = {}
    gpu_args: Mapping[str, object] = {}
    """Arguments that are added on a GPU only."""
    weights: str = ""
    """The checkpoint that `weights` has to name; empty: the model's own weights."""
    draft: str = ""
    """What `draft` has to name; empty: nothing."""
    min_capability: Capability = (7, 5)
    max_capability: Capability | None = None
    """First compute capability that cannot run it any more."""
    cpu: Literal["real", "slow", "untried", "none"] = "real"
    """On a CPU (vLLM 0.32, tried on the testbed): runs, runs far slower than bf16, was not tried, does not run."""
    cpu_note: str = ""


_NGRAM: dict[str, object] = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}
_DRAFT: dict[str, object] = {"method": "draft_model", "num_speculative_tokens": 5}
_EAGLE: dict[str, object] = {"method": "eagle", "num_speculative_tokens": 3}
_INT4_CPU = "vLLM has CPU kernels for it; sizes in multiples of 128 and group size 128"
_FP8_CPU = "emulated: on 2 cores a token took 6 times as long as in bf16"

_CATALOGUE = (
    Preset(
        name="fp16",
        what="the model's weights in float16",
        when="the reference mode on a GPU",
        source="paper: prefix_caching on unshared prompts (FP16 with CUDA graphs)",
        lossless=True,
        precision="fp16",
    ),
    Preset(
        name="bf16",
        what="the model's weights in bfloat16",
        when="the reference mode of a model that was trained in bfloat16",
        source="msd",
        lossless=True,
        precision="bf16",
        min_capability=(8, 0),
    ),
    Preset(
        name="fp16_eager",
        what="float16 without CUDA graphs",
        when="a yardstick for comparisons with the paper, never for traffic",
        source="paper: fp16_baseline",
        lossless=True,
        precision="fp16",
        args={"enforce_eager": True},
    ),
    Preset(
        name="fp8_per_tensor",
        what="weights and activations in FP8, one scale per tensor, quantised while loading",
        when="half the memory and weight traffic without another checkpoint",
        source="msd",
        lossless=False,
        precision="fp8",
        args={"quantization": "fp8_per_tensor"},
        min_capability=(8, 9),
        cpu="none",
        cpu_note="the CPU build of vLLM has no such kernels (static_scaled_fp8_quant is a stub)",
    ),
    Preset(
        name="fp8_per_channel",
        what="weights and activations in FP8, one scale per channel, quantised while loading",
        when="as fp8_per_tensor, with less loss",
        source="msd",
        lossless=False,
        precision="fp8",
        args={"quantization": "fp8_per_channel"},
        min_capability=(8, 9),
        cpu="slow",
        cpu_note=_FP8_CPU,
    ),
    Preset(
        name="int8_weight_only",
        what="weights in INT8, one scale per channel, quantised while loading; activations in 16 bit",
        when="half the weight traffic without another checkpoint, on GPUs older than FP8 and on CPUs",
        source="msd",
        lossless=False,
        precision="int8",
        args={"quantization": "int8_per_channel_weight_only"},
    ),
    Preset(
        name="int8_w8a8",
        what="weights and activations in INT8",
        when="long prompts: the fastest prefill of the paper's modes",
        source="paper: int8_quant",
        lossless=False,
        precision="int8",
        weights="a W8A8 checkpoint (compressed-tensors)",
        max_capability=(10, 0),
    ),
    Preset(
        name="int4_gptq",
        what="weights in INT4 by GPTQ; vLLM picks the Marlin kernels, since `quantization` stays unset",
        when="decoding of few requests: the least weight traffic",
        source="paper: gptq_4bit (there with quantization=gptq, which picks slow kernels)",
        lossless=False,
        precision="int4",
        weights="a GPTQ INT4 checkpoint (group size 128)",
        cpu="untried",
        cpu_note=_INT4_CPU,
    ),
    Preset(
        name="int4_awq",
        what="weights in INT4 by AWQ; vLLM picks the Marlin kernels, since `quantization` stays unset",
        when="as int4_gptq",
        source="paper's configuration, not in its results",
        lossless=False,
        precision="int4",
        weights="an AWQ INT4 checkpoint (group size 128)",
        cpu="untried",
        cpu_note=_INT4_CPU,
    ),
    Preset(
        name="draft_speculation",
        what="a small model proposes 5 tokens, the model checks them in one step",
        when="long answers, few requests at once",
        source="paper: speculative_decoding (Llama-3.2-1B drafts for 3.1-8B)",
        lossless=True,
        speculation="draft",
        args={"speculative_config": _DRAFT},
        draft="a draft model with the same vocabulary",
    ),
    Preset(
        name="ngram_speculation",
        what="the next 4 tokens are proposed from what the prompt and the answer said before",
        when="answers that repeat their prompt: extraction, editing, code",
        source="msd",
        lossless=True,
        speculation="ngram",
        args={"speculative_config": _NGRAM},
    ),
    Preset(
        name="eagle_speculation",
        what="an EAGLE head of the model proposes 3 tokens",
        when="as draft_speculation, where somebody has trained a head for the model",
        source="msd",
        lossless=True,
        speculation="draft",
        args={"speculative_config": _EAGLE},
        draft="an EAGLE head of this model",
        cpu="untried",
    ),
    Preset(
        name="prefix_caching",
        what="KV blocks of shared prefixes are kept",
        when="prompts that begin alike: chats, few-shot examples, long instructions",
        source="paper: prefix_caching",
        lossless=True,
        prefix_caching=True,
    ),
    Preset(
        name="gptq_plus_prefix_caching",
        what="INT4 weights by GPTQ (Marlin) with prefix caching",
        when="shared prefixes and short answers: the paper's fastest hybrid",
        source="paper: gptq_plus_prefix_caching",
        lossless=False,
        precision="int4",
        prefix_caching=True,
        weights="a GPTQ INT4 checkpoint (group size 128)",
        cpu="untried",
        cpu_note=_INT4_CPU,
    ),
    Preset(
        name="int8_plus_continuous_batching",
        what="INT8 weights and activations with room for 128 requests at once",
        when="bursts: many requests in one batch",
        source="paper: int8_plus_continuous_batching (there 4 at once)",
        lossless=False,
        precision="int8",
        max_num_seqs=128,
        gpu_args={"max_num_batched_tokens": 8_192},
        weights="a W8A8 checkpoint (compressed-tensors)",
        max_capability=(10, 0),
    ),
    Preset(
        name="fp8_kv",
        what="the KV cache in FP8, the weights as they are",
        when="long contexts, many requests at once: twice the tokens in the same memory",
        source="paper's configuration, not in its results",
        lossless=False,
        args={"kv_cache_dtype": "fp8"},
        min_capability=(8, 9),
    ),
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in _CATALOGUE}


def expand(document: dict[str, object]) -> dict[str, object]:
    """The document with the settings of each engine's preset written out; what is not understood stays as it is."""
    engines = document.get("engine")
    if not isinstance(engines, list):
        return document
    return document | {"engine": [_expand_engine(engine) for engine in engines]}


def _expand_engine(engine: Any) -> Any:
    name = engine.get("preset") if isinstance(engine, dict) else None
    preset = PRESETS.get(name) if isinstance(name, str) else None
    if preset is None:
        return engine  # the rules name the nearest preset
    expanded = dict(_settings(preset)) | engine
    args = engine.get("args", {})
    if preset.args and isinstance(args, dict):
        expanded["args"] = _beside(preset.args, args)
    return expanded


def _settings(preset: Preset) -> Iterator[tuple[str, object]]:
    """Settings of `[[engine]]` that the preset makes; what it says nothing about keeps its default."""
    if preset.precision is not None:
        yield "precision", preset.precision
    if preset.speculation != "none":
        yield "speculation", preset.speculation
    if preset.prefix_caching:
        yield "prefix_caching", True
    if preset.max_num_seqs is not None:
        yield "max_num_seqs", preset.max_num_seqs
    if preset.args:
        yield "args", _beside(preset.args, {})


def _beside(preset: Mapping[str, object], own: Mapping[str, object]) -> dict[str, object]:
    """Both tables in one, the operator's own values winning at every depth."""
    merged: dict[str, object] = {
        key: _beside(value, {}) if isinstance(value, Mapping) else value for key, value in preset.items()
    }
    for key, value in own.items():
        before = merged.get(key)
        both = isinstance(before, dict) and isinstance(value, Mapping)
        merged[key] = _beside(before, value) if both else value  # type: ignore[arg-type]
    return merged
