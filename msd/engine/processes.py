"""An engine's processes: found as a tree below the daemon, named by pid and start time, ended for certain."""

from __future__ import annotations

import os
import signal
import time

from msgspec import Struct

from msd.engine.vllm_plugin import read_stat

MAX_PROCESSES = 4_096
POLL_S = 0.02


class ProcessId(Struct, frozen=True):
    """One process for ever: a pid is given out again, a pid with its start time is not."""

    pid: int
    start_time: int


def children_of(pid: int) -> frozenset[ProcessId]:
    """Direct children of `pid`, alive or not yet waited for."""
    return frozenset(process for process, parent in _table() if parent == pid)


def tree_of(roots: frozenset[ProcessId]) -> frozenset[ProcessId]:
    """`roots` that are still there, with all their descendants."""
    table = _table()
    alive = {process for process, _ in table}
    by_parent: dict[int, list[ProcessId]] = {}
    for process, parent in table:
        by_parent.setdefault(parent, []).append(process)
    found: set[ProcessId] = set()
    todo = [root for root in roots if root in alive]
    while todo:
        process = todo.pop()
        if process not in found:
            found.add(process)
            todo.extend(by_parent.get(process.pid, ()))
    return frozenset(found)


def is_running(process: ProcessId) -> bool:
    """Whether that very process still runs; a zombie does not."""
    try:
        _, start_time, state = read_stat(process.pid)
    except (OSError, ValueError):
        return False
    return start_time == process.start_time and state not in "ZX"


def end(processes: frozenset[ProcessId], grace_s: float, kill_s: float) -> frozenset[ProcessId]:
    """Wait `grace_s` for the processes to end by themselves, then kill what is left; what survives `kill_s` more."""
    left = _wait(processes, grace_s)
    for process in left:
        try:
            os.kill(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it ended just now
    return _wait(left, kill_s)


def _wait(processes: frozenset[ProcessId], limit_s: float) -> frozenset[ProcessId]:
    deadline = time.monotonic() + limit_s
    left = frozenset(filter(is_running, processes))
    while left and time.monotonic() < deadline:
        time.sleep(POLL_S)
        left = frozenset(filter(is_running, left))
    return left


def _table() -> list[tuple[ProcessId, int]]:
    """All processes that we may look at, each with its parent's pid."""
    table: list[tuple[ProcessId, int]] = []
    for name in os.listdir("/proc"):
        if name.isdigit() and len(table) < MAX_PROCESSES:
            try:
                parent, start_time, _ = read_stat(int(name))
            except (OSError, ValueError):
                continue  # it ended while we looked
            table.append((ProcessId(int(name), start_time), parent))
    return table
