"""One seeded world: the daemon's Dispatcher, Scheduler, Pool, Egress and policies, in virtual time.

Nothing of the daemon's decision path is replaced. Virtual are: the loop, the engines and their GPU, the disk, the
producers. A run is a function of its seed; `Report.digest` says whether two runs were the same.
"""

from __future__ import annotations

import asyncio
import gc
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from random import Random
from typing import Protocol

from msgspec import structs

from msd.config import Config, EngineConfig, PolicyConfig
from msd.core import events as e
from msd.core.commands import Command
from msd.core.events import Event
from msd.core.scheduler import Scheduler
from msd.dispatch import Dispatcher
from msd.domain import ExitKind, Outcome
from msd.egress import Egress
from msd.engine.pool import Pool
from msd.engine.sim import SimEngine
from msd.engine.tokens import SimTokenizer
from msd.errors import EngineStartError
from msd.ingress.accept import Acceptor
from msd.learning.energy_model import Fitting
from msd.sim.checks import Checks
from msd.sim.digest import Digest
from msd.sim.faults import FaultyProbe, InlineOffload, SimJournal
from msd.sim.loop import SimLoop
from msd.sim.producers import Producers, SimSession
from msd.sim.report import Report, Spread
from msd.sim.weather import POLICIES, Weather, default_config, draw, recipes_of, stated_gate
from msd.simgpu import SimGpu
from msd.telemetry.sim import SimProbe

EPOCH = "sim"
LIVENESS_S = 900.0
"""Once nothing new comes, every request must have ended within this time."""
SETTLE_S = 40
"""The ledger has settled or given up everything by then."""
STOP_LIMIT_S = 60.0
WINDOW_S = 5.0
GC_THRESHOLDS = (10_000, 20, 50)
"""As the daemon sets them: at the default of 700 the collector takes 6 % of a world."""
MakeScheduler = Callable[[Config, Random], Scheduler]


class Traffic(Protocol):
    """Who submits in a world: `Producers` as the weather says, or a plan played back."""

    all_sent: asyncio.Event
    sessions: list[SimSession]

    def start(self) -> None:
        """Begin to submit."""

    def stop(self) -> None:
        """Submit nothing more."""


MakeTraffic = Callable[[Dispatcher, Weather, int, Random, Checks], Traffic]


def run_world(
    seed: int,
    num_requests: int = 2_000,
    *,
    config: Config | None = None,
    weather: Weather | None = None,
    make_scheduler: MakeScheduler | None = None,
) -> Report:
    """Run one world to its end and report. `weather` and `config` default to what the seed draws.

    Any exception of the daemon's code is the failed check `no_crash`, not an exception here.
    """
    weather = weather or draw(Random(seed), num_requests)
    config = config or default_config(weather, seed)
    if make_scheduler is None:
        make_scheduler = Scheduler.from_config
        if weather.shadow_share:
            make_scheduler = partial(make_scheduler, gate=stated_gate(config), recipes=recipes_of(config))
    world = World(seed, num_requests, config, weather, make_scheduler)
    before = time.perf_counter()
    world.run()
    return world.report(time.perf_counter() - before)


class World:
    """Everything of one run; each source of chance has its own generator, so that one does not shift another."""

    def __init__(
        self,
        seed: int,
        num_requests: int,
        config: Config,
        weather: Weather,
        make_scheduler: MakeScheduler,
        make_traffic: MakeTraffic = Producers,
    ) -> None:
        self._seed = seed
        self._num_requests = num_requests
        self._config = config
        self._weather = weather
        self._make_traffic = make_traffic
        self._loop = SimLoop(self._chance("loop"))
        self._start_us = self._loop.now_us()
        self._served_us = self._start_us
        self._gpu = SimGpu(
            memory_bytes=config.telemetry.sim_memory_bytes,
            idle_w=config.telemetry.sim_idle_w,
            rng=self._chance("gpu"),
            now_us=self._start_us,
        )
        self._scheduler = make_scheduler(config, self._chance("scheduler"))
        self._handle = self._scheduler.handle
        self._scheduler.handle = self._watch  # type: ignore[method-assign]  # the checks see every step
        self._checks = Checks(config, self._scheduler)
        self._digest = Digest()
        self._engines: dict[str, SimEngine] = {}
        self._num_events = 0
        self._num_deaths = 0

    def _chance(self, name: str) -> Random:
        return Random(f"{self._seed}/{name}")

    def run(self) -> None:
        """Run to the end; a crash is a violation."""
        thresholds = gc.get_threshold()
        gc.set_threshold(*GC_THRESHOLDS)
        try:
            self._loop.run(self._main())
        except Exception as caught:
            error: BaseException = caught
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            frames = traceback.extract_tb(error.__traceback__)[-3:]
            where = ", ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in frames)
            self._checks.expect("no_crash", False, "{!r} at {}", error, where)
        else:
            self._checks.expect("no_crash", True, "")
        finally:
            gc.set_threshold(*thresholds)

    # --- the daemon, composed as in msd/daemon.py --------------------------------------------------------------------

    async def _main(self) -> None:
        config, weather, loop = self._config, self._weather, self._loop
        journal = SimJournal(
            config.journal,
            loop,
            self._chance("journal"),
            weather.journal_latency_ms,
            weather.journal_failure_share,
        )
        async with asyncio.TaskGroup() as tasks:
            dispatcher = Dispatcher(
                self._scheduler,
                journal,
                Egress(loop, config.limits),
                Acceptor(
                    epoch=EPOCH, models={model.name: SimTokenizer() for model in config.model}, offload=InlineOffload()
                ),
                loop,
                tasks,
                dict,
            )
            factories = {engine.name: partial(self._make_engine, engine) for engine in config.engine}
            pool = Pool(
                factories,
                dispatcher,
                dispatcher.read_prompt,
                self._chance("pool"),
                loop,
                may_move=[engine.name for engine in config.engine if engine.residency == "auto"],
                sleep_level=config.residency.sleep_level,
            )
            dispatcher.attach(pool)
            await journal.start(dispatcher)
            running = tasks.create_task(pool.run())
            ticker = tasks.create_task(self._tick(dispatcher))
            fitting = tasks.create_task(Fitting(self._scheduler.ledger, InlineOffload(), loop).run(dispatcher.post))
            producers = self._make_traffic(
                dispatcher, weather, self._num_requests, self._chance("producers"), self._checks
            )
            producers.start()
            self._schedule_deaths()
            self._schedule_changes(dispatcher)
            await producers.all_sent.wait()
            if weather.drain_early:
                now_us = loop.now_us()
                dispatcher.post(e.Draining(now_us, now_us + int(weather.drain_s * 1e6)))
            await self._quiet(dispatcher)
            self._served_us = loop.now_us()
            await self._settled()
            producers.stop()
            self._checks.at_end()
            for session in producers.sessions:
                for client_request_id, asked in session.asked.items():
                    answered = session.closed or asked.num_answers > 0
                    self._checks.expect("answers", answered, "{} got no answer", client_request_id)
            stopped = await pool.stop(STOP_LIMIT_S)
            self._checks.expect("liveness", stopped, "the engines did not stop within {} s", STOP_LIMIT_S)
            await running
            ticker.cancel()
            fitting.cancel()

    async def _quiet(self, dispatcher: Dispatcher) -> None:
        """Wait until nothing is open; faults are over by now, so this must come to an end."""
        try:
            async with asyncio.timeout(LIVENESS_S):
                await dispatcher.idle.wait()
        except TimeoutError:
            pending = self._scheduler.num_pending
            self._checks.expect("liveness", False, "{} requests are open after {} s", pending, LIVENESS_S)
        else:
            self._checks.expect("liveness", True, "")

    async def _settled(self) -> None:
        """Wait until the ledger has settled all that ran, or must have given it up."""
        for _ in range(SETTLE_S):
            await asyncio.sleep(1.0)
            if not any(a.running_mj or a.open_mj for a in self._scheduler.ledger.accounts()):
                return

    async def _tick(self, dispatcher: Dispatcher) -> None:
        """Give the core what the probe has read, and the time."""
        probe = self._make_probe()
        probe.start()
        try:
            while True:
                await asyncio.sleep(self._weather.tick_s)
                for reading in probe.readings():
                    dispatcher.post(e.CounterRead(reading.t_us, reading))
                view = probe.latest()
                if view is not None and view is not self._scheduler.view:
                    dispatcher.post(e.ViewTaken(self._loop.now_us(), view))
                dispatcher.post(e.Tick(self._loop.now_us()))
        finally:
            probe.stop()

    # --- faults ------------------------------------------------------------------------------------------------------

    @property
    def _expected_s(self) -> float:
        return self._num_requests / self._weather.rate_per_s

    def _moments_us(self, name: str, number: int) -> list[int]:
        rng = self._chance(name)
        return sorted(self._start_us + int(rng.uniform(1.0, self._expected_s) * 1e6) for _ in range(number))

    def _windows(self, name: str, number: int) -> list[tuple[int, int]]:
        rng = self._chance(f"{name} length")
        return [(t_us, t_us + int(rng.uniform(0.1, WINDOW_S) * 1e6)) for t_us in self._moments_us(name, number)]

    def _make_probe(self) -> FaultyProbe:
        weather = self._weather
        return FaultyProbe(
            SimProbe(self._gpu, self._loop),
            self._moments_us("resets", weather.num_counter_resets),
            self._windows("stalls", weather.num_counter_stalls),
            self._windows("outages", weather.num_view_outages),
        )

    def _make_engine(self, engine: EngineConfig) -> SimEngine:
        if engine.kind != "sim":
            raise EngineStartError(
                f"engine {engine.name} is of kind {engine.kind}; a simulated world has only sim engines"
            )
        number = len(self._engines) + self._num_deaths
        made = SimEngine(
            engine,
            self._gpu,
            self._loop,
            self._chance(f"engine {engine.name} {number}"),
            emit_interval_ms=self._weather.emit_interval_ms,
            step_noise=self._weather.step_noise,
        )
        self._engines[engine.name] = made
        return made

    def _schedule_deaths(self) -> None:
        rng = self._chance("deaths")
        for t_us in self._moments_us("deaths at", self._weather.num_engine_deaths):
            kind = rng.choice((ExitKind.DIED, ExitKind.STOPPED))
            self._loop.call_at(t_us / 1e6, self._kill, rng.choice(self._config.engine).name, kind)

    def _schedule_changes(self, dispatcher: Dispatcher) -> None:
        rng = self._chance("changes")
        for t_us in self._moments_us("drifts at", self._weather.num_drifts):
            self._loop.call_at(t_us / 1e6, self._drift, rng.choice(self._config.engine).name)
        for t_us in self._moments_us("policies at", self._weather.num_policy_changes):
            self._loop.call_at(t_us / 1e6, self._change_policy, dispatcher, rng.choice(POLICIES))

    def _drift(self, name: str) -> None:
        engine = self._engines.get(name)
        if engine is not None:
            engine.drift()

    def _change_policy(self, dispatcher: Dispatcher, name: str) -> None:
        dispatcher.post(e.ConfigChanged(self._loop.now_us(), PolicyConfig(name=name)))

    def _kill(self, name: str, kind: ExitKind) -> None:
        engine = self._engines.get(name)
        if engine is not None:
            self._num_deaths += 1
            engine.die(kind, "killed by the weather")

    # --- what is seen ------------------------------------------------------------------------------------------------

    def _watch(self, event: Event) -> list[Command]:
        """The scheduler's `handle`, with checks and digest around it."""
        if isinstance(event, e.QualityJudged) and event.agrees is not None and event.difference is None:
            # Filler has no right answer: here the reference's counts as right, so that modes are withdrawn.
            event = structs.replace(event, difference=0.0 if event.agrees else -1.0)
        commands = self._handle(event)
        self._num_events += 1
        self._checks.after(event, commands)
        self._digest.add(event, commands)
        return commands

    @property
    def outcomes(self) -> list[Outcome]:
        """How every request ended that was accepted."""
        return self._checks.outcomes

    def report(self, wall_s: float) -> Report:
        """What the world came to."""
        scheduler, counts = self._scheduler, self._scheduler.counts
        answered = [outcome for outcome in self._checks.outcomes if outcome.finish_reason in ("stop", "length")]
        num_tokens = sum(outcome.num_completion_tokens for outcome in answered)
        virtual_s = (self._loop.now_us() - self._start_us) / 1e6
        served_s = max(1e-6, (self._served_us - self._start_us) / 1e6)
        energy_mj = self._energy_mj()
        self._digest.add_numbers(energy_mj.values())
        by_mode: Counter[str] = Counter()
        by_reason: Counter[str] = Counter()
        for (mode, reason), count in sorted(scheduler.reasons.items()):
            by_mode[mode] += count
            by_reason[reason] += count
        checks = self._checks.results()
        return Report(
            seed=self._seed,
            num_requests=self._num_requests,
            virtual_s=virtual_s,
            wall_s=wall_s,
            speed=virtual_s / wall_s,
            num_events=self._num_events,
            num_steps=self._loop.num_steps,
            num_engine_deaths=self._num_deaths,
            submitted=counts.submitted,
            delivered=counts.delivered,
            rejected=counts.rejected,
            aborted=counts.aborted,
            failed=counts.failed,
            duplicates=counts.duplicates,
            pending=scheduler.num_pending,
            restarts=counts.restarts,
            num_prompt_tokens=sum(outcome.num_prompt_tokens for outcome in answered),
            num_completion_tokens=num_tokens,
            tokens_per_s=num_tokens / served_s,
            by_mode=dict(by_mode),
            by_reason=dict(by_reason),
            error_codes=dict(sorted(scheduler.errors.items())),
            ttft_ms=_spread([outcome.timings.ttft_ms for outcome in answered]),
            tpot_ms=_spread([o.timings.tpot_ms for o in answered if o.num_completion_tokens > 1]),
            e2el_ms=_spread([outcome.timings.e2e_ms for outcome in answered]),
            energy_mj=energy_mj,
            mj_per_token=energy_mj["requests"] / num_tokens if num_tokens else None,
            checks=checks,
            digest=self._digest.hexdigest(),
            last_events=tuple(repr(event) for event in self._checks.told),
        )

    def _energy_mj(self) -> dict[str, int]:
        sums = dict.fromkeys(("requests", "wasted", "idle", "unattributed", "running", "counter", "estimated"), 0)
        for accounts in self._scheduler.ledger.accounts():
            sums["requests"] += accounts.requests_mj
            sums["wasted"] += sum(accounts.wasted_mj.values())
            sums["idle"] += accounts.idle_mj
            sums["unattributed"] += sum(accounts.unattributed_mj.values())
            sums["running"] += accounts.running_mj + accounts.open_mj
            sums["counter"] += accounts.counter_mj
            sums["estimated"] += accounts.estimated_mj
        return sums


def _spread(values: Sequence[float]) -> Spread:
    ordered = sorted(values)
    if not ordered:
        return Spread(p50=None, p95=None, p99=None)
    last = len(ordered) - 1
    return Spread(p50=ordered[last // 2], p95=ordered[last * 95 // 100], p99=ordered[last * 99 // 100])
