"""The second run of a shadowed request: its prompt, what the reference says to it, and how the two answers compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from msgspec import Struct

from msd import tasks
from msd.domain import Chunk, Prompt, Sampling

COMPARED_TOKENS = 16
"""Two answers agree when they begin alike. The gate measured agreement on answers of at most 17 tokens: of longer ones
it knows nothing, and two runs of the same weights drift apart in them sooner or later."""
QUESTION_TOKENS = 256
"""Of the prompt's end, where a question with an exact answer would stand."""


class Comparison(Struct, frozen=True):
    """`difference`: score less the reference's, where the right answer is known. `agrees` None: nothing to compare."""

    difference: float | None
    agrees: bool | None
    num_tokens: int


class _Run:
    __slots__ = ("prompt", "said_ids", "said_text", "token_ids", "wanted", "words")

    def __init__(self, prompt: Prompt, text: str, token_ids: Sequence[int], wanted: str | None) -> None:
        self.prompt = prompt
        self.said_text = text
        self.said_ids = tuple(token_ids[:COMPARED_TOKENS])
        self.wanted = wanted
        self.words: list[str] = []
        self.token_ids: list[int] = []


class ShadowRuns:
    """All shadows under way, by their ids."""

    def __init__(self) -> None:
        self._runs: dict[str, _Run] = {}

    def __len__(self) -> int:
        return len(self._runs)

    def __contains__(self, shadow_id: object) -> bool:
        return shadow_id in self._runs

    def begin(
        self,
        shadow_id: str,
        prompt: Prompt,
        text: str,
        token_ids: Sequence[int],
        decode: Callable[[Sequence[int]], str],
    ) -> bool:
        """Take up a request's prompt and the answer it got. False: that answer was drawn by chance, do not run it."""
        if not is_greedy(prompt.sampling):
            return False
        wanted = None
        if not prompt.sampling.ignore_eos:
            solved = tasks.solve(decode(prompt.token_ids[-QUESTION_TOKENS:]))
            wanted = None if solved is None else solved[1]
        self._runs[shadow_id] = _Run(prompt, text, token_ids, wanted)
        return True

    def prompt(self, shadow_id: str) -> Prompt:
        """What to ask the reference."""
        return self._runs[shadow_id].prompt

    def chunk(self, shadow_id: str, chunk: Chunk) -> bool:
        """The reference said something; True: its first words."""
        run = self._runs[shadow_id]
        is_first = not run.token_ids and bool(chunk.token_ids)
        run.words.append(chunk.text)
        run.token_ids.extend(chunk.token_ids)
        return is_first

    def end(self, shadow_id: str, *, is_whole: bool) -> Comparison:
        """The run is over; `is_whole`: the reference said all it had to say."""
        run = self._runs.pop(shadow_id)
        num_tokens = len(run.token_ids)
        if not is_whole:
            return Comparison(None, None, num_tokens)
        difference = None
        if run.wanted is not None:
            right = tasks.grade(run.wanted, run.said_text)
            difference = float(right - tasks.grade(run.wanted, "".join(run.words)))
        return Comparison(difference, run.said_ids == tuple(run.token_ids[:COMPARED_TOKENS]), num_tokens)


def is_greedy(sampling: Sampling) -> bool:
    """Whether the same weights give the same answer twice; None is vLLM's own default, temperature 1."""
    return sampling.temperature == 0 or sampling.top_k == 1
