"""Carries out a plan against a target: sender, timeouts, progress, and an end that always leaves a report."""

from __future__ import annotations

import asyncio
import gc
import resource
import signal
import time
from collections.abc import Sequence

import numpy as np
from msgspec import Struct

from loadgen import prompts, report
from loadgen.plan import Plan
from loadgen.progress import Progress
from loadgen.record import Record
from loadgen.send import send_on_schedule
from loadgen.targets import ServerFacts, Target, TargetDeadError

TICK_S = 0.05
LEAD_US = 50_000
"""Between the last preparation and the first possible send."""

DEAD = "a dead target"


class Run(Struct, frozen=True, kw_only=True):
    """How a run went. `death` says why the target is taken for dead."""

    report: report.Report
    stop_signal: signal.Signals | None
    death: str | None


class _Stop:
    """The first reason to break off wins."""

    def __init__(self) -> None:
        self.event = asyncio.Event()
        self.signal: signal.Signals | None = None
        self.death: str | None = None

    def by_signal(self, number: signal.Signals) -> None:
        self.signal = self.signal or number
        self.event.set()

    def by_death(self, reason: str) -> None:
        self.death = self.death or reason
        self.event.set()

    @property
    def word(self) -> str | None:
        if self.signal is not None:
            return self.signal.name
        return None if self.death is None else DEAD


def prepare(plan: Plan, target: Target) -> tuple[Record, list[bytes]]:
    """Build the record and every payload, so that nothing is encoded on the send path."""
    spec = plan.header.spec
    numbers = {traffic.name: index for index, traffic in enumerate(spec.classes)}
    payloads: list[bytes] = []
    answers: list[str | None] = []
    for index, row in enumerate(plan.requests):
        content = prompts.build(row, spec.content)
        payloads.append(target.encode(index, row, spec.classes[numbers[row.traffic_class]], content))
        answers.append(content.answer)
    classes = np.fromiter((numbers[row.traffic_class] for row in plan.requests), dtype=np.int16, count=len(payloads))
    keeps_gaps = [traffic.slo.itl_p99_ms is not None for traffic in spec.classes]
    return Record(plan.times_us(), classes, len(spec.classes), answers, keeps_gaps), payloads


async def execute(plan: Plan, target: Target, progress: Progress) -> Run:
    """Run the plan to its end, a signal or the target's death, and report in each case."""
    stop = _Stop()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.by_signal, number)
    server: ServerFacts | None = None
    meter = _Meter()
    progress.say(f"building {len(plan.requests)} requests")
    record, payloads = prepare(plan, target)
    tenants = frozenset(row.tenant for row in plan.requests)
    try:
        server = await _open(target, tenants, stop, progress)
        if server is not None:
            await _carry_out(plan, record, payloads, target, progress, stop, meter)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
        await target.close()
    facts = meter.facts(stop.word)
    return Run(report=report.build(plan, record, facts, target.url, server), stop_signal=stop.signal, death=stop.death)


async def _open(target: Target, tenants: frozenset[str | None], stop: _Stop, progress: Progress) -> ServerFacts | None:
    progress.say(f"connecting to {target.url}")
    opening = asyncio.ensure_future(target.open(tenants))
    stopping = asyncio.ensure_future(stop.event.wait())
    try:
        await asyncio.wait((opening, stopping), return_when=asyncio.FIRST_COMPLETED)
        if opening.done():
            return opening.result()
    except TargetDeadError as error:
        stop.by_death(str(error))
    finally:
        opening.cancel()
        stopping.cancel()
        await asyncio.gather(opening, stopping, return_exceptions=True)
    return None


async def _carry_out(
    plan: Plan,
    record: Record,
    payloads: Sequence[bytes],
    target: Target,
    progress: Progress,
    stop: _Stop,
    meter: _Meter,
) -> None:
    spec = plan.header.spec
    max_in_flight = spec.run.max_in_flight
    tenant_of = [row.tenant for row in plan.requests]

    def send(index: int) -> None:
        if record.num_in_flight >= max_in_flight:
            record.shed(index)
            return
        # The time is taken before the send and the row opened before any answer can be read.
        now = meter.now_us()
        if target.send(index, tenant_of[index], payloads[index]):
            record.sent(index, now)
        else:
            record.shed(index)

    async def watch(sender: asyncio.Task[None]) -> None:
        timeout_us = int(spec.run.timeout_s * 1e6)
        while not (sender.done() and record.num_in_flight == 0):
            await asyncio.sleep(TICK_S)
            now = meter.now_us()
            for index in record.time_out(now, timeout_us):
                target.cancel(index, tenant_of[index])
            if (reason := target.death()) is not None:
                stop.by_death(reason)
            progress.update(record, now)
        stop.event.set()

    meter.start()
    target.start(record, meter.now_us)
    try:
        async with asyncio.TaskGroup() as tasks:
            sender = tasks.create_task(send_on_schedule(record.intended_us.tolist(), send, meter.now_us))
            watcher = tasks.create_task(watch(sender))
            await stop.event.wait()
            meter.stop(broken_off=stop.word is not None)
            sender.cancel()
            watcher.cancel()
    finally:
        meter.stop(broken_off=stop.word is not None)
        progress.end()
    if stop.signal is not None:
        for index in record.in_flight():
            target.cancel(index, tenant_of[index])


class _Meter:
    """The run's clock and what the process spends while it runs; the collector rests meanwhile."""

    def __init__(self) -> None:
        self._t0_us = 0
        self._started_at = report.now_iso()
        self._begin = self._end = _Spent()
        self._running = False
        self._stopped_us: int | None = None

    def now_us(self) -> int:
        """Microseconds since the plan's time 0."""
        return time.monotonic_ns() // 1_000 - self._t0_us

    def start(self) -> None:
        # What the plan allocated is here to stay: keep the collector from walking it during the run.
        gc.collect()
        gc.freeze()
        gc.disable()
        self._started_at = report.now_iso()
        self._begin = _Spent.now()
        self._running = True
        self._t0_us = time.monotonic_ns() // 1_000 + LEAD_US

    def stop(self, broken_off: bool) -> None:
        if not self._running:
            return
        self._running = False
        self._end = _Spent.now()
        if broken_off:
            self._stopped_us = self.now_us()
        gc.enable()
        gc.unfreeze()

    def facts(self, stopped_by: str | None) -> report.RunFacts:
        begin, end = self._begin, self._end
        # A run that never started was broken off at time 0.
        stopped_us = 0 if stopped_by is not None and self._stopped_us is None else self._stopped_us
        return report.RunFacts(
            started_at=self._started_at,
            wall_s=end.wall_s - begin.wall_s,
            cpu_s=end.cpu_s - begin.cpu_s,
            voluntary_switches=end.voluntary_switches - begin.voluntary_switches,
            involuntary_switches=end.involuntary_switches - begin.involuntary_switches,
            num_gc_runs=end.num_gc_runs - begin.num_gc_runs,
            stopped_us=stopped_us,
            stopped_by=stopped_by,
        )


class _Spent(Struct, frozen=True, kw_only=True):
    wall_s: float = 0.0
    cpu_s: float = 0.0
    voluntary_switches: int = 0
    involuntary_switches: int = 0
    num_gc_runs: int = 0

    @classmethod
    def now(cls) -> _Spent:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return cls(
            wall_s=time.monotonic(),
            cpu_s=time.process_time(),
            voluntary_switches=usage.ru_nvcsw,
            involuntary_switches=usage.ru_nivcsw,
            num_gc_runs=sum(generation["collections"] for generation in gc.get_stats()),
        )
