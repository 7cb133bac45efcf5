"""Exact-answer tasks: six small string problems whose only right answer is known.

A task is a word (`copy`), a level is a difficulty (1 is easy, 4 is hard), and a seed picks one problem of that kind.
The gate, the load generator, the testbed's training and the tests share this module, so it is pure: no torch, no
clock, no I/O, and the content of a problem depends on nothing but its arguments.

| task | question | answer |
|---|---|---|
| copy | `copy kdwa=` | the letters as they stand: `kdwa` |
| reverse | `reverse kdwa=` | the letters backwards: `awdk` |
| sort | `sort kdwa=` | the letters in alphabetic order: `adkw` |
| get | `get a3b7c1:b=` | the digit behind the key: `7` |
| add | `add 75+86=` | the sum; *every number has its least significant digit first* (57 + 68 = 125): `521` |
| count | `count aabab:a=` | how often the letter occurs, in plain decimal: `3` |

Letters of copy, reverse and sort, and the keys of get, do not repeat within a problem.
"""

import difflib
import random
import re
from collections.abc import Callable
from typing import Final

import msgspec

TASKS: Final[tuple[str, ...]] = ("copy", "reverse", "sort", "get", "add", "count")
LEVELS: Final[tuple[int, ...]] = (1, 2, 3, 4)

SHOT_SEPARATOR: Final = "\n"
"""Stands between the worked examples of a few-shot prompt and the question."""

_QUESTIONS: Final[dict[str, re.Pattern[str]]] = {
    "copy": re.compile("[a-z]{1,64}"),
    "reverse": re.compile("[a-z]{1,64}"),
    "sort": re.compile("[a-z]{1,64}"),
    "get": re.compile("((?:[a-z][0-9]){1,26}):([a-z])"),
    "add": re.compile("([0-9]{1,64})\\+([0-9]{1,64})"),
    "count": re.compile("([a-z]{1,64}):([a-z])"),
}
"""What a question asks, between the task's word and the `=`."""

_LETTERS: Final = "abcdefghijklmnopqrstuvwxyz"
_DIGITS: Final = "0123456789"

# Smallest and largest length per level, in symbols of the question (letters, pairs, digits of an operand).
_LENGTHS: Final[dict[str, tuple[tuple[int, int], ...]]] = {
    "copy": ((2, 4), (5, 8), (9, 12), (13, 16)),
    "reverse": ((2, 4), (5, 8), (9, 12), (13, 16)),
    "sort": ((2, 4), (5, 8), (9, 12), (13, 16)),
    "get": ((2, 3), (4, 6), (7, 10), (11, 16)),
    "add": ((1, 1), (2, 2), (3, 3), (4, 5)),
    "count": ((2, 4), (5, 8), (9, 12), (13, 20)),
}


class UnknownTaskError(ValueError):
    """The task or level does not exist; the message names the nearest one. Not recoverable by retrying."""


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """One question with its only right answer."""

    task: str
    level: int
    seed: int
    prompt: str
    """What the model is given: worked examples, if any, then the question up to and with its `=`."""
    answer: str
    """What the model must say before it ends the sequence."""
    max_tokens: int
    """Longest answer of this task and level in testbed tokens (one per character), plus the end of sequence."""


def generate(task: str, level: int, seed: int, *, num_shots: int = 0, shots_seed: int = 0) -> Problem:
    """Return the problem that (task, level, seed) names, the same one in every process and on every machine.

    `num_shots` worked examples of the same task and level stand before the question. They depend on `shots_seed`
    alone, so problems with different seeds share them as a common prefix.
    """
    check(task, level)
    question, answer = sample(task, level, random.Random(f"{task}/{level}/{seed}"))
    shots = "".join(
        shot + shot_answer + SHOT_SEPARATOR
        for shot, shot_answer in (
            sample(task, level, random.Random(f"{task}/{level}/shot/{shots_seed}/{index}"))
            for index in range(num_shots)
        )
    )
    return Problem(
        task=task,
        level=level,
        seed=seed,
        prompt=shots + question,
        answer=answer,
        max_tokens=longest_answer(task, level) + 1,
    )


def sample(task: str, level: int, rng: random.Random) -> tuple[str, str]:
    """Draw one (question, answer) of a known task and level from `rng`."""
    shortest, longest = _LENGTHS[task][level - 1]
    return _BUILDERS[task](rng.randint(shortest, longest), rng)


def grade(problem: Problem | str, output: str) -> bool:
    """Say whether `output` is the answer, exactly, after white space around it is taken away."""
    answer = problem.answer if isinstance(problem, Problem) else problem
    return output.strip() == answer


def solve(prompt: str) -> tuple[str, str] | None:
    """The task of a prompt's last question and its only right answer; None when that is none of these problems."""
    question = prompt.rpartition(SHOT_SEPARATOR)[2]
    task, _, asked = question.partition(" ")
    if task not in TASKS or not asked.endswith("="):
        return None
    found = _QUESTIONS[task].fullmatch(asked[:-1])
    if found is None:
        return None
    match task:
        case "copy":
            return task, found[0]
        case "reverse":
            return task, found[0][::-1]
        case "sort":
            return task, "".join(sorted(found[0]))
        case "get":
            values = dict(zip(found[1][::2], found[1][1::2], strict=True))
            return (task, values[found[2]]) if found[2] in values else None
        case "add":
            return task, str(int(found[1][::-1]) + int(found[2][::-1]))[::-1]
        case _:
            return task, str(found[1].count(found[2]))


def longest_answer(task: str, level: int) -> int:
    """Return the most characters that an answer of this task and level can have."""
    longest = _LENGTHS[task][level - 1][1]
    match task:
        case "get":
            return 1
        case "add":
            return longest + 1
        case "count":
            return len(str(longest))
        case _:
            return longest


def check(task: str, level: int) -> None:
    """Raise UnknownTaskError, naming the nearest valid one, unless this task and this level exist."""
    if task not in TASKS:
        nearest = difflib.get_close_matches(task, TASKS, n=1, cutoff=0.0)[0]
        raise UnknownTaskError(f"unknown task {task!r}: did you mean {nearest!r}? (tasks: {', '.join(TASKS)})")
    if level not in LEVELS:
        nearest_level = min(LEVELS, key=lambda known: abs(known - level))
        raise UnknownTaskError(
            f"task {task!r} has no level {level!r}: the nearest is {nearest_level} (levels: {LEVELS[0]}-{LEVELS[-1]})"
        )


def _copy(length: int, rng: random.Random) -> tuple[str, str]:
    letters = "".join(rng.sample(_LETTERS, length))
    return f"copy {letters}=", letters


def _reverse(length: int, rng: random.Random) -> tuple[str, str]:
    letters = "".join(rng.sample(_LETTERS, length))
    return f"reverse {letters}=", letters[::-1]


def _sort(length: int, rng: random.Random) -> tuple[str, str]:
    letters = rng.sample(_LETTERS, length)
    return f"sort {''.join(letters)}=", "".join(sorted(letters))


def _get(num_pairs: int, rng: random.Random) -> tuple[str, str]:
    keys = rng.sample(_LETTERS, num_pairs)
    values = rng.choices(_DIGITS, k=num_pairs)
    wanted = rng.randrange(num_pairs)
    pairs = "".join(key + value for key, value in zip(keys, values, strict=True))
    return f"get {pairs}:{keys[wanted]}=", values[wanted]


def _add(num_digits: int, rng: random.Random) -> tuple[str, str]:
    smallest = 0 if num_digits == 1 else 10 ** (num_digits - 1)
    left = rng.randrange(smallest, 10**num_digits)
    right = rng.randrange(smallest, 10**num_digits)
    return f"add {str(left)[::-1]}+{str(right)[::-1]}=", str(left + right)[::-1]


def _count(length: int, rng: random.Random) -> tuple[str, str]:
    # The share of the wanted letter is drawn too, so that small and large counts come up alike.
    wanted, other = rng.sample("abcd", 2)
    letters = [wanted] * rng.randint(0, length)
    letters += [other] * (length - len(letters))
    rng.shuffle(letters)
    return f"count {''.join(letters)}:{wanted}=", str(letters.count(wanted))


_BUILDERS: Final[dict[str, Callable[[int, random.Random], tuple[str, str]]]] = {
    "copy": _copy,
    "reverse": _reverse,
    "sort": _sort,
    "get": _get,
    "add": _add,
    "count": _count,
}
