"""`msd train-router`: trains the routers that the policy `learned` runs, judges them, and writes the best."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from msd.cli import terminal
from msd.cli.live import Live
from msd.cli.options import Commands, add_json
from msd.cli.replay import PUBLISHED, read_log
from msd.cli.terminal import DASH, table
from msd.errors import EXIT_OK, ConfigError

if TYPE_CHECKING:
    from msd.learning.off_policy import Trial
    from msd.router_file import HeldOut, Kind, Router

DEFAULT_OUT: Final = "router.json"
KIND_NAMES: Final = ("logistic", "tree", "forest", "boosting")
_BAR: Final = 30

OnStep = Callable[[str, str], None]
"""Told which kind of router is at work, and on what."""


def add_to(commands: Commands) -> None:
    """Add `train-router` to the command line."""
    parser = commands.add_parser(
        "train-router",
        help="train the routers of the policy `learned`, judge them on what they have not seen, write the best",
        description="Train logistic regression, a decision tree, a random forest and gradient boosting; judge each by "
        "regret and broken constraints on held-out families (or the later half of the log); write the one of least "
        "regret, trained on everything, as plain arrays. Needs scikit-learn (pip install '.[lab]' in the checkout); "
        "serving does not.",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--matrix", action="store_true", help="on the published matrix (default)")
    source.add_argument("--log", metavar="DIR", help="on our own decision log: its folder, or daemon.state_dir")
    parser.add_argument("--kind", choices=KIND_NAMES, help="only this one (default: all four, the best is written)")
    parser.add_argument("--out", metavar="FILE", default=DEFAULT_OUT, help=f"the router (default {DEFAULT_OUT})")
    parser.add_argument("--skip-corrupt", action="store_true", help="log: go on without lines that do not hold")
    add_json(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Train, judge, write."""
    from msd import router_file

    out = Path(options.out)
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}", remedy="make it, or name another")
    kinds: tuple[Kind, ...] = (options.kind,) if options.kind else router_file.KINDS
    command = shlex.join(["msd", "train-router", *_words(options)])
    scores, router = _from_log(options, kinds, command) if options.log else _from_matrix(kinds, command)
    router_file.write(out, router)
    if options.json:
        plain = {
            "ok": True,
            "data": router.source,
            "data_hash": router.data_hash,
            "num_examples": router.num_examples,
            "scores": scores,
            "kind": router.kind,
            "file": str(out),
        }
        print(json.dumps(msgspec.to_builtins(plain), ensure_ascii=False))
    else:
        print("\n".join(_render(scores, router, out)))
    return EXIT_OK


def _from_matrix(kinds: Sequence[Kind], command: str) -> tuple[dict[Kind, HeldOut], Router]:
    from msd.learning import matrix as published
    from msd.learning import router_training as training

    matrix = published.load()
    step = _progress(len(kinds) * len(matrix.families))
    judged = {}
    for kind in kinds:
        score = training.held_out_matrix(matrix, kind, on_family=partial(step, kind))
        judged[kind] = training.held_out(score)
    best = _best(judged)
    router = training.matrix_router(matrix, best, judged[best], created=_now(), command=command, versions=_versions())
    return judged, router


def _from_log(options: argparse.Namespace, kinds: Sequence[Kind], command: str) -> tuple[dict[Kind, HeldOut], Router]:
    from msd.learning import router_training as training

    log: list[Trial] = read_log(options.log, skip_corrupt=options.skip_corrupt)
    step = _progress(len(kinds))
    judged = {}
    for kind in kinds:
        step(kind, f"the earlier half of {len(log):,} decisions")
        judged[kind] = training.held_out_log(log, kind)
    best = _best(judged)
    router = training.log_router(log, best, judged[best], created=_now(), command=command, versions=_versions())
    return judged, router


def _best(judged: dict[Kind, HeldOut]) -> Kind:
    """Fewest broken constraints, then least regret."""
    return min(judged, key=lambda kind: (judged[kind].num_violations, judged[kind].regret))


def _render(scores: dict[Kind, HeldOut], router: Router, out: Path) -> list[str]:
    unit = router.held_out.unit
    told = PUBLISHED if router.source.startswith("published") else router.source
    held_out = "each family left out once" if unit == "families" else "the later half, the earlier one trained on"
    return [
        terminal.paint(told, "yellow"),
        f"judged on {router.held_out.num_judged:,} {unit} that were held out: {held_out}",
        *table(
            ["router", "speedup", "energy", "regret", "oracle match", "violations"],
            [
                [
                    kind,
                    f"{score.speedup:.3f}",
                    DASH if score.energy_ratio is None else f"{score.energy_ratio:.3f}",
                    f"{score.regret:.2%}",
                    f"{score.oracle_match:.0%}",
                    f"{score.num_violations:,}",
                ]
                for kind, score in scores.items()
            ],
        ),
        f"{out}: {router.kind}, trained on all {router.num_examples:,} examples, {len(router.modes)} modes; serve with",
        f'  [policy] name = "learned"   [policy.learned] file = "{out}"',
    ]


def _progress(num_steps: int) -> OnStep:
    """A bar on a terminal, a line now and then elsewhere; on stderr."""
    live = Live(sys.stderr)
    done = 0

    def step(kind: str, what: str) -> None:
        nonlocal done
        filled = _BAR * done // num_steps
        line = f"[{'#' * filled}{'.' * (_BAR - filled)}] {done} of {num_steps}: {kind}, {what}"
        live.draw([line], line, step=kind)
        done += 1

    return step


def _words(options: argparse.Namespace) -> list[str]:
    words = ["--log", options.log] if options.log else ["--matrix"]
    if options.kind:
        words += ["--kind", options.kind]
    return [*words, "--out", options.out]


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("msd", "scikit-learn")}
