"""Estimates of TTFT, TPOT and energy: learnt from what is measured, hard to derail."""

from __future__ import annotations

from random import Random

import msgspec
import pytest

from msd.core.estimator import FLOOR_MS, Corrections, Fit, ModeEstimate, Sharing, batch_cell, prompt_cell
from msd.domain import EngineInfo
from msd.profile import ModeProfile


def info(ttft_ms: float = 20.0, tpot_ms: float = 5.0) -> EngineInfo:
    return EngineInfo(
        engine="e",
        max_model_len=1,
        max_num_seqs=1,
        kv_capacity_tokens=1,
        idle_ttft_ms=ttft_ms,
        idle_tpot_ms=tpot_ms,
    )


PROFILE = ModeProfile(
    mode="m",
    recipe="",
    ttft_ms=(25.0, 0.043, 2.0),
    tpot_ms=(10.0, 0.5, 0.0002),
    eos_step_ms=7.0,
    step_mj=1_500.0,
    prefill_mj_per_token=10.0,
    decode_mj_per_token=90.0,
)


def test_a_line_is_found_in_noise() -> None:
    rng = Random(3)
    line = Fit(1.0)
    for _ in range(400):
        x = rng.uniform(0.0, 4.0)
        line.learn(x, 0.0, (25.0 + 43.0 * x) * rng.lognormvariate(0.0, 0.05))
    assert line.at(0.0) == pytest.approx(25.0, rel=0.1)
    assert line.at(4.0) == pytest.approx(197.0, rel=0.1)


def test_a_line_follows_what_drifts() -> None:
    rng = Random(4)
    line = Fit(10.0)
    for scale in (1.0, 2.0):
        for _ in range(600):
            x = rng.uniform(0.0, 2.0)
            line.learn(x, 0.0, scale * (10.0 + 20.0 * x))
    assert line.at(1.0) == pytest.approx(60.0, rel=0.1)


@pytest.mark.parametrize("outlier_ms", [1e7, 1e-6])
def test_one_outlier_moves_a_prediction_by_a_factor_at_most(outlier_ms: float) -> None:
    line = Fit(10.0)
    for _ in range(3):
        line.learn(1.0, 0.0, 10.0)
    before = line.at(1.0)
    line.learn(1.0, 0.0, outlier_ms)
    assert before / 4.001 <= line.at(1.0) <= before * 4.001


def test_the_first_observation_may_correct_a_wrong_prior_at_once() -> None:
    line = Fit(1.0)
    line.learn(0.5, 0.0, 200.0)
    assert line.at(0.5) == pytest.approx(200.0, rel=0.05)


@pytest.mark.parametrize("scale", [0.05, 1.0, 500.0, 60_000.0])
def test_learning_is_as_fast_for_slow_engines_as_for_fast_ones(scale: float) -> None:
    line = Fit(scale)
    for _ in range(3):
        line.learn(0.1, 0.0, 3.0 * scale)
    assert line.at(0.1) == pytest.approx(3.0 * scale, rel=0.02)


def test_predictions_are_positive_and_finite_whatever_comes() -> None:
    rng = Random(5)
    line = Fit(0.0)
    for _ in range(3_000):
        x1, x2 = (rng.choice((0.0, 0.001, 130.0, rng.random())) for _ in range(2))
        line.learn(x1, x2, rng.choice((0.0, 1e-9, 1e6, rng.random() * 100)))
        assert min(line.a, line.b, line.c) >= 0.0
        for x in (0.0, 1.0, 130.0):
            assert 0.0 < line.at(x) < 1e9


def test_a_long_run_of_equal_requests_leaves_the_line_able_to_learn() -> None:
    """Covariance in the direction that is never excited grows up to its cap and must not explode at the next one."""
    line = Fit(10.0)
    for _ in range(20_000):
        line.learn(0.0, 0.0, 10.0)
    assert line.p11 <= 100 * 10.0**2
    for _ in range(20):
        line.learn(1.0, 0.0, 30.0)
    assert line.at(1.0) == pytest.approx(30.0, rel=0.05)
    assert line.at(0.0) == pytest.approx(10.0, rel=0.5)


def test_two_slopes_are_told_apart() -> None:
    rng = Random(6)
    line = Fit(1.0)
    for _ in range(600):
        x1, x2 = rng.uniform(0.0, 16.0), rng.uniform(0.0, 1.0)
        line.learn(x1, x2, (10.0 + 0.5 * x1 + 8.0 * x2) * rng.lognormvariate(0.0, 0.03))
    assert (line.a, line.b, line.c) == pytest.approx((10.0, 0.5, 8.0), rel=0.2)


def test_a_slope_that_would_be_negative_does_not_drive_the_others_away() -> None:
    """Clipped one by one, the coefficients of a simulated engine under full load grew without end: 25 ms became 700."""
    rng = Random(7)
    line = Fit(5.0)
    for i in range(2_000):
        x1 = 31.0 - (i % 3 == 0)
        x2 = 1.0 + 0.3 * rng.random()
        line.learn(x1, x2, (40.0 - 0.4 * x1 - 2.0 * x2) * rng.lognormvariate(0.0, 0.2))
    assert line.at(31.0, 1.15) == pytest.approx(25.3, rel=0.15)


def test_five_deviations_off_is_an_outlier_but_not_for_ever() -> None:
    rng = Random(8)
    line = Fit(10.0)
    for _ in range(200):
        line.learn(1.0, 0.0, 10.0 * rng.lognormvariate(0.0, 0.05))
    before = (line.a, line.b, line.n)
    line.learn(1.0, 0.0, 30.0)
    assert ((line.a, line.b, line.n), line.num_outliers) == (before, 1)
    for _ in range(40):
        line.learn(1.0, 0.0, 30.0)
    assert line.at(1.0) == pytest.approx(30.0, rel=0.1)


def test_what_was_profiled_stays_within_a_factor_of_four() -> None:
    line = Fit(10.0, 4.0, 2.0, trusted=True)
    for _ in range(500):
        line.learn(1.0, 1.0, 1_000.0)
        assert (line.a <= 40.0, line.b <= 16.0, line.c <= 8.0) == (True, True, True)
    for _ in range(3_000):
        line.learn(1.0, 1.0, 0.01)
    assert (line.a >= 2.5, line.b >= 1.0, line.c >= 0.5) == (True, True, True)


@pytest.mark.parametrize("coefficients", [(0.0, 5.0, 0.0), (0.0, 0.0, 5.0), (5.0, 0.0, 0.0), (0.0, 0.0, 0.0)])
def test_a_zero_of_a_profile_can_be_learnt(coefficients: tuple[float, float, float]) -> None:
    """Non-negative least squares gives zeros: with P = 0 and bounds [0, 0] they stayed, 2 ms where 12 were due."""
    rng = Random(10)
    line = Fit(*coefficients, trusted=True)
    least = tuple(x / 4.0 for x in coefficients)
    for _ in range(500):
        line.learn(0.1, 0.01, 12.0)
        assert all(now >= bound for now, bound in zip((line.a, line.b, line.c), least, strict=True))
    size = max(sum(coefficients), FLOOR_MS)
    assert line.at(0.1, 0.01) == pytest.approx(min(12.0, 4.4 * size), rel=0.05)
    if sum(coefficients):
        line = Fit(*coefficients, trusted=True)
        for _ in range(500):
            x1, x2 = rng.random(), rng.random()
            line.learn(x1, x2, 6.0 + 3.0 * x1 + 2.0 * x2)
        assert line.at(0.5, 0.5) == pytest.approx(8.5, rel=0.05)


def test_a_profile_weighs_more_than_a_warm_up() -> None:
    guessed, measured = Fit(10.0), Fit(10.0, 4.0, 2.0, trusted=True)
    for line in (guessed, measured):
        line.learn(1.0, 1.0, 20.0)
    assert abs(measured.at(1.0, 1.0) - 16.0) < 0.5 * abs(guessed.at(1.0, 1.0) - 16.0)


def test_an_observation_of_little_weight_moves_a_line_little() -> None:
    light, heavy = Fit(10.0), Fit(10.0)
    for line in (light, heavy):
        for _ in range(20):
            line.learn(1.0, 0.0, 10.0)
    light.learn(1.0, 0.0, 12.0, 1 / 16)
    heavy.learn(1.0, 0.0, 12.0)
    assert 0.0 < light.at(1.0) - 10.0 < 0.2 * (heavy.at(1.0) - 10.0)


# --- corrections -----------------------------------------------------------------------------------------------------


def test_a_cell_is_believed_the_more_the_more_it_has_seen() -> None:
    cells = Corrections()
    cells.learn(2, 3, 2.0)
    assert cells.rows[2][3] == pytest.approx(2 ** (1 / 9))
    for _ in range(200):
        cells.learn(2, 3, 2.0)
    assert cells.rows[2][3] == pytest.approx(2.0, rel=0.05)
    assert [factor for row in cells.rows for factor in row].count(1.0) == 19


@pytest.mark.parametrize("ratio", [1e9, 0.0, -1.0])
def test_a_cell_corrects_by_a_factor_of_three_at_most(ratio: float) -> None:
    cells = Corrections()
    for _ in range(1_000):
        cells.learn(0, 0, ratio)
    assert 1 / 3.01 < cells.rows[0][0] < 3.01


def test_cells_grow_with_the_logarithm() -> None:
    assert [prompt_cell(n) for n in (0, 31, 32, 127, 128, 511, 512, 2_047, 2_048, 10**6)] == [
        0, 0, 1, 1, 2, 2, 3, 3, 4, 4,
    ]  # fmt: skip
    assert [batch_cell(n) for n in (0, 1, 3, 4, 15, 16, 1_000)] == [0, 1, 1, 2, 2, 3, 3]


# --- engines that share a GPU ----------------------------------------------------------------------------------------


def test_sharing_is_learnt_per_number_of_busy_engines() -> None:
    rng = Random(9)
    sharing = Sharing()
    for _ in range(2_000):
        others = rng.uniform(0.0, 3.0)
        sharing.learn(others, (1.0 + 0.8 * others) * rng.lognormvariate(0.0, 0.1))
    assert [sharing.at(n) for n in (0.0, 0.5, 1.0, 2.0, 3.0)] == pytest.approx([1.0, 1.4, 1.8, 2.6, 3.4], rel=0.1)


def test_company_never_helps_and_what_is_unseen_is_no_better_than_what_was_seen() -> None:
    sharing = Sharing()
    for _ in range(200):
        sharing.learn(1.0, 0.5)
        sharing.learn(2.0, 1.9)
    assert sharing.at(1.0) == 1.0
    assert sharing.at(2.0) == pytest.approx(1.9, rel=0.05)
    assert sharing.at(5.0) == pytest.approx(1.9, rel=0.05)
    assert sharing.at(-1.0) == 1.0
    assert sharing.at(1e6) >= 1.0


# --- modes -----------------------------------------------------------------------------------------------------------


def test_the_warm_up_is_the_prior_until_requests_know_better() -> None:
    estimate = ModeEstimate()
    estimate.seed(info())
    assert (estimate.ttft_ms(1_000), estimate.tpot_ms(3)) == (20.0, 5.0)
    for _ in range(50):
        estimate.ttft.learn(0.1, 0.0, 40.0)
        estimate.tpot.learn(0.0, 0.0, 8.0)
    estimate.seed(info())
    assert estimate.ttft_ms(100) == pytest.approx(40.0, rel=0.02)
    assert estimate.tpot_ms(0) == pytest.approx(8.0, rel=0.02)


def test_an_engine_that_measured_nothing_leaves_the_default() -> None:
    estimate = ModeEstimate()
    estimate.seed(info(0.0, 0.0))
    assert (estimate.ttft_ms(0), estimate.tpot_ms(0)) == (1.0, 1.0)


def test_a_profile_is_the_prior_and_a_start_does_not_replace_it() -> None:
    estimate = ModeEstimate()
    estimate.seed_profile(PROFILE)
    estimate.seed(info())
    assert estimate.ttft_ms(1_000) == pytest.approx(25.0 + 43.0 + 2.0)
    assert estimate.tpot_ms(4, 5_000) == pytest.approx(10.0 + 2.0 + 1.0)
    assert estimate.eos_step_ms == 7.0
    assert estimate.costs is not None
    assert estimate.costs.step_mj == 1_500.0


def test_a_profile_without_slopes_is_not_replaced_by_the_warm_up() -> None:
    estimate = ModeEstimate()
    estimate.seed_profile(msgspec.structs.replace(PROFILE, ttft_ms=(25.0, 0.0, 0.0), tpot_ms=(10.0, 0.0, 0.0)))
    estimate.seed(info())
    assert (estimate.ttft_ms(1_000), estimate.tpot_ms(3)) == (25.0, 10.0)


def test_a_profile_without_energy_leaves_it_unknown() -> None:
    estimate = ModeEstimate()
    estimate.seed_profile(msgspec.structs.replace(PROFILE, step_mj=None))
    assert estimate.costs is None


def test_the_first_requests_after_a_start_teach_no_times() -> None:
    estimate = ModeEstimate()
    estimate.seed(info())
    assert [estimate.is_due(0) for _ in range(5)] == [False, False, False, True, True]


def test_who_has_learnt_much_learns_at_intervals() -> None:
    estimate = ModeEstimate()
    for _ in range(50):
        assert estimate.is_due(0)
        estimate.ttft.learn(0.1, 0.0, 10.0)
    assert [estimate.is_due(t_us) for t_us in (1, 24_999, 25_000, 25_001, 60_000)] == [False, False, True, False, True]


def test_a_busy_engine_answers_after_the_step_under_way_and_with_the_others_decoding() -> None:
    estimate = ModeEstimate()
    estimate.seed_profile(PROFILE)
    assert estimate.offset_ms(0, 0) == 0.0
    step_ms = 10.0 + 0.5 * 4 + 1.0
    assert estimate.offset_ms(4, 5_000) == pytest.approx(0.5 * step_ms + (step_ms - 10.0))


def test_the_mean_service_is_slow_to_move() -> None:
    estimate = ModeEstimate()
    assert estimate.wait_ms(10, 2) == 0.0
    estimate.learn_service(100.0)
    assert estimate.wait_ms(10, 2) == 500.0
    estimate.learn_service(300.0)
    assert estimate.service_ms == pytest.approx(110.0)


def test_energy_is_unknown_until_measured() -> None:
    estimate = ModeEstimate()
    assert estimate.mj_per_token is None
    estimate.learn_energy(1_000, 100)
    assert estimate.mj_per_token == 10.0
    estimate.learn_energy(3_000, 100)
    assert estimate.mj_per_token == pytest.approx(11.0)
    estimate.learn_energy(50, 0)
