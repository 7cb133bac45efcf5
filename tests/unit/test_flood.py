"""The flood guard's decision, and that it hits nobody's descriptors but its own peers'."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from msd.ingress.flood import (
    BYTES_PER_DELIVERED,
    MAX_STRIKES,
    WINDOW_S,
    FloodGuard,
    peer_of,
    resident_bytes,
    shut_down,
)

LIMIT = 1_000


def test_growth_without_messages_is_a_flood() -> None:
    guard = FloodGuard(LIMIT)
    assert not guard.is_flooded(10_000, 0.0)
    assert not guard.is_flooded(11_000, 0.1)
    assert guard.is_flooded(11_001, 0.2)
    assert guard.is_flooded(11_001, 0.3), "until somebody was shut down"
    assert not guard.is_flooded(11_001, 20.0), "what stays is the new size"


def test_growth_that_messages_explain_is_none() -> None:
    guard = FloodGuard(LIMIT)
    guard.is_flooded(10_000, 0.0)
    guard.delivered(1_000)
    assert not guard.is_flooded(10_000 + 1_000 * BYTES_PER_DELIVERED, 0.1)
    assert guard.is_flooded(10_000 + 2_001 + 1_000 * BYTES_PER_DELIVERED, 0.2)


def test_slow_growth_is_none() -> None:
    guard = FloodGuard(LIMIT)
    assert not any(guard.is_flooded(10_000 + 50 * n, n * WINDOW_S / 10) for n in range(200))


def test_the_size_of_the_process_is_read() -> None:
    assert 1_000_000 < resident_bytes() < 100_000_000_000


def connect(path: Path, listener: socket.socket) -> tuple[socket.socket, socket.socket]:
    """Client and accepted end of a connection."""
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(5.0)
    client.connect(str(path))
    return client, listener.accept()[0]


@pytest.fixture
def listeners(tmp_path: Path) -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.socket(socket.AF_UNIX) as ours, socket.socket(socket.AF_UNIX) as theirs:
        for listener, name in ((ours, "ours"), (theirs, "theirs")):
            listener.bind(str(tmp_path / name))
            listener.listen()
        yield ours, theirs


def test_only_our_own_peers_that_send_and_deliver_nothing_are_cut_off(
    tmp_path: Path, listeners: tuple[socket.socket, socket.socket]
) -> None:
    guard = FloodGuard(LIMIT)
    flooder, busy, idle = (connect(tmp_path / "ours", listeners[0]) for _ in range(3))
    stranger = connect(tmp_path / "theirs", listeners[1])
    everybody = (flooder, busy, idle, stranger)
    try:
        for client, _ in (flooder, busy, stranger):
            client.send(b"x" * 100)
        spared = peer_of(busy[1].fileno())
        assert spared is not None
        endpoints = [f"ipc://{tmp_path}/ours", "tcp://127.0.0.1:1"]
        num_before = len(os.listdir("/proc/self/fd"))
        assert [guard.cut_off(endpoints, frozenset((spared,))) for _ in range(MAX_STRIKES)] == [0] * (
            MAX_STRIKES - 1
        ) + [1]
        assert len(os.listdir("/proc/self/fd")) == num_before
        assert flooder[0].recv(1) == b"", "it was hung up on"
        for client, server in (busy, idle, stranger):
            server.send(b"y")
            assert client.recv(1) == b"y"
    finally:
        for client, server in everybody:
            client.close()
            server.close()


def test_a_delivered_message_takes_the_strikes_back(
    tmp_path: Path, listeners: tuple[socket.socket, socket.socket]
) -> None:
    guard = FloodGuard(LIMIT)
    client, server = connect(tmp_path / "ours", listeners[0])
    with client, server:
        client.send(b"x")
        peer = peer_of(server.fileno())
        assert peer is not None
        endpoints = [f"ipc://{tmp_path}/ours"]
        for _ in range(5):
            assert guard.cut_off(endpoints, frozenset()) == 0
            assert guard.cut_off(endpoints, frozenset((peer,))) == 0


def test_a_descriptor_that_has_become_anothers_is_left_alone() -> None:
    one, other = socket.socketpair()
    with one, other:
        shut_down((one.fileno(), 0))
        one.send(b"x")
        assert other.recv(1) == b"x"
    assert peer_of(2**20) is None
