"""Shadows end to end inside one process: dispatcher, pool, journal and core on engines that answer exactly."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from random import Random

from structlog.testing import capture_logs

from msd import tasks
from msd.clock import MonotonicClock
from msd.config import JournalConfig
from msd.core import events as e
from msd.core.scheduler import Scheduler
from msd.dispatch import Dispatcher
from msd.domain import Chunk, EngineInfo, EngineLoad, ExitKind, Prompt
from msd.egress import Egress
from msd.engine.pool import Pool
from msd.gate import Withdrawal
from msd.ingress.accept import Acceptor
from msd.journal.memory import MemoryJournal
from msd.sim.faults import InlineOffload
from msd.wire import Delta, Done, Error, ModeHint, SamplingFields, ServerMessage, Submit
from tests.unit.core_world import gate_of, make_config
from tests.unit.test_quality import TOKENIZER

PASSED = gate_of({"m1": {"copy": "certified", "*": "certified"}})


class Solver:
    """Knows every answer, and gives a wrong one with a probability. Where `slow`, it never comes to an end."""

    simulated = True

    def __init__(self, name: str, wrong_share: float = 0.0, *, slow: Callable[[], bool] = lambda: False) -> None:
        self.name = name
        self.asked: list[str] = []
        self._wrong_share = wrong_share
        self._slow = slow
        self._rng = Random(name)

    async def start(self) -> EngineInfo:
        return EngineInfo(engine=self.name, max_model_len=512, max_num_seqs=4, kv_capacity_tokens=10_000)

    async def generate(self, request_id: str, prompt: Prompt, max_tokens: int, priority: int) -> AsyncGenerator[Chunk]:
        self.asked.append(request_id)
        await asyncio.sleep(0)
        if self._slow():
            await asyncio.sleep(3_600)
        solved = tasks.solve(TOKENIZER.decode(prompt.token_ids))
        text = "x" if solved is None else solved[1]
        if self._rng.random() < self._wrong_share:
            text = "wrong"
        yield Chunk(TOKENIZER.encode(text)[1:], text, "stop")

    def load(self) -> EngineLoad:
        return EngineLoad()

    async def lost(self) -> tuple[ExitKind, str]:
        await asyncio.sleep(3_600)
        raise AssertionError

    async def stop(self) -> None:
        pass


class Producer:
    """A session that waits for one answer after another."""

    tenant = "local"
    closed = False
    submit_credit = 1_000_000

    def __init__(self) -> None:
        self.answers: asyncio.Queue[Done | Error] = asyncio.Queue()

    def send(self, message: ServerMessage) -> None:
        if isinstance(message, Done | Error):
            self.answers.put_nowait(message)

    def send_delta(self, delta: Delta) -> bool:
        return True


class House:
    """The parts, put together as the daemon does it."""

    def __init__(self, tasks_: asyncio.TaskGroup, engines: list[Solver]) -> None:
        told: dict[str, object] = {"shadow_share": 1.0}
        config = make_config(slots=4, engines={"m1": {"precision": "int8"}}, quality=told)
        clock = MonotonicClock()
        journal = MemoryJournal(JournalConfig(), clock)
        self.scheduler = Scheduler.from_config(config, Random(1), gate=PASSED, recipes={"m0": "m0", "m1": "m1"})
        self.withdrawn: list[Withdrawal] = []
        self.dispatcher = Dispatcher(
            self.scheduler,
            journal,
            Egress(asyncio.get_running_loop(), config.limits),
            Acceptor(epoch="e", models={"toy": TOKENIZER}, offload=InlineOffload()),
            clock,
            tasks_,
            dict,
            on_withdrawn=self.withdrawn.append,
        )
        factories = {engine.name: (lambda engine=engine: engine) for engine in engines}
        self.pool = Pool(factories, self.dispatcher, self.dispatcher.read_prompt, Random(1), clock)
        self.dispatcher.attach(self.pool)
        self.journal = journal
        self.session = Producer()
        self._num_sent = 0

    async def ask(self, prompt: str, mode: str = "m1", temperature: float | None = 0.0) -> Done | Error:
        """Send one request to that mode and wait for its answer."""
        self._num_sent += 1
        submit = Submit(
            client_request_id=f"c{self._num_sent}",
            prompt=prompt,
            max_tokens=20,
            task="copy",
            mode_hint=ModeHint(mode=mode, strict=True),
            sampling=SamplingFields(temperature=temperature),
        )
        self.dispatcher.submit(submit, self.session)
        return await self.session.answers.get()

    async def quiet(self) -> None:
        """Until no shadow is under way."""
        for _ in range(1_000):
            if not self.scheduler.shadows.num_running:
                return
            await asyncio.sleep(0.001)
        raise AssertionError("shadows do not end")


def live(engines: list[Solver], scenario: Callable[[House], object]) -> House:
    """Run a scenario over these engines, all warm."""

    async def run() -> House:
        async with asyncio.TaskGroup() as group:
            house = House(group, engines)
            await house.journal.start(house.dispatcher)
            running = group.create_task(house.pool.run())
            while len(house.scheduler.fleet.resident()) < len(engines):  # noqa: ASYNC110 - they set no event
                await asyncio.sleep(0.001)
            await scenario(house)  # type: ignore[misc]
            await house.pool.stop(5.0)
            await running
        return house

    return asyncio.run(run())


def question(number: int) -> str:
    return tasks.generate("copy", 2, number).prompt


def test_an_equal_mode_is_compared_and_keeps_its_certificate() -> None:
    reference = Solver("m0")

    async def scenario(house: House) -> None:
        for number in range(100):
            done = await house.ask(question(number))
            assert isinstance(done, Done)
            assert done.mode == "m1"
            await house.quiet()

    house = live([reference, Solver("m1")], scenario)
    trial = house.scheduler.shadows.trial(1, "copy")
    assert trial is not None
    assert (trial.num_unscored, trial.num_scored, trial.sum_difference) == (0, 100, 0)
    assert len(reference.asked) == 100
    assert house.scheduler.counts.submitted == house.scheduler.counts.delivered == 100
    assert not house.withdrawn


def test_a_mode_that_answers_worse_loses_its_certificate() -> None:
    refused: list[Error] = []

    async def scenario(house: House) -> None:
        for number in range(2_000):
            done = await house.ask(question(number))
            if isinstance(done, Error):
                refused.append(done)
                return
            await house.quiet()

    with capture_logs() as logged:
        house = live([Solver("m0"), Solver("m1", wrong_share=0.1)], scenario)
    assert refused[0].code == "quality_unreachable"
    assert "withdrawn in production on copy" in refused[0].message
    assert [(gone.mode, gone.task) for gone in house.withdrawn] == [("m1", "copy")]
    told = next(line for line in logged if line["event"] == "certificate_withdrawn")
    assert told["difference"] < -0.03
    assert told["capital"] >= 20


def test_sampled_answers_are_not_compared() -> None:
    reference = Solver("m0")

    async def scenario(house: House) -> None:
        for number, temperature in enumerate((None, 0.7)):
            await house.ask(question(number), temperature=temperature)
            await house.quiet()

    house = live([reference, Solver("m1")], scenario)
    assert not reference.asked
    assert house.scheduler.shadows.num_came_to_nothing == 2


def test_answers_without_an_exact_answer_are_compared_with_each_other() -> None:
    async def scenario(house: House) -> None:
        for number in range(20):
            await house.ask(f"tell me story {number}")
            await house.quiet()

    house = live([Solver("m0"), Solver("m1")], scenario)
    trial = house.scheduler.shadows.trial(1, "copy")
    assert trial is not None
    assert (trial.num_unscored, trial.num_scored, trial.num_disagree) == (20, 0, 0)


def test_a_shadow_is_broken_off_and_tells_nothing_when_the_daemon_stops() -> None:
    async def scenario(house: House) -> None:
        done = await house.ask(question(1))
        assert isinstance(done, Done), "the answer does not wait for its shadow"
        assert house.scheduler.shadows.num_running == 1
        now_us = MonotonicClock().now_us()
        house.dispatcher.post(e.Draining(now_us, now_us))
        await house.quiet()

    house = live([Solver("m0", slow=lambda: True), Solver("m1")], scenario)
    assert house.scheduler.shadows.trial(1, "copy") is None
    assert house.scheduler.shadows.num_came_to_nothing == 1
    assert house.dispatcher.idle.is_set()
