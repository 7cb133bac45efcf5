"""The NVML probe over a stub driver: what it shows, and what it does with each error."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from msd.errors import ProbeError
from msd.telemetry.nvml import import_pynvml
from msd.telemetry.nvml_device import throttle_names
from tests.nvml_stub import UUID, NvmlStub


@pytest.fixture
def stub(tmp_path: Path) -> NvmlStub:
    return NvmlStub(tmp_path)


def test_throttle_bits_have_names() -> None:
    assert throttle_names(0) == ()
    assert throttle_names(0x4 | 0x40) == ("power_cap", "hw_thermal")
    assert throttle_names(0x80 | 0x1000) == ("power_brake", "0x1000")


def test_a_foreign_pynvml_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", ModuleType("pynvml"))
    with pytest.raises(ProbeError, match="not NVIDIA's"):
        import_pynvml()


def test_a_missing_pynvml_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(ProbeError, match="nvidia-ml-py"):
        import_pynvml()


def test_the_view_shows_what_the_driver_says(stub: NvmlStub) -> None:
    stub.set("energy_mj", 2**40 + 7)
    stub.set("power_mw", 312_500)
    view = stub.run("probe.start(); tell(view=msgspec.to_builtins(probe.latest())); probe.stop()")["view"]
    assert view.pop("t_us") > 0
    assert view == {
        "source": "nvml",
        "uuid": UUID,
        "index": 0,
        "name": "Stub GPU",
        "memory_total_bytes": 80_000,
        "memory_used_bytes": 29_500,
        "memory_free_bytes": 50_000,
        "memory_reserved_bytes": 500,
        "power_instant_w": 312.5,
        "power_average_w": 312.5,
        "power_limit_w": 700.0,
        "sm_util": 0.87,
        "mem_util": 0.4,
        "sm_clock_mhz": 1980,
        "temperature_c": 61,
        "throttle_reasons": ["power_cap", "hw_thermal", "0x1000"],
        "energy_mj": 2**40 + 7,
        "epoch": 0,
        "error": "",
    }


def test_a_gpu_is_found_by_uuid_and_an_unknown_one_is_refused(stub: NvmlStub) -> None:
    told = stub.run(f"""
probe = NvmlProbe("{UUID}", 50.0, Clock())
probe.start(); found = probe.latest().uuid; probe.stop()
try: NvmlProbe("GPU-other", 50.0, Clock()).start()
except ProbeError as error: tell(found=found, error=str(error))
""")
    assert told["found"] == UUID
    assert "NVML error 6" in told["error"]


@pytest.mark.parametrize(("code", "remedy"), [(9, "load the NVIDIA driver"), (12, "install"), (18, "restart msd")])
def test_a_driver_that_cannot_be_opened_is_a_probe_error_with_a_remedy(stub: NvmlStub, code: int, remedy: str) -> None:
    stub.set("code.init", code)
    told = stub.run("""
try: probe.start()
except ProbeError as error: tell(message=str(error), remedy=error.remedy)
""")
    assert f"NVML error {code}" in told["message"]
    assert remedy in told["remedy"]


def test_a_missing_function_is_none_for_ever_and_not_asked_again(tmp_path: Path) -> None:
    stub = NvmlStub(tmp_path, "-DNO_MEMORY")
    stub.set("code.util", 3)
    told = stub.run("""
probe.start(); time.sleep(1.3); probe.stop()
view = probe.latest()
calls = (folder / "calls").read_text().split()
tell(free=view.memory_free_bytes, util=view.sm_util, clock=view.sm_clock_mhz, error=view.error,
     asked=calls.count("util"))
""")
    assert told == {"free": None, "util": None, "clock": 1980, "asked": 1, "error": ""}


def test_without_a_counter_power_is_integrated_and_labelled(stub: NvmlStub) -> None:
    stub.set("code.energy", 3)
    stub.set("power_mw", 400_000)
    told = stub.run("""
probe.start(); time.sleep(0.5); probe.stop()
readings = probe.readings()
tell(energy=probe.latest().energy_mj, sources=sorted({r.source for r in readings}),
     mj=readings[-1].energy_mj - readings[0].energy_mj, us=readings[-1].t_us - readings[0].t_us)
""")
    assert told["energy"] is None
    assert told["sources"] == ["estimated"]
    assert told["mj"] == pytest.approx(400 * told["us"] / 1000, abs=2)


def test_one_bad_tick_of_the_counter_is_not_an_estimate(stub: NvmlStub) -> None:
    told = stub.run("""
nvml.SLOW_PERIOD_S = 0.1
probe.start(); put("code.energy", 999)
wait_for(lambda: probe.latest().error); error = probe.latest().error
drop("code.energy"); put("energy_mj", 5)
wait_for(lambda: probe.latest().energy_mj == 5); probe.stop()
tell(error=error, after=probe.latest().error, sources=sorted({r.source for r in probe.readings()}))
""")
    assert "999" in told["error"]
    assert told["after"] == ""
    assert told["sources"] == ["counter"]


def test_a_counter_that_falls_is_a_new_epoch(stub: NvmlStub) -> None:
    stub.set("energy_mj", 1_000_000)
    told = stub.run("""
probe.start(); put("energy_mj", 12); wait_for(lambda: probe.latest().energy_mj == 12); probe.stop()
readings = probe.readings()
tell(first=[readings[0].epoch, readings[0].energy_mj], last=[readings[-1].epoch, readings[-1].energy_mj])
""")
    assert told == {"first": [0, 1_000_000], "last": [1, 12]}


def test_a_hanging_driver_holds_nobody_up_and_the_view_ages(stub: NvmlStub) -> None:
    told = stub.run("""
probe.start(); put("hang"); time.sleep(0.3)
before = probe.latest().t_us; worst = 0.0
for _ in range(50):
    a = time.monotonic(); probe.latest(); probe.readings(); worst = max(worst, time.monotonic() - a); time.sleep(0.01)
same = probe.latest().t_us == before
a = time.monotonic(); probe.stop(); stopped = time.monotonic() - a
drop("hang")
tell(same=same, worst_ms=worst * 1000, stopped_s=stopped)
""")
    assert told["same"]
    assert told["worst_ms"] < 50
    assert told["stopped_s"] < 2


@pytest.mark.parametrize("code", [15, 16])
def test_a_lost_gpu_shows_and_is_opened_again(stub: NvmlStub, code: int) -> None:
    told = stub.run(f"""
nvml.REOPEN_S = 0.05
probe.start(); put("code.energy", {code})
wait_for(lambda: probe.latest().error); error = probe.latest().error
drop("code.energy"); wait_for(lambda: not probe.latest().error); probe.stop()
tell(error=error, opened=(folder / "calls").read_text().split().count("init"))
""")
    assert f"NVML error {code}" in told["error"]
    assert told["opened"] >= 2


def test_a_replaced_driver_ends_sampling_and_says_so(stub: NvmlStub) -> None:
    told = stub.run("""
probe.start(); put("code.memory", 18); probe._thread.join(10)
tell(alive=probe._thread.is_alive(), error=probe.latest().error); probe.stop()
""")
    assert not told["alive"]
    assert "restart msd" in told["error"]


def test_a_module_that_refuses_the_gpu_scope_is_labelled_module(stub: NvmlStub) -> None:
    stub.set("scope", 1)
    told = stub.run("probe.start(); probe.stop(); tell(domain=probe.readings()[0].domain)")
    assert told["domain"] == f"module:{UUID}"


LIST = "gpus, why = nvml.installed_gpus(); tell(gpus=msgspec.to_builtins(gpus), why=why)"


def test_installed_gpus_are_listed_with_what_the_driver_knows(stub: NvmlStub) -> None:
    gpu = {"index": 0, "uuid": UUID, "name": "Stub GPU", "memory_total_bytes": 80000, "compute_capability": [9, 0]}
    assert stub.run(LIST) == {"gpus": [gpu], "why": ""}
    stub.set("code.memory", 3)
    stub.set("code.capability", 3)
    assert stub.run(LIST)["gpus"] == [gpu | {"memory_total_bytes": None, "compute_capability": None}]


def test_a_driver_that_lists_nothing_says_why(stub: NvmlStub) -> None:
    stub.set("code.init", 9)
    told = stub.run(LIST)
    assert told["gpus"] == []
    assert "NVML error 9" in told["why"]
    assert "load the NVIDIA driver" in told["why"]
