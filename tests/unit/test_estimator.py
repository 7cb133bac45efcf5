"""Estimates of TTFT, TPOT and energy: learnt from what is measured, hard to derail."""

from __future__ import annotations

from random import Random

import pytest

from msd.core.estimator import Line, ModeEstimate
from msd.domain import EngineInfo


def info(ttft_ms: float = 20.0, tpot_ms: float = 5.0) -> EngineInfo:
    return EngineInfo(
        engine="e",
        max_model_len=1,
        max_num_seqs=1,
        kv_capacity_tokens=1,
        idle_ttft_ms=ttft_ms,
        idle_tpot_ms=tpot_ms,
    )


def test_a_line_is_found_in_noise() -> None:
    rng = Random(3)
    line = Line(1.0, 0.0)
    for _ in range(400):
        x = rng.uniform(0.0, 4.0)
        line.learn(x, (25.0 + 43.0 * x) * rng.lognormvariate(0.0, 0.05))
    assert line.at(0.0) == pytest.approx(25.0, rel=0.1)
    assert line.at(4.0) == pytest.approx(197.0, rel=0.1)


def test_a_line_follows_what_drifts() -> None:
    rng = Random(4)
    line = Line(10.0, 0.0)
    for scale in (1.0, 2.0):
        for _ in range(600):
            x = rng.uniform(0.0, 2.0)
            line.learn(x, scale * (10.0 + 20.0 * x))
    assert line.at(1.0) == pytest.approx(60.0, rel=0.1)


@pytest.mark.parametrize("outlier_ms", [1e7, 1e-6])
def test_one_outlier_moves_a_prediction_by_a_factor_at_most(outlier_ms: float) -> None:
    line = Line(10.0, 0.0)
    for _ in range(3):
        line.learn(1.0, 10.0)
    before = line.at(1.0)
    line.learn(1.0, outlier_ms)
    assert before / 4.001 <= line.at(1.0) <= before * 4.001


def test_the_first_observation_may_correct_a_wrong_prior_at_once() -> None:
    line = Line(1.0, 0.0)
    line.learn(0.5, 200.0)
    assert line.at(0.5) == pytest.approx(200.0, rel=0.05)


@pytest.mark.parametrize("scale", [0.05, 1.0, 500.0, 60_000.0])
def test_learning_is_as_fast_for_slow_engines_as_for_fast_ones(scale: float) -> None:
    line = Line(scale, 0.0)
    for _ in range(3):
        line.learn(0.1, 3.0 * scale)
    assert line.at(0.1) == pytest.approx(3.0 * scale, rel=0.02)


def test_predictions_are_positive_and_finite_whatever_comes() -> None:
    rng = Random(5)
    line = Line(0.0, 0.0)
    for _ in range(3_000):
        line.learn(rng.choice((0.0, 0.001, 130.0, rng.random())), rng.choice((0.0, 1e-9, 1e6, rng.random() * 100)))
        assert line.a >= 0.0
        assert line.b >= 0.0
        for x in (0.0, 1.0, 130.0):
            assert 0.0 < line.at(x) < 1e9


def test_a_long_run_of_equal_requests_leaves_the_line_able_to_learn() -> None:
    """Covariance in the direction that is never excited grows up to its cap and must not explode at the next one."""
    line = Line(10.0, 0.0)
    for _ in range(20_000):
        line.learn(0.0, 10.0)
    assert line.p11 <= 100 * 10.0**2
    for _ in range(20):
        line.learn(1.0, 30.0)
    assert line.at(1.0) == pytest.approx(30.0, rel=0.05)
    assert line.at(0.0) == pytest.approx(10.0, rel=0.5)


def test_the_warm_up_is_the_prior_until_requests_know_better() -> None:
    estimate = ModeEstimate()
    estimate.seed(info())
    assert (estimate.ttft_ms(1_000), estimate.tpot_ms(3)) == (20.0, 5.0)
    for _ in range(50):
        estimate.learn_times(100, 40.0, 8.0, 0, 100.0)
    estimate.seed(info(ttft_ms=20.0, tpot_ms=5.0))
    assert estimate.ttft_ms(100) == pytest.approx(40.0, rel=0.02)
    assert estimate.tpot_ms(0) == pytest.approx(8.0, rel=0.02)


def test_an_engine_that_measured_nothing_leaves_the_default() -> None:
    estimate = ModeEstimate()
    estimate.seed(info(0.0, 0.0))
    assert (estimate.ttft_ms(0), estimate.tpot_ms(0)) == (1.0, 1.0)


def test_a_single_token_teaches_no_tpot() -> None:
    estimate = ModeEstimate()
    estimate.seed(info())
    estimate.learn_times(100, 40.0, 0.0, 0, 40.0)
    assert estimate.tpot.n == 0
    assert estimate.ttft.n == 1


def test_waiting_is_the_queue_over_the_slots() -> None:
    estimate = ModeEstimate()
    assert estimate.wait_ms(10, 2) == 0.0
    estimate.learn_times(1, 1.0, 1.0, 0, 100.0)
    assert estimate.wait_ms(10, 2) == 500.0
    estimate.learn_times(1, 1.0, 1.0, 0, 300.0)
    assert estimate.service_ms == pytest.approx(110.0)


def test_energy_is_unknown_until_measured() -> None:
    estimate = ModeEstimate()
    assert estimate.mj_per_token is None
    estimate.learn_energy(1_000, 100)
    assert estimate.mj_per_token == 10.0
    estimate.learn_energy(3_000, 100)
    assert estimate.mj_per_token == pytest.approx(11.0)
    estimate.learn_energy(50, 0)
