"""Writes docs/reference/config.md from the schema, so that the page cannot say anything else than the code."""

from __future__ import annotations

import json
from inspect import getdoc

import msgspec
from msgspec import Struct

from msd.config import describe
from msd.config.read import annotations_of, sections

_HEAD = """\
# Configuration

Written from `msd/config/schema.py` by `make docs`; `make check` fails when the two differ. Do not edit by hand.

msd reads one TOML file: the one that `--config` names, else `$MSD_CONFIG`, else `./config.toml`, else
`/etc/msd/config.toml`. Every key has a default except the names. Relative paths count from the file's own folder. An
unknown key is an error, never ignored. `msd check` prints the resolved configuration, or every error at once with its
line; [config.toml](../../config.toml) is a documented example.

Units are last in names: `_s _ms _bytes _tokens _w _mj`.
"""


def reference_page() -> str:
    """The reference page, as Markdown."""
    index = [f"- [`{_header(name, array)}`](#{_anchor(name)})" for name, _, array in sections()]
    parts = [_HEAD, "\n".join(index) + "\n"]
    parts.extend(_section(name, struct, array) for name, struct, array in sections())
    return "\n".join(parts)


def _section(name: str, struct: type[Struct], array: bool) -> str:
    annotations = annotations_of(struct)
    lines = [f'<a id="{_anchor(name)}"></a>', "", f"## `{_header(name, array)}`", "", getdoc(struct) or "", ""]
    rows = [
        f"| `{info.name}` | {describe.allowed(annotations[info.name])} | {_default(info)} "
        f"| {describe.description(annotations[info.name])} |"
        for info in msgspec.structs.fields(struct)
        if not describe.as_struct(annotations[info.name]) and not describe.as_struct_array(annotations[info.name])
    ]
    if rows:
        lines += ["| key | must be | default | meaning |", "|---|---|---|---|", *rows]
    else:
        lines += [f"Has only tables of its own: {', '.join(f'`[{name}.{key}]`' for key in annotations)}."]
    return "\n".join(lines) + "\n"


def _header(name: str, array: bool) -> str:
    return f"[[{name}]]" if array else f"[{name}]"


def _anchor(name: str) -> str:
    return name.replace(".", "-")


def _default(info: msgspec.structs.FieldInfo) -> str:
    if info.required:
        return "*required*"
    value = info.default if info.default is not msgspec.NODEFAULT else info.default_factory()
    if value is None:
        return "*none*"
    if isinstance(value, dict):
        return f"`{{ {', '.join(f'{key} = {json.dumps(item)}' for key, item in value.items())} }}`" if value else "`{}`"
    return f"`{json.dumps(value)}`"
