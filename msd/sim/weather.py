"""What a seed makes of the world: load, limits and faults. Drawn per seed, some faults absent.

Uniform fault rates hide states that only appear when one kind of fault is missing (swarm testing, Groce et al. 2012).
"""

from __future__ import annotations

from pathlib import Path
from random import Random

from msgspec import Struct, convert

from msd.config import POLICY_NAMES, Config
from msd.gate import ALL_TASKS, SCHEMA, GateFile, GateRow, Verdict
from msd.recipe import recipe_hashes

MODEL = "sim-model"
TENANTS = ("alpha", "beta", "gamma", "delta")
TASKS = ("sum", "sort")
POLICIES = tuple(name for name in POLICY_NAMES if name != "learned")
"""Those that need no file."""
_FAULT_SHARE = 0.5
_ON_TRIAL = "int8"
"""The mode that a stated gate file certifies."""
_STEP_MS, _DECODE_MS, _PREFILL_MS = 6.0, 0.06, 0.01


class Weather(Struct, frozen=True, kw_only=True):
    """The parameters of one world. Shares are probabilities per request; times in virtual seconds."""

    rate_per_s: float
    burst_factor: float = 1.0
    """Arrivals per second in a burst over those in between."""
    phase_s: float = 10.0
    """Mean length of bursts and of the calm between them."""
    mean_prompt_tokens: int = 200
    mean_output_tokens: int = 64
    exact_output: bool = False
    """Every answer has exactly `mean_output_tokens` tokens: for benchmarks."""
    num_slots: int = 32
    """Of each engine."""
    utilisation: float | None = None
    """Engines are slowed down until the mean load takes this share of what they can do; None: their own speed."""
    num_tenants: int = 4
    sessions_per_tenant: int = 2
    deadline_share: float = 0.0
    cancel_share: float = 0.0
    repeat_share: float = 0.0
    conflict_share: float = 0.0
    odd_share: float = 0.0
    """Requests that cannot be served: unknown model, unreachable quality, too long."""
    slow_share: float = 0.0
    """Sessions that give credit for Deltas slowly."""
    vanish_per_s: float = 0.0
    num_engine_deaths: int = 0
    num_counter_resets: int = 0
    num_counter_stalls: int = 0
    num_view_outages: int = 0
    journal_latency_ms: float = 0.0
    journal_failure_share: float = 0.0
    drain_early: bool = False
    """SIGTERM while requests wait and run, instead of after the last answer."""
    drain_s: float = 2.0
    emit_interval_ms: float = 50.0
    step_noise: float = 0.0
    """Sigma of the log-normal noise on the time of an engine's step."""
    tick_s: float = 0.02
    max_waiting: int = 20_000
    policy: str = "rules"
    memory_for: int = 0
    """Engines may move, and there is memory for so many of them; 0: they stay."""
    prefix_share: float = 0.0
    """Requests whose prompt begins as others do, on engines with prefix caching; 0: the engines have none."""
    shadow_share: float = 0.0
    """Answers that run once more on the reference; with it comes a stated gate file. 0: neither."""
    num_drifts: int = 0
    """Times that a mode on trial begins to answer otherwise, for the rest of its engine's life."""
    num_policy_changes: int = 0


STEADY = Weather(
    rate_per_s=50.0,
    mean_prompt_tokens=64,
    mean_output_tokens=64,
    exact_output=True,
    utilisation=0.2,
    emit_interval_ms=100.0,
    tick_s=0.05,
)
"""No faults, no bursts, 50 requests a second of 64 tokens each, about 3 ms a token, Deltas of 100 ms: what the speed of
the simulation is measured on."""


def draw(rng: Random, num_requests: int) -> Weather:
    """The weather of a seed: `num_requests` over some 120 to 300 virtual seconds, in bursts, with faults."""

    def maybe(most: float) -> float:
        return rng.uniform(0.0, most) if rng.random() < _FAULT_SHARE else 0.0

    def some(most: int) -> int:
        return rng.randint(1, most) if rng.random() < _FAULT_SHARE else 0

    return Weather(
        rate_per_s=num_requests / rng.uniform(120.0, 300.0),
        burst_factor=rng.choice((1.0, 3.0, 10.0)),
        phase_s=rng.uniform(3.0, 20.0),
        mean_prompt_tokens=rng.randint(20, 800),
        mean_output_tokens=rng.randint(8, 200),
        num_slots=rng.choice((2, 8, 32)),
        utilisation=rng.uniform(0.3, 1.2),
        num_tenants=rng.randint(1, len(TENANTS)),
        sessions_per_tenant=rng.randint(1, 4),
        deadline_share=maybe(0.6),
        cancel_share=maybe(0.2),
        repeat_share=maybe(0.1),
        conflict_share=maybe(0.05),
        odd_share=maybe(0.05),
        slow_share=maybe(0.5),
        vanish_per_s=maybe(0.1),
        num_engine_deaths=some(6),
        num_counter_resets=some(2),
        num_counter_stalls=some(3),
        num_view_outages=some(3),
        journal_latency_ms=maybe(20.0),
        journal_failure_share=maybe(0.02),
        drain_early=rng.random() < _FAULT_SHARE / 2,
        drain_s=rng.uniform(0.2, 5.0),
        emit_interval_ms=rng.uniform(20.0, 120.0),
        tick_s=rng.uniform(0.02, 0.05),
        max_waiting=rng.choice((20, 100, 20_000)),
        policy=rng.choice(("cost", "cost", "cost", "least_loaded", "rules", "round_robin", "fixed", "random")),
        memory_for=rng.choice((0, 0, 1, 2)),
        prefix_share=maybe(0.8),
        shadow_share=rng.choice((0.0, 0.0, 0.1, 1.0)),
        num_drifts=some(2),
        num_policy_changes=some(3),
    )


def default_config(weather: Weather, seed: int) -> Config:
    """Three unlike simulated engines on one simulated GPU: plain, quantised, speculating."""
    slots = weather.num_slots
    slowness = 1.0
    if weather.utilisation is not None:
        tokens_per_s = slots / (_STEP_MS + slots * _DECODE_MS) * 1_000
        slowness = weather.utilisation * tokens_per_s / (weather.rate_per_s * weather.mean_output_tokens)
    step_ms, decode_ms, prefill_ms = slowness * _STEP_MS, slowness * _DECODE_MS, slowness * _PREFILL_MS
    plain = {"step_ms": step_ms, "decode_ms_per_request": decode_ms, "prefill_ms_per_token": prefill_ms}
    quantised = {**plain, "step_ms": 0.6 * step_ms, "step_mj": 1_200.0, "decode_mj_per_token": 80.0}
    speculating = {**plain, "decode_ms_per_request": 1.8 * decode_ms, "tokens_per_step": 1.7}
    engines = [
        _engine("full", slots, "bf16", "none", 0.95, plain),
        _engine("int8", slots, "int8", "none", 0.90, quantised),
        _engine("spec", slots, "bf16", "ngram", 0.95, speculating),
    ]
    residency: dict[str, object] = {}
    memory_bytes = 80 * 10**9
    for engine in engines:
        engine["prefix_caching"] = weather.prefix_share > 0
    if weather.memory_for:
        for engine in engines:
            engine["residency"] = "auto"
        residency = {"min_dwell_s": 10.0, "plan_interval_s": 2.0, "drain_s": 3.0, "reserve_bytes": 10**9}
        memory_bytes = weather.memory_for * 2 * 10**9 + 15 * 10**8
    document = {
        "daemon": {"seed": seed},
        "residency": residency,
        "telemetry": {"sim_memory_bytes": memory_bytes},
        "model": [{"name": MODEL}],
        "engine": engines,
        "tenant": [{"name": name, "weight": 1 + i % 3} for i, name in enumerate(TENANTS)],
        "limits": {"max_waiting": weather.max_waiting},
        "policy": {"name": weather.policy, "mode": "int8" if weather.policy == "fixed" else ""},
        "quality": {"shadow_share": weather.shadow_share},
    }
    return convert(document, Config)


def recipes_of(config: Config) -> dict[str, str]:
    """The recipe of each mode; simulated ones have no files."""
    return recipe_hashes(config, Path())


def stated_gate(config: Config) -> GateFile:
    """A gate file that nobody measured: the first mode is the reference, one is certified, but not for sorting."""
    recipes = recipes_of(config)
    reference = config.engine[0].name
    verdicts: dict[str, Verdict] = {ALL_TASKS: "certified", "sum": "certified", "sort": "undecided"}
    return GateFile(
        schema=SCHEMA,
        created="",
        command="",
        versions={},
        host="",
        model=MODEL,
        reference=reference,
        reference_recipe=recipes[reference],
        delta=config.quality.delta,
        alpha=config.quality.alpha,
        rows=tuple(_row(_ON_TRIAL, recipes[_ON_TRIAL], task, verdict) for task, verdict in verdicts.items()),
        stated=True,
    )


def _row(mode: str, recipe: str, task: str, verdict: Verdict) -> GateRow:
    return GateRow(
        mode=mode,
        recipe=recipe,
        task=task,
        verdict=verdict,
        num_pairs=1_000,
        num_differ=0,
        accuracy=0.95,
        accuracy_low=0.93,
        accuracy_high=0.97,
        reference_accuracy=0.95,
        difference=0.0,
        difference_low=-0.01,
        difference_high=0.01,
    )


def _engine(
    name: str, num_slots: int, precision: str, speculation: str, quality: float, sim: dict[str, float]
) -> dict[str, object]:
    return {
        "name": name,
        "model": MODEL,
        "kind": "sim",
        "precision": precision,
        "speculation": speculation,
        "quality": quality,
        "max_num_seqs": num_slots,
        "sim": {"kv_capacity_tokens": 60_000, **sim},
    }
