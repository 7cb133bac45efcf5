"""`random`: any feasible mode with equal chance; the baseline of exploration, and what off-policy figures need."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from msd.config import PolicyConfig
from msd.domain import Candidate, Choice, Decision, Features, Mask, Mode, Observation


class RandomMode:
    """Draws among the modes that have a slot; when all are full, among those it may wait for."""

    name = "random"

    def __init__(self, config: PolicyConfig, modes: Sequence[Mode]) -> None:
        pass

    def choose(self, features: Features, candidates: Sequence[Candidate], rng: Random) -> Choice:
        """A uniform draw, with its true propensity."""
        arms = [arm for arm, c in enumerate(candidates) if c.mask == 0]
        if not arms:
            arms = [arm for arm, c in enumerate(candidates) if c.mask == Mask.SLOTS]
        return Choice(arms[int(rng.random() * len(arms))], 1.0 / len(arms), "drawn at random")

    def update(self, decision: Decision, observation: Observation) -> None:
        """Nothing to learn."""

    def dump(self) -> dict[str, object]:
        """No state."""
        return {}

    def load(self, state: dict[str, object]) -> None:
        """No state."""
