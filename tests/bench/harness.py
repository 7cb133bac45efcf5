"""One form for every benchmark: rows with a bar, medians of repeats, a table, and build/bench/<target>.json.

A row that misses its bar is a result and is printed as a miss; only what could not be measured makes a target fail.
"""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "build" / "bench"
CLOCK_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class CannotMeasureError(Exception):
    """A target could not measure; nothing is written. Recoverable: the message says what is missing."""


class Peer(Struct, frozen=True, kw_only=True):
    """What a row is compared with: its version, and its value in the row's unit (before any ratio)."""

    name: str
    version: str
    value: float | None


class Row(Struct, frozen=True, kw_only=True):
    """One figure. `value` is the median of `repeats`; `bar` None: printed for the record."""

    name: str
    value: float | None
    unit: str
    op: Literal["<=", ">="] = "<="
    bar: float | None = None
    holds: bool | None = None
    repeats: list[float] = []
    iqr: float | None = None
    command: str = ""
    peer: Peer | None = None
    skipped: str | None = None


class Meta(Struct, frozen=True, kw_only=True):
    """What it ran on."""

    target: str
    commit: str
    date: str
    host: str
    cores: int
    python: str
    load_average: float
    """Over the minute before: other work on the machine shows here."""


class Result(Struct, frozen=True, kw_only=True):
    """One target's file."""

    meta: Meta
    rows: list[Row]


class Options(Struct, frozen=True, kw_only=True):
    """How thoroughly to measure; `quick` is for trying out, its figures are not to be kept."""

    repeats: int = 5
    quick: bool = False

    def scaled(self, full: float, quick: float) -> float:
        """Pick a size."""
        return quick if self.quick else full


Target = Callable[[Options], list[Row]]


def row(
    name: str,
    unit: str,
    repeats: Sequence[float],
    *,
    target: str,
    op: Literal["<=", ">="] = "<=",
    bar: float | None = None,
    peer: Peer | None = None,
) -> Row:
    """Make a row from its repeats. Raises CannotMeasureError when there is none."""
    if not repeats:
        raise CannotMeasureError(f"{target}: {name}: no repeat gave a figure")
    value = statistics.median(repeats)
    holds = None if bar is None else (value <= bar if op == "<=" else value >= bar)
    quartiles = statistics.quantiles(repeats, n=4, method="inclusive") if len(repeats) > 1 else [value] * 3
    return Row(
        name=name,
        value=significant(value),
        unit=unit,
        op=op,
        bar=bar,
        holds=holds,
        repeats=[significant(repeat) for repeat in repeats],
        iqr=significant(quartiles[2] - quartiles[0]),
        command=f"python -m tests.bench {target}",
        peer=peer,
    )


def skipped(
    name: str, unit: str, reason: str, *, target: str, op: Literal["<=", ">="] = "<=", bar: float | None = None
) -> Row:
    """A row that this machine cannot measure, and why."""
    command = f"python -m tests.bench {target}"
    return Row(name=name, value=None, unit=unit, op=op, bar=bar, command=command, skipped=reason)


def finish(target: str, rows: list[Row], folder: Path = RESULTS) -> Result:
    """Write the target's file."""
    result = Result(meta=_meta(target), rows=rows)
    folder.mkdir(parents=True, exist_ok=True)
    encoded = msgspec.json.format(msgspec.json.encode(result), indent=2)
    (folder / f"{target}.json").write_bytes(encoded + b"\n")
    return result


def load(path: Path) -> Result:
    """Read a target's file. Raises CannotMeasureError when it is none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Result)
    except (OSError, msgspec.DecodeError) as error:
        raise CannotMeasureError(f"{path}: not a result: {error}") from error


def say(text: str) -> None:
    """Tell a person what is being measured."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def significant(value: float) -> float:
    """Round to four significant digits: more would be noise."""
    return float(f"{value:.4g}")


def cpu_s(pid: int) -> float:
    """User and system time of a process (all its threads) so far, to 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS_PER_S


def rss_bytes(pid: int) -> int:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _meta(target: str) -> Meta:
    return Meta(
        target=target,
        commit=_commit(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        host=_host(),
        cores=os.cpu_count() or 0,
        python=platform.python_version(),
        load_average=os.getloadavg()[0],
    )


def _commit() -> str:
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=10"], cwd=ROOT, capture_output=True, text=True
    )
    return described.stdout.strip() if described.returncode == 0 else "unknown"


def _host() -> str:
    """The processor: a machine's name says nothing to others."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
