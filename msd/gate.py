"""The gate file: which modes are certified for which task, with figures; keyed by recipe hash.

`msd gate` writes it, `core/certificates.py` goes by it. A checksum over its content tells a file that was edited by
hand from one that was measured: certificates are only worth what was measured.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct, structs

from msd.errors import ConfigError

SCHEMA = 1
Verdict = Literal["certified", "revoked", "undecided"]
ALL_TASKS = "*"
"""The row that stands for requests which name no task: all tasks together."""


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
    """Mean of the scored pairs (-1..1); where no answer could be scored, less the share that disagreed."""
    capital: float
    """The evidence: 1 / quality.alpha was enough."""


def checksum(gate: GateFile) -> str:
    """Hash of everything else in the file."""
    bare = structs.replace(gate, checksum="")
    return hashlib.blake2b(msgspec.json.encode(bare, order="sorted"), digest_size=16).hexdigest()


def write(file: Path, gate: GateFile) -> GateFile:
    """Write the file with its checksum; returns what is in it."""
    signed = structs.replace(gate, checksum=checksum(gate))
    file.write_bytes(msgspec.json.format(msgspec.json.encode(signed), indent=2) + b"\n")
    return signed


def load_withdrawals(file: Path) -> tuple[Withdrawal, ...]:
    """What was withdrawn in production before; nothing where there is no file. Raises ConfigError: not readable."""
    try:
        lines = file.read_bytes().splitlines()
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise ConfigError(f"withdrawn certificates {file}: {error.strerror}") from error
    try:
        return tuple(msgspec.json.decode(line, type=Withdrawal) for line in lines if line)
    except msgspec.DecodeError as error:
        raise ConfigError(
            f"withdrawn certificates {file} cannot be read: {error}",
            remedy="it says which modes were found worse in production; remove it only after `msd gate` has run again",
        ) from error


def keep_withdrawal(file: Path, withdrawal: Withdrawal) -> None:
    """Note it beyond the process. Raises ConfigError when the folder cannot be written."""
    try:
        file.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        with file.open("ab") as stream:
            stream.write(msgspec.json.encode(withdrawal) + b"\n")
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}", remedy="set daemon.state_dir") from error


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
