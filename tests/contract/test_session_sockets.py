"""The ZeroMQ ingress on real sockets: edges, bounds, who may connect, and bytes that are no messages."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import msgspec
import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from msd import wire
from msd.config import LimitsConfig, TenantConfig, ZmqIngressConfig
from msd.errors import ConfigError, IngressError, MsdError
from msd.ingress import flood
from msd.ingress.zap import KEY_CHARS, MAX_FAILED_READS, Keyring
from tests.contract.front_door import HELLO, TIMEOUT_S, Door, Producer, open_door


def new_uvloop() -> asyncio.AbstractEventLoop:
    uvloop = pytest.importorskip("uvloop")
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


LOOPS: list[Callable[[], asyncio.AbstractEventLoop]] = [asyncio.new_event_loop, new_uvloop]


@pytest.fixture(params=LOOPS, ids=["asyncio", "uvloop"])
def new_loop(request: pytest.FixtureRequest) -> Callable[[], asyncio.AbstractEventLoop]:
    chosen: Callable[[], asyncio.AbstractEventLoop] = request.param
    return chosen


@pytest.fixture
def config(tmp_path: Path) -> ZmqIngressConfig:
    return ZmqIngressConfig(endpoints=(f"ipc://{tmp_path}/msd.sock",))


@pytest.fixture
def door(config: ZmqIngressConfig) -> Iterator[Door]:
    with open_door(config) as opened:
        yield opened


def a_submit(name: str, *, stream: bool = False, max_tokens: int = 8) -> wire.Submit:
    return wire.Submit(client_request_id=name, max_tokens=max_tokens, prompt="hello", stream=stream)


def assert_served(door: Door, name: str = "honest") -> None:
    """An honest client gets its answer."""
    with Producer(door.endpoint) as producer:
        producer.send(a_submit(name))
        assert producer.until(wire.Done).client_request_id == name


def expect_error(producer: Producer, code: str) -> wire.Error:
    error = producer.until(wire.Error)
    assert error.code == code, error
    return error


# --- edges -----------------------------------------------------------------------------------------------------------


def test_no_edge_is_missed_at_a_small_window(
    config: ZmqIngressConfig, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """Answers go out in later turns than the drain. Without the look at EVENTS after sends, this stalls for good."""
    num_requests, window = 20_000, 8
    with open_door(config, new_loop=new_loop) as door, Producer(door.endpoint) as producer:
        payloads = [wire.encode(a_submit(f"{n}")) for n in range(num_requests)]
        num_sent = num_done = 0
        while num_done < num_requests:
            while num_sent < num_requests and num_sent - num_done < window:
                producer.send_frames(wire.VERSION, payloads[num_sent])
                num_sent += 1
            assert producer.socket.poll(5_000), f"stalled after {num_done} answers"
            num_done += b"\xa4done" in producer.socket.recv_multipart()[1][:8]
        assert door.stats()["num_missed_edges"] == 0


def test_messages_that_come_in_between_turns_are_all_read(door: Door) -> None:
    """More than one drain takes, from several clients at once."""
    num_each = 600
    with Producer(door.endpoint) as first, Producer(door.endpoint) as second:
        for n in range(num_each):
            first.send(a_submit(f"a{n}"))
            second.send(a_submit(f"b{n}"))
        for producer in (first, second):
            names = {producer.until(wire.Done).client_request_id for _ in range(num_each)}
            assert len(names) == num_each


# --- sessions --------------------------------------------------------------------------------------------------------


def test_nothing_is_served_without_hello(door: Door) -> None:
    with Producer(door.endpoint, hello=None) as producer:
        producer.send(a_submit("a"))
        error = expect_error(producer, "invalid_field")
        assert error.message.startswith(wire.HELLO_FIRST)
        assert error.client_request_id == "a"
        producer.send(wire.Hello(client="late"))
        assert producer.until(wire.Welcome).tenant == "local"
        producer.send(a_submit("a"))
        assert producer.until(wire.Done).client_request_id == "a"


def test_welcome_says_what_holds(door: Door) -> None:
    with Producer(door.endpoint) as producer:
        welcome = producer.welcome
        assert welcome is not None
        assert (welcome.epoch, welcome.durable, welcome.submit_credit) == ("7f", False, 4_096)
        assert welcome.limits["max_frame_bytes"] == 4 * 1024 * 1024


def test_more_submits_than_credit_are_refused_and_the_rest_served(config: ZmqIngressConfig) -> None:
    with open_door(config, limits=LimitsConfig(submit_credit=3)) as door, Producer(door.endpoint) as producer:
        door.house.hold = True
        for n in range(5):
            producer.send(a_submit(f"{n}"))
        refused = [expect_error(producer, "no_credit") for _ in range(2)]
        assert [error.client_request_id for error in refused] == ["3", "4"]
        assert all(error.retry_after_ms for error in refused)
        door.call(door.house.release)
        assert {producer.until(wire.Done).client_request_id for _ in range(3)} == {"0", "1", "2"}
        producer.send(a_submit("5"))
        assert producer.until(wire.Ack).submit_credit == 3 + 5
        assert producer.until(wire.Done).client_request_id == "5"


def test_a_repeat_in_flight_runs_once_and_another_body_is_a_conflict(door: Door) -> None:
    door.house.hold = True
    with Producer(door.endpoint) as first, Producer(door.endpoint) as second:
        first.send(a_submit("a"))
        request_id = first.until(wire.Ack).request_id
        second.send(a_submit("a"))
        again = second.until(wire.Ack)
        assert (again.request_id, again.duplicate) == (request_id, True)
        second.send(a_submit("a", max_tokens=9))
        expect_error(second, "idempotency_conflict")
        door.call(door.house.release)
        assert first.until(wire.Done).text == second.until(wire.Done).text
        assert door.house.num_executions == 1
        second.send(a_submit("a"))
        assert second.until(wire.Done).request_id == request_id


def test_sessions_are_bounded_and_the_dead_make_room(tmp_path: Path) -> None:
    config = ZmqIngressConfig(endpoints=(f"ipc://{tmp_path}/msd.sock",), max_sessions=3)
    with open_door(config) as door:
        producers = [Producer(door.endpoint) for _ in range(3)]
        with Producer(door.endpoint, hello=None) as late:
            late.send(wire.Hello(client="late"))
            error = expect_error(late, "queue_full")
            assert error.retry_after_ms
            producers.pop().close()
            until_s = time.monotonic() + TIMEOUT_S
            welcome: wire.ServerMessage | None = None
            while not isinstance(welcome, wire.Welcome) and time.monotonic() < until_s:
                time.sleep(0.3)
                late.send(wire.Hello(client="late"))
                welcome = late.receive()
            assert isinstance(welcome, wire.Welcome)
        for producer in producers:
            producer.close()


def test_silent_sessions_are_forgotten(tmp_path: Path) -> None:
    config = ZmqIngressConfig(endpoints=(f"ipc://{tmp_path}/msd.sock",), session_idle_s=0.1)
    with open_door(config) as door, Producer(door.endpoint) as producer:
        until_s = time.monotonic() + TIMEOUT_S
        while door.stats()["num_sessions"] and time.monotonic() < until_s:
            time.sleep(0.05)
        assert door.stats()["num_expired"] == 1
        producer.send(wire.Ping(n=1))
        assert expect_error(producer, "invalid_field").message.startswith(wire.HELLO_FIRST)


def test_a_refusal_of_a_frame_of_4_mb_is_small(door: Door) -> None:
    with Producer(door.endpoint) as producer:
        for fields in ({"client_request_id": "x" * 4_000_000}, {"client_request_id": "a", "y" * 4_000_000: 1}):
            producer.send_frames(wire.VERSION, msgspec.msgpack.encode({"t": "submit", "max_tokens": 1, **fields}))
            assert producer.socket.poll(5_000)
            assert len(b"".join(producer.socket.recv_multipart())) < 1_000


def test_draining_is_told_to_everybody(door: Door) -> None:
    with Producer(door.endpoint) as producer:
        door.call(lambda: door.ingress.draining(1_500))
        assert producer.until(wire.Draining).deadline_ms == 1_500
    with Producer(door.endpoint) as late:
        assert late.until(wire.Draining).deadline_ms == 1_500


# --- readers ---------------------------------------------------------------------------------------------------------


def test_a_client_that_never_reads_delays_nobody(config: ZmqIngressConfig) -> None:
    num_tokens, num_deaf = 20_000, 20
    with open_door(config) as door:
        door.house.num_tokens, door.house.piece_tokens = num_tokens, 200
        hello = wire.Hello(client="deaf", delta_credit=65_536)
        with Producer(door.endpoint, hello=hello, rcvhwm=1) as deaf:
            for n in range(num_deaf):
                deaf.send(a_submit(f"deaf{n}", stream=True))
            with Producer(door.endpoint) as honest:
                honest.send(a_submit("honest", stream=True))
                num_read = 0
                while not isinstance(message := honest.receive(), wire.Done):
                    num_read += len(message.token_ids) if isinstance(message, wire.Delta) else 0
                    honest.send(wire.Credit(add=1))
                assert len(message.token_ids or ()) == num_tokens if message.detached else num_read == num_tokens
            until_s = time.monotonic() + TIMEOUT_S
            while len(door.house.results) < num_deaf + 1 and time.monotonic() < until_s:
                time.sleep(0.05)
            assert len(door.house.results) == num_deaf + 1, "requests finish whether anybody reads or not"
            assert door.house.egress.num_detached > 0


def test_a_client_that_vanishes_mid_stream_is_noticed_and_its_request_goes_on(door: Door) -> None:
    door.house.num_tokens, door.house.pause_s = 100, 0.01
    with Producer(door.endpoint) as producer:
        producer.send(a_submit("a", stream=True))
        request_id = producer.until(wire.Delta).request_id
    with Producer(door.endpoint) as back:
        back.send(wire.Hello(client="back", resume=(wire.Resume(request_id=request_id, attempt=1, index=1),)))
        first = back.until(wire.Delta)
        assert first.index == 1
        assert back.until(wire.Done).finish_reason == "length"
    assert door.stats()["num_gone"] >= 1
    assert len(door.house.gone_sessions) >= 1


# --- frames ----------------------------------------------------------------------------------------------------------


def test_another_version_is_told_once(door: Door) -> None:
    with Producer(door.endpoint) as producer:
        for version in (b"msd9", b"", b"\x00" * 100, b"GET / HTTP/1.1"):
            producer.send_frames(version, wire.encode(wire.Ping(n=1)))
        producer.send(wire.Ping(n=2))
        error = expect_error(producer, "unsupported_version")
        assert error.supported == ("msd1",)
        assert producer.receive() == wire.Pong(n=2, epoch="7f")


@pytest.mark.parametrize("frames", [1, 3, 4, 10_000])
def test_wrong_frame_counts_get_one_error_and_the_next_message_is_served(door: Door, frames: int) -> None:
    with Producer(door.endpoint) as producer:
        producer.send_frames(*[wire.VERSION] * frames)
        producer.send(wire.Ping(n=1))
        expect_error(producer, "malformed")
        assert producer.receive() == wire.Pong(n=1, epoch="7f")
    assert_served(door)


def test_a_frame_that_is_too_large_drops_its_connection_only(tmp_path: Path) -> None:
    config = ZmqIngressConfig(endpoints=(f"ipc://{tmp_path}/msd.sock",), max_frame_bytes=10_000)
    with open_door(config) as door, Producer(door.endpoint) as producer, Producer(door.endpoint) as other:
        producer.send_frames(wire.VERSION, b"x" * 100_000)
        assert producer.poll(0.3) is None
        # libzmq reconnects the offender; its session is gone with the connection.
        producer.send(wire.Hello(client="again"))
        assert isinstance(producer.receive(), wire.Welcome)
        other.send(wire.Ping(n=1))
        assert other.receive() == wire.Pong(n=1, epoch="7f")


def test_a_routing_id_of_ones_own_is_refused(door: Door) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.setsockopt(zmq.ROUTING_ID, b"boss!")
        dealer.connect(door.endpoint)
        for _ in range(3):
            dealer.send_multipart([wire.VERSION, wire.encode(wire.Hello(client="x"))])
        assert dealer.poll(5_000)
        error = wire.decode_server(dealer.recv_multipart()[1])
        assert isinstance(error, wire.Error)
        assert error.code == "forbidden"
        assert not dealer.poll(200), "told once"
    assert_served(door)


# --- raw connections -------------------------------------------------------------------------------------------------

GREETING_3 = b"\xff" + b"\x00" * 8 + b"\x7f" + b"\x03\x01" + b"NULL".ljust(20, b"\x00") + b"\x00" + b"\x00" * 31


def raw_connection(door: Door) -> socket.socket:
    raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    raw.settimeout(2.0)
    raw.connect(door.endpoint.removeprefix("ipc://"))
    return raw


def receive_until(raw: socket.socket, word: bytes) -> bytes:
    received = b""
    while word not in received:
        chunk = raw.recv(4_096)
        assert chunk, f"closed before {word!r}: {received!r}"
        received += chunk
    return received


def test_random_bytes_on_raw_connections_bring_no_message_through(door: Door) -> None:
    generator = Random(7)
    for n in range(200):
        with raw_connection(door) as raw:
            # Every other one begins like a peer of an old protocol: those got through without a ZAP domain.
            head = bytes((generator.randrange(1, 20), 0)) if n % 2 else b""
            try:
                raw.sendall(head + generator.randbytes(generator.randrange(1, 200)))
            except OSError:
                continue
    assert_served(door)
    assert door.stats()["num_received"] == 2, "the honest client's own"


def test_a_peer_of_zmtp_1_is_refused(door: Door) -> None:
    with raw_connection(door) as raw:
        # An anonymous identity, then a message of two frames, as ZMTP 1.0 has them.
        payload = wire.encode(wire.Hello(client="old"))
        raw.sendall(b"\x01\x00" + b"\x05\x01msd1" + bytes([len(payload) + 1, 0]) + payload)
        received = b""
        try:
            while chunk := raw.recv(1_000):
                received += chunk
        except (TimeoutError, ConnectionResetError):
            pass
        assert b"welcome" not in received
    assert door.stats()["num_received"] == 0


def test_a_peer_cannot_give_itself_a_tenant(config: ZmqIngressConfig) -> None:
    """READY may carry any properties, also those that the daemon reads; libzmq keeps the handler's word."""
    tenants = (TenantConfig(name="rich", uids=(4_000_000_000,)), TenantConfig(name="me", uids=(os.getuid(),)))
    lies = (property_of(b"User-Id", b"rich"), property_of(b"Peer-Address", b"localhost:4000000000:0:1"))
    with open_door(config, tenants=tenants) as door, zmtp_connection(door, *lies) as raw:
        raw.sendall(zmtp_message(wire.Hello(client="liar")))
        received = receive_until(raw, b"welcome")
        assert b"\xa6tenant\xa2me" in received
        assert b"rich" not in received


def property_of(name: bytes, value: bytes) -> bytes:
    return bytes([len(name)]) + name + struct.pack(">I", len(value)) + value


def zmtp_connection(door: Door, *properties: bytes) -> socket.socket:
    """A hand-made peer of ZMTP 3 that has shaken hands."""
    raw = raw_connection(door)
    ready = b"\x05READY" + property_of(b"Socket-Type", b"DEALER") + b"".join(properties)
    raw.sendall(GREETING_3 + b"\x04" + bytes([len(ready)]) + ready)
    receive_until(raw, b"READY")
    return raw


def zmtp_message(message: wire.ClientMessage) -> bytes:
    payload = wire.encode(message)
    return b"\x01\x04msd1" + b"\x00" + bytes([len(payload)]) + payload


def test_a_message_without_end_is_cut_off_and_honest_clients_are_served(
    config: ZmqIngressConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the use of libzmq's descriptors, too: SRCFD is deprecated."""
    limit_bytes = 64 * 1024 * 1024
    monkeypatch.setattr(flood, "FLOOD_BYTES", limit_bytes)
    with open_door(config) as door, Producer(door.endpoint) as busy, Producer(door.endpoint) as idle:
        descriptors = door.call(lambda: [session.descriptor for session in door.ingress._desk.sessions.values()])
        assert len(set(descriptors)) == 2
        assert None not in descriptors
        frame = b"\x03" + struct.pack(">Q", 65_536) + bytes(65_536)
        num_sent = 0
        with zmtp_connection(door) as raw:
            raw.sendall(zmtp_message(wire.Hello(client="flood")))
            receive_until(raw, b"welcome")
            try:
                while num_sent < 16 * limit_bytes:
                    raw.sendall(frame)
                    num_sent += len(frame)
                    if num_sent % (100 * len(frame)) == 0:
                        busy.send(wire.Ping(n=1))
            except OSError:
                # Cut off: that is the outcome.
                pass
        assert num_sent < 16 * limit_bytes
        assert door.stats()["num_floods"] == 1
        for producer in (busy, idle):
            producer.send(wire.Ping(n=2))
            while producer.receive() != wire.Pong(n=2, epoch="7f"):
                pass
        assert_served(door)


def test_half_open_handshakes_hold_nobody_up(door: Door) -> None:
    raws = [raw_connection(door) for _ in range(50)]
    for raw in raws:
        raw.sendall(GREETING_3[:20])
    assert_served(door)
    for raw in raws:
        raw.close()


# --- who may connect -------------------------------------------------------------------------------------------------


def test_a_user_in_no_tenant_is_told_so_once(config: ZmqIngressConfig) -> None:
    with open_door(config, tenants=(TenantConfig(name="others", uids=(4_000_000_000,)),)) as door:
        with Producer(door.endpoint, hello=None) as producer:
            for _ in range(3):
                producer.send(wire.Hello(client="x"))
            expect_error(producer, "unauthenticated")
            assert producer.poll(0.2) is None
        assert door.stats()["num_sessions"] == 0


def test_tenants_come_from_user_ids_and_may_act_only_if_allowed(config: ZmqIngressConfig) -> None:
    me = os.getuid()
    with open_door(config, tenants=(TenantConfig(name="team", uids=(me,)),)) as door:
        with Producer(door.endpoint) as producer:
            assert producer.welcome is not None
            assert producer.welcome.tenant == "team"
        with Producer(door.endpoint, hello=None) as producer:
            producer.send(wire.Hello(client="x", tenant="other"))
            expect_error(producer, "forbidden")
    proxy = TenantConfig(name="proxy", uids=(me,), may_act_as=True)
    other = wire.Hello(client="x", tenant="other")
    with open_door(config, tenants=(proxy,)) as door, Producer(door.endpoint, hello=other) as producer:
        assert producer.welcome is not None
        assert producer.welcome.tenant == "other"


def test_tenants_see_nothing_of_each_other(config: ZmqIngressConfig) -> None:
    tenants = (TenantConfig(name="proxy", uids=(os.getuid(),), may_act_as=True),)
    with open_door(config, tenants=tenants) as door:
        ours, theirs = wire.Hello(client="x", tenant="a"), wire.Hello(client="x", tenant="b")
        with Producer(door.endpoint, hello=ours) as us, Producer(door.endpoint, hello=theirs) as them:
            us.send(a_submit("one"))
            request_id = us.until(wire.Done).request_id
            them.send(wire.Status(request_id=request_id))
            expect_error(them, "not_found")
            them.send(wire.Cancel(client_request_id="one"))
            expect_error(them, "not_found")
            them.send(wire.Fetch(request_ids=(request_id,)))
            assert them.until(wire.Results).items == ()


@contextmanager
def curve_config(folder: Path, clients: dict[str, bytes]) -> Iterator[tuple[ZmqIngressConfig, bytes]]:
    public, secret = zmq.curve_keypair()
    keys = folder / "keys"
    keys.mkdir()
    for name, key in clients.items():
        (keys / f"{name}.key").write_text(key.decode() + "\n")
    secret_file = folder / "secret"
    secret_file.write_bytes(secret)
    secret_file.chmod(0o600)
    yield (
        ZmqIngressConfig(
            endpoints=("tcp://127.0.0.1:*", f"ipc://{folder}/msd.sock"),
            curve_secret_key_file=str(secret_file),
            curve_keys_dir=str(keys),
        ),
        public,
    )


def curve_dealer(
    context: zmq.Context[zmq.Socket[bytes]], endpoint: str, server: bytes, keys: tuple[bytes, bytes]
) -> zmq.Socket[bytes]:
    dealer = context.socket(zmq.DEALER)
    dealer.linger = 0
    dealer.curve_serverkey = server
    dealer.curve_publickey, dealer.curve_secretkey = keys
    dealer.connect(endpoint)
    return dealer


def test_curve_lets_known_keys_in_as_their_tenant_and_nobody_else(tmp_path: Path) -> None:
    friend, stranger = zmq.curve_keypair(), zmq.curve_keypair()
    with curve_config(tmp_path, {"friends": friend[0]}) as (config, server), open_door(config) as door:
        endpoint = next(endpoint for endpoint in door.ingress.endpoints if endpoint.startswith("tcp"))
        hello = [wire.VERSION, wire.encode(wire.Hello(client="x"))]
        with zmq.Context() as context:
            with curve_dealer(context, endpoint, server, friend) as dealer:
                dealer.send_multipart(hello)
                assert dealer.poll(5_000)
                welcome = wire.decode_server(dealer.recv_multipart()[1])
                assert isinstance(welcome, wire.Welcome)
                assert welcome.tenant == "friends"
            with curve_dealer(context, endpoint, server, stranger) as dealer:
                dealer.send_multipart(hello)
                assert not dealer.poll(500)
            # the right key for another server; no CURVE at all
            with curve_dealer(context, endpoint, stranger[0], friend) as dealer:
                dealer.send_multipart(hello)
                assert not dealer.poll(300)
            with context.socket(zmq.DEALER) as dealer:
                dealer.linger = 0
                dealer.connect(endpoint)
                dealer.send_multipart(hello)
                assert not dealer.poll(300)
        with Producer(next(e for e in door.ingress.endpoints if e.startswith("ipc"))) as producer:
            assert producer.welcome is not None
            assert producer.welcome.tenant == "local"
        assert door.stats()["num_refused"] >= 1


@contextmanager
def curve_producer(door: Door, server: bytes, keys: tuple[bytes, bytes], hello: wire.Hello) -> Iterator[Producer]:
    """A raw producer over tcp with its key, welcomed."""
    endpoint = next(endpoint for endpoint in door.ingress.endpoints if endpoint.startswith("tcp"))
    with Producer(endpoint, hello=hello, curve=(server, *keys)) as producer:
        yield producer


def assert_shut_out(door: Door, producer: Producer) -> None:
    """The connection is told so once, unasked, and not listened to any more."""
    assert "revoked" in expect_error(producer, "unauthenticated").message
    num_received, num_executions = door.stats()["num_received"], door.house.num_executions
    for message in (HELLO, a_submit("after"), wire.Status(), wire.Fetch(since_seq=0)):
        producer.send(message)
    assert producer.poll(0.3) is None
    assert (door.stats()["num_received"], door.house.num_executions) == (num_received, num_executions)


def test_a_revoked_key_shuts_its_connection_out_and_an_added_one_lets_in(tmp_path: Path) -> None:
    first, second = zmq.curve_keypair(), zmq.curve_keypair()
    with (
        curve_config(tmp_path, {"first": first[0]}) as (config, server),
        open_door(config) as door,
        curve_producer(door, server, first, HELLO) as producer,
    ):
        (tmp_path / "keys" / "first.key").unlink()
        (tmp_path / "keys" / "second.key").write_bytes(second[0])
        assert_shut_out(door, producer)
        with curve_producer(door, server, second, HELLO) as other:
            assert other.welcome is not None
            assert other.welcome.tenant == "second"


def test_a_replaced_key_shuts_out_who_has_the_old_one(tmp_path: Path) -> None:
    old, new = zmq.curve_keypair(), zmq.curve_keypair()
    with (
        curve_config(tmp_path, {"team": old[0]}) as (config, server),
        open_door(config) as door,
        curve_producer(door, server, old, HELLO) as producer,
    ):
        (tmp_path / "keys" / "team.key").write_bytes(new[0])
        assert_shut_out(door, producer)
        with curve_producer(door, server, new, HELLO) as other:
            assert other.welcome is not None
            assert other.welcome.tenant == "team"


def test_who_acts_for_another_is_shut_out_with_its_own_key_only(tmp_path: Path) -> None:
    proxy, other = zmq.curve_keypair(), zmq.curve_keypair()
    tenants = (TenantConfig(name="proxy", may_act_as=True),)
    acting = wire.Hello(client="x", tenant="other")
    with (
        curve_config(tmp_path, {"proxy": proxy[0], "other": other[0]}) as (config, server),
        open_door(config, tenants=tenants) as door,
        curve_producer(door, server, proxy, acting) as producer,
    ):
        assert producer.welcome is not None
        assert producer.welcome.tenant == "other"
        (tmp_path / "keys" / "other.key").unlink()
        time.sleep(1.5)
        producer.send(wire.Ping(n=1))
        assert isinstance(producer.receive(), wire.Pong), "its own key is still good"
        (tmp_path / "keys" / "proxy.key").unlink()
        assert_shut_out(door, producer)


@pytest.mark.parametrize("spoil", ["a bad file", "a file that leads nowhere", "no folder"])
def test_what_cannot_be_read_keeps_no_revoked_key_valid(tmp_path: Path, spoil: str) -> None:
    good, revoked = zmq.curve_keypair(), zmq.curve_keypair()
    keys = tmp_path / "keys"
    with (
        curve_config(tmp_path, {"good": good[0], "revoked": revoked[0]}) as (config, server),
        open_door(config) as door,
        curve_producer(door, server, good, HELLO) as honest,
        curve_producer(door, server, revoked, HELLO) as producer,
    ):
        match spoil:
            case "a bad file":
                (keys / "aa.key").write_text("this is no key")
                (keys / "revoked.key").unlink()
            case "a file that leads nowhere":
                (keys / "aa.key").symlink_to(tmp_path / "nowhere")
                (keys / "revoked.key").unlink()
            case _:
                keys.rename(tmp_path / "elsewhere")
        assert_shut_out(door, producer)
        if spoil == "no folder":
            assert_shut_out(door, honest)
            (tmp_path / "elsewhere").rename(keys)
            time.sleep(1.5)
        else:
            honest.send(wire.Ping(n=1))
            assert isinstance(honest.receive(), wire.Pong)
        with curve_producer(door, server, good, HELLO) as again:
            assert again.welcome is not None
            assert again.welcome.tenant == "good"


def test_a_machine_short_of_descriptors_keeps_the_keys_for_a_while_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "team.key").write_text("x" * KEY_CHARS)
    keyring = Keyring(str(tmp_path), str.encode)
    keyring.refresh()
    key, revision = b"x" * KEY_CHARS, keyring.revision
    assert keyring.tenant_of(key) == "team"

    def scandir(_: object) -> None:
        raise OSError(errno.EMFILE, "too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", scandir)
        for _ in range(MAX_FAILED_READS - 1):
            with pytest.raises(ConfigError):
                keyring.refresh()
        assert (keyring.tenant_of(key), keyring.revision) == ("team", revision)
        with pytest.raises(ConfigError):
            keyring.refresh()
        assert keyring.tenant_of(key) is None
        assert keyring.revision > revision
    keyring.refresh()
    assert keyring.tenant_of(key) == "team"


def test_insecure_tcp_serves_loopback_as_local(tmp_path: Path) -> None:
    with open_door(ZmqIngressConfig(endpoints=("tcp://127.0.0.1:*",), insecure_tcp=True)) as door:
        assert_served(door)


def test_a_peer_that_finds_no_key_hears_that_it_is_not_authenticated(tmp_path: Path) -> None:
    stranger = zmq.curve_keypair()
    with curve_config(tmp_path, {}) as (config, server), open_door(config) as door, zmq.Context() as context:
        endpoint = next(endpoint for endpoint in door.ingress.endpoints if endpoint.startswith("tcp"))
        dealer = context.socket(zmq.DEALER)
        dealer.linger = 0
        monitor = dealer.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
        dealer.curve_serverkey = server
        dealer.curve_publickey, dealer.curve_secretkey = stranger
        dealer.connect(endpoint)
        assert monitor.poll(5_000)
        assert recv_monitor_message(monitor)["value"] == 400
        dealer.disable_monitor()
        monitor.close(0)
        dealer.close(0)


# --- binding ---------------------------------------------------------------------------------------------------------


def start(config: ZmqIngressConfig) -> None:
    with open_door(config):
        pass


def test_the_socket_and_its_folder_are_closed_to_others(tmp_path: Path) -> None:
    path = tmp_path / "new" / "msd.sock"
    before = os.umask(0o022)
    try:
        with open_door(ZmqIngressConfig(endpoints=(f"ipc://{path}",))):
            assert stat.S_IMODE(path.stat().st_mode) == 0o660
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o750
        assert os.umask(0o022) == 0o022, "the umask is as it was"
    finally:
        os.umask(before)
    assert not path.exists()


def test_the_socket_of_a_dead_daemon_is_replaced_and_that_of_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "msd.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(path))
    config = ZmqIngressConfig(endpoints=(f"ipc://{path}",))
    with open_door(config) as door:
        with pytest.raises(IngressError, match="another daemon"):
            start(config)
        assert_served(door)


def test_what_is_not_a_socket_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "msd.sock"
    path.write_text("precious")
    with pytest.raises(IngressError, match="no socket"):
        start(ZmqIngressConfig(endpoints=(f"ipc://{path}",)))
    assert path.read_text() == "precious"


@pytest.mark.parametrize(
    ("config", "error"),
    [
        (ZmqIngressConfig(endpoints=("tcp://127.0.0.1:0",)), ConfigError),
        (ZmqIngressConfig(endpoints=("tcp://0.0.0.0:0",), insecure_tcp=True), ConfigError),
        (ZmqIngressConfig(endpoints=("tcp://*:0",), insecure_tcp=True), ConfigError),
        (ZmqIngressConfig(endpoints=("tcp://127.0.0.1:0",), curve_secret_key_file="/nonexistent"), ConfigError),
        (
            ZmqIngressConfig(
                endpoints=("tcp://127.0.0.1:0",), curve_secret_key_file="/nonexistent", curve_keys_dir="/nonexistent"
            ),
            ConfigError,
        ),
        (ZmqIngressConfig(endpoints=("ipc://relative/path",)), ConfigError),
        (ZmqIngressConfig(endpoints=("ipc:///" + "x" * 120,)), ConfigError),
        (ZmqIngressConfig(endpoints=("inproc://x",)), ConfigError),
        (ZmqIngressConfig(endpoints=("ipc:///proc/nowhere/msd.sock",)), IngressError),
        (ZmqIngressConfig(endpoints=("tcp://127.0.0.1:99999",), insecure_tcp=True), ConfigError),
        (ZmqIngressConfig(endpoints=("tcp://127.0.0.1",), insecure_tcp=True), ConfigError),
        (ZmqIngressConfig(endpoints=("tcp://127.0.0.1:1",) * 2, insecure_tcp=True), IngressError),
    ],
)
def test_what_cannot_be_bound_is_refused_with_a_remedy(config: ZmqIngressConfig, error: type[MsdError]) -> None:
    with pytest.raises(error) as caught:
        start(config)
    assert caught.value.remedy


def test_a_secret_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    with curve_config(tmp_path, {}) as (config, _):
        (tmp_path / "secret").chmod(0o644)
        with pytest.raises(ConfigError, match="others than its owner"):
            start(config)


def test_several_ingresses_leave_no_threads_behind(config: ZmqIngressConfig) -> None:
    num_before = threading.active_count()
    for _ in range(3):
        start(config)
    assert threading.active_count() == num_before
