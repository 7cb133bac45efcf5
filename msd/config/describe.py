"""Says in words what a setting may be: the same words in `msd check` and in the reference page."""

from __future__ import annotations

from types import NoneType
from typing import Literal, get_args, get_origin

from msgspec import Meta, Struct


def description(annotation: object) -> str:
    """What the schema says a setting is for; empty where it says nothing."""
    return " ".join(meta.description for meta in _metas(annotation) if meta.description)


def choices(annotation: object) -> tuple[str, ...]:
    """The words that a setting may be, where the schema lists them."""
    inner = bare(annotation)
    return get_args(inner) if get_origin(inner) is Literal else ()


def allowed(annotation: object) -> str:
    """What a setting may be, for example `an integer from 1 to 64`."""
    inner = bare(annotation)
    arguments = get_args(inner)
    kind = get_origin(inner) or inner
    if kind is bool:
        return "true or false"
    if kind is int:
        return "an integer" + _range(annotation)
    if kind is float:
        return "a number" + _range(annotation)
    if kind is str:
        named = any(meta.pattern for meta in _metas(annotation))
        return "a name of at most 64 letters, digits, `.`, `_`, `-`" if named else "a string"
    if kind is Literal:
        return ("one of " if len(arguments) > 1 else "only ") + ", ".join(f"`{word}`" for word in arguments)
    if kind is tuple:
        return f"a list{_length(annotation)}, each {allowed(arguments[0])}"
    if kind is dict and choices(arguments[0]):
        return f"a table of {', '.join(f'`{key}`' for key in choices(arguments[0]))}, each {allowed(arguments[1])}"
    if kind is dict:
        return "a table" if arguments[1] is object else f"a table, each value {allowed(arguments[1])}"
    if NoneType in arguments:
        return allowed(arguments[0])
    if as_struct(inner):
        return "a table"
    raise AssertionError(f"the schema uses {annotation!r}, for which there are no words yet")


def bare(annotation: object) -> object:
    """The annotation without its Meta, as far as the outermost type goes."""
    return get_args(annotation)[0] if hasattr(annotation, "__metadata__") else annotation


def as_struct(annotation: object) -> type[Struct] | None:
    """The Struct that a table is read into, if the annotation is one."""
    inner = bare(annotation)
    return inner if isinstance(inner, type) and issubclass(inner, Struct) else None


def as_struct_array(annotation: object) -> type[Struct] | None:
    """The Struct of an array of tables, if the annotation is one."""
    inner = bare(annotation)
    return as_struct(get_args(inner)[0]) if get_origin(inner) is tuple else None


def _metas(annotation: object) -> tuple[Meta, ...]:
    return tuple(meta for meta in getattr(annotation, "__metadata__", ()) if isinstance(meta, Meta))


def _range(annotation: object) -> str:
    above = next((meta.gt for meta in _metas(annotation) if meta.gt is not None), None)
    least = next((meta.ge for meta in _metas(annotation) if meta.ge is not None), None)
    most = next((meta.le for meta in _metas(annotation) if meta.le is not None), None)
    assert most is not None, "bound every number on both sides: NaN and Infinity pass a single bound"
    if above is not None:
        return f" above {_number(above)}, at most {_number(most)}"
    assert least is not None, "bound every number on both sides: NaN and Infinity pass a single bound"
    return f" from {_number(least)} to {_number(most)}"


def _number(value: float) -> str:
    return "2^63 - 1" if value == 2**63 - 1 else f"{value:,.15g}"


def _length(annotation: object) -> str:
    shortest = next((meta.min_length for meta in _metas(annotation) if meta.min_length is not None), 0)
    longest = next((meta.max_length for meta in _metas(annotation) if meta.max_length is not None), None)
    assert longest is not None, "bound every list"
    return f" of {shortest:,} to {longest:,}" if shortest else f" of at most {longest:,}"
