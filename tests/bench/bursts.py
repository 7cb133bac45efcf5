"""The simulated contest (`msd compare`): `cost` against every fixed mode, the rules and the best static set, in bursts.

Simulated throughout, by the no-free-lunch rules of `msd/sim/contest.py`. The figures are functions of the seeds: the
repeats of this bench change nothing, and one contest is run.
"""

from __future__ import annotations

import os

from msd.sim.contest import QUICK, Contest, Effort, run_contest
from tests.bench.harness import Options, Row, row, say

TARGET = "bursts"


def measure(options: Options) -> list[Row]:
    """Rows of the contest."""
    told = ""

    def on_step(done: int, total: int, what: str) -> None:
        nonlocal told
        if what != told:
            say(f"{TARGET}: {what}, {total} matches")
            told = what

    contest = run_contest(QUICK if options.quick else Effort(), jobs=os.cpu_count() or 1, on_step=on_step)
    return [*_bars(contest), *_curve(contest)]


def _bars(contest: Contest) -> list[Row]:
    rows = []
    for verdict in contest.verdicts:
        name = f"simulated: {verdict.name}" + (f" ({verdict.note})" if verdict.note else "")
        rows.append(row(name, "x", [verdict.value], target=TARGET, op=verdict.op, bar=verdict.bar))
    return rows


def _curve(contest: Contest) -> list[Row]:
    """Who stood where; for the record."""
    rows = []
    for point in contest.points:
        if point.shape != "bursts" or point.kind == "fixed, quality ignored":
            continue
        who = f"fixed on {point.contestant}" if point.kind == "fixed" else point.contestant
        name = (
            f"simulated: goodput of {who} ({'+'.join(point.modes)}) at load {point.load:g}; TTFT p50 "
            f"{point.ttft_ms[0]:.0f} ms, p99 {point.ttft_ms[1]:.0f} ms, TPOT p50 {point.tpot_ms[0]:.1f} ms, "
            f"{point.joules_per_token:.2f} J/token"
        )
        rows.append(row(name, "1/s", list(point.goodputs_per_s), target=TARGET, op=">="))
    return rows
