"""`learned`: a router that `msd train-router` has trained ranks the modes; the best that may serve is taken.

Runs in pure Python on plain arrays: scikit-learn trains, off the serving path. Quality, memory and health are masks
by then, as for every policy. A mode that the router has not met is used only when none of the others may be.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log2
from operator import mul
from pathlib import Path
from random import Random
from typing import Final, TypeAlias

from msd import router_file
from msd.config import PolicyConfig
from msd.domain import Candidate, Choice, Decision, Features, Mask, Mode, Observation, Precision
from msd.errors import ConfigError
from msd.router_file import ModeScorer, Router, Tree

FEATURES: Final = (
    "log2_prompt_tokens",
    "log2_expected_tokens",
    "log2_max_tokens",
    "log2_expected_per_prompt_token",
    "shared_prefix",
    "log2_requests",
    "memory_pressure",
)
"""What routers go by: known before the first token, and no names."""

_WAITS = int(Mask.SLOTS)
_FULL: Final = frozenset({"fp32", "bf16", "fp16"})
_EIGHT_BIT: Final = frozenset({"int8", "fp8"})

Node: TypeAlias = "float | tuple[int, float, Node, Node]"
"""A leaf's value, or (feature, threshold, left, right)."""


def vector(features: Features) -> tuple[float, ...]:
    """The values of FEATURES; counts as log2(1 + n), scaled to O(1)."""
    prompt = log2(features.num_prompt_tokens + 1)
    expected = log2(features.num_expected_tokens + 1)
    return (
        prompt * 0.1,
        expected * 0.1,
        log2(features.max_tokens + 1) * 0.1,
        (expected - prompt) * 0.1,
        1.0 if features.shared_prefix else 0.0,
        log2(features.num_running + features.num_waiting + 1) * 0.1,
        features.memory_pressure,
    )


class Learned:
    """Ranks by a trained router; deterministic, learns nothing while it serves."""

    name = "learned"

    def __init__(self, config: PolicyConfig, modes: Sequence[Mode]) -> None:
        """Raises ConfigError: no router, one of other features, or one that knows none of the modes."""
        file = config.learned.file
        if not file:
            raise ConfigError(
                "policy.learned.file is empty, and policy.name = 'learned' needs a trained router",
                remedy="`msd train-router --out FILE` writes one",
            )
        self._take(router_file.load(Path(file)), modes)

    @classmethod
    def of(cls, router: Router, modes: Sequence[Mode]) -> Learned:
        """The policy of a router that is not in a file."""
        self = cls.__new__(cls)
        self._take(router, modes)
        return self

    def _take(self, router: Router, modes: Sequence[Mode]) -> None:
        if router.features != FEATURES:
            raise ConfigError(
                f"the router goes by {', '.join(router.features)}; this msd knows {', '.join(FEATURES)}",
                remedy="train it again: `msd train-router`",
            )
        scorers = [_scorer_of(mode, router.modes) for mode in modes]
        if not any(scorers):
            raise ConfigError(
                f"the router knows none of the modes: it was trained on {', '.join(s.mode for s in router.modes)}",
                remedy="train it on this daemon's decision log: `msd train-router --log DIR`",
            )
        # Modes of one kind share a scorer: it is run once.
        distinct = list(dict.fromkeys(scorer for scorer in scorers if scorer is not None))
        self._scorers = tuple(
            (scorer.base, scorer.weights, tuple(_node(tree, 0) for tree in scorer.trees)) for scorer in distinct
        )
        self._which = tuple(-1 if scorer is None else distinct.index(scorer) for scorer in scorers)
        self._reason = f"ranked first by the trained router ({router.kind})"

    def choose(self, features: Features, candidates: Sequence[Candidate], rng: Random) -> Choice:
        """The arm of the highest score among those with a free slot, else among those that only lack one."""
        some_free = False
        for c in candidates:
            if not c.mask:
                some_free = True
                break
        may_lack = 0 if some_free else _WAITS
        x = vector(features)
        scores: list[float | None] = [None] * len(self._scorers)
        best, most = -1, 0.0
        unknown = -1
        for arm, c in enumerate(candidates):
            if c.mask & ~may_lack:
                continue
            which = self._which[arm]
            if which < 0:
                if unknown < 0:
                    unknown = arm
                continue
            score = scores[which]
            if score is None:
                score = scores[which] = self._score(which, x)
            if best < 0 or score > most or (score == most and c.num_running < candidates[best].num_running):
                best, most = arm, score
        if best < 0:
            return Choice(unknown, 1.0, "not known to the trained router, but none of those that are may serve")
        return Choice(best, 1.0, self._reason if some_free else f"{self._reason}; all full, waits")

    def _score(self, which: int, x: tuple[float, ...]) -> float:
        score, weights, trees = self._scorers[which]
        if weights:
            score += sum(map(mul, weights, x))
        for tree in trees:
            node = tree
            while isinstance(node, tuple):
                node = node[2] if x[node[0]] <= node[1] else node[3]
            score += node
        return score

    def update(self, decision: Decision, observation: Observation) -> None:
        """Learns only when it is trained again."""

    def dump(self) -> dict[str, object]:
        """No state: the router is in its file."""
        return {}

    def load(self, state: dict[str, object]) -> None:
        """No state."""


def _scorer_of(mode: Mode, scorers: Sequence[ModeScorer]) -> ModeScorer | None:
    """The scorer trained on this mode; else on the one that has most in common with it, of its precision."""
    best, most = None, (False, False, False)
    for scorer in scorers:
        if _bits(scorer.precision) != _bits(mode.precision):
            continue
        common = (
            scorer.mode == mode.name,
            (scorer.speculation == "none") == (mode.speculation == "none"),
            scorer.prefix_caching == mode.prefix_caching,
        )
        if best is None or common > most:
            best, most = scorer, common
    return best


def _bits(precision: Precision) -> int:
    return 16 if precision in _FULL else 8 if precision in _EIGHT_BIT else 4


def _node(tree: Tree, index: int) -> Node:
    if tree.feature[index] < 0:
        return tree.value[index]
    left, right = _node(tree, tree.left[index]), _node(tree, tree.right[index])
    return (tree.feature[index], tree.threshold[index], left, right)
