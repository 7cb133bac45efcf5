"""`round_robin`: each feasible mode in turn; the baseline of plain load spreading."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from msd.config import PolicyConfig
from msd.domain import Candidate, Choice, Decision, Features, Mask, Mode, Observation


class RoundRobin:
    """Takes the next mode that is feasible and has a slot; when all are full, waits for the next feasible one."""

    name = "round_robin"

    def __init__(self, config: PolicyConfig, modes: Sequence[Mode]) -> None:
        self._next = 0

    def choose(self, features: Features, candidates: Sequence[Candidate], rng: Random) -> Choice:
        """The first arm from the turn's position on with mask 0, else with only SLOTS set."""
        n = len(candidates)
        fallback = -1
        for step in range(n):
            arm = (self._next + step) % n
            mask = candidates[arm].mask
            if mask == 0:
                self._next = arm + 1
                return Choice(arm, 1.0, "next in turn")
            if mask == Mask.SLOTS and fallback < 0:
                fallback = arm
        return Choice(fallback, 1.0, "next in turn, all are full")

    def update(self, decision: Decision, observation: Observation) -> None:
        """Nothing to learn."""

    def dump(self) -> dict[str, object]:
        """Whose turn it is."""
        return {"next": self._next}

    def load(self, state: dict[str, object]) -> None:
        """Take up the turn."""
        turn = state.get("next", 0)
        assert isinstance(turn, int)
        self._next = turn
