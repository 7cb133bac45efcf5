"""Shared prefixes without the producer's help: what each engine's prefix cache likely holds, by hashes of token blocks.

A prompt is cut into blocks of BLOCK_TOKENS; the hash of a block covers all blocks before it, so that equal hashes mean
equal prefixes. The index guesses each cache as vLLM manages its own: blocks least recently used go first, and of one
prompt its tail before its head. Hence what is held of a prompt is always its beginning, and a search for its end is
enough. One dict names the modes that hold a first block: a prompt that shares nothing costs one look-up.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from msd.domain import Mode

BLOCK_TOKENS = 16
"""vLLM's block on a GPU. Its CPU backend takes larger ones; what it reports corrects the guess."""
MAX_BLOCKS = 1_024
"""Of one prompt; what lies beyond 16,384 tokens is taken as not shared."""
MAX_BLOCKS_PER_MODE = 65_536
"""Some 12 MB of memory a mode; larger caches are guessed at this size."""

_TRUST_ALPHA = 0.1
_LEAST_TRUST = 1 / 64


def hash_blocks(token_ids: tuple[int, ...]) -> tuple[int, ...]:
    """Chained hashes of the full blocks of a prompt, first block first; 30 us at 1,400 tokens.

    Python's hash of a tuple of integers: the same in every process (only str and bytes are salted), twice as fast here
    as crc32 over packed bytes. A collision costs a wrong guess, nothing else.
    """
    chained = 0
    hashes = []
    for begin in range(0, min(len(token_ids) // BLOCK_TOKENS, MAX_BLOCKS) * BLOCK_TOKENS, BLOCK_TOKENS):
        chained = hash((chained, token_ids[begin : begin + BLOCK_TOKENS]))
        hashes.append(chained)
    return tuple(hashes)


class PrefixIndex:
    """Guesses, per mode, the blocks in its prefix cache. Modes without one are never looked at."""

    def __init__(self, modes: Sequence[Mode]) -> None:
        self._caches = [mode.prefix_caching for mode in modes]
        self._capacity_blocks = [0] * len(modes)
        # Not a plain dict: taking its oldest item is slow after many were taken (it walks over their empty places).
        self._held: list[OrderedDict[int, None]] = [OrderedDict() for _ in modes]
        """Per mode its blocks, least recently used first."""
        self._modes_of: dict[int, int] = {}
        """First block of a prompt -> bit set of the modes that hold it."""
        self._trust = [1.0] * len(modes)
        """Share of a guess that the engine confirms."""
        self._num_anonymous = 0

    def started(self, i: int, kv_capacity_tokens: int) -> None:
        """The mode's engine came up: its cache is empty, its size is known."""
        self.forget(i)
        if self._caches[i]:
            self._capacity_blocks[i] = min(kv_capacity_tokens // BLOCK_TOKENS, MAX_BLOCKS_PER_MODE)

    def forget(self, i: int) -> None:
        """The mode's cache is gone, with its engine or because it sleeps."""
        held, self._held[i] = self._held[i], OrderedDict()
        for block in held.keys() & self._modes_of.keys():
            self._release(block, 1 << i)

    def cached(self, hashes: tuple[int, ...], num_prompt_tokens: int) -> tuple[int, ...] | None:
        """Tokens of the prompt that each mode's cache likely holds, in whole blocks; None when no mode holds any."""
        if not hashes:
            return None
        modes = self._modes_of.get(hashes[0], 0)
        # An engine always computes the last token itself: that is where the first new one comes from.
        most = min((num_prompt_tokens - 1) // BLOCK_TOKENS, len(hashes))
        if not modes or not most:
            return None
        found = [0] * len(self._held)
        while modes:
            lowest = modes & -modes
            modes ^= lowest
            i = lowest.bit_length() - 1
            found[i] = max(1, int(self._num_held(i, hashes, most) * self._trust[i])) * BLOCK_TOKENS
        return tuple(found)

    def computed(self, i: int, hashes: tuple[int, ...]) -> None:
        """The mode has computed this prompt: its blocks are in the cache, and were used just now."""
        if not self._capacity_blocks[i] or not hashes:
            return
        held = self._held[i]
        num_held = self._num_held(i, hashes, len(hashes))
        held.update(dict.fromkeys(reversed(hashes[num_held:])))
        for block in reversed(hashes[:num_held]):
            held.move_to_end(block)
        if not num_held:
            self._modes_of[hashes[0]] = self._modes_of.get(hashes[0], 0) | 1 << i
        self._make_room(i)

    def generated(self, i: int, num_tokens: int) -> None:
        """The mode has generated so many tokens of one request: they take room, though nobody knows their hashes."""
        if not self._capacity_blocks[i]:
            return
        held = self._held[i]
        for _ in range(num_tokens // BLOCK_TOKENS):
            self._num_anonymous += 1
            held[self._num_anonymous] = None
        self._make_room(i)

    def reported(self, i: int, guessed_tokens: int, num_cached_tokens: int) -> None:
        """The engine says how much it really had of a prompt of which it was guessed to have some."""
        right = num_cached_tokens / guessed_tokens
        trust = self._trust[i] * (1.0 + _TRUST_ALPHA * (right - 1.0))
        self._trust[i] = min(1.0, max(_LEAST_TRUST, trust))

    def num_blocks(self, i: int) -> int:
        """Blocks that the mode's cache is thought to hold."""
        return len(self._held[i])

    def _num_held(self, i: int, hashes: tuple[int, ...], most: int) -> int:
        """How many of the first `most` blocks the mode holds: all before the first that it does not."""
        held = self._held[i]
        if hashes[0] not in held:
            return 0
        least, beyond = 1, most + 1
        while beyond - least > 1:
            middle = (least + beyond) // 2
            if hashes[middle - 1] in held:
                least = middle
            else:
                beyond = middle
        return least

    def _make_room(self, i: int) -> None:
        held, modes_of = self._held[i], self._modes_of
        for _ in range(len(held) - self._capacity_blocks[i]):
            oldest, _ = held.popitem(last=False)
            if oldest in modes_of:
                self._release(oldest, 1 << i)

    def _release(self, block: int, bit: int) -> None:
        modes = self._modes_of[block] & ~bit
        if modes:
            self._modes_of[block] = modes
        else:
            del self._modes_of[block]
