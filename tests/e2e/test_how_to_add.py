"""docs/how-to/add-a-policy.md and add-a-mode.md, followed word for word in a copy of the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
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
