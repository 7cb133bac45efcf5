"""Operating errors and the exit codes that every `msd` command uses.

Programmer errors are assertions; they are not here. Exceptions of ZeroMQ, SQLite, aiohttp or vLLM are translated into
these at the adapter that met them and never travel further.
"""

from __future__ import annotations

from typing import ClassVar

EXIT_OK = 0
EXIT_NO = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 69
EXIT_INTERNAL = 70
EXIT_JOURNAL = 74
EXIT_NO_DEVICE = 75
EXIT_CONFIG = 78
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class MsdError(Exception):
    """Something that can go wrong while msd operates; says what, where, and what to do about it."""

    exit_code: ClassVar[int] = EXIT_INTERNAL

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} ({self.remedy})" if self.remedy else self.message


class ConfigError(MsdError):
    """The configuration cannot be used. Recoverable by the operator: mend the file and start again."""

    exit_code = EXIT_CONFIG


class EngineError(MsdError):
    """An engine failed. Recoverable: the pool restarts it and its requests are attempted again."""


class EngineStartError(EngineError):
    """An engine did not come up; carries the engine's own last lines. Recoverable: the pool retries with backoff."""

    def __init__(self, message: str, *, remedy: str = "", last_lines: tuple[str, ...] = ()) -> None:
        super().__init__(message, remedy=remedy)
        self.last_lines = last_lines


class EngineLostError(EngineError):
    """A live engine died under its requests. Recoverable: they are attempted again, elsewhere or after a restart."""


class RequestRefusedByEngineError(EngineError):
    """The engine refused this one request (its arguments, not its health). Not recoverable for that request.

    `error_code` is the wire's word for it: `context_overflow`, `queue_full` (the engine's own bound), `invalid_field`.
    """

    def __init__(self, message: str, *, remedy: str = "", error_code: str = "invalid_field") -> None:
        super().__init__(message, remedy=remedy)
        self.error_code = error_code


class JournalError(MsdError):
    """The journal cannot store. Not recoverable within the process: recovery is a restart."""

    exit_code = EXIT_JOURNAL


class IngressError(MsdError):
    """A socket cannot be bound: its address, its permissions, or another daemon. Recoverable by the operator."""

    exit_code = EXIT_CONFIG


class ProbeError(MsdError):
    """The GPU cannot be read. Recoverable: msd serves on with a labelled blind view, unless config insists on it."""

    exit_code = EXIT_NO_DEVICE


class DaemonUnreachableError(MsdError):
    """No daemon answered at the endpoint. Recoverable: start it, or name the right endpoint."""

    exit_code = EXIT_UNREACHABLE
