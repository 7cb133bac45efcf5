"""The fit of the energy coefficients: what it finds, what it owns up to not knowing, what it forgets."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from msd.core.energy_domain import Coefficients, Equation
from msd.learning.energy_model import MIN_INTERVALS, EnergyModel, Fit, ModeFit, non_negative
from tests.known_load import TRUTH

S = 1_000_000
PRIORS = {mode: Coefficients(1.0, 1.0, 1.0) for mode in TRUTH}


def equations(
    seed: int,
    num: int,
    modes: tuple[str, ...] = ("fp16",),
    *,
    truth: dict[str, Coefficients] = TRUTH,
    noise: float = 0.03,
    start_us: int = 0,
    clock_band: int = 0,
) -> list[Equation]:
    """Intervals of 100 ms of independent loads, exact but for the noise."""
    rng = Random(seed)
    made = []
    for i in range(num):
        terms = []
        energy_mj = 0.0
        for mode in modes:
            steps, prefill, decodes = rng.uniform(0, 4), rng.choice((0, 0, 1)) * rng.uniform(0, 500), rng.uniform(0, 40)
            terms.append((mode, steps, prefill, decodes))
            c = truth[mode]
            energy_mj += c.step_mj * steps + c.prefill_mj_per_token * prefill + c.decode_mj_per_token * decodes
        made.append(Equation(start_us + i * S // 10, int(energy_mj * rng.gauss(1.0, noise)), clock_band, tuple(terms)))
    return made


def fitted(model: EnergyModel, told: list[Equation]) -> Fit:
    fit = model.fit(told)
    assert fit is not None
    return fit


def of(fit: Fit, mode: str) -> ModeFit:
    return next(one for one in fit.modes if one.mode == mode)


def near(mode: ModeFit, truth: Coefficients, rel: float) -> bool:
    got, true = mode.coefficients, truth
    return bool(
        got.step_mj == pytest.approx(true.step_mj, rel=rel)
        and got.prefill_mj_per_token == pytest.approx(true.prefill_mj_per_token, rel=rel)
        and got.decode_mj_per_token == pytest.approx(true.decode_mj_per_token, rel=rel)
    )


def test_it_finds_the_coefficients_whatever_the_priors_say() -> None:
    fit = fitted(EnergyModel(PRIORS), equations(1, 600, ("fp16", "int4")))
    for mode, truth in TRUTH.items():
        one = of(fit, mode)
        assert near(one, truth, 0.03)
        assert one.confidence == "ok"
        assert one.num_intervals == 600
        errors = one.standard_errors
        assert abs(one.coefficients.step_mj - truth.step_mj) < 4 * errors.step_mj < 0.1 * truth.step_mj


def test_standard_errors_are_as_large_as_the_scatter_of_repeated_fits() -> None:
    fits = [of(fitted(EnergyModel(PRIORS), equations(seed, 300, ("fp16", "int4"))), "int4") for seed in range(60)]
    scatter = float(np.std([fit.coefficients.step_mj for fit in fits]))
    stated = float(np.mean([fit.standard_errors.step_mj for fit in fits]))
    assert 0.6 < stated / scatter < 1.7


def test_two_modes_that_always_ran_together_are_told_with_low_confidence_and_lean_to_their_priors() -> None:
    rng = Random(3)
    told = []
    for i in range(400):
        steps, prefill, decodes = rng.uniform(1, 4), rng.uniform(0, 300), rng.uniform(5, 40)
        terms = tuple((mode, steps, prefill, decodes) for mode in TRUTH)
        energy_mj = sum(
            c.step_mj * steps + c.prefill_mj_per_token * prefill + c.decode_mj_per_token * decodes
            for c in TRUTH.values()
        )
        told.append(Equation(i * S // 10, int(energy_mj * rng.gauss(1.0, 0.03)), 0, terms))
    priors = {"fp16": Coefficients(4_200.0, 11.0, 105.0), "int4": Coefficients(1_500.0, 11.0, 85.0)}
    fit = fitted(EnergyModel(priors), told)
    assert {one.confidence for one in fit.modes} == {"low"}
    total = sum(one.coefficients.step_mj for one in fit.modes)
    assert total == pytest.approx(5_600, rel=0.05), "their sum is known all the same"
    assert of(fit, "fp16").coefficients.step_mj > 1.5 * of(fit, "int4").coefficients.step_mj
    # Apart for half a minute is enough to tell them.
    model = EnergyModel(priors)
    apart = [*equations(4, 300, ("fp16",)), *equations(5, 300, ("int4",), start_us=30 * S)]
    assert {one.confidence for one in fitted(model, told + apart).modes} == {"ok"}


def test_what_was_never_seen_keeps_its_prior() -> None:
    model = EnergyModel({"fp16": Coefficients(7.0, 8.0, 9.0)})
    assert model.fit(equations(1, MIN_INTERVALS - 1)) is None
    cached = [
        Equation(e.t_us, e.energy_mj, 0, tuple((m, s, 0.0, d) for m, s, _, d in e.terms))
        for e in equations(1, 100, truth={"fp16": Coefficients(4_000.0, 0.0, 100.0)})
    ]
    one = of(fitted(EnergyModel({"fp16": Coefficients(7.0, 8.0, 9.0)}), cached), "fp16")
    assert one.coefficients.prefill_mj_per_token == 8.0
    assert one.coefficients.step_mj == pytest.approx(4_000, rel=0.1)


def test_one_request_at_a_time_cannot_tell_steps_from_tokens_but_their_sum() -> None:
    rng = Random(1)
    told = []
    for i in range(300):
        steps = rng.uniform(1, 4)
        told.append(Equation(i * S // 10, int(4_100 * steps * rng.gauss(1.0, 0.03)), 0, (("fp16", steps, 0.0, steps),)))
    one = of(fitted(EnergyModel(), told), "fp16")
    assert one.coefficients.step_mj + one.coefficients.decode_mj_per_token == pytest.approx(4_100, rel=0.02)
    assert one.standard_errors.decode_mj_per_token > one.coefficients.decode_mj_per_token
    assert one.confidence == "ok", "the energy of the mode is known well"


def test_old_intervals_fade() -> None:
    model = EnergyModel(half_life_s=60.0)
    cold = {"fp16": Coefficients(2_000.0, 5.0, 50.0)}
    assert near(of(fitted(model, equations(1, 600, truth=cold)), "fp16"), cold["fp16"], 0.05)
    later = equations(2, 3_000, start_us=61 * S)
    assert near(of(fitted(model, later), "fp16"), TRUTH["fp16"], 0.06)


def test_each_clock_band_has_its_own_coefficients_and_a_new_one_begins_with_the_others() -> None:
    model = EnergyModel()
    fast = fitted(model, equations(1, 400, clock_band=6))
    slow_truth = {"fp16": Coefficients(2_500.0, 7.0, 70.0)}
    assert fitted(model, equations(2, 300, truth=slow_truth, start_us=40 * S, clock_band=4)).modes
    slow = fitted(model, equations(3, 300, truth=slow_truth, start_us=70 * S, clock_band=4))
    assert near(of(slow, "fp16"), slow_truth["fp16"], 0.05)
    again = fitted(model, equations(4, 1, start_us=100 * S, clock_band=6))
    assert near(of(again, "fp16"), of(fast, "fp16").coefficients, 0.02)


def test_batches_do_not_matter() -> None:
    told = equations(1, 500, ("fp16", "int4"))
    whole = fitted(EnergyModel(), told)
    model = EnergyModel()
    parts = [model.fit(told[i : i + 50]) for i in range(0, 500, 50)][-1]
    assert parts is not None
    for mode in TRUTH:
        assert near(of(parts, mode), of(whole, mode).coefficients, 1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_the_solver_agrees_with_scipys(seed: int) -> None:
    scipy_optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(60, 12))
    target = rows @ rng.normal(size=12) + rng.normal(size=60)
    ours = non_negative(rows.T @ rows, rows.T @ target)
    theirs, _ = scipy_optimize.nnls(rows, target)
    assert (theirs == 0).any(), "a case in which the bound matters"
    np.testing.assert_allclose(ours, theirs, atol=1e-9)


def test_the_solver_takes_a_near_singular_problem() -> None:
    rows = np.ones((50, 6)) + 1e-7 * np.random.default_rng(1).normal(size=(50, 6))
    solution = non_negative(rows.T @ rows + 1e-6 * np.eye(6), rows.T @ np.full(50, 6.0))
    assert (solution >= 0).all()
    assert rows @ solution == pytest.approx(np.full(50, 6.0), rel=1e-3)
