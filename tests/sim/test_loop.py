"""The virtual loop: time jumps, one seed is one story, other seeds and hash seeds tell what they must."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Coroutine
from pathlib import Path
from random import Random
from typing import Any

import pytest

from msd.sim.loop import START_S, ForbiddenError, LivelockError, SimLoop, StalledError

REPOSITORY = Path(__file__).resolve().parents[2]


def run(main: Coroutine[Any, Any, Any], seed: int = 0, **options: int) -> Any:
    return SimLoop(Random(seed), **options).run(main)


def test_time_jumps_to_the_next_timer_and_timers_fire_in_order() -> None:
    async def main() -> list[tuple[float, str]]:
        loop = asyncio.get_running_loop()
        seen: list[tuple[float, str]] = []

        def note(delay: float) -> None:
            seen.append((loop.time() - START_S, f"{delay}"))

        for delay in (30.0, 10.0, 20.0):
            loop.call_later(delay, note, delay)
        loop.call_later(15.0, seen.append, (0.0, "never")).cancel()
        await asyncio.sleep(3_600)
        return seen

    before = time.monotonic()
    assert run(main()) == [(10.0, "10.0"), (20.0, "20.0"), (30.0, "30.0")]
    assert time.monotonic() - before < 1


def order_of_twenty(seed: int) -> list[int]:
    async def main() -> list[int]:
        seen: list[int] = []
        for i in range(20):
            asyncio.get_running_loop().call_soon(seen.append, i)
        await asyncio.sleep(1)
        return seen

    return run(main(), seed)  # type: ignore[no-any-return]


def test_ready_callbacks_come_in_an_order_that_the_seed_decides() -> None:
    orders = [tuple(order_of_twenty(seed)) for seed in range(5)]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len(set(orders)) == 5
    assert order_of_twenty(3) == list(orders[3])


STORY = """
import asyncio
from random import Random
from msd.sim.loop import SimLoop

async def main():
    story = []
    async def child(i):
        try:
            await asyncio.sleep(i % 3)
            if i == 10:
                raise ValueError("one fails, the others are cancelled")
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            story.append(i)
            raise
    try:
        async with asyncio.TaskGroup() as group:
            for i in range(40):
                group.create_task(child(i))
    except ExceptionGroup:
        pass
    done, pending = await asyncio.wait({asyncio.ensure_future(asyncio.sleep(i % 2, i)) for i in range(20)}, timeout=0.5)
    story += [t.result() for t in done]
    for task in pending:
        task.cancel()
    await asyncio.wait(pending)
    return story + [asyncio.get_running_loop().time()]

junk = [object() for _ in range(int(__import__("os").environ["JUNK"]))]  # shifts addresses
print(SimLoop(Random(7)).run(main()))
"""


def test_one_seed_is_one_story_under_any_hash_seed_and_memory_layout() -> None:
    """TaskGroup cancels from a set and asyncio.wait answers with sets: with plain tasks the addresses decide."""

    def tell(hash_seed: str, junk: str) -> str:
        env = {**os.environ, "PYTHONHASHSEED": hash_seed, "JUNK": junk, "PYTHONPATH": str(REPOSITORY)}
        command = [sys.executable, "-c", STORY]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    stories = {tell("1", "10"), tell("2", "5000"), tell("31337", "77777")}
    assert len(stories) == 1
    assert stories.pop().count(",") == 40 - 1 + 10 + 0


def test_taskgroup_cancels_in_an_order_that_repeats_within_one_process() -> None:
    async def main() -> list[int]:
        order: list[int] = []

        async def child(i: int) -> None:
            try:
                await asyncio.sleep(100)
            finally:
                order.append(i)

        async def fail() -> None:
            await asyncio.sleep(1)
            raise ValueError

        try:
            async with asyncio.TaskGroup() as group:
                for i in range(50):
                    group.create_task(child(i))
                group.create_task(fail())
        except* ValueError:
            order.append(-1)
        return order

    ballast = []
    orders = []
    for _ in range(4):
        orders.append(run(main(), seed=5))
        ballast.append([object() for _ in range(1_000)])
    assert orders[0] == orders[1] == orders[2] == orders[3]


def test_a_livelock_at_one_instant_is_found() -> None:
    async def main() -> None:
        while True:  # noqa: ASYNC110 - the loop that is looked for
            await asyncio.sleep(0)

    with pytest.raises(LivelockError, match="time does not move"):
        run(main())


def test_an_endless_story_is_cut_off() -> None:
    async def main() -> None:
        while True:  # noqa: ASYNC110 - the loop that is looked for
            await asyncio.sleep(1)

    with pytest.raises(LivelockError, match="more than 1000 steps"):
        run(main(), max_steps=1_000)


def test_a_wait_that_nothing_ends_is_found() -> None:
    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(StalledError):
        run(main())


def test_an_exception_that_production_would_only_log_ends_the_simulation() -> None:
    async def main() -> None:
        asyncio.get_running_loop().call_soon(lambda: 1 // 0)
        await asyncio.sleep(1)

    with pytest.raises(ZeroDivisionError):
        run(main())


def test_a_task_whose_error_nobody_hears_ends_the_simulation() -> None:
    async def main() -> None:
        async def fail() -> None:
            raise ValueError("unheard")

        task = asyncio.get_running_loop().create_task(fail())
        await asyncio.sleep(1)
        del task
        await asyncio.sleep(1)

    with pytest.raises(ValueError, match="unheard"):
        run(main())


def test_a_generator_left_to_the_collector_is_found() -> None:
    async def main() -> None:
        async def numbers() -> AsyncGenerator[int]:
            yield 1
            yield 2

        async for _ in numbers():
            break
        await asyncio.sleep(1)

    with pytest.raises(ForbiddenError, match="numbers"):
        run(main())


def test_threads_and_sockets_are_refused() -> None:
    async def to_thread() -> None:
        await asyncio.to_thread(print)

    async def connect() -> None:
        await asyncio.open_connection("127.0.0.1", 1)

    async def receive() -> None:
        left, right = socket.socketpair()
        with left, right:
            await asyncio.get_running_loop().sock_recv(left, 1)

    async def second_thread() -> None:
        loop = asyncio.get_running_loop()
        refused: list[BaseException] = []

        def reach_in() -> None:
            try:
                loop.call_soon_threadsafe(print)
            except ForbiddenError as error:
                refused.append(error)

        thread = threading.Thread(target=reach_in)
        thread.start()
        thread.join()
        raise refused[0]

    for main, expected in (
        (to_thread, ForbiddenError),
        (connect, NotImplementedError),
        (receive, NotImplementedError),
        (second_thread, ForbiddenError),
    ):
        with pytest.raises(expected):
            run(main())


def test_many_cancelled_timers_are_dropped() -> None:
    async def main() -> int:
        loop = asyncio.get_running_loop()
        for _ in range(5_000):
            loop.call_later(1_000, print).cancel()
        await asyncio.sleep(1)
        assert isinstance(loop, SimLoop)
        return len(loop._timers)

    assert run(main()) <= 200
