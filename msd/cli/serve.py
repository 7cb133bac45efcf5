"""`msd serve`: the daemon itself, in the foreground; systemd or a terminal looks after it."""

from __future__ import annotations

import argparse
import os
import sys

from msd import config as settings
from msd.cli.options import Commands, add_config, load_config


def add_to(commands: Commands) -> None:
    """Add `serve` to the command line."""
    parser = commands.add_parser(
        "serve",
        help="run the daemon in the foreground",
        description="Run the daemon in the foreground. SIGTERM or Ctrl-C drains; a second one aborts.",
    )
    add_config(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Serve until a signal says to stop; returns the daemon's exit code."""
    file = settings.find(options.config)
    config = load_config(file)
    # Late: the daemon brings the event loop, the sockets and, if the configuration says so, vLLM.
    from msd.daemon import serve

    code = serve(config, file.parent)
    if "vllm" in sys.modules:
        # Everything is closed and flushed. What is left is the interpreter's own teardown, in which extension modules
        # that vLLM brings complain over some fifty lines about objects that nobody will need any more.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
