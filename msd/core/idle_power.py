"""What a GPU draws while nothing runs, learnt per set of resident modes: the largest single error of a ledger."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

SETTLING_US = 3_000_000
"""Power decays for seconds after load: an idle interval counts only if it starts this long after activity."""
MIN_SAMPLES = 20
MAX_SAMPLES = 256
MAX_SETS = 64
PERCENTILE = 20


class _Window:
    """The last samples in order of arrival, and sorted."""

    __slots__ = ("arrived", "ordered")

    def __init__(self) -> None:
        self.arrived: deque[int] = deque()
        self.ordered: list[int] = []

    def add(self, power_mw: int) -> None:
        self.arrived.append(power_mw)
        insort(self.ordered, power_mw)
        if len(self.arrived) > MAX_SAMPLES:
            del self.ordered[bisect_left(self.ordered, self.arrived.popleft())]

    def percentile(self) -> int | None:
        if len(self.ordered) < MIN_SAMPLES:
            return None
        return self.ordered[(len(self.ordered) - 1) * PERCENTILE // 100]


class IdlePower:
    """Idle power in mW: what the probe states, else what was learnt for these modes, else what config says."""

    def __init__(self, configured_mw: int) -> None:
        self._configured_mw = configured_mw
        self._windows: dict[frozenset[str], _Window] = {}

    def observe(self, resident: frozenset[str], energy_mj: int, duration_us: int) -> None:
        """Take in an idle interval; contexts and awake weights raise the power, so it is kept by what is resident."""
        window = self._windows.pop(resident, None) or _Window()
        self._windows[resident] = window  # last again: the set unseen for longest is forgotten first
        if len(self._windows) > MAX_SETS:
            del self._windows[next(iter(self._windows))]
        window.add(energy_mj * 1_000_000 // duration_us)

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
