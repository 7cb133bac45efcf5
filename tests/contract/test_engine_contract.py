"""What every engine promises, on the no-op, the simulated and (marked e2e) the real one.

The real engine has one slot, so that "the slot is free again" can only be true if a next request runs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from random import Random

import pytest

from msd.config import EngineConfig, SimEngineConfig
from msd.domain import Chunk, EngineInfo, EngineLoad, ExitKind, Prompt, Sampling
from msd.engine.noop import NoopEngine
from msd.engine.sim import SimEngine
from msd.errors import EngineError, EngineLostError, RequestRefusedByEngineError
from msd.ports import Engine
from msd.simgpu import SimGpu

ROOT = Path(__file__).parents[2]
PROMPT_IDS = tuple(5 + index % 60 for index in range(20))
STEADY = Sampling(ignore_eos=True, temperature=0.0)
Make = Callable[[], Engine]
Case = Callable[[Engine, EngineInfo], Awaitable[None]]


class RealClock:
    def now_us(self) -> int:
        return time.monotonic_ns() // 1_000


def make_noop(tmp_path: Path) -> Engine:
    return NoopEngine(EngineConfig(name="noop", model="m", kind="noop", max_num_seqs=1, args={"num_chunks": 5}))


def make_sim(tmp_path: Path) -> Engine:
    sim = SimEngineConfig(step_ms=2.0, prefill_ms_per_token=0.01, decode_ms_per_request=0.1, start_s=0.01)
    clock = RealClock()
    gpu = SimGpu(memory_bytes=10**10, idle_w=75.0, rng=Random(0), now_us=clock.now_us())
    return SimEngine(EngineConfig(name="sim", model="m", kind="sim", max_num_seqs=1, sim=sim), gpu, clock, Random(0))


def make_vllm(tmp_path: Path) -> Engine:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from msd.engine.vllm import VllmEngine, import_vllm

    import_vllm()
    args: dict[str, object] = {"enforce_eager": True, "max_model_len": 256, "kv_cache_memory_bytes": 64 * 1024 * 1024}
    config = EngineConfig(name="tiny", model="tiny-small", max_num_seqs=1, args=args)
    return VllmEngine(config, ROOT / "testbed/models/tiny-small", ROOT, tmp_path)


MAKERS = {"noop": make_noop, "sim": make_sim, "vllm": make_vllm}


@asynccontextmanager
async def started(engine: Engine) -> AsyncIterator[EngineInfo]:
    try:
        yield await engine.start()
    finally:
        await engine.stop()


async def collect(engine: Engine, request_id: str, prompt: Prompt, max_tokens: int) -> list[Chunk]:
    async with aclosing(engine.generate(request_id, prompt, max_tokens, 0)) as chunks:
        return [chunk async for chunk in chunks]


async def wait_until(condition: Callable[[], bool], within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.005)
    return True


@pytest.fixture
def make(kind: str, tmp_path: Path) -> Make:
    return lambda: MAKERS[kind](tmp_path)


async def streams_in_order_to_the_length_asked_for(engine: Engine, info: EngineInfo) -> None:
    chunks = await collect(engine, "r", Prompt(token_ids=PROMPT_IDS, sampling=STEADY), 40)
    assert sum(len(chunk.token_ids) for chunk in chunks) == 40
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == "length"
    assert len(chunks) > 1, "deltas, not one lump"
    assert all(type(chunk.token_ids) is tuple for chunk in chunks)
    again = await collect(engine, "r2", Prompt(token_ids=PROMPT_IDS, sampling=STEADY), 40)
    assert "".join(chunk.text for chunk in again) == "".join(chunk.text for chunk in chunks)
    first = await collect(engine, "r3", Prompt(token_ids=PROMPT_IDS, sampling=STEADY), 1)
    assert [len(chunk.token_ids) for chunk in first] == [1]
    assert first[0].finish_reason == "length"


async def honours_a_stop_string(engine: Engine, info: EngineInfo) -> None:
    if isinstance(engine, NoopEngine):
        return  # it honours no sampling parameter at all
    whole = await collect(engine, "r", Prompt(token_ids=PROMPT_IDS, sampling=STEADY), 40)
    text = "".join(chunk.text for chunk in whole)
    word = text[len(text) // 2 :][:2]
    sampling = Sampling(ignore_eos=True, temperature=0.0, stop=(word,))
    chunks = await collect(engine, "s", Prompt(token_ids=PROMPT_IDS, sampling=sampling), 40)
    assert chunks[-1].finish_reason == "stop"
    assert "".join(chunk.text for chunk in chunks) == text[: text.index(word)]


async def closing_frees_the_slot_at_once(engine: Engine, info: EngineInfo) -> None:
    before = engine.load()
    for index in range(3):
        stream = engine.generate(f"c{index}", Prompt(token_ids=PROMPT_IDS, sampling=STEADY), 200, 0)
        async with aclosing(stream):
            async for _ in stream:
                assert engine.load().num_running == 1
                break
        assert await wait_until(lambda: engine.load() == before, 0.1)
    chunks = await collect(engine, "after", Prompt(token_ids=PROMPT_IDS, sampling=STEADY), 3)
    assert chunks[-1].finish_reason == "length"


async def cancelling_the_reader_frees_the_slot(engine: Engine, info: EngineInfo) -> None:
    before = engine.load()
    reader = asyncio.create_task(collect(engine, "c", Prompt(token_ids=PROMPT_IDS, sampling=STEADY), 200))
    if not isinstance(engine, NoopEngine):
        assert await wait_until(lambda: engine.load().num_running == 1, 5.0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert await wait_until(lambda: engine.load() == before, 0.1)
    await collect(engine, "after", Prompt(token_ids=PROMPT_IDS, sampling=STEADY), 3)


async def refuses_a_prompt_that_is_too_long_and_says_both_lengths(engine: Engine, info: EngineInfo) -> None:
    too_long = Prompt(token_ids=(5,) * (info.max_model_len + 1))
    with pytest.raises(RequestRefusedByEngineError, match=str(info.max_model_len + 1)) as caught:
        await collect(engine, "long", too_long, 4)
    assert caught.value.error_code == "context_overflow"
    assert str(info.max_model_len - 1) in str(caught.value)
    assert engine.load() == EngineLoad()
    # Room for two tokens: the answer is cut at the context, and says so.
    tight = Prompt(token_ids=(5,) * (info.max_model_len - 2), sampling=STEADY)
    chunks = await collect(engine, "tight", tight, 50)
    assert sum(len(chunk.token_ids) for chunk in chunks) == 2
    assert chunks[-1].finish_reason == "length"


async def tells_about_itself(engine: Engine, info: EngineInfo) -> None:
    assert info.engine == engine.name
    assert info.max_num_seqs == 1
    assert info.kv_capacity_tokens >= info.max_model_len
    assert info.version
    if isinstance(engine, SimEngine):
        assert engine.simulated
    if not engine.simulated:
        assert info.pids
        assert info.idle_ttft_ms > 0
        assert info.idle_tpot_ms > 0


async def requests_beyond_the_slots_wait_inside_and_finish(engine: Engine, info: EngineInfo) -> None:
    prompt = Prompt(token_ids=PROMPT_IDS, sampling=STEADY)
    lots = await asyncio.gather(*(collect(engine, f"q{index}", prompt, 8) for index in range(2)))
    assert all(chunks[-1].finish_reason == "length" for chunks in lots)
    assert await wait_until(lambda: engine.load() == EngineLoad(), 0.5)


CASES: list[Case] = [
    tells_about_itself,
    streams_in_order_to_the_length_asked_for,
    honours_a_stop_string,
    closing_frees_the_slot_at_once,
    cancelling_the_reader_frees_the_slot,
    requests_beyond_the_slots_wait_inside_and_finish,
    refuses_a_prompt_that_is_too_long_and_says_both_lengths,
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("kind", ["noop", "sim"])
def test_engine(case: Case, make: Make) -> None:
    async def main() -> None:
        engine = make()
        async with started(engine) as info:
            await case(engine, info)

    asyncio.run(main())


@pytest.mark.e2e
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["vllm"])
def test_real_engine(make: Make) -> None:
    """All cases on one live engine: a start takes 10 to 50 s."""

    async def main() -> None:
        engine = make()
        async with started(engine) as info:
            for case in CASES:
                await case(engine, info)
            # Without `residency = "auto"`, and on a CPU, vLLM has no sleep: the pool stops such an engine instead.
            assert not info.can_sleep

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["noop", "sim"])
def test_stop_is_idempotent_and_works_before_start(make: Make) -> None:
    async def main() -> None:
        engine = make()
        await engine.stop()
        await engine.stop()
        engine = make()
        await engine.start()
        await engine.stop()
        await engine.stop()

    asyncio.run(main())


async def greedy(engine: Engine, request_id: str) -> tuple[int, ...]:
    chunks = await collect(engine, request_id, Prompt(token_ids=PROMPT_IDS, sampling=STEADY), 12)
    return tuple(token_id for chunk in chunks for token_id in chunk.token_ids)


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("kind", ["noop", "sim"])
def test_an_engine_that_slept_answers_as_before(make: Make, level: int) -> None:
    async def main() -> None:
        engine = make()
        async with started(engine) as info:
            assert info.can_sleep
            before = await greedy(engine, "before")
            await engine.sleep(level)
            await engine.wake()
            assert await greedy(engine, "after") == before
            await engine.sleep(level)  # and again, for good
        assert engine.load() == EngineLoad()

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["sim"])
def test_a_sleeping_engine_takes_no_requests_and_can_be_lost(make: Make) -> None:
    async def main() -> None:
        engine = make()
        assert isinstance(engine, SimEngine)
        await engine.start()
        lost = asyncio.create_task(engine.lost())
        await engine.sleep(1)
        with pytest.raises(EngineLostError, match="sleeps"):
            await greedy(engine, "r")
        engine.die(ExitKind.DIED, "killed in its sleep")
        assert (await lost)[1] == "killed in its sleep"
        with pytest.raises(EngineError):
            await engine.wake()
        await engine.stop()

    asyncio.run(main())


def test_a_simulated_engine_cannot_wake_where_others_have_taken_the_memory() -> None:
    async def main() -> None:
        clock = RealClock()
        gpu = SimGpu(memory_bytes=2_500_000_000, idle_w=75.0, rng=Random(0), now_us=clock.now_us())
        sim = SimEngineConfig(start_s=0.0, sleep_s=0.01, wake_s=0.01)
        engine = SimEngine(EngineConfig(name="s", model="m", kind="sim", sim=sim), gpu, clock, Random(0))
        await engine.start()
        await engine.sleep(1)
        assert gpu.memory_used_bytes == 0
        gpu.squeeze(1_000_000_000)
        with pytest.raises(EngineError, match="1500000000 bytes are free"):
            await engine.wake()
        gpu.squeeze(0)
        await engine.stop()
        assert gpu.memory_used_bytes == 0

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["sim"])
def test_a_lost_engine_ends_its_streams_and_says_so(make: Make) -> None:
    async def main() -> None:
        engine = make()
        assert isinstance(engine, SimEngine)
        await engine.start()
        lost = asyncio.create_task(engine.lost())
        prompt = Prompt(token_ids=PROMPT_IDS, sampling=STEADY)
        readers = [asyncio.create_task(collect(engine, f"r{index}", prompt, 2_000)) for index in range(2)]
        await asyncio.sleep(0.05)
        assert not lost.done()
        engine.die(ExitKind.DIED, "out of memory")
        assert await lost == (ExitKind.DIED, "out of memory")
        for reader in readers:
            with pytest.raises(EngineLostError, match="out of memory"):
                await reader
        with pytest.raises(EngineLostError):
            await collect(engine, "late", prompt, 1)
        await engine.stop()

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["sim"])
def test_streams_of_a_stopped_engine_raise(make: Make) -> None:
    async def main() -> None:
        engine = make()
        await engine.start()
        prompt = Prompt(token_ids=PROMPT_IDS, sampling=STEADY)
        reader = asyncio.create_task(collect(engine, "r", prompt, 2_000))
        await asyncio.sleep(0.05)
        await engine.stop()
        with pytest.raises(EngineLostError):
            await reader

    asyncio.run(main())
