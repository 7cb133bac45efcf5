"""Presets that the catalogue calls real on a CPU start there and answer right, on the testbed's model."""

from __future__ import annotations

import asyncio
import importlib.util
from contextlib import aclosing
from pathlib import Path

import pytest

from msd import tasks
from msd.clock import MonotonicClock
from msd.config import Config, parse
from msd.config.presets import PRESETS
from msd.domain import Prompt, Sampling
from msd.engine import factory
from msd.engine.host import look

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
TRIED = ("draft_speculation", "fp8_kv", "fp8_per_channel", "int8_weight_only")
"""Those that no other test starts."""


def config_of(preset: str) -> Config:
    text = (
        '[[model]]\nname = "m"\npath = "testbed/models/tiny-large"\n'
        f'[[engine]]\nname = "{preset}"\nmodel = "m"\npreset = "{preset}"\nmax_num_seqs = 4\n'
        + ('draft = "testbed/models/tiny-small"\n' if PRESETS[preset].draft else "")
        + "args = { max_model_len = 512, enforce_eager = true, kv_cache_memory_bytes = 67_108_864 }\n"
    )
    return parse(text, file="config.toml", base_dir=ROOT)


async def num_right(preset: str, logs: Path) -> tuple[int, int]:
    config = config_of(preset)
    tokenizer = factory.load_tokenizers(config, ROOT)["m"]
    engine = factory.engine_factory(config.engine[0], config, ROOT, MonotonicClock(), None, logs)()
    right = asked = 0
    try:
        await engine.start()
        for task in tasks.TASKS:
            for seed in range(4):
                problem = tasks.generate(task, 1 + seed % 2, seed)
                prompt = Prompt(token_ids=tokenizer.encode(problem.prompt), sampling=Sampling(temperature=0.0))
                text = ""
                async with aclosing(engine.generate(f"{task}-{seed}", prompt, 32, 0)) as chunks:
                    async for chunk in chunks:
                        text += chunk.text
                asked += 1
                right += tasks.grade(problem, text)
    finally:
        await engine.stop()
    return right, asked


@pytest.mark.parametrize("preset", TRIED)
def test_a_preset_that_is_called_real_answers_right(preset: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("vllm") is None or look().platform != "cpu":
        pytest.skip("needs vLLM's CPU build")
    from msd.engine.vllm import import_vllm

    import_vllm()
    right, asked = asyncio.run(num_right(preset, tmp_path))
    # The model itself is not right every time; a broken mode is hardly ever.
    assert right >= 0.8 * asked, f"{right} of {asked}"
