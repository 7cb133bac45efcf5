"""Exact division of whole millijoules: the parts always add up to the amount."""

from __future__ import annotations

from collections.abc import Sequence


def apportion(amount: int, weights: Sequence[int], ids: Sequence[str]) -> list[int]:
    """Split `amount` in proportion to integer `weights` by largest remainder; ties go to the smaller id.

    Same order as `weights`; the parts sum to `amount`. All weights 0: all parts 0, and the caller keeps the amount.
    """
    total = sum(weights)
    if total == 0:
        return [0] * len(weights)
    if weights.count(weights[0]) == len(weights):  # static energy of runs that span the whole interval
        share, missing = divmod(amount, len(weights))
        parts = [share] * len(weights)
        for i in sorted(range(len(ids)), key=ids.__getitem__)[:missing]:
            parts[i] += 1
        return parts
    parts = [amount * weight // total for weight in weights]
    missing = amount - sum(parts)
    if missing == 0:
        return parts
    remainders = [amount * weight - part * total for weight, part in zip(weights, parts, strict=True)]
    order = sorted(range(len(weights)), key=remainders.__getitem__, reverse=True)
    # Only at the cut can a tie matter, and comparing every id would double the cost: equal static shares always tie.
    cut = remainders[order[missing]]
    if remainders[order[missing - 1]] != cut:
        winners = order[:missing]
    else:
        above = [i for i in order[:missing] if remainders[i] > cut]
        tied = sorted((i for i in order if remainders[i] == cut), key=ids.__getitem__)
        winners = above + tied[: missing - len(above)]
    for winner in winners:
        parts[winner] += 1
    return parts
