"""Child processes of a command: each logs to a file, none outlives the command."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from msd.errors import MsdError

_PR_SET_PDEATHSIG: Final = 1
_TAIL_BYTES: Final = 16 * 1024
SECOND_SIGTERM_S: Final = 1.0
KILL_S: Final = 15.0
"""After the second SIGTERM a daemon aborts; one that is still there after this long is killed."""


class ChildFailedError(MsdError):
    """A child process ended on its own with an error; the message has its last lines. Not recoverable."""


class Child:
    """One child process in a process group of its own, so that Ctrl-C reaches it only through `stop`.

    `tied`: the kernel ends it with this process, even after a kill -9. Only for a process that runs no other thread.
    """

    def __init__(
        self, name: str, arguments: Sequence[str], log: Path, environ: Mapping[str, str], tied: bool = False
    ) -> None:
        self.name = name
        self.log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(environ),
                # Not a session of its own: under Linux's autogroup each session is a scheduling group, nice counts only
                # within one, and CPU engines, which spin on sched_yield, starved loadgen in its own for up to 1 s.
                process_group=0,
                preexec_fn=_end_with_parent() if tied else None,  # noqa: PLW1509 - no other thread, see above
            )

    def exit_code(self) -> int | None:
        """How it ended (negative: by that signal); None while it runs."""
        return self._process.poll()

    def check(self) -> None:
        """Raise ChildFailedError, with its last lines, when it has ended."""
        if (code := self.exit_code()) is not None:
            ending = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            lines = "\n".join(f"  {line}" for line in self.last_lines())
            raise ChildFailedError(f"the {self.name} {ending}; its last lines ({self.log}):\n{lines}")

    def last_lines(self, count: int = 8) -> list[str]:
        """The end of its log."""
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - _TAIL_BYTES))
            return log.read().decode(errors="replace").splitlines()[-count:]

    def stop(self, patience_s: float) -> None:
        """Ask it to end; after `patience_s` ask again, then kill its whole group. Idempotent."""
        for number, wait_s in ((signal.SIGTERM, patience_s), (signal.SIGTERM, KILL_S)):
            if self.exit_code() is not None:
                return
            self._process.send_signal(number)
            try:
                self._process.wait(wait_s)
            except subprocess.TimeoutExpired:
                continue
        self.kill()

    def kill(self) -> None:
        """End it and its children at once."""
        if self.exit_code() is None:
            # Not reaped yet, so the group's number cannot be anybody else's.
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


class Children:
    """The children of one command; leaving the block stops them all, the youngest first."""

    def __init__(self) -> None:
        self._children: list[Child] = []

    def start(
        self, name: str, arguments: Sequence[str], log: Path, environ: Mapping[str, str], tied: bool = False
    ) -> Child:
        """Run Python with `arguments`; see `Child`."""
        child = Child(name, arguments, log, environ, tied)
        self._children.append(child)
        return child

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in reversed(self._children):
            try:
                child.stop(SECOND_SIGTERM_S)
            except KeyboardInterrupt:
                child.kill()


def _end_with_parent() -> Callable[[], None]:
    libc = ctypes.CDLL(None)
    parent = os.getpid()

    def set_signal() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return set_signal
