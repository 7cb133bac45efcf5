"""A guard against messages that never end.

libzmq collects a whole multipart message before it delivers any of it, and nothing bounds that: one raw peer grew the
process by 300 MB in 0.8 s, and no message of it was ever readable. So the process's own size is watched. When it grows
by more than delivered messages explain, each connection is looked at: one that delivers nothing, and yet has bytes
under way at look after look, is shut down. An engine that starts makes the process grow as well; then no connection is
like that, and none is touched.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import sys
import termios
from collections import deque
from collections.abc import Iterable
from typing import Final

FLOOD_BYTES: Final = 256 * 1024 * 1024
WINDOW_S: Final = 10.0
BYTES_PER_DELIVERED: Final = 16
"""A delivered byte may become this many: token ids of 3 bytes are integers of 32, with a pointer of 8."""
WATCH_S: Final = 0.025
LOOK_S: Final = 0.003
"""Between looks at the connections, while the process has grown too much; ten times a look's cost if that is more."""
LATELY_S: Final = 0.05
"""Who delivered a message within this time is not in the middle of an endless one, or has only begun it."""
MAX_STRIKES: Final = 5
"""Looks at which a connection had unread bytes and had delivered nothing. One may be chance: a message that just came
in, a heartbeat."""
Peer = tuple[int, int]
"""A connection of this process: descriptor and inode."""
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


class FloodGuard:
    """Decides when the process grows by more than what was delivered. Sizes in bytes, times in seconds."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._num_delivered_bytes = 0
        self._samples: deque[tuple[float, int]] = deque()
        self._strikes: dict[Peer, int] = {}

    def delivered(self, num_bytes: int) -> None:
        """A message of this size was read."""
        self._num_delivered_bytes += num_bytes

    def is_flooded(self, resident_bytes: int, now_s: float) -> bool:
        """Whether the least size within the window is exceeded by more than the limit."""
        unexplained = resident_bytes - BYTES_PER_DELIVERED * self._num_delivered_bytes
        while self._samples and self._samples[0][0] < now_s - WINDOW_S:
            self._samples.popleft()
        least = min((size for _, size in self._samples), default=unexplained)
        if unexplained - least > self._limit_bytes:
            return True
        self._samples.append((now_s, unexplained))
        self._strikes.clear()
        return False

    def cut_off(self, endpoints: Iterable[str], spared: frozenset[Peer]) -> int:
        """Look at the connections that were accepted on `endpoints`, but for the spared, who delivered something
        lately; shut down those with enough strikes. Returns how many.
        """
        num_cut = 0
        for peer in accepted_peers(endpoints):
            if peer in spared:
                self._strikes.pop(peer, None)
            elif num_unread_bytes(peer):
                self._strikes[peer] = self._strikes.get(peer, 0) + 1
                if self._strikes[peer] >= MAX_STRIKES:
                    shut_down(peer)
                    num_cut += 1
        if num_cut:
            # Count anew: memory that a flood has taken is used again by the next one.
            self._samples.clear()
            self._strikes.clear()
        return num_cut


def resident_bytes() -> int:
    """The size of this process in memory."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * _PAGE_BYTES


def peer_of(fd: int) -> Peer | None:
    """A descriptor with its inode, which tells it from a later one of the same number; None when it is closed."""
    try:
        return fd, os.fstat(fd).st_ino
    except OSError:
        return None


def accepted_peers(endpoints: Iterable[str]) -> list[Peer]:
    """This process's connections that were accepted on `endpoints`, known by their own addresses.

    The descriptors are libzmq's, which says of no silent connection what its descriptor is.
    """
    ours = frozenset(_address(endpoint) for endpoint in endpoints)
    peers: list[Peer] = []
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        try:
            status = os.fstat(fd)
            if not stat.S_ISSOCK(status.st_mode):
                continue
            with socket.socket(fileno=os.dup(fd)) as duplicate:
                is_listening = duplicate.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                if not is_listening and _own_address(duplicate) in ours:
                    peers.append((fd, status.st_ino))
        except OSError:
            # Closed since it was listed.
            continue
    return peers


def num_unread_bytes(peer: Peer) -> int:
    """Bytes that have come in on a connection and that libzmq has not taken yet."""
    try:
        unread = fcntl.ioctl(peer[0], termios.FIONREAD, bytes(4))
    except OSError:
        return 0
    return int.from_bytes(unread, sys.byteorder)


def shut_down(peer: Peer) -> None:
    """Hang up, through a duplicate, unless the descriptor has become another's. libzmq then forgets the connection."""
    try:
        with socket.socket(fileno=os.dup(peer[0])) as duplicate:
            if os.fstat(duplicate.fileno()).st_ino == peer[1]:
                duplicate.shutdown(socket.SHUT_RDWR)
    except OSError:
        # It is gone: that was the aim.
        return


def _address(endpoint: str) -> str | int:
    """What distinguishes an endpoint's accepted sockets: the path, or the port."""
    scheme, _, rest = endpoint.partition("://")
    return rest if scheme == "ipc" else int(rest.rpartition(":")[2])


def _own_address(peer: socket.socket) -> str | int | None:
    name: object = peer.getsockname()
    match name:
        case str():
            return name
        case (_, int() as port, *_) if peer.family in (socket.AF_INET, socket.AF_INET6):
            return port
        case _:
            return None
