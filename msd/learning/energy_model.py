"""The coefficients of the energy ledger, learnt from closed intervals: decayed normal equations, non-negative fit.

Each interval between two changes of the counter is one equation (energy spec, "Learning the coefficients"):

    E - P_idle * dt = sum over modes of  step_mj * steps + prefill_mj * prompt tokens + decode_mj * positions

Old equations fade with a half-life; a fit is a few milliseconds of numpy, off the loop. Coefficients hold for
one band of SM clocks, so each band has its own equations. A mode that intervals cannot tell from another one, because
the two always ran together, is fitted towards its prior and marked `low`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

import numpy as np
from msgspec import Struct

from msd.core import events as e
from msd.core.energy_domain import Coefficients, Equation
from msd.core.ledger import Ledger
from msd.ports import Clock, Offload

FIT_EVERY_S = 10.0
HALF_LIFE_S = 1_800.0
KINDS = 3
MAX_MODES = 64
MAX_BANDS = 8
MIN_INTERVALS = 30
"""A mode that was active in fewer keeps its prior."""
PRIOR_INTERVALS = 1.0
"""The prior weighs as much as one interval: it decides only what the others leave open."""
LOW_CONFIDENCE = 0.15
"""Relative standard error of a mode's energy, beyond which its coefficients are called uncertain."""
_NO_RIDGE = 1e-9
_DEFAULT = Coefficients()


class ModeFit(Struct, frozen=True):
    """One mode's coefficients with their standard errors (mJ), and how far to trust them.

    `relative_error`: standard error of the energy of the mode's average interval, as a share of it.
    """

    mode: str
    coefficients: Coefficients
    standard_errors: Coefficients
    relative_error: float
    num_intervals: int
    confidence: Literal["ok", "low"]


class Fit(Struct, frozen=True):
    """One solution: every mode that was seen often enough. `residual_mj`: RMS of what an interval leaves open."""

    modes: tuple[ModeFit, ...]
    residual_mj: float
    num_intervals: int

    @property
    def coefficients(self) -> dict[str, Coefficients]:
        """For the ledger and the router."""
        return {fit.mode: fit.coefficients for fit in self.modes}


class _Normal:
    """Normal equations of one clock band, decayed to the time of the newest one."""

    def __init__(self, priors: dict[str, Coefficients]) -> None:
        self.priors = priors
        self.t_us = 0
        self.gram = np.zeros((0, 0))
        self.moment = np.zeros(0)
        self.sum_x = np.zeros(0)
        self.energy_squares = 0.0
        self.num_intervals = 0.0
        self.num_active = np.zeros(0)
        """Decayed number of intervals in which each mode was active, and the same without decay."""
        self.num_seen = np.zeros(0, dtype=np.int64)

    def grow(self, num_modes: int) -> None:
        """Make room for modes that were not known before."""
        more = num_modes - len(self.num_active)
        if more > 0:
            self.gram = np.pad(self.gram, (0, more * KINDS))
            self.moment = np.pad(self.moment, (0, more * KINDS))
            self.sum_x = np.pad(self.sum_x, (0, more * KINDS))
            self.num_active = np.pad(self.num_active, (0, more))
            self.num_seen = np.pad(self.num_seen, (0, more))

    def take(self, rows: np.ndarray, energies: np.ndarray, times_us: np.ndarray, half_life_us: float) -> None:
        """Add equations, in order of time."""
        newest_us = int(times_us[-1])
        faded = 0.5 ** ((newest_us - self.t_us) / half_life_us)
        weights = 0.5 ** ((newest_us - times_us) / half_life_us)
        weighted = rows * weights[:, None]
        self.t_us = newest_us
        self.gram = self.gram * faded + rows.T @ weighted
        self.moment = self.moment * faded + weighted.T @ energies
        self.sum_x = self.sum_x * faded + weighted.sum(axis=0)
        self.energy_squares = self.energy_squares * faded + float(weights @ energies**2)
        self.num_intervals = self.num_intervals * faded + float(weights.sum())
        active = rows.reshape(len(rows), -1, KINDS).any(axis=2)
        self.num_active = self.num_active * faded + weights @ active
        self.num_seen = self.num_seen + active.sum(axis=0)


class EnergyModel:
    """Takes equations, gives fits. Not for two threads at once: the caller awaits each fit."""

    def __init__(self, priors: Mapping[str, Coefficients] | None = None, *, half_life_s: float = HALF_LIFE_S) -> None:
        """`priors`: what the modes begin with, such as a profile's figures."""
        self._priors = dict(priors or {})
        self._half_life_us = half_life_s * 1e6
        self._modes: dict[str, int] = {}
        self._bands: dict[int, _Normal] = {}
        self._band = 0
        self._known: dict[str, Coefficients] = {}
        """The latest solution of any clock band: the prior of a band that is new."""

    def fit(self, equations: Sequence[Equation]) -> Fit | None:
        """Learn, and solve for the clock band of the newest equation. None: too little has been seen yet."""
        for band in dict.fromkeys(equation.clock_band for equation in equations):
            self._learn(band, [equation for equation in equations if equation.clock_band == band])
        if equations:
            self._band = equations[-1].clock_band
        normal = self._bands.get(self._band)
        if normal is None:
            return None
        fit = self._solve(normal)
        if fit is not None:
            self._known.update(fit.coefficients)
        return fit

    def _learn(self, band: int, equations: list[Equation]) -> None:
        modes = self._modes
        for equation in equations:
            for mode, *_ in equation.terms:
                if mode not in modes and len(modes) < MAX_MODES:
                    modes[mode] = len(modes)
        normal = self._bands.pop(band, None) or _Normal({**self._priors, **self._known})
        self._bands[band] = normal  # last again: the band unseen for longest is forgotten first
        if len(self._bands) > MAX_BANDS:
            del self._bands[next(iter(self._bands))]
        normal.grow(len(modes))
        rows = np.zeros((len(equations), len(modes) * KINDS))
        for row, equation in zip(rows, equations, strict=True):
            for mode, num_steps, num_prefill_tokens, num_decodes in equation.terms:
                column = modes.get(mode)
                if column is not None:
                    row[column * KINDS : column * KINDS + KINDS] = num_steps, num_prefill_tokens, num_decodes
        energies = np.array([equation.energy_mj for equation in equations], dtype=float)
        times_us = np.array([equation.t_us for equation in equations], dtype=float)
        normal.take(rows, energies, times_us, self._half_life_us)

    def _solve(self, normal: _Normal) -> Fit | None:
        """Scaled columns, a ridge worth one interval towards the prior, non-negative least squares."""
        names = list(self._modes)
        normal.grow(len(names))
        chosen = [i for i in range(len(names)) if normal.num_seen[i] >= MIN_INTERVALS]
        columns = np.array([i * KINDS + kind for i in chosen for kind in range(KINDS)], dtype=np.int64)
        # A column that is always zero, such as the prompt tokens of cached prompts, keeps its prior.
        columns = columns[np.diag(normal.gram)[columns] > 0.0] if len(columns) else columns
        if not len(columns):
            return None
        scale = np.sqrt(np.diag(normal.gram)[columns])
        cosines = normal.gram[np.ix_(columns, columns)] / np.outer(scale, scale)
        moment = normal.moment[columns] / scale
        priors = np.array([_tuple_of(normal.priors.get(name, _DEFAULT)) for name in names]).reshape(-1)
        ridge = PRIOR_INTERVALS / np.maximum(normal.num_active[columns // KINDS], PRIOR_INTERVALS)
        solution = non_negative(cosines + np.diag(ridge), moment + ridge * priors[columns] * scale)
        explained = 2 * solution @ moment - solution @ cosines @ solution
        degrees = max(1.0, normal.num_intervals - len(columns))
        variance = max(0.0, normal.energy_squares - float(explained)) / degrees
        # The errors are those without the prior: where only it decides, nothing has been learnt.
        free = solution > 0.0
        covariance = np.zeros_like(cosines)
        if free.any():
            inner = cosines[np.ix_(free, free)]
            covariance[np.ix_(free, free)] = variance * np.linalg.inv(inner + _NO_RIDGE * np.eye(len(inner)))
        values = priors.copy()
        values[columns] = solution / scale
        errors = np.zeros(len(names) * KINDS)
        errors[columns] = np.sqrt(np.maximum(0.0, np.diag(covariance))) / scale
        fits = []
        for i in chosen:
            part = slice(i * KINDS, i * KINDS + KINDS)
            # Energy of the average interval, and its error, with all correlations between the mode's own coefficients.
            weights = np.where(columns // KINDS == i, normal.sum_x[columns] / scale, 0.0)
            energy, error = float(weights @ solution), float(np.sqrt(max(0.0, weights @ covariance @ weights)))
            relative = error / energy if energy > 0.0 else float("inf")
            fits.append(
                ModeFit(
                    mode=names[i],
                    coefficients=Coefficients(*(float(value) for value in values[part])),
                    standard_errors=Coefficients(*(float(value) for value in errors[part])),
                    relative_error=relative,
                    num_intervals=int(normal.num_seen[i]),
                    confidence="ok" if relative <= LOW_CONFIDENCE else "low",
                )
            )
        return Fit(tuple(fits), float(np.sqrt(variance)), int(normal.num_seen.max()))


def _tuple_of(coefficients: Coefficients) -> tuple[float, float, float]:
    return coefficients.step_mj, coefficients.prefill_mj_per_token, coefficients.decode_mj_per_token


def non_negative(gram: np.ndarray, moment: np.ndarray) -> np.ndarray:
    """The x >= 0 that minimises x'Gx - 2m'x, G positive definite: Lawson and Hanson's active sets, on normal equations.

    As Bro and De Jong do it (Journal of Chemometrics 11, 1997). Not scipy's: importing `scipy.optimize` takes 0.75 s,
    which on a thread would hold the loop, and before the sockets are bound would delay every start.
    """
    size = len(moment)
    solution = np.zeros(size)
    passive = np.zeros(size, dtype=bool)
    tolerance = 1e-12 * float(np.abs(moment).max(initial=1e-300))
    for _ in range(3 * size):
        gradient = np.where(passive, -np.inf, moment - gram @ solution)
        best = int(np.argmax(gradient))
        if gradient[best] <= tolerance:
            break
        passive[best] = True
        while passive.any():
            trial = np.zeros(size)
            trial[passive] = np.linalg.solve(gram[np.ix_(passive, passive)], moment[passive])
            negative = passive & (trial <= 0.0)
            if not negative.any():
                solution = trial
                break
            # As far towards it as nothing turns negative; what arrives at zero leaves the set.
            steps = solution[negative] / (solution[negative] - trial[negative])
            solution = solution + steps.min() * (trial - solution)
            passive &= solution > tolerance
            solution[~passive] = 0.0
    return solution


class Fitting:
    """Keeps the coefficients of a running daemon, or of a simulated one, up to date."""

    def __init__(self, ledger: Ledger, offload: Offload, clock: Clock) -> None:
        self._ledger = ledger
        self._offload = offload
        self._clock = clock
        self._model = EnergyModel(ledger.coefficients)
        self.latest: Fit | None = None

    async def run(self, post: Callable[[e.Event], None]) -> None:
        """Every ten seconds, until cancelled: fit what has come since, and tell the core."""
        while True:
            await asyncio.sleep(FIT_EVERY_S)
            equations = self._ledger.take_equations()
            if not equations:
                continue
            fit = await self._offload.run(partial(self._model.fit, equations))
            if fit is not None:
                self.latest = fit
                post(e.CoefficientsFitted(self._clock.now_us(), fit.coefficients))
