"""The exact-answer tasks: right answers, one problem per (task, level, seed), honest limits."""

import subprocess
import sys

import pytest

from msd.tasks import (
    LEVELS,
    SHOT_SEPARATOR,
    TASKS,
    Problem,
    UnknownTaskError,
    generate,
    grade,
    longest_answer,
)

CELLS = [(task, level) for task in TASKS for level in LEVELS]


def solve(question: str) -> str:
    """Answer a question from its text alone, by other means than the generator's."""
    task, _, rest = question.removesuffix("=").partition(" ")
    match task:
        case "copy":
            return rest
        case "reverse":
            return "".join(reversed(rest))
        case "sort":
            return "".join(sorted(rest))
        case "get":
            pairs, key = rest.split(":")
            return dict(zip(pairs[::2], pairs[1::2], strict=True))[key]
        case "add":
            left, right = (int(number[::-1]) for number in rest.split("+"))
            return str(left + right)[::-1]
        case "count":
            letters, letter = rest.split(":")
            return str(letters.count(letter))
        case _:
            raise AssertionError(task)


@pytest.mark.parametrize(("task", "level"), CELLS)
def test_answers_are_right_and_fit_max_tokens(task: str, level: int) -> None:
    for seed in range(200):
        problem = generate(task, level, seed)
        assert problem.prompt.startswith(f"{task} ")
        assert problem.prompt.endswith("=")
        assert problem.answer == solve(problem.prompt)
        assert 1 <= len(problem.answer) <= longest_answer(task, level) == problem.max_tokens - 1


@pytest.mark.parametrize(("task", "level"), CELLS)
def test_longest_answer_is_reached(task: str, level: int) -> None:
    longest = max(len(generate(task, level, seed).answer) for seed in range(500))
    assert longest == longest_answer(task, level)


@pytest.mark.parametrize("task", TASKS)
def test_levels_get_longer(task: str) -> None:
    means = [sum(len(generate(task, level, seed).prompt) for seed in range(100)) for level in LEVELS]
    assert means == sorted(means)
    assert len(set(means)) == len(LEVELS)


def test_content_depends_on_the_arguments_alone() -> None:
    # Literal values: a change of the generator invalidates the committed accuracy table and must be seen.
    assert generate("copy", 1, 0).prompt == "copy poe="
    assert generate("add", 3, 7).prompt == "add 921+609="


def test_other_processes_generate_the_same_problems() -> None:
    program = (
        "from msd.tasks import *; print([generate(t, l, s).prompt for t in TASKS for l in LEVELS for s in range(5)])"
    )
    here = str([generate(task, level, seed).prompt for task, level in CELLS for seed in range(5)])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == here


def test_seeds_give_different_problems() -> None:
    assert len({generate("sort", 4, seed).prompt for seed in range(1000)}) == 1000


@pytest.mark.parametrize(("task", "level"), CELLS)
def test_shots_are_a_prefix_that_seeds_share(task: str, level: int) -> None:
    bare = generate(task, level, 5)
    one, other = (generate(task, level, seed, num_shots=3) for seed in (5, 6))
    *shots, question = one.prompt.split(SHOT_SEPARATOR)
    assert question == bare.prompt
    assert (one.answer, one.max_tokens) == (bare.answer, bare.max_tokens)
    assert shots == other.prompt.split(SHOT_SEPARATOR)[:-1]
    assert len(shots) == 3
    for shot in shots:
        before, separator, answer = shot.rpartition("=")
        assert solve(before + separator) == answer
    assert generate(task, level, 5, num_shots=3, shots_seed=1).prompt != one.prompt


def test_more_shots_extend_the_prefix() -> None:
    few, many = (generate("get", 2, 0, num_shots=num_shots).prompt for num_shots in (2, 6))
    shared = few[: few.rindex(SHOT_SEPARATOR)]
    assert many.startswith(shared)


def test_grade_is_exact_but_for_white_space_around() -> None:
    problem = Problem(task="copy", level=1, seed=0, prompt="copy abc=", answer="abc", max_tokens=5)
    assert grade(problem, "abc")
    assert grade(problem, " abc\n")
    assert grade("abc", "abc")
    for output in ("", "ab", "abcd", "ABC", "a bc", "abc\nabc"):
        assert not grade(problem, output)


def test_unknown_task_names_the_nearest() -> None:
    with pytest.raises(UnknownTaskError, match=r"unknown task 'revers': did you mean 'reverse'"):
        generate("revers", 1, 0)
    with pytest.raises(UnknownTaskError, match=r"unknown task ''"):
        generate("", 1, 0)


@pytest.mark.parametrize(("level", "nearest"), [(0, 1), (5, 4), (-3, 1)])
def test_unknown_level_names_the_nearest(level: int, nearest: int) -> None:
    with pytest.raises(UnknownTaskError, match=f"nearest is {nearest} "):
        generate("copy", level, 0)


def test_module_is_pure() -> None:
    program = (
        "import sys, msd.tasks; print([m for m in ('torch', 'numpy', 'asyncio', 'vllm', 'zmq') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
