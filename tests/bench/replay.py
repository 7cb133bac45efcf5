"""The published ModeSwitch comparison, replayed: what the rules reach, and what `cost` reaches on families unseen.

PUBLISHED DATA: one A100, vLLM 0.6.6; nothing here is measured on this host but the time that a replay takes. The
figures are exact, so there are no repeats. What each row means: docs/how-to/replay.md.
"""

from __future__ import annotations

import time
from typing import Literal, TypeVar

from msd.learning import matrix as published
from msd.learning import replay
from msd.learning.matrix import Score
from tests.bench.harness import CannotMeasureError, Options, Peer, Row, row

T = TypeVar("T")

TARGET = "replay"
DATA = Peer(name="published data, NVIDIA A100, vLLM 0.6.6 (not this host)", version="run_20260508", value=None)
BAR_RULES_LOW, BAR_RULES_HIGH = 2.3806 * 0.99, 2.3806 * 1.01
BAR_COST, BAR_LEAST_FAMILY, BAR_COLD, BAR_REVEALED = 1.975, 0.97, 1.506, 1.586


def measure(options: Options) -> list[Row]:
    """Rows of the replay."""
    seconds = []
    for _ in range(options.repeats):
        began = time.perf_counter()
        matrix = published.load()
        replay.table(matrix)
        replay.cost(matrix)
        seconds.append(time.perf_counter() - began)
    matrix = published.load()
    table = {score.name: score for score in replay.table(matrix)}
    cost = replay.cost(matrix)
    rules = table["rules"].means.w605_speedup
    if rules is None:
        raise CannotMeasureError("the rules were not judged on every family")
    cold = replay.cost(matrix, gate="no_gptq")
    warm = replay.cost(matrix, gate="no_gptq", revealed=True)
    unseen = replay.cost(matrix, known_lengths=False)
    fixed, masked_rules = replay.behind_the_mask(matrix)
    stated = "the configuration's default weights"
    return [
        _row("published rules, W605, at least 2.3806 less 1 %", rules, op=">=", bar=BAR_RULES_LOW),
        _row("published rules, W605, at most 2.3806 plus 1 %", rules, bar=BAR_RULES_HIGH),
        *_rows(f"cost on families held out ({stated})", cost, BAR_COST),
        _row("... the least family, against its oracle", _known(cost.least_of_oracle), op=">=", bar=BAR_LEAST_FAMILY),
        _row(
            "... less the best fixed mode behind a mask of measured figures", _f11(cost) - _f11(fixed), op=">=", bar=0.0
        ),
        _row("... less the rules behind the same mask", _f11(cost) - _f11(masked_rules), op=">=", bar=0.0),
        *_rows("cost, no GPTQ mode certified, cold", cold, BAR_COLD),
        *_rows("cost, no GPTQ mode certified, after one row per family and mode", warm, BAR_REVEALED),
        _row("best fixed mode + mask, F11", _f11(fixed), op=">="),
        _row("rules + mask, F11", _f11(masked_rules), op=">="),
        _row("oracle within the constraints, F11", _f11(table["oracle, constraints"]), op=">="),
        _row("cost, length class unseen (half the cap expected), F11", _f11(unseen), op=">="),
        _row("... violations (the specification expects two)", len(unseen.violations or ())),
        row("the whole table and cost, loaded and replayed on this host", "s", seconds, target=TARGET),
    ]


def _rows(name: str, score: Score, bar: float) -> list[Row]:
    return [
        _row(f"{name}, F11", _f11(score), op=">=", bar=bar),
        _row("... violations", len(_known(score.violations)), bar=0),
    ]


def _row(name: str, value: float, *, op: Literal["<=", ">="] = "<=", bar: float | None = None) -> Row:
    return row(name, "x" if "violations" not in name else "choices", [value], target=TARGET, op=op, bar=bar, peer=DATA)


def _f11(score: Score) -> float:
    return _known(score.means.f11_speedup)


def _known(value: T | None) -> T:
    if value is None:
        raise CannotMeasureError("a family was not judged")
    return value
