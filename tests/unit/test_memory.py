"""The memory budget: what engines take, awake and asleep, and which sets of them fit."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msd.config import Config, EngineConfig, SimEngineConfig
from msd.core.memory import UTILISATION, Budget, Need, budget_of, maximal_sets, need_of, put_away
from msd.domain import GpuView
from msd.engine.memory import estimates, need
from msd.profile import SCHEMA as PROFILE
from msd.profile import ModeProfile, Profile

GB = 10**9


def profiled(gpu_gb: int, asleep_gb: int) -> ModeProfile:
    return ModeProfile(
        mode="m",
        recipe="",
        ttft_ms=(1.0, 0.0, 0.0),
        tpot_ms=(1.0, 0.0, 0.0),
        eos_step_ms=0.0,
        gpu_bytes=gpu_gb * GB,
        asleep_bytes=asleep_gb * GB,
    )


def test_configured_bytes_win_over_the_profile_and_the_profile_over_vllms_default() -> None:
    engine = EngineConfig(name="m", model="x", gpu_bytes=7 * GB)
    assert need_of(engine, profiled(9, 1), 80 * GB).gpu_bytes == 7 * GB
    engine = EngineConfig(name="m", model="x")
    assert need_of(engine, profiled(9, 1), 80 * GB).gpu_bytes == 9 * GB
    assert need_of(engine, None, 100 * GB).gpu_bytes == int(UTILISATION * 100 * GB)
    engine = EngineConfig(name="m", model="x", args={"gpu_memory_utilization": 0.25})
    assert need_of(engine, None, 100 * GB).gpu_bytes == 25 * GB


def test_a_size_for_the_kv_cache_bounds_an_engine_and_the_reserve_is_not_filled() -> None:
    bounded = EngineConfig(name="m", model="x", args={"kv_cache_memory_bytes": 3 * GB})
    assert need_of(bounded, None, 80 * GB, estimated_bytes=10 * GB).gpu_bytes == 10 * GB
    assert need_of(bounded, None, 80 * GB).gpu_bytes == int(UTILISATION * 80 * GB), "nothing is known of its weights"
    free = EngineConfig(name="m", model="x")
    assert need_of(free, None, 80 * GB, estimated_bytes=10 * GB).gpu_bytes == int(UTILISATION * 80 * GB)
    assert need_of(free, None, 8 * GB, reserve_bytes=GB).gpu_bytes == 7 * GB
    assert need_of(free, None, None, estimated_bytes=10 * GB).gpu_bytes == 10 * GB


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"gpu_bytes": 7 * GB},
        {"args": {"kv_cache_memory_bytes": 3 * GB}},
        {"args": {"gpu_memory_utilization": 0.25}},
        {"kind": "sim", "sim": {"weights_bytes": 4 * GB}},
        {"kind": "noop"},
    ],
)
@pytest.mark.parametrize("is_profiled", [False, True])
def test_the_planner_goes_by_what_msd_check_says(told: dict[str, object], is_profiled: bool, tmp_path: Path) -> None:
    (tmp_path / "toy").mkdir()
    with (tmp_path / "toy" / "model.safetensors").open("wb") as file:
        file.truncate(2 * GB)
    config = msgspec.convert(
        {"model": [{"name": "toy", "path": "toy"}], "engine": [{"name": "m", "model": "toy", **told}]}, Config
    )
    profile = None
    if is_profiled:
        profile = Profile(
            schema=PROFILE, created="", command="", device="", engine_version="", source="measured", idle_w=None,
            modes=(profiled(9, 1),),
        )  # fmt: skip
    engine = config.engine[0]
    said = need(engine, config, tmp_path, 80 * GB, profile)
    planned = need_of(
        engine,
        profile.of("m") if profile is not None else None,
        80 * GB,
        reserve_bytes=config.residency.reserve_bytes,
        estimated_bytes=estimates(config, tmp_path).get("m", 0),
    )
    assert planned.gpu_bytes == said.num_bytes
    assert (said.num_bytes > 0) == (engine.kind != "noop" or is_profiled)


def test_a_sleeping_engine_keeps_its_context_on_the_gpu_and_its_weights_in_host_memory() -> None:
    engine = EngineConfig(name="m", model="x", args={"kv_cache_memory_bytes": 3 * GB})
    assert need_of(engine, profiled(12, 1), None) == Need(12 * GB, GB, 8 * GB)
    assert need_of(engine, profiled(12, 1), None, sleep_level=2) == Need(12 * GB, GB, 0)
    sim = EngineConfig(name="s", model="x", kind="sim", sim=SimEngineConfig(weights_bytes=5 * GB))
    assert need_of(sim, None, 80 * GB) == Need(5 * GB, 0, 5 * GB)


def test_without_a_known_gpu_everything_fits() -> None:
    budget = budget_of(None, None, GB, GB, 0, 0, False)
    assert budget.available_bytes is None
    assert budget.fits(10**15)


def test_what_others_take_is_what_the_view_shows_beyond_our_own() -> None:
    view = GpuView(memory_total_bytes=80 * GB, memory_used_bytes=50 * GB)
    budget = budget_of(view, 80 * GB, 2 * GB, GB, 30 * GB, 5 * GB, True)
    assert budget.others_bytes == 20 * GB
    assert budget.available_bytes == 58 * GB
    assert budget.fits(58 * GB)
    assert not budget.fits(58 * GB + 1)
    # A view from before the last move says nothing of what is there now: our own account counts.
    assert budget_of(view, 80 * GB, 2 * GB, GB, 30 * GB, 5 * GB, False).others_bytes == 5 * GB


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=7),
    st.integers(-5, 80),
)
def test_maximal_sets_fit_and_none_can_be_added_to(sizes: list[int], available: int) -> None:
    found = maximal_sets(sizes, available)

    def size(subset: int) -> int:
        return sum(size for i, size in enumerate(sizes) if subset >> i & 1)

    fitting = [subset for subset in range(1 << len(sizes)) if size(subset) <= available]
    expected = {s for s in fitting if not any(other != s and other & s == s for other in fitting)}
    assert set(found) == expected
    assert len(found) == len(expected)


def test_maximal_sets_without_a_budget_are_the_one_that_holds_all() -> None:
    assert maximal_sets([5, 5, 5], None) == [0b111]


@pytest.mark.parametrize(
    ("host_gb", "room_gb", "asleep"),
    [(100, None, 0b111), (100, 100, 0b111), (9, None, 0b001), (4, None, 0b100), (100, 1, 0b001), (0, None, 0)],
)
def test_who_leaves_first_sleeps_first_while_host_and_gpu_have_room(
    host_gb: int, room_gb: int | None, asleep: int
) -> None:
    needs = [Need(10 * GB, GB, 8 * GB), Need(10 * GB, GB, 5 * GB), Need(4 * GB, GB, 3 * GB)]
    room = None if room_gb is None else room_gb * GB
    assert put_away([0, 1, 2], needs, room, host_gb * GB) == asleep


def test_a_budget_may_be_overdrawn() -> None:
    assert not Budget(10 * GB, 2 * GB, 0, 9 * GB).fits(0)
