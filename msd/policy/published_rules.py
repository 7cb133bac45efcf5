"""The published ModeSwitch rules to the letter, workload names included: for replaying the paper, not for serving.

Source: arXiv 2605.23057 and its repository's controller. First match wins; the numbers of the rules are ours
(docs/reference/policies.md). What serves requests by them is `rules`, which knows no names.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from msd.policy.rules import CHAT, MULTIPLE_CHOICE, prefill_score

Pressure = Literal["low", "medium", "high"]
_NAMED = {
    "short_prompt_short_output": "gptq_4bit",
    "long_prompt_short_output": "gptq_4bit",
    "long_prompt_long_output": "gptq_4bit",
    "short_prompt_long_output": "speculative_decoding",
}
"""Rule 4: the answer is in the name of the benchmark's workload."""


class Workload(Struct, frozen=True, kw_only=True):
    """What the published controller sees. `num_output_tokens` is the cap, `name` comes without its variant's suffix."""

    name: str = ""
    tag: str = ""
    num_prompt_tokens: int
    num_output_tokens: int
    shared_prefix: bool = False
    memory_pressure: bool = False
    batch_pressure: Pressure = "low"


class Ruling(Struct, frozen=True):
    """The mode by its published name, the rule that fired, and the prefill score that the controller logs."""

    mode: str
    rule: int
    score: int


def batch_pressure(num_requests: int) -> Pressure:
    """How the controller names a batch of this size."""
    return "high" if num_requests >= 4 else "medium" if num_requests >= 2 else "low"


def rule(workload: Workload) -> Ruling:
    """The ruling on one workload."""
    prompt, output = workload.num_prompt_tokens, workload.num_output_tokens
    if workload.batch_pressure == "high":
        return Ruling("int8_plus_continuous_batching", 1, 0)
    if workload.shared_prefix:
        return Ruling("gptq_plus_prefix_caching", 2, 0)
    score = prefill_score(prompt, output, workload.memory_pressure)
    if workload.memory_pressure:
        return Ruling("gptq_4bit", 3, score)
    if named := _NAMED.get(workload.name):
        return Ruling(named, 4, score)
    if workload.tag == "gsm8k":
        return Ruling("speculative_decoding", 5, score)
    if workload.tag in MULTIPLE_CHOICE:
        return Ruling("int8_quant", 6, score)
    if prompt <= 384 and output <= 64:
        return Ruling("speculative_decoding", 7, score)
    if workload.tag.startswith(CHAT) or output >= 128:
        return Ruling("speculative_decoding", 8, score)
    if score > 40 or prompt >= 768:
        return Ruling("int8_quant", 9, score)
    return Ruling("int8_quant", 10, score)
