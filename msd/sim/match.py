"""One match of the simulated contest: a contestant on a plan.

No free lunch (modeswitch spec, section 7): the engines of one GPU share its compute (`msd.simgpu`), a fixed mode has
the whole GPU and all memory for its KV cache, truths are hidden and drift, rates and SLOs are those of the best *fixed*
mode. A match is one contestant on one plan, through the daemon's own code in virtual time; all of it is simulated.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from functools import partial

import structlog
from msgspec import Struct, convert

from msd.config import Config
from msd.core.scheduler import Scheduler
from msd.domain import Outcome
from msd.profile import SCHEMA, ModeProfile, Profile
from msd.sim.plan import FAMILIES, Bounds, Plan, Player
from msd.sim.truth import (
    BY_NAME,
    CARDS,
    IDLE_W,
    LEAST_KV_TOKENS,
    MAX_MODEL_LEN,
    STEP_NOISE,
    ModeTruth,
)
from msd.sim.weather import MODEL, TENANTS, Weather
from msd.sim.world import World

WARM_UP_S = 20.0
"""Requests that arrive before are not judged: engines start, estimates are first made, caches fill. For all alike."""
BUCKET_S = 5.0


class Contestant(Struct, frozen=True, kw_only=True):
    """A policy over the modes that are resident. One mode: a fixed mode, which has the card to itself."""

    name: str
    policy: str
    modes: tuple[str, ...]
    slots: int = 32
    settings: dict[str, object] = {}
    """Of `[policy]`, beside its name."""


class Rules(Struct, frozen=True, kw_only=True):
    """What holds for everybody in a match."""

    card: str = "80"
    bounds: tuple[Bounds, ...] | None = None
    judged: bool = True
    """Requests may only be served by modes that are certified for their family; others refuse them."""
    drifts: bool = True
    warm_up_s: float = WARM_UP_S


class Match(Struct, frozen=True, kw_only=True):
    """What a contestant did on a plan. Rates per second of the judged time; energies are simulated."""

    contestant: str
    seed: int
    shape: str
    rate_per_s: float
    num_judged: int
    num_good: int
    num_answered: int
    num_refused: int
    goodput_per_s: float
    ttft_ms: tuple[float, float]
    """p50 and p99 of judged requests that were answered."""
    tpot_ms: tuple[float, float]
    e2el_ms: tuple[float, float]
    num_tokens: int
    joules_per_token: float
    """Of the whole GPU, idle power and all, from the first arrival to the last answer; over all tokens generated."""
    joules_per_good_token: float
    """The same over the tokens of good requests: who is late has spent them in vain."""
    good_by_family: dict[str, tuple[int, int]]
    """Good and judged ones."""
    late_ttft: int
    """Answered, but the first token came too late."""
    late_tpot: int
    """The first token came in time, the others too slowly."""
    by_mode: dict[str, int]
    """Answered requests per mode."""
    by_reason: dict[str, int]
    finished_per_s: float
    """Answers a second from the first arrival to the last answer: what it can do when it never starves."""
    mix: tuple[dict[str, int], ...] = ()
    """Requests per mode and BUCKET_S of arrival."""
    goods: tuple[int, ...] = ()
    """Good requests per BUCKET_S of arrival."""
    ttft_by_family_ms: dict[str, float] = {}
    """Medians."""
    tpot_by_family_ms: dict[str, float] = {}
    violations: int = 0
    """Answers of a mode that is not certified for their family."""
    broken: tuple[str, ...] = ()
    """Invariants of the daemon that did not hold."""


def config_of(contestant: Contestant, seed: int, rules: Rules) -> Config:
    """The daemon's configuration: the contestant's engines with their hidden truths, and its policy."""
    kv_tokens = CARDS[rules.card].kv_tokens(contestant.modes)
    assert kv_tokens >= LEAST_KV_TOKENS, f"{contestant.modes} do not fit on {rules.card} GB"
    engines = []
    for name in contestant.modes:
        truth = BY_NAME[name].drifted(seed) if rules.drifts else BY_NAME[name]
        engines.append(_engine(truth, contestant.slots, kv_tokens))
    document = {
        "daemon": {"seed": seed},
        "model": [{"name": MODEL}],
        "engine": engines,
        "tenant": [{"name": TENANTS[0]}],
        "limits": {"max_waiting_per_tenant": 100_000, "max_waiting": 100_000, "decisions_kept": 16},
        "policy": {"name": contestant.policy, **contestant.settings},
        "telemetry": {"sim_idle_w": IDLE_W, "sim_memory_bytes": int(CARDS[rules.card].usable_gb * 1e9)},
    }
    return convert(document, Config)


def _engine(truth: ModeTruth, slots: int, kv_tokens: int) -> dict[str, object]:
    return {
        "name": truth.name,
        "model": MODEL,
        "kind": "sim",
        "precision": truth.precision,
        "speculation": truth.speculation,
        "prefix_caching": truth.prefix_caching,
        "quality": truth.quality,
        "max_num_seqs": slots,
        "sim": {
            "step_ms": truth.step_ms,
            "decode_ms_per_request": truth.decode_ms_per_request,
            "prefill_ms_per_token": truth.prefill_ms_per_token,
            "step_mj": truth.step_mj,
            "decode_mj_per_token": truth.decode_mj_per_token,
            "prefill_mj_per_token": truth.prefill_mj_per_token,
            "tokens_per_step": truth.tokens_per_step,
            "weights_bytes": int(truth.weights_gb * 1e9),
            "kv_capacity_tokens": kv_tokens,
            "max_model_len": min(MAX_MODEL_LEN, kv_tokens),
        },
    }


def profile_of(modes: tuple[str, ...]) -> Profile:
    """What `msd profile` would have measured another day: the truths before they drifted. Every contestant has it."""
    measured = []
    for truth in (BY_NAME[name] for name in modes):
        step_ms = truth.step_ms + truth.decode_ms_per_request
        per_step = truth.tokens_per_step
        measured.append(
            ModeProfile(
                mode=truth.name,
                recipe="",
                ttft_ms=(step_ms, truth.prefill_ms_per_token, 0.0),
                tpot_ms=(step_ms / per_step, truth.decode_ms_per_request / per_step, 0.0),
                eos_step_ms=0.0,
                step_mj=truth.step_mj / per_step,
                prefill_mj_per_token=truth.prefill_mj_per_token,
                decode_mj_per_token=truth.decode_mj_per_token,
            )
        )
    return Profile(
        schema=SCHEMA,
        created="",
        command="",
        device="simulated",
        engine_version="simulated",
        source="simulated",
        idle_w=IDLE_W,
        modes=tuple(measured),
    )


def play(contestant: Contestant, plan: Plan, rules: Rules, *, timeline: bool = False) -> Match:
    """One match, in virtual time."""
    # As `msd sim`: what happens inside is in the result.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    weather = Weather(
        rate_per_s=plan.rate_per_s,
        num_tenants=1,
        sessions_per_tenant=1,
        emit_interval_ms=50.0,
        tick_s=0.05,
        step_noise=STEP_NOISE if rules.drifts else 0.0,
        policy=contestant.policy,
    )
    player = partial(Player, plan, rules.bounds, rules.judged)
    config = config_of(contestant, plan.seed, rules)
    world = _World(plan.seed, len(plan.requests), config, weather, player)
    world.run()
    return _judge(contestant, plan, rules, world, timeline)


class _World(World):
    """A world that remembers its player."""

    def __init__(self, seed: int, num_requests: int, config: Config, weather: Weather, player: partial[Player]) -> None:
        self.players: list[Player] = []

        def make(*handed: object) -> Player:
            made = player(*handed)
            self.players.append(made)
            return made

        profile = profile_of(tuple(engine.name for engine in config.engine))
        super().__init__(seed, num_requests, config, weather, partial(Scheduler.from_config, profile=profile), make)


def _judge(contestant: Contestant, plan: Plan, rules: Rules, world: _World, timeline: bool) -> Match:
    report = world.report(1.0)
    outcomes = {outcome.request_id: outcome for outcome in world.outcomes}
    asked = world.players[0].session.asked if world.players else {}
    judged: list[tuple[int, Outcome | None]] = []
    good = late_ttft = late_tpot = violations = num_tokens = good_tokens = 0
    by_family = {family.name: [0, 0] for family in FAMILIES}
    by_mode: Counter[str] = Counter()
    ttfts: list[float] = []
    tpots: list[float] = []
    e2els: list[float] = []
    ttft_of: dict[str, list[float]] = {}
    tpot_of: dict[str, list[float]] = {}
    num_buckets = int(plan.duration_s / BUCKET_S) + 1
    mix: list[Counter[str]] = [Counter() for _ in range(num_buckets)]
    goods = [0] * num_buckets
    for number, planned in enumerate(plan.requests):
        family = FAMILIES[planned.family]
        known = asked.get(f"c{number}")
        outcome = outcomes.get(known.request_id or "") if known is not None else None
        answered = outcome is not None and outcome.finish_reason in ("stop", "length")
        bucket = int(planned.t_s / BUCKET_S)
        if answered and outcome is not None:
            mix[bucket][outcome.mode] += 1
        if planned.t_s < rules.warm_up_s:
            continue
        judged.append((number, outcome))
        by_family[family.name][1] += 1
        if not answered or outcome is None:
            continue
        times = outcome.timings
        num_tokens += outcome.num_completion_tokens
        by_mode[outcome.mode] += 1
        ttfts.append(times.ttft_ms)
        ttft_of.setdefault(family.name, []).append(times.ttft_ms)
        e2els.append(times.e2e_ms)
        if outcome.num_completion_tokens > 1:
            tpots.append(times.tpot_ms)
            tpot_of.setdefault(family.name, []).append(times.tpot_ms)
        if family.quality_floor is not None and BY_NAME[outcome.mode].quality < family.quality_floor:
            violations += 1
        bounds = None if rules.bounds is None else rules.bounds[planned.family]
        if bounds is not None and times.ttft_ms > bounds.ttft_ms:
            late_ttft += 1
        elif bounds is not None and bounds.tpot_ms is not None and times.tpot_ms > bounds.tpot_ms:
            late_tpot += 1
        else:
            good += 1
            good_tokens += outcome.num_completion_tokens
            goods[bucket] += 1
            by_family[family.name][0] += 1
    num_answered = len(ttfts)
    served_s = report.num_completion_tokens / report.tokens_per_s if report.tokens_per_s else 1.0
    # The world idles on until the ledger has settled; that is no part of the contest.
    energy_mj = report.energy_mj["counter"] - IDLE_W * 1e3 * (report.virtual_s - served_s)
    return Match(
        contestant=contestant.name,
        seed=plan.seed,
        shape=plan.shape,
        rate_per_s=plan.rate_per_s,
        num_judged=len(judged),
        num_good=good,
        num_answered=num_answered,
        num_refused=len(judged) - num_answered,
        goodput_per_s=good / (plan.duration_s - rules.warm_up_s),
        ttft_ms=_p50_p99(ttfts),
        tpot_ms=_p50_p99(tpots),
        e2el_ms=_p50_p99(e2els),
        num_tokens=report.num_completion_tokens,
        joules_per_token=energy_mj / 1e3 / max(1, report.num_completion_tokens),
        joules_per_good_token=energy_mj
        / 1e3
        / max(1.0, report.num_completion_tokens * good_tokens / max(1, num_tokens)),
        good_by_family={name: (good, of) for name, (good, of) in by_family.items()},
        late_ttft=late_ttft,
        late_tpot=late_tpot,
        by_mode=dict(by_mode),
        by_reason=report.by_reason,
        finished_per_s=(report.delivered) / served_s,
        mix=tuple(dict(counts) for counts in mix) if timeline else (),
        goods=tuple(goods) if timeline else (),
        ttft_by_family_ms={name: _p50_p99(values)[0] for name, values in ttft_of.items()},
        tpot_by_family_ms={name: _p50_p99(values)[0] for name, values in tpot_of.items()},
        violations=violations if rules.judged else 0,
        broken=tuple(check.name for check in report.checks if check.num_violations),
    )


def _p50_p99(values: Sequence[float]) -> tuple[float, float]:
    ordered = sorted(values)
    if not ordered:
        return 0.0, 0.0
    last = len(ordered) - 1
    return ordered[last // 2], ordered[last * 99 // 100]
