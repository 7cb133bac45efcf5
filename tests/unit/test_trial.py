"""The betting tests: what they certify, what they find, and how rarely they err (figures: tests/bench/gate.py)."""

from __future__ import annotations

from random import Random

import pytest

from msd.core.trial import Bettor, Trial, try_batch

DELTA, ALPHA = 0.015, 0.05


def differences(seed: int, num: int, disagreement: float, mean: float) -> list[float]:
    """Paired differences: -1, 0 or 1, of which `disagreement` are not 0."""
    rng, worse = Random(seed), (disagreement - mean) / 2
    drawn = [rng.random() for _ in range(num)]
    return [-1.0 if one < worse else 1.0 if one < disagreement else 0.0 for one in drawn]


def test_two_modes_that_never_differ_are_certified_after_some_hundred_pairs() -> None:
    told = try_batch([0.0] * 1_000, DELTA, ALPHA)
    assert told.verdict == "certified"
    assert told.num_pairs_safe is not None
    assert 300 < told.num_pairs_safe < 600
    assert told.num_pairs_unsafe is None


def test_too_few_pairs_decide_nothing() -> None:
    assert try_batch([0.0] * 100, DELTA, ALPHA).verdict == "undecided"
    assert try_batch([], DELTA, ALPHA).verdict == "undecided"


def test_a_mode_that_loses_three_points_is_revoked() -> None:
    told = [try_batch(differences(seed, 8_000, 0.05, -0.03), DELTA, ALPHA).verdict for seed in range(20)]
    assert told.count("revoked") >= 19
    assert "certified" not in told


def test_a_mode_right_at_the_limit_is_rarely_passed() -> None:
    told = [try_batch(differences(seed, 4_000, 0.05, -DELTA), DELTA, ALPHA) for seed in range(60)]
    assert sum(one.num_pairs_safe is not None for one in told) <= 8


def test_found_both_ways_it_is_revoked() -> None:
    told = try_batch([0.0] * 1_000 + [-1.0] * 200, DELTA, ALPHA)
    assert told.num_pairs_safe is not None
    assert told.num_pairs_unsafe is not None
    assert told.verdict == "revoked"


def test_stakes_come_from_earlier_pairs_only() -> None:
    """The first value meets the stake of the prior, whatever it is."""
    low, high = Bettor(0.4925, "below", 0.48), Bettor(0.4925, "below", 0.48)
    assert low.add(0.0) - 1 == pytest.approx((1 - high.add(0.985)), rel=1e-9)


def test_capital_neither_overflows_nor_goes_below_nothing() -> None:
    safe, unsafe = Bettor(0.4925, "above"), Bettor(0.4925, "below")
    for _ in range(20_000):
        safe.add(1.0)
        unsafe.add(1.0)
    assert 1e6 < safe.capital < 1e13
    assert 0 < unsafe.capital <= 1.0


def test_production_finds_a_mode_that_becomes_worse_after_long_good_service() -> None:
    trial = Trial(DELTA, ALPHA)
    for difference in differences(1, 20_000, 0.05, 0.0):
        assert not trial.add(difference)
    found = [trial.add(difference) for difference in differences(2, 12_000, 0.05, -0.03)]
    assert found.count(True) == 1, "it says so once"
    assert trial.is_over


def test_an_equal_mode_keeps_its_certificate() -> None:
    for seed in range(10):
        trial = Trial(DELTA, ALPHA)
        assert not any(trial.add(difference) for difference in differences(seed, 6_000, 0.05, 0.0))


def test_pairs_that_cannot_be_scored_are_counted_and_take_nothing_away() -> None:
    trial = Trial(DELTA, ALPHA)
    trial.add(-1.0)
    scored = trial.capital
    for _ in range(2_000):
        trial.count(False)
    trial.count(True)
    assert trial.capital == scored > 1
    assert not trial.is_over
    assert (trial.num_scored, trial.num_unscored, trial.num_disagree) == (1, 2_001, 2_000)
    assert trial.agreement == pytest.approx(1 / 2_001)
