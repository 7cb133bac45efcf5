"""The composition root: makes every part, binds the socket, tells systemd, drains, leaves no child behind.

Order of a start: vLLM is imported (it would hold the loop later), the journal recovers, the socket is bound, READY=1
goes out, and only then do engines start, one after another; requests that come before one is warm wait.
"""

from __future__ import annotations

import asyncio
import gc
import os
import secrets
import signal
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from random import Random
from typing import TypeVar

import structlog
import uvloop
from msgspec import to_builtins

from msd import decisions, gate, logs, router_file, status
from msd.clock import MonotonicClock
from msd.config import Config
from msd.core import events as e
from msd.core.certificates import Certificates
from msd.core.scheduler import Scheduler
from msd.dispatch import Dispatcher
from msd.egress import Egress
from msd.engine import factory
from msd.engine.host import identity, look
from msd.engine.memory import estimates
from msd.engine.pool import Pool
from msd.errors import EXIT_OK, ConfigError, MsdError
from msd.ingress.accept import Acceptor
from msd.ingress.http import HttpIngress
from msd.ingress.zmq import ZmqIngress
from msd.journal.decision_log import DecisionLog
from msd.journal.memory import MemoryJournal
from msd.learning.energy_model import Fitting
from msd.notify import Notifier
from msd.ports import Clock, GpuProbe
from msd.profile import Profile, load_for
from msd.recipe import recipe_hashes
from msd.telemetry import metrics
from msd.telemetry.nvml import installed_gpus
from msd.telemetry.probes import start_probes
from msd.wire import DaemonStatus

T = TypeVar("T")

TICK_S = 0.02
"""How often deadlines, counters and the GPU view are looked at."""
STATUS_EVERY_TICKS = 50
TRIALS = "trials.json"
TRIALS_EVERY_S = 60.0
DRAIN_GRACE_S = 5.0
"""After the drain's limit: for engines to end what was aborted and for the last answers to leave."""
STOP_LIMIT_S = 20.0
LAST_WORDS_S = 0.5
"""Between the last answer and the end of the connections. A peer with ZMQ_IMMEDIATE drops what it has received and not
yet read when its connection ends (libzmq terminates the pipe without delay): without it,
a drain with 40 requests lost answers in each of five runs."""
GC_THRESHOLDS = (10_000, 20, 50)
"""Requests make some hundred objects and no cycles: at the default of 700 the collector took 4 % of a busy loop."""

_log = structlog.get_logger(__name__)


class ThreadOffload:
    """Runs heavy functions in the loop's thread pool."""

    async def run(self, function: Callable[[], T]) -> T:
        """The function's result."""
        return await asyncio.get_running_loop().run_in_executor(None, function)


class Daemon:
    """One run of msd, from a checked configuration to the last child's end."""

    def __init__(self, config: Config, base_dir: Path) -> None:
        """`base_dir`: what relative paths in the configuration count from."""
        self._config = config = router_file.anchored(config, base_dir)
        self._base_dir = base_dir
        self._clock: Clock = MonotonicClock()
        self._notifier = Notifier()
        self._stop = asyncio.Event()
        self._abort = asyncio.Event()
        self._draining = False
        self._epoch = secrets.token_hex(4)
        self._identity = status.Identity(config, self._epoch, os.getpid(), self._clock.now_us())
        self._told = ""
        self._gated = ""
        self._state_dir = decisions.state_dir(config.daemon.state_dir, base_dir)
        self._withdrawals = self._state_dir / "withdrawn.jsonl"
        self._withdrawn: list[gate.Withdrawal] = []
        """Those that are not on the disk yet."""
        self._told_withdrawn = asyncio.Event()
        self._keeps = True
        self._gate: gate.GateFile | None = None
        self._trials: tuple[gate.Tried, ...] = ()
        """As they are on the disk."""

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT; drain; leave nothing behind. Raises MsdError when it cannot start."""
        config = self._config
        loop = asyncio.get_running_loop()
        crash: asyncio.Future[None] = loop.create_future()
        loop.set_exception_handler(partial(_on_loop_exception, crash))
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        profile = self._profile()
        logs_folder = None
        if any(engine.kind == "vllm" for engine in config.engine):
            from msd.engine.vllm import import_vllm

            logs_folder = factory.run_dir(config)
            # Before the socket is bound: an import in a thread would hold the loop for up to 0.3 s at a time.
            _log.info("importing_vllm", takes="5 to 15 s; then the socket is bound", engine_logs=str(logs_folder))
            import_vllm()
        gpu = factory.simulated_gpu(config, self._clock)
        journal = MemoryJournal(config.journal, self._clock)
        scheduler = self._scheduler(profile)
        self._fitting = Fitting(scheduler.ledger, ThreadOffload(), self._clock)
        probes = start_probes(config.telemetry, self._clock, gpu)
        decision_log = self._open_decision_log(scheduler)
        try:
            async with asyncio.TaskGroup() as tasks:
                self._dispatcher = dispatcher = Dispatcher(
                    scheduler,
                    journal,
                    Egress(loop, config.limits),
                    Acceptor(
                        epoch=self._epoch,
                        models=factory.load_tokenizers(config, self._base_dir),
                        offload=ThreadOffload(),
                    ),
                    self._clock,
                    tasks,
                    self._describe,
                    decision_log=decision_log,
                    on_withdrawn=self._on_withdrawn,
                )
                self._pool = pool = Pool(
                    {
                        engine.name: factory.engine_factory(
                            engine, config, self._base_dir, self._clock, gpu, logs_folder
                        )
                        for engine in config.engine
                    },
                    dispatcher,
                    dispatcher.read_prompt,
                    Random(config.daemon.seed),
                    self._clock,
                    start_timeout_s={engine.name: engine.start_timeout_s for engine in config.engine},
                    may_move=[engine.name for engine in config.engine if engine.residency == "auto"],
                    sleep_level=config.residency.sleep_level,
                )
                dispatcher.attach(pool)
                self._ingress = ingress = ZmqIngress(
                    config.ingress.zmq,
                    config.limits,
                    config.tenant,
                    dispatcher,
                    epoch=self._epoch,
                    durable=journal.durable,
                )
                http = HttpIngress(
                    config.ingress.http,
                    state=lambda: self._status().state,
                    metrics=self._scrape,
                    content_type=metrics.CONTENT_TYPE,
                )
                for request in await journal.start(dispatcher):
                    dispatcher.egress.register(request, None)
                    dispatcher.post(e.Recovered(self._clock.now_us(), request))
                try:
                    await ingress.start()
                    await http.start()
                    await self._serve(tasks, crash, probes)
                finally:
                    await asyncio.shield(http.close())
                    await asyncio.shield(ingress.close())
        finally:
            await asyncio.shield(journal.stop())
            for probe in probes:
                probe.stop()
            if decision_log is not None:
                decision_log.close()
        _log.info("stopped")

    def _open_decision_log(self, scheduler: Scheduler) -> DecisionLog | None:
        config = self._config
        if not config.telemetry.decision_log:
            return None
        made = DecisionLog(
            decisions.state_dir(config.daemon.state_dir, self._base_dir),
            config.telemetry.decision_log_bytes,
            server=self._identity.server,
            policy=scheduler.policy_name,
            modes=[book.mode for book in scheduler.fleet.books],
        )
        made.start()
        return made

    def _profile(self) -> Profile | None:
        """What `msd profile` measured of these modes. Raises ConfigError when it does not hold on this host."""
        config = self._config
        if not config.policy.profile:
            return None
        where = identity(config, look(*installed_gpus()))
        profile = load_for(config, self._base_dir, where.device, where.engine_version)
        lacking = [engine.name for engine in config.engine if profile is not None and profile.of(engine.name) is None]
        _log.info("profile", file=config.policy.profile, device=where.device, modes_not_in_it=lacking)
        return profile

    def _scheduler(self, profile: Profile | None) -> Scheduler:
        """The core, with the gate file that its modes go by; says which of them are kept back, and why."""
        config = self._config
        gate_file = gate.load(self._base_dir / config.quality.gate) if config.quality.gate else None
        self._gate = gate_file
        scheduler = Scheduler.from_config(
            config,
            Random(config.daemon.seed),
            gate=gate_file,
            recipes=recipe_hashes(config, self._base_dir),
            withdrawn=gate.load_withdrawals(self._withdrawals) if gate_file is not None else (),
            profile=profile,
            estimated_bytes=estimates(config, self._base_dir),
        )
        if gate_file is not None:
            self._trials = gate.load_trials(self._state_dir / TRIALS, gate_file, config.quality.delta)
            scheduler.shadows.load(self._trials)
        certificates = scheduler.certificates
        for note in certificates.strangers():
            _log.info("gate_rows_ignored", file=config.quality.gate, why=note)
        for arm, engine in enumerate(config.engine):
            summary = certificates.summary(arm)
            (_log.info if summary.serves else _log.warning)("mode_standing", mode=engine.name, quality=summary.text)
        self._gated = _kept_back(config, certificates)
        return scheduler

    def _on_withdrawn(self, withdrawal: gate.Withdrawal) -> None:
        """A mode was found worse in production: have it kept, off the loop."""
        self._gated = _kept_back(self._config, self._dispatcher.scheduler.certificates)
        self._withdrawn.append(withdrawal)
        self._told_withdrawn.set()

    async def _keep_evidence(self) -> None:
        """Keep withdrawals as they come, and the trials now and then; once more at the end."""
        keeps = True
        while keeps:
            with suppress(TimeoutError):
                async with asyncio.timeout(TRIALS_EVERY_S):
                    await self._told_withdrawn.wait()
            self._told_withdrawn.clear()
            keeps = self._keeps
            await self._keep_now()

    async def _keep_now(self) -> None:
        """Have on the disk what live pairs have found. What cannot be kept is tried again next time."""
        withdrawn, trials = tuple(self._withdrawn), self._dispatcher.scheduler.shadows.dump()
        offload = ThreadOffload()
        try:
            if withdrawn:
                await offload.run(partial(gate.keep_withdrawals, self._withdrawals, withdrawn))
                del self._withdrawn[: len(withdrawn)]
            if self._gate is not None and trials != self._trials:
                file, delta = self._state_dir / TRIALS, self._config.quality.delta
                await offload.run(partial(gate.keep_trials, file, self._gate, delta, trials))
                self._trials = trials
        except ConfigError as error:  # they hold for this run all the same
            _log.error("evidence_not_kept", num_withdrawals=len(withdrawn), num_trials=len(trials), error=str(error))

    async def _serve(self, tasks: asyncio.TaskGroup, crash: asyncio.Future[None], probes: tuple[GpuProbe, ...]) -> None:
        """From READY to the last answer. Raises what crashed, if something did."""
        dispatcher, pool, ingress = self._dispatcher, self._pool, self._ingress
        _log.info("serving", endpoints=ingress.endpoints, policy=self._config.policy.name, epoch=self._epoch)
        self._notifier.tell("READY=1", "STATUS=no mode is warm yet" + (f"; {self._gated}" if self._gated else ""))
        running = tasks.create_task(pool.run(), name="pool")
        ticker = tasks.create_task(self._tick(probes), name="ticker")
        fitting = tasks.create_task(self._fitting.run(dispatcher.post), name="energy fit")
        keeping = tasks.create_task(self._keep_evidence(), name="evidence")
        # Everything that lives as long as the daemon exists now: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        stop = tasks.create_task(self._stop.wait(), name="stop")
        await asyncio.wait((stop, crash), return_when=asyncio.FIRST_COMPLETED)
        if crash.done():
            stop.cancel()
            crash.result()
        await self._drain(dispatcher, ingress)
        if not await pool.stop(STOP_LIMIT_S):
            _log.error("engines_still_stopping", limit_s=STOP_LIMIT_S)
        await running
        ticker.cancel()
        fitting.cancel()
        self._keeps = False
        self._told_withdrawn.set()
        await keeping  # not cancelled: a write that is under way must not meet another one
        if ingress.stats()["num_sessions"]:
            await asyncio.sleep(LAST_WORDS_S)

    def post(self, event: e.Event) -> None:
        """Hand the scheduler an event from outside, on the loop."""
        self._dispatcher.post(event)

    def stop(self) -> None:
        """Drain and end, as SIGTERM does."""
        self._on_signal()

    # --- end ---------------------------------------------------------------------------------------------------------

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._abort.set()
        self._stop.set()

    async def _drain(self, dispatcher: Dispatcher, ingress: ZmqIngress) -> None:
        """Answer what waits, let what runs finish within the limit, then abort it; a second signal aborts at once."""
        self._draining = True
        drain_s = self._config.daemon.drain_s
        self._notifier.tell("STOPPING=1", f"STATUS=draining, at most {drain_s:g} s")
        _log.info("draining", drain_s=drain_s, pending=dispatcher.scheduler.num_pending)
        ingress.draining(int(drain_s * 1_000))
        now_us = self._clock.now_us()
        dispatcher.post(e.Draining(now_us, now_us + int(drain_s * 1e6)))
        async with asyncio.TaskGroup() as waits:
            idle = waits.create_task(dispatcher.idle.wait())
            abort = waits.create_task(self._abort.wait())
            await asyncio.wait((idle, abort), timeout=drain_s, return_when=asyncio.FIRST_COMPLETED)
            if not idle.done():
                now_us = self._clock.now_us()
                dispatcher.post(e.Draining(now_us, now_us))
                await asyncio.wait((idle,), timeout=DRAIN_GRACE_S)
            if not idle.done():
                _log.error("requests_left", pending=dispatcher.scheduler.num_pending)
            idle.cancel()
            abort.cancel()

    # --- while it runs -----------------------------------------------------------------------------------------------

    async def _tick(self, probes: tuple[GpuProbe, ...]) -> None:
        """Give the core what the probes have read, and the time."""
        num_ticks = 0
        view = None
        while True:
            await asyncio.sleep(TICK_S)
            post = self._dispatcher.post
            for probe in probes:
                for reading in probe.readings():
                    post(e.CounterRead(reading.t_us, reading))
            latest = probes[0].latest()
            if latest is not None and latest is not view:
                view = latest
                post(e.ViewTaken(self._clock.now_us(), latest))
            post(e.Tick(self._clock.now_us()))
            num_ticks += 1
            if num_ticks % STATUS_EVERY_TICKS == 0 and not self._draining:
                self._tell_status()
                self._tell_doubts()

    def _tell_status(self) -> None:
        states = self._pool.status()
        up = [engine.engine for engine in states if engine.state == "up"]
        rest = [f"{engine.engine} {engine.state}" for engine in states if engine.state != "up"]
        line = "; ".join(
            part for part in (f"STATUS=warm: {', '.join(up) or 'none'}", ", ".join(rest), self._gated) if part
        )
        if line != self._told:
            self._told = line
            self._notifier.tell(line)

    def _tell_doubts(self) -> None:
        for doubt in self._dispatcher.scheduler.shadows.take_doubts():
            _log.warning(
                "mode_disagrees",
                mode=doubt.mode,
                task=doubt.task,
                num_pairs=doubt.num_pairs,
                agreement=round(doubt.agreement, 3),
                gate_agreement=round(doubt.gate_agreement, 3),
                remedy="answers without an exact solution take no certificate away: compare some yourself",
            )

    def _status(self) -> DaemonStatus:
        return status.gather(
            self._identity,
            self._dispatcher.scheduler,
            self._pool.status(),
            self._dispatcher.journal,
            draining=self._draining,
            num_sessions=self._ingress.stats()["num_sessions"],
            now_us=self._clock.now_us(),
            fit=self._fitting.latest,
        )

    async def _scrape(self) -> bytes:
        """The metrics as of now; their text is made off the loop."""
        scheduler = self._dispatcher.scheduler
        booked = {accounts.domain: scheduler.ledger.booked(accounts.domain) for accounts in scheduler.ledger.accounts()}
        standings = [
            (book.name, task, certificate.standing)
            for arm, book in enumerate(scheduler.fleet.books)
            for task, certificate in scheduler.certificates.describe(arm)
        ]
        counted = self._dispatcher.metrics
        snapshot = counted.snapshot(self._status(), booked, standings)
        return await ThreadOffload().run(partial(counted.render, snapshot))

    def _describe(self) -> dict[str, object]:
        described = to_builtins(self._status())
        assert isinstance(described, dict)
        return described


def _kept_back(config: Config, certificates: Certificates) -> str:
    """The modes that quality lets serve nothing, for the status line; empty when there is none."""
    names = [engine.name for arm, engine in enumerate(config.engine) if not certificates.summary(arm).serves]
    return f"kept back by quality: {', '.join(names)}" if names else ""


def _on_loop_exception(
    crash: asyncio.Future[None], loop: asyncio.AbstractEventLoop, context: dict[str, object]
) -> None:
    """A callback raised. If msd's own code did, a step is half done and nothing may be promised any more: stop."""
    error = context.get("exception")
    _log.error("exception_in_callback", message=context.get("message"), exc_info=error)
    if not isinstance(error, Exception) or crash.done():
        return
    at = error.__traceback__
    while at is not None:
        if str(at.tb_frame.f_globals.get("__name__", "")).startswith("msd."):
            crash.set_exception(error)
            return
        at = at.tb_next


def serve(config: Config, base_dir: Path) -> int:
    """Run the daemon; returns the process's exit code. Errors of operation are logged with their remedy."""
    logs.configure(config.daemon)
    if not config.engine:
        raise ConfigError("no [[engine]] is configured", remedy="config.toml in the repository is a documented example")
    failure: MsdError | None = None
    try:
        uvloop.run(Daemon(config, base_dir).run())
    except* MsdError as group:
        failure = _first(group)
    if failure is None:
        return EXIT_OK
    _log.error("cannot_serve", error=str(failure))
    return failure.exit_code


def _first(group: BaseExceptionGroup[MsdError]) -> MsdError:
    first: BaseException = group
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    assert isinstance(first, MsdError)
    return first
