"""What a batch of paired answers says of a mode: accuracy, difference and agreement with intervals, and the verdict.

The verdict is that of the betting test (`core/trial.py`), which is valid at any moment. Intervals are shown, and one
decides: the lower bound of the accuracy is what a request's `quality_floor` is held against; so the number of pairs is
fixed beforehand and nobody stops when the figures look good.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

from msgspec import Struct

from msd.core.trial import Verdicts, try_batch
from msd.gate import ALL_TASKS, GateRow

Z_95 = 1.959964
LEAST_REFERENCE_ACCURACY = 0.5
"""Below, the reference cannot do the task itself: two who are always wrong never differ, and that certifies nobody."""


class Pair(Struct, frozen=True):
    """One question answered by a mode and by the reference: whether each was right, and whether they said the same."""

    task: str
    right: bool
    reference_right: bool
    same: bool


def wilson(num_right: int, num: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share; (0, 1) of nothing. Wilson, JASA 1927."""
    if num == 0:
        return 0.0, 1.0
    share, z2 = num_right / num, Z_95 * Z_95
    middle = (share + z2 / (2 * num)) / (1 + z2 / num)
    half = Z_95 * sqrt(share * (1 - share) / num + z2 / (4 * num * num)) / (1 + z2 / num)
    return max(0.0, middle - half), min(1.0, middle + half)


def paired_difference(num_better: int, num_worse: int, num: int) -> tuple[float, float]:
    """95 % interval of the difference of two paired shares, by Agresti and Min (Statistics in Medicine 2005).

    `num_better`, `num_worse`: pairs of which only this mode, or only the reference, was right. Half a pair is added to
    each of the four kinds, so that it does not collapse when no pair differs.
    """
    if num == 0:
        return -1.0, 1.0
    n, better, worse = num + 2, num_better + 0.5, num_worse + 0.5
    middle = (better - worse) / n
    half = Z_95 * sqrt(max(0.0, better + worse - (better - worse) ** 2 / n)) / n
    return max(-1.0, middle - half), min(1.0, middle + half)


def judge(mode: str, recipe: str, task: str, pairs: Sequence[Pair], delta: float, alpha: float) -> GateRow:
    """The row of one mode on one task (`*`: all of them), from its pairs in the order in which they were asked."""
    return judged(mode, recipe, task, pairs, delta, alpha)[0]


def judged(
    mode: str, recipe: str, task: str, pairs: Sequence[Pair], delta: float, alpha: float
) -> tuple[GateRow, Verdicts]:
    """The same with the evidence."""
    num = len(pairs)
    num_right = sum(pair.right for pair in pairs)
    num_better = sum(pair.right and not pair.reference_right for pair in pairs)
    num_worse = sum(pair.reference_right and not pair.right for pair in pairs)
    verdicts = try_batch([float(pair.right - pair.reference_right) for pair in pairs], delta, alpha)
    verdict = verdicts.verdict
    if verdict == "certified" and sum(pair.reference_right for pair in pairs) < LEAST_REFERENCE_ACCURACY * num:
        verdict = "undecided"
    low, high = wilson(num_right, num)
    difference_low, difference_high = paired_difference(num_better, num_worse, num)
    row = GateRow(
        mode=mode,
        recipe=recipe,
        task=task,
        verdict=verdict,
        num_pairs=num,
        num_differ=num_better + num_worse,
        accuracy=_rounded(num_right / num if num else 0.0),
        accuracy_low=_rounded(low),
        accuracy_high=_rounded(high),
        reference_accuracy=_rounded(sum(pair.reference_right for pair in pairs) / num if num else 0.0),
        difference=_rounded((num_better - num_worse) / num if num else 0.0),
        difference_low=_rounded(difference_low),
        difference_high=_rounded(difference_high),
        agreement=_rounded(sum(pair.same for pair in pairs) / num if num else 0.0),
    )
    return row, verdicts


def rows_of(mode: str, recipe: str, pairs: Sequence[Pair], delta: float, alpha: float) -> list[GateRow]:
    """One row per task of the pairs, and `*`: all tasks together, in the order in which they were asked."""
    tasks = sorted({pair.task for pair in pairs})
    by_task = [judge(mode, recipe, task, [p for p in pairs if p.task == task], delta, alpha) for task in tasks]
    return [judge(mode, recipe, ALL_TASKS, pairs, delta, alpha), *by_task]


def reference_rows(mode: str, recipe: str, pairs: Sequence[Pair]) -> list[GateRow]:
    """The rows of the reference itself: what it reaches. It passes by definition, compared with nobody."""
    rows = []
    for task in (ALL_TASKS, *sorted({pair.task for pair in pairs})):
        own = [pair for pair in pairs if task in (ALL_TASKS, pair.task)]
        num_right = sum(pair.right for pair in own)
        low, high = wilson(num_right, len(own))
        share = _rounded(num_right / len(own))
        rows.append(
            GateRow(
                mode=mode,
                recipe=recipe,
                task=task,
                verdict="certified",
                num_pairs=len(own),
                num_differ=0,
                accuracy=share,
                accuracy_low=_rounded(low),
                accuracy_high=_rounded(high),
                reference_accuracy=share,
                difference=0.0,
                difference_low=0.0,
                difference_high=0.0,
            )
        )
    return rows


def _rounded(value: float) -> float:
    """Six digits: more would be noise, and another platform's last bit another checksum."""
    return round(value, 6)
