"""The report: figures, and the certificate that says whether they may be trusted. Every number's unit is in its key."""

from __future__ import annotations

import datetime
import os
import platform

import msgspec
import numpy as np
from msgspec import Struct

from loadgen import metrics
from loadgen.metrics import Bools, Group, ModeUse, Quantiles
from loadgen.plan import Plan, PlanStatistics
from loadgen.record import ABSENT, Record, Status
from loadgen.spec import SloSpec
from loadgen.targets import ServerFacts

SCHEMA = 1
MAX_CPU_SHARE = 0.8
MAX_RATE_ERROR = 0.01
LATENESS_WARNING_SHARE = 0.1
MAX_TIMELINE_S = 100_000


class RunFacts(Struct, frozen=True, kw_only=True):
    """What the runner measured of itself between the first intended send and the end."""

    started_at: str
    wall_s: float
    cpu_s: float
    voluntary_switches: int
    involuntary_switches: int
    num_gc_runs: int
    stopped_us: int | None
    """When sending was broken off; None: the whole plan was sent."""
    stopped_by: str | None


class Certificate(Struct, frozen=True, kw_only=True):
    """How faithfully the plan was carried out."""

    lateness_ms: Quantiles | None
    max_lateness_p99_ms: float
    offered_rps: float
    achieved_rps: float
    num_shed: int
    cpu_ms_per_request: float | None
    cpu_share: float
    voluntary_switches: int
    involuntary_switches: int
    num_gc_runs: int


class Throughput(Struct, frozen=True, kw_only=True):
    """From the first intended send to the last completion."""

    span_s: float
    requests_per_s: float
    output_tokens_per_s: float
    tokens_per_s: float


class Timeline(Struct, frozen=True, kw_only=True):
    """Counts per second of the run, by intended, sent and completion time."""

    offered: list[int]
    achieved: list[int]
    finished: list[int]


class PlanFacts(Struct, frozen=True, kw_only=True):
    """Which plan it was; reports compare only at equal `hash`."""

    title: str
    hash: str
    spec_hash: str
    seed: int
    duration_s: float
    warmup_s: float
    cooldown_s: float
    statistics: PlanStatistics


class HostFacts(Struct, frozen=True, kw_only=True):
    """Where the load came from."""

    hostname: str
    cores: int
    python: str
    numpy: str


class Report(Struct, frozen=True, kw_only=True, tag="loadgen report", tag_field="kind"):
    """One run. `valid` is false when the generator, not the server, may have shaped the figures."""

    schema: int
    valid: bool
    reasons: list[str]
    warnings: list[str]
    complete: bool
    stopped_by: str | None
    started_at: str
    wall_s: float
    target: str
    server: ServerFacts | None
    host: HostFacts
    plan: PlanFacts
    certificate: Certificate
    throughput: Throughput
    total: Group
    classes: tuple[Group, ...]
    modes: tuple[ModeUse, ...]
    num_restarts: int
    num_switched: int
    num_late_answers: int
    num_energy_unsettled: int
    timeline: Timeline


def build(plan: Plan, record: Record, facts: RunFacts, target: str, server: ServerFacts | None) -> Report:
    """Return the report of a run, whole or broken off."""
    spec = plan.header.spec
    start_us = int(spec.run.warmup_s * 1e6)
    end_us = int((spec.plan.duration_s - spec.run.cooldown_s) * 1e6)
    if facts.stopped_us is not None:
        end_us = min(end_us, facts.stopped_us)
    offered = (record.intended_us >= start_us) & (record.intended_us < end_us)
    duration_s = max(0.0, (end_us - start_us) / 1e6)

    groups, good_of_all = [], np.zeros(len(offered), dtype=np.bool_)
    for index, traffic in enumerate(spec.classes):
        mine = offered & (record.class_index == index)
        is_good = metrics.good(record, traffic.slo, mine)
        good_of_all |= is_good
        sketches = [record.gaps[index]]
        groups.append(metrics.group(record, traffic.name, traffic.slo, mine, is_good, sketches, duration_s))
    total = metrics.group(record, "all", SloSpec(), offered, good_of_all, record.gaps, duration_s)

    certificate = _certificate(record, facts, offered, duration_s, spec.run.max_lateness_p99_ms)
    reasons, warnings = _verdict(certificate, total, facts)
    return Report(
        schema=SCHEMA,
        valid=not reasons,
        reasons=reasons,
        warnings=warnings,
        complete=facts.stopped_by is None,
        stopped_by=facts.stopped_by,
        started_at=facts.started_at,
        wall_s=round(facts.wall_s, 3),
        target=target,
        server=server,
        host=HostFacts(
            hostname=platform.node(),
            cores=os.cpu_count() or 0,
            python=platform.python_version(),
            numpy=np.__version__,
        ),
        plan=PlanFacts(
            title=spec.title,
            hash=plan.digest(),
            spec_hash=plan.header.spec_hash,
            seed=plan.header.seed,
            duration_s=spec.plan.duration_s,
            warmup_s=spec.run.warmup_s,
            cooldown_s=spec.run.cooldown_s,
            statistics=plan.header.statistics,
        ),
        certificate=certificate,
        throughput=_throughput(record, offered),
        total=total,
        classes=tuple(groups),
        modes=metrics.modes(record, offered),
        num_restarts=record.num_restarts,
        num_switched=record.num_switched,
        num_late_answers=record.num_late_answers,
        num_energy_unsettled=record.num_unsettled,
        timeline=_timeline(record, facts),
    )


def encode(report: Report) -> bytes:
    """Return the report as indented JSON with a final newline."""
    return msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n"


def now_iso() -> str:
    """The wall clock in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _certificate(
    record: Record, facts: RunFacts, offered: Bools, duration_s: float, max_lateness_p99_ms: float
) -> Certificate:
    sent = offered & (record.sent_us != ABSENT)
    num_sent = int(sent.sum())
    return Certificate(
        lateness_ms=metrics.quantiles((record.sent_us - record.intended_us)[sent]),
        max_lateness_p99_ms=max_lateness_p99_ms,
        offered_rps=round(int(offered.sum()) / duration_s, 3) if duration_s else 0.0,
        achieved_rps=round(num_sent / duration_s, 3) if duration_s else 0.0,
        num_shed=int((record.status[offered] == Status.SHED_CLIENT).sum()),
        cpu_ms_per_request=round(facts.cpu_s * 1e3 / record.num_sent, 4) if record.num_sent else None,
        cpu_share=round(facts.cpu_s / facts.wall_s, 4) if facts.wall_s else 0.0,
        voluntary_switches=facts.voluntary_switches,
        involuntary_switches=facts.involuntary_switches,
        num_gc_runs=facts.num_gc_runs,
    )


def _verdict(certificate: Certificate, total: Group, facts: RunFacts) -> tuple[list[str], list[str]]:
    """Return why the run is invalid, and what else its reader should know."""
    reasons, warnings = [], []
    late = certificate.lateness_ms
    if facts.stopped_by is not None:
        reasons.append(f"partial: stopped by {facts.stopped_by}")
    if late is not None and late.p99 > certificate.max_lateness_p99_ms:
        reasons.append(f"sent late: p99 {late.p99:.2f} ms, allowed {certificate.max_lateness_p99_ms:g} ms")
    if certificate.cpu_share > MAX_CPU_SHARE:
        reasons.append(f"the generator used {certificate.cpu_share:.0%} of a core, allowed {MAX_CPU_SHARE:.0%}")
    if certificate.num_shed:
        reasons.append(f"{certificate.num_shed} requests shed by the generator (max_in_flight or a full socket)")
    if abs(certificate.achieved_rps - certificate.offered_rps) > MAX_RATE_ERROR * certificate.offered_rps:
        reasons.append(f"sent {certificate.achieved_rps:g} requests/s of {certificate.offered_rps:g} planned")
    ttft = total.latencies.ttft_ms
    if late is not None and ttft is not None and late.p50 > LATENESS_WARNING_SHARE * ttft.p50:
        warnings.append(f"lateness p50 {late.p50:.2f} ms is more than a tenth of TTFT p50 {ttft.p50:.2f} ms")
    return reasons, warnings


def _throughput(record: Record, offered: Bools) -> Throughput:
    done = offered & (record.status == Status.FINISHED)
    if not done.any():
        return Throughput(span_s=0.0, requests_per_s=0.0, output_tokens_per_s=0.0, tokens_per_s=0.0)
    span_s = max(1e-6, float(record.done_us[done].max() - record.intended_us[offered].min()) / 1e6)
    output = int(record.num_tokens[done].sum())
    return Throughput(
        span_s=round(span_s, 3),
        requests_per_s=round(int(done.sum()) / span_s, 3),
        output_tokens_per_s=round(output / span_s, 2),
        tokens_per_s=round((output + int(record.num_prompt_tokens[done].sum())) / span_s, 2),
    )


def _timeline(record: Record, facts: RunFacts) -> Timeline:
    num_seconds = min(int(facts.wall_s) + 1, MAX_TIMELINE_S)

    def per_second(times_us: np.ndarray[tuple[int], np.dtype[np.int64]]) -> list[int]:
        seconds = times_us[(times_us >= 0) & (times_us < num_seconds * 1_000_000)] // 1_000_000
        return [int(count) for count in np.bincount(seconds, minlength=num_seconds)]

    return Timeline(
        offered=per_second(record.intended_us),
        achieved=per_second(record.sent_us),
        finished=per_second(record.done_us[record.status == Status.FINISHED]),
    )
