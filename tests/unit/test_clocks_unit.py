"""The clock lock: what its script lets through to nvidia-smi, which is recorded here and not run."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "systemd" / "msd-clocks"
UNIT = ROOT / "systemd" / "msd-clocks@.service"
RECORDER = """#!/bin/sh
printf '%s\\n' "$*" >> "$RECORD"
case "$*" in *--query-supported-clocks*) printf '1980\\n1965\\n1410\\n900\\n345\\n' ;; esac
"""
CONFIG_EXIT = 78


def run(folder: Path, *arguments: str, **environ: str) -> tuple[int, str, list[str]]:
    """The script's exit code and complaint, and what it asked of nvidia-smi beside the supported clocks."""
    (folder / "nvidia-smi").write_text(RECORDER)
    (folder / "nvidia-smi").chmod(0o755)
    record = folder / "record"
    env = {"PATH": f"{folder}:{os.environ['PATH']}", "RECORD": str(record), **environ}
    done = subprocess.run([str(SCRIPT), *arguments], env=env, capture_output=True, text=True, timeout=20)
    asked = record.read_text().splitlines() if record.exists() else []
    return done.returncode, done.stderr, [line for line in asked if "--query" not in line]


def test_a_lock_begins_with_a_reset(tmp_path: Path) -> None:
    code, _, asked = run(tmp_path, "lock", "900-1410")
    assert code == 0
    assert asked == ["--id=0 --reset-gpu-clocks", "--id=0 --lock-gpu-clocks=900,1410"]


def test_reset_resets_the_gpu_that_is_named(tmp_path: Path) -> None:
    code, _, asked = run(tmp_path, "reset", MSD_CLOCKS_GPU="GPU-5f-0")
    assert (code, asked) == (0, ["--id=GPU-5f-0 --reset-gpu-clocks"])


@pytest.mark.parametrize(
    ("limits", "range_mhz", "complaint"),
    [
        ({}, "300-900", "below 345 MHz"),
        ({}, "900-2000", "above 1980 MHz"),
        ({"MSD_CLOCKS_CEILING_MHZ": "1200"}, "900-1410", "above 1200 MHz"),
        ({"MSD_CLOCKS_FLOOR_MHZ": "1000"}, "900-1100", "below 1000 MHz"),
        ({"MSD_CLOCKS_FLOOR_MHZ": "low"}, "900-1100", "whole numbers"),
        ({}, "1410-900", "begins above its end"),
        ({}, "900", "is no range"),
        ({}, "900-", "is no range"),
        ({}, "900-1,1410", "is no range"),
        ({}, "900-1410;reboot", "is no range"),
        ({}, "90000-99999", "is no range"),
        ({"MSD_CLOCKS_GPU": "0 --gpu-reset"}, "900-1410", "neither an index nor a UUID"),
        ({"MSD_CLOCKS_GPU": "--gpu-reset"}, "900-1410", "neither an index nor a UUID"),
    ],
)
def test_what_is_outside_the_limits_touches_nothing(
    tmp_path: Path, limits: dict[str, str], range_mhz: str, complaint: str
) -> None:
    code, told, asked = run(tmp_path, "lock", range_mhz, **limits)
    assert (code, asked) == (CONFIG_EXIT, [])
    assert complaint in told


@pytest.mark.parametrize("arguments", [(), ("lock",), ("reset", "now"), ("lock", "1-2", "3"), ("unlock",)])
def test_wrong_usage_touches_nothing(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    code, told, asked = run(tmp_path, *arguments)
    assert (code, asked) == (CONFIG_EXIT, [])
    assert "usage" in told


def test_the_unit_locks_on_start_and_resets_on_stop() -> None:
    lines = UNIT.read_text().splitlines()
    for line in (
        "Type=oneshot",
        "RemainAfterExit=yes",
        "ExecStart=/usr/libexec/msd-clocks lock %i",
        "ExecStop=/usr/libexec/msd-clocks reset",
    ):
        assert line in lines
    assert "systemd/msd-clocks" in (ROOT / "Makefile").read_text()
