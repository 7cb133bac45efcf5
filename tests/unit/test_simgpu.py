"""The simulated GPU: shares, conservation, memory book, energy counter."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msd.simgpu import COUNTER_PERIOD_US, SimGpu


def make_gpu(memory_bytes: int = 100, idle_w: float = 75.0, seed: int = 0) -> SimGpu:
    return SimGpu(memory_bytes=memory_bytes, idle_w=idle_w, rng=Random(seed))


def nothing() -> None:
    """A listener that needs no telling."""


def test_memory_book_refuses_what_does_not_fit_and_frees_on_detach() -> None:
    gpu = make_gpu(memory_bytes=100)
    assert gpu.attach("a", 60, nothing)
    assert not gpu.attach("b", 41, nothing)
    assert gpu.attach("b", 40, nothing)
    assert gpu.view(0).memory_free_bytes == 0
    gpu.detach("a", 0)
    gpu.detach("a", 0)
    assert gpu.view(0).memory_used_bytes == 40


def test_an_engine_alone_works_at_full_speed() -> None:
    gpu = make_gpu()
    gpu.attach("a", 1, nothing)
    gpu.start_work("a", 10_000, 0.0, 5_000)
    assert gpu.due_us("a", 5_000) == 15_000
    assert gpu.done_us("a", 9_000) == pytest.approx(4_000)
    assert gpu.done_us("a", 15_000) is None


def test_a_second_engine_halves_the_speed_and_the_first_is_told() -> None:
    gpu = make_gpu()
    told: list[str] = []
    gpu.attach("a", 1, lambda: told.append("a"))
    gpu.attach("b", 1, lambda: told.append("b"))
    gpu.start_work("a", 10_000, 0.0, 0)
    assert gpu.due_us("a", 0) == 10_000
    gpu.start_work("b", 10_000, 0.0, 4_000)
    assert told == ["a"]
    # a had 4 ms alone; 6 ms are left at half speed.
    assert gpu.due_us("a", 4_000) == 16_000
    assert gpu.due_us("b", 4_000) == 24_000
    # From 16 ms on b is alone with 4 ms left, although nobody said that a is idle yet.
    assert gpu.due_us("b", 17_000) == 20_000


def test_leaving_early_speeds_the_other_up_and_tells_it() -> None:
    gpu = make_gpu()
    told: list[str] = []
    gpu.attach("a", 1, lambda: told.append("a"))
    gpu.attach("b", 1, lambda: told.append("b"))
    gpu.start_work("a", 10_000, 0.0, 0)
    gpu.start_work("b", 10_000, 0.0, 0)
    gpu.due_us("a", 0)
    told.clear()
    gpu.end_work("b", 4_000)
    assert told == ["a"]
    assert gpu.due_us("a", 4_000) == 12_000


def test_falling_idle_after_the_work_ended_tells_the_other_too() -> None:
    gpu = make_gpu()
    told: list[str] = []
    gpu.attach("a", 1, lambda: told.append("a"))
    gpu.attach("b", 1, nothing)
    gpu.start_work("a", 10_000, 0.0, 0)
    gpu.start_work("b", 2_000, 0.0, 0)
    assert gpu.due_us("a", 0) == 20_000
    gpu.due_us("b", 4_000)  # its work is done now
    told.clear()
    gpu.end_work("b", 4_000)
    assert told == ["a"]
    assert gpu.due_us("a", 4_000) == 12_000


def test_shortened_work_ends_early_and_costs_its_share_of_the_energy() -> None:
    gpu = make_gpu(idle_w=0.0)
    gpu.attach("a", 1, nothing)
    gpu.start_work("a", 10_000, 1_000.0, 0)
    gpu.shorten_work("a", 4_000, 1_000)
    assert gpu.due_us("a", 1_000) == 4_000
    assert gpu.true_energy_mj(50_000) == pytest.approx(400.0)


def test_idle_power_alone_is_in_the_counter_which_steps_in_whole_millijoules() -> None:
    gpu = make_gpu(idle_w=75.0)
    readings = [gpu.counter(t_us) for t_us in range(0, 2_000_001, 5_000)]
    values = [reading.energy_mj for reading in readings]
    assert values == sorted(values)
    assert gpu.true_energy_mj(2_000_000) == pytest.approx(150_000)
    assert 150_000 - values[-1] <= 75.0 * COUNTER_PERIOD_US[1] / 1_000
    steps = sorted(set(values))
    period_us = (steps[3] - steps[2]) / 75.0 * 1_000
    assert COUNTER_PERIOD_US[0] - 20 <= period_us <= COUNTER_PERIOD_US[1] + 20
    assert readings[-1].source == "simulated"
    assert readings[-1].domain == "sim:0"
    assert readings[-1].idle_w == 75.0


def test_the_view_is_labelled_and_shows_the_power_of_the_work_in_hand() -> None:
    gpu = make_gpu(idle_w=75.0)
    gpu.attach("a", 30, nothing)
    gpu.start_work("a", 1_000_000, 200_000.0, 0)  # 200 J in 1 s
    view = gpu.view(500_000)
    assert view.source == "simulated"
    assert view.power_instant_w == pytest.approx(275.0)
    assert view.power_average_w is not None
    assert 75.0 < view.power_average_w < 275.0
    assert view.memory_used_bytes == 30
    assert gpu.view(2_000_000).power_instant_w == pytest.approx(75.0)


def test_one_seed_gives_one_counter() -> None:
    def trace(seed: int) -> list[int]:
        gpu = make_gpu(seed=seed)
        gpu.attach("a", 1, nothing)
        gpu.start_work("a", 700_000, 90_000.0, 10_000)
        return [gpu.counter(t_us).energy_mj for t_us in range(0, 1_000_000, 7_000)]

    assert trace(3) == trace(3)
    assert trace(3) != trace(4)


@given(
    pieces=st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 20_000), st.integers(0, 50_000), st.integers(0, 30_000)),
        min_size=1,
        max_size=40,
    )
)
def test_shares_sum_to_one_and_energy_to_what_the_work_cost(pieces: list[tuple[int, int, int, int]]) -> None:
    """Whatever comes when: no more work is done than time has passed, all of it ends, and every mJ is counted once."""
    gpu = make_gpu(idle_w=10.0)
    names = ["a", "b", "c", "d"]
    for name in names:
        gpu.attach(name, 1, nothing)
    now_us, total_work_us, total_mj = 0, 0.0, 0.0
    for which, work_us, mj, gap_us in pieces:
        now_us += gap_us
        if gpu.done_us(names[which], now_us) is None:
            gpu.start_work(names[which], work_us, mj, now_us)
            total_work_us += work_us
            total_mj += mj
    finished_us = now_us
    for _ in range(10):
        due_us = [gpu.due_us(name, finished_us) for name in names]
        if max(due_us) == finished_us:
            break
        finished_us = max(due_us)
    assert all(gpu.done_us(name, finished_us) is None for name in names)
    assert finished_us >= total_work_us - 1
    assert gpu.true_energy_mj(finished_us) == pytest.approx(total_mj + 10.0 * finished_us / 1_000, rel=1e-6, abs=1e-3)
