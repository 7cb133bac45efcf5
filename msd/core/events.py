"""Events: what happened in the world, in the past tense. Each carries its time, since the core has no clock."""

from __future__ import annotations

from msgspec import Struct

from msd.config import PolicyConfig
from msd.core.energy_domain import Coefficients
from msd.domain import CounterReading, EngineInfo, EngineLoad, ExitKind, FinishReason, GpuView, Request, Residence
from msd.wire import ErrorCode


class Submitted(Struct, frozen=True):
    """A producer sent a request; it is validated and its tokens are counted.

    `store_is_full`: its tenant's results that nobody has fetched leave no room for another one.
    """

    t_us: int
    request: Request
    store_is_full: bool = False


class Refused(Struct, frozen=True):
    """A submit was refused before it became a request; it counts as submitted and rejected."""

    t_us: int
    error_code: ErrorCode


class Appended(Struct, frozen=True):
    """The journal holds the request."""

    t_us: int
    request_id: str
    seq: int


class AppendDuplicated(Struct, frozen=True):
    """The journal already holds a finished request of that idempotency key."""

    t_us: int
    request_id: str
    existing_id: str
    content_hash: bytes


class AppendFailed(Struct, frozen=True):
    """The journal could not store the request."""

    t_us: int
    request_id: str
    message: str


class Recovered(Struct, frozen=True):
    """The journal held this pending request when the daemon started."""

    t_us: int
    request: Request


class FirstToken(Struct, frozen=True):
    """The attempt produced its first token."""

    t_us: int
    request_id: str
    attempt: int
    num_cached_tokens: int


class Finished(Struct, frozen=True):
    """The attempt ended with an answer, or by abort; its slot is free."""

    t_us: int
    request_id: str
    attempt: int
    finish_reason: FinishReason
    num_completion_tokens: int


class Failed(Struct, frozen=True):
    """The attempt ended without an answer; `lost`: its engine died with it."""

    t_us: int
    request_id: str
    attempt: int
    error_code: str
    message: str
    lost: bool


class Completed(Struct, frozen=True):
    """The terminal state is stored."""

    t_us: int
    request_id: str
    seq: int


class Cancelled(Struct, frozen=True):
    """A producer asked to end the request."""

    t_us: int
    request_id: str


class EngineStarting(Struct, frozen=True):
    """An engine loads and warms up: work that no request asked for."""

    t_us: int
    engine: str


class EngineUp(Struct, frozen=True):
    """An engine is warm."""

    t_us: int
    info: EngineInfo


class EngineLost(Struct, frozen=True):
    """An engine takes no requests any more, or did not start; its attempts were reported Failed before."""

    t_us: int
    engine: str
    kind: ExitKind
    reason: str


class EngineStepped(Struct, frozen=True):
    """Gauges of an engine, with (request_id, tokens so far) of what runs on it; at most 20 a second."""

    t_us: int
    engine: str
    load: EngineLoad
    progress: tuple[tuple[str, int], ...]


class CounterRead(Struct, frozen=True):
    """An energy counter was read."""

    t_us: int
    reading: CounterReading


class ViewTaken(Struct, frozen=True):
    """A newer snapshot of the GPU is there."""

    t_us: int
    view: GpuView


class EngineAsleep(Struct, frozen=True):
    """An engine left the GPU on purpose: asleep (its weights in host memory) or cold (stopped)."""

    t_us: int
    engine: str
    residence: Residence
    took_s: float


class CoefficientsFitted(Struct, frozen=True):
    """The energy model was fitted anew from closed intervals (learning/energy_model.py)."""

    t_us: int
    coefficients: dict[str, Coefficients]
    """By mode; those that ran in enough intervals. Modes that always ran together lean to their priors."""


class QualityJudged(Struct, frozen=True):
    """A shadow run ended.

    `difference`: score on trial less the reference's, -1..1, where the right answer is known. `agrees`: both gave the
    same answer; None: it came to nothing.
    """

    t_us: int
    shadow_id: str
    mode: str
    task: str
    difference: float | None
    num_tokens: int = 0
    agrees: bool | None = None


class ConfigChanged(Struct, frozen=True):
    """The operator chose another policy. What waits is decided by the new one, what runs goes on."""

    t_us: int
    policy: PolicyConfig


class Draining(Struct, frozen=True):
    """The daemon stops: no new work; running attempts may go on until `until_us`."""

    t_us: int
    until_us: int


class Tick(Struct, frozen=True):
    """Time passed; deadlines are looked at."""

    t_us: int


Event = (
    Submitted
    | Refused
    | Appended
    | AppendDuplicated
    | AppendFailed
    | Recovered
    | FirstToken
    | Finished
    | Failed
    | Completed
    | Cancelled
    | EngineStarting
    | EngineUp
    | EngineLost
    | EngineStepped
    | CounterRead
    | ViewTaken
    | EngineAsleep
    | CoefficientsFitted
    | QualityJudged
    | ConfigChanged
    | Draining
    | Tick
)
