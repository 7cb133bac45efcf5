"""The gate file: which modes are certified for which task, with figures; keyed by recipe hash.

`msd gate` writes it, `core/certificates.py` goes by it. A checksum over its content tells a file that was edited by
hand from one that was measured: certificates are only worth what was measured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from os import SEEK_END, fsync
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct, structs

from msd.errors import ConfigError
from msd.files import sync_folder, write_whole

SCHEMA = 1
Verdict = Literal["certified", "revoked", "undecided"]
ALL_TASKS = "*"
"""The row that stands for requests which name no task: all tasks together."""


def _warn(event: str, **values: object) -> None:
    """Log a warning. Imported late: `msd send` reads no gate file, and a producer need not have structlog."""
    import structlog

    structlog.get_logger(__name__).warning(event, **values)


class GateRow(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One mode on one task, compared pairwise with the reference mode. Accuracies 0..1."""

    mode: str
    recipe: str
    task: str
    verdict: Verdict
    num_pairs: int
    num_differ: int
    """Pairs of which exactly one was right."""
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    """Wilson 95 % interval."""
    reference_accuracy: float
    difference: float
    """Accuracy less the reference's, -1..1."""
    difference_low: float
    difference_high: float
    agreement: float = 1.0
    """Share of pairs with the same answer, right or wrong."""


class GateFile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All rows of one run of the gate, and what they were measured on."""

    schema: int
    created: str
    command: str
    versions: dict[str, str]
    host: str
    model: str
    reference: str
    reference_recipe: str
    delta: float
    alpha: float
    rows: tuple[GateRow, ...]
    stated: bool = False
    """The verdicts were stated by somebody, not measured here (for simulated or dummy-weight engines)."""
    checksum: str = ""


class Withdrawal(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A certificate that live pairs took away; it holds for the gate file whose checksum is `gate`."""

    mode: str
    recipe: str
    task: str
    gate: str
    num_pairs: int
    difference: float
    """Mean over the pairs (-1..1)."""
    capital: float
    """The evidence: 1 / quality.alpha was enough."""


Share = Annotated[float, Meta(ge=0, le=1)]
Count = Annotated[int, Meta(ge=0)]


class Tried(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A live trial under way, as it is kept beyond the process: its bets (`core/trial.py`) and what it has counted."""

    mode: str
    recipe: str
    task: str
    capital: Annotated[float, Meta(ge=0, le=1e12)]
    mean: Share
    variance: Share
    weight: Annotated[float, Meta(ge=1)]
    num_scored: Count
    sum_difference: float
    num_unscored: Count
    num_disagree: Count


class Trials(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All live trials against one gate file, at one delta."""

    schema: int
    gate: str
    delta: float
    trials: tuple[Tried, ...]


def load_trials(file: Path, gate: GateFile, delta: float) -> tuple[Tried, ...]:
    """What live trials had found when msd stopped. A file that is damaged or about something else is left aside."""
    try:
        kept = msgspec.json.decode(file.read_bytes(), type=Trials)
    except FileNotFoundError:
        return ()
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        _warn("trials_ignored", file=str(file), why=str(error))
        return ()
    if (kept.schema, kept.gate, kept.delta) != (SCHEMA, gate.checksum, delta):
        _warn("trials_ignored", file=str(file), why="they were against another gate file or quality.delta")
        return ()
    return kept.trials


def keep_trials(file: Path, gate: GateFile, delta: float, trials: Sequence[Tried]) -> None:
    """Keep them beyond the process, whole or not at all. Raises ConfigError."""
    try:
        file.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}", remedy="set daemon.state_dir") from error
    kept = Trials(schema=SCHEMA, gate=gate.checksum, delta=delta, trials=tuple(trials))
    write_whole(file, msgspec.json.encode(kept) + b"\n", "live trials", "set daemon.state_dir")


def checksum(gate: GateFile) -> str:
    """Hash of everything else in the file."""
    bare = structs.replace(gate, checksum="")
    return hashlib.blake2b(msgspec.json.encode(bare, order="sorted"), digest_size=16).hexdigest()


def write(file: Path, gate: GateFile) -> GateFile:
    """Write the file with its checksum, whole or not at all; returns what is in it. Raises ConfigError."""
    signed = structs.replace(gate, checksum=checksum(gate))
    write_whole(file, msgspec.json.format(msgspec.json.encode(signed), indent=2) + b"\n", "gate file")
    return signed


def load_withdrawals(file: Path) -> tuple[Withdrawal, ...]:
    """What was withdrawn in production before; nothing where there is no file. Raises ConfigError: not readable.

    A last line that was torn by a crash is left out: what it took away will be found again.
    """
    try:
        *lines, rest = file.read_bytes().split(b"\n")
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise ConfigError(f"withdrawn certificates {file}: {error.strerror}") from error
    try:
        kept = [msgspec.json.decode(line, type=Withdrawal) for line in lines if line]
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"withdrawn certificates {file} cannot be read: {error}",
            remedy="it says which modes were found worse in production; remove it only after `msd gate` has run again",
        ) from error
    if rest:
        if _is_whole(rest):
            kept.append(msgspec.json.decode(rest, type=Withdrawal))
        else:
            _warn("torn_line_skipped", file=str(file), num_bytes=len(rest))
    return tuple(kept)


def keep_withdrawals(file: Path, withdrawals: Sequence[Withdrawal]) -> None:
    """Note them on the disk, beyond the process. Raises ConfigError when the folder cannot be written."""
    lines = b"".join(msgspec.json.encode(one) + b"\n" for one in withdrawals)
    try:
        file.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        with file.open("a+b") as stream:
            stream.seek(0)
            rest = stream.read().rpartition(b"\n")[2]
            if _is_whole(rest):
                lines = b"\n" + lines
            elif rest:
                stream.truncate(stream.seek(-len(rest), SEEK_END))
            stream.write(lines)
            stream.flush()
            fsync(stream.fileno())
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}", remedy="set daemon.state_dir") from error
    sync_folder(file.parent)


def _is_whole(line: bytes) -> bool:
    try:
        msgspec.json.decode(line, type=Withdrawal)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return True


def load(file: Path) -> GateFile:
    """Read a gate file. Raises ConfigError: missing, not one, of another schema, or edited by hand."""
    try:
        gate = msgspec.json.decode(file.read_bytes(), type=GateFile)
    except OSError as error:
        raise ConfigError(f"gate file {file}: {error.strerror}", remedy="`msd gate` writes one") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"gate file {file} cannot be read: {error}", remedy="run `msd gate` again") from error
    if gate.schema != SCHEMA:
        raise ConfigError(f"gate file {file} has schema {gate.schema}, not {SCHEMA}", remedy="run `msd gate` again")
    if gate.checksum != checksum(gate):
        raise ConfigError(
            f"gate file {file} was changed after it was measured: its checksum does not match",
            remedy='run `msd gate` again; to use uncertified modes anyway, set quality.ungated = "allow"',
        )
    return gate
