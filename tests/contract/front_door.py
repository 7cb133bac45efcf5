"""A front door with a small house behind it: the real ingress and egress on real sockets, and an Intake that answers.

The house runs in a thread with a loop of its own, so that blocking producers can be tested against it.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import zmq

from msd import wire
from msd.config import LimitsConfig, TenantConfig, ZmqIngressConfig
from msd.domain import Chunk, FinishReason, Outcome, Request, Result
from msd.egress import Egress
from msd.ingress.accept import Acceptor, RefusedSubmitError
from msd.ingress.zmq import ZmqIngress
from msd.ports import Session
from msd.wire import ChatMessage, Submit

T = TypeVar("T")
TIMEOUT_S = 20.0
HELLO = wire.Hello(client="test")


class ByteTokenizer:
    """One token per byte of UTF-8."""

    fingerprint = "bytes"
    vocab_size = 256

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(text.encode())

    def encode_chat(self, messages: Sequence[ChatMessage]) -> tuple[int, ...]:
        raise ValueError("the model has no chat template")

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(token_ids).decode("utf-8", "replace")


class Inline:
    """Offload without a thread."""

    async def run(self, function: Callable[[], T]) -> T:
        return function()


class House:
    """Intake of the tests: acknowledges, generates `num_tokens` in pieces, stores results; `hold` lets them wait."""

    def __init__(self, loop: asyncio.AbstractEventLoop, limits: LimitsConfig, *, epoch: str = "7f") -> None:
        self.loop = loop
        self.egress = Egress(loop, limits)
        self.acceptor = Acceptor(epoch=epoch, models={"tiny": ByteTokenizer()}, offload=Inline())
        self.num_tokens = 1
        self.piece_tokens = 1
        self.pause_s = 0.0
        self.hold = False
        self.refuse_next: deque[tuple[wire.ErrorCode, int | None]] = deque()
        self.held: list[Request] = []
        self.open: dict[tuple[str, str], Request] = {}
        self.results: dict[str, Result] = {}
        self.by_key: dict[tuple[str, str], Result] = {}
        self.acknowledged: list[str] = []
        self.gone_sessions: list[Session] = []
        self.num_executions = 0
        self.cancelled: set[str] = set()

    def submit(self, submit: Submit, session: Session) -> None:
        try:
            request, _ = self.acceptor.accept(submit, session.tenant, 0)
        except RefusedSubmitError as error:
            session.send(wire.refusal(error.code, str(error), client_request_id=submit.client_request_id))
            return
        self.egress.register(request, session)
        key = (request.tenant, request.client_request_id)
        if self.refuse_next:
            code, retry_after_ms = self.refuse_next.popleft()
            self.egress.reject(request.request_id, code, "refused by the test", retry_after_ms)
        elif (first := self.open.get(key)) is not None:
            if first.content_hash == request.content_hash:
                self.egress.ack_duplicate(request.request_id, first.request_id, "running", False)
            else:
                self.egress.reject(request.request_id, "idempotency_conflict", "same id, another body")
        elif (stored := self.by_key.get(key)) is not None:
            reader = self.egress.ack_duplicate(request.request_id, stored.outcome.request_id, "finished", False)
            if reader is not None:
                self.egress.send_result(reader, stored)
        else:
            self.open[key] = request
            # Not from inside the drain: answers of a real house come in later turns of the loop.
            self.loop.call_soon(self._acknowledge, request)

    def _acknowledge(self, request: Request) -> None:
        self.egress.ack(request.request_id, self.num_executions + 1, False)
        if self.hold:
            self.held.append(request)
        else:
            self.run(request)

    def run(self, request: Request, attempt: int = 1) -> None:
        self.num_executions += 1
        self.egress.started(request.request_id, "noop", f"d-{request.request_id}", attempt, 0)
        self._step(request, attempt, 0)

    def release(self) -> None:
        """Run what was held, and hold nothing more."""
        self.hold = False
        held, self.held = self.held, []
        for request in held:
            self.run(request)

    def _step(self, request: Request, attempt: int, num_done: int) -> None:
        if request.request_id in self.cancelled:
            self.finish(request, attempt, "abort")
            return
        num_new = min(self.piece_tokens, self.num_tokens - num_done)
        ids = tuple(range(num_done, num_done + num_new))
        self.egress.chunk(request.request_id, attempt, Chunk(token_ids=ids, text="".join(f"{i} " for i in ids)))
        num_done += num_new
        if num_done >= self.num_tokens:
            self.finish(request, attempt, "length")
        elif self.pause_s:
            self.loop.call_later(self.pause_s, self._step, request, attempt, num_done)
        else:
            self.loop.call_soon(self._step, request, attempt, num_done)

    def finish(self, request: Request, attempt: int, reason: FinishReason) -> None:
        text, token_ids = self.egress.output(request.request_id)
        outcome = Outcome(
            request_id=request.request_id,
            attempt=attempt,
            finish_reason=reason,
            mode="noop",
            num_prompt_tokens=request.num_prompt_tokens,
            num_completion_tokens=len(token_ids),
        )
        result = Result(
            outcome=outcome,
            client_request_id=request.client_request_id,
            tenant=request.tenant,
            seq=len(self.results) + 1,
            text=text,
            token_ids=token_ids,
        )
        key = (request.tenant, request.client_request_id)
        self.open.pop(key, None)
        self.by_key[key] = self.results[request.request_id] = result
        self.egress.ended(result)
        self.egress.deliver(request.request_id, result.seq)

    def cancel(self, session: Session, request_id: str | None, client_request_id: str | None) -> None:
        for (tenant, key), request in self.open.items():
            if tenant == session.tenant and (request_id == request.request_id or client_request_id == key):
                self.cancelled.add(request.request_id)
                if request in self.held:
                    self.held.remove(request)
                    self.finish(request, 0, "abort")
                return
        self._answer_stored(session, request_id, client_request_id)

    def status(self, session: Session, request_id: str | None, client_request_id: str | None) -> None:
        if request_id is None and client_request_id is None:
            session.send(wire.State(daemon={"tenant": session.tenant}))
        else:
            self._answer_stored(session, request_id, client_request_id)

    def fetch(self, session: Session, request_ids: Sequence[str] | None, since_seq: int | None, max_bytes: int) -> None:
        mine = [result for result in self.results.values() if result.tenant == session.tenant]
        if request_ids is not None:
            mine = [result for result in mine if result.outcome.request_id in request_ids]
        elif since_seq is not None:
            mine = [result for result in mine if result.seq > since_seq]
        page: list[Result] = []
        size = 0
        for result in mine:
            size += len(result.text) + 5 * len(result.token_ids)
            if page and size > max_bytes:
                break
            page.append(result)
        self.egress.send_results(session, page, page[-1].seq if page else since_seq or 0, len(page) < len(mine))

    def acknowledge(self, session: Session, request_ids: Sequence[str]) -> None:
        self.acknowledged.extend(request_ids)

    def follow(self, session: Session, request_id: str, attempt: int, index: int) -> None:
        if not self.egress.follow(session, request_id, attempt, index):
            self._answer_stored(session, request_id, None)

    def resume(self, session: Session) -> None:
        self.egress.resume(session)

    def gone(self, session: Session) -> None:
        self.gone_sessions.append(session)
        self.egress.gone(session)

    def _answer_stored(self, session: Session, request_id: str | None, client_request_id: str | None) -> None:
        stored = (
            self.results.get(request_id)
            if request_id is not None
            else self.by_key.get((session.tenant, client_request_id or ""))
        )
        if stored is not None and stored.tenant == session.tenant:
            self.egress.send_result(session, stored)
        else:
            session.send(
                wire.refusal("not_found", "no such request", request_id=request_id, client_request_id=client_request_id)
            )


class Door:
    """A running ingress with its house, in a thread; `call` runs something on its loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, house: House, ingress: ZmqIngress) -> None:
        self.loop = loop
        self.house = house
        self.ingress = ingress

    @property
    def endpoint(self) -> str:
        return self.ingress.endpoints[0]

    def call(self, function: Callable[[], T]) -> T:
        async def run() -> T:
            return function()

        return self.wait(run())

    def wait(self, awaitable: Awaitable[T]) -> T:
        async def run() -> T:
            return await awaitable

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(TIMEOUT_S)

    def stats(self) -> dict[str, int]:
        return self.call(self.ingress.stats)


@contextmanager
def open_door(
    config: ZmqIngressConfig,
    *,
    limits: LimitsConfig | None = None,
    tenants: tuple[TenantConfig, ...] = (),
    epoch: str = "7f",
    new_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop,
) -> Iterator[Door]:
    """Serve `config` in a thread until the block ends. An error of the loop's callbacks fails the test."""
    limits = limits or LimitsConfig()
    loop = new_loop()
    errors: list[dict[str, object]] = []
    loop.set_exception_handler(lambda _, context: errors.append(context))
    thread = threading.Thread(target=loop.run_forever, name="front-door")
    thread.start()
    house = House(loop, limits, epoch=epoch)

    async def build() -> ZmqIngress:
        ingress = ZmqIngress(config, limits, tenants, house, epoch=epoch, durable=False)
        await ingress.start()
        return ingress

    try:
        ingress = asyncio.run_coroutine_threadsafe(build(), loop).result(TIMEOUT_S)
        try:
            yield Door(loop, house, ingress)
        finally:
            asyncio.run_coroutine_threadsafe(ingress.close(), loop).result(TIMEOUT_S)
            asyncio.run_coroutine_threadsafe(loop.shutdown_default_executor(), loop).result(TIMEOUT_S)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(TIMEOUT_S)
        loop.close()
    assert not errors, f"callbacks raised: {errors}"


class Producer:
    """A raw DEALER that speaks msd1, for tests that need to see each message."""

    def __init__(
        self,
        endpoint: str,
        *,
        hello: wire.Hello | None = HELLO,
        rcvhwm: int = 0,
        curve: tuple[bytes, bytes, bytes] | None = None,
    ) -> None:
        """`curve`: the server's public key, the own public and secret one."""
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.rcvhwm = rcvhwm
        if curve is not None:
            self.socket.curve_serverkey, self.socket.curve_publickey, self.socket.curve_secretkey = curve
        self.socket.connect(endpoint)
        self.welcome: wire.Welcome | None = None
        if hello is not None:
            self.send(hello)
            welcome = self.receive()
            assert isinstance(welcome, wire.Welcome), welcome
            self.welcome = welcome

    def send(self, message: wire.ClientMessage) -> None:
        self.send_frames(wire.VERSION, wire.encode(message))

    def send_frames(self, *frames: bytes) -> None:
        self.socket.send_multipart(frames)

    def receive(self, timeout_s: float = TIMEOUT_S) -> wire.ServerMessage:
        message = self.poll(timeout_s)
        assert message is not None, "no answer in time"
        return message

    def poll(self, timeout_s: float) -> wire.ServerMessage | None:
        if not self.socket.poll(int(timeout_s * 1_000)):
            return None
        version, payload = self.socket.recv_multipart()
        assert version == wire.VERSION
        return wire.decode_server(payload)

    def until(self, kind: type[T]) -> T:
        """Read on to the next message of this kind."""
        while True:
            message = self.receive()
            if isinstance(message, kind):
                return message

    def close(self) -> None:
        self.socket.close(0)
        self.context.term()

    def __enter__(self) -> Producer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
