"""Prometheus metrics: a snapshot is taken on the loop, its text is made off it. Base units: seconds, joules, bytes.

Nothing is registered anywhere: histograms are plain lists fed by `dispatch`, everything else is read from the daemon's
status at each scrape. `prometheus_client` only writes the format. The series are listed in docs/reference/metrics.md.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from heapq import nlargest
from threading import Lock

from msgspec import Struct
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from msd.core.ledger import Booked
from msd.domain import Decision, Observation, Outcome
from msd.wire import DaemonStatus, LedgerReport

CONTENT_TYPE: str = CONTENT_TYPE_LATEST
MAX_TENANTS = 50
"""Tenants with labels of their own, those that used the most energy; the rest are `other`."""
OTHER = "other"
TTFT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TPOT_S = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5)
E2EL_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
ENERGY_J = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1_000.0, 5_000.0)
STATES = ("delivered", "rejected", "aborted", "failed", "duplicates")


class Histogram:
    """Counts below bounds, and the sum. 0.5 us an observation."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Take in one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def freeze(self) -> Frozen:
        """What it holds now."""
        return Frozen(self.bounds, tuple(self.counts), self.sum)


class Frozen(Struct, frozen=True):
    """A histogram at one moment."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts by upper bound, as the format wants them."""
        made: list[tuple[str, float]] = []
        total = 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            total += count
            made.append(("+Inf" if bound == float("inf") else repr(bound), total))
        return made


class _ModeSeries:
    """What is counted per mode."""

    __slots__ = ("e2el", "energy", "tpot", "ttft")

    def __init__(self) -> None:
        self.ttft = Histogram(TTFT_S)
        self.tpot = Histogram(TPOT_S)
        self.e2el = Histogram(E2EL_S)
        self.energy = Histogram(ENERGY_J)


Key = tuple[str, ...]


class TenantCap:
    """Sums by labels of which the last is a tenant, with a bound on how many tenants have one.

    Every series only rises: a tenant that loses its label leaves what it had to `other`, and begins at 0 if it ever
    comes back. The sum over all of them is exact at any time.
    """

    def __init__(self) -> None:
        self._seen: dict[Key, int] = {}
        self._shown: dict[Key, int] = {}

    def update(self, values: Mapping[Key, int], named: frozenset[str]) -> dict[Key, int]:
        """Take the present sums; returns what to show. `named`: the tenants with a label."""
        shown = self._shown
        for key in [key for key in shown if key[-1] not in named and key[-1] != OTHER]:
            rest = (*key[:-1], OTHER)
            shown[rest] = shown.get(rest, 0) + shown.pop(key)
        for key, value in values.items():
            rise = value - self._seen.get(key, 0)
            if rise or key not in self._seen:
                self._seen[key] = value
                label = key if key[-1] in named else (*key[:-1], OTHER)
                shown[label] = shown.get(label, 0) + rise
        return dict(shown)


class Snapshot(Struct, frozen=True):
    """All figures of one moment, as plain data. Energies in mJ until the text is written."""

    status: DaemonStatus
    booked: dict[str, tuple[Booked, ...]]
    """Finished work of each energy domain."""
    generated_tokens: dict[Key, int]
    prompt_tokens: dict[Key, int]
    """Both by (mode, tenant), of requests that ended in an answer."""
    histograms: dict[str, dict[str, Frozen]]
    """By mode, then by name."""
    standings: tuple[tuple[str, str, str], ...] = ()
    """(mode, task, standing) of the quality gate."""


class _Sums(Struct, frozen=True):
    """What is summed by tenant, with the bound on their number applied."""

    energy_mj: dict[Key, int]
    """By (gpu, account, reason, mode, source, tenant)."""
    generated_tokens: dict[Key, int]
    prompt_tokens: dict[Key, int]


class Metrics:
    """What is counted while requests go by. All calls on the loop, but `render` on any thread."""

    def __init__(self) -> None:
        self._modes: dict[str, _ModeSeries] = {}
        self._generated: dict[Key, int] = {}
        self._prompt: dict[Key, int] = {}
        self._rendering = Lock()
        self._energy_cap = TenantCap()
        self._generated_cap = TenantCap()
        self._prompt_cap = TenantCap()

    def completed(self, outcome: Outcome, tenant: str) -> None:
        """A request reached its terminal state. Counted are the tokens of answers; aborted ones are nobody's."""
        if outcome.finish_reason in ("stop", "length"):
            key = (outcome.mode, tenant)
            self._generated[key] = self._generated.get(key, 0) + outcome.num_completion_tokens
            self._prompt[key] = self._prompt.get(key, 0) + outcome.num_prompt_tokens

    def observed(self, decision: Decision, observation: Observation) -> None:
        """What came of a decision is known: once per answer."""
        series = self._modes.get(decision.mode)
        if series is None:
            series = self._modes[decision.mode] = _ModeSeries()
        series.ttft.observe(observation.ttft_ms * 0.001)
        if observation.num_completion_tokens > 1:
            series.tpot.observe(observation.tpot_ms * 0.001)
        series.e2el.observe(observation.e2el_ms * 0.001)
        if observation.energy is not None:
            series.energy.observe(observation.energy.energy_mj * 0.001)

    def snapshot(
        self,
        status: DaemonStatus,
        booked: dict[str, tuple[Booked, ...]],
        standings: Sequence[tuple[str, str, str]] = (),
    ) -> Snapshot:
        """Everything as of now; cheap, since the loop waits for it."""
        return Snapshot(
            status=status,
            booked=booked,
            generated_tokens=self._generated.copy(),
            prompt_tokens=self._prompt.copy(),
            histograms={
                mode: {
                    "ttft": series.ttft.freeze(),
                    "tpot": series.tpot.freeze(),
                    "e2el": series.e2el.freeze(),
                    "energy": series.energy.freeze(),
                }
                for mode, series in self._modes.items()
            },
            standings=tuple(standings),
        )

    def render(self, snapshot: Snapshot) -> bytes:
        """The text of a scrape; `CONTENT_TYPE` says in which format."""
        with self._rendering:  # two scrapes at once: the bound on tenants has a memory
            return generate_latest(_Families(snapshot, self._bound_tenants(snapshot)))

    def _bound_tenants(self, snapshot: Snapshot) -> _Sums:
        energy_mj: dict[Key, int] = {}
        used: dict[str, int] = {}
        for (_, tenant), num_tokens in snapshot.generated_tokens.items():
            # Where nothing is metered the busiest have the labels.
            used[tenant] = used.get(tenant, 0) + (0 if snapshot.booked else num_tokens)
        sources = {ledger.domain: ledger.source for ledger in snapshot.status.energy}
        for domain, rows in snapshot.booked.items():
            for row in rows:
                used[row.tenant] = used.get(row.tenant, 0) + row.energy_mj
                for source, part_mj in _columns(sources[domain], row.energy_mj, row.estimated_mj):
                    energy_mj[domain, row.account, row.reason, row.mode, source, row.tenant] = part_mj
        used.pop("", None)
        # Work of nobody's, such as an engine's start, has an empty tenant, which is no tenant too many.
        named = frozenset(nlargest(MAX_TENANTS, used, key=lambda tenant: (used[tenant], tenant))) | {""}
        return _Sums(
            self._energy_cap.update(energy_mj, named),
            self._generated_cap.update(snapshot.generated_tokens, named),
            self._prompt_cap.update(snapshot.prompt_tokens, named),
        )


def _columns(source: str, energy_mj: int, estimated_mj: int) -> Iterator[tuple[str, int]]:
    """Counted and estimated energy are never one sum; all of a simulated counter is simulated."""
    if source == "simulated":
        yield "simulated", energy_mj
        return
    if energy_mj > estimated_mj or not estimated_mj:
        yield "counter", energy_mj - estimated_mj
    if estimated_mj:
        yield "estimated", estimated_mj


class _Families(Collector):
    """One snapshot as metric families."""

    def __init__(self, snapshot: Snapshot, sums: _Sums) -> None:
        self._snapshot = snapshot
        self._sums = sums

    def collect(self) -> Iterable[Metric]:
        """All families, in the order of the reference page."""
        snapshot = self._snapshot
        status = snapshot.status
        yield from _requests(status)
        yield from _latencies(snapshot, self._sums)
        yield from _engines(status)
        yield from _decisions(snapshot)
        yield from _gpu(status)
        yield from _energy(snapshot, self._sums)


def _counter(name: str, text: str, labels: Sequence[str], rows: Iterable[tuple[Sequence[str], float]]) -> Metric:
    family = CounterMetricFamily(name, text, labels=labels)
    for values, value in rows:
        family.add_metric(values, value)
    return family


def _gauge(name: str, text: str, labels: Sequence[str], rows: Iterable[tuple[Sequence[str], float]]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels)
    for values, value in rows:
        family.add_metric(values, value)
    return family


def _requests(status: DaemonStatus) -> Iterator[Metric]:
    version = status.server.rpartition("/")[2]
    policy = (version, status.policy, str(status.simulated).lower())
    yield _gauge(
        "msd_build_info",
        "Version, policy, and whether any engine is simulated.",
        ("version", "policy", "simulated"),
        [(policy, 1)],
    )
    yield _gauge("msd_uptime_seconds", "Since the daemon started.", (), [((), status.uptime_s)])
    counts = status.requests
    yield _counter("msd_requests_submitted", "Requests that came in.", (), [((), counts.get("submitted", 0))])
    yield _counter(
        "msd_requests",
        "Requests by how they ended; with the pending ones, all that were submitted.",
        ("state",),
        [((state,), counts.get(state, 0)) for state in STATES],
    )
    yield _counter(
        "msd_request_restarts",
        "Attempts begun anew after their engine was lost.",
        (),
        [((), counts.get("restarts", 0))],
    )
    yield _counter(
        "msd_request_errors",
        "Refusals and failures by error code.",
        ("code",),
        [((code,), count) for code, count in sorted(status.errors.items())],
    )
    yield _gauge("msd_requests_pending", "Submitted and without a delivered end.", (), [((), counts.get("pending", 0))])
    yield _gauge("msd_requests_waiting", "In msd's queue.", (), [((), status.num_waiting)])
    yield _gauge(
        "msd_waiting_tokens", "Prompts and longest answers of what waits.", (), [((), status.num_waiting_tokens)]
    )
    yield _gauge("msd_sessions", "Connected clients.", (), [((), status.num_sessions)])
    yield _counter(
        "msd_idle_with_backlog_seconds",
        "Time in which requests waited and nothing ran; stays near 0.",
        (),
        [((), status.idle_with_backlog_s)],
    )


def _latencies(snapshot: Snapshot, sums: _Sums) -> Iterator[Metric]:
    named = (
        ("ttft", "msd_ttft_seconds", "From receipt to the first token, of answered requests."),
        ("tpot", "msd_tpot_seconds", "Per output token after the first, of answered requests."),
        ("e2el", "msd_e2el_seconds", "From receipt to the end, of answered requests."),
        ("energy", "msd_request_energy_joules", "Settled energy of answered requests, static share included."),
    )
    for name, series, text in named:
        family = HistogramMetricFamily(series, text, labels=("mode",))
        for mode, histograms in snapshot.histograms.items():
            family.add_metric((mode,), histograms[name].buckets(), histograms[name].sum)
        yield family
    yield _counter(
        "msd_generated_tokens",
        "Tokens of answers. J/token is the ratio of rates (docs).",
        ("mode", "tenant"),
        sums.generated_tokens.items(),
    )
    yield _counter(
        "msd_prompt_tokens",
        "Prompt tokens of answered requests, cached ones included.",
        ("mode", "tenant"),
        sums.prompt_tokens.items(),
    )


def _engines(status: DaemonStatus) -> Iterator[Metric]:
    engines = status.engines
    yield _gauge(
        "msd_engine_up",
        "1: takes requests.",
        ("engine", "model"),
        [((e.engine, e.model), float(e.state == "up")) for e in engines],
    )
    yield _gauge(
        "msd_engine_state",
        "1 for the present state: starting, up, asleep, cold, backoff, failed, stopped.",
        ("engine", "state"),
        [((e.engine, e.state), 1) for e in engines],
    )
    yield _counter(
        "msd_engine_starts",
        "Starts of an engine; more than one means that it was lost or moved.",
        ("engine",),
        [((e.engine,), e.num_starts) for e in engines],
    )
    yield _gauge("msd_engine_running", "Requests in it.", ("engine",), [((e.engine,), e.num_running) for e in engines])
    yield _gauge(
        "msd_engine_waiting",
        "Requests in it that wait for a place in its batch.",
        ("engine",),
        [((e.engine,), e.num_waiting) for e in engines],
    )
    yield _gauge(
        "msd_engine_slots",
        "Requests that may run in it at once.",
        ("engine",),
        [((e.engine,), e.num_slots) for e in engines],
    )
    yield _gauge(
        "msd_engine_kv_usage_ratio",
        "Share of its KV cache in use.",
        ("engine",),
        [((e.engine,), e.kv_usage) for e in engines],
    )


def _decisions(snapshot: Snapshot) -> Iterator[Metric]:
    status = snapshot.status
    yield _counter(
        "msd_decisions",
        "How often each mode was chosen.",
        ("mode", "policy"),
        [((m.mode, status.policy), m.num_decisions) for m in status.modes],
    )
    yield _gauge(
        "msd_gate_standing",
        "1 for how a mode stands on a task at the quality gate.",
        ("mode", "task", "standing"),
        [(row, 1) for row in snapshot.standings],
    )
    certificates = [((mode.mode, one.task), one) for mode in status.modes for one in mode.certificates]
    yield _counter(
        "msd_gate_live_pairs",
        "Answers that were compared with the reference's in production.",
        ("mode", "task", "kind"),
        [
            ((*key, kind), num)
            for key, one in certificates
            for kind, num in (("scored", one.num_live_pairs), ("unscored", one.num_live_unscored))
            if num
        ],
    )
    yield _gauge(
        "msd_gate_live_agreement_ratio",
        "Share of the unscored ones that began alike; it takes nothing away.",
        ("mode", "task"),
        [(key, one.live_agreement) for key, one in certificates if one.live_agreement is not None],
    )


def _gpu(status: DaemonStatus) -> Iterator[Metric]:
    view = status.gpu or {}
    gpu = str(view.get("uuid") or view.get("source") or "")
    power_w, age_s = view.get("power_instant_w", view.get("power_average_w")), view.get("age_s")
    yield _gauge(
        "msd_gpu_power_watts",
        "Latest reading.",
        ("gpu",),
        [((gpu,), power_w)] if isinstance(power_w, int | float) else [],
    )
    memory = [(state, view.get(f"memory_{state}_bytes")) for state in ("total", "used", "free", "reserved")]
    yield _gauge(
        "msd_gpu_memory_bytes",
        "As the driver says; rely on free.",
        ("gpu", "state"),
        [((gpu, state), value) for state, value in memory if isinstance(value, int)],
    )
    yield _gauge(
        "msd_gpu_view_age_seconds",
        "Age of the latest reading; it grows when the driver hangs.",
        ("gpu",),
        [((gpu,), age_s)] if isinstance(age_s, int | float) else [],
    )
    yield _counter(
        "msd_gpu_throttle_seconds",
        "Time with clocks held down; nothing is learnt in it.",
        ("gpu", "reason"),
        [((gpu, reason), s) for reason, s in sorted(status.throttled_s.items())],
    )


def _energy(snapshot: Snapshot, sums: _Sums) -> Iterator[Metric]:
    ledgers = snapshot.status.energy
    counters = [
        ((ledger.domain, source), part_mj / 1000)
        for ledger in ledgers
        for source, part_mj in _columns(ledger.source, ledger.counter_mj + ledger.estimated_mj, ledger.estimated_mj)
    ]
    yield _counter(
        "msd_gpu_energy_joules", "Rise of the counter itself since msd started.", ("gpu", "source"), counters
    )
    yield _counter(
        "msd_energy_joules",
        "The ledger: with msd_energy_pending_joules it sums to the counter.",
        ("gpu", "account", "reason", "mode", "source", "tenant"),
        _accounts(snapshot, sums),
    )
    pending = [
        ((ledger.domain, state), energy_mj / 1000)
        for ledger in ledgers
        for state, energy_mj in (("running", ledger.running_mj), ("open", ledger.open_mj))
    ]
    yield _gauge(
        "msd_energy_pending_joules",
        "Of work that has not ended (running), and not shared out yet (open).",
        ("gpu", "state"),
        pending,
    )
    coefficients = [
        ((c.mode, kind), value_mj / 1000, error_mj / 1000)
        for c in snapshot.status.coefficients
        for kind, value_mj, error_mj in (
            ("step", c.step_mj, c.step_error_mj),
            ("prefill_token", c.prefill_mj_per_token, c.prefill_error_mj),
            ("decode_token", c.decode_mj_per_token, c.decode_error_mj),
        )
    ]
    yield _gauge(
        "msd_energy_coefficient_joules",
        "Learned energy of a step, a prompt token, a decode position.",
        ("mode", "kind"),
        [(labels, value) for labels, value, _ in coefficients],
    )
    yield _gauge(
        "msd_energy_coefficient_stderr_joules",
        "Its standard error.",
        ("mode", "kind"),
        [(labels, error) for labels, _, error in coefficients],
    )
    yield _gauge(
        "msd_energy_coefficient_confidence",
        "1: the mode was told apart from the others; 0: it was not.",
        ("mode",),
        [((c.mode,), float(c.confidence == "ok")) for c in snapshot.status.coefficients],
    )
    yield _gauge(
        "msd_idle_power_watts",
        "What counts as static power, and where that is from.",
        ("gpu", "origin"),
        [((each.domain, each.idle_origin), each.idle_w or 0.0) for each in ledgers],
    )
    yield _gauge(
        "msd_energy_unattributed_ratio",
        "Share of the counter that nobody can name.",
        ("gpu",),
        [((ledger.domain,), _unattributed(ledger)) for ledger in ledgers],
    )
    yield _gauge(
        "msd_energy_ledger_residue_joules",
        "What the accounts lack to the counter; always 0.",
        ("gpu",),
        [((ledger.domain,), ledger.residue_mj / 1000) for ledger in ledgers],
    )


def _accounts(snapshot: Snapshot, sums: _Sums) -> Iterator[tuple[Key, float]]:
    for key, energy_mj in sums.energy_mj.items():
        yield key, energy_mj / 1000
    for ledger in snapshot.status.energy:
        estimated = ledger.estimated_of
        for source, part_mj in _columns(ledger.source, ledger.idle_mj, estimated.get("idle", 0)):
            yield (ledger.domain, "idle", "", "", source, ""), part_mj / 1000
        for reason, energy_mj in ledger.unattributed_mj.items():
            for source, part_mj in _columns(ledger.source, energy_mj, estimated.get(f"unattributed: {reason}", 0)):
                yield (ledger.domain, "unattributed", reason, "", source, ""), part_mj / 1000


def _unattributed(ledger: LedgerReport) -> float:
    total_mj = ledger.counter_mj + ledger.estimated_mj
    return sum(ledger.unattributed_mj.values()) / total_mj if total_mj else 0.0
