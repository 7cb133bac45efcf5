"""The tutorial's commands and its producer script, run word for word against the daemon that it starts."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
TUTORIAL = (REPOSITORY / "docs" / "tutorial.md").read_text()
SHELL: list[str] = re.findall(r"```sh\n(.*?)```", TUTORIAL, re.DOTALL)
PRODUCER: list[str] = re.findall(r"```python\n(.*?)```", TUTORIAL, re.DOTALL)


def as_here(command: str) -> str:
    """The tutorial's programs are those of this interpreter, wherever its environment lies."""
    here = {"python": sys.executable, "msd": f"{sys.executable} -m msd", "loadgen": f"{sys.executable} -m loadgen"}
    return re.sub(r"\.venv/bin/(python|msd|loadgen)\b", lambda match: here[match[1]], command)


def run(command: str, environ: dict[str, str], folder: Path, code: int = 0) -> str:
    done = subprocess.run(
        as_here(command), shell=True, cwd=folder, env=environ, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def block_with(text: str) -> str:
    [block] = [block for block in SHELL if text in block]
    return block


@pytest.mark.timeout(180)
def test_the_tutorial_does_what_it_says(tmp_path: Path) -> None:
    start = block_with("serve --config testbed/demo-sim.toml").splitlines()
    assert start[0] == "mkdir -p build/tutorial"
    assert start[1] == "export MSD_ENDPOINT=ipc://$PWD/build/tutorial/msd.sock"
    # Its folder is the repository's; a test must not write there, so a copy's worth of links stands in.
    for name in ("testbed", "msd", "loadgen", "config.toml"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / "build" / "tutorial").mkdir(parents=True)
    environ = {**os.environ, "MSD_ENDPOINT": f"ipc://{tmp_path}/build/tutorial/msd.sock", "PYTHONPATH": str(REPOSITORY)}
    environ["XDG_STATE_HOME"] = str(tmp_path / "state")
    assert "[[engine]]" in run(start[2], environ, tmp_path)
    with (tmp_path / "serve.log").open("wb") as log:
        daemon = subprocess.Popen(as_here(start[3]).split(), cwd=tmp_path, env=environ, stderr=log)
    try:
        end_s = time.monotonic() + 60
        while num_up(environ, tmp_path) < 3:
            assert time.monotonic() < end_s, "the engines did not come up"
            time.sleep(0.5)
        assert "simulated" in run(block_with("msd status\n"), environ, tmp_path)
        assert "TTFT" in run(block_with("--max-tokens 8"), environ, tmp_path)
        for command in block_with("int9").splitlines():
            assert "msd: " in run(command.split("#")[0], environ, tmp_path, code=1)
        [script] = PRODUCER
        (tmp_path / "build" / "tutorial" / "producer.py").write_text(script)
        said = run(block_with("producer.py"), environ, tmp_path)
        assert said.count("->") == 5
        assert "bf16 says length" in said
        assert "refused" not in said
        assert "requests" in run(block_with("loadgen run smoke"), environ, tmp_path)
        daemon.send_signal(signal.SIGINT)
        assert daemon.wait(20) == 0
    finally:
        if daemon.poll() is None:
            daemon.kill()
            daemon.wait()


def num_up(environ: dict[str, str], folder: Path) -> int:
    """How many engines are up, by `msd status`; 0 while nobody answers."""
    command = as_here(".venv/bin/msd status --json")
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environ, capture_output=True, text=True, timeout=60, check=False
    )
    return done.stdout.count('"up"')
