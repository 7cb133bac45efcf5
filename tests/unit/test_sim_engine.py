"""The simulated engine's model, in virtual time: what a step costs, sharing, jumps, memory, energy, faults."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import pairwise
from random import Random
from typing import Any

import pytest

from msd.config import EngineConfig, SimEngineConfig
from msd.domain import Prompt, Sampling
from msd.engine.sim import SimEngine
from msd.errors import EngineStartError, RequestRefusedByEngineError
from msd.simgpu import SimGpu
from tests.virtual_time import VirtualClock, run_virtual

MODEL: dict[str, Any] = {
    "step_ms": 8.0, "prefill_ms_per_token": 0.05, "decode_ms_per_request": 0.3, "start_s": 1.0, "weights_bytes": 10,
}  # fmt: skip


class World:
    """Simulated engines on one GPU, and when each request's tokens came (ms after the start of the script)."""

    def __init__(
        self,
        names: str = "a",
        *,
        emit_interval_ms: float = 20.0,
        max_num_seqs: int = 8,
        prefix_caching: bool = False,
        **sim: Any,
    ) -> None:
        self.clock = VirtualClock()
        self.gpu = SimGpu(memory_bytes=1_000, idle_w=75.0, rng=Random(0))
        model = SimEngineConfig(**(MODEL | sim))
        self.engines = {
            name: SimEngine(
                EngineConfig(
                    name=name, model="m", kind="sim", max_num_seqs=max_num_seqs, sim=model,
                    prefix_caching=prefix_caching,
                ),
                self.gpu, self.clock, Random(1), emit_interval_ms=emit_interval_ms,
            )
            for name in names
        }  # fmt: skip
        self.arrivals: dict[str, list[tuple[float, int]]] = {}
        self.reasons: dict[str, str | None] = {}
        self.cached: dict[str, int] = {}
        self.texts: dict[str, str] = {}
        self.began_us = 0

    @property
    def now_ms(self) -> float:
        return (self.clock.now_us() - self.began_us) / 1_000

    async def ask(
        self,
        request_id: str,
        num_tokens: int,
        *,
        engine: str = "a",
        num_prompt_tokens: int = 100,
        first_id: int = 0,
        **sampling: Any,
    ) -> None:
        token_ids = tuple(range(first_id, first_id + num_prompt_tokens))
        prompt = Prompt(token_ids=token_ids, sampling=Sampling(**sampling))
        self.arrivals[request_id] = []
        async for chunk in self.engines[engine].generate(request_id, prompt, num_tokens, 0):
            self.arrivals[request_id].append((self.now_ms, len(chunk.token_ids)))
            self.cached.setdefault(request_id, chunk.num_cached_tokens)
            self.texts[request_id] = self.texts.get(request_id, "") + chunk.text
            self.reasons[request_id] = chunk.finish_reason

    def first_ms(self, request_id: str) -> float:
        return self.arrivals[request_id][0][0]

    def last_ms(self, request_id: str) -> float:
        return self.arrivals[request_id][-1][0]

    def run(self, script: Callable[[], Awaitable[Any]]) -> None:
        async def main() -> None:
            for engine in self.engines.values():
                await engine.start()
            self.began_us = self.clock.now_us()
            await script()
            for engine in self.engines.values():
                await engine.stop()

        run_virtual(main(), self.clock)


def test_a_request_alone_takes_what_the_model_says() -> None:
    world = World()
    world.run(lambda: world.ask("r", 11))
    assert world.first_ms("r") == pytest.approx(8.0 + 100 * 0.05 + 0.3, abs=0.01)
    assert world.last_ms("r") == pytest.approx(13.3 + 10 * 8.3, abs=0.05)
    assert sum(count for _, count in world.arrivals["r"]) == 11


def test_a_batch_shares_the_fixed_part_of_the_step() -> None:
    world = World()
    world.run(lambda: asyncio.gather(*(world.ask(f"r{index}", 101) for index in range(4))))
    # The first begins alone, the other three join at its step's end; then 100 steps of 8 + 4 * 0.3 ms.
    assert world.last_ms("r3") == pytest.approx(13.3 + (8 + 15 + 1.2) + 100 * 9.2, rel=0.01)


def test_a_second_engine_halves_the_speed_while_it_is_busy() -> None:
    world = World("ab")
    world.run(lambda: asyncio.gather(world.ask("long", 201), world.ask("short", 101, engine="b")))
    alone_ms = 13.3 + 100 * 8.3
    assert world.last_ms("short") == pytest.approx(2 * alone_ms, rel=0.01)
    assert world.last_ms("long") == pytest.approx(2 * alone_ms + 100 * 8.3, rel=0.01)


@pytest.mark.parametrize("emit_interval_ms", [20.0, 1_000.0])
def test_jumping_over_steps_changes_no_result(emit_interval_ms: float) -> None:
    """Arrivals and an abort in the middle of jumps: every request ends when it would, taken step by step."""

    def ends(interval_ms: float) -> dict[str, float]:
        world = World("ab", emit_interval_ms=interval_ms, max_num_seqs=3, tokens_per_step=1.5)

        async def script() -> None:
            async with asyncio.TaskGroup() as group:
                rng = Random(5)
                for index in range(12):
                    name = rng.choice("ab")
                    task = group.create_task(world.ask(f"r{index}", rng.randint(1, 90), engine=name))
                    if index == 4:
                        asyncio.get_running_loop().call_later(0.1234, task.cancel)
                    await asyncio.sleep(rng.random() / 5)

        world.run(script)
        return {request_id: world.last_ms(request_id) for request_id in world.arrivals if request_id != "r4"}

    stepwise = ends(0.001)
    assert len(stepwise) == 11
    assert ends(emit_interval_ms) == pytest.approx(stepwise, abs=1.0)


def test_deltas_come_at_most_every_interval_but_the_first_token_at_once() -> None:
    world = World(emit_interval_ms=50.0)
    world.run(lambda: asyncio.gather(world.ask("r", 200), world.ask("s", 200)))
    times = [time_ms for time_ms, _ in world.arrivals["r"]]
    assert all(later - earlier >= 49.0 for earlier, later in pairwise(times[1:-1]))
    assert world.arrivals["r"][0][1] == 1
    assert len(times) < 50


def test_slots_and_kv_cache_bound_what_runs() -> None:
    world = World(max_num_seqs=2, kv_capacity_tokens=1_000)

    async def script() -> None:
        async with asyncio.TaskGroup() as group:
            for index in range(3):
                group.create_task(world.ask(f"r{index}", 400))
            await asyncio.sleep(0.1)
            load = world.engines["a"].load()
            assert (load.num_running, load.num_waiting) == (2, 1)
            assert load.kv_usage == 1.0
        with pytest.raises(RequestRefusedByEngineError, match="never fit"):
            await world.ask("big", 2_000)
        assert world.engines["a"].load().kv_usage == 0.0

    world.run(script)
    assert world.first_ms("r2") > world.last_ms("r0")


def test_an_engine_refuses_more_than_its_queue_holds() -> None:
    world = World(max_num_seqs=1)

    async def script() -> None:
        answers = await asyncio.gather(*(world.ask(f"r{index}", 5) for index in range(6)), return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, RequestRefusedByEngineError)]
        assert len(refused) == 3
        assert {answer.error_code for answer in refused} == {"queue_full"}

    world.run(script)


def test_weights_that_do_not_fit_fail_the_start_and_say_so() -> None:
    world = World("ab", weights_bytes=600)
    with pytest.raises(EngineStartError, match="out of memory") as caught:
        world.run(lambda: asyncio.sleep(0))
    assert caught.value.last_lines


def test_energy_is_what_the_work_cost_plus_idle_power() -> None:
    world = World(step_mj=2_000.0, prefill_mj_per_token=10.0, decode_mj_per_token=95.0)
    world.run(lambda: asyncio.gather(*(world.ask(f"r{index}", 101) for index in range(4))))
    now_us = world.clock.now_us()
    dynamic_mj = world.gpu.true_energy_mj(now_us) - 75.0 * now_us / 1_000
    expected = 102 * 2_000 + 4 * 100 * 10 + 4 * 101 * 95
    assert dynamic_mj == pytest.approx(expected, rel=0.02)


def test_output_depends_on_prompt_and_seed_only() -> None:
    def answer(**sampling: Any) -> tuple[str, str | None, int]:
        world = World(output_tokens=20)
        world.run(lambda: world.ask("r", 500, **sampling))
        return world.texts["r"], world.reasons["r"], sum(count for _, count in world.arrivals["r"])

    assert answer(seed=1) == answer(seed=1)
    assert answer(seed=1)[0] != answer(seed=2)[0]
    assert answer(seed=1)[1] == "stop"
    assert answer(seed=1, ignore_eos=True)[1:] == ("length", 500)
    lengths = [answer(seed=seed)[2] for seed in range(200)]
    assert 15 < sum(lengths) / len(lengths) < 26


def test_a_hung_engine_looks_healthy_and_can_be_stopped() -> None:
    world = World()

    async def script() -> None:
        asking = asyncio.create_task(world.ask("r", 500))
        await asyncio.sleep(0.5)
        world.engines["a"].hang()
        await asyncio.sleep(0.1)
        num_tokens = sum(count for _, count in world.arrivals["r"])
        await asyncio.sleep(60)
        assert sum(count for _, count in world.arrivals["r"]) == num_tokens
        assert world.engines["a"].load().num_running == 1
        assert world.gpu.view(world.clock.now_us()).power_instant_w == 75.0
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert world.engines["a"].load().num_running == 0

    world.run(script)


# --- prefix caching --------------------------------------------------------------------------------------------------


def one_after_another(world: World, *asked: tuple[str, int, int]) -> None:
    """Ask for one token of prompts (name, tokens, first id), each when the one before has its answer."""

    async def script() -> None:
        for name, num_prompt_tokens, first_id in asked:
            before_ms = world.now_ms
            await world.ask(name, 1, num_prompt_tokens=num_prompt_tokens, first_id=first_id)
            world.arrivals[name] = [(world.now_ms - before_ms, 1)]

    world.run(script)


def test_a_prefix_that_was_computed_costs_no_prefill_again() -> None:
    world = World(prefix_caching=True, prefill_mj_per_token=10.0, step_mj=0.0, decode_mj_per_token=0.0)
    one_after_another(world, ("first", 1_000, 0), ("again", 1_000, 0), ("longer", 1_100, 0), ("other", 1_000, 7))
    assert world.cached == {"first": 0, "again": 992, "longer": 992, "other": 0}
    assert world.first_ms("first") == pytest.approx(8.3 + 1_000 * 0.05, abs=0.01)
    assert world.first_ms("again") == pytest.approx(8.3 + 8 * 0.05, abs=0.01)
    assert world.first_ms("longer") == pytest.approx(8.3 + 108 * 0.05, abs=0.01)
    now_us = world.clock.now_us()
    dynamic_mj = world.gpu.true_energy_mj(now_us) - 75.0 * now_us / 1_000
    assert dynamic_mj == pytest.approx((1_000 + 8 + 108 + 1_000) * 10, rel=0.05)


def test_the_last_token_is_always_computed_and_partial_blocks_are_not_kept() -> None:
    world = World(prefix_caching=True)
    one_after_another(world, ("first", 96, 0), ("again", 96, 0), ("short", 15, 0), ("again short", 15, 0))
    assert world.cached == {"first": 0, "again": 80, "short": 0, "again short": 0}


def test_without_prefix_caching_everything_is_computed() -> None:
    world = World()
    one_after_another(world, ("first", 1_000, 0), ("again", 1_000, 0))
    assert world.cached == {"first": 0, "again": 0}
    assert world.first_ms("again") == pytest.approx(world.first_ms("first"), abs=0.01)


def test_the_cache_is_as_large_as_the_kv_cache_and_drops_what_was_used_least_recently() -> None:
    world = World(prefix_caching=True, kv_capacity_tokens=3_200)
    one_after_another(
        world,
        ("a", 1_601, 0), ("b", 1_601, 10_000), ("a again", 1_601, 0),
        ("c", 801, 20_000), ("a once more", 1_601, 0), ("b again", 1_601, 10_000),
    )  # fmt: skip
    assert world.cached["a again"] == 1_600
    assert world.cached["a once more"] == 1_600
    # The tail of `b` made room for `c`, its head is still there.
    assert world.cached["b again"] == 800


def test_requests_of_one_step_do_not_find_each_other() -> None:
    world = World(prefix_caching=True)

    async def script() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(world.ask("busy", 50, first_id=50_000))
            await asyncio.sleep(0.1)
            for name in ("one", "two"):
                group.create_task(world.ask(name, 1, num_prompt_tokens=500))
            await asyncio.sleep(0.1)
            group.create_task(world.ask("later", 1, num_prompt_tokens=500))

    world.run(script)
    assert world.first_ms("one") == world.first_ms("two")
    assert (world.cached["one"], world.cached["two"], world.cached["later"]) == (0, 0, 496)
