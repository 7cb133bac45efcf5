"""Asks engines the questions of the gate, one engine at a time, and keeps every answer so that a run can go on later.

The questions are a fixed list: number i of a task is the same in every run, so more pairs only add to those that are
there. Levels and worked examples alternate; greedy decoding throughout.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from pathlib import Path

import msgspec
from msgspec import Struct

from msd import tasks
from msd.domain import Prompt, Sampling
from msd.errors import ConfigError, MsdError
from msd.learning.quality import Pair
from msd.ports import Engine, Tokenizer

FIRST_SEED = 2_000_000
"""Neither the training's problems nor those of testbed/ACCURACY.md (from 1,000,000)."""
NUM_SHOTS = 3
ANSWERS_PER_WRITE = 32
GREEDY = Sampling(temperature=0.0)


class Question(Struct, frozen=True):
    """Number `index` of its task."""

    index: int
    problem: tasks.Problem


class Kept(Struct, frozen=True, array_like=True):
    """One answer as it is kept: the recipe that gave it, the task, the question's number, the text."""

    recipe: str
    task: str
    index: int
    text: str


class _Header(Struct, frozen=True, kw_only=True):
    first_seed: int
    num_shots: int
    versions: dict[str, str]


def questions(names: Sequence[str], num_pairs: int) -> list[Question]:
    """`num_pairs` questions of each task, the tasks in turn: any first part of the list has as many of each."""
    return [Question(index, _problem(task, index)) for index in range(num_pairs) for task in names]


def _problem(task: str, index: int) -> tasks.Problem:
    level = tasks.LEVELS[index % len(tasks.LEVELS)]
    num_shots = NUM_SHOTS if index // len(tasks.LEVELS) % 2 else 0
    return tasks.generate(task, level, FIRST_SEED + index, num_shots=num_shots)


class Answers:
    """Answers so far, by (recipe, task, index): in memory, and in a file that a later run takes up."""

    def __init__(self, file: Path, versions: dict[str, str]) -> None:
        """Take up `file` if it is there and was written under the same versions; else it starts anew."""
        self._file = file
        self._header = _Header(first_seed=FIRST_SEED, num_shots=NUM_SHOTS, versions=versions)
        self._texts: dict[tuple[str, str, int], str] = {}
        self._unwritten: list[Kept] = []
        try:
            lines = file.read_bytes().splitlines()
        except FileNotFoundError:
            lines = []
        except OSError as error:
            raise ConfigError(f"answers kept in {file}: {error.strerror}") from error
        if lines and _is_same(lines[0], self._header):
            for kept in _complete(lines[1:]):
                self._texts[kept.recipe, kept.task, kept.index] = kept.text
        self._rewrite()

    def _rewrite(self) -> None:
        kept = [Kept(recipe, task, index, text) for (recipe, task, index), text in self._texts.items()]
        self._write(b"\n".join(msgspec.json.encode(line) for line in (self._header, *kept)) + b"\n", "wb")

    def _write(self, content: bytes, mode: str) -> None:
        try:
            with self._file.open(mode) as stream:
                stream.write(content)
        except OSError as error:
            raise ConfigError(f"answers cannot be kept in {self._file}: {error.strerror}") from error

    def get(self, recipe: str, question: Question) -> str | None:
        """What that recipe answered."""
        return self._texts.get((recipe, question.problem.task, question.index))

    def add(self, recipe: str, question: Question, text: str) -> None:
        """Keep one more; written a few at a time."""
        task = question.problem.task
        self._texts[recipe, task, question.index] = text
        self._unwritten.append(Kept(recipe, task, question.index, text))
        if len(self._unwritten) >= ANSWERS_PER_WRITE:
            self.flush()

    def flush(self) -> None:
        """Write what is not written."""
        if self._unwritten:
            self._write(b"".join(msgspec.json.encode(kept) + b"\n" for kept in self._unwritten), "ab")
            self._unwritten.clear()

    def remove(self) -> None:
        """The gate file is written: they have done their work."""
        self._file.unlink(missing_ok=True)

    def missing(self, recipe: str, asked: Sequence[Question]) -> list[Question]:
        """The questions that this recipe has yet to answer."""
        return [question for question in asked if self.get(recipe, question) is None]

    def pairs(self, recipe: str, reference: str, asked: Sequence[Question]) -> list[Pair]:
        """Every question with both answers, in the order of asking."""
        made = []
        for question in asked:
            said, compared = self.get(recipe, question), self.get(reference, question)
            if said is not None and compared is not None:
                problem = question.problem
                right, reference_right = tasks.grade(problem, said), tasks.grade(problem, compared)
                made.append(Pair(problem.task, right, reference_right, said == compared))
        return made


async def ask(
    engine: Engine,
    asked: Sequence[Question],
    tokenizer: Tokenizer,
    num_at_once: int,
    on_answer: Callable[[Question, str], None],
) -> None:
    """Ask a warm engine, so many questions at once; each answer is handed on as it comes. Raises EngineError."""
    waiting = iter(asked)
    failed: MsdError | None = None
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(num_at_once, len(asked))):
                group.create_task(_ask_some(engine, waiting, tokenizer, on_answer))
    except* MsdError as several:
        first: BaseException = several
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        assert isinstance(first, MsdError)
        failed = first
    if failed is not None:
        raise failed


async def _ask_some(
    engine: Engine, waiting: Iterator[Question], tokenizer: Tokenizer, on_answer: Callable[[Question, str], None]
) -> None:
    for question in waiting:
        problem = question.problem
        prompt = Prompt(token_ids=tokenizer.encode(problem.prompt), sampling=GREEDY)
        request_id = f"gate-{problem.task}-{question.index}"
        texts: list[str] = []
        async with aclosing(engine.generate(request_id, prompt, problem.max_tokens, 0)) as chunks:
            async for chunk in chunks:
                texts.append(chunk.text)
        on_answer(question, "".join(texts))


def _is_same(line: bytes, header: _Header) -> bool:
    try:
        return msgspec.json.decode(line, type=_Header) == header
    except msgspec.DecodeError:
        return False


def _complete(lines: Sequence[bytes]) -> Iterator[Kept]:
    """The lines that were written whole; the last one may be torn."""
    for line in lines:
        try:
            yield msgspec.json.decode(line, type=Kept)
        except msgspec.DecodeError:
            return
