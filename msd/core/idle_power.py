"""What a GPU draws while nothing runs, learnt per set of resident modes: the largest single error of a ledger."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from typing import Literal

from msgspec import Struct

SETTLING_US = 3_000_000
"""Power decays for seconds after load: an idle interval counts only if it starts this long after activity."""
SAMPLE_US = 1_000_000
"""A sample is the mean over this long. A counter that steps every 20 ms, read every 50 ms, shows 40 or 60 ms of energy
in turn: the 20th percentile of such short intervals is 20 % below the truth."""
MIN_SAMPLES = 5
MAX_SAMPLES = 256
MAX_SETS = 64
PERCENTILE = 20
IdleOrigin = Literal["stated", "learnt", "configured", "unknown"]


class IdleFacts(Struct, frozen=True):
    """Idle power as people should take it: a figure, where it is from, how far it scatters, and when it was learnt.

    `spread_mw`: from the 20th to the 80th percentile of the samples; None where there are none.
    """

    power_mw: int
    origin: IdleOrigin
    spread_mw: int | None = None
    learnt_us: int | None = None


class _Window:
    """The last samples in order of arrival, and sorted."""

    __slots__ = ("arrived", "last_us", "ordered")

    def __init__(self) -> None:
        self.last_us = 0
        self.arrived: deque[int] = deque()
        self.ordered: list[int] = []

    def add(self, power_mw: int) -> None:
        self.arrived.append(power_mw)
        insort(self.ordered, power_mw)
        if len(self.arrived) > MAX_SAMPLES:
            del self.ordered[bisect_left(self.ordered, self.arrived.popleft())]

    def percentile(self, percent: int = PERCENTILE) -> int | None:
        if len(self.ordered) < MIN_SAMPLES:
            return None
        return self.ordered[(len(self.ordered) - 1) * percent // 100]


class IdlePower:
    """Idle power in mW: what the probe states, else what was learnt for these modes, else what config says."""

    def __init__(self, configured_mw: int) -> None:
        self._configured_mw = configured_mw
        self._windows: dict[frozenset[str], _Window] = {}

    def observe(self, resident: frozenset[str], energy_mj: int, duration_us: int, end_us: int = 0) -> None:
        """Take in a calm second; contexts and awake weights raise the power, so it is kept by what is resident."""
        window = self._windows.pop(resident, None) or _Window()
        self._windows[resident] = window  # last again: the set unseen for longest is forgotten first
        if len(self._windows) > MAX_SETS:
            del self._windows[next(iter(self._windows))]
        window.add(energy_mj * 1_000_000 // duration_us)
        window.last_us = end_us

    def learnt_mw(self, resident: frozenset[str]) -> int | None:
        """The 20th percentile over recent idle intervals; None until there are enough of them."""
        window = self._windows.get(resident)
        return None if window is None else window.percentile()

    def current_mw(self, resident: frozenset[str], stated_w: float | None) -> int:
        """The figure to split with; 0 = nothing is known, all energy counts as dynamic."""
        if stated_w is not None:
            return int(stated_w * 1000)
        learnt = self.learnt_mw(resident)
        return self._configured_mw if learnt is None else learnt

    def facts(self, resident: frozenset[str], stated_w: float | None) -> IdleFacts:
        """The figure in use, and how far it can be trusted."""
        if stated_w is not None:
            return IdleFacts(int(stated_w * 1000), "stated")
        window = self._windows.get(resident)
        learnt = None if window is None else window.percentile()
        if window is None or learnt is None:
            return IdleFacts(self._configured_mw, "configured" if self._configured_mw else "unknown")
        above = window.percentile(100 - PERCENTILE)
        assert above is not None, "as many samples as below"
        return IdleFacts(learnt, "learnt", above - learnt, window.last_us)
