"""Exact division of whole millijoules: the parts always add up to the amount."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Ids(Protocol):
    """Ids by place; not asked for unless a tie needs them."""

    def __getitem__(self, i: int, /) -> str: ...


def apportion(amount: int, weights: Sequence[int], ids: Ids) -> list[int]:
    """Split `amount` in proportion to integer `weights` by largest remainder; ties go to the smaller id.

    Same order as `weights`; the parts sum to `amount`. All weights 0: all parts 0, and the caller keeps the amount.
    """
    total = sum(weights)
    if total == 0:
        return [0] * len(weights)
    scaled = [amount * weight for weight in weights]
    parts = [product // total for product in scaled]
    missing = amount - sum(parts)
    if missing == 0:
        return parts
    remainders = [product % total for product in scaled]
    # Sorting the figures and not the places is half the cost, and comparing every id would double it: only at the cut
    # can a tie matter. Equal static shares always tie.
    cut = sorted(remainders)[-missing]
    tied = []
    for i, remainder in enumerate(remainders):
        if remainder > cut:
            parts[i] += 1
            missing -= 1
        elif remainder == cut:
            tied.append(i)
    if len(tied) > missing:
        tied.sort(key=ids.__getitem__)
    for i in tied[:missing]:
        parts[i] += 1
    return parts
