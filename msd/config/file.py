"""Finds, reads and checks config.toml."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path

import msgspec

from msd.config import presets, rules
from msd.config.positions import lines_of
from msd.config.problems import InvalidConfigError, Problem
from msd.config.read import Reader
from msd.config.schema import Config
from msd.errors import ConfigError

SYSTEM_PATH = Path("/etc/msd/config.toml")
MAX_FILE_BYTES = 1024 * 1024

_TOML_PLACE = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)$")


def find(explicit: str | Path | None = None, environ: Mapping[str, str] = os.environ) -> Path:
    """The configuration file: `explicit` (from --config), `$MSD_CONFIG`, ./config.toml, /etc/msd/config.toml.

    One that was named must exist; the search goes on only over the places that nobody named. Raises ConfigError.
    """
    named = (("--config", explicit), ("$MSD_CONFIG", environ.get("MSD_CONFIG")))
    for origin, name in named:
        if name:
            if not Path(name).is_file():
                raise ConfigError(f"{name}: there is no such file", remedy=f"it was named by {origin}")
            return Path(name)
    local = Path("config.toml")
    for path in (local, SYSTEM_PATH):
        if path.is_file():
            return path
    raise ConfigError(
        f"no configuration: neither {local.absolute()} nor {SYSTEM_PATH} exists",
        remedy="name one with --config or $MSD_CONFIG; the repository's config.toml is a documented example",
    )


def load(
    path: str | Path | None = None, *, engine_arguments: Collection[str] = (), look_at_gate: bool = True
) -> Config:
    """The configuration from `path`, or from where `find` finds it.

    Relative paths inside it count from its folder. `engine_arguments`: names that an engine's `args` may have, from
    whoever knows the installed vLLM; empty = they are not looked at. `look_at_gate=False`: whether the gate file is
    intact is left out, for who is about to write it. Raises InvalidConfigError with every problem, or
    ConfigError when the file cannot be read.
    """
    file = find(path)
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{file}: more than {MAX_FILE_BYTES:,} bytes are no configuration")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InvalidConfigError(str(file), [Problem(field="", message="is not UTF-8", line=line)]) from error
    return parse(
        text, file=str(file), base_dir=file.parent, engine_arguments=engine_arguments, look_at_gate=look_at_gate
    )


def parse(
    text: str,
    *,
    file: str,
    base_dir: Path,
    look_at_files: bool = True,
    engine_arguments: Collection[str] = (),
    look_at_gate: bool = True,
) -> Config:
    """The configuration that `text` says. `look_at_files=False` leaves out whether the paths in it exist.

    Raises InvalidConfigError, which names `file`, with every problem.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidConfigError(file, [_syntax_problem(str(error), text)]) from error
    except RecursionError as error:
        raise InvalidConfigError(file, [Problem(field="", message="is nested too deeply")]) from error
    document = presets.expand(document)
    reader = Reader(lines_of(text))
    try:
        config = msgspec.convert(document, Config)
    except msgspec.ValidationError as error:
        config = reader.read(document)
        if not reader.problems:
            raise AssertionError("msgspec refuses what the reader accepts") from error
    unreadable = frozenset(reader.broken)
    found = rules.findings(
        config,
        base_dir,
        look_at_files=look_at_files,
        engine_arguments=engine_arguments,
        look_at_gate=look_at_files and look_at_gate,
    )
    for path, value, message in found:
        # What rests on a value that is wrong itself would be a second report of one mistake.
        if not any(path[: len(broken)] == broken for broken in unreadable):
            reader.report(path, message, value)
    if reader.problems:
        raise InvalidConfigError(file, reader.problems)
    return config


def _syntax_problem(message: str, text: str) -> Problem:
    place = _TOML_PLACE.search(message)
    if place is None:
        return Problem(field="", message=f"not TOML: {message}")
    line = int(place[1]) if place[1] else text.count("\n") + 1
    return Problem(field="", message=f"not TOML: {message[: place.start()]}", line=line)
