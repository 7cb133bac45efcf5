"""`msd report`: what was measured, drawn as one self-contained HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path

from msd.cli.options import Commands
from msd.errors import EXIT_OK, ConfigError


def add_to(commands: Commands) -> None:
    """Add `report` to the command line."""
    parser = commands.add_parser(
        "report",
        help="draw what was measured as a page",
        description="Draw what was measured as one HTML page that needs nothing from outside: no scripts, no fonts.",
    )
    kinds = parser.add_subparsers(title="reports", metavar="REPORT", required=True)
    profile = kinds.add_parser("profile", help="a profile that `msd profile` wrote", description="Draw a profile.")
    profile.add_argument("file", metavar="FILE", help="the profile")
    profile.add_argument("--out", metavar="PAGE", default="profile.html", help="the page (default profile.html)")
    profile.set_defaults(run=run_profile)


def run_profile(options: argparse.Namespace) -> int:
    """Write the page."""
    # Late: matplotlib takes a second.
    from msd.learning.profile_page import page
    from msd.profile import load

    content = page(load(Path(options.file)))
    out = Path(options.out)
    try:
        out.write_text(content)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror}", remedy="name another with --out") from error
    print(f"written to {out}: {len(content) / 1024:.0f} KiB, opens in any browser")
    return EXIT_OK
