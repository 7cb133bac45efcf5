"""Lines through what was measured: non-negative, by relative error, no more terms than the data ask for."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from msgspec import Struct

from msd.profile import Measured, ModeProfile

Row = tuple[float, ...]

WORTH = 0.8
"""A further term stays only if it brings the mean relative error below this share of what it is without."""


FAR_MADS = 5.0
FAR = 0.3
"""A row is far off beyond this many median errors, and beyond this relative error."""
ENOUGH_ROWS = 2
"""Rows that have to be left per column."""


class Fit(Struct, frozen=True, kw_only=True):
    """Coefficients, one per column, and the mean relative error over the rows they were fitted to."""

    coefficients: tuple[float, ...]
    mape: float


def fit_relative(rows: Sequence[Row], values: Sequence[float]) -> Fit:
    """Non-negative coefficients of least squared *relative* error: rows and values are divided by the values (> 0).

    Rows far off a first fit (something else ran on the device just then) are left out of a second one; the error is
    that over all rows.
    """
    import numpy as np
    from scipy.optimize import nnls

    y = np.asarray(values, dtype=float)
    assert len(rows) == len(y) > 0, "as many rows as values, and some"
    assert (y > 0).all(), "a relative error needs values above 0"
    x = np.asarray(rows, dtype=float)
    weighted = x / y[:, None]
    scale = np.linalg.norm(weighted, axis=0)  # columns differ a thousandfold
    scale[scale == 0] = 1.0
    solved, _ = nnls(weighted / scale, np.ones(len(y)))
    errors = np.abs(weighted @ (solved / scale) - 1)
    near = errors <= max(FAR_MADS * float(np.median(errors)), FAR)
    if not near.all() and near.sum() >= ENOUGH_ROWS * x.shape[1]:
        solved, _ = nnls(weighted[near] / scale, np.ones(int(near.sum())))
        errors = np.abs(weighted @ (solved / scale) - 1)
    return Fit(coefficients=tuple(float(value) for value in solved / scale), mape=float(np.mean(errors)))


def fit_nested(rows: Sequence[Row], values: Sequence[float]) -> Fit:
    """As `fit_relative`, with the last column left out (coefficient 0) unless it is worth its place."""
    short = fit_relative([row[:-1] for row in rows], values)
    whole = fit_relative(rows, values)
    if whole.mape < WORTH * short.mape:
        return whole
    return Fit(coefficients=(*short.coefficients, 0.0), mape=short.mape)


def fit_ttft(cells: Sequence[Measured]) -> Fit:
    """TTFT of requests alone: a0 + a1 * n + a2 * n * P / 1e6, n = P less what was cached."""
    alone = [cell for cell in cells if cell.batch_size == 1]
    rows = [ttft_row(cell.num_prompt_tokens, cell.num_cached_tokens) for cell in alone]
    return fit_nested(rows, [cell.ttft_ms for cell in alone])


def ttft_row(num_prompt_tokens: int, num_cached_tokens: int = 0) -> Row:
    """What `ttft_ms` of a profile is multiplied with."""
    new = num_prompt_tokens - num_cached_tokens
    return 1.0, float(new), new * num_prompt_tokens / 1e6


def fit_tpot(cells: Sequence[Measured]) -> Fit:
    """TPOT: c0 + c1 * b + c2 * T, b = the others in the batch, T = their tokens, half of the answer generated."""
    decoding = [cell for cell in cells if cell.tpot_ms > 0]
    return fit_nested([tpot_row(cell) for cell in decoding], [cell.tpot_ms for cell in decoding])


def tpot_row(cell: Measured) -> Row:
    """What `tpot_ms` of a profile is multiplied with, on average over the answers of a cell."""
    others = cell.batch_size - 1
    return 1.0, float(others), others * (cell.num_prompt_tokens + cell.num_output_tokens / 2)


def fit_energy(cells: Sequence[Measured], idle_w: float) -> Fit | None:
    """(step, prefill token, decoded token) in mJ above idle; None when too few cells have a figure.

    A step is counted per token of the longest answer: of a mode that speculates it is what one token's share costs.
    """
    rows: list[Row] = []
    values: list[float] = []
    for cell in cells:
        dynamic_mj = dynamic_energy_mj(cell, idle_w)
        if dynamic_mj is not None and dynamic_mj > 0:
            new = cell.num_prompt_tokens - cell.num_cached_tokens
            rows.append(
                (
                    float(cell.num_output_tokens),
                    float(new * cell.batch_size),
                    float(cell.batch_size * cell.num_output_tokens),
                )
            )
            values.append(dynamic_mj)
    return fit_relative(rows, values) if len(rows) >= 3 else None


def dynamic_energy_mj(cell: Measured, idle_w: float) -> float | None:
    """What one run of the cell's batch drew above idle; None when its energy was not measured."""
    if cell.mj_per_token is None or cell.tokens_per_s <= 0:
        return None
    num_tokens = cell.batch_size * cell.num_output_tokens
    return num_tokens * (cell.mj_per_token - idle_w * 1_000 / cell.tokens_per_s)


def ttft_at(profile: ModeProfile, num_prompt_tokens: int, num_cached_tokens: int = 0) -> float:
    """TTFT in ms that the profile predicts, alone on the engine."""
    return _dot(profile.ttft_ms, ttft_row(num_prompt_tokens, num_cached_tokens))


def tpot_at(profile: ModeProfile, cell: Measured) -> float:
    """TPOT in ms that the profile predicts for the cell."""
    return _dot(profile.tpot_ms, tpot_row(cell))


def mean_error(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Mean relative error (0.1 = 10 %)."""
    return fmean(abs(guess / value - 1) for guess, value in zip(predicted, measured, strict=True))


def _dot(coefficients: Row, row: Row) -> float:
    return sum(a * b for a, b in zip(coefficients, row, strict=True))
