"""`msd gate`: asks every mode the same questions as the reference mode, and writes which may serve which task."""

from __future__ import annotations

import argparse
import asyncio
import datetime
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from msd import __version__, gate, tasks
from msd import config as settings
from msd.cli import terminal
from msd.cli.options import (
    Commands,
    add_config,
    add_engines,
    add_fresh,
    add_json,
    chosen,
    count,
    load_config,
    names,
)
from msd.cli.terminal import table
from msd.config import Config
from msd.errors import EXIT_NO, EXIT_OK, EXIT_TERMINATED, ConfigError

if TYPE_CHECKING:
    from msd.learning.gate_run import Answers, Question
    from msd.ports import Engine, Tokenizer

DEFAULT_PAIRS = 1_600
DEFAULT_OUT = "gate.json"
PLAIN_INTERVAL_S = 10.0


def add_to(commands: Commands) -> None:
    """Add `gate` to the command line."""
    parser = commands.add_parser(
        "gate",
        help="measure which modes may serve which task; writes the gate file",
        description="Start the engines of the configuration one after another, ask each the same questions with exact "
        "answers as the reference mode, and write accuracy, difference and verdict per mode and task. A run that was "
        "broken off goes on where it stopped. Exit 1 when a mode was revoked on some task.",
    )
    add_config(parser)
    add_engines(parser, "only these, beside the reference")
    parser.add_argument("--tasks", type=names, metavar="A,B", help=f"of {', '.join(tasks.TASKS)} (default: all)")
    parser.add_argument(
        "--pairs", type=count, default=DEFAULT_PAIRS, metavar="N", help=f"per task (default {DEFAULT_PAIRS})"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="gate file to write (default: quality.gate)")
    add_fresh(parser)
    add_json(parser, "the gate file on stdout as one JSON object, in place of the table")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure, write, print; exit 1 when some mode was revoked."""
    file = settings.find(options.config)
    config = load_config(file, look_at_gate=False)
    base_dir = file.parent
    asked = chosen(options.tasks, tuple(tasks.TASKS), "--tasks", "task")
    known = [engine.name for engine in config.engine]
    wanted = chosen(options.engines, known, "--engines", "[[engine]]")
    reference = find_reference(config)
    modes = [name for name in known if name == reference or name in wanted]
    if len(modes) < 2:
        raise ConfigError("there is only the reference mode: nothing to compare", remedy="add an [[engine]]")
    out = options.out or base_dir / (config.quality.gate or DEFAULT_OUT)
    from msd import logs

    logs.configure(config.daemon)
    try:
        measured = asyncio.run(measure(config, base_dir, reference, modes, asked, options, out))
    except asyncio.CancelledError:  # by SIGTERM; the engine is stopped
        return EXIT_TERMINATED
    if options.json:
        print(msgspec.json.encode(measured).decode())
    else:
        print("\n".join(render(measured)))
        print(f"\nwritten: {out}" + _how_to_use(config, base_dir, out))
    return EXIT_NO if any(row.verdict == "revoked" for row in measured.rows) else EXIT_OK


def find_reference(config: Config) -> str:
    """The mode that others are compared with. Raises ConfigError where there is none."""
    from msd.core.fleet import mode_of
    from msd.recipe import find_references

    home = find_references([mode_of(engine) for engine in config.engine], config.quality).home
    if home < 0:
        raise ConfigError("no engine is lossless: nothing to compare with", remedy="name one as quality.reference")
    return config.engine[home].name


async def measure(
    config: Config,
    base_dir: Path,
    reference: str,
    modes: Sequence[str],
    task_names: Sequence[str],
    options: argparse.Namespace,
    out: Path,
) -> gate.GateFile:
    """Ask the engines, the reference first, and write the gate file."""
    # Late: they bring the engines, and other commands should start at once.
    from msd.clock import MonotonicClock
    from msd.engine import factory
    from msd.engine.host import identity, look
    from msd.learning import gate_run, quality
    from msd.recipe import recipe_hashes
    from msd.telemetry.nvml import installed_gpus

    engines = {engine.name: engine for engine in config.engine}
    recipes = recipe_hashes(config, base_dir)
    clock = MonotonicClock()
    partial = out.with_name(out.name + ".partial")
    if options.fresh:
        partial.unlink(missing_ok=True)
    where = identity(config, look(*installed_gpus()))
    versions = {"msd": __version__, "engine": where.engine_version}
    answers = gate_run.Answers(partial, versions)
    asked = gate_run.questions(task_names, options.pairs)
    order = [reference, *(name for name in modes if name != reference)]
    logs_folder = None
    if any(engines[name].kind == "vllm" and answers.missing(recipes[name], asked) for name in order):
        from msd.engine.vllm import import_vllm

        logs_folder = factory.run_dir(config)
        import_vllm()
    gpu = factory.simulated_gpu(config, clock)
    _sigterm_cancels()
    tokenizers = factory.load_tokenizers(config, base_dir)
    try:
        with Meter(len(asked)) as meter:
            for name in order:
                missing = answers.missing(recipes[name], asked)
                meter.begin(name, len(asked) - len(missing), "starting" if missing else "known already")
                if missing:
                    engine = factory.engine_factory(engines[name], config, base_dir, clock, gpu, logs_folder)()
                    await _ask(engine, missing, tokenizers[engines[name].model], config, answers, recipes[name], meter)
    finally:
        answers.flush()
    rows = quality.reference_rows(
        reference, recipes[reference], answers.pairs(recipes[reference], recipes[reference], asked)
    )
    for name in order[1:]:
        pairs = answers.pairs(recipes[name], recipes[reference], asked)
        rows += quality.rows_of(name, recipes[name], pairs, config.quality.delta, config.quality.alpha)
    measured = gate.GateFile(
        schema=gate.SCHEMA,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=shlex.join(["msd", *sys.argv[1:]]),
        versions=versions,
        host=where.device,
        model=engines[reference].model,
        reference=reference,
        reference_recipe=recipes[reference],
        delta=config.quality.delta,
        alpha=config.quality.alpha,
        rows=tuple(rows),
    )
    signed = gate.write(out, measured)
    answers.remove()
    return signed


async def _ask(
    engine: Engine,
    missing: Sequence[Question],
    tokenizer: Tokenizer,
    config: Config,
    answers: Answers,
    recipe: str,
    meter: Meter,
) -> None:
    """Start one engine, ask it what is missing, stop it."""
    from msd.learning import gate_run

    num_slots = next(known.max_num_seqs for known in config.engine if known.name == engine.name)
    try:
        await engine.start()
        meter.say("asking")

        def on_answer(question: Question, text: str) -> None:
            answers.add(recipe, question, text)
            meter.advance()

        await gate_run.ask(engine, missing, tokenizer, num_slots, on_answer)
    finally:
        await asyncio.shield(engine.stop())


def render(measured: gate.GateFile) -> list[str]:
    """The gate file as a table for a person."""
    rows = [
        [
            row.mode,
            "all together" if row.task == gate.ALL_TASKS else row.task,
            f"{row.accuracy:.1%}",
            f"{row.accuracy_low:.1%} - {row.accuracy_high:.1%}",
            *_compared(row, measured.reference),
            f"{row.num_pairs:,}",
            _verdict(row, measured.reference),
        ]
        for row in measured.rows
    ]
    head = ["mode", "task", "right", "95 %", "difference", "95 %", "same answer", "pairs", "verdict"]
    return [
        *table(head, rows, left=(0, 1, 8)),
        "",
        f"reference {measured.reference} of model {measured.model} on {measured.host}, "
        f"{measured.versions.get('engine', '')}. Certified: it loses less than {measured.delta * 100:g} points, by a "
        f"test that errs with probability {measured.alpha:g} at most. Undecided: more pairs would tell.",
    ]


def _compared(row: gate.GateRow, reference: str) -> list[str]:
    if row.mode == reference:
        return [terminal.DASH] * 3
    low, high = row.difference_low * 100, row.difference_high * 100
    return [f"{row.difference * 100:+.2f}", f"{low:+.2f} - {high:+.2f}", f"{row.agreement:.1%}"]


def _verdict(row: gate.GateRow, reference: str) -> str:
    if row.mode == reference:
        return "reference"
    colour = {"certified": "green", "revoked": "red"}.get(row.verdict, "yellow")
    return terminal.paint(row.verdict, colour)


def _how_to_use(config: Config, base_dir: Path, out: Path) -> str:
    if config.quality.gate and (base_dir / config.quality.gate).resolve() == out.resolve():
        return ""
    return f'; to go by it: [quality] gate = "{os.path.relpath(out, base_dir)}"'


class Meter:
    """How far it is: a bar on a terminal, else a line now and then. On stderr."""

    def __init__(self, num_questions: int) -> None:
        self._num_questions = num_questions
        self._mode = ""
        self._doing = ""
        self._num_done = 0
        self._bar: Any = None
        self._row: Any = None
        self._told_s = 0.0

    def __enter__(self) -> Meter:
        if terminal.redraws(sys.stderr):
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, mode: str, num_done: int, doing: str) -> None:
        """The next mode's turn."""
        self._mode, self._num_done = mode, num_done
        if self._bar is not None:
            self._row = self._bar.add_task(mode, total=self._num_questions, completed=num_done)
        self.say(doing)

    def say(self, doing: str) -> None:
        """What is being done with it now."""
        self._doing = doing
        if self._bar is not None:
            self._bar.update(self._row, description=f"{self._mode}: {doing}")
        else:
            self._tell()

    def advance(self) -> None:
        """One more answer."""
        self._num_done += 1
        if self._bar is not None:
            self._bar.update(self._row, completed=self._num_done)
        elif time.monotonic() - self._told_s >= PLAIN_INTERVAL_S or self._num_done == self._num_questions:
            self._tell()

    def _tell(self) -> None:
        self._told_s = time.monotonic()
        line = f"gate: {self._mode}: {self._doing}, {self._num_done:,} of {self._num_questions:,} answers"
        print(line, file=sys.stderr, flush=True)


def _sigterm_cancels() -> None:
    """SIGTERM ends the run as Ctrl-C does: the engine is stopped, the answers stay."""
    task = asyncio.current_task()
    assert task is not None, "called from a task"
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
