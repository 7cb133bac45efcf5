"""Reads a decoded TOML document into the schema and collects every problem on the way.

`msgspec.convert` decides what is valid; this walk runs where it refused, because it stops at the first error. What is
wrong is left out (and a required name becomes empty), so that the rules that span fields can still look at the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Struct

from msd.config import describe
from msd.config.positions import Path
from msd.config.problems import ABSENT, Problem, close, dotted, nearest, shown
from msd.config.schema import Config

S = TypeVar("S", bound=Struct)

_INVALID: Any = object()


class Reader:
    """One pass over one document; `problems` and `broken` (the paths they are at) grow with it."""

    def __init__(self, lines: Mapping[Path, int]) -> None:
        self._lines = lines
        self.problems: list[Problem] = []
        self.broken: set[Path] = set()

    def report(self, path: Path, message: str, value: object = ABSENT) -> None:
        """Note one problem at `path`, on the line of the innermost part of it that is in the file."""
        line = next((self._lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self._lines), None)
        self.problems.append(Problem(field=dotted(path), message=message, value=shown(value), line=line))
        self.broken.add(path)

    def read(self, document: dict[str, object]) -> Config:
        """The configuration as far as it is valid."""
        return self._struct(Config, document, ())

    def _struct(self, cls: type[S], table: dict[str, object], path: Path) -> S:
        annotations = annotations_of(cls)
        values: dict[str, object] = {}
        for key, value in table.items():
            if key not in annotations:
                self.report((*path, key), _unknown(key, cls), value)
            elif (read := self._value(annotations[key], value, (*path, key))) is not _INVALID:
                values[key] = read
        for required in (info.name for info in msgspec.structs.fields(cls) if info.required):
            if required not in table:
                self.report((*path, required), f"missing; it must be {describe.allowed(annotations[required])}")
            values.setdefault(required, "")
        return cls(**values)

    def _value(self, annotation: object, value: object, path: Path) -> Any:
        struct, array = describe.as_struct(annotation), describe.as_struct_array(annotation)
        if struct is not None:
            if isinstance(value, dict):
                return self._struct(struct, value, path)
            self.report(path, f"must be a table, headed [{dotted(path)}]", value)
            return _INVALID
        if array is not None:
            if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
                self.report(path, f"must be an array of tables, each headed [[{dotted(path)}]]", value)
                return _INVALID
            entries = tuple(self._struct(array, entry, (*path, index)) for index, entry in enumerate(value))
            longest = next(meta.max_length for meta in getattr(annotation, "__metadata__", ()) if meta.max_length)
            if len(entries) > longest:
                self.report(path, f"there are {len(entries)}; at most {longest} are allowed")
            return entries
        try:
            return msgspec.convert(value, annotation)
        except msgspec.ValidationError:
            if not self._parts(annotation, value, path):
                self.report(path, _not_allowed(annotation, value), value)
            return _INVALID

    def _parts(self, annotation: object, value: object, path: Path) -> bool:
        """Report what is wrong inside a list or table; False if no part of it alone is to blame."""
        inner = describe.bare(annotation)
        before = len(self.problems)
        if isinstance(value, list) and get_origin(inner) is tuple:
            for index, item in enumerate(value):
                self._value(get_args(inner)[0], item, (*path, index))
        elif isinstance(value, dict) and get_origin(inner) is dict:
            key_type, value_type = get_args(inner)
            known = describe.choices(key_type)
            for key, item in value.items():
                if known and key not in known:
                    self.report((*path, key), f"unknown key; {nearest(key, known)}", item)
                else:
                    self._value(value_type, item, (*path, key))
        return len(self.problems) > before


@cache
def annotations_of(cls: type[Struct]) -> dict[str, object]:
    """The fields of a Struct with their full annotations."""
    return get_type_hints(cls, include_extras=True)


def sections(cls: type[Struct] = Config, header: str = "") -> list[tuple[str, type[Struct], bool]]:
    """Every table of the schema: (dotted header, its Struct, whether it is an array), in the order of the schema."""
    found: list[tuple[str, type[Struct], bool]] = []
    for name, annotation in annotations_of(cls).items():
        single, array = describe.as_struct(annotation), describe.as_struct_array(annotation)
        if struct := single or array:
            dotted_name = f"{header}.{name}" if header else name
            found.append((dotted_name, struct, array is not None))
            found.extend(sections(struct, dotted_name))
    return found


def _unknown(key: str, cls: type[Struct]) -> str:
    known = annotations_of(cls)
    homes = [f"[{header}]" for header, struct, _ in sections() if key in annotations_of(struct)]
    if homes and close(key, known) is None:
        return f"unknown key here; it belongs to {' or '.join(homes)}"
    return f"unknown key; {nearest(key, known)}"


def _not_allowed(annotation: object, value: object) -> str:
    message = f"must be {describe.allowed(annotation)}"
    words = describe.choices(annotation)
    return f"{message}; {nearest(value, words)}" if words and isinstance(value, str) else message
