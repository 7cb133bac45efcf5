"""The decision log as a format: one line per decision, one per observation; how a line is made, and read back.

Files `decisions-NNNNNNNN.jsonl` of JSON lines, oldest first:

    {"v":1,"crc":"1c291ca3","record":{"type":"decided",...}}

`crc` is the CRC-32 of the record's bytes, in hex. Each file begins with an `opened` record, so that it can be read
alone. A last line without its end is what a crash leaves: it is skipped. Any other line that does not hold is an error.
The writer is `msd/journal/decision_log.py`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from zlib import crc32

import msgspec
from msgspec import Struct

from msd.domain import Decision, Mode, Observation, Slo
from msd.errors import EXIT_JOURNAL, MsdError

VERSION = 1
FOLDER = "decisions"
SYSTEM_STATE_DIR = Path("/var/lib/msd")

_NAME = re.compile(r"decisions-(\d{8})\.jsonl")
_HEAD = b'{"v":%d,"crc":"' % VERSION
_MIDDLE = b'","record":'
_CRC_CHARS = 8
_RECORD_AT = len(_HEAD) + _CRC_CHARS + len(_MIDDLE)
_ANY_VERSION = re.compile(rb'\{"v":(\d{1,9}),')


class Opened(Struct, frozen=True, kw_only=True, tag_field="type", tag="opened"):
    """A file begins: what its decisions chose from. `t_unix_us` is wall-clock time here and below."""

    t_unix_us: int
    server: str
    policy: str
    modes: tuple[Mode, ...]
    """In the order of every decision's candidates."""


class Decided(Struct, frozen=True, kw_only=True, tag_field="type", tag="decided"):
    """A request was sent to a mode."""

    t_unix_us: int
    tenant: str
    client_request_id: str
    since_receipt_us: int
    """From receipt to this decision: predictions count from the decision, measured TTFT and E2EL from receipt."""
    slo: Slo
    decision: Decision


class Observed(Struct, frozen=True, kw_only=True, tag_field="type", tag="observed"):
    """What was measured of a decision whose request got its answer; written once its energy is known."""

    t_unix_us: int
    request_id: str
    observation: Observation


Record = Opened | Decided | Observed


class Episode(Struct, frozen=True, kw_only=True):
    """A decision and what came of it; `observed` None: its answer is still to come, or never came."""

    decided: Decided
    observed: Observed | None


class UnreadableDecisionLogError(MsdError):
    """The log's folder or a file of it cannot be read. Recoverable by the operator: mostly permissions."""

    exit_code = EXIT_JOURNAL


class CorruptDecisionLogError(MsdError):
    """A line of the log does not hold. Recoverable: what is around it can be read, if whoever reads wants that."""

    exit_code = EXIT_JOURNAL

    def __init__(self, file: Path, line: int, reason: str) -> None:
        super().__init__(f"{file}:{line}: {reason}", remedy="--skip-corrupt goes on without such lines")
        self.file = file
        self.line = line


def encode(record: Record) -> bytes:
    """One line."""
    body = msgspec.json.encode(record)
    return b"%s%08x%s%s}\n" % (_HEAD, crc32(body), _MIDDLE, body)


def state_dir(configured: str, base_dir: Path, environ: Mapping[str, str] = os.environ) -> Path:
    """Folder of what outlives the process: `daemon.state_dir` (from `base_dir`), systemd's, else the user's."""
    if configured:
        return base_dir / configured
    if of_systemd := environ.get("STATE_DIRECTORY", "").split(":")[0]:
        return Path(of_systemd)
    if of_user := environ.get("XDG_STATE_HOME"):
        return Path(of_user) / "msd"
    return Path(environ.get("HOME") or "/") / ".local" / "state" / "msd"


def files(folder: Path) -> list[Path]:
    """The log's files, oldest first; none where there is no such folder. Raises OSError."""
    try:
        return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))
    except (FileNotFoundError, NotADirectoryError):
        return []


def number_of(file: Path) -> int:
    """The number in the name of one of the log's files."""
    found = _NAME.fullmatch(file.name)
    assert found is not None, f"{file} is none of the log's files"
    return int(found[1])


def name_of(number: int) -> str:
    """The other way round."""
    return f"decisions-{number:08}.jsonl"


def read(
    folder: Path,
    since: float | None = None,
    *,
    containing: bytes = b"",
    on_corrupt: Callable[[CorruptDecisionLogError], None] | None = None,
) -> Iterator[Record]:
    """Records of the log, oldest first; `since`: none older than this, in Unix seconds, but each file's `Opened`.

    `containing` leaves out, unread, lines without these bytes (`needle` makes them). Raises CorruptDecisionLogError
    with file and line, or gives it to `on_corrupt` and goes on; UnreadableDecisionLogError. A file that the daemon
    removes meanwhile is skipped.
    """
    since_us = 0 if since is None else int(since * 1e6)
    for file, number, line in _lines(folder, since):
        try:
            body = _body(file, number, line)
            if containing and containing not in body:
                continue
            record = _DECODER.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            corrupt = CorruptDecisionLogError(file, number, f"not a record of this log: {error}")
        except CorruptDecisionLogError as error:
            corrupt = error
        else:
            if record.t_unix_us >= since_us or isinstance(record, Opened):
                yield record
            continue
        if on_corrupt is None:
            raise corrupt
        on_corrupt(corrupt)


def needle(text: str) -> bytes:
    """A text's bytes as they stand in a record that has it."""
    return msgspec.json.encode(text)[1:-1]


def episodes(records: Iterator[Record]) -> Iterator[Episode]:
    """Decisions joined with what came of them: in the order in which that was known, then those without.

    An observation whose decision is not among the records is left out.
    """
    open_: dict[str, Decided] = {}
    for record in records:
        match record:
            case Decided():
                open_[record.decision.decision_id] = record
            case Observed():
                decided = open_.pop(record.observation.decision_id, None)
                if decided is not None:
                    yield Episode(decided=decided, observed=record)
            case Opened():
                pass
    for decided in open_.values():
        yield Episode(decided=decided, observed=None)


_DECODER = msgspec.json.Decoder(Record)


def _lines(folder: Path, since: float | None) -> Iterator[tuple[Path, int, bytes]]:
    """Whole lines of the files that were written to since then, each with its file and number."""
    try:
        for file in files(folder):
            try:
                if since is not None and file.stat().st_mtime < since:
                    continue
                stream = file.open("rb")
            except FileNotFoundError:
                continue
            with stream:
                for number, line in enumerate(stream, 1):
                    if not line.endswith(b"\n"):
                        break  # torn by a crash, or being written at this moment
                    yield file, number, line
    except OSError as error:
        raise UnreadableDecisionLogError(
            f"{error.filename or folder}: cannot be read: {error.strerror or error}",
            remedy="run it as the daemon's user, or name another folder with --log",
        ) from error


def _body(file: Path, number: int, line: bytes) -> bytes:
    """The record's bytes in a line that holds. Raises CorruptDecisionLogError."""
    if not line.startswith(_HEAD):
        version = _ANY_VERSION.match(line)
        if version is not None and int(version[1]) != VERSION:
            reason = f"written as version {int(version[1])}; this msd reads version {VERSION}"
        else:
            reason = "not a line of a decision log"
        raise CorruptDecisionLogError(file, number, reason)
    body = line[_RECORD_AT:-2]
    if line[len(_HEAD) + _CRC_CHARS : _RECORD_AT] != _MIDDLE or line[-2:] != b"}\n":
        raise CorruptDecisionLogError(file, number, "not a line of a decision log")
    if b"%08x" % crc32(body) != line[len(_HEAD) : len(_HEAD) + _CRC_CHARS]:
        raise CorruptDecisionLogError(file, number, "its checksum does not fit: it was changed or damaged")
    return body
