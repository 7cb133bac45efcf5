"""The fingerprint of a run: BLAKE2 over integers (times in us, energies in mJ, numbers of requests and modes)."""

from __future__ import annotations

import hashlib
import sys
from array import array

_BUFFERED = 8_192


class Digest:
    """Equal for two runs that did the same things at the same times; no floats, no hashes, no addresses go in."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self.numbers: list[int] = []
        """What comes next, each of up to 63 bits; append here, and call `flush` now and then."""

    def flush(self) -> None:
        """Digest the numbers once they are many."""
        if len(self.numbers) >= _BUFFERED:
            self._take()

    def _take(self) -> None:
        numbers = array("q", self.numbers)
        if sys.byteorder == "big":
            numbers.byteswap()
        self._hash.update(numbers.tobytes())
        self.numbers.clear()

    def hexdigest(self) -> str:
        """The fingerprint of everything added so far."""
        self._take()
        return self._hash.hexdigest()
