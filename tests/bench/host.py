"""The daemon in a process that also watches its own event loop, and lets a bench call its AsyncLLM directly.

`python -m tests.bench.host CONFIG CONTROL LAGS`: CONTROL is the path of a unix socket for the direct calls (one JSON
line each, answered by JSON lines), LAGS the file that gets (time, lag) of every 5 ms slot when SIGTERM ends the daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Iterator
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
from msd.engine.vllm import VllmEngine
from msd.wire import DaemonStatus
from tests.bench import lag
from tests.bench.harness import ROOT, CannotMeasureError

START_S = 240.0
STOP_S = 60.0
TOKEN_LOW, TOKEN_HIGH = 16, 96
"""Token ids of the testbed's characters."""


class Call(Struct, frozen=True, kw_only=True):
    """Calls of the AsyncLLM without msd: `concurrency` streams for `seconds`, or `count` single ones for their TTFT."""

    max_tokens: int
    num_prompt_tokens: int
    seed: int
    concurrency: int = 0
    seconds: float = 0.0
    count: int = 0


class Piece(Struct, frozen=True, kw_only=True):
    """What a direct call gives back: tokens of a stream, or the TTFTs of single calls; `end` closes the answer."""

    token_ids: list[int] = []
    ttft_ms: list[float] = []
    end: bool = False


def prompt_ids(rng: Random, count: int) -> list[int]:
    """A made-up prompt: unlike every other, so that no cache helps either side."""
    return [rng.randrange(TOKEN_LOW, TOKEN_HIGH) for _ in range(count)]


# --- in the daemon's process -----------------------------------------------------------------------------------------


class DirectCalls:
    """Serves Calls on the control socket with the AsyncLLM of the daemon's first vLLM engine."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._numbers = itertools.count()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, one call after another."""
        with contextlib.suppress(ConnectionError):
            while line := await reader.readline():
                call = msgspec.json.decode(line, type=Call)
                if call.count:
                    await self._write(writer, Piece(ttft_ms=await self._ttfts_ms(call)))
                else:
                    await self._stream(call, writer)
                await self._write(writer, Piece(end=True))
        writer.close()

    async def _stream(self, call: Call, writer: asyncio.StreamWriter) -> None:
        until_s = time.monotonic() + call.seconds

        async def one_after_another(number: int) -> None:
            rng = Random(f"{call.seed}/{number}")
            while time.monotonic() < until_s:
                async for token_ids in self._generate(prompt_ids(rng, call.num_prompt_tokens), call.max_tokens):
                    await self._write(writer, Piece(token_ids=token_ids))

        async with asyncio.TaskGroup() as tasks:
            for number in range(call.concurrency):
                tasks.create_task(one_after_another(number))

    async def _ttfts_ms(self, call: Call) -> list[float]:
        rng = Random(call.seed)
        ttfts_ms: list[float] = []
        for _ in range(call.count):
            ids = prompt_ids(rng, call.num_prompt_tokens)
            began = time.perf_counter()
            first_s = 0.0
            async for _ in self._generate(ids, call.max_tokens):
                first_s = first_s or time.perf_counter() - began
            ttfts_ms.append(first_s * 1e3)
        return ttfts_ms

    async def _generate(self, ids: list[int], max_tokens: int) -> AsyncGenerator[list[int]]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=max_tokens, ignore_eos=True, temperature=0.0, output_kind=RequestOutputKind.DELTA
        )
        request_id = f"direct-{next(self._numbers)}"
        async for output in _async_llm(self._daemon).generate({"prompt_token_ids": ids}, params, request_id):
            yield list(output.outputs[0].token_ids)

    @staticmethod
    async def _write(writer: asyncio.StreamWriter, piece: Piece) -> None:
        writer.write(msgspec.json.encode(piece) + b"\n")
        await writer.drain()


def _async_llm(daemon: Daemon) -> Any:
    """Return the live AsyncLLM of the first engine: a bench may look where nobody else should."""
    for slot in daemon._pool._slots.values():
        if isinstance(slot.engine, VllmEngine) and slot.engine._llm is not None:
            return slot.engine._llm
    raise CannotMeasureError("no vLLM engine is up")


async def _host(config_file: Path, control: Path) -> list[tuple[int, int]]:
    """Run the daemon to its end; return its loop's slots."""
    config = settings.load(config_file)
    logs.configure(config.daemon)
    daemon = Daemon(config, config_file.parent)
    sampler = lag.LagSampler()
    server = await asyncio.start_unix_server(DirectCalls(daemon).serve, control)
    async with server, asyncio.TaskGroup() as tasks:
        sampling = tasks.create_task(sampler.run())
        await daemon.run()
        sampling.cancel()
    return sampler.samples


def main() -> None:
    """Be the host."""
    config_file, control, lags = map(Path, sys.argv[1:])
    lag.write(lags, uvloop.run(_host(config_file, control)))


# --- in the bench's process ------------------------------------------------------------------------------------------


class Host:
    """`with Host(folder, body) as host:` - the daemon starts when entered; `wait_up` says when its engines are warm."""

    def __init__(self, folder: Path, body: str) -> None:
        self.endpoint = f"ipc://{folder}/msd.sock"
        self.control = folder / "control.sock"
        self._config, self._lags, self._log = folder / "config.toml", folder / "lags.json", folder / "daemon.log"
        self._config.write_text(
            f'[daemon]\ndrain_s = 5\nrun_dir = "{folder}/run"\n[ingress.zmq]\nendpoints = ["{self.endpoint}"]\n{body}'
        )

    def __enter__(self) -> Host:
        command = [sys.executable, "-m", "tests.bench.host", *map(str, (self._config, self.control, self._lags))]
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

    def wait_up(self, num_engines: int) -> int:
        """Wait until so many engines are warm; return the time in monotonic us. Raises CannotMeasureError."""
        until_s = time.monotonic() + START_S
        with Client(self.endpoint, timeout_s=START_S) as client:
            while time.monotonic() < until_s:
                if self._process.poll() is not None:
                    break
                status = msgspec.convert(client.status(), DaemonStatus)
                if sum(engine.state == "up" for engine in status.engines) >= num_engines:
                    return time.monotonic_ns() // 1_000
                if errors := [engine.last_error for engine in status.engines if engine.last_error]:
                    raise CannotMeasureError(f"an engine did not start: {errors[0][-500:]}")
                time.sleep(0.1)
        raise CannotMeasureError(f"no {num_engines} engines within {START_S:g} s: {self._log.read_text()[-500:]}")

    def direct(self, call: Call) -> Iterator[Piece]:
        """Call the AsyncLLM without msd."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.control))
            connection.settimeout(call.seconds + START_S)
            connection.sendall(msgspec.json.encode(call) + b"\n")
            decode = msgspec.json.Decoder(Piece).decode
            with connection.makefile("rb") as lines:
                for line in lines:
                    piece = decode(line)
                    if piece.end:
                        return
                    yield piece
        raise CannotMeasureError("the daemon's process broke off a direct call")

    def stop(self) -> list[tuple[int, int]]:
        """End the daemon; return (time, lag) of its loop's slots in us. Raises CannotMeasureError."""
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(STOP_S)
        except subprocess.TimeoutExpired as error:
            raise CannotMeasureError(f"the daemon did not stop within {STOP_S:g} s") from error
        if code != 0 or not self._lags.exists():
            raise CannotMeasureError(f"the daemon ended with {code}: {self._log.read_text()[-500:]}")
        return lag.read(self._lags)


if __name__ == "__main__":
    main()
