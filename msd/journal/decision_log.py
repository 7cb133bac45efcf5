"""Keeps the decision log: every decision and what came of it, on disk, written by a thread.

The loop only appends immutable objects to a bounded deque, which costs it well under a microsecond; the thread encodes
and writes them in batches. What the disk does not take is dropped and counted: the daemon never waits for its log, and
never fails with it.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import structlog

from msd.decisions import FOLDER, Decided, Observed, Opened, encode, files, name_of, number_of
from msd.domain import Decision, Mode, Observation, Request

MAX_QUEUED = 16_384
"""Some 30 MB at worst; a disk that stands still for longer loses the newest."""
WRITE_EVERY_S = 0.2
RECORDS_PER_WRITE = 32
RECORD_BYTES = 16_384
"""A decision over eight modes takes 3 KB."""
"""Encoding holds the interpreter's lock, writing gives it up: so the loop never waits for more than a few encodings."""
FILES_KEPT = 8
"""The log is cut into so many files; the oldest goes as a whole."""
CLOSE_LIMIT_S = 2.0

_Queued = tuple[Request, Decision, None] | tuple[None, Decision, Observation]

_log = structlog.get_logger(__name__)


class DecisionLog:
    """One run's part of the log in `<state_dir>/decisions`. `decided` and `observed` are for the loop."""

    def __init__(self, state_dir: Path, max_bytes: int, *, server: str, policy: str, modes: Sequence[Mode]) -> None:
        self.folder = state_dir / FOLDER
        self.num_written = 0
        self._num_refused = 0
        """Not even queued. Only the loop counts here, only the thread below: neither loses the other's."""
        self._num_failed = 0
        self._max_bytes = max_bytes
        self._file_bytes = max_bytes // FILES_KEPT
        self._batch = max(1, min(RECORDS_PER_WRITE, self._file_bytes // RECORD_BYTES))
        self._opened = (server, policy, tuple(modes))
        self._queue: deque[_Queued] = deque()
        self._stopping = threading.Event()
        self._fd = -1
        self._size = 0
        self._is_failing = False
        # A daemon thread: a disk that hangs must not keep the process.
        self._thread = threading.Thread(target=self._run, name="decision-log", daemon=True)

    @property
    def num_dropped(self) -> int:
        """Records that are not in the log, because the disk was too slow or took nothing."""
        return self._num_refused + self._num_failed

    def start(self) -> None:
        """Begin to write. Never raises for the disk's sake: what it does not take is dropped, and said once."""
        self._thread.start()

    def decided(self, request: Request, decision: Decision) -> None:
        """A request goes to a mode."""
        if len(self._queue) < MAX_QUEUED:
            self._queue.append((request, decision, None))
        else:
            self._num_refused += 1

    def observed(self, decision: Decision, observation: Observation) -> None:
        """What came of it."""
        if len(self._queue) < MAX_QUEUED:
            self._queue.append((None, decision, observation))
        else:
            self._num_refused += 1

    def close(self) -> None:
        """Write what is left, within a bounded time. Blocks: for when the loop has nothing else to do."""
        self._stopping.set()
        self._thread.join(CLOSE_LIMIT_S)
        if self._thread.is_alive() or self.num_dropped:
            _log.warning(
                "decision_log_incomplete",
                num_dropped=self.num_dropped + len(self._queue),
                num_written=self.num_written,
                folder=str(self.folder),
            )

    # --- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping.wait(WRITE_EVERY_S):
            self._drain()
        self._drain()
        if self._fd >= 0:
            os.close(self._fd)

    def _drain(self) -> None:
        queue = self._queue
        while queue:
            lines = [_line(queue.popleft()) for _ in range(min(len(queue), self._batch))]
            try:
                self._write(lines)
            except OSError as error:
                self._failed(error, len(lines))
            else:
                self._recovered(len(lines))

    def _write(self, lines: list[bytes]) -> None:
        """Append whole lines or nothing. Raises OSError."""
        data = b"".join(lines)
        if self._fd < 0 or self._size + len(data) > self._file_bytes:
            self._next_file(len(data))
        try:
            written = os.write(self._fd, data)
            if written != len(data):
                raise OSError(f"only {written} of {len(data)} bytes were taken")
        except OSError:
            self._cut_back()
            raise
        self._size += written

    def _cut_back(self) -> None:
        """A line that is half there would spoil the next one."""
        try:
            os.ftruncate(self._fd, self._size)
            os.lseek(self._fd, self._size, os.SEEK_SET)
        except OSError:
            self._close_file()

    def _next_file(self, num_bytes: int) -> None:
        """Begin a file that is to take `num_bytes` at least."""
        self._close_file()
        server, policy, modes = self._opened
        head = encode(Opened(t_unix_us=time.time_ns() // 1_000, server=server, policy=policy, modes=modes))
        self.folder.mkdir(mode=0o750, parents=True, exist_ok=True)
        there = files(self.folder)
        _make_room(there, self._max_bytes - max(self._file_bytes, len(head) + num_bytes))
        number = number_of(there[-1]) + 1 if there else 1
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        while self._fd < 0:
            try:
                self._fd = os.open(self.folder / name_of(number), flags, 0o640)
            except FileExistsError:
                number += 1  # another daemon keeps its log here
        try:
            self._size = os.write(self._fd, head)
            if self._size != len(head):
                raise OSError("the head of a new file was not taken")
        except OSError:
            self._close_file()
            (self.folder / name_of(number)).unlink(missing_ok=True)
            raise

    def _close_file(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _failed(self, error: OSError, num_lines: int) -> None:
        self._num_failed += num_lines
        if not self._is_failing:
            self._is_failing = True
            _log.error("decision_log_not_written", folder=str(self.folder), error=str(error), consequence="dropped")

    def _recovered(self, num_lines: int) -> None:
        self.num_written += num_lines
        if self._is_failing:
            self._is_failing = False
            _log.warning("decision_log_written_again", folder=str(self.folder), num_dropped=self.num_dropped)


def _line(queued: _Queued) -> bytes:
    request, decision, observation = queued
    now_us = time.time_ns() // 1_000
    if request is None:
        assert observation is not None, "neither a decision nor an observation"
        return encode(Observed(t_unix_us=now_us, request_id=decision.request_id, observation=observation))
    return encode(
        Decided(
            # The loop reads no second clock for the log: decisions carry the monotonic one.
            t_unix_us=now_us - time.monotonic_ns() // 1_000 + decision.t_us,
            tenant=request.tenant,
            client_request_id=request.client_request_id,
            since_receipt_us=decision.t_us - request.received_us,
            slo=request.slo,
            decision=decision,
        )
    )


def _make_room(there: list[Path], max_bytes: int) -> None:
    """Remove the oldest files until the rest takes no more than `max_bytes`."""
    sizes = [_size(file) for file in there]
    total = sum(sizes)
    for file, size in zip(there, sizes, strict=True):
        if total <= max_bytes:
            return
        file.unlink(missing_ok=True)
        total -= size


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0
