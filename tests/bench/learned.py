"""Trained routers on the published matrix, each family held out once; and what a decision by one costs on this host.

PUBLISHED DATA for the quality of choices (one A100, vLLM 0.6.6); the times of decisions are this host's, pure Python.
The bar of F11 is what the published rules reach behind the same mask.
"""

from __future__ import annotations

import gc
import statistics
import time
from random import Random

from msgspec import structs

from msd.domain import Candidate, Features, Mode, Precision
from msd.learning import matrix as published
from msd.learning import replay
from msd.learning import router_training as training
from msd.learning.matrix import MODES, Matrix
from msd.policy.learned import Learned
from msd.router_file import KINDS, Kind
from tests.bench.harness import CannotMeasureError, Options, Peer, Row, row, say

TARGET = "learned"
DATA = Peer(name="published data, NVIDIA A100, vLLM 0.6.6 (not this host)", version="run_20260508", value=None)
BAR_F11, BAR_P50_US, BAR_P99_US = 1.917, 50.0, 50.0
SEEDS = (0, 1, 2)
"""Of the drawn requests that routers learn from beside the families: the worst of them counts."""
NUM_MODES = 8


def measure(options: Options) -> list[Row]:
    """Rows of the learned routers."""
    matrix = published.load()
    rows: list[Row] = []
    for kind in KINDS:
        say(f"{TARGET}: {kind}")
        rows += _quality(matrix, kind, SEEDS[: 1 if options.quick else len(SEEDS)])
        rows += _speed(matrix, kind, options)
    oracle = matrix.score("", {family: matrix.oracle(family) for family in matrix.families})
    masked = replay.behind_the_mask(matrix)[1]
    for name, score in (("oracle within the constraints, F11", oracle), ("rules + mask, F11", masked)):
        rows.append(row(name, "x", [_known(score.means.f11_speedup)], target=TARGET, op=">=", peer=DATA))
    return rows


def _quality(matrix: Matrix, kind: Kind, seeds: tuple[int, ...]) -> list[Row]:
    scores = [training.held_out_matrix(matrix, kind, seed=seed) for seed in seeds]
    alone = training.held_out_matrix(matrix, kind, num_drawn=0)
    violations = [float(len(score.violations or ())) for score in scores]
    regrets = [_known(score.regret) * 100 for score in scores]
    matches = [_known(score.oracle_match) * 100 for score in scores]
    speedups = [_known(score.means.f11_speedup) for score in scores]
    worst = f"worst of {len(seeds)} seeds"

    def told(name: str, unit: str, figures: list[float], **how: object) -> Row:
        return row(name, unit, figures, target=TARGET, peer=DATA, **how)  # type: ignore[arg-type]

    return [
        told(f"{kind}: families held out, F11, {worst}", "x", speedups, op=">=", bar=BAR_F11, of_repeats=min),
        told(f"{kind}: violations, {worst}", "choices", violations, bar=0, of_repeats=max),
        told(f"{kind}: regret against the oracle, {worst}", "%", regrets, of_repeats=max),
        told(f"{kind}: oracle match, {worst}", "%", matches, op=">=", of_repeats=min),
        told(
            f"{kind}: learnt from the families alone, none drawn, F11", "x", [_known(alone.means.f11_speedup)], op=">="
        ),
    ]


def _speed(matrix: Matrix, kind: Kind, options: Options) -> list[Row]:
    """Choices among eight modes, each timed: six that were trained on and two of a like kind."""
    scorers = training.train(kind, training.matrix_examples(matrix, matrix.families), list(MODES.values()))
    router = training.matrix_router(
        matrix, kind, training.held_out(matrix.score("", {f: matrix.oracle(f) for f in matrix.families})),
        created="", command="", versions={},
    )  # fmt: skip
    precisions: tuple[Precision, ...] = ("fp8", "int4")
    modes = [
        *MODES.values(),
        *(Mode(name=f"own {p}", engine=p, model="llama", precision=p, prefix_caching=True) for p in precisions),
    ]
    assert len(modes) == NUM_MODES
    policy = Learned.of(structs.replace(router, modes=scorers), modes)
    rng = Random(1)
    asked = [_request(rng) for _ in range(512)]
    candidates = [Candidate(mode.name, 0, 50.0, 10.0, 1_000.0, 200_000, 1, 7) for mode in modes]
    num = int(options.scaled(50_000, 5_000))
    p50s, p99s = [], []
    # The thread's own time, as for the core's events: what other processes took meanwhile is not the router's.
    choose, clock = policy.choose, time.thread_time_ns
    gc.collect()
    for _ in range(options.repeats):
        taken = []
        for number in range(num):
            features = asked[number & 511]
            began = clock()
            choose(features, candidates, rng)
            taken.append(clock() - began)
        cuts = statistics.quantiles(taken, n=100)
        p50s.append(cuts[49] / 1e3)
        p99s.append(cuts[98] / 1e3)
    name = f"{kind}: a choice among {NUM_MODES} modes, pure Python, CPU time on this host"
    return [
        row(f"{name}, p50", "us", p50s, target=TARGET, bar=BAR_P50_US),
        row(f"{name}, p99", "us", p99s, target=TARGET, bar=BAR_P99_US),
    ]


def _request(rng: Random) -> Features:
    cap = rng.randrange(1, 512)
    return Features(
        rng.randrange(16, 4_096), rng.randrange(1, cap + 1), cap, rng.random() < 0.3, None, "standard",
        rng.randrange(32), rng.randrange(8), 1.0, rng.random(), 0, None, None,
    )  # fmt: skip


def _known(value: float | None) -> float:
    if value is None:
        raise CannotMeasureError("a family was not judged")
    return value
