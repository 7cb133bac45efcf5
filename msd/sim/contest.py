"""The simulated contest: every policy against every fixed mode, under the same seeded bursty traffic.

How it goes, each step measured in the simulation (`match.play`), tuning and judging on different seeds:

1. **Capacity.** Each fixed mode is flooded: the *best* is the one that answers most requests a second of those that it
   may serve. Measured idle, it gives everybody's bounds (twice its TTFT and TPOT per family); under steady load of
   growing rate, everybody's capacity: the rate at which its goodput is highest.
2. **Tuning.** Every contestant may tune, on other seeds: fixed modes their slots, policies the set of resident modes,
   out of all that fit into memory and serve every family.
3. **Judging.** Bursts at 0.3, 0.6, 0.9 and 1.2 of that capacity; then other shapes of load. Goodput counts answers that
   met all SLOs; a mode serves only families for which it is certified. Fixed modes also run without that rule, apart.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Literal

from msgspec import Struct, structs

from msd.sim.match import Contestant, Match, Rules, play
from msd.sim.plan import FAMILIES, Bounds, Plan, Shape, idle_plan, make_plan
from msd.sim.truth import BY_NAME, CARDS, LEAST_KV_TOKENS, LOSSLESS, MODES

LOADS = (0.3, 0.6, 0.9, 1.2)
JUDGED_LOADS = (0.6, 0.9, 1.2)
"""Those with a bar; 0.3 completes the curve."""
RATES_PER_S = (3.0, 4.0, 5.0, 5.5, 6.0, 6.5, 7.0, 7.5, 8.0, 9.0, 10.0)
FLOOD_PER_S, FLOOD_S = 30.0, 60.0
SLOTS = (16, 32, 64)
DEFAULT_SLOTS = 32
SLO_FACTOR = 2.0
TUNING_LOADS = (0.6, 0.9)
SHOWN_LOAD = 0.9
ROUTED = ("cost", "rules", "least_loaded")
"""Policies that tune their set; the others take that of `cost`."""
CHOICES = ("fp16", "int8_pc", "int4_pc", "spec")
"""Modes out of which sets are made: `int8` and `int4` are these without prefix caching, on the same weights."""
FIXED, UNJUDGED = "fixed", "fixed, quality ignored"
OnStep = Callable[[int, int, str], None]


class Effort(Struct, frozen=True, kw_only=True):
    """How thorough: seeds and virtual seconds."""

    num_seeds: int = 4
    num_tuning_seeds: int = 2
    duration_s: float = 160.0
    tuning_s: float = 120.0
    loads: tuple[float, ...] = LOADS
    shapes: tuple[Shape, ...] = ("steady", "drift", "flip")
    """Beside the bursts."""
    shape_seeds: int = 2


QUICK = Effort(num_seeds=2, num_tuning_seeds=1, duration_s=100.0, tuning_s=80.0, loads=JUDGED_LOADS, shapes=())


class Point(Struct, frozen=True, kw_only=True):
    """One contestant at one load: means over the seeds; latencies are medians of the seeds' quantiles."""

    kind: str
    contestant: str
    modes: tuple[str, ...]
    slots: int
    shape: str
    load: float
    rate_per_s: float
    goodput_per_s: float
    goodputs_per_s: tuple[float, ...]
    """By seed."""
    good_share: float
    refused_share: float
    late_ttft_share: float
    late_tpot_share: float
    ttft_ms: tuple[float, float]
    tpot_ms: tuple[float, float]
    e2el_ms: tuple[float, float]
    joules_per_token: float
    joules_per_good_token: float
    mix: dict[str, float]
    """Share of the answers per mode."""
    good_by_family: dict[str, float]
    violations: int
    broken: tuple[str, ...]


class Verdict(Struct, frozen=True, kw_only=True):
    """One figure with its bar."""

    name: str
    value: float
    op: Literal["<=", ">="]
    bar: float
    holds: bool
    note: str = ""


class Contest(Struct, frozen=True, kw_only=True):
    """All that came out. Simulated."""

    card: str
    best_fixed: str
    capacity_per_s: float
    bounds: tuple[Bounds, ...]
    capacities: dict[str, tuple[float, float]]
    """Per fixed mode: answers a second when flooded, and the same less what it may not serve."""
    rates: dict[float, float]
    """Goodput of the best fixed mode by steady rate."""
    sets: dict[str, tuple[str, ...]]
    seeds: tuple[int, ...]
    duration_s: float
    points: tuple[Point, ...]
    verdicts: tuple[Verdict, ...]
    timelines: tuple[Match, ...]
    """`cost`, `rules` and the best fixed mode on the first seed at 0.9, in buckets of time."""


_Job = tuple[Contestant, Plan, Rules, bool]


def run_contest(
    effort: Effort,
    *,
    card: str = "80",
    first_seed: int = 1_001,
    jobs: int = 1,
    learned: str = "",
    on_step: OnStep = lambda done, total, what: None,
) -> Contest:
    """Run it all. `learned`: a trained router that takes part as well. Tuning seeds lie below 1,000."""
    assert first_seed >= 1_000, "seeds below 1,000 are for tuning"
    with ProcessPoolExecutor(max_workers=jobs, mp_context=get_context("spawn")) as pool:
        return _Contest(effort, card, first_seed, learned, pool, on_step).run()


class _Contest:
    """The state of one contest while it runs."""

    def __init__(
        self, effort: Effort, card: str, first_seed: int, learned: str, pool: Executor, on_step: OnStep
    ) -> None:
        self._effort = effort
        self._card = card
        self._learned = learned
        self._pool = pool
        self._on_step = on_step
        self._seeds = tuple(range(first_seed, first_seed + effort.num_seeds))
        self._tuning_seeds = tuple(range(1, 1 + effort.num_tuning_seeds))

    def run(self) -> Contest:
        best, capacities = self._best_fixed()
        bounds, capacity_per_s, rates = self._capacity(best)
        rules = Rules(card=self._card, bounds=bounds)
        fixed, routed = self._tune(rules, capacity_per_s, best)
        points, timelines = self._judge(rules, capacity_per_s, fixed, routed, best)
        return Contest(
            card=self._card,
            best_fixed=best,
            capacity_per_s=capacity_per_s,
            bounds=bounds,
            capacities=capacities,
            rates=rates,
            sets={contestant.name: contestant.modes for contestant in routed},
            seeds=self._seeds,
            duration_s=self._effort.duration_s,
            points=points,
            verdicts=tuple(_verdicts(points, best)),
            timelines=timelines,
        )

    def _play(self, what: str, jobs: Sequence[_Job]) -> list[Match]:
        self._on_step(0, len(jobs), what)
        matches = []
        for match in self._pool.map(_play, jobs):
            matches.append(match)
            self._on_step(len(matches), len(jobs), what)
        return matches

    def _best_fixed(self) -> tuple[str, dict[str, tuple[float, float]]]:
        """The fixed mode that serves most; and what each can do."""
        floods = [make_plan(seed, "steady", FLOOD_PER_S, FLOOD_S) for seed in self._tuning_seeds]
        rules = Rules(card=self._card)
        jobs = [(_fixed(mode.name), plan, rules, False) for mode in MODES for plan in floods]
        served: dict[str, list[tuple[float, float]]] = {}
        for match in self._play("best fixed mode", jobs):
            share = match.num_answered / max(1, match.num_judged)
            served.setdefault(match.contestant, []).append((match.finished_per_s, share * match.finished_per_s))
        capacities = {
            name: (_mean(all_ for all_, _ in of), _mean(safe for _, safe in of)) for name, of in served.items()
        }
        return max(capacities, key=lambda name: capacities[name][1]), capacities

    def _capacity(self, best: str) -> tuple[tuple[Bounds, ...], float, dict[float, float]]:
        """Bounds and capacity by the best fixed mode, and its goodput by rate."""
        contestant = _fixed(best)
        exact = Rules(card=self._card, drifts=False, judged=False, warm_up_s=1.0)
        (idle,) = self._play("its idle figures", [(contestant, idle_plan(0), exact, False)])
        rules = Rules(card=self._card, bounds=_bounds(idle))
        plans = [
            make_plan(seed, "steady", rate, self._effort.tuning_s)
            for rate in RATES_PER_S
            for seed in self._tuning_seeds
        ]
        goodput = dict.fromkeys(RATES_PER_S, 0.0)
        for match in self._play("its capacity", [(contestant, plan, rules, False) for plan in plans]):
            goodput[match.rate_per_s] += match.goodput_per_s / len(self._tuning_seeds)
        return _bounds(idle), max(goodput, key=lambda rate: goodput[rate]), goodput

    def _tune(self, rules: Rules, capacity_per_s: float, best: str) -> tuple[list[Contestant], list[Contestant]]:
        """The fixed modes and the policies, each with what served it best in bursts on the tuning seeds."""
        sets = [
            modes
            for size in (1, 2, 3, 4)
            for modes in itertools.combinations(CHOICES, size)
            if _fits(modes, self._card)
        ]
        tried = [_fixed(mode.name, slots) for mode in MODES for slots in SLOTS]
        tried += [
            Contestant(name=policy, policy=policy, modes=modes, slots=DEFAULT_SLOTS)
            for policy in ROUTED
            for modes in sets
            if len(modes) > 1
        ]
        plans = [
            make_plan(seed, "bursts", load * capacity_per_s, self._effort.tuning_s)
            for load in TUNING_LOADS
            for seed in self._tuning_seeds
        ]
        jobs = [(contestant, plan, rules, False) for contestant in tried for plan in plans]
        scores: dict[str, tuple[float, Contestant]] = {}
        matches = iter(self._play("tuning", jobs))
        for contestant in tried:
            score = math.fsum(match.goodput_per_s / match.rate_per_s for match in itertools.islice(matches, len(plans)))
            if contestant.name not in scores or score > scores[contestant.name][0]:
                scores[contestant.name] = score, contestant
        fixed = [scores[mode.name][1] for mode in MODES]
        routed = [scores[policy][1] for policy in ROUTED]
        like = scores["cost"][1]
        routed += [structs.replace(like, name=policy, policy=policy) for policy in ("round_robin", "random")]
        routed.append(Contestant(name=_alone(best), policy="cost", modes=(best,), slots=scores[best][1].slots))
        if self._learned:
            settings: dict[str, object] = {"learned": {"file": self._learned}}
            routed.append(structs.replace(like, name="learned", policy="learned", settings=settings))
        return fixed, routed

    def _judge(
        self, rules: Rules, capacity_per_s: float, fixed: list[Contestant], routed: list[Contestant], best: str
    ) -> tuple[tuple[Point, ...], tuple[Match, ...]]:
        effort = self._effort
        lax = structs.replace(rules, judged=False)
        entries = [(FIXED, contestant, rules) for contestant in fixed]
        # Lossless modes are the same with and without the rule.
        entries += [(UNJUDGED, made, lax) for made in fixed if BY_NAME[made.name].quality < LOSSLESS]
        entries += [("policy", contestant, rules) for contestant in routed]
        shown = (best, _alone(best), *ROUTED)
        few = [entry for entry in entries if entry[0] != UNJUDGED and entry[1].name in shown]
        rounds: list[tuple[str, Contestant, Rules, Shape, float, tuple[int, ...]]] = [
            (*entry, "bursts", load, self._seeds)
            for entry in entries
            for load in effort.loads
            if load in JUDGED_LOADS or entry in few
        ]
        rounds += [
            (*entry, shape, load, self._seeds[: effort.shape_seeds])
            for entry in few
            for shape in effort.shapes
            for load in JUDGED_LOADS
        ]
        jobs: list[_Job] = []
        for _, contestant, held, shape, load, seeds in rounds:
            for seed in seeds:
                drawn = shape == "bursts" and load == SHOWN_LOAD and seed == self._seeds[0] and held is rules
                plan = make_plan(seed, shape, load * capacity_per_s, effort.duration_s)
                jobs.append((contestant, plan, held, drawn and contestant.name in (best, "cost", "rules")))
        matches = iter(self._play("judging", jobs))
        points, timelines = [], []
        for kind, contestant, _, _, load, seeds in rounds:
            played = list(itertools.islice(matches, len(seeds)))
            timelines += [match for match in played if match.mix]
            points.append(_point(kind, contestant, load, played))
        return tuple(points), tuple(timelines)


def _play(job: _Job) -> Match:
    contestant, plan, rules, timeline = job
    return play(contestant, plan, rules, timeline=timeline)


def _fixed(mode: str, slots: int = DEFAULT_SLOTS) -> Contestant:
    return Contestant(name=mode, policy="fixed", modes=(mode,), slots=slots)


def _fits(modes: tuple[str, ...], card: str) -> bool:
    """Whether they fit, with room for requests, and serve every family."""
    return CARDS[card].kv_tokens(modes) >= LEAST_KV_TOKENS and any(BY_NAME[mode].quality >= LOSSLESS for mode in modes)


def _bounds(idle: Match) -> tuple[Bounds, ...]:
    return tuple(
        Bounds(
            ttft_ms=SLO_FACTOR * idle.ttft_by_family_ms[family.name],
            tpot_ms=SLO_FACTOR * idle.tpot_by_family_ms[family.name] if family.output_tokens > 1 else None,
        )
        for family in FAMILIES
    )


def _point(kind: str, contestant: Contestant, load: float, played: Sequence[Match]) -> Point:
    num_judged = max(1, sum(match.num_judged for match in played))
    num_answered = max(1, sum(match.num_answered for match in played))
    modes = sorted({mode for match in played for mode in match.by_mode})
    by_family = {}
    for family in FAMILIES:
        good, judged = (sum(match.good_by_family[family.name][i] for match in played) for i in (0, 1))
        by_family[family.name] = good / max(1, judged)
    return Point(
        kind=kind,
        contestant=contestant.name,
        modes=contestant.modes,
        slots=contestant.slots,
        shape=played[0].shape,
        load=load,
        rate_per_s=played[0].rate_per_s,
        goodput_per_s=_mean(match.goodput_per_s for match in played),
        goodputs_per_s=tuple(match.goodput_per_s for match in played),
        good_share=sum(match.num_good for match in played) / num_judged,
        refused_share=sum(match.num_refused for match in played) / num_judged,
        late_ttft_share=sum(match.late_ttft for match in played) / num_judged,
        late_tpot_share=sum(match.late_tpot for match in played) / num_judged,
        ttft_ms=(_median(match.ttft_ms[0] for match in played), _median(match.ttft_ms[1] for match in played)),
        tpot_ms=(_median(match.tpot_ms[0] for match in played), _median(match.tpot_ms[1] for match in played)),
        e2el_ms=(_median(match.e2el_ms[0] for match in played), _median(match.e2el_ms[1] for match in played)),
        joules_per_token=_mean(match.joules_per_token for match in played),
        joules_per_good_token=_mean(match.joules_per_good_token for match in played),
        mix={mode: sum(match.by_mode.get(mode, 0) for match in played) / num_answered for mode in modes},
        good_by_family=by_family,
        violations=sum(match.violations for match in played),
        broken=tuple(sorted({name for match in played for name in match.broken})),
    )


def _verdicts(points: Sequence[Point], best: str) -> Iterator[Verdict]:
    """The bars of the issue, over the bursts."""
    bursts = [point for point in points if point.shape == "bursts"]
    curves: dict[tuple[str, str], dict[float, Point]] = {}
    for point in bursts:
        curves.setdefault((point.kind, point.contestant), {})[point.load] = point
    cost = curves["policy", "cost"]
    safe = {load: _best_of(curves, FIXED, load) for load in JUDGED_LOADS}
    lax = {load: max(_best_of(curves, UNJUDGED, load), safe[load], key=_goodput) for load in JUDGED_LOADS}
    ratios = {load: _ratio(cost[load].goodput_per_s, safe[load].goodput_per_s) for load in JUDGED_LOADS}
    yield _at_least("goodput, cost / best fixed mode, best of the loads", max(ratios.values()), 1.2, _by_load(ratios))
    yield _at_least("goodput, cost / best fixed mode, least of the loads", min(ratios.values()), 0.98, _by_load(ratios))
    lax_ratios = {load: _ratio(cost[load].goodput_per_s, lax[load].goodput_per_s) for load in JUDGED_LOADS}
    yield _at_least(
        "the same against the best fixed mode that ignores quality, best of the loads",
        max(lax_ratios.values()),
        1.0,
        _by_load(lax_ratios),
    )
    rules = {
        load: _ratio(cost[load].goodput_per_s, curves["policy", "rules"][load].goodput_per_s) for load in JUDGED_LOADS
    }
    yield _at_least("goodput, cost / rules, best of the loads", max(rules.values()), 1.1, _by_load(rules))
    spread = {
        load: _ratio(cost[load].goodput_per_s, curves["policy", "least_loaded"][load].goodput_per_s)
        for load in JUDGED_LOADS
    }
    yield _at_least(
        "goodput, cost / best static set with least-loaded routing, least of the loads",
        min(spread.values()),
        1.0,
        _by_load(spread),
    )
    fixed = curves[FIXED, best]
    for name, unit in (("joules_per_good_token", "token of a good answer"), ("joules_per_token", "token")):
        own = sorted((point.goodput_per_s, getattr(point, name)) for point in cost.values())
        found = {load: getattr(fixed[load], name) for load in JUDGED_LOADS}
        energy = {load: _ratio(_at(own, fixed[load].goodput_per_s), found[load]) for load in JUDGED_LOADS}
        top = max(JUDGED_LOADS, key=lambda load: fixed[load].goodput_per_s)
        value = energy[top]
        alone = curves.get(("policy", _alone(best)), {})
        served = sorted((point.goodput_per_s, getattr(point, name)) for point in alone.values())
        same = ""
        if served:
            ratio = _ratio(_at(served, fixed[top].goodput_per_s), found[top])
            same = f"; cost on {best} alone, which refuses as much: {ratio:.2f}"
        yield Verdict(
            name=f"joules per {unit} at the best fixed mode's highest goodput, cost / {best}",
            value=value,
            op="<=",
            bar=1.0,
            holds=value <= 1.0,
            note=f"at its goodput of {fixed[top].goodput_per_s:.2f}/s (load {top:g}); by its load: {_by_load(energy)}"
            + same,
        )
    broken = sorted({name for point in points for name in point.broken})
    violations = sum(point.violations for point in points)
    yield Verdict(
        name="answers of a mode that is not certified for them",
        value=float(violations),
        op="<=",
        bar=0.0,
        holds=not violations,
    )
    yield Verdict(
        name="invariants of the daemon that broke",
        value=float(len(broken)),
        op="<=",
        bar=0.0,
        holds=not broken,
        note=", ".join(broken),
    )


def _best_of(curves: dict[tuple[str, str], dict[float, Point]], kind: str, load: float) -> Point:
    """The best at this very load: harder to beat than one mode at all of them."""
    return max((curve[load] for (of, _), curve in curves.items() if of == kind), key=_goodput)


def _alone(mode: str) -> str:
    return f"cost on {mode} alone"


def _goodput(point: Point) -> float:
    return point.goodput_per_s


def _at(curve: Sequence[tuple[float, float]], x: float) -> float:
    """The curve at x, linear between its points, level beyond them."""
    if x <= curve[0][0]:
        return curve[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if x <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return curve[-1][1]


def _at_least(name: str, value: float, bar: float, note: str) -> Verdict:
    return Verdict(name=name, value=value, op=">=", bar=bar, holds=value >= bar, note=note)


def _by_load(values: dict[float, float]) -> str:
    return ", ".join(f"{load:g}: {value:.2f}" for load, value in values.items())


def _ratio(a: float, b: float) -> float:
    """Bounded: a rival may come to nothing."""
    return min(99.0, a / b) if b > 0 else 99.0


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return math.fsum(found) / max(1, len(found))


def _median(values: Iterable[float]) -> float:
    found = sorted(values)
    return found[len(found) // 2]
