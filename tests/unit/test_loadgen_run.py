"""Runs against a stub server on a real socket: honest times through a stall, and a report whatever happens."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from loadgen import cli, plan, spec_reader
from loadgen.progress import Progress
from loadgen.run import Run, execute
from loadgen.send import send_on_schedule
from loadgen.targets.zmq import ZmqTarget
from msd import wire
from tests.unit.loadgen_stub import stub

# The sender shares the machine with whatever else is being tested: lateness is not what these tests are about.
SPEC = """
title = "test"
plan = {{ seed = 1, duration_s = {duration_s} }}
run = {{ timeout_s = {timeout_s}, max_in_flight = {max_in_flight}, max_lateness_p99_ms = 500 }}
[[class]]
name = "copy"
share = 1.0
slo = {{ ttft_ms = 400 }}
tasks = [{{ task = "copy", levels = [1, 2] }}]
[arrivals]
rate_rps = {rate_rps}
process = {{ kind = "constant" }}
"""


def spec_text(
    duration_s: float = 0.5, rate_rps: float = 100, timeout_s: float = 20, max_in_flight: int = 20_000
) -> str:
    return SPEC.format(duration_s=duration_s, rate_rps=rate_rps, timeout_s=timeout_s, max_in_flight=max_in_flight)


def run(endpoint: str, text: str) -> Run:
    made = plan.make(spec_reader.parse(text, "test"))
    progress = Progress(made.header.spec.plan.duration_s, stream=io.StringIO())
    target = ZmqTarget(f"msd+{endpoint}", made.header.spec.run.max_in_flight)
    return asyncio.run(execute(made, target, progress))


# --- the sender ------------------------------------------------------------------------------------------------------


def test_the_sender_catches_up_and_never_moves_the_schedule() -> None:
    due_us = [index * 10_000 for index in range(50)]
    sent: list[tuple[int, int]] = []
    start = time.monotonic_ns() // 1_000

    def now_us() -> int:
        return time.monotonic_ns() // 1_000 - start

    def send(index: int) -> None:
        sent.append((index, now_us()))
        if index == 10:
            time.sleep(0.2)  # the process was not scheduled

    asyncio.run(send_on_schedule(due_us, send, now_us))
    assert [index for index, _ in sent] == list(range(50))
    assert all(at >= due_us[index] for index, at in sent)
    # All 20 that fell due during the pause leave at once; afterwards the schedule holds again.
    assert sent[30][1] - sent[11][1] < 50_000
    assert sent[-1][1] < due_us[-1] + 100_000


# --- whole runs ------------------------------------------------------------------------------------------------------


def test_a_run_reports_what_the_server_did(tmp_path: Path) -> None:
    energy = wire.EnergyFields(energy_mj=200, dynamic_mj=100, static_mj=100, source="simulated", settled=True)
    with stub(tmp_path, num_tokens=3, refuse_every=10, energy=energy) as server:
        result = run(server.endpoint, spec_text()).report
        assert sorted(server.acked) == sorted({f"r{n}" for n in range(1, 51) if n % 10})
        hints = {(submit.task, submit.service_class, submit.max_tokens) for submit in server.received}
    assert hints == {("copy", "standard", 5), ("copy", "standard", 9)}
    assert result.valid, result.reasons
    assert result.server is not None
    assert result.server.server == "stub"
    assert result.total.num_offered == 50
    assert result.total.by_status["finished"] == 45
    assert result.total.errors == {"queue_full": 5}
    assert result.total.accuracy == 1.0
    assert result.total.output_tokens == 135
    assert result.total.energy[0].energy_j == pytest.approx(9.0)
    assert {mode.mode for mode in result.modes} == {"bf16", "int8"}
    assert result.modes[0].reasons["rule 7"] == result.modes[0].num_requests
    assert result.total.itl_ms is not None
    assert result.total.itl_ms.tokens_per_message == 1.0
    assert sum(result.timeline.offered) == sum(result.timeline.achieved) == 50


def test_a_stalled_server_does_not_hide_its_stall(tmp_path: Path) -> None:
    """Coordinated omission: server stops for S = 1 s of T = 4 s, so p95 from the intended time is about S - 0.05 T."""
    rate, duration_s, stall_s = 100, 4.0, 1.0
    with stub(tmp_path, stall=(1.5, stall_s)) as server:
        made = plan.make(spec_reader.parse(spec_text(duration_s, rate), "test"))
        result = run(server.endpoint, spec_text(duration_s, rate)).report
        answered = np.array([server.answered_us[index] for index in range(len(made.requests))])
    # The truth, from the server's own log: it answered its first request as soon as that was due.
    waits = answered - answered[0] - (made.times_us() - made.times_us()[0])
    truth_ms = float(np.quantile(waits, 0.95)) / 1e3
    assert truth_ms == pytest.approx((stall_s - 0.05 * duration_s) * 1e3, rel=0.1)
    ttft = result.total.latencies.ttft_intended_ms
    assert ttft is not None
    assert ttft.p95 == pytest.approx(truth_ms, rel=0.05)
    # A generator that waits for answers would have sent one request during the stall instead of a hundred.
    assert min(result.timeline.achieved[:4]) >= 90
    # And the SLO judges the same: arrivals of the stall's first 0.6 s waited longer than 400 ms.
    assert result.total.goodput_share == pytest.approx(1 - 0.6 / duration_s, abs=0.05)


def test_answers_that_never_come_time_out_and_are_cancelled(tmp_path: Path) -> None:
    with stub(tmp_path, swallow=True) as server:
        result = run(server.endpoint, spec_text(timeout_s=0.3)).report
        deadline = time.monotonic() + 5
        while len(server.cancelled) < 50 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(set(server.cancelled)) == 50
    assert result.total.by_status["timed_out"] == 50
    assert result.total.goodput_share == 0.0
    assert result.valid  # slow is the server's fault, and it is told


def test_what_exceeds_max_in_flight_is_shed_and_makes_the_run_invalid(tmp_path: Path) -> None:
    with stub(tmp_path, swallow=True) as server:
        result = run(server.endpoint, spec_text(timeout_s=2, max_in_flight=10)).report
    assert result.total.by_status["shed_client"] == 40
    assert result.total.num_offered == 50
    assert not result.valid
    assert any("shed" in reason for reason in result.reasons)


# --- the command line ------------------------------------------------------------------------------------------------


@contextmanager
def signal_after(seconds: float, number: signal.Signals) -> Iterator[None]:
    timer = threading.Timer(seconds, os.kill, (os.getpid(), number))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def command(folder: Path, endpoint: str, text: str, *more: str) -> tuple[int, dict[str, object]]:
    spec, out = folder / "spec.toml", folder / "report.json"
    spec.write_text(text)
    code = cli.main(["run", str(spec), "--target", f"msd+{endpoint}", "--json-out", str(out), *more])
    return code, json.loads(out.read_text()) if out.exists() else {}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_with_a_partial_report(tmp_path: Path, number: signal.Signals, code: int) -> None:
    with stub(tmp_path, num_tokens=2) as server, signal_after(0.6, number):
        started = time.monotonic()
        exit_code, found = command(tmp_path, server.endpoint, spec_text(duration_s=60))
    assert exit_code == code
    assert time.monotonic() - started < 5
    assert (found["complete"], found["valid"], found["stopped_by"]) == (False, False, number.name)
    total = found["total"]
    assert isinstance(total, dict)
    assert 0 < total["num_offered"] < 200
    assert total["by_status"]["unsent"] == 0


def test_a_server_that_dies_ends_the_run_with_a_partial_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with stub(tmp_path, dies_after_s=0.3) as server:
        started = time.monotonic()
        exit_code, found = command(tmp_path, server.endpoint, spec_text(duration_s=60))
    assert exit_code == cli.EXIT_DEAD
    assert time.monotonic() - started < 5
    assert found["stopped_by"] == "a dead target"
    captured = capsys.readouterr()
    assert "INVALID" in captured.out.splitlines()[0]
    assert "closed the connection" in captured.err


def test_nobody_at_the_address_is_told_within_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadgen.targets.zmq.CONNECT_TIMEOUT_S", 0.3)
    exit_code, found = command(tmp_path, f"ipc://{tmp_path}/nobody.sock", spec_text())
    assert exit_code == cli.EXIT_DEAD
    total = found["total"]
    assert isinstance(total, dict)
    assert total["num_offered"] == 0


def test_an_invalid_run_exits_4_and_json_goes_to_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with stub(tmp_path, swallow=True) as server:
        text = spec_text(timeout_s=0.5, max_in_flight=1)
        exit_code, found = command(tmp_path, server.endpoint, text, "--json", "--quiet")
    assert exit_code == cli.EXIT_INVALID
    captured = capsys.readouterr()
    assert json.loads(captured.out) == found
    assert captured.err == ""


def test_a_saved_plan_runs_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "plan.jsonl.gz"
    assert cli.main(["plan", "smoke", "-o", str(saved), "--seed", "5", "--duration-s", "0.4", "--rate", "50"]) == 0
    digest = plan.load(saved).digest()
    assert digest in capsys.readouterr().out
    with stub(tmp_path) as server:
        assert cli.main(["run", str(saved), "--target", f"msd+{server.endpoint}", "--json", "--quiet"]) == 0
        assert json.loads(capsys.readouterr().out)["plan"]["hash"] == digest
    assert cli.main(["run", str(saved), "--seed", "6"]) == cli.EXIT_USAGE
    assert "belong to its spec" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "no-such-preset"],
        ["run", "smoke", "--target", "http://localhost"],
        ["run", "smoke", "--target", "msd+ipc:///x", "--json-out", "/no/such/folder/report.json"],
        ["run", "smoke", "--rate", "-1"],
        ["presets", "--show", "no-such-preset"],
    ],
)
def test_bad_usage_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == cli.EXIT_USAGE
    assert capsys.readouterr().err


def test_presets_are_listed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["presets"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("demo", "smoke", "square", "steady"))
    assert cli.main(["presets", "--show", "demo"]) == 0
    assert "[[class]]" in capsys.readouterr().out


def test_the_module_runs_as_a_command() -> None:
    done = subprocess.run([sys.executable, "-m", "loadgen", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "presets" in done.stdout
