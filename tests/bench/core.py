"""The scheduler core: what one whole request costs in `handle`, from Submitted to its energy being Settled.

A world in miniature makes a stream of events once; fresh schedulers then replay it, so that only `handle` is on the
clock. Eight modes, decision records and the energy ledger are on: the counter is read 20 times a second, every engine
steps 20 times a second, a new GPU view comes 20 times and a Tick 50 times a second, at 1,000 requests a second.

A request's cost holds its share of all of them. The kinds of events are timed one by one, in CPU time of the thread;
`CounterRead` has rows of its own, since it closes an interval for everything that ran in it, some 50 requests at once.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random

import msgspec
import numpy as np

from msd.config import Config
from msd.core import commands as c
from msd.core import events as e
from msd.core.scheduler import Scheduler
from msd.daemon import GC_THRESHOLDS
from msd.domain import CounterReading, EngineInfo, EngineLoad, GpuView, Request, Slo
from tests.bench.harness import CannotMeasureError, Options, Row, row, say

TARGET = "core"
NUM_MODES = 8
SLOTS = 16
REQUESTS_PER_S = 1_000
COMPLETION_TOKENS = 32
CLASSES = ("interactive", "standard", "batch")
US_PER_REQUEST = 1_000_000 // REQUESTS_PER_S
READING_EVERY_US = 50_000
TICK_EVERY_US = 20_000
BAR_US, BAR_EVENT_US, BAR_GROWTH = 45.0, 25.0, 1.5
BAR_CLOSING_P99_US = {64: 100.0, 256: 300.0}
"""Closing an interval of the energy ledger, by the number of active requests."""
COUNTER_READ = e.CounterRead.__name__
CANCELS_PER_STEP = 1 / 8
"""Of ten requests one is cancelled and one expires, so that eight are answered."""
LEAST_SHARE = 0.05
"""A script in which fewer of the requests are cancelled, or expire, does not have them in the mix."""


class Script:
    """A recorded run: events that fill the queue, events to be timed, and how many requests ended in the latter."""

    def __init__(self, num_waiting: int, num_requests: int, *, mixed: bool = False, slots: int = SLOTS) -> None:
        """`mixed`: of the timed requests one in ten is cancelled while it waits and one in ten outlives its deadline.

        Raises CannotMeasureError when the script does not hold what it is for.
        """
        self.config = _config(num_waiting, slots)
        self.filling: list[e.Event] = []
        self.timed: list[e.Event] = []
        self._events = self.filling
        self._scheduler = Scheduler.from_config(self.config, Random(1))
        self._rng = Random(2)
        self._mixed = mixed
        self._t_us = 1_000_000
        self._num_submitted = 0
        self._num_completed = 0
        self._running: deque[tuple[str, int, str]] = deque()
        self._cancellable: list[str] = []
        self._dispatched: set[str] = set()
        self._queue_us = num_waiting * US_PER_REQUEST
        self._ends: Counter[str] = Counter()
        self._num_active: list[int] = []
        self._num_settled: list[int] = []
        self._energy_mj = 0
        self._next_reading_us = self._next_tick_us = 0
        for engine in self.config.engine:
            self._post(e.EngineUp(self._t_us, _info(engine.name, slots)))
        while self._scheduler.queue.num_waiting < num_waiting:
            self._submit()
            self._t_us += 10
        self._events = self.timed
        before = self._num_completed
        self._ends.clear()
        while self._num_completed - before < num_requests:
            self._step(num_waiting)
        self.num_requests = self._num_completed - before
        self.num_answered = self._ends["answered"]
        self.share_cancelled = self._ends["cancelled while waiting"] / self.num_requests
        self.share_expired = self._ends["expired"] / self.num_requests
        if mixed and min(self.share_cancelled, self.share_expired) < LEAST_SHARE:
            raise CannotMeasureError(f"too few cancels or expiries in the script: {dict(self._ends)}")

    @property
    def num_active(self) -> int:
        """How many requests run when a counter is read (median)."""
        return int(statistics.median(self._num_active))

    @property
    def num_settled(self) -> int:
        """How many requests a reading settles (median)."""
        return int(statistics.median(self._num_settled))

    def _step(self, num_waiting: int) -> None:
        """One running request ends, and enough come to keep the queue as long as it was."""
        self._t_us += US_PER_REQUEST
        request_id, attempt, _ = self._running.popleft()
        self._post(e.Finished(self._t_us, request_id, attempt, "stop", COMPLETION_TOKENS))
        if self._mixed and self._rng.random() < CANCELS_PER_STEP and (cancelled := self._draw_waiting()):
            self._post(e.Cancelled(self._t_us, cancelled))
        if self._t_us >= self._next_reading_us:
            self._next_reading_us = self._t_us + READING_EVERY_US
            self._read_meters()
        if self._t_us >= self._next_tick_us:
            self._next_tick_us = self._t_us + TICK_EVERY_US
            self._post(e.Tick(self._t_us))
        while self._scheduler.queue.num_waiting < num_waiting:
            self._submit()

    def _draw_waiting(self) -> str | None:
        """Draw one of those that will be cancelled, from anywhere in the queue."""
        cancellable = self._cancellable
        while cancellable:
            index = self._rng.randrange(len(cancellable))
            cancellable[index], cancellable[-1] = cancellable[-1], cancellable[index]
            request_id = cancellable.pop()
            if request_id not in self._dispatched:
                return request_id
        return None

    def _submit(self) -> None:
        number = self._num_submitted
        self._num_submitted += 1
        # Deadlines spread evenly over most of the time that the queue needs: all through the timed span some pass.
        doomed = self._mixed and number % 10 == 5
        deadline_us = self._t_us + self._rng.randint(self._queue_us // 50, self._queue_us * 4 // 5) if doomed else None
        slo = Slo() if deadline_us is None else Slo(deadline_ms=(deadline_us - self._t_us) / 1e3)
        request = Request(
            request_id=f"r{number}",
            client_request_id=f"c{number}",
            tenant=f"tenant{number % 4}",
            content_hash=b"0123456789abcdef",
            received_us=self._t_us,
            num_prompt_tokens=self._rng.randint(16, 512),
            max_tokens=64,
            service_class=CLASSES[number % 3],  # type: ignore[arg-type]
            deadline_us=deadline_us,
            slo=slo,
            task="sort" if number % 2 else None,
        )
        self._post(e.Submitted(self._t_us, request))
        if self._mixed and number % 10 == 7:
            self._cancellable.append(request.request_id)

    def _read_meters(self) -> None:
        running = self._running
        for engine in self.config.engine:
            progress = tuple(
                (request_id, COMPLETION_TOKENS // 2) for request_id, _, name in running if name == engine.name
            )
            load = EngineLoad(num_running=len(progress), kv_usage=0.3)
            self._post(e.EngineStepped(self._t_us, engine.name, load, progress))
        self._energy_mj += 20_000
        self._num_active.append(len(running))
        self._num_settled.append(0)
        reading = CounterReading(domain="gpu0", t_us=self._t_us, energy_mj=self._energy_mj)
        self._post(e.CounterRead(self._t_us, reading))
        self._post(e.ViewTaken(self._t_us, GpuView(source="nvml", t_us=self._t_us, memory_used_bytes=10**10)))

    def _post(self, event: e.Event) -> None:
        """Take the event down, and answer what the scheduler asks for."""
        self._events.append(event)
        for command in self._scheduler.handle(event):
            match command:
                case c.Append(request_id):
                    self._post(e.Appended(self._t_us, request_id, self._num_submitted))
                case c.Dispatch(request_id, attempt, decision):
                    self._running.append((request_id, attempt, decision.engine))
                    self._dispatched.add(request_id)
                    self._post(e.FirstToken(self._t_us, request_id, attempt, 0))
                case c.Complete(outcome):
                    self._num_completed += 1
                    if outcome.error_code == "deadline_exceeded":
                        self._ends["expired"] += 1
                    elif outcome.finish_reason == "abort":
                        self._ends["cancelled while waiting"] += 1
                    else:
                        self._ends["answered"] += 1
                    self._post(e.Completed(self._t_us, outcome.request_id, self._num_completed))
                case c.Settle():
                    self._num_settled[-1] += 1
                case c.Abort(request_id):
                    raise CannotMeasureError(f"{request_id} was to be cancelled while it waits, but runs already")
                case c.Reject():
                    raise CannotMeasureError(f"the core refused a request of the script: {command.message}")
                case _:
                    pass

    def replay(self) -> float:
        """Seconds of CPU that a fresh scheduler takes for the timed events. Raises CannotMeasureError."""
        scheduler = self._filled()
        handle = scheduler.handle
        events = self.timed
        before = scheduler.errors["deadline_exceeded"]
        began = time.process_time()
        for event in events:
            handle(event)
        spent_s = time.process_time() - began
        if (num_expired := scheduler.errors["deadline_exceeded"] - before) != self._ends["expired"]:
            raise CannotMeasureError(
                f"{num_expired} requests expired in a replay, {self._ends['expired']} in its script"
            )
        return spent_s

    def replay_by_kind(self) -> dict[str, list[float]]:
        """Seconds of CPU of each timed event, by its kind."""
        handle = self._filled().handle
        clock = time.thread_time_ns
        taken: dict[str, list[float]] = {}
        for event in self.timed:
            began = clock()
            handle(event)
            spent_ns = clock() - began
            taken.setdefault(type(event).__name__, []).append(spent_ns / 1e9)
        return taken

    def _filled(self) -> Scheduler:
        scheduler = Scheduler.from_config(self.config, Random(1))
        for event in self.filling:
            scheduler.handle(event)
        return scheduler


def measure(options: Options) -> list[Row]:
    """Rows of the core."""
    num_requests = int(options.scaled(20_000, 3_000))
    num_long = int(options.scaled(100_000, 20_000))
    say("core: making the scripts")
    short = Script(1_000, num_requests)
    long = Script(num_long, num_requests, mixed=True)
    closing = {slots * NUM_MODES: Script(1_000, num_requests, slots=slots) for slots in (8, 32)}
    base_us: list[float] = []
    long_us: list[float] = []
    long_answered_us: list[float] = []
    kinds: dict[str, list[float]] = {}
    long_kinds: dict[str, list[float]] = {}
    closing_us: dict[int, list[float]] = {num_active: [] for num_active in closing}
    with _collector_as_in_the_daemon():
        for _ in range(options.repeats):
            base_us.append(short.replay() / short.num_requests * 1e6)
            spent_s = long.replay()
            long_us.append(spent_s / long.num_requests * 1e6)
            long_answered_us.append(spent_s / long.num_answered * 1e6)
            for script, figures in ((short, kinds), (long, long_kinds)):
                for kind, seconds in script.replay_by_kind().items():
                    figures.setdefault(kind, []).append(statistics.median(seconds) * 1e6)
            for num_active, script in closing.items():
                seconds = script.replay_by_kind()[COUNTER_READ]
                closing_us[num_active].append(float(np.quantile(seconds, 0.99)) * 1e6)
    requests_kinds = {kind: us for kind, us in kinds.items() if kind != COUNTER_READ}
    mix = f"{long.share_cancelled:.0%} cancelled while they wait, {long.share_expired:.0%} expired"
    at_long = f"at {num_long:,} waiting"
    return [
        row("a whole request, 8 modes, 1,000 waiting", "us", base_us, target=TARGET, bar=BAR_US),
        _worst_row("the worst kind of event of a request, CounterRead apart (its rows are below)", requests_kinds),
        _worst_row("the worst kind of event, CounterRead included", kinds),
        *(
            row(
                f"CounterRead closing an interval, p99: {script.num_active} run, {script.num_settled} settle",
                "us",
                closing_us[num_active],
                target=TARGET,
                bar=BAR_CLOSING_P99_US[num_active],
            )
            for num_active, script in closing.items()
        ),
        row(
            f"a request {at_long} ({mix}), against 1,000",
            "x",
            _ratios(long_us, base_us),
            target=TARGET,
            bar=BAR_GROWTH,
        ),
        row(f"a request {at_long}", "us", long_us, target=TARGET),
        row(
            f"an answered request {at_long}, all cancels and expiries charged to it, against 1,000",
            "x",
            _ratios(long_answered_us, base_us),
            target=TARGET,
        ),
        *(row(_kind_name(kind, short), "us", us, target=TARGET) for kind, us in sorted(kinds.items())),
        *(
            row(f"{_kind_name(kind, long)}, {at_long}", "us", us, target=TARGET)
            for kind, us in sorted(long_kinds.items())
        ),
    ]


def _worst_row(name: str, kinds: dict[str, list[float]]) -> Row:
    """The kind whose median is the largest, in most repeats; each repeat's figure is that of its own worst."""
    worst = [
        max((us, kind) for kind, us in zip(kinds, each, strict=True)) for each in zip(*kinds.values(), strict=True)
    ]
    slowest = statistics.mode(kind for _, kind in worst)
    return row(f"{name}: {slowest}, median", "us", [us for us, _ in worst], target=TARGET, bar=BAR_EVENT_US)


def _kind_name(kind: str, script: Script) -> str:
    if kind != COUNTER_READ:
        return f"event {kind}, median"
    return f"event {kind}, median: {script.num_active} run, {script.num_settled} settle"


def _ratios(figures: list[float], base: list[float]) -> list[float]:
    return [figure / against for figure, against in zip(figures, base, strict=True)]


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


def _config(num_waiting: int, slots: int) -> Config:
    engines = [
        {
            "name": f"m{index}",
            "model": "toy",
            "kind": "sim",
            "max_num_seqs": slots,
            "precision": ("bf16", "fp8", "int8", "int4")[index % 4],
            "speculation": "ngram" if index >= 4 else "none",
            "prefix_caching": index % 2 == 0,
        }
        for index in range(NUM_MODES)
    ]
    limits = {
        "max_waiting": num_waiting * 2,
        "max_waiting_per_tenant": num_waiting * 2,
        "max_waiting_tokens": num_waiting * 10_000,
    }
    document = {"model": [{"name": "toy"}], "engine": engines, "policy": {"name": "rules"}, "limits": limits}
    return msgspec.convert(document, Config)


def _info(name: str, slots: int) -> EngineInfo:
    return EngineInfo(
        engine=name,
        max_model_len=8_192,
        max_num_seqs=slots,
        kv_capacity_tokens=1_000_000,
        idle_ttft_ms=10.0,
        idle_tpot_ms=1.0,
    )
