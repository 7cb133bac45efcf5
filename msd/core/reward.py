"""How good an outcome was, as policies and reports count it."""

from __future__ import annotations

from msd.domain import Request


def slo_met(request: Request, ttft_ms: float, tpot_ms: float, e2el_ms: float) -> bool | None:
    """Whether every bound that the producer gave was kept; None when it gave none."""
    slo = request.slo
    if slo.ttft_ms is None and slo.tpot_ms is None and slo.deadline_ms is None:
        return None
    return (
        (slo.ttft_ms is None or ttft_ms <= slo.ttft_ms)
        and (slo.tpot_ms is None or tpot_ms <= slo.tpot_ms)
        and (slo.deadline_ms is None or e2el_ms <= slo.deadline_ms)
    )
