"""What policies share: the feasible candidate with the most room."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from msd.domain import Candidate, Mask

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
