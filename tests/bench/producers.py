"""Producers in a process of their own: a raw DEALER with pre-encoded frames, and msd.client doing the same work.

`python -m tests.bench.producers raw|client ENDPOINT WORK` prints one line of JSON. Both keep `window` requests open, so
they send as fast as the daemon answers.
"""

from __future__ import annotations

import asyncio
import secrets
import subprocess
import sys
import time
from collections import deque

import msgspec
import zmq
from msgspec import Struct

from msd import wire
from msd.client import AsyncClient
from tests.bench.harness import ROOT, CannotMeasureError

LINGER_MS = 2_000
"""The last acknowledgements must arrive: results that nobody acknowledged fill the daemon's bound."""
CREDIT = 65_536
CREDIT_STEP = 8_192
PATIENCE_MS = 20_000
PROMPT = "sort kdwaebf="


class Work(Struct, frozen=True, kw_only=True):
    """What to do: `num_requests`, `window` of them at once, each of `max_tokens`."""

    num_requests: int
    window: int
    max_tokens: int = 1
    stream: bool = False
    ack_batch: int = 256
    """The raw producer acknowledges so many results at a time."""


class Figures(Struct, frozen=True, kw_only=True):
    """What came of it. `cpu_s` is the producer's own; `num_deltas` messages carried the tokens."""

    wall_s: float
    cpu_s: float
    num_done: int
    num_tokens: int
    num_deltas: int


class _Head(Struct):
    """What the raw producer reads of a message."""

    t: str
    request_id: str = ""
    message: str = ""


def run(kind: str, endpoint: str, work: Work, timeout_s: float = 300.0) -> Figures:
    """Run a producer in a new process. Raises CannotMeasureError."""
    command = [sys.executable, "-m", "tests.bench.producers", kind, endpoint, msgspec.json.encode(work).decode()]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        raise CannotMeasureError(f"the {kind} producer did not end within {timeout_s:g} s") from error
    if done.returncode != 0:
        raise CannotMeasureError(f"the {kind} producer failed: {done.stderr.strip()[-500:]}")
    return msgspec.json.decode(done.stdout, type=Figures)


def raw(endpoint: str, work: Work) -> Figures:
    """Push pre-encoded frames through a plain DEALER and count what comes back."""
    prefix = secrets.token_hex(4)
    payloads = [
        wire.encode(
            wire.Submit(
                client_request_id=f"{prefix}.{number}", max_tokens=work.max_tokens, prompt=PROMPT, stream=work.stream
            )
        )
        for number in range(work.num_requests)
    ]
    decode = msgspec.msgpack.Decoder(_Head).decode
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, LINGER_MS)
        socket.connect(endpoint)
        socket.send_multipart([wire.VERSION, wire.encode(wire.Hello(client="bench", delta_credit=CREDIT))])
        if not socket.poll(PATIENCE_MS):
            raise CannotMeasureError(f"no answer from {endpoint}")
        socket.recv_multipart()
        num_sent = num_done = num_deltas = num_taken = 0
        to_ack: list[str] = []
        began, cpu_began = time.monotonic(), time.process_time()
        while num_done < work.num_requests:
            while num_sent < work.num_requests and num_sent - num_done < work.window:
                socket.send(wire.VERSION, zmq.SNDMORE)
                socket.send(payloads[num_sent])
                num_sent += 1
            if not socket.poll(PATIENCE_MS):
                raise CannotMeasureError(f"silence after {num_done} of {work.num_requests} requests")
            while int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                head = decode(socket.recv_multipart()[1])
                if head.t == "done":
                    num_done += 1
                    to_ack.append(head.request_id)
                elif head.t == "delta":
                    num_deltas += 1
                    num_taken += 1
                elif head.t == "error":
                    raise CannotMeasureError(f"the daemon refused: {head.message}")
            while len(to_ack) >= work.ack_batch or (to_ack and num_done == work.num_requests):
                acked = wire.Acked(request_ids=tuple(to_ack[: work.ack_batch]))
                socket.send_multipart([wire.VERSION, wire.encode(acked)])
                del to_ack[: work.ack_batch]
            if num_taken >= CREDIT_STEP:
                socket.send_multipart([wire.VERSION, wire.encode(wire.Credit(add=num_taken))])
                num_taken = 0
        return Figures(
            wall_s=time.monotonic() - began,
            cpu_s=time.process_time() - cpu_began,
            num_done=num_done,
            num_tokens=num_done * work.max_tokens,
            num_deltas=num_deltas,
        )


async def client(endpoint: str, work: Work) -> Figures:
    """Do the same through msd.client."""
    num_deltas = 0
    async with AsyncClient(endpoint) as daemon:
        began, cpu_began = time.monotonic(), time.process_time()
        numbers = deque(range(work.num_requests))

        async def one_after_another() -> None:
            nonlocal num_deltas
            while numbers:
                numbers.popleft()
                handle = daemon.submit(PROMPT, max_tokens=work.max_tokens, stream=work.stream)
                if work.stream:
                    async for _ in handle:
                        num_deltas += 1
                await handle.result()

        async with asyncio.TaskGroup() as tasks:
            for _ in range(work.window):
                tasks.create_task(one_after_another())
        return Figures(
            wall_s=time.monotonic() - began,
            cpu_s=time.process_time() - cpu_began,
            num_done=work.num_requests,
            num_tokens=work.num_requests * work.max_tokens,
            num_deltas=num_deltas,
        )


def main() -> None:
    """Run one producer and print its figures."""
    kind, endpoint, encoded = sys.argv[1:]
    work = msgspec.json.decode(encoded, type=Work)
    figures = raw(endpoint, work) if kind == "raw" else asyncio.run(client(endpoint, work))
    print(msgspec.json.encode(figures).decode())


if __name__ == "__main__":
    main()
