"""Rows of the gate from pairs of answers: intervals, verdicts, and a run that goes on where it stopped."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from random import Random

import msgspec
import pytest

from msd import cli, gate, tasks
from msd.domain import Chunk, Prompt, Sampling
from msd.engine.tokens import load_tokenizer
from msd.errors import EngineLostError
from msd.learning import gate_run
from msd.learning.quality import Pair, judge, paired_difference, reference_rows, rows_of, wilson
from msd.learning.shadow_runs import COMPARED_TOKENS, ShadowRuns, is_greedy

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = load_tokenizer(ROOT / "testbed" / "models" / "tiny-large")
VERSIONS = {"engine": "test"}


# --- figures ---------------------------------------------------------------------------------------------------------


def test_wilson() -> None:
    # Newcombe, Statistics in Medicine 1998, table I: 81 of 263, 15 of 148, 0 of 20.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


def test_the_paired_interval_covers_the_truth() -> None:
    """Of 400 batches of 500 pairs with a true difference of -2 points, about 95 % of the intervals hold it."""
    rng, covered = Random(1), 0
    for _ in range(400):
        drawn = [rng.random() for _ in range(500)]
        low, high = paired_difference(sum(0.04 <= d < 0.06 for d in drawn), sum(d < 0.04 for d in drawn), 500)
        covered += low <= -0.02 <= high
    assert 0.92 <= covered / 400 <= 0.99


def test_the_paired_interval_does_not_collapse_where_nothing_differs() -> None:
    low, high = paired_difference(0, 0, 100)
    assert low < 0 < high


def test_a_row_counts_what_it_says() -> None:
    pairs = [
        Pair("copy", True, True, True),
        Pair("copy", True, False, False),
        Pair("copy", False, True, False),
        Pair("copy", False, True, False),
        Pair("copy", False, False, True),
    ]
    row = judge("a", "hash", "copy", pairs, 0.015, 0.05)
    assert (row.num_pairs, row.num_differ, row.accuracy, row.reference_accuracy) == (5, 3, 0.4, 0.6)
    assert (row.difference, row.agreement, row.verdict) == (-0.2, 0.4, "undecided")


def test_two_who_are_always_wrong_certify_nobody() -> None:
    hopeless = [Pair("copy", False, False, True)] * 3_000
    assert judge("a", "hash", "copy", hopeless, 0.015, 0.05).verdict == "undecided"
    able = [Pair("copy", True, True, True)] * 3_000
    assert judge("a", "hash", "copy", able, 0.015, 0.05).verdict == "certified"


def test_rows_are_per_task_and_over_all() -> None:
    pairs = [Pair(task, True, True, True) for _ in range(600) for task in ("copy", "sort")]
    assert [(row.task, row.num_pairs) for row in rows_of("a", "h", pairs, 0.015, 0.05)] == [
        ("*", 1_200),
        ("copy", 600),
        ("sort", 600),
    ]
    assert {row.verdict for row in reference_rows("r", "h", pairs)} == {"certified"}


# --- the questions ---------------------------------------------------------------------------------------------------


def test_more_pairs_only_add_to_those_that_are_there() -> None:
    few, many = gate_run.questions(("copy", "add"), 8), gate_run.questions(("copy", "add"), 20)
    assert many[: len(few)] == few
    problems = [question.problem for question in many if question.problem.task == "copy"]
    assert {problem.level for problem in problems} == set(tasks.LEVELS)
    assert {tasks.SHOT_SEPARATOR in problem.prompt for problem in problems} == {True, False}


@pytest.mark.parametrize("task", tasks.TASKS)
def test_every_question_can_be_solved_from_its_text(task: str) -> None:
    for question in gate_run.questions((task,), 200):
        prompt = TOKENIZER.decode(TOKENIZER.encode(question.problem.prompt))
        assert tasks.solve(prompt) == (task, question.problem.answer)


@pytest.mark.parametrize(
    "prompt", ["", "hello", "copy =", "copy kdwa", "get a1b2:c=", "add 1+=", "sort ABC=", "copy a b=", "count ab="]
)
def test_what_is_no_problem_has_no_answer(prompt: str) -> None:
    assert tasks.solve(prompt) is None


class Scripted:
    """Answers rightly, but for every `wrong`th question; dies after `lives` answers."""

    simulated = True

    def __init__(self, wrong: int = 0, lives: int = 1_000_000) -> None:
        self.name = "scripted"
        self.num_asked = 0
        self.num_open = 0
        self.most_open = 0
        self._wrong = wrong
        self._lives = lives

    async def generate(self, request_id: str, prompt: Prompt, max_tokens: int, priority: int) -> AsyncGenerator[Chunk]:
        assert prompt.sampling == Sampling(temperature=0.0)
        self.num_asked += 1
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        number = self.num_asked
        try:
            await asyncio.sleep(0)
            if number > self._lives:
                raise EngineLostError("it died")
            solved = tasks.solve(TOKENIZER.decode(prompt.token_ids))
            assert solved is not None
            text = "?" if self._wrong and number % self._wrong == 0 else solved[1]
            yield Chunk((1,), text[:1])
            yield Chunk((1,), text[1:], "stop")
        finally:
            self.num_open -= 1


def ask(engine: Scripted, answers: gate_run.Answers, recipe: str, asked: list[gate_run.Question]) -> None:
    def on_answer(question: gate_run.Question, text: str) -> None:
        answers.add(recipe, question, text)

    missing = answers.missing(recipe, asked)
    try:
        asyncio.run(gate_run.ask(engine, missing, TOKENIZER, 8, on_answer))  # type: ignore[arg-type]
    finally:
        answers.flush()


def test_answers_make_pairs(tmp_path: Path) -> None:
    asked = gate_run.questions(("copy", "sort"), 100)
    answers = gate_run.Answers(tmp_path / "partial", VERSIONS)
    engine = Scripted()
    ask(engine, answers, "reference", asked)
    ask(Scripted(wrong=10), answers, "mode", asked)
    assert engine.most_open == 8
    pairs = answers.pairs("mode", "reference", asked)
    assert len(pairs) == 200
    assert sum(pair.right for pair in pairs) == 180
    assert all(pair.reference_right for pair in pairs)


def test_a_run_goes_on_where_an_engine_died(tmp_path: Path) -> None:
    asked = gate_run.questions(("copy",), 100)
    answers = gate_run.Answers(tmp_path / "partial", VERSIONS)
    with pytest.raises(EngineLostError):
        ask(Scripted(lives=50), answers, "a", asked)
    with (tmp_path / "partial").open("ab") as stream:
        stream.write(b'["a","copy",9')  # torn by a crash
    again = gate_run.Answers(tmp_path / "partial", VERSIONS)
    assert len(again.missing("a", asked)) == 50
    engine = Scripted()
    ask(engine, again, "a", asked)
    assert engine.num_asked == 50
    assert not gate_run.Answers(tmp_path / "partial", VERSIONS).missing("a", asked)


def test_answers_of_another_version_are_not_taken_up(tmp_path: Path) -> None:
    asked = gate_run.questions(("copy",), 10)
    answers = gate_run.Answers(tmp_path / "partial", VERSIONS)
    ask(Scripted(), answers, "a", asked)
    assert len(gate_run.Answers(tmp_path / "partial", {"engine": "newer"}).missing("a", asked)) == 10


# --- the command -----------------------------------------------------------------------------------------------------

SIMULATED = """
[[model]]
name = "toy"
[[engine]]
name = "m0"
model = "toy"
kind = "noop"
[[engine]]
name = "m1"
model = "toy"
kind = "noop"
precision = "int8"
[quality]
gate = "gate.json"
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "config.toml").write_text(SIMULATED)
    return tmp_path / "config.toml"


def test_the_command_writes_a_gate_file_that_the_configuration_takes(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["gate", "--config", str(config), "--pairs", "40", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    measured = gate.load(config.parent / "gate.json")
    assert told["checksum"] == measured.checksum
    assert (measured.reference, measured.model, len(measured.rows)) == ("m0", "toy", 14)
    assert {row.verdict for row in measured.rows if row.mode == "m1"} == {"undecided"}, "filler certifies nobody"
    assert not (config.parent / "gate.json.partial").exists()
    assert cli.main(["check", str(config)]) == 0
    assert "# mode m1: undecided" in capsys.readouterr().out


def test_the_command_prints_a_table(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["gate", "--config", str(config), "--pairs", "8", "--tasks", "copy", "--engines", "m1"]) == 0
    out = capsys.readouterr().out
    assert "reference m0 of model toy" in out
    assert "all together" in out


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--tasks", "copi"], "no task 'copi'; did you mean `copy`?"),
        (["--engines", "m7"], "no [[engine]] 'm7'; the nearest of m0, m1 is `m1`"),
        (["--engines", "m0"], "there is only the reference mode"),
    ],
)
def test_wrong_words_are_refused(config: Path, capsys: pytest.CaptureFixture[str], words: list[str], why: str) -> None:
    assert cli.main(["gate", "--config", str(config), *words]) == 78
    assert why in capsys.readouterr().err


# --- shadows ---------------------------------------------------------------------------------------------------------


def prompt_of(text: str, **sampling: object) -> Prompt:
    told = msgspec.convert({"temperature": 0.0, **sampling}, Sampling)
    return Prompt(token_ids=TOKENIZER.encode(text), sampling=told)


def ids_of(text: str) -> tuple[int, ...]:
    """What an engine would generate: no special token in front."""
    return TOKENIZER.encode(text)[1:]


def compare(text: str, said: str, reference: str, **sampling: object) -> tuple[float | None, bool | None]:
    runs = ShadowRuns()
    assert runs.begin("s", prompt_of(text, **sampling), said, ids_of(said), TOKENIZER.decode)
    assert "s" in runs
    for letter in reference:
        runs.chunk("s", Chunk(ids_of(letter), letter))
    told = runs.end("s", is_whole=True)
    assert not runs
    return told.difference, told.agrees


@pytest.mark.parametrize(
    ("said", "reference", "told"),
    [
        ("kd", "kd", (0.0, True)),
        ("dk", "kd", (-1.0, False)),
        ("kd", "dk", (1.0, False)),
        ("dd", "kk", (0.0, False)),
    ],
)
def test_exact_answers_are_scored(said: str, reference: str, told: tuple[float, bool]) -> None:
    assert compare("copy kd=", said, reference) == told


def test_other_answers_are_compared_at_their_beginning() -> None:
    same = "a" * COMPARED_TOKENS
    assert compare("once upon a time", same + "b", same + "c") == (None, True)
    assert compare("once upon a time", "b" + same, "c" + same) == (None, False)


def test_an_answer_that_must_go_on_cannot_be_right() -> None:
    assert compare("copy kd=", "kdx", "kdx", ignore_eos=True) == (None, True)


def test_a_shadow_that_was_broken_off_says_nothing() -> None:
    runs = ShadowRuns()
    runs.begin("s", prompt_of("copy kd="), "kd", TOKENIZER.encode("kd"), TOKENIZER.decode)
    assert runs.chunk("s", Chunk((1,), "k")) is True
    told = runs.end("s", is_whole=False)
    assert (told.difference, told.agrees, told.num_tokens) == (None, None, 1)


@pytest.mark.parametrize(
    ("sampling", "greedy"),
    [({"temperature": 0.0}, True), ({"temperature": None}, False), ({"temperature": 0.7}, False), ({"top_k": 1}, True)],
)
def test_only_greedy_answers_repeat(sampling: dict[str, object], greedy: bool) -> None:
    assert is_greedy(msgspec.convert(sampling, Sampling)) is greedy
