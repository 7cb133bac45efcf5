"""Index of dispersion for counts, I(w) = Var N(w) / E N(w): how bursty arrivals are in windows of w seconds.

1 for a Poisson process at every w, 0 for a constant one, more the burstier.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

STEPS_PER_WINDOW = 20
"""Windows slide by w / 20: disjoint ones leave only a handful at wide w."""


def index_of_dispersion(times_s: NDArray[np.float64], duration_s: float, window_s: float) -> float | None:
    """Return I(window_s) of sorted times; None when fewer than two windows fit or nothing came."""
    step = window_s / STEPS_PER_WINDOW
    num_steps = int(duration_s / step + 1e-9)
    if num_steps <= STEPS_PER_WINDOW or len(times_s) == 0:
        return None
    at_edge = np.searchsorted(times_s, np.arange(num_steps + 1) * step, side="left")
    counts = at_edge[STEPS_PER_WINDOW:] - at_edge[:-STEPS_PER_WINDOW]
    mean = counts.mean()
    return float(counts.var() / mean) if mean > 0 else None
