"""Figures against cases worked out by hand, and reports that say when they must not be believed."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console

from loadgen import metrics, plan, report, spec_reader, table
from loadgen.progress import Progress
from loadgen.record import MAX_WORDS, GapSketch, Record, Status, Words
from loadgen.spec import SloSpec
from msd import wire

SPEC = """
title = "by hand"
plan = { duration_s = 10 }
run = { warmup_s = 1 }
[[class]]
name = "a"
share = 0.5
slo = { ttft_ms = 100, tpot_ms = 20 }
tasks = [{ task = "copy", levels = [1] }]
[[class]]
name = "b"
share = 0.5
input = { kind = "fixed", tokens = 4 }
output = { kind = "fixed", tokens = 4 }
[arrivals]
rate_rps = 1
"""


def record_of(num_requests: int, answers: list[str | None] | None = None, keeps_gaps: bool = False) -> Record:
    """Requests due at 0, 1, 2, .. s, all of class 0."""
    intended = np.arange(num_requests, dtype=np.int64) * 1_000_000
    classes = np.zeros(num_requests, dtype=np.int16)
    return Record(intended, classes, 1, answers or [None] * num_requests, [keeps_gaps])


def done(completion: int = 3, mode: str = "bf16", finish_reason: str = "stop", **fields: object) -> wire.Done:
    return wire.Done(
        request_id="r",
        attempt=1,
        finish_reason=finish_reason,
        mode=mode,
        decision_id="d",
        usage=wire.Usage(prompt=5, cached=2, completion=completion),
        timings=wire.TimingFields(queue_ms=2.5, ttft_ms=0, tpot_ms=0, engine_ms=7, e2e_ms=0),
        **fields,  # type: ignore[arg-type]
    )


def everything(record: Record) -> metrics.Bools:
    return np.ones(len(record.intended_us), dtype=np.bool_)


def served(
    record: Record, index: int, *, late_ms: int, ttft_ms: int, gaps_ms: tuple[int, ...] = (), mode: str = "bf16"
) -> None:
    """Send request `index` late, bring its first token `ttft_ms` after the send and the others at the gaps."""
    sent = int(record.intended_us[index]) + late_ms * 1_000
    record.sent(index, sent)
    record.acked(index, sent + 1_000)
    now = sent + ttft_ms * 1_000
    record.tokens(index, now, 1, "x")
    for gap in gaps_ms:
        now += gap * 1_000
        record.tokens(index, now, 1, "y")
    record.finished(index, now + 500, done(completion=1 + len(gaps_ms), mode=mode))


# --- latencies -------------------------------------------------------------------------------------------------------


def test_latencies_count_from_the_send_and_from_the_intended_time() -> None:
    record = record_of(2)
    served(record, 0, late_ms=0, ttft_ms=10, gaps_ms=(4, 6))
    served(record, 1, late_ms=30, ttft_ms=20, gaps_ms=(8, 12))
    late = metrics.latencies(record, everything(record))
    assert late.ttft_ms is not None
    assert (late.ttft_ms.count, late.ttft_ms.mean, late.ttft_ms.max) == (2, 15.0, 20.0)
    assert late.ttft_intended_ms is not None
    assert (late.ttft_intended_ms.mean, late.ttft_intended_ms.max) == (30.0, 50.0)
    assert late.tpot_ms is not None
    assert (late.tpot_ms.p50, late.tpot_ms.max) == (7.5, 10.0)
    assert late.e2el_ms is not None
    assert late.e2el_ms.mean == (20 + 40) / 2
    assert late.e2el_intended_ms is not None
    assert late.e2el_intended_ms.mean == (20 + 70) / 2
    assert late.server_queue_ms is not None
    assert late.server_queue_ms.p50 == 2.5


def test_quantiles_interpolate_and_nothing_has_none() -> None:
    values = metrics.quantiles(np.arange(101, dtype=np.int64) * 1_000)
    assert values is not None
    assert (values.p50, values.p90, values.p95, values.p99, values.max) == (50.0, 90.0, 95.0, 99.0, 100.0)
    assert metrics.quantiles(np.zeros(0, dtype=np.int64)) is None


def test_one_token_has_no_tpot_and_meets_any_bound_on_it() -> None:
    record = record_of(1)
    served(record, 0, late_ms=0, ttft_ms=10)
    assert metrics.latencies(record, everything(record)).tpot_ms is None
    assert metrics.good(record, SloSpec(tpot_ms=1e-3), everything(record)).tolist() == [True]


def test_a_restart_voids_what_came_before_it() -> None:
    record = record_of(1, answers=["ab"])
    record.sent(0, 0)
    record.tokens(0, 10_000, 1, "zz")
    record.restarted(0)
    record.tokens(0, 50_000, 1, "a")
    record.tokens(0, 52_000, 1, "b")
    record.finished(0, 53_000, done(completion=2))
    assert record.first_us[0] == 50_000
    assert record.right[0] == 1
    assert record.num_restarts == 1
    assert record.num_chunks[0] == 2


def test_an_answer_that_was_not_streamed_is_its_own_first_token() -> None:
    record = record_of(1, answers=["ok"])
    record.sent(0, 0)
    record.finished(0, 9_000, done(completion=2, text="ok", detached=True))
    assert (record.first_us[0], record.last_us[0], record.right[0]) == (9_000, 9_000, 1)


# --- what becomes of requests ----------------------------------------------------------------------------------------


def test_each_end_has_its_status() -> None:
    record = record_of(8, answers=["x"] * 8)
    for index in range(6):
        record.sent(index, int(record.intended_us[index]))
    served_text = done(completion=1, text="x")
    record.finished(0, 10_000, served_text)
    record.refused(1, 1_010_000, "queue_full")
    record.acked(2, 2_010_000)
    record.refused(2, 2_020_000, "deadline_exceeded")
    record.finished(3, 3_010_000, done(finish_reason="abort"))
    assert record.time_out(4_000_000 + 2_000_001, timeout_us=2_000_000) == [4]
    record.shed(6)
    record.finished(4, 9_000_000, served_text)
    assert record.num_late_answers == 1
    assert [Status(code) for code in record.status] == [
        Status.FINISHED,
        Status.REJECTED,
        Status.FAILED,
        Status.ABORTED,
        Status.TIMED_OUT,
        Status.UNFINISHED,
        Status.SHED_CLIENT,
        Status.UNSENT,
    ]
    every = everything(record)
    figures = metrics.group(record, "all", SloSpec(), every, metrics.good(record, SloSpec(), every), record.gaps, 8.0)
    assert figures.errors == {"queue_full": 1, "deadline_exceeded": 1}
    assert sum(figures.by_status.values()) == figures.num_offered == 8
    assert (figures.num_good, figures.goodput_share, figures.goodput_rps) == (1, 0.125, 0.125)
    assert (figures.num_graded, figures.accuracy) == (1, 1.0)
    assert (record.num_finished, record.num_bad, record.num_in_flight) == (1, 5, 1)


@pytest.mark.parametrize(
    ("slo", "expected"),
    [
        (SloSpec(), [True, True, False]),
        (SloSpec(ttft_ms=25), [True, False, False]),
        (SloSpec(ttft_ms=55), [True, True, False]),
        (SloSpec(tpot_ms=6), [True, False, False]),
        (SloSpec(e2el_ms=69.9), [True, False, False]),
        (SloSpec(itl_p99_ms=11.9), [True, False, False]),
        (SloSpec(ttft_ms=55, tpot_ms=10, e2el_ms=70, itl_p99_ms=12), [True, True, False]),
    ],
)
def test_good_means_finished_within_every_bound_from_the_intended_time(slo: SloSpec, expected: list[bool]) -> None:
    record = record_of(3, keeps_gaps=True)
    served(record, 0, late_ms=0, ttft_ms=10, gaps_ms=(4, 6))  # TPOT 5, E2EL 20
    served(record, 1, late_ms=30, ttft_ms=20, gaps_ms=(8, 12))  # TTFT 50 from the intended time, TPOT 10, E2EL 70
    record.shed(2)
    assert metrics.good(record, slo, everything(record)).tolist() == expected


def test_modes_share_requests_and_tokens_and_say_why() -> None:
    record = record_of(4, answers=["x", "x", "xy", None])
    for index, mode in enumerate(["int8", "int8", "bf16", "int8"]):
        served(record, index, late_ms=0, ttft_ms=10, gaps_ms=(5,) if index == 2 else (), mode=mode)
    first, second = metrics.modes(record, everything(record))
    assert (first.mode, first.num_requests, first.request_share, first.token_share) == ("int8", 3, 0.75, 0.6)
    assert (second.mode, second.num_requests, second.accuracy) == ("bf16", 1, 1.0)
    assert first.accuracy == 1.0
    assert first.reasons == {"": 3}


def test_energy_is_summed_per_source_and_absent_where_nothing_measured_it() -> None:
    record = record_of(3)
    for index in range(3):
        record.sent(index, 0)
    measured = wire.EnergyFields(energy_mj=1_500, dynamic_mj=1_000, static_mj=500, source="counter", settled=False)
    record.finished(0, 10, done(completion=10, energy=measured))
    assert metrics.energy(record, everything(record) & False) == ()
    record.finished(1, 10, done(completion=5, energy=measured))
    record.finished(2, 10, done(completion=100))
    (total,) = metrics.energy(record, everything(record))
    assert (total.source, total.energy_j, total.num_requests) == ("counter", 3.0, 2)
    assert (total.j_per_output_token, total.j_per_token) == (0.2, 0.12)
    assert record.num_unsettled == 2


# --- bounded memory --------------------------------------------------------------------------------------------------


def test_the_gap_sketch_is_within_one_percent() -> None:
    sketch = GapSketch()
    gaps = np.random.default_rng(0).lognormal(9, 1.5, 20_000).astype(int) + 1
    for gap in gaps.tolist():
        sketch.add(gap)
    for q in (0.05, 0.5, 0.95, 0.99):
        assert sketch.quantile_us(q) == pytest.approx(float(np.quantile(gaps, q)), rel=0.012)
    assert GapSketch().quantile_us(0.5) is None
    assert GapSketch.merged([sketch, sketch]).count == 40_000


def test_tables_of_words_are_bounded() -> None:
    words = Words()
    numbers = {words.number(f"reason {index}") for index in range(10_000)}
    assert len(numbers) == len(words.list()) == MAX_WORDS + 1
    assert words.number("one more") == words.number("(other)")


# --- report ----------------------------------------------------------------------------------------------------------


def facts(**changed: object) -> report.RunFacts:
    fields: dict[str, object] = {
        "started_at": "2026-01-01T00:00:00+00:00",
        "wall_s": 10.0,
        "cpu_s": 0.5,
        "voluntary_switches": 1,
        "involuntary_switches": 2,
        "num_gc_runs": 0,
        "stopped_us": None,
        "stopped_by": None,
    }
    return report.RunFacts(**{**fields, **changed})  # type: ignore[arg-type]


def made_report(late_ms: int = 1, shed: int = 0, stop: bool = False, cpu_s: float = 0.5) -> report.Report:
    made = plan.make(spec_reader.parse(SPEC, "by hand", {"arrivals.rate_rps": 10}))
    classes = np.array([0 if row.traffic_class == "a" else 1 for row in made.requests], dtype=np.int16)
    record = Record(made.times_us(), classes, 2, [None] * len(classes), [False, False])
    for index in range(len(classes)):
        if stop and record.intended_us[index] >= 5_000_000:
            continue
        if index >= len(classes) - shed:
            record.shed(index)
        else:
            served(record, index, late_ms=late_ms, ttft_ms=20)
    stopped = {"stopped_us": 5_000_000, "stopped_by": "SIGINT"} if stop else {}
    return report.build(made, record, facts(cpu_s=cpu_s, **stopped), "msd+ipc:///x", None)


def test_a_sound_run_is_valid_and_leaves_the_warm_up_out() -> None:
    made = made_report()
    assert (made.valid, made.reasons, made.complete) == (True, [], True)
    every = sum(made.timeline.offered)
    assert made.total.num_offered == every - made.timeline.offered[0]
    assert made.total.num_offered == sum(group.num_offered for group in made.classes)
    assert made.certificate.lateness_ms is not None
    assert made.certificate.lateness_ms.p99 == 1.0
    assert made.total.goodput_share == 1.0
    assert made.certificate.offered_rps == pytest.approx(made.total.num_offered / 9, abs=1e-3)
    decoded = json.loads(report.encode(made))
    assert decoded["kind"] == "loadgen report"
    assert decoded["schema"] == report.SCHEMA
    assert decoded["total"]["latencies"]["ttft_intended_ms"]["p50"] == 21.0


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (made_report(late_ms=3), "sent late: p99 3.00 ms"),
        (made_report(shed=1), "1 requests shed"),
        (made_report(stop=True), "partial: stopped by SIGINT"),
        (made_report(cpu_s=9.0), "90% of a core"),
    ],
)
def test_an_unsound_run_is_invalid_and_says_so_on_top(made: report.Report, reason: str) -> None:
    assert not made.valid
    assert any(reason in given for given in made.reasons)
    text = io.StringIO()
    table.show(made, Console(file=text, width=160))
    assert "INVALID" in text.getvalue().splitlines()[0]
    assert reason in text.getvalue()


def test_a_broken_off_run_counts_only_what_was_due_by_then() -> None:
    made = made_report(stop=True)
    assert made.total.num_offered == sum(made.timeline.offered[1:5])
    assert made.total.by_status["finished"] == made.total.num_offered


def test_the_table_shows_a_dash_where_nothing_was_measured() -> None:
    text = io.StringIO()
    table.show(made_report(), Console(file=text, width=160))
    assert "INVALID" not in text.getvalue()
    assert "energy: - (nothing measured it)" in text.getvalue()
    assert "\x1b" not in text.getvalue()


def test_progress_is_plain_lines_where_there_is_no_terminal() -> None:
    record = record_of(10)
    served(record, 0, late_ms=2, ttft_ms=10)
    text = io.StringIO()
    progress = Progress(10, stream=text)
    progress.say("hello")
    progress.update(record, 1_000_000)
    progress.update(record, 6_000_000)
    progress.update(record, 6_500_000)
    progress.end()
    first, second = text.getvalue().splitlines()
    assert first == "loadgen: hello"
    assert "6.0 / 10 s" in second
    assert "done 1" in second
    assert "late <= 2.0 ms" in second
    assert "TTFT p50 10 ms" in second
