"""Real vLLM engines on a CPU: what they start, where they listen, how they fail, and what they leave behind."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest

from msd.config import EngineConfig
from msd.domain import Chunk, EngineInfo, EngineLoad, ExitKind, FinishReason, Prompt, Sampling
from msd.engine import processes
from msd.engine.pool import Pool
from msd.engine.processes import ProcessId
from msd.errors import EngineStartError

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("ignore:Unclosed context:ResourceWarning"),
]
pytest.importorskip("vllm", reason="vLLM is not installed")

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "testbed/models/tiny-small"
ARGS: dict[str, object] = {"enforce_eager": True, "max_model_len": 256, "kv_cache_memory_bytes": 64 * 1024 * 1024}
PROMPT = Prompt(token_ids=tuple(5 + index % 60 for index in range(20)), sampling=Sampling(ignore_eos=True))
KILLED_DAEMON = """
import asyncio, sys
from pathlib import Path
from msd.config import EngineConfig
def main():
    from msd.engine.vllm import VllmEngine, import_vllm
    import_vllm()
    async def serve():
        args = {"enforce_eager": True, "max_model_len": 256, "kv_cache_memory_bytes": 64 * 1024 * 1024}
        folder = Path(sys.argv[2])
        engine = VllmEngine(EngineConfig(name="tiny", model="m", args=args), Path(sys.argv[1]), folder, folder)
        info = await engine.start()
        (folder / "up").write_text(" ".join(map(str, info.pids)))
        await asyncio.sleep(300)
    asyncio.run(serve())
if __name__ == "__main__":
    main()
"""


class Clock:
    def now_us(self) -> int:
        return time.monotonic_ns() // 1_000


class Sink:
    """Counts what the pool reports."""

    def __init__(self) -> None:
        self.reports: list[tuple[Any, ...]] = []
        self.num_tokens: dict[tuple[str, int], int] = {}
        self.lost_at = 0.0

    def on_chunk(self, request_id: str, attempt: int, chunk: Chunk) -> None:
        key = (request_id, attempt)
        self.num_tokens[key] = self.num_tokens.get(key, 0) + len(chunk.token_ids)

    def on_finished(self, request_id: str, attempt: int, finish_reason: FinishReason) -> None:
        self.reports.append(("finished", request_id, attempt, finish_reason))

    def on_failed(self, request_id: str, attempt: int, error_code: str, message: str, lost: bool) -> None:
        self.reports.append(("failed", request_id, attempt, error_code, lost))
        self.lost_at = self.lost_at or time.monotonic()

    def on_engine_starting(self, engine: str) -> None:
        self.reports.append(("starting", engine))

    def on_engine_up(self, info: EngineInfo) -> None:
        self.reports.append(("up", info.engine))

    def on_engine_lost(self, engine: str, kind: ExitKind, reason: str) -> None:
        self.reports.append(("lost", engine, kind))

    def on_engine_asleep(self, engine: str, residence: str, took_s: float) -> None:
        raise AssertionError(f"{engine} was not told to leave")

    def on_engine_stepped(self, engine: str, load: EngineLoad, progress: tuple[tuple[str, int], ...]) -> None:
        assert load.num_running <= 32

    def count(self, name: str) -> int:
        return sum(report[0] == name for report in self.reports)


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    from msd.engine.vllm import import_vllm

    import_vllm()


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """A start that failed inside vLLM leaves a ZeroMQ context to the collector; nothing of ours can reach it."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def make_engine(folder: Path, *, model: Path = MODEL, name: str = "tiny", **fields: Any) -> Any:
    from msd.engine.vllm import VllmEngine

    return VllmEngine(EngineConfig(name=name, model="m", **({"args": ARGS} | fields)), model, ROOT, folder)


def own_children() -> frozenset[ProcessId]:
    """Our descendants, but for multiprocessing's tracker, which lives as long as we do."""
    mine = processes.children_of(os.getpid())
    return frozenset(process for process in processes.tree_of(mine) if not is_tracker(process.pid))


def is_tracker(pid: int) -> bool:
    try:
        return "resource_tracker" in " ".join(psutil.Process(pid).cmdline())
    except psutil.NoSuchProcess:
        return True


async def until(condition: Callable[[], bool], within_s: float, what: str) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {within_s} s"
        await asyncio.sleep(0.02)


def outside_listeners(pids: list[int]) -> list[str]:
    """Listening sockets of these processes that are reachable from another machine."""
    found = []
    for pid in pids:
        for connection in psutil.Process(pid).net_connections(kind="inet"):
            address = str(connection.laddr[0])
            if connection.status == psutil.CONN_LISTEN and not address.startswith("127.") and address != "::1":
                found.append(f"{pid} on {connection.laddr}")
    return found


def test_a_killed_engine_core_is_noticed_replaced_and_its_requests_finish(tmp_path: Path) -> None:
    """Also: nobody listens beyond loopback, eight streams run at once, and stop leaves no process."""
    sink = Sink()
    before = own_children()

    async def read(request_id: str) -> Prompt:
        return PROMPT

    async def main() -> None:
        pool = Pool({"tiny": lambda: make_engine(tmp_path)}, sink, read, Random(0), Clock())
        async with asyncio.TaskGroup() as group:
            group.create_task(pool.run())
            await until(lambda: sink.count("up") == 1, 120, "the engine is up")
            status = pool.status()[0]
            assert len(status.pids) >= 2, "an EngineCore and a worker"
            assert outside_listeners([os.getpid(), *status.pids]) == []
            for index in range(8):
                pool.submit(f"r{index}", 1, "tiny", 200, 0)
            await until(lambda: len(sink.num_tokens) == 8, 30, "all stream")
            assert pool.status()[0].load.num_running == 8
            killed_at = time.monotonic()
            os.kill(min(status.pids), signal.SIGKILL)
            await until(lambda: sink.count("lost") == 1, 5, "the loss is reported")
            assert sink.lost_at - killed_at <= 1.0
            assert [report[0] for report in sink.reports[-9:]] == ["failed"] * 8 + ["lost"]
            assert all(report[3:] == ("engine_unavailable", True) for report in sink.reports[-9:-1])
            await until(lambda: sink.count("up") == 2, 120, "the engine is replaced")
            assert not set(status.pids) & set(pool.status()[0].pids)
            for index in range(8):
                pool.submit(f"r{index}", 2, "tiny", 200, 0)
            await until(lambda: sink.count("finished") == 8, 60, "all finish")
            assert {sink.num_tokens[f"r{index}", 2] for index in range(8)} == {200}
            assert await pool.stop(60)

    asyncio.run(main())
    assert own_children() == before


def test_a_failed_start_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    broken = tmp_path / "model"
    shutil.copytree(MODEL, broken)
    (broken / "model.safetensors").write_bytes(b"not weights at all")
    before = own_children()

    async def main() -> None:
        engine = make_engine(tmp_path, model=broken)
        with pytest.raises(EngineStartError) as caught:
            await engine.start()
        assert "SafetensorError" in "\n".join(caught.value.last_lines)
        await engine.stop()

    asyncio.run(main())
    assert own_children() == before
    assert "SafetensorError" in (tmp_path / "tiny.log").read_text()


def test_a_start_can_be_broken_off(tmp_path: Path) -> None:
    before = own_children()

    async def main() -> None:
        engine = make_engine(tmp_path)
        starting = asyncio.create_task(engine.start())
        await until(lambda: own_children() != before, 60, "the EngineCore is a process")
        await asyncio.sleep(1.0)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        began = time.monotonic()
        await engine.stop()
        assert time.monotonic() - began < 15

    asyncio.run(main())
    assert own_children() == before


def test_modes_live_side_by_side_in_one_process(tmp_path: Path) -> None:
    """INT8 weights beside ngram speculation with prefix caching: each streams, and a cached prefix is counted."""
    int8 = ROOT / "build/testbed/tiny-large-int8"
    if not int8.is_dir():
        pytest.skip("no INT8 weights: run `make testbed`")
    before = own_children()
    ngram = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}
    large = ROOT / "testbed/models/tiny-large"
    args = ARGS | {"block_size": 32}
    engines = [
        make_engine(tmp_path, model=large, name="int8", precision="int8", weights=str(int8.relative_to(ROOT))),
        make_engine(
            tmp_path, model=large, name="ngram", speculation="ngram", prefix_caching=True,
            args=args | {"speculative_config": ngram},
        ),
    ]  # fmt: skip
    greedy = Sampling(temperature=0.0, ignore_eos=True)
    prompt = Prompt(token_ids=tuple(5 + index % 7 for index in range(100)), sampling=greedy)

    async def collect(engine: Any, request_id: str) -> list[Chunk]:
        return [chunk async for chunk in engine.generate(request_id, prompt, 48, 0)]

    async def main() -> None:
        try:
            for engine in engines:
                await engine.start()
            answers = await asyncio.gather(*(collect(engine, f"r-{engine.name}") for engine in engines))
            for chunks in answers:
                assert sum(len(chunk.token_ids) for chunk in chunks) == 48
                assert chunks[-1].finish_reason == "length"
            again = await collect(engines[1], "again")
            assert max(chunk.num_cached_tokens for chunk in again) >= 64
            assert [t for chunk in again for t in chunk.token_ids] == [t for c in answers[1] for t in c.token_ids]
            assert len(again) < 48, "speculation gives more than one token a step"
        finally:
            for engine in engines:
                await engine.stop()

    asyncio.run(main())
    assert own_children() == before


def test_kill_9_of_the_daemon_leaves_no_engine_alive(tmp_path: Path) -> None:
    script = tmp_path / "daemon.py"
    script.write_text(KILLED_DAEMON)
    daemon = subprocess.Popen([sys.executable, str(script), str(MODEL), str(tmp_path)])
    try:
        deadline = time.monotonic() + 180
        while not (tmp_path / "up").exists():
            assert daemon.poll() is None, "it ended before its engine was up"
            assert time.monotonic() < deadline
            time.sleep(0.1)
        tree = processes.tree_of(processes.children_of(daemon.pid))
        assert len(tree) >= 2
    finally:
        daemon.kill()
        daemon.wait()
    deadline = time.monotonic() + 3
    while any(processes.is_running(process) for process in tree):
        assert time.monotonic() < deadline, "engine processes outlive the daemon"
        time.sleep(0.02)
