"""Profiles: measured on simulated engines in virtual time, fitted, resumed, refused elsewhere, drawn, believed."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest

from msd import cli
from msd.config import Config, parse
from msd.core.estimator import ModeEstimate
from msd.core.scheduler import Scheduler
from msd.domain import Chunk, CounterReading, GpuView, Prompt, Sampling
from msd.engine import factory
from msd.engine.host import SIMULATED
from msd.engine.sim import SimEngine
from msd.errors import EXIT_CONFIG, EXIT_OK, ConfigError, EngineStartError
from msd.learning.fitting import fit_nested, fit_relative, mean_error, tpot_at, ttft_at
from msd.learning.profile_page import page
from msd.learning.profiling import (
    FAMILIES,
    FAMILY_NAMES,
    Cell,
    Family,
    Meter,
    Plan,
    Profiler,
    Run,
    Subject,
    cells_of,
    decode_ms_per_token,
    spent_mj,
)
from msd.ports import Engine, GpuProbe
from msd.profile import SCHEMA, Measured, ModeProfile, Profile, differences, load, load_for, settings_of, write
from msd.recipe import recipe_hash
from msd.simgpu import SimGpu
from msd.telemetry.null import NullProbe
from msd.telemetry.sim import SimProbe
from tests.virtual_time import VirtualClock, run_virtual

ROOT = Path(__file__).resolve().parents[2]
TWO = """\
[telemetry]
sim_idle_w = 60
[[model]]
name = "m"
[[engine]]
name = "plain"
model = "m"
kind = "sim"
max_num_seqs = 16
sim = { step_ms = 9, prefill_ms_per_token = 0.04, decode_ms_per_request = 0.5, weights_bytes = 5_000_000_000 }
[[engine]]
name = "guess"
model = "m"
kind = "sim"
max_num_seqs = 8
[engine.sim]
step_ms = 12
prefill_ms_per_token = 0.06
step_mj = 1_000
tokens_per_step = 2
output_tokens = 20
weights_bytes = 7_000_000_000
"""


def config_of(text: str = TWO) -> Config:
    return parse(text, file="config.toml", base_dir=Path())


class Host:
    """The configuration's engines on one simulated GPU in virtual time, and a profiler of them."""

    def __init__(self, config: Config, plan: Plan, *, blind: bool = False) -> None:
        self.config = config
        self.clock = VirtualClock()
        gpu = factory.simulated_gpu(config, self.clock)
        assert gpu is not None
        self.gpu: SimGpu = gpu
        self.stored: list[ModeProfile] = []
        self.steps: list[tuple[str, str, int, int]] = []
        probe: GpuProbe = NullProbe() if blind else SimProbe(gpu, self.clock)
        probe.start()
        self.profiler = Profiler(probe, self.clock, plan, lambda *step: self.steps.append(step), self.stored.append)

    def subject(self, index: int) -> Subject:
        engine = self.config.engine[index]
        return Subject(
            mode=engine.name,
            make=factory.engine_factory(engine, self.config, Path(), self.clock, self.gpu, None),
            tokenizer=factory.load_tokenizers(self.config, Path())[engine.model],
            recipe=recipe_hash(engine, self.config, Path()),
            settings=settings_of(engine),
            max_num_seqs=engine.max_num_seqs,
        )

    def measure(self, index: int = 0, known: ModeProfile | None = None) -> ModeProfile:
        return run_virtual(self.profiler.measure(self.subject(index), known), self.clock)


def profile_of(*modes: ModeProfile, **fields: Any) -> Profile:
    made = Profile(
        schema=SCHEMA, created="2026-01-01T00:00:00Z", command="msd profile", device=SIMULATED,
        engine_version=SIMULATED, source="simulated", idle_w=60.0, modes=modes,
    )  # fmt: skip
    return msgspec.structs.replace(made, **fields)


@pytest.fixture(scope="module")
def measured() -> Profile:
    host = Host(config_of(), Plan(energy_s=2.0))
    return profile_of(host.measure(0), host.measure(1), idle_w=host.profiler.idle_w)


# --- what is measured ------------------------------------------------------------------------------------------------


def test_the_lines_are_the_simulated_engines_truth(measured: Profile) -> None:
    plain = measured.of("plain")
    assert plain is not None
    assert plain.ttft_ms == pytest.approx((9.5, 0.04, 0.0), rel=0.02, abs=1e-6)
    assert plain.tpot_ms == pytest.approx((9.5, 0.5, 0.0), rel=0.05, abs=1e-6)
    assert plain.start_s == pytest.approx(0.2)
    assert plain.gpu_bytes == 5_000_000_000
    assert plain.sleep_s == pytest.approx(0.3, rel=0.3)
    assert plain.wake_s == pytest.approx(0.5, rel=0.3)
    assert plain.asleep_bytes == 0


def test_speculation_shows_in_the_time_per_token(measured: Profile) -> None:
    guess = measured.of("guess")
    assert guess is not None
    assert guess.tpot_ms[0] == pytest.approx((12 + 0.3) / 2, rel=0.05)
    assert {cell.batch_size for cell in guess.cells} == {1, 4}, "it has 8 slots: a batch of 16 would queue"


def test_energy_is_the_simulated_gpus_truth(measured: Profile) -> None:
    plain, guess = measured.modes
    assert measured.idle_w == 60.0
    assert plain.step_mj == pytest.approx(2_000, rel=0.05)
    assert plain.prefill_mj_per_token == pytest.approx(10, rel=0.1)
    assert plain.decode_mj_per_token == pytest.approx(95, rel=0.2)
    assert guess.step_mj == pytest.approx(1_000 / 2, rel=0.1), "per token of the answer: two come in a step"
    alone = next(cell for cell in plain.cells if cell.family == "short_long" and cell.batch_size == 1)
    truth_mj = (2_000 * 128 + 10 * 128 + 95 * 128) / 128 + 60 * alone.e2el_ms / 128
    assert alone.mj_per_token == pytest.approx(truth_mj, rel=0.03)


def test_every_family_is_there_at_every_batch(measured: Profile) -> None:
    plain = measured.modes[0]
    found = {(cell.family, cell.batch_size) for cell in plain.cells}
    assert found >= {(family.name, size) for family in FAMILIES for size in (1, 4, 16)}
    assert len([cell for cell in plain.cells if cell.family == "prefill"]) == 6
    assert all(cell.num_repeats >= 3 for cell in plain.cells)


def test_more_at_once_is_more_tokens_a_second(measured: Profile) -> None:
    cells = {cell.batch_size: cell for cell in measured.modes[0].cells if cell.family == "short_long"}
    assert cells[1].tokens_per_s < cells[4].tokens_per_s < cells[16].tokens_per_s
    # 128 tokens in 9.5 ms + 5.12 ms of prefill, then 127 steps.
    assert cells[1].tokens_per_s == pytest.approx(128 / (0.00951 * 128 + 0.00512), rel=0.03)


def test_without_a_counter_energy_and_memory_are_absent_and_the_rest_is_there() -> None:
    host = Host(config_of(), Plan(families=("short_short",), batches=(1,), energy_s=2.0), blind=True)
    mode = host.measure()
    assert host.profiler.idle_w is None
    assert (mode.step_mj, mode.gpu_bytes) == (None, 0)
    assert all(cell.mj_per_token is None for cell in mode.cells)
    assert mode.tpot_ms[0] > 0


def test_an_interrupted_run_keeps_its_cells_and_goes_on_with_the_rest() -> None:
    plan = Plan(families=("short_short", "short_long"), batches=(1, 4), energy_s=0.0)
    whole = Host(config_of(), plan)
    complete = whole.measure()
    assert [len(mode.cells) for mode in whole.stored] == [1, 2, 3, 4, 4], "told after each cell, and at the end"
    half = whole.stored[1]
    assert not any(half.tpot_ms), "an unfinished mode has no lines yet"
    again = Host(config_of(), plan)
    resumed = again.measure(known=half)
    assert len(again.stored) == 3
    assert resumed.cells[:2] == half.cells
    assert resumed.tpot_ms == pytest.approx(complete.tpot_ms, rel=0.02)
    assert again.gpu.memory_used_bytes == 0


class LateEnd(SimEngine):
    """Needs one more step of 4 ms to find out that an answer is over, as an end of sequence that is no token does."""

    async def generate(self, request_id: str, prompt: Prompt, max_tokens: int, priority: int) -> AsyncGenerator[Chunk]:
        async for chunk in super().generate(request_id, prompt, max_tokens, priority):
            if chunk.finish_reason != "stop":
                yield chunk
                continue
            yield Chunk(chunk.token_ids, chunk.text)
            await asyncio.sleep(0.004)
            yield Chunk((), "", "stop")


def test_the_step_that_ends_an_answer_is_measured() -> None:
    host = Host(config_of(), Plan(families=("short_short",), batches=(1,), energy_s=0.0))
    guess = host.config.engine[1]  # it ends answers by itself
    late = msgspec.structs.replace(host.subject(1), make=lambda: LateEnd(guess, host.gpu, host.clock, Random(1)))
    assert run_virtual(host.profiler.measure(late), host.clock).eos_step_ms == pytest.approx(4.0, abs=0.1)
    other = Host(config_of(), Plan(families=("short_short",), batches=(1,), energy_s=0.0))
    assert other.measure(1).eos_step_ms == pytest.approx(0.0, abs=0.1)


def test_an_engine_that_does_not_start_is_stopped_and_said() -> None:
    text = TWO.replace("[telemetry]\n", "[telemetry]\nsim_memory_bytes = 12_000_000_000\n")
    host = Host(config_of(text), Plan(batches=(1,)))
    assert host.gpu.attach("other", 8_000_000_000, lambda: None)
    with pytest.raises(EngineStartError, match="out of memory"):
        host.measure(0)
    assert host.gpu.memory_used_bytes == 8_000_000_000


def test_families_shrink_to_a_short_context_and_leave_out_batches_without_slots() -> None:
    cells = cells_of(Plan(), max_model_len=256, max_num_seqs=4)
    assert all(cell.family.num_prompt_tokens + cell.family.num_output_tokens <= 256 for cell in cells)
    assert {cell.batch_size for cell in cells} == {1, 4}
    assert {cell.family.name for cell in cells} == set(FAMILY_NAMES)
    assert cells_of(Plan(batches=(64,)), 4_096, 4)[0].batch_size == 1


def test_time_per_token_begins_when_the_whole_batch_decodes() -> None:
    early = Run(0, (10_000, 30_000, 40_000, 50_000), (1, 2, 3, 4), 0, "length")  # waits 20 ms for the other's prefill
    late = Run(0, (30_000, 40_000, 50_000), (1, 2, 3), 0, "length")
    assert decode_ms_per_token((early, late)) == [10.0, 10.0]
    assert decode_ms_per_token((Run(0, (5_000,), (1,), 0, "length"),)) == [], "one token has no time per token"


# --- the counter -----------------------------------------------------------------------------------------------------


class StepCounter:
    """A probe whose counter moves every 100 ms, and is reset once if asked to."""

    def __init__(self, clock: VirtualClock, reset_at_us: int | None = None) -> None:
        self._clock = clock
        self._reset_at_us = reset_at_us

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def latest(self) -> GpuView | None:
        return None

    def readings(self) -> list[CounterReading]:
        now_us = self._clock.now_us()
        reset = self._reset_at_us is not None and now_us >= self._reset_at_us
        return [
            CounterReading(
                domain="gpu:0", t_us=now_us, energy_mj=now_us // 100_000 * 7 + (3 if reset else 0), epoch=reset
            )
        ]


def test_a_window_runs_from_change_to_change() -> None:
    clock = VirtualClock()
    meter = Meter(StepCounter(clock), clock)

    async def two() -> Sequence[CounterReading | None]:
        return await meter.edge(), await meter.edge()

    first, second = run_virtual(two(), clock)
    assert first is not None
    assert second is not None
    assert second.t_us - first.t_us == pytest.approx(100_000, abs=6_000)
    assert spent_mj(first, second) == 7


def test_a_counter_that_is_reset_or_absent_measures_nothing() -> None:
    clock = VirtualClock()
    meter = Meter(StepCounter(clock, reset_at_us=150_000), clock)

    async def two() -> Sequence[CounterReading | None]:
        return await meter.edge(), await meter.edge()

    first, second = run_virtual(two(), clock)
    assert spent_mj(first, second) is None
    assert run_virtual(Meter(NullProbe(), clock).edge(), clock) is None


# --- fits ------------------------------------------------------------------------------------------------------------


def test_a_fit_is_by_relative_error_and_never_negative() -> None:
    rows = [(1.0, float(n)) for n in (10, 100, 1_000, 4_000)]
    fit = fit_relative(rows, [5 + 0.03 * n for _, n in rows])
    assert fit.coefficients == pytest.approx((5, 0.03))
    assert fit.mape < 1e-9
    falling = fit_relative(rows, [10.0, 9.0, 8.0, 7.0])
    assert falling.coefficients[1] == 0.0


def test_a_row_that_something_disturbed_does_not_bend_the_line() -> None:
    rows = [(1.0, float(n)) for n in (10, 50, 100, 500, 1_000, 4_000)]
    values = [5 + 0.03 * n for _, n in rows]
    values[3] *= 6
    fit = fit_relative(rows, values)
    assert fit.coefficients == pytest.approx((5, 0.03), rel=0.01)
    assert fit.mape > 0.1, "the error is told of all rows"


def test_a_quadratic_term_stays_only_where_the_data_ask_for_it() -> None:
    rng = Random(1)
    rows = [(1.0, float(n), n * n / 1e6) for n in (16, 64, 256, 1_024, 4_096)]
    straight = [(5 + 0.03 * n) * (1 + 0.02 * rng.uniform(-1, 1)) for _, n, _ in rows]
    assert fit_nested(rows, straight).coefficients[2] == 0.0
    curved = [5 + 0.03 * n + 20 * q for _, n, q in rows]
    assert fit_nested(rows, curved).coefficients == pytest.approx((5, 0.03, 20))


def test_held_out_cells_are_predicted(measured: Profile) -> None:
    plain = measured.modes[0]
    shared = [cell for cell in plain.cells if cell.family == "long_long"]
    without = msgspec.structs.replace(plain, cells=tuple(cell for cell in plain.cells if cell not in shared))
    from msd.learning.profiling import fitted

    told = fitted(without, measured.idle_w)
    assert mean_error([tpot_at(told, cell) for cell in shared], [cell.tpot_ms for cell in shared]) < 0.05
    alone = [cell for cell in shared if cell.batch_size == 1]
    assert mean_error([ttft_at(told, cell.num_prompt_tokens) for cell in alone], [c.ttft_ms for c in alone]) < 0.05


# --- what it is good for ---------------------------------------------------------------------------------------------


async def run_one(engine: Engine, name: str, prompt_tokens: int, output_tokens: int, clock: VirtualClock) -> float:
    """E2EL in ms of one request."""
    began_us = clock.now_us()
    prompt = Prompt(token_ids=tuple(range(prompt_tokens)), sampling=Sampling(ignore_eos=True))
    async with aclosing(engine.generate(name, prompt, output_tokens, 0)) as chunks:
        async for _ in chunks:
            pass
    return (clock.now_us() - began_us) / 1e3


async def first_twenty(host: Host, index: int, known: ModeProfile | None) -> float:
    """MAPE of E2EL over the first 20 requests to a new engine, each predicted before it is learnt from.

    Half of them come beside three long requests.
    """
    engine = host.subject(index).make()
    estimate = ModeEstimate()
    if known is not None:
        estimate.seed_profile(known)
    estimate.seed(await engine.start())
    rng = Random(7)
    errors = []
    for others in (0, 3):
        beside = [asyncio.create_task(run_one(engine, f"beside-{n}", 100, 8_000, host.clock)) for n in range(others)]
        await asyncio.sleep(0.5)
        for number in range(10):
            prompt_tokens, output_tokens = rng.choice((64, 300, 900, 2_000)), rng.choice((16, 64, 256))
            told_ms = estimate.ttft_ms(prompt_tokens) + estimate.tpot_ms(others) * (output_tokens - 1)
            e2el_ms = await run_one(engine, f"asked-{others}-{number}", prompt_tokens, output_tokens, host.clock)
            errors.append(abs(told_ms / e2el_ms - 1))
        for task in beside:
            assert not task.done(), "it has to run beside all of them"
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
    await engine.stop()
    return fmean(errors)


def test_a_profile_makes_the_first_predictions_good(measured: Profile) -> None:
    for index, known in enumerate(measured.modes):
        host = Host(config_of(), Plan())
        without = run_virtual(first_twenty(host, index, None), host.clock)
        with_profile = run_virtual(first_twenty(host, index, known), host.clock)
        print(f"{known.mode}: MAPE of the first 20 {without:.1%} without the profile, {with_profile:.1%} with it")
        assert with_profile < 0.05
        assert without > 2 * with_profile


def test_the_scheduler_starts_from_the_profile(measured: Profile) -> None:
    scheduler = Scheduler.from_config(config_of(), Random(0), profile=measured)
    for book, known in zip(scheduler.fleet.books, measured.modes, strict=True):
        assert book.estimate.ttft_ms(1_000) == pytest.approx(ttft_at(known, 1_000), rel=1e-6)


# --- the file --------------------------------------------------------------------------------------------------------


def test_a_profile_reads_back_as_it_was_written(measured: Profile, tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    write(file, measured)
    assert load(file) == measured
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "cannot be read"), (b"{}", "cannot be read"), (b"\xff", "cannot be read"), (b"[1]", "cannot be read")],
)
def test_what_is_no_profile_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "p.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load(file)


def test_another_schema_is_refused(measured: Profile, tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    write(file, msgspec.structs.replace(measured, schema=SCHEMA + 1))
    with pytest.raises(ConfigError, match=f"has schema {SCHEMA + 1}, not {SCHEMA}"):
        load(file)


def test_a_profile_of_another_host_engine_or_mode_says_what_differs(measured: Profile) -> None:
    config = config_of()

    def told(profile: Profile, config: Config = config) -> list[str]:
        return list(differences(profile, config, Path(), SIMULATED, SIMULATED))

    assert told(measured) == []
    assert told(msgspec.structs.replace(measured, device="H200", engine_version="vllm 0.1")) == [
        "it was measured on H200, this is simulated",
        "it was measured with vllm 0.1, this is simulated",
    ]
    slower = config_of(TWO.replace("step_ms = 9", "step_ms = 10"))
    assert told(measured, slower) == ["mode plain: sim.step_ms was 9.0, now 10.0"]
    int8 = config_of(TWO.replace('name = "plain"\n', 'name = "plain"\nprecision = "int8"\n'))
    assert told(measured, int8) == ['mode plain: precision was "bf16", now "int8"']
    other = config_of(TWO.replace('"m"', '"n"'))
    assert told(measured, other)[0] == "mode plain: the model's files or its recipe have changed"
    renamed = config_of(TWO.replace('"plain"', '"new"'))
    assert told(measured, renamed) == [], "a mode that it lacks starts from its own warm-up"


def test_check_refuses_a_profile_that_does_not_hold(
    measured: Profile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "p.json", msgspec.structs.replace(measured, device="H200"))
    file = tmp_path / "c.toml"
    file.write_text(TWO + '[policy]\nprofile = "p.json"\n')
    assert cli.main(["check", str(file)]) == EXIT_CONFIG
    error = capsys.readouterr().err
    assert "policy.profile" in error
    assert "it was measured on H200, this is simulated" in error
    write(tmp_path / "p.json", measured)
    assert cli.main(["check", str(file)]) == EXIT_OK
    assert load_for(config_of(TWO + '[policy]\nprofile = "p.json"\n'), tmp_path, SIMULATED, SIMULATED) == measured


def test_serve_refuses_a_profile_that_does_not_hold(measured: Profile, tmp_path: Path) -> None:
    write(tmp_path / "p.json", msgspec.structs.replace(measured, engine_version="vllm 0.1"))
    file = tmp_path / "c.toml"
    endpoint = f"ipc://{tmp_path}/s"
    file.write_text(TWO + f'[policy]\nprofile = "p.json"\n[ingress.zmq]\nendpoints = ["{endpoint}"]\n')
    served = subprocess.run(
        [sys.executable, "-m", "msd", "serve", "--config", str(file)],
        capture_output=True, text=True, timeout=60, cwd=ROOT,
    )  # fmt: skip
    assert served.returncode == EXIT_CONFIG, served.stderr
    assert "it was measured with vllm 0.1, this is simulated" in served.stderr
    assert not (tmp_path / "s").exists()


def test_a_named_profile_that_is_missing_is_an_error(tmp_path: Path) -> None:
    config = config_of(TWO + '[policy]\nprofile = "none.json"\n')
    with pytest.raises(ConfigError, match="`msd profile` writes one"):
        load_for(config, tmp_path, SIMULATED, SIMULATED)


# --- the command and the page ----------------------------------------------------------------------------------------

QUICK = """\
[[model]]
name = "m"
[[engine]]
name = "a"
model = "m"
kind = "sim"
sim = { step_ms = 2, start_s = 0.01 }
[[engine]]
name = "b"
model = "m"
kind = "sim"
sim = { step_ms = 3, start_s = 0.01 }
"""
SHORT = ("--families", "short_short", "--batches", "1", "--repeats", "1", "--energy-s", "0")


def test_the_command_measures_resumes_and_cleans_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.toml").write_text(QUICK)
    words = ["profile", "--config", "c.toml", "--out", "p.json", *SHORT]
    assert cli.main([*words, "--engines", "a"]) == EXIT_OK
    only = load(Path("p.json"))
    assert [mode.mode for mode in only.modes] == ["a"]
    assert only.source == "simulated"
    Path("p.json").rename("p.json.partial")  # as if it had been interrupted after the first mode
    capsys.readouterr()
    assert cli.main(words) == EXIT_OK
    told = capsys.readouterr()
    assert "going on with p.json.partial: 1 cells of 1 modes are there" in told.err
    assert "a 0/1" not in told.err, "what is measured is not measured again"
    assert "b 0/1: short_short 128/32 tokens, batch of 1" in told.err
    assert "SIMULATED" in told.out
    whole = load(Path("p.json"))
    assert whole.modes[0] == only.modes[0]
    assert [mode.mode for mode in whole.modes] == ["a", "b"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.toml", "p.json"]


def test_a_partial_run_of_other_modes_is_not_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, measured: Profile
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.toml").write_text(TWO.replace("step_ms = 9", "step_ms = 10"))
    write(Path("p.json.partial"), measured)
    words = ["profile", "--config", "c.toml", "--out", "p.json", *SHORT]
    assert cli.main(words) == EXIT_CONFIG
    assert "cannot be resumed: mode plain: sim.step_ms was 9.0, now 10.0" in capsys.readouterr().err
    assert cli.main([*words, "--fresh"]) == EXIT_OK
    assert "going on" not in capsys.readouterr().err
    assert load(Path("p.json")).modes[0].settings["sim.step_ms"] == 10.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--engines", "c"], "--engines: no [[engine]] 'c'"),
        (["--families", "short_shrt"], "did you mean `short_short`?"),
    ],
)
def test_names_that_do_not_exist_are_said(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.toml"
    file.write_text(QUICK)
    assert cli.main(["profile", "--config", str(file), *words]) == EXIT_CONFIG
    assert message in capsys.readouterr().err


def test_the_page_stands_alone_and_its_drawings_are_whole(measured: Profile) -> None:
    text = page(measured)
    assert "Simulated." in text
    assert 'name="viewport"' in text
    assert "<script" not in text
    links = set(re.findall(r"""(?:src|href)=["']([^"'#][^"']*)""", text)) | set(re.findall(r"url\((?!#)[^)]*\)", text))
    assert not links, "a self-contained page loads nothing"
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) == 5
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    for mode in measured.modes:
        assert text.count(f">{mode.mode}<") >= 5


def test_a_page_of_measured_figures_is_not_labelled_simulated_and_names_are_escaped(measured: Profile) -> None:
    bare = tuple(
        msgspec.structs.replace(
            mode, cells=tuple(msgspec.structs.replace(cell, mj_per_token=None) for cell in mode.cells)
        )
        for mode in measured.modes
    )
    text = page(msgspec.structs.replace(measured, source="measured", device="<b>&", modes=bare, idle_w=None))
    assert "Simulated." not in text
    assert "<b>&" not in text
    assert "no counter measured it" in text
    assert len(re.findall("<svg", text)) == 4, "no figure of energy without energy"


def test_the_report_command_writes_the_page(
    measured: Profile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "p.json", measured)
    out = tmp_path / "page.html"
    assert cli.main(["report", "profile", str(tmp_path / "p.json"), "--out", str(out)]) == EXIT_OK
    assert out.read_text().startswith("<!doctype html>")
    assert cli.main(["report", "profile", str(tmp_path / "none.json"), "--out", str(out)]) == EXIT_CONFIG
    assert "`msd profile` writes one" in capsys.readouterr().err


def test_a_mode_with_one_cell_can_be_drawn() -> None:
    cell = Measured(
        family="short_short", num_prompt_tokens=8, num_cached_tokens=0, num_output_tokens=4, batch_size=1,
        num_repeats=1, ttft_ms=1.0, tpot_ms=1.0, e2el_ms=4.0, tokens_per_s=1_000.0,
    )  # fmt: skip
    mode = ModeProfile(
        mode="a", recipe="r", ttft_ms=(1.0, 0.0, 0.0), tpot_ms=(1.0, 0.0, 0.0), eos_step_ms=0.0, cells=(cell,)
    )
    assert page(profile_of(mode)).count("<svg") == 4


def test_a_cell_names_itself() -> None:
    from msd.learning.profiling import describe

    assert describe(Cell(Family(name="x", num_prompt_tokens=3, num_output_tokens=2), 4)) == "x 3/2 tokens, batch of 4"
