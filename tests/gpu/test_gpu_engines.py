"""Real engines on an NVIDIA GPU: the modes that need one. `make gpu-test`.

The model is the testbed's larger one, or the folder in $MSD_GPU_MODEL (a Llama of a few billion parameters, say).
"""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from msd.config import EngineConfig
from msd.domain import Chunk, EngineInfo, EngineLoad, Prompt, Sampling
from msd.engine import processes
from msd.errors import EngineLostError

ROOT = Path(__file__).parents[2]
MODEL = Path(os.environ.get("MSD_GPU_MODEL") or ROOT / "testbed/models/tiny-large")
KV_CACHE_BYTES = 512 * 1024 * 1024
ARGS: dict[str, object] = {"max_model_len": 512, "kv_cache_memory_bytes": KV_CACHE_BYTES, "gpu_memory_utilization": 0.3}
NGRAM: dict[str, object] = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}
MODES: dict[str, dict[str, Any]] = {
    "fp16": {"precision": "fp16", "args": ARGS},
    "bf16": {"precision": "bf16", "args": ARGS, "prefix_caching": True},
    "fp8": {"precision": "fp8", "args": ARGS},
    "ngram": {"precision": "bf16", "speculation": "ngram", "args": ARGS | {"speculative_config": NGRAM}},
}
MEMORY_BACK_S = 30.0
MEMORY_SLACK_MIB = 256


def gpus() -> list[int]:
    """MiB in use on each GPU; empty where there is none."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [int(line) for line in answer.stdout.split() if line.isdigit()] if answer.returncode == 0 else []


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not gpus(), reason="no NVIDIA GPU on this machine"),
    pytest.mark.filterwarnings("ignore:Unclosed context:ResourceWarning"),
]


@pytest.fixture(autouse=True)
def imported() -> Iterator[None]:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from msd.engine.vllm import import_vllm

    import_vllm()
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        pytest.skip("this environment has vLLM's CPU build")
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def make_engine(folder: Path, mode: str) -> Any:
    from msd.engine.vllm import VllmEngine

    return VllmEngine(EngineConfig(name=mode, model="m", max_num_seqs=32, **MODES[mode]), MODEL, ROOT, folder)


def make_prompt(number: int, num_tokens: int = 64) -> Prompt:
    ids = tuple(5 + (index * 7 + number) % 60 for index in range(num_tokens))
    return Prompt(token_ids=ids, sampling=Sampling(temperature=0.0, ignore_eos=True))


async def collect(engine: Any, request_id: str, prompt: Prompt, max_tokens: int) -> list[Chunk]:
    return [chunk async for chunk in engine.generate(request_id, prompt, max_tokens, 0)]


def num_tokens(chunks: list[Chunk]) -> int:
    return sum(len(chunk.token_ids) for chunk in chunks)


async def serve_a_batch_and_a_cancel(engine: Any, info: EngineInfo) -> float:
    """Run 32 streams and break one off half way; tokens per second of the whole batch."""
    assert info.max_model_len == 512
    assert info.kv_capacity_tokens >= 512
    assert info.idle_ttft_ms > 0
    began = time.monotonic()
    answers = await asyncio.gather(*(collect(engine, f"r{number}", make_prompt(number), 128) for number in range(32)))
    tokens_per_s = 32 * 128 / (time.monotonic() - began)
    assert [num_tokens(chunks) for chunks in answers] == [128] * 32
    stream = engine.generate("cancelled", make_prompt(99), 400, 0)
    async for _ in stream:
        break
    assert engine.load().num_running == 1
    await stream.aclose()
    assert engine.load() == EngineLoad()
    assert num_tokens(await collect(engine, "after", make_prompt(1), 8)) == 8
    return tokens_per_s


@pytest.mark.parametrize("mode", list(MODES))
def test_a_mode_serves_and_gives_its_memory_back(mode: str, tmp_path: Path) -> None:
    before = gpus()[0]

    async def main() -> None:
        engine = make_engine(tmp_path, mode)
        try:
            info = await engine.start()
            tokens_per_s = await serve_a_batch_and_a_cancel(engine, info)
            print(
                f"{mode}: start {info.start_s:.1f} s, TTFT {info.idle_ttft_ms:.1f} ms, TPOT {info.idle_tpot_ms:.2f} ms"
            )
            print(f"{mode}: {tokens_per_s:.0f} tokens/s at 32 streams, KV cache of {info.kv_capacity_tokens} tokens")
        finally:
            await engine.stop()

    asyncio.run(main())
    deadline = time.monotonic() + MEMORY_BACK_S
    while (used := gpus()[0]) > before + MEMORY_SLACK_MIB:
        assert time.monotonic() < deadline, f"{used} MiB in use, {before} before"
        time.sleep(0.5)


def test_modes_share_the_gpu_and_one_may_die(tmp_path: Path) -> None:
    async def main() -> None:
        engines = [make_engine(tmp_path, mode) for mode in ("bf16", "fp8", "ngram")]
        try:
            infos = [await engine.start() for engine in engines]
            await asyncio.gather(*(collect(engine, "r", make_prompt(3), 64) for engine in engines))
            victim, survivor = engines[0], engines[1]
            running = asyncio.create_task(collect(victim, "dies", make_prompt(4), 400))
            await asyncio.sleep(0.05)
            doomed = [process for process in processes.children_of(os.getpid()) if process.pid in infos[0].pids]
            processes.end(frozenset(doomed), 0.0, 5.0)
            await asyncio.wait_for(victim.lost(), 1.0)
            with pytest.raises(EngineLostError):
                await running
            assert num_tokens(await collect(survivor, "lives", make_prompt(5), 64)) == 64
        finally:
            for engine in engines:
                await engine.stop()

    asyncio.run(main())
