"""Plain data -> Structs with every problem at once; msgspec alone stops at the first and knows no lines."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, TypeVar, Union

import msgspec
from msgspec import Struct

S = TypeVar("S", bound=Struct)

MAX_PROBLEMS = 100

Rules = Mapping[type[Struct], Callable[[Any, str], Iterator["Problem"]]]
"""Struct type -> what yields the broken rules of one such Struct at a path."""


class Problem(Struct, frozen=True, kw_only=True):
    """One thing wrong with a spec: dotted field (`class[1].output`) and what is allowed; `line` from 1, 0 = unknown."""

    path: str
    message: str
    line: int = 0

    def __str__(self) -> str:
        where = f"{self.line}: " if self.line else " "
        return where + (f"{self.path}: {self.message}" if self.path else self.message)


def convert(struct: type[S], document: object, rules: Rules, problems: list[Problem]) -> S | None:
    """Return `document` as a `struct`; None after adding everything that is wrong with it to `problems`.

    `rules` are what types cannot say, by the Struct they are about: each is asked wherever that Struct's part of the
    document has the right form, also when other parts have not.
    """
    walk = _Walk(rules)
    for problem in walk.problems(struct, document, ""):
        problems.append(problem)
        if len(problems) >= MAX_PROBLEMS:
            break
    return None if problems else msgspec.convert(document, struct)


def locate(text: str, problem: Problem) -> Problem:
    """Return `problem` with the line of its field in a TOML text, as near as the text names it."""
    words = re.findall(r"[^.\[\]]+|\[\d+\]", problem.path)
    best = 0
    header: list[str] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        match_header = re.match(r"\s*(\[\[?)\s*([^\]]+?)\s*\]", line)
        if match_header:
            name = match_header[2]
            header = [part.strip(" \"'") for part in name.split(".")]
            if match_header[1] == "[[":
                header.append(f"[{seen.get(name, 0)}]")
                seen[name] = seen.get(name, 0) + 1
            if words[: len(header)] == header or (best == 0 and header[: len(words)] == words):
                best = number
            continue
        match_key = re.match(r"\s*([A-Za-z0-9_\".-]+)\s*=", line)
        if match_key:
            key = header + [part.strip(' "') for part in match_key[1].split(".")]
            if words[: len(key)] == key:
                best = number
    return msgspec.structs.replace(problem, line=best)


class _Walk:
    """Walks structs and arrays; leaves every leaf to msgspec."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules

    def problems(self, hint: Any, value: object, path: str) -> Iterator[Problem]:
        """Yield what is wrong with `value` as a `hint`."""
        bare = hint.__origin__ if typing.get_origin(hint) is Annotated else hint
        members = typing.get_args(bare) if typing.get_origin(bare) in (Union, types.UnionType) else (bare,)
        structs = [member for member in members if isinstance(member, type) and issubclass(member, Struct)]
        if structs and isinstance(value, dict):
            yield from self._of_struct(structs, value, path)
            return
        if typing.get_origin(bare) is tuple and isinstance(value, list):
            item_hint = typing.get_args(bare)[0]
            inner = [p for index, item in enumerate(value) for p in self.problems(item_hint, item, f"{path}[{index}]")]
            if inner:
                yield from inner
                return
        try:
            msgspec.convert(value, hint)
        except msgspec.ValidationError as error:
            expected = "a table" if structs else str(error).partition(" - at `")[0]
            yield Problem(path=path, message=f"{expected}, got {_shown(value)}")

    def _of_struct(self, structs: list[type[Struct]], value: dict[str, object], path: str) -> Iterator[Problem]:
        dot = f"{path}." if path else ""
        chosen = structs[0]
        tag_field = chosen.__struct_config__.tag_field
        if tag_field is not None:
            tags = {str(struct.__struct_config__.tag): struct for struct in structs}
            tag = value.get(tag_field)
            if not isinstance(tag, str) or tag not in tags:
                got = "missing" if tag is None else f"{_shown(tag)}{_nearest(tag, tags)}"
                yield Problem(path=f"{dot}{tag_field}", message=f"{got} (one of {', '.join(tags)})")
                return
            chosen = tags[tag]
        hints = typing.get_type_hints(chosen, include_extras=True)
        fields = {field.encode_name: field for field in msgspec.structs.fields(chosen)}
        for key, item in value.items():
            if key in fields:
                yield from self.problems(hints[fields[key].name], item, f"{dot}{key}")
            elif key != tag_field:
                yield Problem(path=f"{dot}{key}", message=f"unknown field{_nearest(key, fields) or _known(fields)}")
        for name, field in fields.items():
            if field.required and name not in value:
                yield Problem(path=f"{dot}{name}", message="missing")
        if chosen in self._rules:
            try:
                whole = msgspec.convert(value, chosen)
            except msgspec.ValidationError:
                return  # its form is wrong, and that has been said above
            yield from self._rules[chosen](whole, path)


def _nearest(word: object, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]}?" if close else ""


def _known(names: Iterable[str]) -> str:
    return f" (known: {', '.join(names)})"


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
