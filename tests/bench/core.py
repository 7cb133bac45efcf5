"""The scheduler core: what one whole request costs in `handle`, from Submitted to its energy being Settled.

A world in miniature makes a stream of events once; fresh schedulers then replay it, so that only `handle` is on the
clock. Eight modes, decision records and the energy ledger are on: the counter is read 20 times a second, every engine
steps 20 times a second, a new GPU view comes 20 times and a Tick 50 times a second, at 1,000 requests a second.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections import deque
from random import Random

import msgspec

from msd.config import Config
from msd.core import commands as c
from msd.core import events as e
from msd.core.scheduler import Scheduler
from msd.domain import CounterReading, EngineInfo, EngineLoad, GpuView, Request
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


class Script:
    """A recorded run: events that fill the queue, events to be timed, and how many requests ended in the latter."""

    def __init__(self, num_waiting: int, num_requests: int, *, mixed: bool) -> None:
        """`mixed`: one request in ten is cancelled while it waits, and one in ten has a deadline that it will miss."""
        self.config = _config(num_waiting)
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
        self._cancellable: deque[str] = deque()
        self._energy_mj = 0
        self._next_reading_us = self._next_tick_us = 0
        for engine in self.config.engine:
            self._post(e.EngineUp(self._t_us, _info(engine.name)))
        while self._scheduler.queue.num_waiting < num_waiting:
            self._submit()
            self._t_us += 10
        self._events = self.timed
        before = self._num_completed
        while self._num_completed - before < num_requests:
            self._step(num_waiting)
        self.num_requests = self._num_completed - before

    def _step(self, num_waiting: int) -> None:
        """One running request ends, and enough come to keep the queue as long as it was."""
        self._t_us += US_PER_REQUEST
        request_id, attempt, _ = self._running.popleft()
        self._post(e.Finished(self._t_us, request_id, attempt, "stop", COMPLETION_TOKENS))
        if self._mixed and self._num_submitted % 10 == 0 and self._cancellable:
            self._post(e.Cancelled(self._t_us, self._cancellable.popleft()))
        if self._t_us >= self._next_reading_us:
            self._next_reading_us = self._t_us + READING_EVERY_US
            self._read_meters()
        if self._t_us >= self._next_tick_us:
            self._next_tick_us = self._t_us + TICK_EVERY_US
            self._post(e.Tick(self._t_us))
        while self._scheduler.queue.num_waiting < num_waiting:
            self._submit()

    def _submit(self) -> None:
        number = self._num_submitted
        self._num_submitted += 1
        # A queue of n requests at 1,000/s lasts n ms: half of that is a deadline that most of the doomed will miss.
        doomed = self._mixed and number % 10 == 5
        deadline_us = self._t_us + self.config.limits.max_waiting * US_PER_REQUEST // 4 if doomed else None
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
                    self._post(e.FirstToken(self._t_us, request_id, attempt, 0))
                case c.Complete(outcome):
                    self._num_completed += 1
                    self._post(e.Completed(self._t_us, outcome.request_id, self._num_completed))
                case c.Reject():
                    raise CannotMeasureError(f"the core refused a request of the script: {command.message}")
                case _:
                    pass

    def replay(self) -> float:
        """Seconds of CPU that a fresh scheduler takes for the timed events."""
        handle = self._filled().handle
        events = self.timed
        began = time.process_time()
        for event in events:
            handle(event)
        return time.process_time() - began

    def replay_by_kind(self) -> dict[str, list[float]]:
        """Seconds of each timed event, by its kind."""
        handle = self._filled().handle
        clock = time.perf_counter
        taken: dict[str, list[float]] = {}
        for event in self.timed:
            began = clock()
            handle(event)
            seconds = clock() - began
            taken.setdefault(type(event).__name__, []).append(seconds)
        return taken

    def _filled(self) -> Scheduler:
        scheduler = Scheduler.from_config(self.config, Random(1))
        for event in self.filling:
            scheduler.handle(event)
        return scheduler


def measure(options: Options) -> list[Row]:
    """Rows of the core."""
    num_requests = int(options.scaled(20_000, 3_000))
    say("core: making the scripts")
    short = Script(1_000, num_requests, mixed=False)
    long = Script(int(options.scaled(100_000, 20_000)), num_requests, mixed=True)
    base_us: list[float] = []
    growth: list[float] = []
    worst: list[tuple[float, str]] = []
    kinds: dict[str, list[float]] = {}
    # As in the daemon: what lives for long is out of the collector's sight.
    gc.collect()
    gc.freeze()
    for _ in range(options.repeats):
        base = short.replay() / short.num_requests * 1e6
        base_us.append(base)
        growth.append(long.replay() / long.num_requests * 1e6 / base)
        medians = {kind: statistics.median(seconds) * 1e6 for kind, seconds in short.replay_by_kind().items()}
        worst.append(max((median_us, kind) for kind, median_us in medians.items()))
        for kind, median_us in medians.items():
            kinds.setdefault(kind, []).append(median_us)
    gc.unfreeze()
    slowest = statistics.mode(kind for _, kind in worst)
    return [
        row("a whole request, 8 modes, 1,000 waiting", "us", base_us, target=TARGET, bar=BAR_US),
        row(
            f"the worst kind of event, its median ({slowest})",
            "us",
            [us for us, _ in worst],
            target=TARGET,
            bar=BAR_EVENT_US,
        ),
        row(
            f"a request at {int(options.scaled(100_000, 20_000)):,} waiting, with cancels and expiries, against 1,000",
            "x",
            growth,
            target=TARGET,
            bar=BAR_GROWTH,
        ),
        *(row(f"event {kind}, median", "us", us, target=TARGET) for kind, us in sorted(kinds.items())),
    ]


def _config(num_waiting: int) -> Config:
    engines = [
        {
            "name": f"m{index}",
            "model": "toy",
            "kind": "sim",
            "max_num_seqs": SLOTS,
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


def _info(name: str) -> EngineInfo:
    return EngineInfo(
        engine=name,
        max_model_len=8_192,
        max_num_seqs=SLOTS,
        kv_capacity_tokens=1_000_000,
        idle_ttft_ms=10.0,
        idle_tpot_ms=1.0,
    )
