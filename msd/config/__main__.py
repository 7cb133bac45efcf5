"""`python -m msd.config --write-docs FILE | --check-docs FILE`: keeps the reference page in step with the schema."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from msd.config.docs import reference_page
from msd.errors import EXIT_NO, EXIT_OK


def main(arguments: list[str] | None = None) -> int:
    """Write the page, or say whether it is as it would be written; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m msd.config", description=__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write-docs", type=Path, metavar="FILE", help="write the reference page")
    action.add_argument("--check-docs", type=Path, metavar="FILE", help="exit 1 if the page differs from the schema")
    options = parser.parse_args(arguments)
    page = reference_page()
    if options.write_docs is not None:
        options.write_docs.parent.mkdir(parents=True, exist_ok=True)
        options.write_docs.write_text(page, encoding="utf-8")
        return EXIT_OK
    file: Path = options.check_docs
    if file.is_file() and file.read_text(encoding="utf-8") == page:
        return EXIT_OK
    print(f"{file} is out of step with msd/config/schema.py; write it anew with `make docs`", file=sys.stderr)
    return EXIT_NO


if __name__ == "__main__":
    sys.exit(main())
