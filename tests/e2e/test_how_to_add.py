"""docs/how-to/add-a-policy.md and add-a-mode.md, followed word for word in a copy of the repository."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
HOW_TO = REPOSITORY / "docs" / "how-to"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (HOW_TO / page).read_text(), re.DOTALL)


def follow(command: str, folder: Path, *, timeout_s: float = 100) -> str:
    """Run one block of a page in the copy; the copy's own msd is imported, whatever is installed."""
    here = {"python": sys.executable, "msd": f"{sys.executable} -m msd"}
    command = re.sub(r"\.venv/bin/(python|msd)\b", lambda match: here[match[1]], command)
    environ = {**os.environ, "PYTHONPATH": str(folder), "XDG_STATE_HOME": str(folder / "state")}
    done = subprocess.run(
        ["bash", "-eu", "-c", command], cwd=folder, env=environ, capture_output=True, text=True, timeout=timeout_s
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in ("msd", "tests", "testbed", "loadgen", "docs"):
        ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=ignored)
    for name in ("pyproject.toml", "config.toml"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    return tmp_path


@pytest.mark.timeout(240)
def test_adding_a_policy_goes_as_the_page_says(copy: Path) -> None:
    [source] = blocks("add-a-policy.md", "python")
    file = source.splitlines()[0].removeprefix("# ")
    (copy / file).write_text(source.partition("\n")[2])
    register, laws, world = blocks("add-a-policy.md", "sh")
    follow(register, copy)
    said = follow(laws, copy)
    assert "passed" in said
    assert follow('.venv/bin/python -c "from msd.policy import POLICIES; print(len(POLICIES))"', copy).strip() == str(
        len(REGISTERED) + 1
    )
    said = follow(world, copy)
    assert "first token soonest on" in said
    assert "all checks hold" in said


REGISTERED = re.findall(r'^    "\w+": \w+,$', (REPOSITORY / "msd/policy/__init__.py").read_text(), re.MULTILINE)


@pytest.mark.e2e
@pytest.mark.timeout(400)
def test_adding_a_mode_goes_as_the_page_says(tmp_path: Path) -> None:
    for name in ("msd", "testbed"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "testbed").symlink_to(REPOSITORY / "build" / "testbed")
    [config] = blocks("add-a-mode.md", "toml")
    (tmp_path / "mine.toml").write_text(config)
    modes, certify, check, serve, use = blocks("add-a-mode.md", "sh")
    assert "int8_w8a8" in follow(modes, tmp_path)
    said = follow(certify, tmp_path, timeout_s=200)
    assert "certified" in said
    checked = follow(check, tmp_path)
    assert "no errors" in checked
    assert "compressed" in checked or "tiny-large-int8" in checked
    environ = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "MSD_ENDPOINT": f"ipc://{tmp_path}/msd.sock",
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "RUNTIME_DIRECTORY": str(tmp_path / "run"),
    }
    words = serve.replace(".venv/bin/msd", f"{sys.executable} -m msd").split()
    with (tmp_path / "serve.log").open("wb") as log:
        daemon = subprocess.Popen(words, cwd=tmp_path, env=environ, stderr=log)
    try:
        end_s = time.monotonic() + 150
        while num_up(environ, tmp_path) < 2:
            assert daemon.poll() is None, (tmp_path / "serve.log").read_text()[-2000:]
            assert time.monotonic() < end_s, "the engines did not come up"
            time.sleep(0.5)
        done = subprocess.run(
            ["bash", "-eu", "-c", use.replace(".venv/bin/msd", f"{sys.executable} -m msd")],
            cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=90,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "kdwa" in done.stdout
        assert "int8" in done.stdout + done.stderr
        daemon.send_signal(signal.SIGINT)
        assert daemon.wait(30) == 0
    finally:
        if daemon.poll() is None:
            daemon.kill()
            daemon.wait()


def num_up(environ: dict[str, str], folder: Path) -> int:
    """How many engines are up, by `msd status`; 0 while nobody answers."""
    command = [sys.executable, "-m", "msd", "status", "--json"]
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=60)
    if done.returncode:
        return 0
    return sum(engine["state"] == "up" for engine in json.loads(done.stdout)["engines"])
