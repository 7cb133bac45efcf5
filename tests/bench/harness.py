"""One form for every benchmark: rows with a bar, medians of repeats, a table, and build/bench/<target>.json.

A row that misses its bar is a result and is printed as a miss; only what could not be measured makes a target fail.
Quick results are for trying out: they lie in a folder of their own and carry a mark, and no page is written from them.
"""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct, structs

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "build" / "bench"
QUICK_RESULTS = RESULTS / "quick"
DEFAULT_REPEATS = 5
LOOK_AROUND_S = 1.0
CLOCK_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class CannotMeasureError(Exception):
    """A target could not measure; nothing is written. Recoverable: the message says what is missing."""


class Peer(Struct, frozen=True, kw_only=True):
    """What a row is compared with: its version, and its value in the row's unit (before any ratio)."""

    name: str
    version: str
    value: float | None


class Row(Struct, frozen=True, kw_only=True):
    """One figure. `value` is the median of `repeats` unless the name says otherwise; `bar` None: for the record."""

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
    """Over the minute before the target began. Of a later target it holds what the earlier ones did, too."""
    busy_cores: float
    """Cores that others kept busy in the second before the target began, when the bench itself slept."""
    wall_s: float
    """How long the target took."""
    quick: bool
    """Short repeats: not figures to keep."""


class Result(Struct, frozen=True, kw_only=True):
    """One target's file."""

    meta: Meta
    rows: list[Row]


class Surroundings(Struct, frozen=True, kw_only=True):
    """What else runs on the machine."""

    load_averages: tuple[float, float, float]
    busy_cores: float


class Options(Struct, frozen=True, kw_only=True):
    """How thoroughly to measure; `quick` is for trying out, its figures are not to be kept."""

    repeats: int = DEFAULT_REPEATS
    quick: bool = False

    @property
    def folder(self) -> Path:
        """Where results go: quick ones do not overwrite others."""
        return QUICK_RESULTS if self.quick else RESULTS

    def command(self, target: str) -> str:
        """What to type to measure a target like this again."""
        words = [target]
        if self.repeats != DEFAULT_REPEATS:
            words.append(f"--repeats {self.repeats}")
        if self.quick:
            words.append("--quick")
        return f"make bench ARGS='{' '.join(words)}'"

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
    of_repeats: Callable[[Sequence[float]], float] = statistics.median,
) -> Row:
    """Make a row from its repeats; `of_repeats` other than the median belongs into the name.

    Raises CannotMeasureError when there is no repeat.
    """
    if not repeats:
        raise CannotMeasureError(f"{target}: {name}: no repeat gave a figure")
    value = of_repeats(repeats)
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
        peer=peer,
    )


def skipped(name: str, unit: str, reason: str, *, op: Literal["<=", ">="] = "<=", bar: float | None = None) -> Row:
    """A row that this machine cannot measure, and why."""
    return Row(name=name, value=None, unit=unit, op=op, bar=bar, skipped=reason)


def look_around() -> Surroundings:
    """Sleep a second and see what the machine does meanwhile: results depend on it."""
    load_averages = os.getloadavg()
    before = _busy_ticks()
    began = time.monotonic()
    time.sleep(LOOK_AROUND_S)
    busy_cores = (_busy_ticks() - before) / CLOCK_TICKS_PER_S / (time.monotonic() - began)
    return Surroundings(load_averages=load_averages, busy_cores=busy_cores)


def finish(
    target: str,
    rows: list[Row],
    options: Options,
    surroundings: Surroundings,
    wall_s: float,
    folder: Path | None = None,
) -> Result:
    """Write the target's file: into `folder`, else where the options say."""
    command = options.command(target)
    meta = Meta(
        target=target,
        commit=_commit(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        host=_host(),
        cores=os.cpu_count() or 0,
        python=platform.python_version(),
        load_average=significant(surroundings.load_averages[0]),
        busy_cores=significant(surroundings.busy_cores),
        wall_s=significant(wall_s),
        quick=options.quick,
    )
    result = Result(meta=meta, rows=[structs.replace(row, command=command) for row in rows])
    folder = folder or options.folder
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


def tree_cpu_s(pid: int) -> float:
    """The same of a process and of all that it has started and that still run."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    spent_s, pids = 0.0, [pid]
    while pids:
        known = pids.pop()
        try:
            spent_s += cpu_s(known)
        except OSError:
            continue
        pids += children.get(known, ())
    return spent_s


def all_cpu_s() -> float:
    """CPU time that all processes of the machine have used so far, to 10 ms."""
    return _busy_ticks() / CLOCK_TICKS_PER_S


def rss_bytes(pid: int) -> int:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _busy_ticks() -> int:
    """Ticks that all processors have spent on anything but waiting."""
    user, nice, system, _idle, _iowait, irq, softirq, *_ = map(int, _first_line("/proc/stat").split()[1:])
    return user + nice + system + irq + softirq


def _first_line(path: str) -> str:
    with Path(path).open() as file:
        return file.readline()


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
