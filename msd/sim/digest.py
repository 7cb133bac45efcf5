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
        self._numbers = array("q")

    def add(self, *numbers: int) -> None:
        """Take in numbers of up to 63 bits."""
        self._numbers.extend(numbers)
        if len(self._numbers) >= _BUFFERED:
            self._flush()

    def _flush(self) -> None:
        if sys.byteorder == "big":
            self._numbers.byteswap()
        self._hash.update(self._numbers.tobytes())
        self._numbers = array("q")

    def hexdigest(self) -> str:
        """The fingerprint of everything added so far."""
        self._flush()
        return self._hash.hexdigest()
