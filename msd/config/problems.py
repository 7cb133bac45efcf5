"""What is wrong with a configuration: each problem with its place, its value and what to write instead."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence

from msgspec import Struct

from msd.config.positions import Path
from msd.errors import ConfigError

ABSENT = object()
"""Stands for a value that is not in the file, since None cannot be in a TOML file either but may be a default."""

MAX_VALUE_CHARACTERS = 60
MAX_PROBLEMS_SHOWN = 100


class Problem(Struct, frozen=True, kw_only=True):
    """One thing that is wrong. `line` counts from 1; None when the problem is an absence or concerns the whole file."""

    field: str
    message: str
    value: str = ""
    line: int | None = None

    def render(self, file: str) -> str:
        """One line: file, line, dotted field, value, what is wrong."""
        place = file if self.line is None else f"{file}:{self.line}"
        setting = f"{self.field} = {self.value}" if self.value else self.field
        return f"{place}: {setting}: {self.message}" if setting else f"{place}: {self.message}"


class InvalidConfigError(ConfigError):
    """A configuration file is wrong; carries every problem. Recoverable by the operator: mend the file."""

    def __init__(self, file: str, problems: Sequence[Problem]) -> None:
        self.file = file
        self.problems = tuple(sorted(problems, key=lambda problem: (problem.line or 0, problem.field)))
        lines = [problem.render(file) for problem in self.problems[:MAX_PROBLEMS_SHOWN]]
        if hidden := len(self.problems) - len(lines):
            lines.append(f"{file}: and {hidden} more")
        super().__init__("\n".join(lines))


def dotted(path: Path) -> str:
    """`("engine", 0, "name")` as `engine[0].name`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else part
    return text


def shown(value: object) -> str:
    """A value as a person would know it again from the file, shortened; empty for a table or what is absent."""
    if (
        value is ABSENT
        or isinstance(value, dict)
        or (isinstance(value, list) and any(isinstance(v, dict) for v in value))
    ):
        return ""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= MAX_VALUE_CHARACTERS else text[: MAX_VALUE_CHARACTERS - 2] + ".."


def close(word: str, known: Iterable[str]) -> str | None:
    """The name that was most likely meant by `word`, if any is near enough."""
    found = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.6)
    return found[0] if found else None


def nearest(word: str, known: Iterable[str]) -> str:
    """`did you mean x?` where something is close to `word`, else the nearest and what else there is to choose from."""
    names = sorted(known)
    if not names:
        return "there is none"
    if meant := close(word, names):
        return f"did you mean `{meant}`?"
    closest = difflib.get_close_matches(word, names, n=1, cutoff=0.0)[0]
    return f"the nearest of {', '.join(names)} is `{closest}`" if len(names) > 1 else f"there is only `{closest}`"
