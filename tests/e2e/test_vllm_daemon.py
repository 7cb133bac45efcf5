"""The whole house with real vLLM engines on the CPU: true answers, cancel, a killed engine, a killed daemon.

One daemon with two engines serves all tests of this file in order; the last one kills it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import psutil
import pytest

from msd import tasks
from msd.client import Client, RequestError
from tests.daemon_process import DaemonProcess

pytest.importorskip("vllm")
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

REPOSITORY = Path(__file__).parents[2]
START_S = 180.0
ENGINES = f"""
[[model]]
name = "tiny-large"
path = "{REPOSITORY}/testbed/models/tiny-large"
[[model]]
name = "tiny-small"
path = "{REPOSITORY}/testbed/models/tiny-small"
[[engine]]
name = "large"
model = "tiny-large"
prefix_caching = true
max_num_seqs = 8
args = {{ max_model_len = 1024, enforce_eager = true }}
[[engine]]
name = "small"
model = "tiny-small"
max_num_seqs = 1
args = {{ max_model_len = 1024, enforce_eager = true }}
[policy]
name = "round_robin"
# Another model is another mode only once it has passed the gate; here both are to serve.
[quality]
ungated = "allow"
"""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    folder = tmp_path_factory.mktemp("vllm")
    with DaemonProcess(folder, ENGINES, ready_s=90.0) as running:
        running.wait_told("warm: large, small", START_S)
        yield running


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[Client]:
    with Client(daemon.endpoint) as connected:
        yield connected


def engine_of(client: Client, name: str) -> dict[str, object]:
    engines = cast("list[dict[str, object]]", client.status()["engines"])
    return next(engine for engine in engines if engine["engine"] == name)


def core_pid(client: Client, name: str) -> int:
    pids = cast("list[int]", engine_of(client, name)["pids"])
    return next(pid for pid in pids if "EngineCore" in " ".join(psutil.Process(pid).cmdline()))


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def test_two_engines_in_one_process_answer_exactly(client: Client) -> None:
    problems = [tasks.generate(task, 1, seed) for task in ("copy", "reverse") for seed in range(8)]
    handles = [
        client.submit(problem.prompt, max_tokens=problem.max_tokens, task=problem.task, sampling={"temperature": 0.0})
        for problem in problems
    ]
    answers = [(problem, handle.result(60)) for problem, handle in zip(problems, handles, strict=True)]
    assert {done.mode for _, done in answers} == {"large", "small"}
    for done in (done for _, done in answers):
        assert done.energy is None, "this machine has no energy counter: nothing may be claimed"
    texts = ["".join(delta.text for delta in handle) for handle in handles]
    right = sum(tasks.grade(problem, text) for problem, text in zip(problems, texts, strict=True))
    assert right >= 14, texts


def test_token_ids_pass_through(client: Client) -> None:
    by_text = client.submit("sort kdwa=", max_tokens=8, mode_hint="large", sampling={"temperature": 0.0}, stream=False)
    text = by_text.result(30)
    assert text.text is not None
    assert text.text.strip() == "adkw"
    assert text.token_ids is not None
    assert text.usage.completion == len(text.token_ids)


def test_a_prompt_beyond_the_context_names_both_lengths(client: Client) -> None:
    with pytest.raises(RequestError) as refused:
        client.submit("copy " + "a" * 1200 + "=", max_tokens=8).result(30)
    assert refused.value.code == "context_overflow"
    assert "1024" in str(refused.value)


def test_a_cancel_frees_the_only_slot(client: Client) -> None:
    """The engine itself has one place (max_num_seqs = 1): did it go on with the cancelled one, the next would wait."""
    num_tokens, num_seen = 980, 0
    long = client.submit("copy ab=", max_tokens=num_tokens, model="tiny-small", sampling={"ignore_eos": True})
    began_s = time.monotonic()
    for delta in long:
        num_seen += len(delta.token_ids)
        if num_seen > 100:
            break
    left_s = (num_tokens - num_seen) * (time.monotonic() - began_s) / num_seen
    assert cast(int, engine_of(client, "small")["num_running"]) == 1
    cancelled_s = time.monotonic()
    long.cancel()
    assert long.result(10).finish_reason == "abort"
    done = client.submit("copy ab=", max_tokens=2, model="tiny-small").result(30)
    took_s = time.monotonic() - cancelled_s
    assert done.finish_reason in ("stop", "length")
    assert took_s < left_s / 3, f"the next answer took {took_s:.2f} s, the cancelled one had {left_s:.2f} s to go"


def test_nothing_listens_beyond_this_machine(daemon: DaemonProcess) -> None:
    for process in (psutil.Process(daemon.process.pid), *descendants(daemon.process.pid)):
        for connection in process.net_connections(kind="inet"):
            if connection.status == psutil.CONN_LISTEN:
                assert connection.laddr.ip in ("127.0.0.1", "::1"), (process.name(), connection)


def test_a_killed_engine_is_replaced_and_its_requests_finish(daemon: DaemonProcess, client: Client) -> None:
    handles = [
        client.submit(
            "copy abcd=", max_tokens=400, model="tiny-large", sampling={"ignore_eos": True, "temperature": 0.0}
        )
        for _ in range(4)
    ]
    for handle in handles:
        next(iter(handle))
    os.kill(core_pid(client, "large"), signal.SIGKILL)
    beside = client.submit("copy ab=", max_tokens=4, model="tiny-small")
    assert beside.result(30).mode == "small", "the other engine serves on"
    for handle in handles:
        done = handle.result(START_S)
        assert (done.finish_reason, done.usage.completion) == ("length", 400)
        assert done.attempt == 2
    assert engine_of(client, "large")["num_starts"] == 2


def test_a_killed_daemon_leaves_no_engine_alive(daemon: DaemonProcess) -> None:
    children = descendants(daemon.process.pid)
    assert any("EngineCore" in " ".join(child.cmdline()) for child in children)
    daemon.signal(signal.SIGKILL)
    daemon.wait(10)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
