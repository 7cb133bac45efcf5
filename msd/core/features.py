"""What is known of a request before its first token: Request x latest GPU view x load of the engines -> Features.

`Extractor` holds what was noticed of earlier requests (arrivals, sessions, prefix caches); `extract` puts it together.
What each feature costs: docs/reference/modeswitch-features.md.
"""

from __future__ import annotations

from collections import OrderedDict
from math import sqrt

from msd.core.entry import Entry
from msd.core.fleet import Fleet
from msd.core.prefixes import PrefixIndex
from msd.domain import EngineInfo, Features, GpuView

_ALPHA = 0.05
_MAX_SESSIONS = 16_384
VIEW_STALE_US = 2_000_000
"""An older view says nothing about present power."""


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

    def per_s(self, t_us: int) -> float:
        """Arrivals a second; falls while none come. 0 before two have come."""
        gap_us = max(self._mean_us, float(t_us - self._last_us))
        return 1e6 / gap_us if self._mean_us > 0 else 0.0


class Sessions:
    """Which mode served each session last. Bounded: the session unused for longest is forgotten."""

    def __init__(self) -> None:
        self._arms: OrderedDict[tuple[str, str], int] = OrderedDict()

    def arm(self, tenant: str, session_id: str) -> int:
        """The mode that served it last; -1 when none did, or its engine has gone since."""
        return self._arms.get((tenant, session_id), -1)

    def served(self, tenant: str, session_id: str, arm: int) -> None:
        """The mode takes a request of this session."""
        self._arms[(tenant, session_id)] = arm
        self._arms.move_to_end((tenant, session_id))
        if len(self._arms) > _MAX_SESSIONS:
            self._arms.popitem(last=False)

    def forget(self, arm: int) -> None:
        """The mode has lost what it knew of its sessions."""
        for key in [key for key, known in self._arms.items() if known == arm]:
            del self._arms[key]


class Extractor:
    """Notices what happens to requests and engines, and makes the Features of the next request out of it."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._sessions = Sessions()
        self.arrivals = Arrivals()
        self.prefixes = PrefixIndex([book.mode for book in fleet.books])

    def features(self, entry: Entry, t_us: int, num_waiting: int, view: GpuView | None) -> Features:
        """Features of one request now; also notes in the entry what each mode's prefix cache likely holds of it."""
        request = entry.request
        entry.cached_tokens = self.prefixes.cached(request.prefix_hashes, request.num_prompt_tokens)
        session_id = request.session_id
        session_arm = -1 if session_id is None else self._sessions.arm(request.tenant, session_id)
        arrivals = self.arrivals
        return extract(entry, t_us, self._fleet, num_waiting, arrivals.cv, view, arrivals.per_s(t_us), session_arm)

    def dispatched(self, entry: Entry, arm: int) -> None:
        """The request goes to this mode."""
        request = entry.request
        if request.session_id is not None:
            self._sessions.served(request.tenant, request.session_id, arm)

    def first_token(self, entry: Entry, num_cached_tokens: int) -> None:
        """The mode on which the request runs has computed its prompt, all but `num_cached_tokens` of it."""
        arm, cached = entry.parked, entry.cached_tokens
        if cached is not None and cached[arm]:
            self.prefixes.reported(arm, cached[arm], num_cached_tokens)
        if entry.request.prefix_hashes:
            self.prefixes.computed(arm, entry.request.prefix_hashes)

    def ended(self, arm: int, num_tokens: int) -> None:
        """A request left the mode after so many tokens of output."""
        self.prefixes.generated(arm, num_tokens)

    def engine_up(self, info: EngineInfo) -> None:
        """The engine's caches are empty, and so large."""
        for i, book in enumerate(self._fleet.books):
            if book.mode.engine == info.engine:
                self.prefixes.started(i, info.kv_capacity_tokens)

    def engine_lost(self, engine: str) -> None:
        """The engine's caches are gone: it died, was stopped or sleeps."""
        for i, book in enumerate(self._fleet.books):
            if book.mode.engine == engine:
                self.prefixes.forget(i)
                self._sessions.forget(i)


def extract(
    entry: Entry,
    t_us: int,
    fleet: Fleet,
    num_waiting: int,
    arrival_cv: float,
    view: GpuView | None,
    arrivals_per_s: float = 0.0,
    session_arm: int = -1,
) -> Features:
    """Features of one request now.

    It shares a prefix if some cache likely holds its beginning, or the producer says so (`prefix_id`, `session_id`).
    """
    request = entry.request
    deadline_us, slo = request.deadline_us, request.slo
    return Features(
        request.num_prompt_tokens,
        entry.expected_tokens,
        request.max_tokens,
        entry.cached_tokens is not None or request.prefix_id is not None or request.session_id is not None,
        request.task,
        request.service_class,
        fleet.num_running,
        num_waiting,
        arrival_cv,
        fleet.memory_pressure(),
        t_us - request.received_us,
        None if deadline_us is None else deadline_us - t_us,
        None if view is None else t_us - view.t_us,
        entry.expected_p90_tokens,
        arrivals_per_s,
        None if view is None else _headroom_w(view, t_us),
        slo.ttft_ms,
        slo.tpot_ms,
        session_arm,
    )


def _headroom_w(view: GpuView, t_us: int) -> float | None:
    """Power limit less present power; None where either is unknown or the view is too old."""
    limit_w, power_w = view.power_limit_w, view.power_instant_w
    if limit_w is None or power_w is None or t_us - view.t_us > VIEW_STALE_US:
        return None
    return limit_w - power_w
