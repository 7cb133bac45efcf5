"""One suite for every GpuProbe: null, simulated, NVML (over a stub driver, in a child process), RAPL (a fake tree)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from msd.errors import ProbeError
from msd.ports import GpuProbe
from msd.simgpu import SimGpu
from msd.telemetry.null import NullProbe
from msd.telemetry.nvml import NvmlProbe
from msd.telemetry.rapl import RaplProbe, rapl_state
from msd.telemetry.sim import SimProbe
from tests.nvml_stub import REPOSITORY, NvmlStub

IN_STUB = "NVML_STUB_DIR" in os.environ


class Clock:
    """Real time, sped up so that once-a-second probes are read often enough."""

    def __init__(self, speed: int = 1) -> None:
        self._speed = speed

    def now_us(self) -> int:
        return time.monotonic_ns() // 1_000 * self._speed


def fake_powercap(folder: Path) -> Path:
    """A powercap tree of two packages, with a subzone inside the first, DRAM beside it, and psys over all."""
    for zone, name, uj in (
        ("intel-rapl:0", "package-0", 5_000_000),
        ("intel-rapl:0:0", "core", 1_000_000),
        ("intel-rapl:0:1", "dram", 2_000_000),
        ("intel-rapl:1", "package-1", 7_000_000),
        ("intel-rapl:2", "psys", 20_000_000),
    ):
        (folder / zone).mkdir(parents=True)
        (folder / zone / "name").write_text(f"{name}\n")
        (folder / zone / "max_energy_range_uj").write_text("262143328850\n")
        (folder / zone / "energy_uj").write_text(f"{uj}\n")
    return folder


def make_null(_: Path) -> GpuProbe:
    return NullProbe("no GPU in this test")


def make_sim(_: Path) -> GpuProbe:
    clock = Clock()
    return SimProbe(SimGpu(memory_bytes=10**9, idle_w=75.0, rng=Random(1), now_us=clock.now_us()), clock)


def make_rapl(folder: Path) -> GpuProbe:
    return RaplProbe(Clock(speed=1_000), fake_powercap(folder))


def make_nvml(_: Path) -> GpuProbe:
    return NvmlProbe("0", 50.0, Clock())


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(make_null, id="null"),
        pytest.param(make_sim, id="sim"),
        pytest.param(make_rapl, id="rapl"),
        pytest.param(
            make_nvml, id="nvml", marks=pytest.mark.skipif(not IN_STUB, reason="run by the test below, in a child")
        ),
    ],
)
def test_contract(make: Callable[[Path], GpuProbe], tmp_path: Path) -> None:
    probe = make(tmp_path)
    assert probe.readings() == []
    probe.start()
    views, readings = [], []
    for _ in range(20):
        time.sleep(0.02)
        before = time.monotonic()
        views.append(probe.latest())
        readings.append(probe.readings())
        assert time.monotonic() - before < 0.05, "reading blocks"
    for view in views:
        if view is None:
            continue
        assert view.source in ("nvml", "simulated", "none")
        assert view.throttle_reasons == () or all(view.throttle_reasons)
        figures = (view.memory_free_bytes, view.memory_total_bytes, view.power_instant_w, view.energy_mj)
        assert all(figure is None or figure >= 0 for figure in figures)
        if view.source == "none":
            assert figures == (None, None, None, None), "what was not measured is absent"
            assert view.error
        if view.memory_free_bytes is not None and view.memory_total_bytes is not None:
            assert view.memory_free_bytes <= view.memory_total_bytes
    times = [view.t_us for view in views if view is not None]
    assert times == sorted(times)
    last: dict[str, tuple[int, int, int]] = {}
    for batch in readings:
        assert len(batch) <= 1_024
        for reading in batch:
            now = (reading.t_us, reading.epoch, reading.energy_mj)
            was = last.get(reading.domain, now)
            assert now[0] >= was[0], "oldest first"
            assert now[1] > was[1] or now[2] >= was[2], "a counter falls only in a new epoch"
            assert (reading.source == "simulated") == isinstance(probe, SimProbe)
            assert reading.power_w is None or reading.power_w >= 0
            last[reading.domain] = now
    assert bool(last) == (not isinstance(probe, NullProbe))
    before = time.monotonic()
    probe.stop()
    probe.stop()
    assert time.monotonic() - before < 2.5
    probe.readings()
    assert len(probe.readings()) <= 1, "nothing is sampled after stop"


@pytest.mark.skipif(IN_STUB, reason="this is the child")
def test_contract_of_the_real_pynvml_over_the_stub_driver(tmp_path: Path) -> None:
    stub = NvmlStub(tmp_path)
    stub.set("energy_mj", 1_000)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"{__file__}::test_contract",
        "-k",
        "nvml",
    ]
    done = subprocess.run(command, env=stub.env(), cwd=REPOSITORY, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_rapl_tells_absent_unreadable_and_working_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rapl_state(tmp_path / "nowhere") == "absent"
    with pytest.raises(ProbeError, match="no RAPL"):
        RaplProbe(Clock(), tmp_path / "nowhere").start()
    tree = fake_powercap(tmp_path)
    assert rapl_state(tree) == "working"

    real_read = Path.read_text

    def denied(path: Path, *args: str | None) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return real_read(path, *args)

    monkeypatch.setattr(Path, "read_text", denied)  # mode 0400 does not stop root, and tests may run as root
    assert rapl_state(tree) == "unreadable"
    with pytest.raises(ProbeError, match="not readable"):
        RaplProbe(Clock(), tree).start()


def test_rapl_counts_packages_and_dram_once_and_survives_the_wrap(tmp_path: Path) -> None:
    tree = fake_powercap(tmp_path)
    probe = RaplProbe(Clock(speed=1_000_000), tree)
    probe.start()
    first = {reading.domain: reading.energy_mj for reading in probe.readings()}
    assert first == {"cpu:package-0": 0, "cpu:dram-0": 0, "cpu:package-1": 0}
    (tree / "intel-rapl:0" / "energy_uj").write_text("6500000\n")
    (tree / "intel-rapl:1" / "energy_uj").write_text("1000\n")  # wrapped at 262143.32885 J
    time.sleep(0.01)
    second = {reading.domain: reading.energy_mj for reading in probe.readings()}
    assert second == {"cpu:package-0": 1_500, "cpu:dram-0": 0, "cpu:package-1": 262_143_328 - 7_000 + 1}
