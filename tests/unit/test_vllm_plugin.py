"""The plug-in inside vLLM's processes, without vLLM: who dies with whom, and who is left alone.

A stand-in daemon starts a stand-in engine, which registers and starts a stand-in worker, spawned or forked.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from msd.engine import processes, vllm_plugin
from msd.engine.processes import ProcessId

ENGINE = """
import os, subprocess, sys, time
from msd.engine import vllm_plugin
vllm_plugin.register()
print("engine speaks", flush=True)
if os.environ.get("FORK"):
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
elif os.environ.get("WORKER"):
    script = "import time; from msd.engine import vllm_plugin; vllm_plugin.register(); time.sleep(60)"
    pid = subprocess.Popen([sys.executable, "-c", script]).pid
else:
    pid = 0
open(os.environ["OUT"], "w").write(f"{os.getpid()} {pid}")
time.sleep(60)
"""

DAEMON = """
import os, subprocess, sys, time
from msd.engine import vllm_plugin
environment = dict(os.environ)
if not os.environ.get("PLAIN"):
    environment["MSD_ENGINE_PARENT"] = os.environ.get("IDENTITY") or vllm_plugin.process_identity(os.getpid())
subprocess.Popen([sys.executable, "-c", os.environ["ENGINE"]], env=environment)
time.sleep(60)
"""


class StandIn:
    """A daemon process with its engine (and worker); ended with the test."""

    def __init__(self, folder: Path, **variables: str) -> None:
        self.out = folder / "pids"
        self.log = folder / "engine.log"
        environment = os.environ | {"OUT": str(self.out), "ENGINE": ENGINE} | variables
        environment.pop("MSD_ENGINE_PARENT", None)
        self.daemon = subprocess.Popen([sys.executable, "-c", DAEMON], env=environment)
        deadline = time.monotonic() + 20
        while not (self.out.exists() and self.out.read_text()):
            assert time.monotonic() < deadline, "the stand-in engine did not come up"
            time.sleep(0.02)
        time.sleep(0.3)  # the worker registers after its pid is written
        engine, worker = (int(pid) for pid in self.out.read_text().split())
        self.engine = identify(engine)
        self.worker = identify(worker) if worker else None

    def kill_daemon(self) -> None:
        self.daemon.kill()
        self.daemon.wait()


def identify(pid: int) -> ProcessId:
    return ProcessId(pid, vllm_plugin.read_stat(pid)[1])


def ends(process: ProcessId | None, within_s: float = 2.0) -> bool:
    assert process is not None
    deadline = time.monotonic() + within_s
    while processes.is_running(process):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.fixture
def stand_ins() -> Iterator[list[StandIn]]:
    made: list[StandIn] = []
    yield made
    for stand_in in made:
        stand_in.kill_daemon()
        left = {process for process in (stand_in.engine, stand_in.worker) if process is not None}
        processes.end(frozenset(left), 0.0, 2.0)


@pytest.mark.parametrize("variables", [{"WORKER": "1"}, {"FORK": "1", "MSD_ENGINE_FORK_WORKERS": "1"}])
def test_engine_and_worker_die_with_the_daemon(
    tmp_path: Path, stand_ins: list[StandIn], variables: dict[str, str]
) -> None:
    stand_ins.append(stand_in := StandIn(tmp_path, **variables))
    assert stand_in.worker is not None
    assert processes.is_running(stand_in.worker)
    stand_in.kill_daemon()
    assert ends(stand_in.engine)
    assert ends(stand_in.worker)


def test_a_worker_dies_with_its_engine_while_the_daemon_lives(tmp_path: Path, stand_ins: list[StandIn]) -> None:
    stand_ins.append(stand_in := StandIn(tmp_path, WORKER="1"))
    os.kill(stand_in.engine.pid, signal.SIGKILL)
    assert ends(stand_in.worker)
    assert stand_in.daemon.poll() is None


@pytest.mark.parametrize(
    "variables",
    [
        {"PLAIN": "1"},  # no variable at all: somebody's own vLLM
        {"IDENTITY": "1:1"},  # a variable that names no ancestor
        {"IDENTITY": "not an identity"},
    ],
)
def test_a_plain_vllm_is_left_alone(tmp_path: Path, stand_ins: list[StandIn], variables: dict[str, str]) -> None:
    stand_ins.append(stand_in := StandIn(tmp_path, MSD_ENGINE_LOG=str(tmp_path / "engine.log"), **variables))
    stand_in.kill_daemon()
    assert not ends(stand_in.engine, 0.5)
    assert not stand_in.log.exists(), "its output was redirected"
    assert os.getpgid(stand_in.engine.pid) == os.getpgid(0)


def test_a_recycled_pid_is_not_taken_for_the_daemon(tmp_path: Path, stand_ins: list[StandIn]) -> None:
    mine = vllm_plugin.process_identity(os.getpid())
    pid, _, start_time = mine.partition(":")
    stand_ins.append(stand_in := StandIn(tmp_path, IDENTITY=f"{pid}:{int(start_time) + 1}"))
    assert os.getpgid(stand_in.engine.pid) == os.getpgid(0)


def test_output_goes_to_the_engines_log_and_ctrl_c_does_not_reach_it(tmp_path: Path, stand_ins: list[StandIn]) -> None:
    stand_ins.append(stand_in := StandIn(tmp_path, MSD_ENGINE_LOG=str(tmp_path / "engine.log")))
    assert stand_in.log.read_text() == "engine speaks\n"
    assert stand_in.log.stat().st_mode & 0o077 == 0
    assert os.getpgid(stand_in.engine.pid) == stand_in.engine.pid


def test_the_daemon_itself_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSD_ENGINE_PARENT", vllm_plugin.process_identity(os.getpid()))
    before = os.getpgid(0)
    vllm_plugin.register()
    assert os.getpgid(0) == before


def test_an_orphan_of_a_dead_parent_ends_itself(tmp_path: Path) -> None:
    """The daemon may die while its engine still imports vLLM, before anything ties their lives together."""
    script = tmp_path / "spawner.py"
    script.write_text(
        "import multiprocessing, os, sys, time\n"
        "def engine(path):\n"
        "    open(path, 'w').write(str(os.getpid()))\n"
        "    time.sleep(1)\n"
        "    from msd.engine import vllm_plugin\n"
        "    vllm_plugin.register()\n"
        "    time.sleep(30)\n"
        "if __name__ == '__main__':\n"
        "    from msd.engine import vllm_plugin\n"
        "    os.environ['MSD_ENGINE_PARENT'] = vllm_plugin.process_identity(os.getpid())\n"
        "    multiprocessing.get_context('spawn').Process(target=engine, args=(sys.argv[1],)).start()\n"
        "    time.sleep(30)\n"
    )
    out = tmp_path / "pid"
    root = str(Path(__file__).parents[2])
    spawner = subprocess.Popen([sys.executable, str(script), str(out)], env=os.environ | {"PYTHONPATH": root})
    deadline = time.monotonic() + 20
    while not (out.exists() and out.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    engine = identify(int(out.read_text()))
    spawner.kill()
    spawner.wait()
    assert ends(engine, 5.0)


def test_a_tree_is_found_and_ended_by_pid_and_start_time() -> None:
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(30)'])"
    before = processes.children_of(os.getpid())
    parent = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 10
    while len(tree := processes.tree_of(processes.children_of(os.getpid()) - before)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert parent.pid in {process.pid for process in tree}
    wrong = frozenset(ProcessId(process.pid, process.start_time + 1) for process in tree)
    assert processes.end(wrong, 0.0, 0.1) == frozenset()
    assert all(processes.is_running(process) for process in tree), "another process of the same pid was ended"
    assert processes.end(tree, 0.0, 5.0) == frozenset()
    parent.wait()
    assert not any(processes.is_running(process) for process in tree)
