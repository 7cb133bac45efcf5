"""The lines of one mode, fitted to measured rows by relative error (modeswitch spec, section 6).

    TTFT = a0 + a1 * n    latency = TTFT + c0 * (O - 1) + step * [ends by EOS]    E = w_pre * TTFT + w_dec * decoding

n = prompt tokens that no cache holds, O = output tokens, alone on the GPU. Rows are divided by what was measured, so
that errors are relative; coefficients are never negative.
`step` is the uncounted decode step of an answer that ends by itself: leaving it out triples the error of short answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log, sqrt

import numpy as np
from msgspec import Struct, structs
from scipy.optimize import nnls

REPEAT_NOISE = 0.04
"""By how much the same run differs from one day to the next (the published live run against the sweep)."""


class Shape(Struct, frozen=True, kw_only=True):
    """One measured row: what was asked, and what it took."""

    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: float
    ends_by_eos: bool
    ttft_ms: float
    latency_ms: float
    energy_mj: float

    @property
    def num_new_tokens(self) -> int:
        """Prompt tokens to compute."""
        return self.num_prompt_tokens - self.num_cached_tokens


class Figures(Struct, frozen=True):
    """Predicted of one request."""

    ttft_ms: float
    e2el_ms: float
    energy_mj: float


class ModeLines(Struct, frozen=True, kw_only=True):
    """Coefficients of one mode. ms, ms per token, watts. `latency` and `energy` factors: learnt of one class alone."""

    ttft_base_ms: float
    ttft_ms_per_token: float
    tpot_ms: float
    eos_step_ms: float
    prefill_w: float
    decode_w: float
    latency_spread: float
    """Standard deviation of log(measured / predicted latency) over the rows of the fit, each left out once."""
    energy_spread: float
    latency_factor: float = 1.0
    energy_factor: float = 1.0

    def predict(
        self, num_prompt_tokens: int, num_cached_tokens: int, num_output_tokens: float, *, ends_by_eos: bool
    ) -> Figures:
        """Figures of a request of this shape."""
        ttft_ms = self.ttft_base_ms + self.ttft_ms_per_token * max(0, num_prompt_tokens - num_cached_tokens)
        decode_ms = self.tpot_ms * max(0.0, num_output_tokens - 1) + (self.eos_step_ms if ends_by_eos else 0.0)
        return Figures(
            ttft_ms=ttft_ms,
            e2el_ms=(ttft_ms + decode_ms) * self.latency_factor,
            energy_mj=(self.prefill_w * ttft_ms + self.decode_w * decode_ms) * self.energy_factor,
        )

    def of(self, row: Shape) -> Figures:
        """Figures of a row that was measured."""
        return self.predict(
            row.num_prompt_tokens, row.num_cached_tokens, row.num_output_tokens, ends_by_eos=row.ends_by_eos
        )


def fit(rows: Sequence[Shape]) -> ModeLines:
    """Lines through these rows, with their spread on rows that they have not seen."""
    lines = _fit(rows)
    latency, energy = [], []
    for index, row in enumerate(rows):
        others = [*rows[:index], *rows[index + 1 :]]
        if not others:
            continue
        told = _fit(others).of(row)
        latency.append(log(row.latency_ms / told.e2el_ms))
        if row.num_output_tokens > 1:
            energy.append(log(row.energy_mj / told.energy_mj))
    return structs.replace(lines, latency_spread=_rms(latency), energy_spread=_rms(energy))


def reveal(lines: ModeLines, row: Shape) -> ModeLines:
    """The lines for requests like this row once it was measured.

    The row's error is shrunk by how far the mode's lines usually miss against how far a run repeats: the estimate of
    least variance of the class's own factor.
    """
    told = lines.of(row)
    return structs.replace(
        lines,
        latency_factor=_shrunk(row.latency_ms / told.e2el_ms, lines.latency_spread),
        energy_factor=_shrunk(row.energy_mj / told.energy_mj, lines.energy_spread),
    )


def _shrunk(ratio: float, spread: float) -> float:
    return exp(log(ratio) * spread**2 / (spread**2 + REPEAT_NOISE**2))


def _fit(rows: Sequence[Shape]) -> ModeLines:
    base, slope = _relative([[1.0] * len(rows), [row.num_new_tokens for row in rows]], [row.ttft_ms for row in rows])
    one = [row.latency_ms - row.ttft_ms for row in rows if row.ends_by_eos and row.num_output_tokens <= 1]
    step = _relative([[1.0] * len(one)], one)[0] if one else None
    several = [row for row in rows if row.num_output_tokens > 1]
    (tpot,) = _relative(
        [[1.0] * len(several)],
        [
            (row.latency_ms - row.ttft_ms - (step or 0.0) * row.ends_by_eos)
            / (row.num_output_tokens - 1 + (row.ends_by_eos and step is None))
            for row in several
        ],
    )
    # Polled power has 0 to 2 samples in an answer of one token: those rows say nothing about watts.
    prefill_w, decode_w = _relative(
        [
            [base + slope * row.num_new_tokens for row in several],
            [row.latency_ms - row.ttft_ms for row in several],
        ],
        [row.energy_mj for row in several],
    )
    return ModeLines(
        ttft_base_ms=base,
        ttft_ms_per_token=slope,
        tpot_ms=tpot,
        eos_step_ms=tpot if step is None else step,
        prefill_w=prefill_w,
        decode_w=decode_w,
        latency_spread=0.0,
        energy_spread=0.0,
    )


def _relative(columns: Sequence[Sequence[float]], y: Sequence[float]) -> list[float]:
    """Least squares of (x @ c - y) / y with c >= 0, x by its columns; all 0 without rows."""
    if not y:
        return [0.0] * len(columns)
    measured = np.asarray(y, dtype=float)
    solved, _ = nnls(np.asarray(columns, dtype=float).T / measured[:, None], np.ones(len(measured)))
    return [float(value) for value in solved]


def _rms(errors: Sequence[float]) -> float:
    return sqrt(sum(error * error for error in errors) / len(errors)) if errors else 0.0
