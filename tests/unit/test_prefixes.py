"""Hashes of token blocks, and the guess of what each engine's prefix cache holds."""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict
from random import Random

from msd.core.prefixes import BLOCK_TOKENS, MAX_BLOCKS, PrefixIndex, hash_blocks
from msd.domain import Mode


def tokens(num: int, seed: int = 0) -> tuple[int, ...]:
    rng = Random(seed)
    return tuple(rng.randrange(100_000) for _ in range(num))


def an_index(*capacities: int) -> PrefixIndex:
    """Modes with prefix caching whose caches take so many blocks."""
    index = PrefixIndex(
        [Mode(name=f"m{i}", engine=f"m{i}", model="m", prefix_caching=True) for i in range(len(capacities))]
    )
    for i, capacity in enumerate(capacities):
        index.started(i, capacity * BLOCK_TOKENS)
    return index


def cached(index: PrefixIndex, prompt: tuple[int, ...]) -> tuple[int, ...] | None:
    return index.cached(hash_blocks(prompt), len(prompt))


# --- hashes ----------------------------------------------------------------------------------------------------------


def test_only_full_blocks_have_a_hash() -> None:
    assert [len(hash_blocks(tokens(num))) for num in (0, 1, 15, 16, 31, 32, 1_400)] == [0, 0, 0, 1, 1, 2, 87]


def test_a_hash_covers_all_that_comes_before() -> None:
    prompt = tokens(160)
    for changed in (0, 40, 159):
        other = (*prompt[:changed], prompt[changed] + 1, *prompt[changed + 1 :])
        same = [a == b for a, b in zip(hash_blocks(prompt), hash_blocks(other), strict=True)]
        assert same == [i < changed // BLOCK_TOKENS for i in range(10)]
    swapped = prompt[16:32] + prompt[:16]
    assert not set(hash_blocks(prompt)) & set(hash_blocks(swapped))


def test_hashes_are_the_same_in_every_process() -> None:
    code = "from msd.core.prefixes import hash_blocks; print(hash_blocks(tuple(range(64))))"
    told = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert told == {str(hash_blocks(tuple(range(64))))}


def test_the_number_of_blocks_is_bounded() -> None:
    assert len(hash_blocks(tuple(range(40_000)))) == MAX_BLOCKS


# --- the index -------------------------------------------------------------------------------------------------------


def test_a_prompt_that_shares_nothing_is_held_nowhere() -> None:
    index = an_index(100, 100)
    index.computed(0, hash_blocks(tokens(320)))
    assert cached(index, tokens(320, seed=1)) is None
    assert cached(index, tokens(10)) is None


def test_what_was_computed_is_held_by_that_mode_up_to_where_prompts_part() -> None:
    index = an_index(100, 100)
    head = tokens(100)
    index.computed(1, hash_blocks(head + tokens(100, seed=1)))
    assert cached(index, head + tokens(100, seed=2)) == (0, 96)
    index.computed(0, hash_blocks(head[:50]))
    assert cached(index, head + tokens(100, seed=2)) == (48, 96)


def test_an_engine_always_computes_the_last_token_itself() -> None:
    index = an_index(100)
    prompt = tokens(160)
    index.computed(0, hash_blocks(prompt))
    assert cached(index, prompt) == (144,)
    assert cached(index, (*prompt, 1)) == (160,)
    assert cached(index, prompt[:16]) is None


def test_modes_without_prefix_caching_hold_nothing() -> None:
    index = PrefixIndex([Mode(name="m", engine="m", model="m")])
    index.started(0, 10_000)
    index.computed(0, hash_blocks(tokens(160)))
    index.generated(0, 1_000)
    assert cached(index, tokens(160)) is None
    assert index.num_blocks(0) == 0


def test_the_tail_of_the_prompt_used_least_recently_goes_first() -> None:
    index = an_index(20)
    old, new = tokens(160), tokens(240, seed=1)
    index.computed(0, hash_blocks(old))
    index.computed(0, hash_blocks(new))
    assert index.num_blocks(0) == 20
    assert cached(index, (*old, 1)) == (80,)
    assert cached(index, (*new, 1)) == (240,)
    # Its beginning was used again: the others' tail goes now.
    index.computed(0, hash_blocks(old[:80]))
    index.computed(0, hash_blocks(tokens(80, seed=2)))
    assert cached(index, (*old, 1)) == (80,)
    assert cached(index, (*new, 1)) == (160,)


def test_output_takes_room_too() -> None:
    index = an_index(20)
    prompt = tokens(160)
    index.computed(0, hash_blocks(prompt))
    index.generated(0, 15 * BLOCK_TOKENS + 3)
    assert index.num_blocks(0) == 20
    assert cached(index, (*prompt, 1)) == (80,)


def test_what_a_lost_or_restarted_engine_held_is_forgotten_but_not_what_others_hold() -> None:
    index = an_index(100, 100)
    prompt = tokens(160)
    for restarts in (False, True):
        index.computed(0, hash_blocks(prompt))
        index.computed(1, hash_blocks(prompt[:80]))
        assert cached(index, (*prompt, 1)) == (160, 80)
        index.started(0, 1_600) if restarts else index.forget(0)
        assert cached(index, (*prompt, 1)) == (0, 80)
    index.forget(1)
    assert cached(index, (*prompt, 1)) is None
    assert not index._modes_of


def test_guesses_follow_what_the_engine_reports() -> None:
    index = an_index(100)
    prompt = tokens(1_601)
    index.computed(0, hash_blocks(prompt))

    def guess() -> int:
        found = cached(index, prompt)
        assert found is not None
        return found[0]

    index.reported(0, guess(), guess())
    assert guess() == 1_600
    for _ in range(60):  # an engine whose blocks are larger
        index.reported(0, guess(), 1_280)
    assert 1_200 < guess() < 1_350
    for _ in range(100):  # one that has stopped caching
        index.reported(0, guess(), 0)
    assert guess() == BLOCK_TOKENS
    for _ in range(60):  # and one that has begun again
        index.reported(0, guess(), 1_600)
    assert guess() == 1_600


def test_a_guess_agrees_with_a_cache_block_by_block() -> None:
    """Against a plain least-recently-used cache: every prompt is guessed exactly, as long as the rules are the same."""
    rng = Random(7)
    index = an_index(64)
    real: OrderedDict[int, None] = OrderedDict()
    for _ in range(2_000):
        head, length = rng.randrange(6), rng.randrange(20, 400)
        prompt = tokens(length, seed=head)[: rng.randrange(20, 400)]
        if rng.random() < 0.5:
            prompt += tokens(rng.randrange(100), seed=rng.randrange(10_000) + 10)
        hashes = hash_blocks(prompt)
        held = 0
        for block in hashes[: (len(prompt) - 1) // BLOCK_TOKENS]:
            if block not in real:
                break
            held += BLOCK_TOKENS
        assert (cached(index, prompt) or (0,)) == (held,)
        index.computed(0, hashes)
        for block in reversed(hashes):
            real[block] = None
            real.move_to_end(block)
        while len(real) > 64:
            real.popitem(last=False)
