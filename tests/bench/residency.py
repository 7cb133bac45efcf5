"""Residency, all simulated: thrash bait, regret against the best static set and a clairvoyant plan, cost of a plan.

A world is the daemon's own code in virtual time (`msd.sim.world`) with four engines that may move and memory for two.
Their times are those of the contest's truth table (`msd.sim.truth`), off by up to 20 % per seed; the planner starts
from a profile of the table itself. Two regrets, both in latency (energy has no weight here):

- **measured**: mean E2EL of all requests over that of the best static set: the same traffic, policy and memory, its
  engines resident throughout. A set that cannot serve a class is no candidate.
- **objective**: V integrated over time plus K of each switch, over that of the best plan of one who knows the rates and
  true times of every instant in advance, pays the same K and keeps the same dwell (dynamic programming, 5 s steps).

Both bars are on the mean over loads, rates and seeds; each load has rows of its own. Dwells and ways back are judged by
what the pool of engines reported (EngineUp, EngineAsleep); the planner is asked only for the reason of a move. Seeds 1
and 2 are for this judgement; the planner was tuned on 11 to 13.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from itertools import combinations
from random import Random

import structlog
from msgspec import Struct, convert, structs

from msd.config import Config
from msd.core import events as e
from msd.core.commands import Command
from msd.core.demand import Class
from msd.core.residency import Move, Residency, ResidencyFigures
from msd.core.scheduler import Scheduler
from msd.core.worth import Curve, Worth
from msd.dispatch import Dispatcher
from msd.domain import EngineInfo
from msd.profile import SCHEMA, ModeProfile, Profile
from msd.sim.checks import Checks
from msd.sim.producers import SimSession
from msd.sim.truth import BY_NAME, EIGHT_BIT, LOSSLESS, OVERHEAD_GB, ModeTruth
from msd.sim.weather import MODEL, TENANTS, Weather
from msd.sim.world import World
from msd.wire import SamplingFields, Submit
from tests.bench.harness import CannotMeasureError, Options, Row, row, say

TARGET = "residency"
NAMES = ("int4", "int8", "fp16", "spec")
KV_GB = 2.0
TOTAL_GB, RESERVE_GB = 36.0, 1.0
SLOTS = 32
START_S, SLEEP_S, WAKE_S = 20.0, 0.4, 0.6
MIN_DWELL_S = 30.0
QUIET_S = 120.0
"""Engines start before the load does; it is the same for all, and long enough to start each of the four once."""
EXEMPT = ("memory", "quality", "engine lost", "unserved", "start")
"""Reasons of moves that need no dwell; `start`: right after the engines were first started."""
STEP_S = 5.0
SQUEEZE_GB = 14.0
SIMULATED = "simulated, "


class Kind(Struct, frozen=True):
    """One kind of request."""

    num_prompt: int
    num_output: int
    quality_floor: float | None


CHAT = Kind(230, 128, None)
DOCUMENT = Kind(1_380, 32, None)
REASON = Kind(150, 160, EIGHT_BIT)
EXACT = Kind(280, 48, LOSSLESS)
SAY = Kind(50, 128, None)
READ = Kind(1_500, 4, None)
KINDS = (CHAT, DOCUMENT, REASON, EXACT, SAY, READ)
Mix = tuple[float, ...]
"""Shares of KINDS."""
EVEN: Mix = (0.4, 0.2, 0.25, 0.15, 0.0, 0.0)
TALK: Mix = (0.75, 0.05, 0.0, 0.2, 0.0, 0.0)
WORK: Mix = (0.0, 0.35, 0.65, 0.0, 0.0, 0.0)
SAYING: Mix = (0.0, 0.0, 0.0, 0.0, 0.9, 0.1)
READING: Mix = (0.0, 0.0, 0.0, 0.0, 0.1, 0.9)
BAITS = ("talker", "reader")
"""Two modes of which one fits: each answers its own mix much faster than the other does."""
_BAIT = structs.replace(BY_NAME["int8"], weights_gb=20.0)
TRUTHS = {
    **BY_NAME,
    "talker": structs.replace(_BAIT, name="talker", step_ms=4.0, decode_ms_per_request=0.1, prefill_ms_per_token=0.2),
    "reader": structs.replace(_BAIT, name="reader", step_ms=12.0, decode_ms_per_request=0.1, prefill_ms_per_token=0.02),
}


class Load(Struct, frozen=True):
    """What arrives: the rate and the mix at each time, and when somebody else takes memory."""

    name: str
    duration_s: float
    rate_at: Callable[[float], float]
    mix_at: Callable[[float], Mix]
    squeeze_s: tuple[float, float] | None = None


def loads(rate: float, duration_s: float) -> list[Load]:
    """The five of the spec."""

    def drift(t_s: float) -> Mix:
        share = t_s / duration_s
        return tuple((1 - share) * a + share * b for a, b in zip(TALK, WORK, strict=True))

    return [
        Load("steady", duration_s, lambda t: rate, lambda t: EVEN),
        Load("bursts x4, 20 s", duration_s, lambda t: rate * (1.6 if int(t / 20) % 2 else 0.4), lambda t: EVEN),
        Load("drift", duration_s, lambda t: rate, drift),
        square(rate, 25.0, duration_s, TALK, WORK),
        Load("squeeze", duration_s, lambda t: rate, lambda t: TALK, (duration_s / 3, duration_s * 2 / 3)),
    ]


def square(rate: float, half_s: float, duration_s: float, one: Mix, other: Mix) -> Load:
    """The mix flips each `half_s`."""
    return Load(f"flip each {half_s:g} s", duration_s, lambda t: rate, lambda t: other if int(t / half_s) % 2 else one)


class Player:
    """Submits a load; the same seed gives every contestant the same requests."""

    def __init__(
        self,
        load: Load,
        seed: int,
        squeeze: Callable[[int], None],
        dispatcher: Dispatcher,
        weather: Weather,
        num_requests: int,
        rng: Random,
        checks: Checks,
    ) -> None:
        self.all_sent = asyncio.Event()
        self.sessions = [SimSession(TENANTS[0], 0, None, checks)]
        self._load = load
        self._squeeze = squeeze
        self._dispatcher = dispatcher
        self._rng = Random(f"{seed}/{load.name}")
        self._loop = asyncio.get_running_loop()
        self._timers: list[asyncio.TimerHandle] = []
        self._t_s = 0.0
        self._number = 0

    def start(self) -> None:
        """Begin after a quiet time."""
        self._begin_s = self._loop.time() + QUIET_S
        if self._load.squeeze_s is not None:
            first_s, last_s = self._load.squeeze_s
            self._timers += [
                self._loop.call_at(self._begin_s + first_s, self._squeeze, int(SQUEEZE_GB * 1e9)),
                self._loop.call_at(self._begin_s + last_s, self._squeeze, 0),
            ]
        self._wait()

    def stop(self) -> None:
        """Nothing more."""
        for timer in self._timers:
            timer.cancel()

    def _wait(self) -> None:
        # Thinning: exact for any rate that stays below the bound.
        most = 2 * max(self._load.rate_at(t) for t in range(0, int(self._load.duration_s), 10))
        while True:
            self._t_s += self._rng.expovariate(most)
            if self._rng.random() * most < self._load.rate_at(self._t_s):
                break
        if self._t_s >= self._load.duration_s:
            self.all_sent.set()
            return
        self._timers = [timer for timer in self._timers if timer.when() > self._loop.time()]
        self._timers.append(self._loop.call_at(self._begin_s + self._t_s, self._submit))

    def _submit(self) -> None:
        kind = self._rng.choices(KINDS, self._load.mix_at(self._t_s))[0]
        self._number += 1
        name = f"c{self._number}"
        num_prompt = max(17, round(kind.num_prompt * self._rng.lognormvariate(0.0, 0.1)))
        self.sessions[0].ask(name)
        self._dispatcher.submit(
            Submit(
                client_request_id=name,
                max_tokens=kind.num_output,
                prompt_token_ids=tuple((self._number * 31 + i) % 4_000 for i in range(num_prompt)),
                model=MODEL,
                sampling=SamplingFields(ignore_eos=True),
                quality_floor=kind.quality_floor,
                stream=False,
            ),
            self.sessions[0],
        )
        self._wait()


def config_of(seed: int, names: Sequence[str], residency: str) -> Config:
    """These engines, true times of the seed; `auto` or `always`."""
    engines = []
    for name in names:
        truth = TRUTHS[name].drifted(seed)
        engines.append(
            {
                "name": name,
                "model": MODEL,
                "kind": "sim",
                "precision": truth.precision,
                "speculation": truth.speculation,
                "quality": truth.quality,
                "max_num_seqs": SLOTS,
                "residency": residency,
                "sim": {
                    "step_ms": truth.step_ms,
                    "decode_ms_per_request": truth.decode_ms_per_request,
                    "prefill_ms_per_token": truth.prefill_ms_per_token,
                    "tokens_per_step": truth.tokens_per_step,
                    "weights_bytes": _bytes(name),
                    "kv_capacity_tokens": int(KV_GB * 1e9 / 131_072),
                    "max_model_len": 4_096,
                    "start_s": 1.0 if name in BAITS else START_S,
                    "sleep_s": SLEEP_S,
                    "wake_s": WAKE_S,
                },
            }
        )
    document = {
        "daemon": {"seed": seed},
        "model": [{"name": MODEL}],
        "engine": engines,
        "tenant": [{"name": name} for name in TENANTS],
        "policy": {"name": "cost", "cost": {"energy_weight": 0.0}},
        "residency": {"reserve_bytes": int(RESERVE_GB * 1e9), "min_dwell_s": MIN_DWELL_S},
        "telemetry": {"sim_memory_bytes": int(TOTAL_GB * 1e9)},
    }
    return convert(document, Config)


def _bytes(name: str) -> int:
    return int((TRUTHS[name].weights_gb + OVERHEAD_GB + KV_GB) * 1e9)


def profile() -> Profile:
    """What `msd profile` would have measured of the table's engines, which no seed has exactly."""
    return Profile(
        schema=SCHEMA,
        created="",
        command="",
        device="simulated",
        engine_version="simulated",
        source="simulated",
        idle_w=None,
        modes=tuple(_profile_of(truth) for truth in TRUTHS.values()),
    )


def _profile_of(truth: ModeTruth) -> ModeProfile:
    ttft_s, tpot_s = _lines(truth)
    return ModeProfile(
        mode=truth.name,
        recipe="",
        ttft_ms=(ttft_s[0] * 1e3, ttft_s[1] * 1e3, 0.0),
        tpot_ms=(tpot_s[0] * 1e3, tpot_s[1] * 1e3, 0.0),
        eos_step_ms=0.0,
        gpu_bytes=_bytes(truth.name),
        start_s=START_S,
        sleep_s=SLEEP_S,
        wake_s=WAKE_S,
    )


def _lines(truth: ModeTruth) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    step_s, each_s, token_s = (
        truth.step_ms * 1e-3,
        truth.decode_ms_per_request * 1e-3,
        truth.prefill_ms_per_token * 1e-3,
    )
    tokens = truth.tokens_per_step
    return (step_s + each_s, token_s, 0.0), ((step_s + each_s) / tokens, each_s / tokens, 0.0)


class Ran(Struct, frozen=True):
    """What came of one world."""

    mean_s: float
    num_requests: int
    num_unanswered: int
    num_delayed: int
    figures: ResidencyFigures
    history: tuple[Move, ...]
    violations: tuple[str, ...]
    exempt: dict[str, int]
    """Moves inside a dwell, or back within two, that were no violation, by reason."""
    num_performed: int
    begin_us: int
    first: tuple[str, ...]


def run(load: Load, seed: int, names: Sequence[str], residency: str) -> Ran:
    """One world: the load on these engines."""
    config = config_of(seed, names, residency)
    weather = Weather(rate_per_s=1.0, num_slots=SLOTS, step_noise=0.05, tick_s=0.05, emit_interval_ms=500.0)
    made: list[World] = []

    performed: list[tuple[int, str]] = []

    def make_scheduler(config: Config, rng: Random) -> Scheduler:
        scheduler = Scheduler.from_config(config, rng, profile=profile())
        handle = scheduler.handle

        def watch(event: e.Event) -> list[Command]:
            if isinstance(event, e.EngineUp):
                performed.append((event.t_us, event.info.engine))
            elif isinstance(event, e.EngineAsleep):
                performed.append((event.t_us, event.engine))
            return handle(event)

        scheduler.handle = watch  # type: ignore[method-assign]
        return scheduler

    def squeeze(num_bytes: int) -> None:
        made[0]._gpu.squeeze(num_bytes)

    world = World(seed, 1, config, weather, make_scheduler, partial(Player, load, seed, squeeze))
    made.append(world)
    world.run()
    report = world.report(1.0)
    scheduler = world._scheduler
    planner = scheduler.residency
    e2el = [outcome.timings.e2e_ms * 1e-3 for outcome in world.outcomes if outcome.finish_reason == "length"]
    broken = tuple(f"{check.name}: {check.violations}" for check in report.checks if check.num_violations)
    history = tuple(planner.history) if planner is not None else ()
    found, exempt = judged(performed, history) if planner is not None else ([], {})
    return Ran(
        mean_s=statistics.fmean(e2el) if e2el else math.inf,
        num_requests=report.submitted,
        num_unanswered=report.submitted - len(e2el),
        num_delayed=sum(1 for outcome in world.outcomes if outcome.attempt > 1),
        figures=planner.figures() if planner is not None else ResidencyFigures(),
        history=history,
        violations=broken + tuple(found),
        exempt=exempt,
        num_performed=len(performed),
        begin_us=world._start_us + int(QUIET_S * 1e6),
        first=planner.first if planner is not None else tuple(names),
    )


def judged(performed: Sequence[tuple[int, str]], history: Sequence[Move]) -> tuple[list[str], dict[str, int]]:
    """Violations, and exempt moves by reason, of what the engines really did: (when, which engine came or went).

    A switch that began within a dwell of the last transition before it; an engine that moved twice, by two plans,
    within two dwells; an engine that moved although its plan did not say so.
    """
    found: list[str] = []
    exempt: dict[str, int] = {}
    last_us: int | None = None
    moved: dict[str, tuple[int, Move | None]] = {}
    began: Move | None = None
    for t_us, engine in performed:
        plan = next((move for move in reversed(history) if move.t_us <= t_us), None)
        if plan is not None:
            faults = []
            if engine not in set(plan.before) ^ set(plan.after):
                found.append(f"unplanned: {engine} at {t_us}, {plan}")
            if plan is not began and last_us is not None and plan.t_us - last_us < MIN_DWELL_S * 1e6:
                faults.append("dwell")
            earlier_us, by = moved.get(engine, (-(1 << 60), plan))
            if by is not plan and t_us - earlier_us < 2 * MIN_DWELL_S * 1e6:
                faults.append("back")
            began = plan
            for fault in faults:
                reason = "start" if plan.reason == "gain" and (fault, by) == ("back", None) else plan.reason
                if reason == "gain":
                    found.append(f"{fault}: {engine} at {t_us}, {plan}")
                else:
                    exempt[reason] = exempt.get(reason, 0) + 1
        last_us = t_us
        moved[engine] = t_us, plan
    return found, exempt


# --- best static set ------------------------------------------------------------------------------------------------


@lru_cache
def static_sets(available_gb: float) -> tuple[tuple[str, ...], ...]:
    """Sets that fit, full or not, and serve every kind."""
    found = []
    for size in range(1, len(NAMES) + 1):
        for names in combinations(NAMES, size):
            if sum(map(_bytes, names)) <= available_gb * 1e9:
                found.append(names)
    return tuple(found)


def best_static(load: Load, seed: int) -> tuple[float, tuple[str, ...]]:
    """The lowest mean E2EL of a set that stays throughout and serves everything."""
    available = TOTAL_GB - RESERVE_GB - (SQUEEZE_GB if load.squeeze_s is not None else 0.0)
    needs_lossless = any(load.mix_at(t)[3] > 0 for t in range(0, int(load.duration_s), 5))
    best: tuple[float, tuple[str, ...]] = (math.inf, ("",))
    for names in static_sets(available):
        if needs_lossless and not any(BY_NAME[name].quality >= LOSSLESS for name in names):
            continue
        if not any(BY_NAME[name].quality >= EIGHT_BIT for name in names):
            continue
        ran = run(load, seed, names, "always")
        if not ran.num_unanswered and ran.mean_s < best[0]:
            best = (ran.mean_s, names)
    return best


# --- the clairvoyant plan -------------------------------------------------------------------------------------------


def clairvoyant(load: Load, seed: int, ran: Ran) -> tuple[float, float]:
    """(our objective, that of the best plan with everything known), in request-seconds."""
    truths = [TRUTHS[name].drifted(seed) for name in NAMES]
    curves = [Curve(*_lines(truth), SLOTS, int(KV_GB * 1e9 / 131_072)) for truth in truths]
    sets = [sum(1 << NAMES.index(name) for name in names) for names in static_sets(TOTAL_GB - RESERVE_GB)]
    num_steps = int(load.duration_s / STEP_S)
    values: list[dict[int, float]] = []
    worths = []
    for step in range(num_steps):
        t_s = (step + 0.5) * STEP_S
        classes = []
        for kind, share in zip(KINDS, load.mix_at(t_s), strict=True):
            if share > 0:
                eligible = sum(1 << i for i, truth in enumerate(truths) if truth.quality >= (kind.quality_floor or 0.0))
                rate = load.rate_at(t_s) * share
                classes.append(Class(rate, rate, kind.num_prompt, kind.num_output, eligible))
        worth = Worth(curves, classes, lambda x: 1.0 + x, fast=True, latency_weight=1.0, energy_weight=0.0)
        squeezed = load.squeeze_s is not None and load.squeeze_s[0] <= t_s < load.squeeze_s[1]
        most = (TOTAL_GB - RESERVE_GB - (SQUEEZE_GB if squeezed else 0.0)) * 1e9
        fit = [s for s in sets if sum(_bytes(NAMES[i]) for i in range(len(NAMES)) if s >> i & 1) <= most]
        values.append({s: min(worth.of(part) for part in fit if part & s == part) * STEP_S for s in fit})
        worths.append(worth)

    def price(step: int, before: int, after: int) -> float:
        stall_s = SLEEP_S * (before & ~after).bit_count() + WAKE_S * (after & ~before).bit_count()
        worth = worths[step]
        now = worth.of(before)
        stays = before & after
        rate = max(0.0, worth.unserved_per_s(stays) - worth.unserved_per_s(before))
        detour = max(0.0, worth.served_of(stays) - now) * stall_s if stays else 0.0
        return 0.1 * now * stall_s + rate * stall_s * stall_s / 2 / 0.5 + detour

    dwell = round(MIN_DWELL_S / STEP_S)
    # State: the set and for how many steps it has stayed (at most the dwell); anything to begin with.
    state = {(s, dwell): cost for s, cost in values[0].items()}
    for step in range(1, num_steps):
        after: dict[tuple[int, int], float] = {}
        for (s, age), cost in state.items():
            if s in values[step]:
                key = s, min(dwell, age + 1)
                after[key] = min(after.get(key, math.inf), cost + values[step][s])
            if age >= dwell or s not in values[step]:
                for other, more in values[step].items():
                    if other != s:
                        total = cost + more + price(step, s, other)
                        after[other, 1] = min(after.get((other, 1), math.inf), total)
        state = after
    best = min(state.values())
    ours = 0.0
    present = ran.first
    moves = list(ran.history)
    for step in range(num_steps):
        while moves and moves[0].t_us <= ran.begin_us + step * STEP_S * 1e6:
            move = moves.pop(0)
            present = move.after
            if move.t_us > ran.begin_us:
                ours += price(step, _bits(move.before), _bits(move.after))
        mine = values[step].get(_bits(present))
        # Memory is gone and we have not shed yet: judged as the best set within what is there would be.
        ours += mine if mine is not None else min(values[step].values())
    return ours, best


def _bits(names: Sequence[str]) -> int:
    return sum(1 << NAMES.index(name) for name in names)


def _contest(
    rate: float, duration_s: float, number: int, seed: int
) -> tuple[str, Ran, float, tuple[str, ...], float, float]:
    """One load of the five: ours, the best static set, and the objective against that of the clairvoyant plan."""
    load = loads(rate, duration_s)[number]
    ran = run(load, seed, NAMES, "auto")
    return (load.name, ran, *best_static(load, seed), *clairvoyant(load, seed, ran))


def _bait(half_s: float, duration_s: float, seed: int) -> tuple[Ran, float]:
    """One square wave: ours, and the better of the two that stay."""
    bait = square(1.5, half_s, duration_s, SAYING, READING)
    stay_s = min(run(bait, seed, (name,), "always").mean_s for name in BAITS)
    return run(bait, seed, BAITS, "auto"), stay_s


# --- rows -----------------------------------------------------------------------------------------------------------


def measure(options: Options) -> list[Row]:
    """Rows of residency and switching."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    duration_s = options.scaled(600.0, 300.0)
    seeds = range(1, int(options.scaled(3, 2)))
    rates = (2.0,) if options.quick else (1.5, 3.0)
    static: dict[str, list[float]] = {}
    objective: dict[str, list[float]] = {}
    violations: list[str] = []
    bait_regret: list[float] = []
    switches: list[float] = []
    transit: list[float] = []
    delayed: list[float] = []
    exempt = dict.fromkeys(EXEMPT, 0)
    num_performed = 0
    waves = (10.0, 25.0, 40.0, 60.0, 90.0, 150.0, 300.0)
    num_waves = 0
    judged_on = [(rate, duration_s, i, seed) for rate in rates for i in range(5) for seed in seeds]
    baited = [(half_s, max(duration_s, 6 * half_s), seed) for half_s in waves for seed in seeds]
    with ProcessPoolExecutor(os.cpu_count()) as workers:
        of_waves = [workers.submit(_bait, *bait) for bait in reversed(baited)]
        for (rate, _, _, seed), (name, ran, best_s, names, ours, known) in zip(
            judged_on, workers.map(_contest, *zip(*judged_on, strict=True)), strict=True
        ):
            if ran.num_unanswered:
                violations.append(f"{name}: {ran.num_unanswered} requests without an answer")
            violations += ran.violations
            num_performed += ran.num_performed
            for reason, number in ran.exempt.items():
                exempt[reason] += number
            static.setdefault(name, []).append(100 * (ran.mean_s / best_s - 1))
            objective.setdefault(name, []).append(100 * (ours / known - 1))
            hours = (duration_s + QUIET_S) / 3_600
            switches.append(ran.figures.num_switches / hours)
            transit.append(100 * ran.figures.transition_s / (duration_s + QUIET_S))
            delayed.append(100 * ran.num_delayed / ran.num_requests)
            last = "+".join(ran.history[-1].after if ran.history else ran.first)
            say(
                f"{TARGET}: {name}, {rate:g}/s, seed {seed}: {ran.mean_s * 1e3:.0f} ms, best static "
                f"{'+'.join(names)} {best_s * 1e3:.0f} ms, objective {ours:.0f} against {known:.0f}, "
                f"{ran.figures.num_switches} switches, at last {last}"
            )
        for (half_s, lasts_s, seed), future in zip(reversed(baited), of_waves, strict=True):
            ran, stay_s = future.result()
            violations += ran.violations
            num_performed += ran.num_performed
            for reason, number in ran.exempt.items():
                exempt[reason] += number
            num_waves += ran.figures.num_switches
            bait_regret.append(100 * (ran.mean_s / stay_s - 1))
            say(
                f"{TARGET}: bait, flip each {half_s:g} s, seed {seed}: {ran.mean_s * 1e3:.0f} ms, best static "
                f"{stay_s * 1e3:.0f} ms, {ran.figures.num_switches} switches in {lasts_s:g} s, "
                f"h x {ran.figures.backoff:g}"
            )
    if not num_waves:
        raise CannotMeasureError("no square wave made it switch: there was no bait")
    for text in violations[:5]:
        say(f"{TARGET}: {text}")
    every_static = [value for values in static.values() for value in values]
    every_objective = [value for values in objective.values() for value in values]
    rows = [
        row(
            f"{SIMULATED}dwell violations, ways back inside two dwells and broken invariants, all worlds and square "
            f"waves of {waves[0]:g}-{waves[-1]:g} s ({num_performed} transitions as performed)",
            "count",
            [float(len(violations))],
            target=TARGET,
            bar=0.0,
        ),
        row(
            f"{SIMULATED}regret of mean E2EL against the best static set, mean over loads, rates and seeds",
            "%",
            every_static,
            target=TARGET,
            bar=5.0,
            of_repeats=statistics.fmean,
        ),
        row(
            f"{SIMULATED}regret of the objective against the clairvoyant plan, mean over loads, rates and seeds",
            "%",
            every_objective,
            target=TARGET,
            bar=15.0,
            of_repeats=statistics.fmean,
        ),
    ]
    rows += [
        row(
            f"{SIMULATED}moves inside a dwell or back inside two, exempt because: {reason}",
            "count",
            [float(number)],
            target=TARGET,
        )
        for reason, number in exempt.items()
    ]
    for name, regrets in static.items():
        rows += [
            row(
                f"{SIMULATED}{name}: regret against the best static set, worst of all",
                "%",
                regrets,
                target=TARGET,
                bar=5.0,
                of_repeats=max,
            ),
            row(
                f"{SIMULATED}{name}: regret against the clairvoyant plan, worst of all",
                "%",
                objective[name],
                target=TARGET,
                bar=15.0,
                of_repeats=max,
            ),
        ]
    rows += [
        row(
            f"{SIMULATED}bait: regret against the best static set, mean over the square waves",
            "%",
            bait_regret,
            target=TARGET,
            of_repeats=statistics.fmean,
        ),
        row(f"{SIMULATED}switches per hour", "1/h", switches, target=TARGET),
        row(f"{SIMULATED}time with a transition under way", "%", transit, target=TARGET),
        row(f"{SIMULATED}requests run again because their engine left", "%", delayed, target=TARGET),
        row(
            "one plan, 8 engines that may move, 12 classes, CPU time, slowest of 20",
            "ms",
            plan_ms(options),
            target=TARGET,
            bar=2.0,
        ),
    ]
    return rows


def plan_ms(options: Options) -> list[float]:
    """Time of a plan with 8 engines and as many classes as are kept, real time on this machine."""
    names = [f"m{i}" for i in range(8)]
    engines = [
        {
            "name": name,
            "model": MODEL,
            "kind": "sim",
            "residency": "auto",
            "quality": 0.8 + 0.02 * i,
            "sim": {"weights_bytes": (8 + i) * 10**9, "step_ms": 6.0 + i},
        }
        for i, name in enumerate(names)
    ]
    document = {
        "model": [{"name": MODEL}],
        "engine": engines,
        "residency": {"min_dwell_s": 86_400.0},  # every plan is made to its end, and none is carried out
        "telemetry": {"sim_memory_bytes": 45 * 10**9},
    }
    config = convert(document, Config)
    lasted = []
    for repeat in range(max(5, options.repeats)):
        scheduler = Scheduler.from_config(config, Random(repeat), profile=_profiles(names))
        planner = scheduler.residency
        assert isinstance(planner, Residency), "nothing may move here"
        rng = Random(repeat)
        t_us = 1_000_000
        moves = planner.tick(t_us, None)
        while moves:
            engine, to = moves[0].engine, moves[0].to
            info = EngineInfo(
                engine=engine, max_model_len=4_096, max_num_seqs=32, kv_capacity_tokens=60_000, start_s=20.0
            )
            scheduler.handle(e.EngineUp(t_us, info) if to == "resident" else e.EngineAsleep(t_us, engine, to, 0.3))
            moves = planner.tick(t_us, None)
        if any(book.residence == "resident" and not book.up for book in scheduler.fleet.books):
            raise CannotMeasureError("it is still about its first plan: what is timed would be none")
        worst = 0.0
        for _ in range(20):
            for _ in range(100):
                planner.arrived(2 ** rng.randint(4, 10), 2 ** rng.randint(3, 8), rng.choice((255, 252, 240)))
            t_us += 5_000_000
            began = time.thread_time()  # of this thread alone: others may keep the cores busy
            planner.tick(t_us, None)
            worst = max(worst, (time.thread_time() - began) * 1e3)
        if planner.history:
            raise CannotMeasureError("it moved an engine: what is timed would be no plan from there on")
        lasted.append(worst)
    return lasted


def _profiles(names: Sequence[str]) -> Profile:
    modes = tuple(
        ModeProfile(
            mode=name,
            recipe="",
            ttft_ms=(10.0 + i, 0.05, 0.0),
            tpot_ms=(6.0 + i, 0.3, 0.0),
            eos_step_ms=0.0,
            start_s=20.0,
            wake_s=0.5,
            sleep_s=0.3,
        )
        for i, name in enumerate(names)
    )
    return Profile(
        schema=SCHEMA,
        created="",
        command="",
        device="simulated",
        engine_version="simulated",
        source="simulated",
        idle_w=None,
        modes=modes,
    )
