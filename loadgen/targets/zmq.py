"""msd over ZeroMQ: one pipelined DEALER per tenant, on pyzmq and msd.wire directly.

Not through msd.client on purpose: its state machine resends, retries and joins streams, which an open-loop measurement
must not do, and costs CPU that the rate ceiling needs. Here a payload is encoded before the run and a send is two
frames; an overload is answered by the daemon's own refusals, which the report shows.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from typing import Final, assert_never

import zmq

from loadgen.plan import PlannedRequest
from loadgen.prompts import Content
from loadgen.record import Record
from loadgen.spec import ClassSpec
from loadgen.targets import ServerFacts, TargetDeadError
from msd import wire

SCHEMES: Final = ("msd+ipc://", "msd+tcp://")
CONNECT_TIMEOUT_S: Final = 10.0
LINGER_MS: Final = 500
DRAIN_MESSAGES: Final = 256
DELTA_CREDIT: Final = 65_536
CREDIT_STEP: Final = 16_384
ACK_BATCH: Final = 256
ACK_INTERVAL_S: Final = 0.1
RECEIVE_HWM: Final = 100_000
GREEDY: Final = wire.SamplingFields(temperature=0.0)
EXACT_LENGTH: Final = wire.SamplingFields(temperature=0.0, ignore_eos=True)


class ZmqTarget:
    """A running msd, at `msd+ipc:///path` or `msd+tcp://host:port`."""

    def __init__(self, url: str, max_in_flight: int) -> None:
        self.url = url
        self._endpoint = url.removeprefix("msd+")
        self._max_in_flight = max_in_flight
        # Unlike in every other run, also of the same plan: msd answers a repeated id with the first one's answer.
        self._run_id = secrets.token_hex(6)
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._connections: dict[str | None, _Connection] = {}

    def encode(self, index: int, row: PlannedRequest, traffic: ClassSpec, content: Content) -> bytes:
        """Return the Submit frame. Made-up prompts ask for their exact length, tasks stop by themselves."""
        return wire.encode(
            wire.Submit(
                client_request_id=f"{self._run_id}.{index}",
                max_tokens=content.max_tokens,
                prompt=content.text,
                prompt_token_ids=content.token_ids,
                model=row.model,
                sampling=GREEDY if content.answer is not None else EXACT_LENGTH,
                slo=wire.SloFields(
                    ttft_ms=traffic.slo.ttft_ms, tpot_ms=traffic.slo.tpot_ms, deadline_ms=traffic.deadline_ms
                ),
                service_class=traffic.service_class,
                priority=row.priority,
                quality_floor=traffic.quality_floor,
                task=row.task if traffic.hint_task else None,
                mode_hint=None
                if traffic.mode_hint is None
                else wire.ModeHint(mode=traffic.mode_hint.mode, strict=traffic.mode_hint.strict),
                prefix_id=row.prefix_id,
            )
        )

    async def open(self, tenants: frozenset[str | None]) -> ServerFacts:
        """Connect and shake hands once per tenant. Raises TargetDeadError."""
        self._context = zmq.Context()
        facts: ServerFacts | None = None
        for tenant in sorted(tenants, key=lambda name: name or ""):
            connection = _Connection(self._context, self._endpoint, tenant, self._max_in_flight)
            self._connections[tenant] = connection
            welcome = await connection.open()
            facts = ServerFacts(server=welcome.server, epoch=welcome.epoch, durable=welcome.durable)
        if facts is None:
            raise TargetDeadError("the plan has no requests")
        return facts

    def start(self, record: Record, now_us: Callable[[], int]) -> None:
        """Hand the record to the connections."""
        for connection in self._connections.values():
            connection.start(record, now_us)

    def send(self, index: int, tenant: str | None, payload: bytes) -> bool:
        """Send; False when libzmq's queue is full."""
        return self._connections[tenant].send(payload)

    def cancel(self, index: int, tenant: str | None) -> None:
        """Ask for an end; a full queue drops the wish."""
        self._connections[tenant].send(wire.encode(wire.Cancel(client_request_id=f"{self._run_id}.{index}")))

    def death(self) -> str | None:
        """The first connection's reason."""
        for connection in self._connections.values():
            if (reason := connection.death()) is not None:
                return reason
        return None

    async def close(self) -> None:
        """Close every socket; what libzmq still holds gets half a second."""
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()
        if self._context is not None:
            # Blocks for up to LINGER_MS, so not on the loop.
            await asyncio.to_thread(self._context.term)
            self._context = None


class _Connection:
    """One DEALER, drained from the loop's reader callback."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, tenant: str | None, max_in_flight: int
    ) -> None:
        self._endpoint, self._tenant = endpoint, tenant
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        # A stalled server must fill this process's own bound first, not libzmq's default of 1,000.
        self._socket.setsockopt(zmq.SNDHWM, max_in_flight)
        self._socket.setsockopt(zmq.RCVHWM, RECEIVE_HWM)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._record: Record | None = None
        self._now_us: Callable[[], int] = lambda: time.monotonic_ns() // 1_000
        self._index_of: dict[str, int] = {}
        self._welcome: asyncio.Future[wire.Welcome] | None = None
        self._scheduled = False
        self._closed = False
        self._deltas_taken = 0
        self._to_ack: list[str] = []
        self._acked_at_us = 0
        self._reason: str | None = None

    async def open(self) -> wire.Welcome:
        """Connect and say hello. Raises TargetDeadError."""
        loop = asyncio.get_running_loop()
        self._welcome = loop.create_future()
        try:
            self._socket.connect(self._endpoint)
        except zmq.ZMQError as error:
            raise TargetDeadError(f"{self._endpoint}: {error}") from error
        loop.add_reader(self._socket.FD, self._on_readable)
        hello = wire.encode(wire.Hello(client="loadgen", tenant=self._tenant, delta_credit=DELTA_CREDIT))
        self.send(hello)  # queued until the connection stands
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                return await self._welcome
        except TimeoutError:
            raise TargetDeadError(f"{self._endpoint}: no answer within {CONNECT_TIMEOUT_S:g} s") from None

    def start(self, record: Record, now_us: Callable[[], int]) -> None:
        self._record, self._now_us = record, now_us

    def send(self, payload: bytes) -> bool:
        try:
            self._socket.send(wire.VERSION, zmq.NOBLOCK | zmq.SNDMORE)
            self._socket.send(payload, zmq.NOBLOCK)
        except zmq.Again:
            return False
        finally:
            self._rearm()
        return True

    def death(self) -> str | None:
        """Look at the monitor; also the safety tick of the reader and of the batch of acknowledgements."""
        self._rearm()
        if self._to_ack and self._now_us() - self._acked_at_us > ACK_INTERVAL_S * 1e6:
            self._flush_acks()
        if self._reason is None and self._monitor.poll(0):
            self._reason = f"{self._endpoint}: the daemon closed the connection"
        return self._reason

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._welcome is not None:
            asyncio.get_running_loop().remove_reader(self._socket.FD)
            self._welcome.cancel()
        self._flush_acks()
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close()

    # The descriptor is edge-triggered and reading EVENTS, or sending, consumes the edge: look again after each.
    def _rearm(self) -> None:
        if not self._scheduled and not self._closed and int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._on_readable)

    def _on_readable(self) -> None:
        self._scheduled = False
        if self._closed:
            return
        for _ in range(DRAIN_MESSAGES):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            if len(frames) != 2 or frames[0] != wire.VERSION:
                self._reason = f"{self._endpoint}: does not speak {wire.VERSION.decode()}"
                return
            try:
                message = wire.decode_server(frames[1])
            except wire.DECODE_ERRORS as error:
                self._reason = f"{self._endpoint}: sent what is no message: {error}"
                return
            self._take(message)
        self._rearm()

    def _take(self, message: wire.ServerMessage) -> None:
        record = self._record
        match message:
            case wire.Delta():
                self._take_delta(message)
            case wire.Ack():
                index = _index(message.client_request_id)
                if record is not None and index is not None:
                    self._index_of[message.request_id] = index
                    record.acked(index, self._now_us())
            case wire.Done():
                index = self._index_of.pop(message.request_id, None)
                if index is None:
                    index = _index(message.client_request_id)
                if record is not None and index is not None:
                    record.finished(index, self._now_us(), message)
                self._acknowledge(message.request_id)
            case wire.Error():
                self._take_error(message)
            case wire.Restarted():
                index = self._index_of.get(message.request_id)
                if record is not None and index is not None:
                    record.restarted(index)
            case wire.Welcome():
                if self._welcome is not None and not self._welcome.done():
                    self._welcome.set_result(message)
            case wire.Started() | wire.State() | wire.Results() | wire.Draining() | wire.Pong():
                pass
            case _:
                assert_never(message)

    def _take_delta(self, delta: wire.Delta) -> None:
        index = self._index_of.get(delta.request_id)
        if self._record is not None and index is not None and delta.token_ids:
            self._record.tokens(index, self._now_us(), len(delta.token_ids), delta.text)
        self._deltas_taken += 1
        if self._deltas_taken >= CREDIT_STEP and self.send(wire.encode(wire.Credit(add=self._deltas_taken))):
            self._deltas_taken = 0

    def _take_error(self, error: wire.Error) -> None:
        index = self._index_of.pop(error.request_id, None) if error.request_id is not None else None
        if index is None and error.client_request_id:
            index = _index(error.client_request_id)
        if index is not None and self._record is not None:
            self._record.refused(index, self._now_us(), error.code)
            if error.request_id is not None:
                self._acknowledge(error.request_id)
            return
        # An error that names no request is about the connection.
        reason = f"{self._endpoint}: {error.code}: {error.message}"
        if self._welcome is not None and not self._welcome.done():
            self._welcome.set_exception(TargetDeadError(reason))
        self._reason = reason

    def _acknowledge(self, request_id: str) -> None:
        """Tell msd in batches that results are here, so that it need not keep them."""
        self._to_ack.append(request_id)
        if len(self._to_ack) >= ACK_BATCH:
            self._flush_acks()

    def _flush_acks(self) -> None:
        self._acked_at_us = self._now_us()
        while self._to_ack and self.send(wire.encode(wire.Acked(request_ids=tuple(self._to_ack[:ACK_BATCH])))):
            del self._to_ack[:ACK_BATCH]


def _index(client_request_id: str) -> int | None:
    number = client_request_id.rpartition(".")[2]
    return int(number) if number.isdecimal() else None
