"""What a planned request asks: an exact-answer problem, or made-up token ids. A pure function of the plan's row."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from msgspec import Struct

from loadgen.plan import PlannedRequest, stream
from loadgen.spec import ContentSpec
from msd import tasks

MAX_CACHED_PREFIXES = 1_024


class Content(Struct, frozen=True, kw_only=True):
    """A prompt as text or as token ids, exactly one of them, with the right answer where there is one."""

    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    answer: str | None = None
    max_tokens: int


def build(row: PlannedRequest, content: ContentSpec) -> Content:
    """Return what `row` asks. Equal prefix seeds give equal first tokens, so that prefix caches really hit."""
    if row.task is not None:
        problem = tasks.generate(
            row.task, row.level, row.prompt_seed, num_shots=row.num_shots, shots_seed=row.prefix_seed
        )
        return Content(text=problem.prompt, answer=problem.answer, max_tokens=problem.max_tokens)
    prefix = _token_ids("prefix", row.prefix_seed, row.prefix_tokens, content) if row.prefix_tokens else ()
    own = _own_token_ids(row.prompt_seed, row.input_tokens - row.prefix_tokens, content)
    return Content(token_ids=prefix + own, max_tokens=row.output_tokens)


def is_right(answer: str, output: str) -> bool:
    """Say whether `output` is the answer."""
    return tasks.grade(answer, output)


@lru_cache(maxsize=MAX_CACHED_PREFIXES)
def _token_ids(purpose: str, seed: int, count: int, content: ContentSpec) -> tuple[int, ...]:
    drawn: np.ndarray[tuple[int], np.dtype[np.int64]] = stream(seed, purpose).integers(
        content.token_low, content.token_high, size=count
    )
    return tuple(drawn.tolist())


def _own_token_ids(seed: int, count: int, content: ContentSpec) -> tuple[int, ...]:
    # Not kept: no other request asks for the same.
    return _token_ids.__wrapped__("own", seed, count, content)
