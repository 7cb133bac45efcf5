"""The Session port: the same promises over a link in memory and over a real socket."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import pytest

from msd import wire
from msd.config import LimitsConfig, ZmqIngressConfig
from msd.ingress.sessions import RETRY_MAX_S, ClientSession, Delivery
from tests.contract.front_door import Producer, open_door

MAX_OUTBOX = 20
MAX_UNFINISHED = 3
PIPE_MESSAGES = 10


class MemoryLink:
    """A peer in memory: a pipe of PIPE_MESSAGES, which the test reads when it likes."""

    def __init__(self) -> None:
        self.pipe: list[wire.ServerMessage] = []
        self.is_there = True
        self.endings: list[str] = []

    def transmit(self, identity: bytes, payload: bytes) -> Delivery:
        if not self.is_there:
            return Delivery.GONE
        if len(self.pipe) >= PIPE_MESSAGES:
            return Delivery.FULL
        self.pipe.append(wire.decode_server(payload))
        return Delivery.SENT

    def await_room(self, session: ClientSession) -> None:
        # As after many tries.
        session.retry_s = RETRY_MAX_S

    def ended(self, session: ClientSession, reason: str) -> None:
        self.endings.append(reason)


class Peer:
    """A session with its far end: `do` runs on the session's side, `read` on the client's."""

    def __init__(
        self,
        session: ClientSession,
        do: Callable[[Callable[[], object]], object],
        read: Callable[[], list[wire.ServerMessage]],
        vanish: Callable[[], None],
    ) -> None:
        self.session = session
        self.do = do
        self.read = read
        self.vanish = vanish

    def send(self, message: wire.ServerMessage) -> None:
        self.do(lambda: self.session.send(message))

    def send_delta(self, index: int) -> bool:
        delta = wire.Delta(request_id="r", attempt=1, index=index, token_ids=(index,), text="x" * 100)
        return bool(self.do(lambda: self.session.send_delta(delta)))

    def read_until(self, count: int) -> list[wire.ServerMessage]:
        """Read until this many have come; what waits on the session's side follows on its own."""
        messages: list[wire.ServerMessage] = []
        for _ in range(200):
            messages += self.read()
            if len(messages) >= count:
                break
        return messages


@contextmanager
def memory_peer(tmp_path: Path, delta_credit: int) -> Iterator[Peer]:
    link = MemoryLink()
    session = ClientSession(
        link, b"\0abcd", "tenant:t", "t", "memory", max_outbox=MAX_OUTBOX, max_unfinished=MAX_UNFINISHED, now_s=0.0
    )
    session.greet(delta_credit, at_most=65_536)

    def read() -> list[wire.ServerMessage]:
        messages, link.pipe = link.pipe, []
        session.flush()
        return messages

    def vanish() -> None:
        link.is_there = False

    yield Peer(session, lambda function: function(), read, vanish)


@contextmanager
def socket_peer(tmp_path: Path, delta_credit: int) -> Iterator[Peer]:
    limits = LimitsConfig(outbox_messages=MAX_OUTBOX, submit_credit=MAX_UNFINISHED)
    config = ZmqIngressConfig(endpoints=(f"ipc://{tmp_path}/s.sock",))
    with open_door(config, limits=limits) as door:
        hello = wire.Hello(client="test", delta_credit=delta_credit)
        # Few messages in its own pipe, so that a client that does not read is soon felt.
        producer = Producer(door.endpoint, hello=hello, rcvhwm=1)
        try:
            (session,) = door.call(lambda: list(door.ingress._desk.sessions.values()))

            def read() -> list[wire.ServerMessage]:
                message = producer.poll(0.2)
                return [] if message is None else [message]

            yield Peer(session, door.call, read, producer.close)
        finally:
            if not producer.socket.closed:
                producer.close()


OPENERS = [memory_peer, socket_peer]
Opener = Callable[[Path, int], AbstractContextManager[Peer]]


@pytest.fixture(params=OPENERS, ids=["memory", "socket"])
def opener(request: pytest.FixtureRequest) -> Opener:
    chosen: Opener = request.param
    return chosen


def pongs(count: int) -> list[wire.ServerMessage]:
    return [wire.Pong(n=n, epoch="x" * 10) for n in range(count)]


def test_messages_arrive_in_order(opener: Opener, tmp_path: Path) -> None:
    with opener(tmp_path, 5) as peer:
        for message in pongs(5):
            peer.send(message)
        assert peer.send_delta(0)
        received = peer.read_until(6)
        assert received[:5] == pongs(5)
        assert isinstance(received[5], wire.Delta)


def test_deltas_stop_without_credit_and_control_messages_do_not(opener: Opener, tmp_path: Path) -> None:
    with opener(tmp_path, 2) as peer:
        assert [peer.send_delta(n) for n in range(4)] == [True, True, False, False]
        peer.send(pongs(1)[0])
        assert [type(message).__name__ for message in peer.read_until(3)] == ["Delta", "Delta", "Pong"]
        assert peer.do(lambda: peer.session.grant(1, at_most=10)), "a Delta was refused: egress is to be resumed"
        assert peer.send_delta(2)
        assert not peer.do(lambda: peer.session.grant(1, at_most=10)), "none was refused since"


def test_credit_has_a_bound(opener: Opener, tmp_path: Path) -> None:
    with opener(tmp_path, 0) as peer:
        peer.do(lambda: peer.session.grant(100, at_most=3))
        assert [peer.send_delta(n) for n in range(4)] == [True, True, True, False]


def counted(peer: Peer, *names: str) -> list[bool]:
    return [bool(peer.do(partial(peer.session.count_submit, name))) for name in names]


def a_done(name: str) -> wire.Done:
    return wire.Done(
        request_id=f"r-{name}",
        client_request_id=name,
        attempt=1,
        finish_reason="stop",
        mode="m",
        decision_id="d",
        usage=wire.Usage(prompt=1, cached=0, completion=1),
        timings=wire.TimingFields(queue_ms=0, ttft_ms=0, tpot_ms=0, engine_ms=0, e2e_ms=0),
    )


def a_repeat(name: str) -> wire.Ack:
    return wire.Ack(
        client_request_id=name,
        request_id=f"r-{name}",
        seq=0,
        duplicate=True,
        state="running",
        durable=False,
        submit_credit=0,
    )


def test_submit_credit_comes_back_with_answers(opener: Opener, tmp_path: Path) -> None:
    with opener(tmp_path, 0) as peer:
        session = peer.session
        assert session.submit_credit == MAX_UNFINISHED
        assert counted(peer, "a", "b", "c", "d") == [True] * MAX_UNFINISHED + [False]
        peer.send(wire.refusal("no_credit", "wait", client_request_id="d"))
        assert session.submit_credit == MAX_UNFINISHED + 1
        peer.send(wire.refusal("not_found", "of a cancel", client_request_id="a"))
        peer.send(wire.refusal("malformed", "of nothing"))
        assert session.submit_credit == MAX_UNFINISHED + 1
        assert counted(peer, "e") == [False]


def test_only_answers_to_submits_of_this_connection_give_credit_back(opener: Opener, tmp_path: Path) -> None:
    with opener(tmp_path, 0) as peer:
        assert counted(peer, "a", "b", "c") == [True] * 3
        # Of a resumed request; of a cancel that came too late; of a stored failure; a repeat of another connection's.
        for message in (a_done("resumed"), wire.refusal("dead_letter", "lost", client_request_id="old"), a_repeat("x")):
            peer.send(message)
        assert peer.session.submit_credit == MAX_UNFINISHED
        assert counted(peer, "d") == [False]
        peer.send(wire.refusal("no_credit", "wait", client_request_id="d"))
        peer.send(a_done("a"))
        assert peer.session.submit_credit == MAX_UNFINISHED + 2
        # Answered once more, as a cancel of a finished request is.
        peer.send(a_done("a"))
        assert peer.session.submit_credit == MAX_UNFINISHED + 2
        assert counted(peer, "e", "f") == [True, False]


def test_a_repeat_on_the_same_connection_spends_and_gives_back_its_own_credit(opener: Opener, tmp_path: Path) -> None:
    with opener(tmp_path, 0) as peer:
        assert counted(peer, "a", "a") == [True] * 2
        peer.send(a_repeat("a"))
        assert peer.session.submit_credit == MAX_UNFINISHED + 1
        peer.send(a_done("a"))
        assert peer.session.submit_credit == MAX_UNFINISHED + 2
        # The first one came on another connection: its end does not count here.
        assert counted(peer, "b") == [True]
        peer.send(a_repeat("b"))
        peer.send(a_done("b"))
        assert peer.session.submit_credit == MAX_UNFINISHED + 3
        assert counted(peer, "c", "d", "e", "f") == [True] * 3 + [False]


def test_a_client_that_does_not_read_is_closed_when_its_outbox_is_full(opener: Opener, tmp_path: Path) -> None:
    with opener(tmp_path, 0) as peer:
        # On a socket the kernel's buffers and two pipes come before the outbox.
        big = wire.Pong(n=1, epoch="x" * 50_000)
        for _ in range(MAX_OUTBOX + 500):
            peer.send(big)
            if peer.session.closed:
                break
        assert peer.session.closed
        assert peer.session.num_queued == 0, "a closed session holds nothing"
        peer.send(big)
        assert not peer.send_delta(0)


def test_what_waits_in_the_outbox_follows_in_order_when_the_client_reads(opener: Opener, tmp_path: Path) -> None:
    with opener(tmp_path, 5) as peer:
        num_sent = 0
        while peer.session.num_queued < MAX_OUTBOX // 2:
            peer.send(wire.Pong(n=num_sent, epoch="x" * 50_000))
            num_sent += 1
        assert not peer.send_delta(0), "a Delta never overtakes control messages"
        received = peer.read_until(num_sent)
        assert [message.n for message in received if isinstance(message, wire.Pong)] == list(range(num_sent))
        assert not peer.session.closed


def test_a_client_that_vanished_is_noticed_and_costs_nothing(opener: Opener, tmp_path: Path) -> None:
    with opener(tmp_path, 1_000) as peer:
        peer.vanish()
        for n in range(2_000):
            if not peer.send_delta(n) and peer.session.closed:
                break
            peer.send(pongs(1)[0])
        assert peer.session.closed
