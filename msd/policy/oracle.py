"""`oracle`: the mode that will have been best, for those who know what comes. For replay and simulation only.

Its candidates carry true figures instead of predictions: what a replay measured, or what a simulation is about to draw.
It bounds what any policy could reach; no configuration can name it.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from msd.config import PolicyConfig
from msd.domain import Candidate, Choice, Decision, Features, Mask, Mode, Observation

_WAITS = int(Mask.SLOTS)


class Oracle:
    """Least true latency among the modes that may serve; the first of equals."""

    name = "oracle"

    def __init__(self, config: PolicyConfig, modes: Sequence[Mode]) -> None:
        """Nothing to set."""

    def choose(self, features: Features, candidates: Sequence[Candidate], rng: Random) -> Choice:
        """The fastest arm; waiting is in the figures."""
        allowed = [(c.e2el_ms, arm) for arm, c in enumerate(candidates) if not c.mask & ~_WAITS]
        return Choice(min(allowed)[1], 1.0, "fastest, as it will turn out")

    def update(self, decision: Decision, observation: Observation) -> None:
        """Knows already."""

    def dump(self) -> dict[str, object]:
        """No state."""
        return {}

    def load(self, state: dict[str, object]) -> None:
        """No state."""
