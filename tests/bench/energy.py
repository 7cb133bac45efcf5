"""The energy ledger: exact closing, how well it charges loads whose energy is known, what it costs, what breaks it.

Everything here is simulated or on a stub of NVML, and labelled so, except the rows of a GPU, which need one.
"""

from __future__ import annotations

import gc
import itertools
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from msd.client import Client
from msd.config import EnergyConfig
from msd.core.energy_domain import Coefficients
from msd.core.ledger import Booked, Ledger
from msd.daemon import GC_THRESHOLDS
from msd.domain import CounterReading, EnergySource, Outcome
from msd.errors import ProbeError
from msd.learning.energy_model import EnergyModel
from msd.telemetry import metrics
from msd.telemetry.nvml import import_pynvml
from msd.telemetry.nvml_device import FIELD_ENERGY, FIELD_POWER_INSTANT, SCOPE_GPU, Device
from msd.wire import DaemonStatus, LedgerReport
from tests.bench.harness import CannotMeasureError, Options, Row, row, say, skipped
from tests.bench.host import Host
from tests.known_load import ALL_ONES, IDLE_W, TRUTH, Accuracy, KnownLoad, charge, make_load
from tests.ledger_storm import Storm
from tests.nvml_stub import NvmlStub

TARGET = "energy"
SEEDS = (1, 2, 3)
COUNTER_STEPS_US = (20_000, 100_000)
RATES_PER_S = {1: 1.5, 2: 1.2}
MODES = {1: ["fp16"], 2: ["fp16", "int4"]}
ENGINES = {1: "one engine", 2: "two unlike engines"}
BAR_WAPE = {1: 5.0, 2: 10.0}
BAR_BIAS = 5.0
BAR_IDLE = 10.0
SETTLED_FROM_S = 120.0
EARLY_S = 60.0
BAR_CLOSING_US = {64: 100.0, 256: 300.0}
BAR_SAMPLER_PERCENT = 0.5
BAR_LAG_MS = 5.0
STALE_S = 1.0
POLLED_S = 3.0
MS = 1_000


def measure(options: Options) -> list[Row]:
    """Rows of the ledger."""
    rows = _closing(options)
    rows += _accuracy(options)
    rows += _costs(options)
    rows += _faults()
    rows += _stubbed(options)
    return rows + _on_a_gpu()


# --- closing ---------------------------------------------------------------------------------------------------------


def _closing(options: Options) -> list[Row]:
    num_intervals = int(options.scaled(1_000_000, 50_000))
    say(f"{TARGET}: {num_intervals:,} intervals")
    storm = Storm(1)
    began = time.monotonic()
    storm.run(num_intervals)
    took_s = time.monotonic() - began
    if not (storm.num_resets and storm.num_restarts and storm.num_glitches):
        raise CannotMeasureError("the storm had no resets, restarts or glitches")
    what = f"{num_intervals:,} intervals ({storm.num_restarts:,} restarts, {storm.num_resets:,} resets)"
    return [
        row(f"residue after {what}, simulated", "mJ", [storm.residue_mj()], target=TARGET, bar=0.0),
        row(f"how long {num_intervals:,} intervals took, churn included", "s", [took_s], target=TARGET),
    ]


# --- accuracy --------------------------------------------------------------------------------------------------------


def _accuracy(options: Options) -> list[Row]:
    """Dynamic energy per request against the truth; the worst of seeds and counter steps."""
    duration_s = options.scaled(240, 180)
    rows: list[Row] = []
    seeds = SEEDS if not options.quick else SEEDS[:1]
    for num_engines in (1, 2):
        say(f"{TARGET}: {ENGINES[num_engines]}, {len(seeds)} seeds")
        loads = [
            make_load(seed, MODES[num_engines], duration_s, step_us, RATES_PER_S[num_engines])
            for seed in seeds
            for step_us in COUNTER_STEPS_US
        ]
        rows += _rows_of(num_engines, loads)
    return rows


def _rows_of(num_engines: int, loads: Sequence[KnownLoad]) -> list[Row]:
    def all_of(judge: Callable[[KnownLoad], Accuracy]) -> list[Accuracy]:
        return [judge(load) for load in loads]

    def online(load: KnownLoad) -> Accuracy:
        return charge(load, priors=ALL_ONES, learns=True, judged_from_s=SETTLED_FROM_S)

    def early(load: KnownLoad) -> Accuracy:
        return charge(load, priors=ALL_ONES, learns=True, judged_until_s=EARLY_S)

    def told(idle_w: float) -> Callable[[KnownLoad], Accuracy]:
        return lambda load: charge(
            load, priors=ALL_ONES, learns=True, judged_from_s=SETTLED_FROM_S, stated_idle_w=idle_w
        )

    def add(name: str, shares: Sequence[float], bar: float | None = None) -> Row:
        percents = [100 * share for share in shares]
        full = f"{ENGINES[num_engines]}, {name}, simulated, worst of {len(loads)} runs"
        return row(full, "%", percents, target=TARGET, bar=bar, of_repeats=max)

    learnt = all_of(online)
    rows = [
        add("learnt online from 1:1, after 120 s: WAPE", [one.wape for one in learnt], BAR_WAPE[num_engines]),
        add("the same: bias of the worse engine", [one.bias for one in learnt], BAR_BIAS),
    ]
    for factor, word in ((1.2, "20 % too high"), (0.8, "20 % too low")):
        off = all_of(told(factor * IDLE_W))
        rows.append(add(f"idle power stated {word}: WAPE", [one.wape for one in off], BAR_IDLE))
    rows += [
        add("the first 60 s: WAPE", [one.wape for one in all_of(early)]),
        add("coefficients known: WAPE", [one.wape for one in all_of(lambda o: charge(o, priors=TRUTH, learns=False))]),
        add(
            "never learnt, 1:1: WAPE", [one.wape for one in all_of(lambda o: charge(o, priors=ALL_ONES, learns=False))]
        ),
    ]
    return rows


# --- cost ------------------------------------------------------------------------------------------------------------


def _costs(options: Options) -> list[Row]:
    num_intervals = int(options.scaled(2_000, 300))
    rows: list[Row] = []
    with _collector_as_in_the_daemon():
        for num_active, bar in BAR_CLOSING_US.items():
            steady = [_close(num_active, 0, num_intervals) for _ in range(options.repeats)]
            name = f"closing an interval, {num_active} active requests"
            rows.append(
                row(f"{name}: p99", "us", [float(np.quantile(s, 0.99)) for s, _ in steady], target=TARGET, bar=bar)
            )
            rows.append(row(f"{name}: median", "us", [statistics.median(s) for s, _ in steady], target=TARGET))
        churned = [_close(128, 50, num_intervals) for _ in range(options.repeats)]
        name = "closing an interval, 128 run and 50 settle"
        rows.append(row(f"{name}: p99", "us", [float(np.quantile(s, 0.99)) for s, _ in churned], target=TARGET))
        whole_us = [statistics.fmean(s) / 50 + each for s, each in churned]
        rows.append(row("all of a request's accounting (1,000 a second, 128 run)", "us", whole_us, target=TARGET))
    rows.append(row("a fit of 8 modes, ten seconds of intervals", "ms", _fits(options), target=TARGET))
    on_loop_ms, off_loop_ms = zip(*(_scrape() for _ in range(options.repeats)), strict=True)
    rows.append(row("a scrape of 8 modes and 200 tenants: on the loop", "ms", on_loop_ms, target=TARGET))
    rows.append(row("the same: text, off the loop", "ms", off_loop_ms, target=TARGET))
    return rows


def _close(num_active: int, num_churned: int, num_intervals: int) -> tuple[list[float], float]:
    """CPU us of each reading that closes an interval, and of a request's own events."""
    ledger = Ledger(EnergyConfig(), TRUTH)
    _read(ledger, 0, 0)
    modes = sorted(TRUTH)
    num_made = 0
    running: dict[str, int] = {}

    def start(t_us: int) -> None:
        nonlocal num_made
        request_id = f"request-{num_made:08}"
        ledger.started(t_us, request_id, modes[num_made % 2], 245)
        running[request_id] = 0
        num_made += 1

    closing_us: list[float] = []
    events_ns = 0
    for _ in range(num_active):
        start(0)
    for number in range(1, num_intervals + 1):
        t_us = number * 50 * MS
        began = time.thread_time_ns()
        for request_id in list(running)[:num_churned]:
            ledger.ended(t_us - 5 * MS, request_id, "requests", "", "t", running.pop(request_id) + 1)
            start(t_us - 5 * MS)
        for request_id, num_tokens in running.items():
            if not num_tokens:
                ledger.first_token(t_us - 2 * MS, request_id, 0)
            running[request_id] = num_tokens + 3
            ledger.progress(t_us, request_id, num_tokens + 3)
        middle = time.thread_time_ns()
        _read(ledger, t_us, number * 17_777)
        closing_us.append((time.thread_time_ns() - middle) / 1e3)
        events_ns += middle - began
    if ledger.accounts()[0].open_mj:
        raise CannotMeasureError("an interval stayed open: the cost is not that of closing")
    per_interval = num_churned or num_active
    return closing_us, events_ns / 1e3 / num_intervals / per_interval


def _read(ledger: Ledger, t_us: int, energy_mj: int, source: EnergySource = "counter") -> None:
    ledger.counter(
        CounterReading(
            domain="gpu:0", t_us=t_us, energy_mj=energy_mj, source=source, idle_w=75.0, power_w=300.0, limit_w=700.0
        )
    )


def _fits(options: Options) -> list[float]:
    load = make_load(1, ["fp16", "int4"], 60, 100_000, 1.0)
    ledger = Ledger(EnergyConfig(idle_w=IDLE_W), TRUTH)
    ledger.resident(load.mode_of.values())
    for t_us, energy_mj in load.readings[300:500]:
        for i in range(8):
            ledger.started(t_us, f"r{t_us}-{i}", f"m{i}", 100 + i)
            ledger.ended(t_us + 40 * MS, f"r{t_us}-{i}", "requests", "", "t", 3 + i)
        _read(ledger, t_us + 45 * MS, energy_mj)
    equations = ledger.take_equations()
    if len(equations) < 100:
        raise CannotMeasureError(f"only {len(equations)} intervals to fit")
    model = EnergyModel()
    taken_ms = []
    for _ in range(options.repeats + 1):
        began = time.thread_time_ns()
        if model.fit(equations) is None:
            raise CannotMeasureError("nothing was fitted")
        taken_ms.append((time.thread_time_ns() - began) / 1e6)
    return taken_ms[1:]


def _scrape() -> tuple[float, float]:
    counted = metrics.Metrics()
    tenants = [f"tenant{i}" for i in range(200)]
    booked: list[Booked] = []
    for mode in range(8):
        for i, tenant in enumerate(tenants):
            booked.append(Booked("requests", "", f"m{mode}", tenant, 10_000 * i, 0, 1_000, 100))
            outcome = Outcome(request_id="r", attempt=1, finish_reason="stop", mode=f"m{mode}", num_completion_tokens=9)
            counted.completed(outcome, tenant)
    ledger = LedgerReport(domain="gpu:0", source="counter", counter_mj=1)
    began = time.thread_time_ns()
    snapshot = counted.snapshot(DaemonStatus(server="msd/0", energy=(ledger,)), {"gpu:0": tuple(booked)})
    middle = time.thread_time_ns()
    counted.render(snapshot)
    return (middle - began) / 1e6, (time.thread_time_ns() - middle) / 1e6


@contextmanager
def _collector_as_in_the_daemon() -> Iterator[None]:
    """What lives for long is out of the collector's sight, and it runs as seldom as there."""
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


# --- faults ----------------------------------------------------------------------------------------------------------


def _faults() -> list[Row]:
    """Reset, stuck, glitch, no counter: each must close, with its energy where it belongs and labelled."""
    passed = [
        _fault([(100 * MS, 12)], 30_000, estimated_mj=30_000),
        _fault([(50 * MS, 1_000_000), (1_100 * MS, 1_000_000), (10_000 * MS, 3_000_000)], 2_000_000, estimated_mj=0),
        _fault([(100 * MS, 10**9)], 140_000, estimated_mj=0, unattributed={"glitch": 10**9 - 1_000_000 - 140_000}),
        _fault([(100 * MS, 1_030_000)], 30_000, estimated_mj=30_000, source="estimated"),
    ]
    return [
        row(
            "counter faults that close and are labelled: reset, stuck, glitch, none (simulated)",
            "of 4",
            [sum(passed)],
            target=TARGET,
            op=">=",
            bar=4.0,
        )
    ]


def _fault(
    readings: list[tuple[int, int]],
    charged_mj: int,
    *,
    estimated_mj: int,
    unattributed: dict[str, int] | None = None,
    source: EnergySource = "counter",
) -> bool:
    """Whether one request over these readings, from 1,000,000 mJ on, is charged so much and the books say so."""
    ledger = Ledger(EnergyConfig(), {"m": Coefficients()})
    _read(ledger, 0, 1_000_000, source)
    ledger.started(0, "r", "m", 10)
    ledger.ended(50 * MS, "r", "requests", "", "t", 5)
    for t_us, energy_mj in readings:
        _read(ledger, t_us, energy_mj, source)
    (accounts,) = ledger.accounts()
    return (
        accounts.residue_mj == 0
        and accounts.requests_mj == charged_mj
        and accounts.estimated_of.get("requests", 0) == estimated_mj
        and accounts.unattributed_mj == (unattributed or {})
    )


# --- the NVML probe on a stub driver ---------------------------------------------------------------------------------


def _stubbed(options: Options) -> list[Row]:
    sampling = "the sampler at 20 Hz on a stub driver, of a core"
    lagging = "a NVML call that hangs (stub driver): the loop's lag p99 meanwhile"
    if shutil.which("cc") is None:
        reason = "no C compiler to build the NVML stub with"
        return [
            skipped(sampling, "%", reason, bar=BAR_SAMPLER_PERCENT),
            skipped(lagging, "ms", reason, bar=BAR_LAG_MS),
        ]
    say(f"{TARGET}: the NVML probe on a stub driver")
    with tempfile.TemporaryDirectory(prefix="msd-bench-") as folder:
        stub = NvmlStub(Path(folder), "-DQUIET")
        cores = [_sampler_share(stub, options.scaled(10, 3)) for _ in range(min(3, options.repeats))]
    rows = [row(sampling, "%", [100 * share for share in cores], target=TARGET, bar=BAR_SAMPLER_PERCENT)]
    hang_s = options.scaled(30, 5)
    with tempfile.TemporaryDirectory(prefix="msd-bench-") as folder:
        before_ms, lags_ms, age_s, answered = _hang(Path(folder), hang_s)
    during = f"{hang_s:g} s of a hanging NVML call (stub driver)"
    calm, lag = float(np.quantile(before_ms, 0.99)), float(np.quantile(lags_ms, 0.99))
    return [
        *rows,
        row(f"{during}: the loop's lag p99", "ms", [lag], target=TARGET, bar=BAR_LAG_MS),
        row("the same load before the hang: the loop's lag p99", "ms", [calm], target=TARGET),
        row(f"{during}: age of the view at its end", "s", [age_s], target=TARGET, op=">=", bar=hang_s - STALE_S),
        row(f"{during}: share of requests answered", "%", [100 * answered], target=TARGET, op=">=", bar=100.0),
    ]


def _sampler_share(stub: NvmlStub, seconds: float) -> float:
    """CPU of a process that only samples, by its length: an upper bound, the stub's own work is in it."""
    told = stub.run(f"""
probe = NvmlProbe("0", 20.0, Clock())
probe.start()
before = time.process_time(); began = time.monotonic()
time.sleep({seconds})
tell(share=(time.process_time() - before) / (time.monotonic() - began), readings=len(probe.readings()))
probe.stop()
""")
    if told["readings"] < 15 * seconds:
        raise CannotMeasureError(f"only {told['readings']} readings in {seconds:g} s: it did not sample at 20 Hz")
    return float(told["share"])


HANGING = """
[[model]]
name = "toy"
[[engine]]
name = "noop"
model = "toy"
kind = "noop"
[policy]
name = "cost"
[telemetry]
probe = "nvml"
"""


def _hang(folder: Path, hang_s: float) -> tuple[list[float], list[float], float, float]:
    """A daemon whose driver stops answering: lags of its loop in ms before and during, age of the view, share answered.

    Requests come one after another all the time, as long before the hang as in it.
    """
    stub = NvmlStub(folder)
    before = {name: os.environ.get(name) for name in ("LD_LIBRARY_PATH", "NVML_STUB_DIR")}
    os.environ.update({name: stub.env()[name] for name in before})
    moments_us: list[int] = []
    num_asked = num_answered = 0
    try:
        with Host(folder, HANGING, samples_lag=True) as host, Client(host.endpoint, timeout_s=10.0) as client:
            host.wait_up(1)
            for hangs in (False, True):
                if hangs:
                    stub.set("hang")
                moments_us.append(time.monotonic_ns() // 1_000)
                while time.monotonic_ns() // 1_000 - moments_us[-1] < hang_s * 1e6:
                    num_asked += 1
                    num_answered += client.submit("sort 31=", max_tokens=4).result(5.0).finish_reason is not None
                    time.sleep(0.02)
            gpu = client.status()["gpu"]
            moments_us.append(time.monotonic_ns() // 1_000)
            watched = host.stop()
    finally:
        (folder / "hang").unlink(missing_ok=True)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    if not isinstance(gpu, dict):
        raise CannotMeasureError("the daemon shows no GPU view: the stub was not found")
    calm_ms, lags_ms = (
        [lag_us / 1e3 for slot_us, lag_us in watched.lags if begin_us <= slot_us < end_us]
        for begin_us, end_us in itertools.pairwise(moments_us)
    )
    return calm_ms, lags_ms, float(gpu["age_s"]), num_answered / num_asked


# --- on a GPU --------------------------------------------------------------------------------------------------------


def _on_a_gpu() -> list[Row]:
    """The counter's own period and the cost of a sample, where there is an NVML to ask."""
    period, cost = "the GPU counter's own period", "one sample of counter and power"
    try:
        device = Device(import_pynvml(), "0")
    except ProbeError as error:
        return [skipped(period, "ms", str(error)), skipped(cost, "us", str(error))]
    changes_ms: list[float] = []
    costs_us: list[float] = []
    last: int | None = None
    ends = time.monotonic() + POLLED_S
    while time.monotonic() < ends:
        began = time.perf_counter_ns()
        energy_mj, _ = device.fields((FIELD_ENERGY, SCOPE_GPU), (FIELD_POWER_INSTANT, SCOPE_GPU))
        costs_us.append((time.perf_counter_ns() - began) / 1e3)
        if energy_mj != last:
            changes_ms.append(began / 1e6)
            last = energy_mj
        time.sleep(0.001)
    device.close()
    gaps_ms = [after - before for before, after in itertools.pairwise(changes_ms[1:])]
    if not gaps_ms:
        return [skipped(period, "ms", "the counter did not move"), row(cost, "us", costs_us, target=TARGET)]
    return [row(period, "ms", gaps_ms, target=TARGET), row(cost, "us", costs_us, target=TARGET)]
