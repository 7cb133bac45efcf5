"""The command line against a live daemon: simulated engines, real sockets, real processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from msd.cli.children import Children
from msd.cli.status import read
from msd.client import Client
from msd.errors import EXIT_CONFIG, EXIT_INTERRUPTED, EXIT_NO, EXIT_OK, EXIT_UNREACHABLE
from msd.wire import Done

ROOT = Path(__file__).resolve().parents[2]
MSD = [sys.executable, "-m", "msd"]
ENGINES = """\
[daemon]
drain_s = 2
[[model]]
name = "m"
[[engine]]
name = "fast"
model = "m"
kind = "sim"
sim = { start_s = 0.1, step_ms = 2 }
[[engine]]
name = "slow"
model = "m"
kind = "sim"
sim = { start_s = 0.1, step_ms = 100 }
[policy]
name = "fixed"
mode = "fast"
"""


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.toml").write_text(ENGINES)
    url = f"ipc://{folder}/msd.sock"
    environ = {**os.environ, "MSD_ENDPOINT": url, "RUNTIME_DIRECTORY": str(folder), "STATE_DIRECTORY": str(folder)}
    with Children() as children:
        serve = ["-m", "msd", "serve", "--config", str(folder / "config.toml")]
        daemon = children.start("daemon", serve, folder / "log", environ, tied=True)
        with Client(url, timeout_s=30) as client:
            deadline = time.monotonic() + 30
            while any(engine.state != "up" for engine in read(client.status()).engines):
                daemon.check()
                assert time.monotonic() < deadline
                time.sleep(0.05)
        yield url
        daemon.stop(10)
        assert daemon.exit_code() == EXIT_OK, daemon.last_lines()


def msd(endpoint: str, *arguments: str, text: str = "", code: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"{code}\nimport sys\nfrom msd.cli import main\nsys.exit(main())"] if code else MSD
    return subprocess.run(
        [*command, *arguments], input=text, capture_output=True, text=True, timeout=60, cwd=ROOT,
        env={**os.environ, "MSD_ENDPOINT": endpoint},
    )  # fmt: skip


def test_send_streams_the_answer_and_says_how_it_was_served(endpoint: str) -> None:
    done = msd(endpoint, "send", "hello", "--max-tokens", "5")
    assert (done.returncode, len(done.stdout.split())) == (EXIT_OK, 5)
    assert re.fullmatch(
        r"fast: fixed on fast, 5 tokens \(length\), TTFT [\d.]+ ms, TPOT [\d.]+ ms, in all [\d.]+ ms, "
        r"[\d.]+ J \(simulated(, provisional)?\), request [\w.-]+\n",
        done.stderr,
    )


def test_send_reads_stdin_and_json_is_the_done_message(endpoint: str) -> None:
    streamed = msd(endpoint, "send", "-", "--max-tokens", "7", "--seed", "3", text="from a pipe")
    answered = msd(endpoint, "send", "-", "--max-tokens", "7", "--seed", "3", "--json", text="from a pipe")
    answer = json.loads(answered.stdout)
    assert answer.pop("ok") is True
    assert set(answer) <= {*Done.__struct_fields__, "t"}
    assert answer["text"].strip() == streamed.stdout.strip()
    assert answered.stderr == ""


def test_send_can_ask_for_a_mode(endpoint: str) -> None:
    done = msd(endpoint, "send", "hello", "--max-tokens", "2", "--no-stream", "--mode", "slow", "--class", "batch")
    assert done.stderr.startswith("slow: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hello", "--mode", "fasd"], "msd: mode_unavailable: no such mode 'fasd'; did you mean 'fast'?"),
        (["hello", "--quality-floor", "3"], "msd: invalid_field: "),
        (["", "--max-tokens", "3"], "msd: invalid_field: "),
        (["hello", "--deadline-ms", "0.01"], "msd: deadline_infeasible: "),
    ],
)
def test_a_refusal_is_one_line_and_exit_1(endpoint: str, arguments: list[str], message: str) -> None:
    done = msd(endpoint, "send", *arguments)
    assert (done.returncode, done.stdout) == (EXIT_NO, "")
    assert done.stderr.startswith(message)
    assert len(done.stderr.splitlines()) == 1


def test_a_refusal_as_json(endpoint: str) -> None:
    done = msd(endpoint, "send", "hello", "--mode", "fasd", "--json")
    assert done.returncode == EXIT_NO
    assert json.loads(done.stdout)["code"] == "mode_unavailable"


def running(endpoint: str) -> int:
    with Client(endpoint) as client:
        return read(client.status()).num_running


@pytest.mark.parametrize("end", ["ctrl-c", "timeout"])
def test_a_request_that_is_given_up_is_cancelled(endpoint: str, end: str) -> None:
    timeout_s = "1" if end == "timeout" else "60"
    command = [*MSD, "send", "hello", "--mode", "slow", "--max-tokens", "4000", "--no-stream", "--timeout-s", timeout_s]
    environ = {**os.environ, "MSD_ENDPOINT": endpoint}
    sender = subprocess.Popen(command, env=environ, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 20
        while running(endpoint) != 1:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        if end == "ctrl-c":
            sender.send_signal(signal.SIGINT)
        _, error = sender.communicate(timeout=20)
    finally:
        sender.kill()
    assert sender.returncode == (EXIT_INTERRUPTED if end == "ctrl-c" else EXIT_NO), error
    deadline = time.monotonic() + 5
    while running(endpoint):
        assert time.monotonic() < deadline, "the request still runs"
        time.sleep(0.05)


def test_status_shows_engines_modes_and_a_ledger_that_adds_up(endpoint: str) -> None:
    msd(endpoint, "send", "hello", "--max-tokens", "2")
    done = msd(endpoint, "status")
    assert done.returncode == EXIT_OK, done.stderr
    assert "SIMULATED" in done.stdout
    assert re.search(r"^fast \(simulated\) +up ", done.stdout, re.MULTILINE)
    assert "fixed on fast (" in done.stdout
    assert "= the counter" in done.stdout
    assert "do not add up" not in done.stdout


def test_status_watch_json_is_a_line_each_until_ctrl_c(endpoint: str) -> None:
    command = [*MSD, "status", "--watch", "--interval-s", "0.1", "--json", "--endpoint", endpoint]
    watcher = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert watcher.stdout is not None
    try:
        states = [json.loads(watcher.stdout.readline())["state"] for _ in range(3)]
        watcher.send_signal(signal.SIGINT)
        _, error = watcher.communicate(timeout=20)
    finally:
        watcher.kill()
    assert states == ["serving"] * 3
    assert (watcher.returncode, error) == (EXIT_INTERRUPTED, "")


def test_without_a_daemon_status_and_send_exit_69(tmp_path: Path) -> None:
    nobody = f"ipc://{tmp_path}/nobody.sock"
    done = msd(nobody, "status", "--timeout-s", "0.3")
    assert (done.returncode, done.stdout) == (EXIT_UNREACHABLE, "")
    assert "msd serve" in done.stderr


def test_a_producers_packages_are_enough_for_send_and_status(endpoint: str) -> None:
    blocked = (
        "import sys\n"
        "for name in ('tomlkit', 'rich', 'structlog', 'uvloop', 'numpy', 'aiohttp', 'tokenizers', 'vllm', 'torch'):\n"
        "    sys.modules[name] = None"
    )
    assert msd(endpoint, "send", "hello", "--max-tokens", "2", code=blocked).returncode == EXIT_OK
    assert msd(endpoint, "status", code=blocked).returncode == EXIT_OK


# --- demo ------------------------------------------------------------------------------------------------------------


def demo(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*MSD, "demo", "--sim", *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_the_simulated_demo_explains_itself() -> None:
    process = demo("--duration-s", "4", "--rate", "20")
    output, error = process.communicate(timeout=90)
    assert process.returncode == EXIT_OK, error
    assert output.startswith("SIMULATED")
    for word in ("1. starting the daemon", "2. starting 4 engines", "3. firing 4 s", "4. stopping", "why", "errors:",
                 "= the counter", "Files", "Next"):  # fmt: skip
        assert word in output
    assert re.search(r"^all +\d+ +\d+% +- +[\d,]+ / [\d,]+ ", output, re.MULTILINE), "simulated answers are not graded"
    (folder,) = re.findall(r"^Files +(\S+):", output, re.MULTILINE)
    assert {"report.json", "daemon.log", "loadgen.log"} <= {path.name for path in Path(folder).iterdir()}


@pytest.mark.slow
def test_the_demo_as_json() -> None:
    process = demo("--duration-s", "2", "--json")
    output, error = process.communicate(timeout=90)
    assert process.returncode == EXIT_OK, error
    result = json.loads(output)
    assert result["simulated"] is True
    assert result["report"]["total"]["by_status"]["finished"] > 0
    assert {mode["mode"] for mode in result["status"]["modes"]} == {"bf16", "int8", "ngram", "small"}
    assert "2. starting 4 engines" in error


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["1. starting", "2. starting", "3. firing"])
def test_ctrl_c_stops_the_demo_and_all_its_children(stage: str) -> None:
    process = demo()
    assert process.stdout is not None
    try:
        while not process.stdout.readline().startswith(stage):
            assert process.poll() is None
        time.sleep(0.7)
        children = descendants(process.pid)
        assert children
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == EXIT_INTERRUPTED
    assert [pid for pid in children if is_alive(pid)] == []


def descendants(pid: int) -> list[int]:
    children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return children + [below for child in children for below in descendants(child)]


def is_alive(pid: int) -> bool:
    """Whether the process is there and no zombie that nobody has reaped yet."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.slow
def test_nothing_survives_a_killed_demo() -> None:
    process = demo()
    assert process.stdout is not None
    try:
        while not process.stdout.readline().startswith("3. firing"):
            assert process.poll() is None
        children = descendants(process.pid)
        assert len(children) >= 1
    finally:
        process.kill()
        process.communicate(timeout=10)
    deadline = time.monotonic() + 30
    while left := [pid for pid in children if is_alive(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_a_demo_whose_daemon_cannot_start_shows_the_daemons_last_lines(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("no tokenizer")
    file = tmp_path / "config.toml"
    file.write_text(ENGINES.replace('[[model]]\nname = "m"', '[[model]]\nname = "m"\npath = "."'))
    done = subprocess.run([*MSD, "demo", "--config", str(file)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode != EXIT_OK
    assert "msd: the daemon ended with exit code 78; its last lines" in done.stderr
    assert "tokenizer" in done.stderr


def test_the_demo_needs_a_place_for_its_own_socket(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(ENGINES + '[ingress.zmq]\nendpoints = ["ipc:///run/elsewhere.sock"]\n')
    done = subprocess.run([*MSD, "demo", "--config", str(file)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == EXIT_CONFIG
    assert 'add "ipc://" to the endpoints' in done.stderr
