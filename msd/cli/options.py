"""Options that several commands share, so that they mean the same everywhere."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from msd.config import Config, load
from msd.config.problems import nearest
from msd.errors import ConfigError

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""What a command adds its parser to; argparse has no public name for it."""


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add `--config`, with the places that are searched without it."""
    parser.add_argument(
        "--config", metavar="FILE", help="configuration (else $MSD_CONFIG, ./config.toml, /etc/msd/config.toml)"
    )


def load_config(file: Path, *, look_at_gate: bool = True) -> Config:
    """The configuration in `file`, checked with all that is known on this machine. Raises ConfigError.

    `look_at_gate=False`: but for the gate file, which may be about to be written.
    """
    # Late: `msd send` must not need what the engines' package may come to need. It reads vLLM's source, it does not
    # import it.
    from msd.engine.vllm_arguments import known_arguments

    return load(file, engine_arguments=known_arguments(), look_at_gate=look_at_gate)


def add_endpoint(parser: argparse.ArgumentParser) -> None:
    """Add `--endpoint`, with the places that are tried without it."""
    parser.add_argument(
        "--endpoint",
        metavar="URL",
        help="ipc:///path or tcp://host:port (else $MSD_ENDPOINT, /run/msd/msd.sock, $XDG_RUNTIME_DIR/msd/msd.sock)",
    )


def add_json(parser: argparse.ArgumentParser, help_text: str = "one JSON object on stdout") -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help=help_text)


def add_engines(parser: argparse.ArgumentParser, which: str = "only these") -> None:
    """Add `--engines A,B`."""
    parser.add_argument("--engines", type=names, metavar="A,B", help=f"{which} (default: all)")


def names(text: str) -> tuple[str, ...]:
    """Names with commas between them, each once, as argparse's `type`."""
    found = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not found:
        raise argparse.ArgumentTypeError("names, with commas between them")
    return found


def chosen(asked: Sequence[str] | None, known: Sequence[str], option: str, what: str) -> tuple[str, ...]:
    """What was asked for, else all that is known. Raises ConfigError with the nearest name."""
    for name in asked or ():
        if name not in known:
            raise ConfigError(f"{option}: no {what} {name!r}; {nearest(name, known)}")
    return tuple(asked or known)


def add_fresh(parser: argparse.ArgumentParser) -> None:
    """Add `--fresh`, for what takes up an earlier run by itself."""
    parser.add_argument("--fresh", action="store_true", help="throw away what an earlier run has left")


def positive(text: str) -> float:
    """A number above 0, as argparse's `type`."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def count(text: str) -> int:
    """A whole number above 0, as argparse's `type`."""
    value = positive(text)
    if value != int(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(value)


def natural(text: str) -> int:
    """A whole number from 0, as argparse's `type`."""
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)
