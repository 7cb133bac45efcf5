"""Options that several commands share, so that they mean the same everywhere."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TypeAlias

from msd.config import Config, load

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
