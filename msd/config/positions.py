"""On which line a setting stands: msgspec and tomllib both forget it, and tomlkit keeps no line numbers either."""

from __future__ import annotations

import re
import tomllib
from bisect import bisect_right

Path = tuple[str | int, ...]
"""A setting's place: table names, keys, and indices (from 0) into arrays and arrays of tables."""

_BLANK = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)*")
_SPACE = re.compile(r"[ \t]*")
_KEY_PART = re.compile(r"""[A-Za-z0-9_-]+|"(?:\\.|[^"\\\n])*"|'[^'\n]*'""")
_STRING = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}(?!")'
    r"|'''.*?'{3,5}(?!')"
    r'|"(?:\\.|[^"\\\n])*"'
    r"|'[^'\n]*'",
    re.DOTALL,
)
_BARE = re.compile(r"[^,\]}#\n]*")


def lines_of(text: str) -> dict[Path, int]:
    """Map each setting and table in `text` to its line, counted from 1.

    `text` must have passed tomllib: the scanner relies on its being TOML and looks only for where things begin.
    """
    scanner = _Scanner(text)
    scanner.scan_document()
    return scanner.lines


class _Scanner:
    """One pass over a document; `_at` is the offset that is looked at."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._newlines = [match.start() for match in re.finditer("\n", text)]
        self._num_tables: dict[Path, int] = {}
        self.lines: dict[Path, int] = {}

    def scan_document(self) -> None:
        table: Path = ()
        while self._skip(_BLANK) < len(self._text):
            start = self._at
            if self._take("[["):
                keys = self._key()
                array = (*self._resolve(keys[:-1]), keys[-1])
                index = self._num_tables.get(array, 0)
                self._num_tables[array] = index + 1
                table = (*array, index)
                self._note(table, start)
                self._take("]]")
            elif self._take("["):
                table = self._resolve(self._key())
                self._note(table, start)
                self._take("]")
            else:
                self._pair(table)

    def _pair(self, table: Path) -> None:
        start = self._at
        path = (*table, *self._key())
        self._note(path, start)
        self._take("=")
        self._skip(_SPACE)
        self._value(path)

    def _value(self, path: Path) -> None:
        self._note(path, self._at)
        if self._take("["):
            index = 0
            while self._skip(_BLANK) >= 0 and not self._take("]"):
                self._value((*path, index))
                self._skip(_BLANK)
                self._take(",")
                index += 1
        elif self._take("{"):
            while self._skip(_BLANK) >= 0 and not self._take("}"):
                self._pair(path)
                self._skip(_BLANK)
                self._take(",")
        elif self._text[self._at] in "\"'":
            self._skip(_STRING)
        else:
            self._skip(_BARE)

    def _key(self) -> tuple[str, ...]:
        parts: list[str] = []
        while True:
            self._skip(_SPACE)
            start = self._at
            end = self._skip(_KEY_PART)
            part = self._text[start:end]
            # A quoted key has escapes; tomllib knows them.
            parts.append(str(tomllib.loads(f"key = {part}")["key"]) if part[0] in "\"'" else part)
            self._skip(_SPACE)
            if not self._take("."):
                return tuple(parts)

    def _resolve(self, keys: tuple[str, ...]) -> Path:
        """The table that `[a.b]` means: within an array of tables, the latest one."""
        path: Path = ()
        for key in keys:
            path = (*path, key)
            if path in self._num_tables:
                path = (*path, self._num_tables[path] - 1)
        return path

    def _note(self, path: Path, offset: int) -> None:
        """Keep the first line of `path`, and of the tables that it implies."""
        line = bisect_right(self._newlines, offset - 1) + 1
        for length in range(1, len(path) + 1):
            self.lines.setdefault(path[:length], line)

    def _skip(self, pattern: re.Pattern[str]) -> int:
        match = pattern.match(self._text, self._at)
        if match is not None:
            self._at = match.end()
        return self._at

    def _take(self, token: str) -> bool:
        if not self._text.startswith(token, self._at):
            return False
        self._at += len(token)
        return True
