"""The CPU package's energy counter (RAPL, Intel and AMD): with CPU engines the only real counter there is.

Read through the powercap tree. Mode 0400 root since CVE-2020-8694, so it is often there and unreadable: say which.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from msgspec import Struct

from msd.domain import CounterReading, GpuView
from msd.errors import ProbeError
from msd.ports import Clock

POWERCAP = Path("/sys/class/powercap")
SAMPLE_PERIOD_US = 1_000_000
RaplState = Literal["absent", "unreadable", "working"]


class _Zone(Struct):
    domain: str
    counter: Path
    range_uj: int
    last_uj: int = 0
    total_uj: int = 0


def rapl_state(powercap: Path = POWERCAP) -> RaplState:
    """Whether this host has a RAPL counter and this user may read it; for `msd check`."""
    zones = _zones(powercap)
    if not zones:
        return "absent"
    try:
        for zone in zones:
            _read_int(zone.counter)
    except OSError:
        return "unreadable"
    return "working"


def _zones(powercap: Path) -> list[_Zone]:
    """Packages, and DRAM where it is separate. Not `core` (inside the package), not `psys` (overlaps it)."""
    zones = []
    for path in sorted(powercap.glob("intel-rapl:*")):
        try:
            name = (path / "name").read_text().strip()
            range_uj = _read_int(path / "max_energy_range_uj")
        except OSError:
            continue  # an entry without a counter, such as the control type itself
        if name.startswith("package-"):
            zones.append(_Zone(f"cpu:{name}", path / "energy_uj", range_uj))
        elif name == "dram":
            package = path.name.split(":")[1]
            zones.append(_Zone(f"cpu:dram-{package}", path / "energy_uj", range_uj))
    return zones


def _read_int(path: Path) -> int:
    return int(path.read_text())


class RaplProbe:
    """One domain per package. Reading takes microseconds, so there is no thread; at most once a second."""

    def __init__(self, clock: Clock, powercap: Path = POWERCAP) -> None:
        self._clock = clock
        self._powercap = powercap
        self._zones: list[_Zone] = []
        self._last_us: int | None = None

    def start(self) -> None:
        """Find the counters. Raises ProbeError that tells absent from unreadable."""
        match rapl_state(self._powercap):
            case "absent":
                raise ProbeError("this host has no RAPL energy counter", remedy="set telemetry.rapl = false")
            case "unreadable":
                remedy = "give the msd group read access to /sys/class/powercap/intel-rapl:*/energy_uj"
                raise ProbeError("the RAPL energy counter is not readable for this user", remedy=remedy)
            case "working":
                self._zones = _zones(self._powercap)
        for zone in self._zones:
            zone.last_uj = _read_int(zone.counter)

    def latest(self) -> GpuView | None:
        """A CPU is not a GPU."""
        return None

    def readings(self) -> list[CounterReading]:
        """One reading per domain if the last is a second old; a counter that cannot be read any more is left out."""
        now_us = self._clock.now_us()
        if self._last_us is not None and now_us - self._last_us < SAMPLE_PERIOD_US:
            return []
        self._last_us = now_us
        readings = []
        for zone in self._zones:
            try:
                uj = _read_int(zone.counter)
            except OSError:
                continue
            # Wraps at the range: about 22 minutes at 200 W on many parts.
            zone.total_uj += uj - zone.last_uj if uj >= zone.last_uj else uj + zone.range_uj - zone.last_uj
            zone.last_uj = uj
            readings.append(CounterReading(domain=zone.domain, t_us=now_us, energy_mj=zone.total_uj // 1000))
        return readings

    def stop(self) -> None:
        """Read no more."""
        self._zones = []
