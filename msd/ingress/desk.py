"""The front desk: who is connected, what they say, and whom in the daemon to ask. No socket, no clock of its own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Final, assert_never

import structlog
from msgspec import Struct, ValidationError

from msd import __version__, wire
from msd.config import LimitsConfig, TenantConfig, ZmqIngressConfig
from msd.ingress.sessions import ClientSession, Delivery, Link
from msd.ports import Intake

MAX_DELTA_CREDIT: Final = 65_536
MAX_REFUSED: Final = 1_024
"""Refused connections that are remembered, so that each hears its reason once."""
MAX_UNGREETED_S: Final = 60.0
"""A connection that never says hello is forgotten after this."""
PROBE_AFTER_S: Final = 30.0
"""A session that was silent this long is sent a Pong, which finds out whether its peer still exists."""
PROBES_AT_ONCE: Final = 64
EVICTION_PAUSE_S: Final = 1.0
"""A full table is searched for dead peers this often at most: the search costs a millisecond or two."""
NO_CREDIT_RETRY_MS: Final = 50
FULL_RETRY_MS: Final = 1_000
IDENTITY_BYTES: Final = 5
FEATURES: Final = ("cancel", "fetch", "resume")
_NOBODYS: Final = "this user is in no [[tenant]] of the daemon's configuration, or its key was revoked"

_log = structlog.get_logger()


class Greeting(Struct, frozen=True, kw_only=True):
    """What Welcome says about this run of the daemon."""

    epoch: str
    durable: bool


class DeskStats:
    """Plain counters, written by the desk and its socket."""

    __slots__ = ("num_closed", "num_expired", "num_malformed", "num_received", "num_refused", "num_unsupported")

    def __init__(self) -> None:
        self.num_received = 0
        self.num_malformed = 0
        self.num_unsupported = 0
        self.num_refused = 0
        self.num_closed = 0
        self.num_expired = 0


class Desk:
    """Sessions by routing identity, and the one place where client messages are decoded and answered or passed on."""

    def __init__(
        self,
        config: ZmqIngressConfig,
        limits: LimitsConfig,
        tenants: Iterable[TenantConfig],
        intake: Intake,
        link: Link,
        greeting: Greeting,
        tenant_of: Callable[[str], str],
    ) -> None:
        """`tenant_of`: whose a connection is, as of now, by its `User-Id`; "" = nobody's."""
        self.sessions: dict[bytes, ClientSession] = {}
        self.stats = DeskStats()
        self._config = config
        self._limits = limits
        self._may_act_as = frozenset(tenant.name for tenant in tenants if tenant.may_act_as)
        self._intake = intake
        self._link = link
        self._greeting = greeting
        self._tenant_of = tenant_of
        self._refused: OrderedDict[bytes, None] = OrderedDict()
        self._last_eviction_s = 0.0
        self._draining: wire.Draining | None = None
        self._welcome_limits = {
            "max_frame_bytes": config.max_frame_bytes,
            "max_prompt_bytes": wire.MAX_PROMPT_BYTES,
            "max_tokens": wire.MAX_TOKENS,
            "outbox_messages": limits.outbox_messages,
            "pending_delta_bytes": limits.pending_delta_bytes,
            "session_delta_bytes": limits.session_delta_bytes,
        }

    # --- connections -------------------------------------------------------------------------------------------------

    def admit(self, identity: bytes, user_id: str, peer: str, now_s: float) -> ClientSession | None:
        """Open a session for a connection that has none. None: refused, and told so."""
        if identity in self._refused:
            return None
        tenant = self._tenant_of(user_id)
        if len(identity) != IDENTITY_BYTES or identity[0]:
            self._refuse(identity, "forbidden", "the routing id is libzmq's to make: do not set one on the socket")
        elif not tenant:
            self._refuse(identity, "unauthenticated", _NOBODYS)
        elif len(self.sessions) >= self._config.max_sessions and not self._evict_silent(now_s):
            # Not remembered: there may be room the next time.
            self.stats.num_refused += 1
            text = f"{self._config.max_sessions} clients are connected, as many as ingress.zmq.max_sessions allows"
            self._tell(identity, wire.refusal("queue_full", text, retry_after_ms=FULL_RETRY_MS))
        else:
            session = ClientSession(
                self._link,
                identity,
                user_id,
                tenant,
                peer,
                max_outbox=self._limits.outbox_messages,
                max_unfinished=self._limits.submit_credit,
                now_s=now_s,
            )
            self.sessions[identity] = session
            return session
        return None

    def forget(self, session: ClientSession, reason: str) -> bool:
        """A session closed. True: it was known, so the daemon must be told."""
        if self.sessions.get(session.identity) is not session:
            return False
        del self.sessions[session.identity]
        self.stats.num_closed += 1
        _log.debug("session_closed", tenant=session.tenant, peer=session.peer, reason=reason)
        return True

    def announce(self, draining: wire.Draining) -> None:
        """To everybody who said hello, and to those who still will."""
        self._draining = draining
        for session in list(self.sessions.values()):
            if session.greeted:
                session.send(draining)

    def close_revoked(self) -> None:
        """End the sessions of connections that are no longer whose they were, whomever they act for.

        The connection itself stays: it is told why, and not listened to any more.
        """
        for session in list(self.sessions.values()):
            if self._tenant_of(session.user_id) != session.own_tenant:
                session.close("key_revoked")
                self._refuse(session.identity, "unauthenticated", _NOBODYS)

    def expire(self, now_s: float) -> None:
        """Forget who has been silent for too long; ask some of the silent whether they are still there."""
        num_probes = 0
        for session in list(self.sessions.values()):
            silent_s = now_s - session.last_heard_s
            if silent_s > (self._config.session_idle_s if session.greeted else MAX_UNGREETED_S):
                self.stats.num_expired += 1
                session.close("idle")
            elif now_s - session.last_contact_s > PROBE_AFTER_S and num_probes < PROBES_AT_ONCE:
                num_probes += 1
                self._probe(session, now_s)

    # --- messages ----------------------------------------------------------------------------------------------------

    def receive(self, session: ClientSession, version: bytes, payload: bytes, now_s: float) -> None:
        """Handle the two frames of one message. Never raises for what a client sent."""
        self.stats.num_received += 1
        session.last_heard_s = now_s
        if version != wire.VERSION:
            self._unsupported(session)
            return
        try:
            message = wire.decode_client(payload)
        except wire.FieldError as error:
            self._undecodable(session, payload, "invalid_field", str(error))
        except ValidationError as error:
            self._undecodable(session, payload, "invalid_field", str(error))
        except wire.DECODE_ERRORS as error:
            self._undecodable(session, payload, "malformed", f"not a msgpack map: {error}")
        else:
            if session.greeted or isinstance(message, wire.Hello):
                self._handle(session, message, now_s)
            else:
                self._ungreeted(session, message)

    def misframed(self, session: ClientSession, version: bytes, what: str, now_s: float) -> None:
        """A message had the wrong number of frames."""
        self.stats.num_received += 1
        session.last_heard_s = now_s
        if version != wire.VERSION:
            self._unsupported(session)
            return
        self.stats.num_malformed += 1
        session.send(wire.refusal("malformed", f"expected 2 frames, [msd1][msgpack map], got {what}"))

    def _handle(self, session: ClientSession, message: wire.ClientMessage, now_s: float) -> None:
        match message:
            case wire.Submit():
                if session.count_submit(message.client_request_id):
                    self._intake.submit(message, session)
                else:
                    text = f"this connection has {self._limits.submit_credit} unfinished requests, as many as it may"
                    session.send(
                        wire.refusal(
                            "no_credit",
                            text,
                            client_request_id=message.client_request_id,
                            retry_after_ms=NO_CREDIT_RETRY_MS,
                        )
                    )
            case wire.Credit():
                if session.grant(message.add, at_most=MAX_DELTA_CREDIT):
                    self._intake.resume(session)
            case wire.Acked():
                self._intake.acknowledge(session, message.request_ids)
            case wire.Cancel():
                self._intake.cancel(session, message.request_id, message.client_request_id)
            case wire.Status():
                self._intake.status(session, message.request_id, message.client_request_id)
            case wire.Fetch():
                self._intake.fetch(session, message.request_ids, message.since_seq, message.max_bytes)
            case wire.Ping():
                session.send(wire.Pong(n=message.n, epoch=self._greeting.epoch))
            case wire.Hello():
                self._greet(session, message)
            case wire.Feedback():
                session.send(
                    wire.refusal(
                        "invalid_field",
                        "feedback is not taken: it is not among the features of Welcome - at `$.t`",
                        request_id=message.request_id,
                    )
                )
            case _:
                assert_never(message)

    def _greet(self, session: ClientSession, hello: wire.Hello) -> None:
        if hello.tenant is not None and hello.tenant != session.tenant:
            if session.greeted or session.own_tenant not in self._may_act_as:
                session.send(
                    wire.refusal("forbidden", f"tenant {session.own_tenant!r} may not act as another - at `$.tenant`")
                )
                return
            session.tenant = hello.tenant
        resumed = session.greet(hello.delta_credit, at_most=MAX_DELTA_CREDIT)
        session.send(
            wire.Welcome(
                server=f"msd {__version__}",
                epoch=self._greeting.epoch,
                tenant=session.tenant,
                limits=self._welcome_limits,
                durable=self._greeting.durable,
                submit_credit=session.submit_credit,
                features=FEATURES,
            )
        )
        if self._draining is not None:
            session.send(self._draining)
        if resumed:
            self._intake.resume(session)
        for resume in hello.resume:
            self._intake.follow(session, resume.request_id, resume.attempt, resume.index)

    def _ungreeted(self, session: ClientSession, message: wire.ClientMessage) -> None:
        client_request_id = message.client_request_id if isinstance(message, wire.Submit) else None
        text = f"{wire.HELLO_FIRST}: this connection has no session - at `$.t`"
        session.send(wire.refusal("invalid_field", text, client_request_id=client_request_id))

    def _undecodable(self, session: ClientSession, payload: bytes, code: wire.ErrorCode, message: str) -> None:
        self.stats.num_malformed += 1
        client_request_id = wire.client_request_id_of(payload)
        if client_request_id is not None:
            # The client counts it as a submit, and the Error as its end: so does the session.
            session.count_submit(client_request_id)
        session.send(wire.refusal(code, message, client_request_id=client_request_id))

    def _unsupported(self, session: ClientSession) -> None:
        self.stats.num_unsupported += 1
        if not session.told_version:
            session.told_version = True
            session.send(_unsupported_version())

    # --- refusing and probing ----------------------------------------------------------------------------------------

    def _refuse(self, identity: bytes, code: wire.ErrorCode, message: str) -> None:
        self.stats.num_refused += 1
        self._refused[identity] = None
        if len(self._refused) > MAX_REFUSED:
            self._refused.popitem(last=False)
        self._tell(identity, wire.refusal(code, message))

    def _tell(self, identity: bytes, message: wire.ServerMessage) -> Delivery:
        return self._link.transmit(identity, wire.encode(message))

    def _probe(self, session: ClientSession, now_s: float) -> None:
        session.last_probed_s = now_s
        if self._tell(session.identity, wire.Pong(n=0, epoch=self._greeting.epoch)) is Delivery.GONE:
            session.close("gone")

    def _evict_silent(self, now_s: float) -> bool:
        """The table is full: look for peers that are gone among those silent the longest. True: there is room."""
        if now_s - self._last_eviction_s > EVICTION_PAUSE_S:
            self._last_eviction_s = now_s
            for session in sorted(self.sessions.values(), key=_last_contact_s)[:PROBES_AT_ONCE]:
                self._probe(session, now_s)
        return len(self.sessions) < self._config.max_sessions


def _last_contact_s(session: ClientSession) -> float:
    return session.last_contact_s


def _unsupported_version() -> wire.Error:
    return wire.Error(
        code="unsupported_version",
        message="the first frame names no version that this daemon speaks",
        retryable=False,
        supported=(wire.VERSION.decode(),),
    )
