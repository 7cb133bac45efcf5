"""`rules`: the published ModeSwitch rule order over features that a daemon can really know.

Source: arXiv 2605.23057 and its repository's controller (first match wins; numbering as in docs/reference/policies.md).
Two differences, both deliberate. Rule 4 decides by the *name* of the benchmark's workload, which no producer sends, so
it is left out. And a rule names a kind of mode, not one engine: where the box lacks the published mode, or its slots
are taken, the next best kind of that rule serves the request instead of letting it wait.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from msd.config import PolicyConfig
from msd.domain import Candidate, Choice, Decision, Features, Mode, Observation
from msd.policy.least_loaded import least_loaded

MULTIPLE_CHOICE = frozenset({"mmlu_pro", "truthfulqa", "gpqa", "mlu", "tam"})
CHAT = ("mt_bench", "alpacaeval")

Kind = Callable[[Mode], bool]


def _int4(mode: Mode) -> bool:
    return mode.precision == "int4"


def _int4_cached(mode: Mode) -> bool:
    return mode.precision == "int4" and mode.prefix_caching


def _eight_bit(mode: Mode) -> bool:
    return mode.precision in ("int8", "fp8")


def _cached(mode: Mode) -> bool:
    return mode.prefix_caching


def _speculative(mode: Mode) -> bool:
    return mode.speculation != "none"


def _quantised(mode: Mode) -> bool:
    return mode.precision in ("int4", "int8", "fp8")


# Per published target: kinds of mode from best to worst. The first is the paper's; the rest is what stands in for it.
_BATCHING: tuple[Kind, ...] = (_eight_bit, _quantised)
_SHARED_PREFIX: tuple[Kind, ...] = (_int4_cached, _cached)
_SMALLEST: tuple[Kind, ...] = (_int4, _quantised)
_SPECULATION: tuple[Kind, ...] = (_speculative,)
_PREFILL: tuple[Kind, ...] = (_eight_bit, _quantised)


def prefill_score(num_prompt_tokens: int, num_output_tokens: int, memory_pressure: bool) -> int:
    """How much a request is about reading its prompt, 0..100 (published formula; 512/8 gives 65, 1024/32 gives 35)."""
    score = 0
    if num_prompt_tokens >= 384:
        score += 15
    if num_prompt_tokens >= 768:
        score += 10
    if num_output_tokens <= 8:
        score += 30
    elif num_output_tokens <= 16:
        score += 20
    ratio = num_output_tokens / num_prompt_tokens if num_prompt_tokens else 0.0
    if ratio <= 0.02:
        score += 20
    elif ratio <= 0.05:
        score += 10
    if num_output_tokens >= 64:
        score -= 20
    if num_output_tokens >= 128:
        score -= 15
    if memory_pressure:
        score += 5
    return max(0, min(100, score))


class Rules:
    """The published rules, first match wins; deterministic, learns nothing."""

    name = "rules"

    def __init__(self, config: PolicyConfig, modes: Sequence[Mode]) -> None:
        self._config = config.rules
        every = tuple(range(len(modes)))
        arms: dict[tuple[Kind, ...], tuple[tuple[int, ...], ...]] = {}
        for kinds in (_BATCHING, _SHARED_PREFIX, _SMALLEST, _SPECULATION, _PREFILL):
            # An absent kind stays as an empty tier: the reason must not pass its stand-in off as the published mode.
            arms[kinds] = (*(tuple(arm for arm, mode in enumerate(modes) if kind(mode)) for kind in kinds), every)
        self._arms = arms

    def choose(self, features: Features, candidates: Sequence[Candidate], rng: Random) -> Choice:
        """The best kind of the first rule that matches; the next kind when its modes are full or masked."""
        kinds, label = self._match(features)
        wait = -1
        for rank, tier in enumerate(self._arms[kinds]):
            arm = least_loaded(candidates, tier)
            if arm < 0:
                continue
            if candidates[arm].mask == 0:
                return Choice(arm, 1.0, label if rank == 0 else f"{label}; best kind full or absent")
            if wait < 0:
                wait = arm
        return Choice(wait, 1.0, f"{label}; all full, waits")

    def _match(self, f: Features) -> tuple[tuple[Kind, ...], str]:
        config = self._config
        prompt, output, task = f.num_prompt_tokens, f.num_expected_tokens, f.task or ""
        pressed = f.memory_pressure >= config.memory_pressure
        if f.num_running + f.num_waiting >= config.batch_pressure_high:
            return _BATCHING, "rule 1: high batch pressure"
        if f.shared_prefix:
            return _SHARED_PREFIX, "rule 2: shared prefix"
        if pressed:
            return _SMALLEST, "rule 3: memory pressure"
        if task == "gsm8k":
            return _SPECULATION, "rule 5: reasoning task"
        if task in MULTIPLE_CHOICE:
            return _PREFILL, "rule 6: multiple choice"
        if prompt <= config.short_prompt_tokens and output <= config.short_output_tokens:
            return _SPECULATION, "rule 7: short prompt, short output"
        if task.startswith(CHAT) or output >= config.long_output_tokens:
            return _SPECULATION, "rule 8: long output"
        if prompt >= config.long_prompt_tokens or prefill_score(prompt, output, pressed) > 40:
            return _PREFILL, "rule 9: prompt dominates"
        return _PREFILL, "rule 10: default"

    def update(self, decision: Decision, observation: Observation) -> None:
        """Nothing to learn."""

    def dump(self) -> dict[str, object]:
        """No state."""
        return {}

    def load(self, state: dict[str, object]) -> None:
        """No state."""
