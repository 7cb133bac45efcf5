"""The quality gate on simulated pairs: how surely a worse mode is found, how rarely an equal one is withdrawn.

Pairs are drawn, not measured on engines: each differs with the stated probability, and the mean difference is exactly
known. From there on it is production's path: what was asked and said goes through `ShadowRuns` (which grades it, or can
not), each comparison through the scheduler's `Shadows`, and the gate's through its own test. Seeds are fixed, so the
figures repeat. A `repeat` of a row is one block of runs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from itertools import islice
from random import Random

from msd import tasks
from msd.core.events import QualityJudged
from msd.core.trial import Bettor, try_batch
from msd.domain import Chunk, Prompt, Sampling
from msd.learning.shadow_runs import Comparison, ShadowRuns
from tests.bench.harness import Options, Row, row, say
from tests.unit.core_world import CoreWorld, gate_of, make_config

TARGET = "gate"
DELTA, ALPHA = 0.015, 0.05
WORSE = -0.03
NUM_BLOCKS = 4
RUNS_PER_BLOCK = 50
CERTIFIED = gate_of({"m1": {"copy": "certified", "*": "certified"}})


def pairs(seed: str, disagreement: float, mean: float) -> Iterator[float]:
    """Differences of score without end: `disagreement` of them are not 0, and their mean is `mean`."""
    rng, worse = Random(seed).random, (disagreement - mean) / 2
    while True:
        drawn = rng()
        yield -1.0 if drawn < worse else 1.0 if drawn < disagreement else 0.0


class Production:
    """The daemon's parts between a request's answer and the verdict, with a certified mode m1 beside its reference."""

    def __init__(self) -> None:
        engines: dict[str, dict[str, object]] = {"m1": {"precision": "int8"}}
        quality = {"shadow_share": 1.0, "delta": DELTA, "alpha": ALPHA}
        self.world = CoreWorld(make_config(slots=8, engines=engines, quality=quality), gate=CERTIFIED)
        request_id = self.world.submit(task="copy", mode_hint="m1", mode_strict=True)
        entry = self.world.scheduler.entry(request_id)
        assert entry is not None
        self.entry = entry

    def judge(self, compared: Comparison) -> bool:
        """One more request is shadowed, and this came of it. True: the mode is withdrawn."""
        shadows = self.world.scheduler.shadows
        shadow = shadows.begin(self.entry, 0)
        assert shadow is not None, "a certified mode is shadowed"
        judged = QualityJudged(
            0, shadow.shadow_id, shadow.mode, shadow.task, compared.difference, compared.num_tokens, compared.agrees
        )
        return shadows.judged(judged) is not None


def compared(prompt: str, said: str, reference: str) -> Comparison:
    """What `ShadowRuns` makes of two answers to a prompt."""
    runs = ShadowRuns()
    body = Prompt(token_ids=tuple(prompt.encode()), sampling=Sampling(temperature=0.0))
    assert runs.begin("s", body, said, tuple(said.encode()), lambda ids: bytes(ids).decode())
    runs.chunk("s", Chunk(tuple(reference.encode()), reference, "stop"))
    return runs.end("s", is_whole=True)


PROBLEM = tasks.generate("copy", 1, 1)
RIGHT, WRONG = PROBLEM.answer, "wrong"
SCORED = {
    -1.0: compared(PROBLEM.prompt, WRONG, RIGHT),
    0.0: compared(PROBLEM.prompt, RIGHT, RIGHT),
    1.0: compared(PROBLEM.prompt, RIGHT, WRONG),
}
"""By the difference of scores."""
FREE = {same: compared("Tell me a story.", "Once upon", "Once upon" if same else "There was") for same in (True, False)}


def withdrawn_after(seed: str, disagreement: float, mean: float, num_pairs: int) -> int | None:
    """How many live pairs with an exact answer it took to withdraw the mode; None within `num_pairs`."""
    production = Production()
    for index, difference in enumerate(islice(pairs(seed, disagreement, mean), num_pairs), 1):
        if production.judge(SCORED[difference]):
            return index
    return None


def withdrawn_on_free_text(seed: str, agreement: float, num_pairs: int) -> int | None:
    """The same where nothing can be scored: `agreement` of the answers begin alike."""
    production, drawn = Production(), Random(seed).random
    for index in range(1, num_pairs + 1):
        if production.judge(FREE[drawn() < agreement]):
            return index
    return None


def by_the_spec(seed: str, disagreement: float, mean: float, num_pairs: int) -> int | None:
    """The same with the stakes of the spec: a prior of no loss, worth 20 pairs."""
    bettor = Bettor((1 - DELTA) / 2, "below")
    for index, difference in enumerate(islice(pairs(seed, disagreement, mean), num_pairs), 1):
        bettor.add((difference + 1) / 2)
        if bettor.capital * ALPHA >= 1:
            return index
    return None


def certified_after(seed: str, disagreement: float, delta: float, mean: float, num_pairs: int) -> int | None:
    """How many pairs the gate needed to certify the mode."""
    differences = list(islice(pairs(seed, disagreement, mean), num_pairs))
    return try_batch(differences, delta, ALPHA).num_pairs_safe


def measure(options: Options) -> list[Row]:
    """Rows of the gate."""
    num_runs = int(options.scaled(RUNS_PER_BLOCK, 10))
    rows = [
        _share(f"3 points worse, 5 % disagree: withdrawn within 4,000 live pairs, {NUM_BLOCKS * num_runs} runs",
               num_runs, lambda seed: withdrawn_after(seed, 0.05, WORSE, 4_000), op=">=", bar=95.0),
        _share(f"3 points worse, 10 % disagree: withdrawn within 12,000 live pairs, {NUM_BLOCKS * num_runs} runs",
               num_runs, lambda seed: withdrawn_after(seed, 0.10, WORSE, 12_000), op=">=", bar=95.0),
        _share(f"truly equal, 5 % disagree: withdrawn within 12,000 live pairs, {NUM_BLOCKS * num_runs} runs",
               num_runs, lambda seed: withdrawn_after(seed, 0.05, 0.0, 12_000), bar=1.0),
        _share(f"truly equal, 10 % disagree: withdrawn within 12,000 live pairs, {NUM_BLOCKS * num_runs} runs",
               num_runs, lambda seed: withdrawn_after(seed, 0.10, 0.0, 12_000), bar=1.0),
        _share("exactly 1.5 points worse (the limit), 5 % disagree: withdrawn within 12,000 live pairs",
               num_runs, lambda seed: withdrawn_after(seed, 0.05, -DELTA, 12_000), bar=100 * ALPHA),
        _share(f"free text, 97 % agree: withdrawn within 4,000 live pairs, {NUM_BLOCKS * num_runs} runs",
               num_runs, lambda seed: withdrawn_on_free_text(seed, 0.97, 4_000), bar=0.0),
        _share("3 points worse, 5 % disagree, within 4,000, with the spec's stakes (20 pairs of no loss)",
               num_runs, lambda seed: by_the_spec(seed, 0.05, WORSE, 4_000), op=">="),
        _share("exactly 1.5 points worse (the limit), 5 % disagree: certified by the gate within 12,000 pairs",
               num_runs, lambda seed: certified_after(seed, 0.05, DELTA, -DELTA, 12_000), bar=100 * ALPHA),
    ]  # fmt: skip
    for disagreement, delta, told in ((0.05, 0.015, 1_506), (0.02, 0.015, 497), (0.05, 0.03, 342)):
        say(f"{TARGET}: pairs to certify at {disagreement:.0%}, delta {delta:g}")
        blocks = []
        for block in range(NUM_BLOCKS):
            seeds = [f"{block}/{run}" for run in range(num_runs)]
            found = [certified_after(seed, disagreement, delta, 0.0, 12_000) for seed in seeds]
            blocks.append(statistics.median(12_000 if one is None else one for one in found))
        name = f"pairs to certify an equal mode, {disagreement:.0%} disagree, delta {delta:g} (the spec saw {told:,})"
        rows.append(row(name, "pairs", blocks, target=TARGET))
    return rows


def _share(name: str, num_runs: int, run: Callable[[str], int | None], **bar: object) -> Row:
    """Per cent of all runs that came to the end they were looked at for; `repeats` are the blocks."""
    say(f"{TARGET}: {name}")
    blocks = []
    for block in range(NUM_BLOCKS):
        blocks.append(100 * sum(run(f"{block}/{index}") is not None for index in range(num_runs)) / num_runs)
    return row(name, "% of runs", blocks, target=TARGET, of_repeats=statistics.fmean, **bar)  # type: ignore[arg-type]
