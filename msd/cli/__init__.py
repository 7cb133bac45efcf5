"""The command line: `msd COMMAND`, one file per word.

Each file has `add_to(commands)`, which adds its parser, and imports what is heavy only when it runs: `msd send` works
with the producer's two packages, and nothing but `serve` may load vLLM.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from msd.cli import (
    check,
    compare,
    decisions,
    demo,
    explain,
    gate,
    modes,
    profile,
    replay,
    report,
    send,
    serve,
    sim,
    status,
    terminal,
    train_router,
    version,
)
from msd.errors import EXIT_INTERNAL, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, MsdError

EXIT_CODES = """\
exit codes: 0 ok, 1 the answer is no, 2 usage, 69 daemon unreachable, 70 internal error, 74 journal I/O,
75 no device, 78 configuration, 130 interrupted, 143 terminated"""


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    root = argparse.ArgumentParser(
        prog="msd",
        description="ModeSwitch daemon: routes LLM requests over several vLLM engines in one process.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = root.add_subparsers(title="commands", metavar="COMMAND")
    for command in (
        serve,
        check,
        modes,
        profile,
        gate,
        replay,
        train_router,
        report,
        demo,
        send,
        status,
        explain,
        decisions,
        sim,
        compare,
        version,
    ):
        command.add_to(commands)
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. An operating error is one line on stderr, a bug is a traceback."""
    root = parser()
    options = root.parse_args(arguments)
    if "run" not in options:
        root.print_help(sys.stderr)
        return EXIT_USAGE
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        code = run(options)
        sys.stdout.flush()
    except MsdError as error:
        terminal.complain(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader has seen enough (`msd check | head`). Python would complain once more at its own flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in ("msd", "loadgen", "testbed"):
            raise
        terminal.complain(f"this command needs the package {error.name}: pip install '.[serve]' in msd's checkout")
        return EXIT_INTERNAL
    except Exception:
        traceback.print_exc()
        terminal.complain("this is a bug in msd; the lines above say where")
        return EXIT_INTERNAL
    assert code >= EXIT_OK, code
    return code
