"""The socket: one plain ROUTER, drained from the event loop's reader callback without ever blocking (docs/adr/0002).

The descriptor that libzmq gives is edge-triggered and is not the data: reading EVENTS, receiving or sending can consume
the edge. So EVENTS is read again after every drain, and after every send before the loop can sleep.
"""

from __future__ import annotations

import asyncio
import os
import select
import struct
from collections.abc import Callable
from typing import Final

import structlog
import zmq
from zmq.utils import z85

from msd.config import LimitsConfig, TenantConfig, ZmqIngressConfig
from msd.errors import ConfigError, IngressError
from msd.ingress import flood
from msd.ingress.addresses import Address, make_room, plan, read_secret_key, remove_socket, socket_umask
from msd.ingress.desk import Desk, Greeting
from msd.ingress.sessions import RETRY_MAX_S, RETRY_MIN_S, ClientSession, Delivery
from msd.ingress.zap import DOMAIN, Doorkeeper, Keyring
from msd.ports import Intake
from msd.wire import VERSION, Draining

ZAP_ENDPOINT: Final = "inproc://zeromq.zap.01"
PEER_PIPE_MESSAGES: Final = 64
"""SNDHWM: messages in libzmq's pipe per peer. Small, since it cannot be bounded in bytes; the outbox is ours."""
RECEIVE_PIPE_MESSAGES: Final = 1_000
HEARTBEATS_LOST: Final = 3
HANDSHAKE_MS: Final = 5_000
HANDSHAKES_AT_ONCE: Final = 64
BACKLOG: Final = 1_024
LINGER_MS: Final = 1_000
DRAIN_MESSAGES: Final = 256
DRAIN_S: Final = 0.002
"""A drain takes this many messages or this long, then the loop's other work has its turn."""
DISCARD_FRAMES: Final = 256
RETRY_S_PER_SESSION: Final = 0.000_02
"""A pass looks at every session that waits for room: the more there are, the rarer the passes."""
TICK_S: Final = 0.1
HOUSEKEEPING_S: Final = 1.0
MISSED_AFTER_S: Final = 0.05

_NOBLOCK: Final = int(zmq.NOBLOCK)
_MORE: Final = int(zmq.NOBLOCK | zmq.SNDMORE)
_RCVMORE: Final = int(zmq.RCVMORE)
_EVENTS: Final = int(zmq.EVENTS)
_POLLIN: Final = int(zmq.POLLIN)

_log = structlog.get_logger()


class ZmqIngress:
    """Binds the configured endpoints and serves them until `close`. Everything happens on the loop that ran `start`."""

    def __init__(
        self,
        config: ZmqIngressConfig,
        limits: LimitsConfig,
        tenants: tuple[TenantConfig, ...],
        intake: Intake,
        *,
        epoch: str,
        durable: bool,
    ) -> None:
        self._config = config
        self._intake = intake
        self._keyring = Keyring(config.curve_keys_dir, _decode_z85)
        self._doorkeeper = Doorkeeper(tenants, self._keyring, allow_insecure_tcp=config.insecure_tcp)
        self._desk = Desk(
            config, limits, tenants, intake, self, Greeting(epoch=epoch, durable=durable), self._doorkeeper.tenant_of
        )
        self._waiting: dict[ClientSession, None] = {}
        self._nobody_waits = asyncio.Event()
        self._retry_timer: asyncio.TimerHandle | None = None
        self._retry_due_s = 0.0
        self._tick_timer: asyncio.TimerHandle | None = None
        self._flood_timer: asyncio.TimerHandle | None = None
        self._next_housekeeping_s = 0.0
        self._keys_error = ""
        self._open = False
        self._drain_scheduled = False
        self._rearm_scheduled = False
        self._draining_now = False
        self._discarding = False
        self._last_drain_s = 0.0
        self._flood_guard = flood.FloodGuard(flood.FLOOD_BYTES)
        self._socket_files: list[tuple[str, int]] = []
        self.endpoints: tuple[str, ...] = ()
        """What was bound, with the port where the configuration left it open."""
        self.num_sent = 0
        self.num_full = 0
        self.num_gone = 0
        self.num_missed_edges = 0
        self.num_discarded_frames = 0
        self.num_floods = 0

    # --- life --------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Bind all endpoints and begin to serve. Raises ConfigError or IngressError; then nothing is left bound."""
        addresses = plan(self._config)
        self._keyring.refresh()
        secret_key = read_secret_key(self._config.curve_secret_key_file) if self._config.curve_secret_key_file else ""
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        # The handler comes first: a connection that finds none is let in by nobody.
        self._zap = self._context.socket(zmq.REP)
        self._zap.linger = 0
        self._zap.bind(ZAP_ENDPOINT)
        self._router = self._context.socket(zmq.ROUTER)
        # Without the layer for tracked and routed frames, which costs more than the send itself; nine or twelve frames
        # go out per request.
        self._send: Callable[[bytes, int], object] = super(zmq.Socket, self._router).send
        try:
            self._set_options()
            self.endpoints = tuple(self._bind(address, secret_key) for address in addresses)
        except BaseException:
            self._router.close(0)
            self._zap.close(0)
            self._context.term()
            raise
        self._open = True
        self._router_fd = int(self._router.FD)
        self._zap_fd = int(self._zap.FD)
        self._router_poll = select.poll()
        self._router_poll.register(self._router_fd, select.POLLIN)
        self._loop.add_reader(self._zap_fd, self._on_zap)
        self._loop.add_reader(self._router_fd, self._on_readable)
        # What came before the reader was there has had its edge.
        self._drain_scheduled = True
        self._loop.call_soon(self._on_readable)
        self._loop.call_soon(self._on_zap)
        self._tick()
        self._watch_for_floods()
        _log.info("ingress_bound", endpoints=self.endpoints)

    def draining(self, deadline_ms: int) -> None:
        """Tell every client that the daemon stops: what runs may go on for `deadline_ms`.

        Connections are still accepted: libzmq's unbind would end those that were made through the endpoint.
        """
        self._desk.announce(Draining(deadline_ms=deadline_ms))

    async def close(self, grace_s: float = 1.0) -> None:
        """Send what waits in outboxes for at most `grace_s`, then close. Idempotent."""
        if not self._open:
            return
        if self._waiting:
            try:
                async with asyncio.timeout(grace_s):
                    await self._nobody_waits.wait()
            except TimeoutError:
                _log.info("outboxes_dropped", num_sessions=len(self._waiting))
        self._open = False
        self._loop.remove_reader(self._router_fd)
        self._loop.remove_reader(self._zap_fd)
        for timer in (self._tick_timer, self._retry_timer, self._flood_timer):
            if timer is not None:
                timer.cancel()
        for session in list(self._desk.sessions.values()):
            session.close("shutdown")
        self.endpoints = ()
        self._zap.close(0)
        self._router.close(LINGER_MS)
        # Waits for the linger at most.
        await asyncio.to_thread(self._context.term)
        for path, inode in self._socket_files:
            remove_socket(path, inode)
        self._socket_files.clear()

    def stats(self) -> dict[str, int]:
        """Counters since the start, and what there is now."""
        desk = self._desk.stats
        return {
            "num_received": desk.num_received,
            "num_malformed": desk.num_malformed,
            "num_unsupported": desk.num_unsupported,
            "num_refused": desk.num_refused + self._doorkeeper.num_refused,
            "num_closed": desk.num_closed,
            "num_expired": desk.num_expired,
            "num_sent": self.num_sent,
            "num_full": self.num_full,
            "num_gone": self.num_gone,
            "num_missed_edges": self.num_missed_edges,
            "num_discarded_frames": self.num_discarded_frames,
            "num_floods": self.num_floods,
            "num_sessions": len(self._desk.sessions),
            "num_waiting_for_room": len(self._waiting),
        }

    # --- binding -----------------------------------------------------------------------------------------------------

    def _set_options(self) -> None:
        heartbeat_ms = int(self._config.heartbeat_s * 1_000)
        for option, value in (
            (zmq.ROUTER_MANDATORY, 1),
            (zmq.ROUTER_HANDOVER, 0),
            (zmq.SNDHWM, PEER_PIPE_MESSAGES),
            (zmq.RCVHWM, RECEIVE_PIPE_MESSAGES),
            (zmq.MAXMSGSIZE, self._config.max_frame_bytes),
            (zmq.HEARTBEAT_IVL, heartbeat_ms),
            (zmq.HEARTBEAT_TIMEOUT, heartbeat_ms * HEARTBEATS_LOST),
            (zmq.HEARTBEAT_TTL, heartbeat_ms * HEARTBEATS_LOST),
            (zmq.HANDSHAKE_IVL, HANDSHAKE_MS),
            (zmq.BACKLOG, BACKLOG),
            (zmq.LINGER, LINGER_MS),
            # With a domain libzmq asks the handler for NULL peers too, and refuses ZMTP 1.0, which has no handshake.
            (zmq.ZAP_DOMAIN, DOMAIN),
        ):
            self._router.setsockopt(option, value)

    def _bind(self, address: Address, secret_key: str) -> str:
        if address.guard == "curve":
            try:
                self._router.curve_secretkey = secret_key.encode()
                self._router.curve_server = True
            except zmq.ZMQError as error:
                raise ConfigError(
                    f"the CURVE secret key cannot be used: {error}", remedy="see ingress.zmq.curve_secret_key_file"
                ) from error
        make_room(address)
        try:
            with socket_umask():
                self._router.bind(address.endpoint)
        except zmq.ZMQError as error:
            raise IngressError(
                f"cannot bind {address.endpoint}: {error}", remedy="is the address in use, or not allowed to this user?"
            ) from error
        if address.guard == "file":
            # libzmq leaves the file behind.
            self._socket_files.append((address.path, os.stat(address.path).st_ino))
        bound = self._router.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(bound, bytes), "libzmq names endpoints in bytes"
        return bound.rstrip(b"\0").decode()

    # --- receiving ---------------------------------------------------------------------------------------------------

    def _on_readable(self) -> None:
        self._drain_scheduled = False
        if not self._open:
            return
        now_s = self._loop.time()
        until_s = now_s + DRAIN_S
        self._draining_now = True
        try:
            for _ in range(DRAIN_MESSAGES):
                if not self._receive(now_s):
                    break
                now_s = self._loop.time()
                if now_s > until_s:
                    break
        finally:
            self._draining_now = False
            self._last_drain_s = now_s
            self._rearm()

    def _receive(self, now_s: float) -> bool:
        """Take one message. False: there is none."""
        router = self._router
        if self._discarding:
            self._discard()
            return True
        try:
            identity: bytes = router.recv(_NOBLOCK)
        except zmq.Again:
            return False
        # libzmq hands over whole messages: from here on the rest is there.
        session = self._desk.sessions.get(identity)
        if session is None:
            frame = router.recv(_NOBLOCK, copy=False)
            version = frame.bytes
            session = self._desk.admit(identity, _property(frame, "User-Id"), _property(frame, "Peer-Address"), now_s)
            if session is not None:
                session.descriptor = _descriptor(frame)
        else:
            version = router.recv(_NOBLOCK)
        if not router.getsockopt(_RCVMORE):
            if session is not None:
                self._desk.misframed(session, version, "1", now_s)
            return True
        payload: bytes = router.recv(_NOBLOCK)
        if router.getsockopt(_RCVMORE):
            self._discarding = True
            self._discard()
            if session is not None:
                self._desk.misframed(session, version, "more", now_s)
        elif session is not None:
            self._flood_guard.delivered(len(payload))
            self._desk.receive(session, version, payload, now_s)
        return True

    def _discard(self) -> None:
        """Read on in a message of too many frames, some at a time: it may have thousands."""
        for _ in range(DISCARD_FRAMES):
            self._router.recv(_NOBLOCK)
            self.num_discarded_frames += 1
            if not self._router.getsockopt(_RCVMORE):
                self._discarding = False
                return

    def _rearm(self) -> None:
        self._rearm_scheduled = False
        if self._open and not self._drain_scheduled and int(self._router.getsockopt(_EVENTS)) & _POLLIN:
            self._drain_scheduled = True
            self._loop.call_soon(self._on_readable)

    # --- sending (Link) ----------------------------------------------------------------------------------------------

    def transmit(self, identity: bytes, payload: bytes) -> Delivery:
        """Try to send one message, never wait."""
        if not self._open:
            return Delivery.GONE
        send = self._send
        try:
            # Only the first frame can fail: it finds the peer's pipe, and its room.
            send(identity, _MORE)
            send(VERSION, _MORE)
            send(payload, _NOBLOCK)
            self.num_sent += 1
            return Delivery.SENT
        except zmq.Again:
            self.num_full += 1
            return Delivery.FULL
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                _log.error("zmq_send_failed", error=str(error))
            self.num_gone += 1
            return Delivery.GONE
        finally:
            # A send, also a failed one, may have consumed the edge of a message that came in. One look per turn of the
            # loop is enough: it is made before the loop can sleep.
            if not self._rearm_scheduled and not self._draining_now:
                self._rearm_scheduled = True
                self._loop.call_soon(self._rearm)

    def await_room(self, session: ClientSession) -> None:
        """Try the session again soon. POLLOUT would only say that *some* peer has room, and spin for the one that
        has none: a timer with backoff per session it is."""
        session.wants_room = True
        if session not in self._waiting:
            session.retry_s = RETRY_MIN_S
            session.retry_at_s = self._loop.time() + RETRY_MIN_S
            self._waiting[session] = None
            self._nobody_waits.clear()
            self._schedule_retry(session.retry_at_s)

    def ended(self, session: ClientSession, reason: str) -> None:
        """A session closed itself; the daemon is told in the next turn, not from inside whatever was being sent."""
        self._waiting.pop(session, None)
        if self._desk.forget(session, reason):
            self._loop.call_soon(self._intake.gone, session)

    def _schedule_retry(self, due_s: float) -> None:
        if self._retry_timer is not None:
            if self._retry_due_s <= due_s:
                return
            self._retry_timer.cancel()
        self._retry_due_s = due_s
        self._retry_timer = self._loop.call_at(due_s, self._retry)

    def _retry(self) -> None:
        self._retry_timer = None
        now_s = self._loop.time()
        for session in list(self._waiting):
            if session.retry_at_s > now_s or session.closed:
                continue
            num_sent = self.num_sent
            session.wants_room = False
            if session.flush():
                self._intake.resume(session)
            if not (session.num_queued or session.wants_room):
                self._waiting.pop(session, None)
                continue
            session.retry_s = RETRY_MIN_S if self.num_sent > num_sent else min(session.retry_s * 2, RETRY_MAX_S)
            session.retry_at_s = now_s + session.retry_s
        if self._waiting:
            due_s = min(session.retry_at_s for session in self._waiting)
            self._schedule_retry(max(due_s, now_s + RETRY_S_PER_SESSION * len(self._waiting)))
        else:
            self._nobody_waits.set()

    # --- asides ------------------------------------------------------------------------------------------------------

    def _on_zap(self) -> None:
        if not self._open:
            return
        for _ in range(HANDSHAKES_AT_ONCE):
            if not int(self._zap.getsockopt(_EVENTS)) & _POLLIN:
                return
            self._zap.send_multipart(self._doorkeeper.answer(self._zap.recv_multipart(_NOBLOCK)), _NOBLOCK)
        self._loop.call_soon(self._on_zap)

    def _tick(self) -> None:
        """Safety net under the edges, and housekeeping. Reading EVENTS consumes an edge, so look at the descriptor
        first: data without an edge and without a recent drain is one that was missed."""
        self._tick_timer = self._loop.call_later(TICK_S, self._tick)
        now_s = self._loop.time()
        was_scheduled = self._drain_scheduled or bool(self._router_poll.poll(0))
        self._rearm()
        if self._drain_scheduled and not was_scheduled and now_s - self._last_drain_s > MISSED_AFTER_S:
            self.num_missed_edges += 1
            _log.warning("zmq_edge_missed", total=self.num_missed_edges)
        self._on_zap()
        if now_s >= self._next_housekeeping_s:
            self._next_housekeeping_s = now_s + HOUSEKEEPING_S
            self._desk.expire(now_s)
            self._look_at_keys()

    def _look_at_keys(self) -> None:
        revision = self._keyring.revision
        try:
            self._keyring.refresh()
            self._keys_error = ""
        except ConfigError as error:
            # Said once, not every second.
            if str(error) != self._keys_error:
                self._keys_error = str(error)
                _log.error("curve_keys_unreadable", error=str(error))
        if self._keyring.revision != revision:
            self._desk.close_revoked()

    def _watch_for_floods(self) -> None:
        now_s = self._loop.time()
        pause_s = flood.WATCH_S
        if self._flood_guard.is_flooded(flood.resident_bytes(), now_s):
            spared = frozenset(
                session.descriptor
                for session in self._desk.sessions.values()
                if session.descriptor is not None and now_s - session.last_heard_s < flood.LATELY_S
            )
            num_cut = self._flood_guard.cut_off(self.endpoints, spared)
            if num_cut:
                self.num_floods += 1
                _log.error("flood", why="memory grows without messages", num_cut_off=num_cut, num_spared=len(spared))
            pause_s = max(flood.LOOK_S, 10 * (self._loop.time() - now_s))
        self._flood_timer = self._loop.call_later(pause_s, self._watch_for_floods)


def _descriptor(frame: zmq.Frame) -> flood.Peer | None:
    """The connection that a frame came over. SRCFD is deprecated; without it nobody is spared for what it delivered."""
    try:
        return flood.peer_of(int(frame.get(zmq.SRCFD)))
    except zmq.ZMQError:
        return None


def _property(frame: zmq.Frame, name: str) -> str:
    """A property of the connection that a frame came over; "" where it has none."""
    try:
        value = frame.get(name)
    except zmq.ZMQError:
        return ""
    return value if isinstance(value, str) else ""


def _decode_z85(text: str) -> bytes:
    try:
        return z85.decode(text)
    except (KeyError, struct.error) as error:
        raise ValueError("not Z85") from error
