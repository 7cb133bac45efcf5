"""What is known of a request before its first token: Request x latest GPU view x load of the engines -> Features."""

from __future__ import annotations

from math import sqrt

from msd.core.entry import Entry
from msd.core.fleet import Fleet
from msd.domain import Features, GpuView

_ALPHA = 0.05


class Arrivals:
    """Burstiness of arrivals: mean and variance of the gaps, exponentially weighted over about 20 of them."""

    __slots__ = ("_last_us", "_mean_us", "_var")

    def __init__(self) -> None:
        self._last_us = -1
        self._mean_us = 0.0
        self._var = 0.0

    def note(self, t_us: int) -> None:
        """A request arrived."""
        if self._last_us >= 0:
            gap = float(t_us - self._last_us)
            if self._mean_us:
                d = gap - self._mean_us
                self._mean_us += _ALPHA * d
                self._var = (1 - _ALPHA) * (self._var + _ALPHA * d * d)
            else:
                self._mean_us, self._var = gap, gap * gap
        self._last_us = t_us

    @property
    def cv(self) -> float:
        """Coefficient of variation of the gaps; 1 for Poisson, 0 before anything is known."""
        return sqrt(self._var) / self._mean_us if self._mean_us > 0 else 0.0


def extract(
    entry: Entry, t_us: int, fleet: Fleet, num_waiting: int, arrival_cv: float, view: GpuView | None
) -> Features:
    """Features of one request now. A shared prefix is what the producer names (`prefix_id` or `session_id`)."""
    request = entry.request
    deadline_us = request.deadline_us
    return Features(
        request.num_prompt_tokens,
        entry.expected_tokens,
        request.max_tokens,
        request.prefix_id is not None or request.session_id is not None,
        request.task,
        request.service_class,
        fleet.num_running,
        num_waiting,
        arrival_cv,
        fleet.memory_pressure(),
        t_us - entry.waiting_since_us,
        None if deadline_us is None else deadline_us - t_us,
        None if view is None else t_us - view.t_us,
    )
