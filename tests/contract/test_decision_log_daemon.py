"""The decision log of a real daemon: what `msd explain` says while it runs, after kill -9, and after the next start."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from msd import decisions
from msd.client import Client
from msd.decisions import Decided, Observed
from msd.domain import Mode
from tests.daemon_process import SIM, DaemonProcess

CACHING = SIM.replace("max_num_seqs = 4", "max_num_seqs = 4\nprefix_caching = true").replace("round_robin", "cost")
PROMPT = "You are a patient assistant. " * 40


def msd(*arguments: str, config: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "msd", *arguments, "--config", str(config)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def serve(daemon: DaemonProcess, name: str, num: int) -> None:
    """Ask so many questions, one after another, and wait until the last is in the log."""
    daemon.wait_told("warm: fast, slow", 20)
    with Client(daemon.endpoint) as client:
        for number in range(num):
            client.submit(f"{PROMPT}{number}", max_tokens=8, client_request_id=f"{name}{number}").result(20)
    folder = daemon.config.parent / "state" / "decisions"
    end_s = time.monotonic() + 20
    while len({r.request_id for r in decisions.read(folder) if isinstance(r, Observed)}) < num:
        assert time.monotonic() < end_s, "what was measured did not reach the log"
        time.sleep(0.05)


def test_a_decision_is_explained_while_the_daemon_runs_and_after_it_was_killed(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path, CACHING) as daemon:
        serve(daemon, "a", 4)
        said = msd("explain", "a3", config=daemon.config)
        assert "by policy cost" in said
        assert "tokens, likely shares a prefix" in said
        assert "energy" in said
        [attempt] = json.loads(msd("explain", "a3", "--json", config=daemon.config))["attempts"]
        figures = {figure["name"]: figure for figure in attempt["predictions"]}
        assert figures["cached"]["predicted"] == figures["cached"]["measured"] > 200, "the guess of the cache was right"
        assert figures["E2EL"]["measured"] > 0
        assert attempt["observed"]["observation"]["energy"]["source"] == "simulated"
        daemon.signal(signal.SIGKILL)
        daemon.wait(5)
    assert msd("explain", "a3", config=daemon.config) == said
    assert "4 " in msd("decisions", config=daemon.config)
    (tmp_path / "notify.sock").unlink()
    with DaemonProcess(tmp_path, CACHING) as daemon:
        serve(daemon, "b", 1)
        daemon.signal(signal.SIGTERM)
        assert daemon.wait(20) == 0
    folder = tmp_path / "state" / "decisions"
    asked = [r.client_request_id for r in decisions.read(folder) if isinstance(r, Decided)]
    assert asked == ["a0", "a1", "a2", "a3", "b0"]
    heads = [r.modes for r in decisions.read(folder) if isinstance(r, decisions.Opened)]
    assert len(heads) == 2
    assert [(mode.name, mode.prefix_caching) for mode in heads[0]] == [("fast", True), ("slow", True)]
    assert isinstance(heads[0][0], Mode)


def test_no_log_is_kept_where_none_is_wanted(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path, SIM + "[telemetry]\ndecision_log = false\n") as daemon:
        daemon.wait_told("warm: fast, slow", 20)
        with Client(daemon.endpoint) as client:
            client.submit("hello", max_tokens=2).result(20)
        daemon.signal(signal.SIGTERM)
        assert daemon.wait(20) == 0
    assert not (tmp_path / "state").exists()
