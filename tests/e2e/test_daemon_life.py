"""A real daemon on real sockets with simulated engines: start, notify, serve, drain, abort, die."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from msd.client import Client, RequestError
from msd.wire import Acked, Done, Error, Fetch, Results
from tests.daemon_process import NOOP, SIM, DaemonProcess
from tests.raw_client import RawClient


def children_of(pid: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_it_tells_the_service_manager_how_it_stands(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path, SIM) as daemon:
        assert "READY=1" in daemon.told[0]
        daemon.wait_told("warm: fast, slow", 10)
        daemon.signal(signal.SIGTERM)
        daemon.wait_told("STOPPING=1", 5)
        assert daemon.wait(10) == 0


def test_an_answer_streams_and_adds_up(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path, SIM) as daemon, Client(daemon.endpoint) as client:
        handle = client.submit("one two three", max_tokens=12)
        text = "".join(delta.text for delta in handle)
        done = handle.result(10)
        assert done.finish_reason == "length"
        assert done.usage.completion == 12
        assert text
        assert done.mode in ("fast", "slow")
        assert done.energy is not None
        assert done.energy.source == "simulated"
        assert done.energy.energy_mj == done.energy.dynamic_mj + done.energy.static_mj
        [fetched] = client.fetch([done.request_id]).items
        assert isinstance(fetched, Done)
        assert fetched.text == text
        status = client.status()
        requests = status["requests"]
        assert isinstance(requests, dict)
        ended = ("delivered", "rejected", "aborted", "failed", "duplicates", "pending")
        assert requests["submitted"] == sum(requests[name] for name in ended)
        assert status["simulated"] is True


def test_sigterm_answers_what_waits_and_finishes_what_runs(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path, SIM, drain_s=20) as daemon, Client(daemon.endpoint, retry_s=0) as client:
        daemon.wait_told("warm: fast, slow", 10)
        # 8 slots: these run about a second or two, the rest waits.
        handles = [client.submit(f"prompt {i}", max_tokens=60, sampling={"ignore_eos": True}) for i in range(40)]
        for handle in handles[:1]:
            next(iter(handle))
        daemon.signal(signal.SIGTERM)
        reasons, refusals = [], []
        for handle in handles:
            try:
                reasons.append(handle.result(20).finish_reason)
            except RequestError as error:
                refusals.append((error.code, error.retryable))
        assert len(reasons) >= 8, "what ran was allowed to finish"
        assert set(reasons) == {"length"}
        assert len(refusals) >= 20, "what waited was told"
        assert set(refusals) == {("draining", True)}
        assert daemon.wait(20) == 0


def test_the_drain_ends_at_its_limit(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path, SIM, drain_s=0.5) as daemon, Client(daemon.endpoint, retry_s=0) as client:
        daemon.wait_told("warm: fast, slow", 10)
        handle = client.submit("long", max_tokens=4000, sampling={"ignore_eos": True})
        next(iter(handle))
        daemon.signal(signal.SIGTERM)
        started_s = time.monotonic()
        with pytest.raises(RequestError) as refused:
            handle.result(10)
        assert refused.value.code == "draining"
        assert daemon.wait(10) == 0
        assert time.monotonic() - started_s < 5


def test_a_second_sigterm_aborts_at_once(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path, SIM, drain_s=60) as daemon, Client(daemon.endpoint, retry_s=0) as client:
        daemon.wait_told("warm: fast, slow", 10)
        handle = client.submit("long", max_tokens=4000, sampling={"ignore_eos": True})
        next(iter(handle))
        daemon.signal(signal.SIGTERM)
        daemon.wait_told("STOPPING=1", 5)
        daemon.signal(signal.SIGTERM)
        with pytest.raises(RequestError) as refused:
            handle.result(10)
        assert refused.value.code == "draining"
        assert daemon.wait(10) == 0


def test_new_submits_are_refused_while_it_drains(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path, SIM, drain_s=20) as daemon, Client(daemon.endpoint, retry_s=0) as client:
        daemon.wait_told("warm: fast, slow", 10)
        running = client.submit("long", max_tokens=200, sampling={"ignore_eos": True})
        next(iter(running))
        daemon.signal(signal.SIGTERM)
        daemon.wait_told("STOPPING=1", 5)
        with pytest.raises(RequestError) as refused:
            client.submit("late", max_tokens=4).result(10)
        assert refused.value.code == "draining"
        assert running.result(20).finish_reason == "length"


def test_a_second_daemon_on_the_same_socket_is_refused(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path, NOOP) as daemon:
        second = subprocess.run(
            [sys.executable, "-m", "msd", "serve", "--config", str(daemon.config)],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert second.returncode == 78, "and systemd must not restart it"
        assert "msd.sock" in second.stderr
        with Client(daemon.endpoint) as client:
            assert client.submit("still here", max_tokens=1).result(5).finish_reason == "length"


def test_a_killed_daemon_leaves_its_socket_and_the_next_takes_it(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path, NOOP) as daemon:
        daemon.signal(signal.SIGKILL)
        daemon.wait(5)
        socket_path = tmp_path / "msd.sock"
        assert socket_path.exists()
        (tmp_path / "notify.sock").unlink()
    with DaemonProcess(tmp_path, NOOP) as again, Client(again.endpoint) as client:
        assert client.submit("hello", max_tokens=1).result(5).finish_reason == "length"


SMALL_STORE = """
[journal]
max_result_bytes = 7000
"""


def test_a_full_store_refuses_new_work_but_not_repeats(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path, NOOP + SMALL_STORE) as daemon:
        with RawClient(daemon.endpoint) as raw:
            for number in range(2):  # 3.8 kB each, as memory
                raw.submit(f"r{number}", max_tokens=40)
                assert isinstance(raw.answer_to(f"r{number}"), Done)
            raw.submit("one too many", max_tokens=1)
            refused = raw.answer_to("one too many")
            assert isinstance(refused, Error)
            assert (refused.code, refused.retryable) == ("queue_full", True)
            raw.submit("r1", max_tokens=40)
            repeated = raw.answer_to("r1")
            assert isinstance(repeated, Done), "its result is there, and needs no room"
            raw.send(Acked(request_ids=(repeated.request_id,)))
            raw.submit("there is room again", max_tokens=1)
            assert isinstance(raw.answer_to("there is room again"), Done)
        with Client(daemon.endpoint) as client:
            requests = client.status()["requests"]
            assert isinstance(requests, dict)
            assert requests["rejected"] == 1


def test_fetch_keeps_to_its_bytes_and_takes_an_id_once(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path, NOOP) as daemon, RawClient(daemon.endpoint) as raw:
        ids = []
        for number in range(4):
            raw.submit(f"r{number}", max_tokens=400)
            done = raw.answer_to(f"r{number}")
            assert isinstance(done, Done)
            ids.append(done.request_id)
        raw.send(Fetch(request_ids=(ids[0], ids[0], *ids), max_bytes=5_000))
        results = raw.receive(Results)
        assert len(results.items) < 4
        assert results.more
        raw.send(Fetch(request_ids=(ids[0], ids[0])))
        assert len(raw.receive(Results).items) == 1
