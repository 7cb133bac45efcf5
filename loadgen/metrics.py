"""Figures from the record. Plain names count from the send, as `vllm bench serve` does; `_intended` from the plan.

TTFT: first token message; TPOT: (last - first) / (tokens - 1); ITL: gap between token messages; E2EL: last token
message. Latency quantiles are over finished requests; goodput is over all offered ones, so that refusing cannot look
fast, and it judges the `_intended` latencies.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from loadgen.record import ABSENT, GapSketch, Record, Status, Words
from loadgen.spec import SloSpec

Bools = NDArray[np.bool_]
TOP_REASONS = 3


class Quantiles(Struct, frozen=True, kw_only=True):
    """A distribution; the unit is in the name of the field that holds it."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


class GapQuantiles(Struct, frozen=True, kw_only=True):
    """Gaps between token messages (from a sketch, relative error 1 %), and how many tokens a message brings."""

    count: int
    p50: float
    p95: float
    p99: float
    tokens_per_message: float


class EnergySum(Struct, frozen=True, kw_only=True):
    """Joules of the requests that carry a figure of this source, and per token of the same requests."""

    source: str
    energy_j: float
    num_requests: int
    j_per_output_token: float | None
    j_per_token: float | None


class Latencies(Struct, frozen=True, kw_only=True):
    """Milliseconds of finished requests; None where there are none."""

    ttft_ms: Quantiles | None
    ttft_intended_ms: Quantiles | None
    tpot_ms: Quantiles | None
    e2el_ms: Quantiles | None
    e2el_intended_ms: Quantiles | None
    server_queue_ms: Quantiles | None


class Group(Struct, frozen=True, kw_only=True):
    """The figures of a traffic class, or of all. `num_offered` = the sum of the counts by status."""

    name: str
    slo: SloSpec
    num_offered: int
    by_status: dict[str, int]
    errors: dict[str, int]
    latencies: Latencies
    submit_ack_ms: Quantiles | None
    itl_ms: GapQuantiles | None
    num_good: int
    goodput_rps: float
    goodput_share: float | None
    num_graded: int
    accuracy: float | None
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    energy: tuple[EnergySum, ...]


class ModeUse(Struct, frozen=True, kw_only=True):
    """What one mode served, and the commonest reasons why."""

    mode: str
    num_requests: int
    request_share: float
    output_tokens: int
    token_share: float | None
    latencies: Latencies
    accuracy: float | None
    energy: tuple[EnergySum, ...]
    reasons: dict[str, int]


def quantiles(values_us: NDArray[np.int64] | NDArray[np.float64]) -> Quantiles | None:
    """Return the distribution in ms of values in us; None of nothing."""
    if len(values_us) == 0:
        return None
    p50, p90, p95, p99 = (float(q) for q in np.quantile(values_us, [0.5, 0.9, 0.95, 0.99]))
    mean, greatest = float(values_us.mean()), float(values_us.max())
    return Quantiles(
        count=len(values_us),
        mean=_ms(mean),
        p50=_ms(p50),
        p90=_ms(p90),
        p95=_ms(p95),
        p99=_ms(p99),
        max=_ms(greatest),
    )


def tpot_us(record: Record, of: Bools) -> NDArray[np.float64]:
    """Time per further token of the requests `of`; 0 where there is at most one token."""
    spans = (record.last_us - record.first_us)[of].astype(np.float64)
    further = record.num_tokens[of] - 1
    return np.where(further > 0, spans / np.maximum(further, 1), 0.0)


def latencies(record: Record, of: Bools) -> Latencies:
    """Figures of the finished requests among `of`."""
    done = of & (record.status == Status.FINISHED)
    several = done & (record.num_tokens >= 2)
    return Latencies(
        ttft_ms=quantiles((record.first_us - record.sent_us)[done]),
        ttft_intended_ms=quantiles((record.first_us - record.intended_us)[done]),
        tpot_ms=quantiles(tpot_us(record, several)),
        e2el_ms=quantiles((record.last_us - record.sent_us)[done]),
        e2el_intended_ms=quantiles((record.last_us - record.intended_us)[done]),
        server_queue_ms=quantiles(record.queue_us[done]),
    )


def good(record: Record, slo: SloSpec, of: Bools) -> Bools:
    """Say which of the requests `of` finished within all bounds of the SLO; bool[n]."""
    result: Bools = of & (record.status == Status.FINISHED)
    if slo.ttft_ms is not None:
        result &= record.first_us - record.intended_us <= slo.ttft_ms * 1e3
    if slo.e2el_ms is not None:
        result &= record.last_us - record.intended_us <= slo.e2el_ms * 1e3
    if slo.tpot_ms is not None:
        result &= tpot_us(record, np.ones(len(of), dtype=np.bool_)) <= slo.tpot_ms * 1e3
    if slo.itl_p99_ms is not None:
        result &= record.itl_p99_us <= slo.itl_p99_ms * 1e3
    return result


def group(
    record: Record, name: str, slo: SloSpec, of: Bools, is_good: Bools, sketches: list[GapSketch], duration_s: float
) -> Group:
    """Return the figures of the offered requests `of`; `sketches` hold their gaps."""
    num_offered, num_good = int(of.sum()), int(is_good.sum())
    done = of & (record.status == Status.FINISHED)
    acked = of & (record.acked_us != ABSENT)
    return Group(
        name=name,
        slo=slo,
        num_offered=num_offered,
        by_status={status.name.lower(): int((record.status[of] == status).sum()) for status in Status},
        errors=_counted(record.error[of], record.errors),
        latencies=latencies(record, of),
        submit_ack_ms=quantiles((record.acked_us - record.sent_us)[acked]),
        itl_ms=_gaps(record, done, sketches),
        num_good=num_good,
        goodput_rps=_round(num_good / duration_s) if duration_s > 0 else 0.0,
        goodput_share=_ratio(num_good, num_offered),
        num_graded=int((record.right[of] != ABSENT).sum()),
        accuracy=accuracy(record, of),
        prompt_tokens=int(record.num_prompt_tokens[of].sum()),
        cached_tokens=int(record.num_cached_tokens[of].sum()),
        output_tokens=int(record.num_tokens[of].sum()),
        energy=energy(record, of),
    )


def modes(record: Record, of: Bools) -> tuple[ModeUse, ...]:
    """Return what each mode served among `of`, the busiest first."""
    served = of & (record.mode != ABSENT)
    num_served, tokens_served = int(served.sum()), int(record.num_tokens[served].sum())
    uses = []
    for number, mode in enumerate(record.modes.list()):
        mine = served & (record.mode == number)
        if not mine.any():
            continue
        tokens = int(record.num_tokens[mine].sum())
        uses.append(
            ModeUse(
                mode=mode,
                num_requests=int(mine.sum()),
                request_share=_ratio(int(mine.sum()), num_served) or 0.0,
                output_tokens=tokens,
                token_share=_ratio(tokens, tokens_served),
                latencies=latencies(record, mine),
                accuracy=accuracy(record, mine),
                energy=energy(record, mine),
                reasons=dict(Counter(_counted(record.reason[mine], record.reasons)).most_common(TOP_REASONS)),
            )
        )
    return tuple(sorted(uses, key=lambda use: (-use.num_requests, use.mode)))


def accuracy(record: Record, of: Bools) -> float | None:
    """Share of right answers among those that could be graded; None when none could."""
    graded = of & (record.right != ABSENT)
    return _ratio(int(record.right[graded].sum()), int(graded.sum()))


def energy(record: Record, of: Bools) -> tuple[EnergySum, ...]:
    """Sum the energy of `of` per source; empty when nothing was measured."""
    sums = []
    for number, source in enumerate(record.energy_sources.list()):
        mine = of & (record.energy_source == number)
        if not mine.any():
            continue
        joules = float(record.energy_mj[mine].sum()) / 1e3
        output = int(record.num_tokens[mine].sum())
        every = output + int(record.num_prompt_tokens[mine].sum())
        sums.append(
            EnergySum(
                source=source,
                energy_j=_round(joules),
                num_requests=int(mine.sum()),
                j_per_output_token=_round(joules / output) if output else None,
                j_per_token=_round(joules / every) if every else None,
            )
        )
    return tuple(sums)


def _counted(numbers: NDArray[np.int16], words: Words) -> dict[str, int]:
    """Count the words that a column names."""
    counted = np.bincount(numbers[numbers != ABSENT], minlength=1)
    return {word: int(count) for word, count in zip(words.list(), counted, strict=False) if count}


def _gaps(record: Record, done: Bools, sketches: list[GapSketch]) -> GapQuantiles | None:
    merged = GapSketch.merged(sketches)
    p50, p95, p99 = (merged.quantile_us(q) for q in (0.5, 0.95, 0.99))
    num_messages = int(record.num_chunks[done].sum())
    if p50 is None or p95 is None or p99 is None or num_messages == 0:
        return None
    return GapQuantiles(
        count=merged.count,
        p50=_ms(p50),
        p95=_ms(p95),
        p99=_ms(p99),
        tokens_per_message=_round(int(record.num_tokens[done].sum()) / num_messages),
    )


def _ratio(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def _ms(us: float) -> float:
    return round(us / 1e3, 3)


def _round(value: float) -> float:
    return float(f"{value:.6g}")
