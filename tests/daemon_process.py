"""A real daemon in a process of its own, with a service manager's notification socket, for tests on real sockets."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

HEAD = """
[daemon]
drain_s = {drain_s}
run_dir = "{folder}/run"
state_dir = "{folder}/state"
[ingress.zmq]
endpoints = ["ipc://{folder}/msd.sock"]
"""

TOY = """
[[model]]
name = "toy"
"""

NOOP = f"""{TOY}[[engine]]
name = "noop"
model = "toy"
kind = "noop"
[policy]
name = "round_robin"
"""

SIM = f"""{TOY}[[engine]]
name = "fast"
model = "toy"
kind = "sim"
max_num_seqs = 4
sim = {{ step_ms = 2.0, prefill_ms_per_token = 0.01, decode_ms_per_request = 0.1, start_s = 0.05 }}
[[engine]]
name = "slow"
model = "toy"
kind = "sim"
max_num_seqs = 4
sim = {{ step_ms = 20.0, prefill_ms_per_token = 0.05, decode_ms_per_request = 0.5, start_s = 0.05 }}
[policy]
name = "round_robin"
"""


class DaemonProcess:
    """`with DaemonProcess(folder, SIM) as daemon:` - ready when entered, gone when left."""

    def __init__(self, folder: Path, body: str, *, drain_s: float = 5.0, ready_s: float = 20.0) -> None:
        self.endpoint = f"ipc://{folder}/msd.sock"
        self.config = folder / "config.toml"
        self.config.write_text(HEAD.format(folder=folder, drain_s=drain_s) + body)
        self.log = folder / "daemon.log"
        self.told: list[str] = []
        self._folder = folder
        self._ready_s = ready_s
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(folder / "notify.sock"))

    def __enter__(self) -> Self:
        environ = {**os.environ, "NOTIFY_SOCKET": str(self._folder / "notify.sock")}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "msd", "serve", "--config", str(self.config)], stderr=log, env=environ
            )
        try:
            self.wait_told("READY=1", self._ready_s)
        except AssertionError:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._notify.close()

    def wait_told(self, line: str, limit_s: float) -> None:
        """Wait until the service manager was told a message with this text. Raises AssertionError with the log."""
        end_s = time.monotonic() + limit_s
        while not any(line in told for told in self.told):
            assert self.process.poll() is None or time.monotonic() < end_s, self._story(line)
            self._notify.settimeout(max(0.01, min(0.2, end_s - time.monotonic())))
            try:
                self.told.append(self._notify.recv(4096).decode())
            except TimeoutError:
                assert time.monotonic() < end_s, self._story(line)
                assert self.process.poll() is None, self._story(line)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the daemon itself."""
        self.process.send_signal(number)

    def wait(self, limit_s: float) -> int:
        """The exit code. Raises TimeoutExpired."""
        return self.process.wait(limit_s)

    def cpu_s(self) -> float:
        """User and system time of the process so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _story(self, line: str) -> str:
        return f"{line!r} was not told; told: {self.told}; log:\n{self.log.read_text()[-4000:]}"
