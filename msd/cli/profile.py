"""`msd profile`: measures every mode of a configuration on this host, into a file that msd starts from."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from msd import config as settings
from msd.cli import terminal
from msd.cli.options import Commands, add_config, add_engines, add_fresh, add_json, chosen, load_config, names
from msd.errors import EXIT_NO, EXIT_OK, EXIT_TERMINATED, ConfigError, EngineError, EngineStartError

if TYPE_CHECKING:
    from msd.engine.host import Identity
    from msd.learning.profiling import Plan, Subject
    from msd.profile import ModeProfile, Profile

DEFAULT_OUT: Final = "profile.json"
ENERGY_S: Final = 10.0
"""Modes are compared over windows of at least this; counters step every 10 to 120 ms and lag behind."""
SIMULATED_ENERGY_S: Final = 1.0
BUSY: Final = 0.5
"""Load per core before anything was started."""
SIMULATED: Final = "SIMULATED: the engines and the GPU follow a stated model; these are not figures of a machine"


def add_to(commands: Commands) -> None:
    """Add `profile` to the command line."""
    parser = commands.add_parser(
        "profile",
        help="measure every mode on this host, into a profile that msd starts from",
        description="Start the configuration's engines one after another, measure each alone over families of "
        "workloads (TTFT, TPOT, throughput at several batch sizes, energy per token where a counter measures it, "
        "memory, start, sleep and wake), and write a profile. Name it in policy.profile: msd then starts with good "
        "estimates. Nothing else should run on the device meanwhile. A run that was broken off goes on "
        "where it stopped.",
    )
    add_config(parser)
    add_engines(parser)
    parser.add_argument("--families", type=names, metavar="A,B", help="only these families of workloads (default: all)")
    parser.add_argument(
        "--batches", type=_sizes, default=(1, 4, 16), metavar="SIZES", help="requests at once (default 1,4,16)"
    )
    parser.add_argument("--repeats", type=_repeats, default=3, metavar="N", help="of each cell, at least (default 3)")
    parser.add_argument(
        "--energy-s",
        type=_seconds,
        metavar="S",
        help="least time of a cell where energy is measured (default 10, simulated 1; 0: no energy)",
    )
    parser.add_argument("--out", metavar="FILE", default=DEFAULT_OUT, help=f"the profile (default {DEFAULT_OUT})")
    add_fresh(parser)
    add_json(parser, "the profile on stdout, progress on stderr")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure; exit 1 when a mode could not be measured."""
    # Late: engines, numpy and scipy.
    import uvloop

    from msd import logs
    from msd.engine.host import identity, look
    from msd.learning.profiling import FAMILY_NAMES, Plan
    from msd.telemetry.nvml import installed_gpus

    file = settings.find(options.config)
    config = load_config(file)
    config = _only(config, options.engines)
    logs.configure(config.daemon)
    simulated = config.engine[0].kind == "sim"
    plan = Plan(
        families=chosen(options.families, FAMILY_NAMES, "--families", "family"),
        batches=options.batches,
        num_repeats=options.repeats,
        energy_s=_energy_s(options.energy_s, simulated),
    )
    host = look(*installed_gpus())
    work = _Work(options, config, file.parent, plan, identity(config, host))
    work.begin(fresh=options.fresh)
    try:
        code: int = uvloop.run(work.measure())
    except asyncio.CancelledError:  # by SIGTERM; the engine is stopped
        code = EXIT_TERMINATED
    if "vllm" in sys.modules:
        # As in `msd serve`: all is closed, and the interpreter's teardown of vLLM says nothing that anyone needs.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


class _Work:
    """One run of the command: what is measured so far, in memory and in FILE.partial."""

    def __init__(
        self,
        options: argparse.Namespace,
        config: settings.Config,
        base_dir: Path,
        plan: Plan,
        where: Identity,
    ) -> None:
        self._out = Path(options.out)
        self._partial = self._out.with_name(f"{self._out.name}.partial")
        self._json = bool(options.json)
        self._config = config
        self._base_dir = base_dir
        self._plan = plan
        self._where = where
        self._simulated = config.engine[0].kind == "sim"
        self._modes: dict[str, ModeProfile] = {}
        self._idle_w: float | None = None
        self._progress = _Progress()

    def begin(self, *, fresh: bool) -> None:
        """Take up what an interrupted run has measured. Raises ConfigError when that was something else."""
        from msd.profile import differences, load

        if not self._partial.is_file():
            return
        if fresh:
            self._partial.unlink()
            return
        before = load(self._partial)
        where = self._where
        found = list(differences(before, self._config, self._base_dir, where.device, where.engine_version))
        if found:
            raise ConfigError(
                f"{self._partial} cannot be resumed: {'; '.join(found)}", remedy="throw it away with --fresh"
            )
        self._modes = {mode.mode: mode for mode in before.modes}
        self._idle_w = before.idle_w
        num_cells = sum(len(mode.cells) for mode in before.modes)
        say(f"going on with {self._partial}: {num_cells} cells of {len(before.modes)} modes are there")

    async def measure(self) -> int:
        """All modes, one after another; the exit code."""
        from msd.clock import MonotonicClock
        from msd.engine import factory
        from msd.learning.profiling import Profiler
        from msd.telemetry.probes import start_probes

        _sigterm_cancels()
        clock = MonotonicClock()
        logs_folder = None
        if any(engine.kind == "vllm" for engine in self._config.engine):
            from msd.engine.vllm import import_vllm

            logs_folder = factory.run_dir(self._config)
            say(f"importing vLLM; logs of the engines go to {logs_folder}")
            import_vllm()
        gpu = factory.simulated_gpu(self._config, clock)
        probes = start_probes(self._config.telemetry, clock, gpu)
        profiler = Profiler(probes[0], clock, self._plan, self._progress.step, self._store)
        profiler.idle_w = self._idle_w
        failed: list[str] = []
        self._describe_run()
        try:
            for subject in self._subjects(clock, gpu, logs_folder):
                known = self._modes.get(subject.mode)
                if known is not None and is_whole(known):
                    continue  # it was measured to its end
                self._progress.begin(subject.mode)
                try:
                    await profiler.measure(subject, known)
                except EngineError as error:
                    failed.append(subject.mode)
                    self._progress.end()
                    terminal.complain(f"mode {subject.mode} was not measured: {error}")
                self._idle_w = profiler.idle_w
        finally:
            self._progress.end()
            for probe in probes:
                probe.stop()
        return self._finish(failed)

    def _subjects(self, clock: Any, gpu: Any, logs_folder: Path | None) -> list[Subject]:
        from msd.engine import factory
        from msd.learning.profiling import Subject
        from msd.profile import settings_of
        from msd.recipe import recipe_hash

        tokenizers = factory.load_tokenizers(self._config, self._base_dir)
        return [
            Subject(
                mode=engine.name,
                make=factory.engine_factory(engine, self._config, self._base_dir, clock, gpu, logs_folder),
                tokenizer=tokenizers[engine.model],
                recipe=recipe_hash(engine, self._config, self._base_dir),
                settings=settings_of(engine),
                max_num_seqs=engine.max_num_seqs,
                sleep_level=self._config.residency.sleep_level,
            )
            for engine in self._config.engine
        ]

    def _describe_run(self) -> None:
        if self._simulated:
            say(terminal.paint(SIMULATED, "yellow", stream=sys.stderr))
        load, num_cores = os.getloadavg()[0], os.cpu_count() or 1
        if not self._simulated and load > BUSY * num_cores:
            say(f"this machine is busy: load {load:.1f} on {num_cores} cores; the figures will be worse than it can")
        energy_s = self._plan.energy_s
        if energy_s and not self._simulated and energy_s < ENERGY_S:
            say(f"windows of {energy_s:g} s are short for energy: compare modes over {ENERGY_S:g} s or more")

    def _store(self, mode: ModeProfile) -> None:
        """After each cell: an interrupted run loses one cell at most."""
        from msd import profile

        self._modes[mode.mode] = mode
        profile.write(self._partial, self._profile())

    def _profile(self) -> Profile:
        from msd.profile import SCHEMA, Profile

        order = {engine.name: index for index, engine in enumerate(self._config.engine)}
        return Profile(
            schema=SCHEMA,
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            command=" ".join(["msd", *sys.argv[1:]]),
            device=self._where.device,
            engine_version=self._where.engine_version,
            source="simulated" if self._simulated else "measured",
            idle_w=self._idle_w,
            modes=tuple(sorted(self._modes.values(), key=lambda mode: order.get(mode.mode, len(order)))),
        )

    def _finish(self, failed: Sequence[str]) -> int:
        from msd import profile

        if not any(is_whole(mode) for mode in self._modes.values()):
            raise EngineStartError("no mode could be measured", remedy="the lines above say why")
        whole = self._profile()
        profile.write(self._out, whole)
        self._partial.unlink(missing_ok=True)
        if self._json:
            print(json.dumps(msgspec.to_builtins(whole)))
        else:
            print("\n".join(render(whole)))
            print(f"\nwritten to {self._out}; policy.profile names it, and msd starts from it")
            print(f"as a page: msd report profile {self._out} --out profile.html")
        return EXIT_NO if failed else EXIT_OK


def is_whole(mode: ModeProfile) -> bool:
    """Whether it was measured to its end: only then lines are fitted."""
    return any(mode.ttft_ms) or any(mode.tpot_ms)


def render(profile: Profile) -> list[str]:
    """The profile as a table for a terminal."""
    from msd.learning.fitting import mean_error, ttft_at

    rows = []
    for mode in profile.modes:
        alone = [cell for cell in mode.cells if cell.batch_size == 1]
        error = mean_error(
            [ttft_at(mode, cell.num_prompt_tokens, cell.num_cached_tokens) for cell in alone],
            [cell.ttft_ms for cell in alone],
        ) if alone else None  # fmt: skip
        fastest = max((cell.tokens_per_s for cell in mode.cells), default=None)
        energies = [cell.mj_per_token for cell in mode.cells if cell.mj_per_token is not None and cell.batch_size == 1]
        a0, a1, _ = mode.ttft_ms
        c0, c1, _ = mode.tpot_ms
        rows.append(
            [
                mode.mode,
                terminal.number(mode.start_s),
                f"{a0:.1f} + {a1:.4f} n",
                terminal.number(error * 100 if error is not None else None, "%", 0),
                f"{c0:.2f} + {c1:.3f} b",
                terminal.number(fastest, digits=0),
                terminal.number(min(energies) if energies else None, digits=0),
                terminal.number(mode.gpu_bytes / 1e9 if mode.gpu_bytes else None),
                terminal.number(mode.sleep_s, digits=2),
                terminal.number(mode.wake_s, digits=2),
            ]
        )
    head = ["mode", "start s", "TTFT ms", "error", "TPOT ms", "tokens/s", "mJ/token", "GPU GB", "sleep s", "wake s"]
    notes = [
        f"{profile.device}, {profile.engine_version}; n = prompt tokens to compute, b = other requests in the batch, "
        "tokens/s at the best batch, mJ/token alone at the best family (idle power included)"
    ]
    if profile.source == "simulated":
        notes.append(SIMULATED)
    return [*terminal.table(head, rows), *(terminal.paint(note, "dim") for note in notes)]


class _Progress:
    """A bar with the time that is left, on a terminal; else a line per cell now and then. On stderr."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._told = ""

    def begin(self, mode: str) -> None:
        if not terminal.redraws(sys.stderr):
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.fields[mode]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task("", total=None, mode=mode)
        self._bar.start()

    def step(self, mode: str, doing: str, done: int, total: int) -> None:
        """Called before each step."""
        if self._bar is not None:
            self._bar.update(self._task, description=doing, completed=done, total=total or None)
            if done == total and total:
                self.end()
            return
        say(f"{mode} {done}/{total or '?'}: {doing}")

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def say(line: str) -> None:
    """A line of progress."""
    print(line, file=sys.stderr, flush=True)


def _sigterm_cancels() -> None:
    """SIGTERM ends the run as Ctrl-C does: the engine is stopped, what was measured stays."""
    task = asyncio.current_task()
    assert task is not None, "called from a task"
    loop = asyncio.get_running_loop()

    def end() -> None:
        say("interrupted; the same command goes on from here")
        task.cancel()

    loop.add_signal_handler(signal.SIGTERM, end)


def _only(config: settings.Config, asked: Sequence[str] | None) -> settings.Config:
    """The configuration with the engines to be measured alone."""
    known = [engine.name for engine in config.engine]
    wanted = chosen(asked, known, "--engines", "[[engine]]")
    engines = tuple(engine for engine in config.engine if engine.name in wanted and engine.kind != "noop")
    if not engines:
        raise ConfigError("there is no engine to measure", remedy="no-op engines do nothing")
    if len({engine.kind for engine in engines}) > 1:
        raise ConfigError("real and simulated engines cannot share a profile", remedy="choose some with --engines")
    return msgspec.structs.replace(config, engine=engines)


def _energy_s(asked: float | None, simulated: bool) -> float:
    if asked is not None:
        return asked
    return SIMULATED_ENERGY_S if simulated else ENERGY_S


def _sizes(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 1 <= int(part) <= 4_096 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers from 1 to 4,096")
    return tuple(sorted({int(part) for part in parts}))


def _repeats(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 1_000):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 1,000")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 600")
    return value
