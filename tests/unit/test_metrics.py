"""Metrics below the socket: the bound on tenants, histograms, columns that are never one sum; the ledger's table."""

from __future__ import annotations

import re
from random import Random

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from msd.cli import status
from msd.cli.terminal import DASH
from msd.config import Config
from msd.core.ledger import Booked
from msd.domain import Outcome
from msd.telemetry.metrics import MAX_TENANTS, OTHER, Histogram, Metrics, TenantCap
from msd.wire import CoefficientReport, DaemonStatus, LedgerReport, UsageReport


def test_a_histogram_is_cumulative_and_its_bounds_belong_to_it() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    assert histogram.freeze().buckets() == [("1.0", 2), ("2.0", 3), ("+Inf", 4)]
    assert histogram.freeze().sum == 12.0


def test_tenants_are_bounded_and_no_series_ever_falls() -> None:
    rng = Random(1)
    cap = TenantCap()
    sums: dict[tuple[str, ...], int] = {}
    before: dict[tuple[str, ...], int] = {}
    for _ in range(300):
        for _ in range(5):
            key = (rng.choice(("a", "b")), f"t{rng.randrange(40)}")
            sums[key] = sums.get(key, 0) + rng.randrange(100)
        named = frozenset(f"t{rng.randrange(40)}" for _ in range(6))
        shown = cap.update(sums, named)
        assert sum(shown.values()) == sum(sums.values()), "nothing is lost or counted twice"
        assert {key[-1] for key in shown} <= named | {OTHER}
        assert all(value >= before.get(label, 0) for label, value in shown.items())
        assert all(label in shown for label in before if label[-1] == OTHER)
        before = shown


def test_the_tenants_with_the_most_energy_have_labels() -> None:
    metrics = Metrics()
    rows = tuple(Booked("requests", "", "m", f"t{i:03}", 1_000 * i, 0, 0, 10) for i in range(80))
    ledger = LedgerReport(domain="gpu:0", source="counter", counter_mj=sum(row.energy_mj for row in rows))
    snapshot = metrics.snapshot(DaemonStatus(server="msd/0", energy=(ledger,)), {"gpu:0": rows})
    samples = _samples(metrics.render(snapshot), "msd_energy_joules_total")
    tenants = {labels["tenant"] for labels, _ in samples if labels["account"] == "requests"}
    assert tenants == {f"t{i:03}" for i in range(80 - MAX_TENANTS, 80)} | {OTHER}
    assert sum(value for _, value in samples) == pytest.approx(ledger.counter_mj / 1000)


def test_counted_and_estimated_energy_are_two_series_and_add_up_to_the_counters_two() -> None:
    metrics = Metrics()
    rows = (
        Booked("requests", "", "m", "t", 5_000, 2_000, 100, 10),
        Booked("wasted", "shadow", "m", "t", 700, 0, 100, 10),
    )
    ledger = LedgerReport(
        domain="gpu:0", source="counter", counter_mj=4_600, estimated_mj=2_500, requests_mj=5_000,
        wasted_mj={"shadow": 700}, idle_mj=1_000, unattributed_mj={"glitch": 400},
        estimated_of={"requests": 2_000, "idle": 300, "unattributed: glitch": 200},
    )  # fmt: skip
    text = metrics.render(metrics.snapshot(DaemonStatus(server="msd/0", energy=(ledger,)), {"gpu:0": rows}))
    booked, counter = _samples(text, "msd_energy_joules_total"), _samples(text, "msd_gpu_energy_joules_total")
    for source, joules in (("counter", 4.6), ("estimated", 2.5)):
        assert sum(v for labels, v in booked if labels["source"] == source) == pytest.approx(joules)
        assert [v for labels, v in counter if labels["source"] == source] == [joules]
    assert ("wasted", "shadow") in {(labels["account"], labels["reason"]) for labels, _ in booked}
    lines = "\n".join(status.energy_lines(ledger))
    assert "add up" not in lines
    assert re.search(r"^  = the counter +4\.600 J +2\.500 J$", lines, re.MULTILINE)
    broken = msgspec.structs.replace(ledger, estimated_of={"requests": 1})
    assert "the estimates do not add up" in "\n".join(status.energy_lines(broken))


def test_aborted_requests_give_no_tokens() -> None:
    metrics = Metrics()
    for reason in ("stop", "length", "abort"):
        outcome = Outcome(
            request_id="r", attempt=1, finish_reason=reason, mode="m", num_prompt_tokens=3, num_completion_tokens=5
        )
        metrics.completed(outcome, "t")
    text = metrics.render(metrics.snapshot(DaemonStatus(server="msd/0"), {}))
    assert _samples(text, "msd_generated_tokens_total") == [({"mode": "m", "tenant": "t"}, 10.0)]
    assert _samples(text, "msd_prompt_tokens_total") == [({"mode": "m", "tenant": "t"}, 6.0)]


def _samples(text: bytes, name: str) -> list[tuple[dict[str, str], float]]:
    return [
        (sample.labels, sample.value)
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
        if sample.name == name
    ]


@pytest.mark.parametrize("listen", ["", ":9464", "127.0.0.1:9464", "[::1]:9464", "localhost:80"])
def test_addresses_that_can_be_listened_on(listen: str) -> None:
    assert msgspec.convert({"ingress": {"http": {"listen": listen}}}, Config).ingress.http.listen == listen


@pytest.mark.parametrize("listen", ["9464", "localhost", "http://localhost:80", "::1:80", "host:123456", "a b:80"])
def test_addresses_that_cannot(listen: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=r"\$\.ingress\.http\.listen"):
        msgspec.convert({"ingress": {"http": {"listen": listen}}}, Config)


def test_the_status_shows_joules_per_token_and_how_well_coefficients_are_known() -> None:
    ledger = LedgerReport(
        domain="gpu:0", source="counter", counter_mj=6_000, requests_mj=5_000, idle_mj=1_000,
        idle_w=70.5, idle_origin="learnt", idle_spread_w=1.25, idle_age_s=90.0,
        modes=(UsageReport(name="bf16", energy_mj=5_000, static_mj=1_000, num_tokens=50, wasted_mj=250),),
        tenants=(UsageReport(name="local", energy_mj=5_000, num_tokens=0),),
    )  # fmt: skip
    learnt = CoefficientReport(
        mode="bf16", step_mj=4_000, prefill_mj_per_token=10, decode_mj_per_token=100,
        step_error_mj=50, prefill_error_mj=1, decode_error_mj=500, num_intervals=900, confidence="low",
    )  # fmt: skip
    prior = CoefficientReport(mode="int8", step_mj=2_000, prefill_mj_per_token=10, decode_mj_per_token=95)
    told = DaemonStatus(server="msd/0", energy=(ledger,), coefficients=(learnt, prior))
    lines = status.render(told)
    text = "\n".join(lines)
    assert "idle power 70.5 W, learnt, scatter 1.2 W, 1 min 30 s ago" in text
    [row] = [line.split() for line in lines if line.startswith("  bf16") and " J" in line]
    assert row == ["bf16", "50", "5.000", "J", DASH, "0.100", "0.020", "0.250", "J"]
    [row] = [line.split() for line in lines if line.startswith("  bf16") and "±" in line]
    assert row[1:4] == ["4.000", "±", "0.050"]
    assert "100" not in row, "a figure that is less sure than itself is not shown"
    assert row[-2:] == ["900", "low"]
    assert "prior" in lines[-1]
