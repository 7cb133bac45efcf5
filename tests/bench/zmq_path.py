"""The ZeroMQ path: submit -> ack -> done and streamed tokens through a live daemon whose engine answers at once.

What is left is the daemon's own cost: socket, decoding, core, journal in memory, egress. The producers run in processes
of their own; the daemon's CPU is that of all its threads, from /proc.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import zmq

from tests.bench import producers
from tests.bench.harness import Options, Peer, Row, cpu_s, row, say
from tests.bench.producers import Figures, Work
from tests.daemon_process import TOY, DaemonProcess

TARGET = "zmq_path"
WINDOW = 256
NUM_STREAMS = 32
STREAM_TOKENS = 256
STEP_MS = 10
BAR_RPS, BAR_REQUEST_US, BAR_TOKEN_US = 10_000.0, 100.0, 15.0

NOOP = """
[[engine]]
name = "noop"
model = "toy"
kind = "noop"
max_num_seqs = 256
args = {{ num_chunks = {num_chunks} }}
[policy]
name = "round_robin"
[telemetry]
probe = "none"
"""


# A no-op engine floods, so that its Deltas carry many tokens each; this one gives every stream a token per step, as a
# real engine does, and its own simulation is in the daemon's CPU.
PACED = f"""
[[engine]]
name = "paced"
model = "toy"
kind = "sim"
max_num_seqs = 32
sim = {{ step_ms = {STEP_MS}, prefill_ms_per_token = 0, decode_ms_per_request = 0, start_s = 0 }}
[policy]
name = "round_robin"
[telemetry]
probe = "none"
"""


@contextmanager
def daemon_of(body: str) -> Iterator[DaemonProcess]:
    """A daemon with these engines, in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="msd-bench-") as folder, DaemonProcess(Path(folder), TOY + body) as daemon:
        yield daemon


def noop_daemon(num_chunks: int = 1) -> AbstractContextManager[DaemonProcess]:
    """A daemon with one no-op engine that gives each answer in `num_chunks` pieces."""
    return daemon_of(NOOP.format(num_chunks=num_chunks))


def measured(daemon: DaemonProcess, kind: str, work: Work) -> tuple[Figures, float]:
    """Return a producer's figures, and the CPU that the daemon spent meanwhile in seconds."""
    before = cpu_s(daemon.process.pid)
    figures = producers.run(kind, daemon.endpoint, work)
    return figures, cpu_s(daemon.process.pid) - before


def measure(options: Options) -> list[Row]:
    """Rows of the path."""
    many = Work(num_requests=int(options.scaled(60_000, 8_000)), window=WINDOW)
    fewer = Work(num_requests=int(options.scaled(15_000, 3_000)), window=WINDOW)
    streams = Work(num_requests=int(options.scaled(600, 96)), window=NUM_STREAMS, max_tokens=STREAM_TOKENS, stream=True)
    few_streams = Work(num_requests=int(options.scaled(192, 64)), window=NUM_STREAMS, max_tokens=128, stream=True)
    warm_up = Work(num_requests=500, window=WINDOW)
    raw, client, streamed, paced = _Series(), _Series(), _Series(), _Series()
    with noop_daemon() as whole, noop_daemon(num_chunks=STREAM_TOKENS) as flooding, daemon_of(PACED) as pacing:
        for daemon in (whole, flooding, pacing):
            measured(daemon, "raw", warm_up)
        for repeat in range(options.repeats):
            say(f"{TARGET}: repeat {repeat + 1} of {options.repeats}")
            raw.add(*measured(whole, "raw", many))
            client.add(*measured(whole, "client", fewer))
            streamed.add(*measured(flooding, "raw", streams))
            paced.add(*measured(pacing, "raw", few_streams))
    libzmq = Peer(name="pyzmq", version=f"{zmq.__version__} (libzmq {zmq.zmq_version()})", value=None)
    return [
        row("submit, ack, done: one raw producer", "req/s", raw.rps, target=TARGET, op=">=", bar=BAR_RPS, peer=libzmq),
        row("the same: CPU of the daemon per request", "us", raw.daemon_us, target=TARGET, bar=BAR_REQUEST_US),
        row("the same: CPU of the producer per request", "us", raw.producer_us, target=TARGET),
        row("submit, ack, done: msd.client (asyncio)", "req/s", client.rps, target=TARGET, op=">="),
        row("the same: CPU of the daemon per request", "us", client.daemon_us, target=TARGET),
        row("the same: CPU of the client per request", "us", client.producer_us, target=TARGET),
        row(
            f"{NUM_STREAMS} streams, no-op engine: CPU of the daemon per token",
            "us",
            streamed.token_us,
            target=TARGET,
            bar=BAR_TOKEN_US,
        ),
        row("the same: tokens", "tokens/s", streamed.tokens_per_s, target=TARGET, op=">="),
        row("the same: tokens per Delta", "tokens", streamed.tokens_per_delta, target=TARGET, op=">="),
        row(
            f"{NUM_STREAMS} streams, simulated engine of {STEP_MS} ms a step: CPU of the daemon per token",
            "us",
            paced.token_us,
            target=TARGET,
            bar=BAR_TOKEN_US,
        ),
        row("the same: tokens", "tokens/s", paced.tokens_per_s, target=TARGET, op=">="),
        row("the same: tokens per Delta", "tokens", paced.tokens_per_delta, target=TARGET, op=">="),
    ]


class _Series:
    """The figures of one kind of work, a value per repeat."""

    def __init__(self) -> None:
        self.rps: list[float] = []
        self.daemon_us: list[float] = []
        self.producer_us: list[float] = []
        self.token_us: list[float] = []
        self.tokens_per_s: list[float] = []
        self.tokens_per_delta: list[float] = []

    def add(self, figures: Figures, daemon_s: float) -> None:
        """Take one repeat."""
        self.rps.append(figures.num_done / figures.wall_s)
        self.daemon_us.append(daemon_s / figures.num_done * 1e6)
        self.producer_us.append(figures.cpu_s / figures.num_done * 1e6)
        self.token_us.append(daemon_s / figures.num_tokens * 1e6)
        self.tokens_per_s.append(figures.num_tokens / figures.wall_s)
        if figures.num_deltas:
            self.tokens_per_delta.append(figures.num_tokens / figures.num_deltas)
