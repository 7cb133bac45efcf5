"""What policies share: the feasible candidate with the most room."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from msd.domain import Candidate, Mask

_WAITS = int(Mask.SLOTS)


def least_loaded(candidates: Sequence[Candidate], arms: Iterable[int]) -> int:
    """The arm among `arms` with the most free slots (ties: fewest running, then first); -1 when none is feasible.

    A candidate that lacks only a slot is feasible, after all those that have one: the request would wait for it.
    """
    best, best_key = -1, (0, 0, 0)
    for arm in arms:
        c = candidates[arm]
        if c.mask & ~_WAITS:
            continue
        key = (1 if c.mask == 0 else 0, c.num_free_slots, -c.num_running)
        if best < 0 or key > best_key:
            best, best_key = arm, key
    return best
