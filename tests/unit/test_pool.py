"""The pool over simulated engines in virtual time: starts, attempts, losses, restarts, stop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Coroutine
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from msgspec import structs

from msd.config import EngineConfig, SimEngineConfig
from msd.domain import Chunk, EngineInfo, EngineLoad, ExitKind, FinishReason, Prompt, Residence, Sampling
from msd.engine.pool import BREAKER_DEATHS, BREAKER_PROBE_S, STEPPED_INTERVAL_US, Pool
from msd.engine.sim import SimEngine
from msd.errors import EngineStartError, JournalError
from msd.ports import Engine
from msd.simgpu import SimGpu
from tests.virtual_time import VirtualClock, run_virtual

PROMPT = Prompt(token_ids=tuple(range(50)), sampling=Sampling(ignore_eos=True))


class RecordingSink:
    """Keeps every report in order, as ("name", arguments...), with its virtual time beside it."""

    def __init__(self, clock: VirtualClock) -> None:
        self.reports: list[tuple[Any, ...]] = []
        self.times_us: list[int] = []
        self._clock = clock

    def _note(self, *report: Any) -> None:
        self.reports.append(report)
        self.times_us.append(self._clock.now_us())

    def on_chunk(self, request_id: str, attempt: int, chunk: Chunk) -> None:
        self._note("chunk", request_id, attempt, len(chunk.token_ids))

    def on_finished(self, request_id: str, attempt: int, finish_reason: FinishReason) -> None:
        self._note("finished", request_id, attempt, finish_reason)

    def on_failed(self, request_id: str, attempt: int, error_code: str, message: str, lost: bool) -> None:
        self._note("failed", request_id, attempt, error_code, lost)

    def on_engine_starting(self, engine: str) -> None:
        self._note("starting", engine)

    def on_engine_up(self, info: EngineInfo) -> None:
        self._note("up", info.engine)

    def on_engine_lost(self, engine: str, kind: ExitKind, reason: str) -> None:
        self._note("lost", engine, kind, reason)

    def on_engine_asleep(self, engine: str, residence: Residence, took_s: float) -> None:
        self._note("asleep", engine, residence)

    def on_engine_stepped(self, engine: str, load: EngineLoad, progress: tuple[tuple[str, int], ...]) -> None:
        self._note("stepped", engine, load.num_running, progress)

    def of(self, *names: str) -> list[tuple[Any, ...]]:
        return [report for report in self.reports if report[0] in names]

    def when(self, name: str) -> list[float]:
        return [t_us / 1e6 for report, t_us in zip(self.reports, self.times_us, strict=True) if report[0] == name]


class World:
    """One pool over engines `a`, `b`, ... on one simulated GPU. `made` holds every engine object, oldest first."""

    def __init__(
        self,
        *names: str,
        start_s: float = 1.0,
        start_timeout_s: float = 600.0,
        max_num_seqs: int = 4,
        may_move: Collection[str] = (),
    ) -> None:
        self.clock = VirtualClock()
        self.sink = RecordingSink(self.clock)
        self.gpu = SimGpu(memory_bytes=100, idle_w=10.0, rng=Random(0))
        self.made: dict[str, list[SimEngine]] = {name: [] for name in names}
        self.read_prompt: Callable[[str], Awaitable[Prompt]] | None = None
        sim = SimEngineConfig(weights_bytes=10, start_s=start_s)
        configs = [EngineConfig(name=name, model="m", kind="sim", max_num_seqs=max_num_seqs, sim=sim) for name in names]
        self.pool = Pool(
            {config.name: self._factory(config) for config in configs},
            self.sink,
            self._read,
            Random(0),
            self.clock,
            start_timeout_s={name: start_timeout_s for name in names},
            may_move=may_move,
        )

    def _factory(self, config: EngineConfig) -> Callable[[], Engine]:
        def make() -> Engine:
            engine = SimEngine(config, self.gpu, self.clock, Random(1))
            self.made[config.name].append(engine)
            return engine

        return make

    async def _read(self, request_id: str) -> Prompt:
        return PROMPT if self.read_prompt is None else await self.read_prompt(request_id)

    async def until_up(self, name: str) -> None:
        while next(status.state for status in self.pool.status() if status.engine == name) != "up":  # noqa: ASYNC110
            await asyncio.sleep(0.1)

    def run(self, script: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run the pool, the script beside it, then stop."""

        async def main() -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.pool.run())
                await asyncio.sleep(0)
                await script()
                assert await self.pool.stop(60.0)

        run_virtual(main(), self.clock)


def test_engines_start_one_after_another_and_a_request_streams_and_finishes() -> None:
    world = World("a", "b")

    async def script() -> None:
        await asyncio.sleep(3)
        world.pool.submit("r1", 1, "b", 8, 0)
        assert world.sink.of("chunk", "finished", "failed") == []  # nothing is reported from submit itself
        await asyncio.sleep(1)
        assert [status.state for status in world.pool.status()] == ["up", "up"]

    world.run(script)
    assert world.sink.of("starting", "up") == [("starting", "a"), ("up", "a"), ("starting", "b"), ("up", "b")]
    assert world.sink.when("up") == pytest.approx([1.0, 2.0])
    chunks = world.sink.of("chunk")
    assert chunks[0] == ("chunk", "r1", 1, 1)
    assert sum(report[3] for report in chunks) == 8
    assert world.sink.of("chunk", "finished")[-1] == ("finished", "r1", 1, "length")
    assert [status.state for status in world.pool.status()] == ["stopped", "stopped"]
    assert world.gpu.memory_used_bytes == 0


def test_abort_reports_once_and_frees_the_slot() -> None:
    world = World("a", max_num_seqs=1)

    async def script() -> None:
        await asyncio.sleep(2)
        world.pool.submit("long", 1, "a", 4_000, 0)
        await asyncio.sleep(1)
        assert world.made["a"][0].load().num_running == 1
        world.pool.abort("long", 1)
        world.pool.abort("long", 1)
        world.pool.abort("never-heard-of", 1)
        await asyncio.sleep(0.1)
        assert world.made["a"][0].load() == EngineLoad()
        world.pool.submit("next", 1, "a", 2, 0)
        await asyncio.sleep(1)

    world.run(script)
    assert world.sink.of("finished", "failed") == [("finished", "long", 1, "abort"), ("finished", "next", 1, "length")]


def test_abort_before_the_attempt_began_is_reported_too() -> None:
    world = World("a")

    async def script() -> None:
        await asyncio.sleep(2)
        world.pool.submit("r", 1, "a", 10, 0)
        world.pool.abort("r", 1)
        await asyncio.sleep(1)

    world.run(script)
    assert world.sink.of("chunk", "finished", "failed") == [("finished", "r", 1, "abort")]


def test_abort_while_the_prompt_is_being_read() -> None:
    world = World("a")

    async def slow(request_id: str) -> Prompt:
        await asyncio.sleep(5)
        return PROMPT

    world.read_prompt = slow

    async def script() -> None:
        await asyncio.sleep(2)
        world.pool.submit("r", 1, "a", 10, 0)
        await asyncio.sleep(1)
        world.pool.abort("r", 1)
        await asyncio.sleep(0.01)
        assert world.sink.of("finished") == [("finished", "r", 1, "abort")]

    world.run(script)


def test_a_prompt_that_cannot_be_read_and_a_refusal_fail_that_request_only() -> None:
    world = World("a")

    async def read(request_id: str) -> Prompt:
        if request_id == "unreadable":
            raise JournalError("no such row")
        return Prompt(token_ids=(1,) * 9_000) if request_id == "long" else PROMPT

    world.read_prompt = read

    async def script() -> None:
        await asyncio.sleep(2)
        for request_id in ("unreadable", "long", "good"):
            world.pool.submit(request_id, 1, "a", 3, 0)
        await asyncio.sleep(1)

    world.run(script)
    assert world.sink.of("failed") == [
        ("failed", "unreadable", 1, "journal_unavailable", False),
        ("failed", "long", 1, "context_overflow", False),
    ]
    assert world.sink.of("finished") == [("finished", "good", 1, "length")]
    assert world.sink.of("lost") == []


def test_a_lost_engine_reports_its_attempts_before_itself_and_comes_back() -> None:
    world = World("a", "b")

    async def script() -> None:
        await asyncio.sleep(3)
        for index in range(3):
            world.pool.submit(f"r{index}", 1, "a", 500, 0)
        world.pool.submit("elsewhere", 1, "b", 500, 0)
        await asyncio.sleep(0.5)
        world.made["a"][0].die(ExitKind.DIED, "shot")
        await asyncio.sleep(0.01)
        assert world.pool.status()[0].state == "backoff"
        assert world.pool.status()[0].last_error.endswith("shot")
        world.pool.submit("early", 1, "a", 5, 0)
        await asyncio.sleep(5)
        world.pool.submit("r0", 2, "a", 5, 0)
        await asyncio.sleep(60)

    world.run(script)
    ends = world.sink.of("failed", "lost")
    assert [end[:2] for end in ends] == [
        ("failed", "r0"), ("failed", "r1"), ("failed", "r2"), ("lost", "a"), ("failed", "early"),
    ]  # fmt: skip
    assert all(end[3:] == ("engine_unavailable", True) for end in ends if end[0] == "failed")
    assert len(world.made["a"]) == 2
    assert set(world.sink.of("finished")) == {
        ("finished", "elsewhere", 1, "length"),
        ("finished", "r0", 2, "length"),
    }


def test_backoff_doubles_is_jittered_by_the_seed_and_the_breaker_opens() -> None:
    world = World("a", start_s=1.0)

    async def script() -> None:
        for _ in range(BREAKER_DEATHS + 2):
            await world.until_up("a")
            world.made["a"][-1].die()
            await asyncio.sleep(0.1)
        assert world.pool.status()[0].state == "failed"

    world.run(script)
    lost, starts = world.sink.when("lost"), world.sink.when("starting")[1:]
    delays = [start - end for end, start in zip(lost, starts, strict=False)]
    for delay, nominal in zip(delays, [1, 2, 4, 8, BREAKER_PROBE_S, BREAKER_PROBE_S], strict=True):
        assert 0.8 * nominal <= delay <= 1.2 * nominal + 0.01
    assert len({round(delay / nominal, 6) for delay, nominal in zip(delays, [1, 2, 4, 8], strict=False)}) == 4


def test_a_minute_of_service_resets_the_backoff() -> None:
    world = World("a")

    async def script() -> None:
        await asyncio.sleep(2)
        for index in range(4):
            world.pool.submit(f"r{index}", 1, "a", 2, 0)
            await asyncio.sleep(70)
            world.made["a"][-1].die()
            await asyncio.sleep(5)

    world.run(script)
    delays = [start - end for end, start in zip(world.sink.when("lost"), world.sink.when("starting")[1:], strict=True)]
    assert all(0.8 <= delay <= 1.2 for delay in delays)


def test_a_start_that_fails_or_takes_too_long_is_reported_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World("a", "b", start_s=10.0, start_timeout_s=2.0)

    async def script() -> None:
        await asyncio.sleep(2.5)
        status = world.pool.status()
        assert status[0].state == "backoff"
        assert "did not start within 2 s" in status[0].last_error
        assert status[1].state == "starting"

        async def fail(self: SimEngine) -> EngineInfo:
            raise EngineStartError("broken", last_lines=("its last words",))

        monkeypatch.setattr(SimEngine, "start", fail)
        await asyncio.sleep(10)
        assert "its last words" in world.pool.status()[0].last_error

    world.run(script)
    assert world.sink.of("up") == []
    assert ("lost", "a") in [report[:2] for report in world.sink.of("lost")]
    assert world.gpu.memory_used_bytes == 0


def test_gauges_come_at_most_twenty_times_a_second_and_once_when_idle() -> None:
    world = World("a")

    async def script() -> None:
        await asyncio.sleep(2)
        world.pool.submit("r", 1, "a", 300, 0)
        await asyncio.sleep(10)

    world.run(script)
    times_us = [t * 1e6 for t in world.sink.when("stepped")]
    assert all(later - earlier >= STEPPED_INTERVAL_US - 1 for earlier, later in pairwise(times_us))
    assert len(times_us) > 10
    reports = world.sink.of("stepped")
    assert reports[-1] == ("stepped", "a", 0, ())
    tokens = [report[3][0][1] for report in reports[:-1]]
    assert tokens == sorted(tokens)
    assert 250 < tokens[-1] <= 300


def test_stop_aborts_what_runs_and_can_be_called_during_a_start() -> None:
    world = World("a", "b", start_s=5.0)

    async def script() -> None:
        await asyncio.sleep(6)
        world.pool.submit("r", 1, "a", 4_000, 0)
        await asyncio.sleep(1)
        assert [status.state for status in world.pool.status()] == ["up", "starting"]

    world.run(script)
    assert world.sink.of("finished", "failed") == [("finished", "r", 1, "abort")]
    assert world.sink.of("lost") == []
    assert world.gpu.memory_used_bytes == 0


def test_an_engine_found_dead_by_a_request_is_replaced_even_if_it_never_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World("a")

    async def deaf(self: SimEngine) -> tuple[ExitKind, str]:
        return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]

    monkeypatch.setattr(SimEngine, "lost", deaf)

    async def script() -> None:
        await asyncio.sleep(2)
        world.made["a"][0].die()
        world.pool.submit("r", 1, "a", 5, 0)
        await asyncio.sleep(5)
        assert world.pool.status()[0].state == "up"

    world.run(script)
    assert [report[:2] for report in world.sink.of("failed", "lost")] == [("failed", "r"), ("lost", "a")]
    assert len(world.made["a"]) == 2


def test_cancelling_run_stops_the_engines() -> None:
    world = World("a")

    async def main() -> None:
        running = asyncio.create_task(world.pool.run())
        await asyncio.sleep(2)
        world.pool.submit("r", 1, "a", 4_000, 0)
        await asyncio.sleep(1)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    run_virtual(main(), world.clock)
    assert world.gpu.memory_used_bytes == 0


# --- engines that may move ------------------------------------------------------------------------------------------


async def settle(world: World, name: str, state: str, within_s: float = 60.0) -> None:
    for _ in range(round(within_s / 0.05)):
        if next(status.state for status in world.pool.status() if status.engine == name) == state:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"{name} did not become {state}: {world.pool.status()}")


def test_an_engine_that_may_move_waits_until_it_is_told_and_others_start_at_once() -> None:
    world = World("a", "b", may_move=("b",))

    async def script() -> None:
        await asyncio.sleep(5)
        assert world.sink.of("up") == [("up", "a")]
        world.pool.transit("b", "resident")
        await settle(world, "b", "up")

    world.run(script)
    assert world.sink.of("starting", "up", "asleep", "lost") == [
        ("starting", "a"),
        ("up", "a"),
        ("starting", "b"),
        ("up", "b"),
    ]


def test_sleep_frees_the_memory_and_wake_takes_it_again_with_the_same_object() -> None:
    world = World("a", may_move=("a",))

    async def script() -> None:
        world.pool.transit("a", "resident")
        await settle(world, "a", "up")
        assert world.gpu.memory_used_bytes == 10
        world.pool.transit("a", "asleep")
        await settle(world, "a", "asleep")
        await asyncio.sleep(2)
        assert world.gpu.memory_used_bytes == 0
        world.pool.transit("a", "resident")
        await settle(world, "a", "up")
        world.pool.submit("r", 1, "a", 4, 0)
        await asyncio.sleep(2)

    world.run(script)
    assert world.sink.of("up", "asleep", "lost", "finished") == [
        ("up", "a"),
        ("asleep", "a", "asleep"),
        ("up", "a"),
        ("finished", "r", 1, "length"),
    ]
    assert len(world.made["a"]) == 1
    assert world.gpu.memory_used_bytes == 0


def test_to_go_cold_is_to_be_stopped_and_to_come_back_is_to_start_anew() -> None:
    world = World("a", may_move=("a",))

    async def script() -> None:
        for _ in range(2):
            world.pool.transit("a", "resident")
            await settle(world, "a", "up")
            world.pool.transit("a", "cold")
            await settle(world, "a", "cold")
        assert world.gpu.memory_used_bytes == 0

    world.run(script)
    assert len(world.made["a"]) == 2
    assert world.sink.of("asleep") == [("asleep", "a", "cold")] * 2


def test_an_engine_that_cannot_sleep_is_stopped_and_says_cold() -> None:
    world = World("a", may_move=("a",))

    async def script() -> None:
        world.pool.transit("a", "resident")
        await settle(world, "a", "up")
        slot = world.pool._slots["a"]
        assert slot.info is not None
        slot.info = structs.replace(slot.info, can_sleep=False)
        world.pool.transit("a", "asleep")
        await settle(world, "a", "cold")

    world.run(script)
    assert world.sink.of("asleep") == [("asleep", "a", "cold")]


@pytest.mark.parametrize("what", ["wake", "answers"])
def test_an_engine_that_does_not_wake_well_is_replaced(what: str) -> None:
    world = World("a", may_move=("a",))

    async def script() -> None:
        world.pool.transit("a", "resident")
        await settle(world, "a", "up")
        world.pool.transit("a", "asleep")
        await asyncio.sleep(5)
        world.made["a"][0].break_next(what)
        world.pool.transit("a", "resident")
        await settle(world, "a", "backoff")
        await settle(world, "a", "up")

    world.run(script)
    assert len(world.made["a"]) == 2
    assert [report[:2] for report in world.sink.of("up", "asleep", "lost")] == [
        ("up", "a"),
        ("asleep", "a"),
        ("lost", "a"),
        ("up", "a"),
    ]
    reason = world.sink.of("lost")[0][3]
    assert ("gibberish" in reason) == (what == "answers")


def test_an_engine_that_fails_to_go_to_sleep_ends_cold_and_says_so_once() -> None:
    world = World("a", may_move=("a",))

    async def script() -> None:
        world.pool.transit("a", "resident")
        await settle(world, "a", "up")
        world.made["a"][0].break_next("sleep")
        world.pool.transit("a", "asleep")
        await settle(world, "a", "cold")
        assert world.gpu.memory_used_bytes == 0

    world.run(script)
    assert [report[0] for report in world.sink.of("lost", "asleep")] == ["lost", "asleep"]
    assert world.sink.of("asleep") == [("asleep", "a", "cold")]


def test_one_transition_at_a_time() -> None:
    world = World("a", "b", may_move=("a", "b"), start_s=3.0)

    async def script() -> None:
        world.pool.transit("a", "resident")
        await settle(world, "a", "up")
        world.pool.transit("b", "resident")
        await asyncio.sleep(0.1)
        world.pool.transit("a", "asleep")
        await settle(world, "b", "up")
        await settle(world, "a", "asleep")
        await asyncio.sleep(2)

    world.run(script)
    ups, asleep = world.sink.when("up"), world.sink.when("asleep")
    assert asleep[0] > ups[1], "the sleep waits for the start that holds the lock"


def test_what_still_runs_on_an_engine_that_leaves_fails_as_lost() -> None:
    world = World("a", may_move=("a",))

    async def script() -> None:
        world.pool.transit("a", "resident")
        await settle(world, "a", "up")
        world.pool.submit("r", 1, "a", 5_000, 0)
        await asyncio.sleep(1)
        world.pool.transit("a", "asleep")
        await asyncio.sleep(2)

    world.run(script)
    names = [report[0] for report in world.sink.of("failed", "asleep")]
    assert names == ["failed", "asleep"]
    assert world.sink.of("failed") == [("failed", "r", 1, "engine_unavailable", True)]


@pytest.mark.parametrize("after_s", [0.05, 0.2, 0.45, 1.0])
def test_a_stop_in_the_middle_of_a_transition_leaves_nothing_behind(after_s: float) -> None:
    world = World("a", may_move=("a",))

    async def script() -> None:
        world.pool.transit("a", "resident")
        await settle(world, "a", "up")
        world.pool.transit("a", "asleep")
        await asyncio.sleep(after_s)
        world.pool.transit("a", "resident")
        await asyncio.sleep(after_s / 2)

    world.run(script)  # asserts that the pool stops in time
    assert world.gpu.memory_used_bytes == 0
    assert {status.state for status in world.pool.status()} == {"stopped"}


def test_an_engine_that_dies_in_its_sleep_comes_back_only_when_wanted() -> None:
    world = World("a", may_move=("a",))

    async def script() -> None:
        world.pool.transit("a", "resident")
        await settle(world, "a", "up")
        world.pool.transit("a", "asleep")
        await asyncio.sleep(3)
        world.made["a"][0].die()
        await asyncio.sleep(200)
        assert len(world.made["a"]) == 1
        world.pool.transit("a", "resident")
        await settle(world, "a", "up")

    world.run(script)
    assert len(world.made["a"]) == 2


def test_an_engine_that_is_sent_off_while_it_restarts_never_says_that_it_is_up() -> None:
    world = World("a", may_move=("a",), start_s=3.0)

    async def script() -> None:
        world.pool.transit("a", "resident")
        await settle(world, "a", "up")
        world.made["a"][0].die()
        await settle(world, "a", "starting")
        await asyncio.sleep(1)
        world.pool.transit("a", "asleep")
        await settle(world, "a", "asleep")
        await asyncio.sleep(2)

    world.run(script)
    assert [report[0] for report in world.sink.of("starting", "up", "lost", "asleep")] == [
        "starting", "up", "lost", "starting", "asleep",
    ]  # fmt: skip
