"""A stub of msd for loadgen's tests: a ROUTER on a thread that answers at once, stalls, refuses or dies as told."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import zmq

from msd import wire

POLL_MS = 20


class StubServer:
    """Answers each Submit with Ack, `num_tokens` Deltas of one token and Done; keeps the time of each answer."""

    def __init__(
        self,
        endpoint: str,
        *,
        num_tokens: int = 1,
        stall: tuple[float, float] | None = None,
        refuse_every: int = 0,
        swallow: bool = False,
        dies_after_s: float | None = None,
        energy: wire.EnergyFields | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.answered_us: dict[int, int] = {}
        self.received: list[wire.Submit] = []
        self.cancelled: list[str] = []
        self.acked: list[str] = []
        self._num_tokens, self._stall, self._refuse_every = num_tokens, stall, refuse_every
        self._swallow, self._dies_after_s, self._energy = swallow, dies_after_s, energy
        self._first_s: float | None = None
        self._stop = threading.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> StubServer:
        self._thread.start()
        assert self._ready.wait(5)
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join(5)
        assert not self._thread.is_alive()

    def _serve(self) -> None:
        with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.SNDHWM, 0)
            socket.setsockopt(zmq.RCVHWM, 0)
            socket.bind(self.endpoint)
            self._ready.set()
            while not self._stop.is_set() and not self._is_over():
                self._sleep_if_stalled()
                if socket.poll(POLL_MS):
                    peer, version, data = socket.recv_multipart()
                    assert version == wire.VERSION
                    for message in self._answers(wire.decode_client(data)):
                        socket.send_multipart([peer, wire.VERSION, wire.encode(message)])

    def _is_over(self) -> bool:
        return (
            self._dies_after_s is not None
            and self._first_s is not None
            and time.monotonic() > self._first_s + self._dies_after_s
        )

    def _sleep_if_stalled(self) -> None:
        if self._stall is None or self._first_s is None:
            return
        begin, length = self._stall
        if time.monotonic() >= self._first_s + begin:
            time.sleep(max(0.0, self._first_s + begin + length - time.monotonic()))
            self._stall = None

    def _answers(self, message: wire.ClientMessage) -> Iterator[wire.ServerMessage]:
        match message:
            case wire.Hello():
                yield wire.Welcome(
                    server="stub", epoch="0", tenant="t", limits={}, durable=False, submit_credit=1_000_000
                )
            case wire.Submit():
                self._first_s = self._first_s or time.monotonic()
                self.received.append(message)
                if self._refuse_every and len(self.received) % self._refuse_every == 0:
                    yield wire.refusal("queue_full", "full", client_request_id=message.client_request_id)
                elif not self._swallow:
                    yield from self._serve_one(message)
            case wire.Cancel():
                self.cancelled.append(message.client_request_id or "")
            case wire.Acked():
                self.acked.extend(message.request_ids)
            case wire.Credit():
                pass
            case _:
                raise AssertionError(message)

    def _serve_one(self, submit: wire.Submit) -> Iterator[wire.ServerMessage]:
        request_id = f"r{len(self.received)}"
        yield wire.Ack(
            client_request_id=submit.client_request_id,
            request_id=request_id,
            seq=len(self.received),
            duplicate=False,
            state="waiting",
            durable=False,
            submit_credit=1_000_000,
        )
        # Right for the task `copy`, whatever the worked examples before it.
        answer = (submit.prompt or "").rpartition("copy ")[2].rstrip("=")
        for index in range(self._num_tokens):
            text = answer if index == 0 else ""
            yield wire.Delta(request_id=request_id, attempt=1, index=index, token_ids=(index,), text=text)
        yield wire.Done(
            request_id=request_id,
            attempt=1,
            finish_reason="stop",
            mode="bf16" if len(self.received) % 2 else "int8",
            decision_id="d",
            reason="rule 7",
            usage=wire.Usage(prompt=10, cached=0, completion=self._num_tokens),
            timings=wire.TimingFields(queue_ms=0.5, ttft_ms=1, tpot_ms=0, engine_ms=1, e2e_ms=1.5),
            energy=self._energy,
        )
        self.answered_us[int(submit.client_request_id.rpartition(".")[2])] = time.monotonic_ns() // 1_000


@contextmanager
def stub(folder: Path, **options: object) -> Iterator[StubServer]:
    """Run a stub on a socket in `folder`."""
    server = StubServer(f"ipc://{folder}/stub.sock", **options)  # type: ignore[arg-type]
    with server:
        yield server
