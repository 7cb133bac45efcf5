"""The daemon in a process that can watch its own event loop, and lets a bench call its AsyncLLM directly.

`python -m tests.bench.host CONFIG CONTROL WATCHED [--lag]`: CONTROL is the path of a unix socket for the direct calls,
WATCHED the file that gets what was watched (`Watched`) when SIGTERM ends the daemon. Without `--lag` nothing wakes the
loop beside the daemon itself, so that its CPU is its own.

The direct calls are the least that can be between an AsyncLLM and a consumer in another process: the consumer sends
frames of msgpack over the unix socket (`Order`), the answers' tokens come back the same way (`Piece`). Prompts reach
the AsyncLLM in the form in which msd hands them over. Tokens and text of all streams wait together as long as msd lets
them wait, then leave in one frame; a stream's first and last tokens leave at once. There is no queue, no journal, no
scheduler and no ledger.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Sequence
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import uvloop
from msgspec import Struct

from msd import config as settings
from msd import logs
from msd.client import Client
from msd.daemon import Daemon
from msd.domain import EngineInfo
from msd.egress import COALESCE_S, COALESCE_S_PER_STREAM
from msd.engine.vllm import VllmEngine
from msd.wire import DaemonStatus
from tests.bench import lag
from tests.bench.harness import ROOT, CannotMeasureError

START_S = 240.0
STOP_S = 60.0
LAG_OPTION = "--lag"
RECEIVE_BYTES = 65_536
TOKEN_LOW, TOKEN_HIGH = 16, 96
"""Token ids of the testbed's characters."""


HEAD = struct.Struct("<I")
"""Before each frame: its length in bytes."""


class Order(Struct, frozen=True, kw_only=True, array_like=True):
    """Run the AsyncLLM on this prompt, without msd.

    `time_only`: tell the TTFT as it is inside the process, and no tokens.
    """

    number: int
    prompt_token_ids: list[int]
    max_tokens: int
    time_only: bool = False


class Piece(Struct, frozen=True, kw_only=True, array_like=True):
    """What stream `number` generated since its last piece; `end` closes it."""

    number: int
    token_ids: list[int] = []
    text: str = ""
    end: bool = False
    ttft_ms: float = 0.0


class Watched(Struct, frozen=True, kw_only=True):
    """What the daemon's process saw of itself, in monotonic us: (slot, lag) of its loop, (begin, up) of each start."""

    lags: list[tuple[int, int]]
    starts: list[tuple[int, int]]


def prompt_ids(rng: Random, count: int) -> list[int]:
    """A made-up prompt: unlike every other, so that no cache helps either side."""
    return [rng.randrange(TOKEN_LOW, TOKEN_HIGH) for _ in range(count)]


# --- in the daemon's process -----------------------------------------------------------------------------------------


class DirectCalls:
    """Serves Orders on the control socket with the AsyncLLM of the daemon's first vLLM engine."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        llm = _async_llm(self._daemon)
        outbox = _Outbox(writer)
        decode = msgspec.msgpack.Decoder(Order).decode
        try:
            async with asyncio.TaskGroup() as tasks:
                with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                    while True:
                        (size,) = HEAD.unpack(await reader.readexactly(HEAD.size))
                        order = decode(await reader.readexactly(size))
                        tasks.create_task((_time if order.time_only else _stream)(llm, order, outbox))
        finally:
            writer.close()


class _Outbox:
    """Lets the tokens of all streams of a connection wait for company, for as long as msd's egress does."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._loop = asyncio.get_running_loop()
        self._encode = msgspec.msgpack.Encoder().encode
        self._pending: dict[int, tuple[list[int], list[str]]] = {}
        self._is_scheduled = False
        self.num_streams = 0

    def add(self, number: int, token_ids: Sequence[int], text: str) -> None:
        """Tokens of a stream that are neither its first nor its last."""
        pending = self._pending.get(number)
        if pending is None:
            self._pending[number] = (list(token_ids), [text])
        else:
            pending[0].extend(token_ids)
            pending[1].append(text)
        if not self._is_scheduled:
            self._is_scheduled = True
            delay_s = min(COALESCE_S, (self.num_streams - 1) * COALESCE_S_PER_STREAM)
            self._loop.call_later(delay_s, self._flush)

    def send(self, piece: Piece) -> None:
        """Send at once, behind what the stream has waiting."""
        pieces = [piece]
        if (pending := self._pending.pop(piece.number, None)) is not None:
            pieces.insert(0, Piece(number=piece.number, token_ids=pending[0], text="".join(pending[1])))
        self._write(pieces)

    def _flush(self) -> None:
        self._is_scheduled = False
        pending, self._pending = self._pending, {}
        if pending:
            self._write([Piece(number=n, token_ids=ids, text="".join(texts)) for n, (ids, texts) in pending.items()])

    def _write(self, pieces: list[Piece]) -> None:
        # Never drained: the consumer reads all the time, and has MAX_NUM_SEQS streams open at most.
        payload = self._encode(pieces)
        self._writer.write(HEAD.pack(len(payload)) + payload)


async def _stream(llm: Any, order: Order, outbox: _Outbox) -> None:
    outbox.num_streams += 1
    is_first = True
    async for output in _generate(llm, order):
        completion = output.outputs[0]
        if is_first or completion.finish_reason is not None:
            end = completion.finish_reason is not None
            outbox.send(Piece(number=order.number, token_ids=list(completion.token_ids), text=completion.text, end=end))
            is_first = False
        else:
            outbox.add(order.number, completion.token_ids, completion.text)
    outbox.num_streams -= 1


async def _time(llm: Any, order: Order, outbox: _Outbox) -> None:
    began = time.perf_counter()
    first_s = 0.0
    async for _ in _generate(llm, order):
        first_s = first_s or time.perf_counter() - began
    outbox.send(Piece(number=order.number, ttft_ms=first_s * 1e3, end=True))


def _generate(llm: Any, order: Order) -> AsyncGenerator[Any]:
    """Call as msd/engine/vllm.py does: an input that is rendered already, and the same parameters."""
    prompt = {"type": "token", "prompt_token_ids": order.prompt_token_ids}
    params = _sampling_params(order.max_tokens)
    outputs: AsyncGenerator[Any] = llm.generate(prompt, params, f"direct-{order.number}")
    return outputs


@lru_cache
def _sampling_params(max_tokens: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0.0, output_kind=RequestOutputKind.DELTA)


def _async_llm(daemon: Daemon) -> Any:
    """Return the live AsyncLLM of the first engine: a bench may look where nobody else should."""
    for slot in daemon._pool._slots.values():
        if isinstance(slot.engine, VllmEngine) and slot.engine._llm is not None:
            return slot.engine._llm
    raise CannotMeasureError("no vLLM engine is up")


def _watch_starts() -> list[tuple[int, int]]:
    """Note from now on when each vLLM engine begins to start, and when it is up."""
    starts: list[tuple[int, int]] = []
    start = VllmEngine.start

    async def watched(engine: VllmEngine) -> EngineInfo:
        begin_us = time.monotonic_ns() // 1_000
        info = await start(engine)
        starts.append((begin_us, time.monotonic_ns() // 1_000))
        return info

    VllmEngine.start = watched  # type: ignore[assignment, method-assign]
    return starts


async def _host(config_file: Path, control: Path, *, samples_lag: bool) -> Watched:
    """Run the daemon to its end; return what its process saw."""
    config = settings.load(config_file)
    logs.configure(config.daemon)
    starts = _watch_starts()
    daemon = Daemon(config, config_file.parent)
    sampler = lag.LagSampler()
    server = await asyncio.start_unix_server(DirectCalls(daemon).serve, control)
    async with server, asyncio.TaskGroup() as tasks:
        sampling = tasks.create_task(sampler.run()) if samples_lag else None
        await daemon.run()
        if sampling is not None:
            sampling.cancel()
    return Watched(lags=sampler.samples, starts=starts)


def main() -> None:
    """Be the host."""
    config_file, control, watched = map(Path, sys.argv[1:4])
    seen = uvloop.run(_host(config_file, control, samples_lag=LAG_OPTION in sys.argv[4:]))
    watched.write_bytes(msgspec.json.encode(seen))


# --- in the bench's process ------------------------------------------------------------------------------------------


class Host:
    """`with Host(folder, body) as host:` - the daemon starts when entered; `wait_up` says when its engines are warm."""

    def __init__(self, folder: Path, body: str, *, samples_lag: bool = False) -> None:
        self.endpoint = f"ipc://{folder}/msd.sock"
        self.control = folder / "control.sock"
        self._options = [LAG_OPTION] if samples_lag else []
        self._config, self._watched, self._log = folder / "config.toml", folder / "watched.json", folder / "daemon.log"
        self._config.write_text(
            f'[daemon]\ndrain_s = 5\nrun_dir = "{folder}/run"\nstate_dir = "{folder}/state"\n'
            f'[ingress.zmq]\nendpoints = ["{self.endpoint}"]\n{body}'
        )

    def __enter__(self) -> Host:
        command = [sys.executable, "-m", "tests.bench.host", *map(str, (self._config, self.control, self._watched))]
        command += self._options
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        return self

    def __exit__(self, *error: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()

    @property
    def pid(self) -> int:
        """The daemon's process."""
        return self._process.pid

    def wait_up(self, num_engines: int) -> None:
        """Wait until so many engines are warm. Raises CannotMeasureError."""
        until_s = time.monotonic() + START_S
        with Client(self.endpoint, timeout_s=START_S) as client:
            while time.monotonic() < until_s:
                if self._process.poll() is not None:
                    break
                status = msgspec.convert(client.status(), DaemonStatus)
                if sum(engine.state == "up" for engine in status.engines) >= num_engines:
                    return
                if errors := [engine.last_error for engine in status.engines if engine.last_error]:
                    raise CannotMeasureError(f"an engine did not start: {errors[0][-500:]}")
                time.sleep(0.1)
        raise CannotMeasureError(f"no {num_engines} engines within {START_S:g} s: {self._log.read_text()[-500:]}")

    def stop(self) -> Watched:
        """End the daemon; return what it saw of itself. Raises CannotMeasureError."""
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(STOP_S)
        except subprocess.TimeoutExpired as error:
            raise CannotMeasureError(f"the daemon did not stop within {STOP_S:g} s") from error
        if code != 0 or not self._watched.exists():
            raise CannotMeasureError(f"the daemon ended with {code}: {self._log.read_text()[-500:]}")
        return msgspec.json.decode(self._watched.read_bytes(), type=Watched)


class DirectLine:
    """`with DirectLine(host.control) as line:` - a consumer of the AsyncLLM without msd."""

    def __init__(self, control: Path, patience_s: float) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(patience_s)
        self._socket.connect(str(control))
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(list[Piece]).decode
        self._buffer = bytearray()

    def __enter__(self) -> DirectLine:
        return self

    def __exit__(self, *error: object) -> None:
        self._socket.close()

    def order(self, order: Order) -> None:
        """Send one request."""
        payload = self._encode(order)
        self._socket.sendall(HEAD.pack(len(payload)) + payload)

    def receive(self) -> list[Piece]:
        """Wait for frames and return the pieces of all that are there. Raises CannotMeasureError."""
        pieces: list[Piece] = []
        while not pieces:
            try:
                received = self._socket.recv(RECEIVE_BYTES)
            except TimeoutError as error:
                raise CannotMeasureError("the AsyncLLM is silent") from error
            if not received:
                raise CannotMeasureError("the daemon's process broke off the direct calls")
            self._buffer += received
            while len(self._buffer) >= HEAD.size:
                end = HEAD.size + HEAD.unpack_from(self._buffer)[0]
                if len(self._buffer) < end:
                    break
                pieces += self._decode(self._buffer[HEAD.size : end])
                del self._buffer[:end]
        return pieces


if __name__ == "__main__":
    main()
