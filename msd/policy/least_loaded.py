"""`least_loaded`: the feasible mode with the most room, as a load balancer would have it; others share the function."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from random import Random

from msd.config import PolicyConfig
from msd.domain import Candidate, Choice, Decision, Features, Mask, Mode, Observation

_WAITS = int(Mask.SLOTS)


def least_loaded(candidates: Sequence[Candidate], arms: Iterable[int]) -> int:
    """The arm among `arms` with the most free slots (ties: fewest running, then first); -1 when none is feasible.

    A candidate that lacks only a slot is feasible, after all those that have one: the request would wait for it.
    """
    best, best_mask, best_free, best_running = -1, _WAITS, 0, 0
    for arm in arms:
        c = candidates[arm]
        mask = c.mask
        if mask & ~_WAITS:
            continue
        if best >= 0:
            if mask > best_mask:
                continue
            if mask == best_mask:
                free = c.num_free_slots
                if free < best_free or (free == best_free and c.num_running >= best_running):
                    continue
        best, best_mask, best_free, best_running = arm, mask, c.num_free_slots, c.num_running
    return best


class LeastLoaded:
    """Knows nothing of speed: the baseline of a static set of modes behind a load balancer."""

    name = "least_loaded"

    def __init__(self, config: PolicyConfig, modes: Sequence[Mode]) -> None:
        pass

    def choose(self, features: Features, candidates: Sequence[Candidate], rng: Random) -> Choice:
        """The feasible arm with the most free slots; when all are full, one to wait for."""
        return Choice(least_loaded(candidates, range(len(candidates))), 1.0, "least loaded")

    def update(self, decision: Decision, observation: Observation) -> None:
        """Nothing to learn."""

    def dump(self) -> dict[str, object]:
        """No state."""
        return {}

    def load(self, state: dict[str, object]) -> None:
        """No state."""
