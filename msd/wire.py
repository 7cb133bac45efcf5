"""The messages of the ZeroMQ protocol `msd1` and its error codes: msgspec only, no I/O.

Both directions are two frames, `[b"msd1"][msgpack map]`, the map tagged by `t`. The server forbids unknown fields (a
typo must not pass silently); the client ignores them, so that additive fields keep the version. Times are durations.
Reference: docs/reference/protocol.md.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

VERSION = b"msd1"
MAX_FRAME_BYTES = 4 * 1024 * 1024
MAX_PROMPT_BYTES = 1024 * 1024
MAX_DURATION_MS = 86_400_000.0
MAX_TOKENS = 131_072
MAX_MESSAGE_CHARS = 512

HELLO_FIRST = "say hello first"
"""Start of the `invalid_field` message that a connection without a session gets; `msd.client` then re-attaches."""

ErrorCode = Literal[
    "malformed",
    "unsupported_version",
    "invalid_field",
    "too_large",
    "unauthenticated",
    "forbidden",
    "idempotency_conflict",
    "context_overflow",
    "mode_unavailable",
    "quality_unreachable",
    "queue_full",
    "rate_limited",
    "no_credit",
    "deadline_infeasible",
    "deadline_exceeded",
    "draining",
    "journal_unavailable",
    "engine_unavailable",
    "dead_letter",
    "internal",
    "not_found",
]
RETRYABLE: frozenset[str] = frozenset(
    {"queue_full", "rate_limited", "no_credit", "draining", "journal_unavailable", "engine_unavailable"}
)

Id = Annotated[str, Meta(min_length=1, max_length=128)]
Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
DurationMs = Annotated[float, Meta(gt=0, le=MAX_DURATION_MS)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]


# --- client to server ------------------------------------------------------------------------------------------------


class Resume(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Deltas of `request_id` go on from token `index` of `attempt`."""

    request_id: Id
    attempt: Annotated[int, Meta(ge=0, le=2**31)] = 0
    index: Annotated[int, Meta(ge=0, le=2**31)] = 0


class Hello(
    Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, tag="hello", tag_field="t"
):
    """First message of a connection: who is asking, and how many Deltas may be under way."""

    client: Annotated[str, Meta(max_length=64)]
    tenant: Annotated[str, Meta(max_length=64)] | None = None
    delta_credit: Annotated[int, Meta(ge=0, le=65_536)] = 256
    resume: Annotated[tuple[Resume, ...], Meta(max_length=1_024)] = ()


class ChatMessage(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One turn of a conversation."""

    role: Annotated[str, Meta(min_length=1, max_length=32)]
    content: Annotated[str, Meta(max_length=MAX_PROMPT_BYTES)]


class SamplingFields(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How to sample; names and ranges as vLLM has them."""

    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=1_000)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: Int64 | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=2)] | None = None
    stop: Annotated[tuple[Annotated[str, Meta(min_length=1, max_length=256)], ...], Meta(max_length=16)] = ()
    ignore_eos: bool = False


class SloFields(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Bounds in ms; `deadline_ms` counts from receipt."""

    ttft_ms: DurationMs | None = None
    tpot_ms: DurationMs | None = None
    deadline_ms: DurationMs | None = None


NO_SLO = SloFields()


class ModeHint(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Wish for a mode; `strict`: it or an error."""

    mode: Annotated[str, Meta(min_length=1, max_length=64)]
    strict: bool = False


class Submit(
    Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, tag="submit", tag_field="t"
):
    """One request. Exactly one of `prompt`, `messages`, `prompt_token_ids`."""

    client_request_id: Id
    max_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
    prompt: Annotated[str, Meta(max_length=MAX_PROMPT_BYTES)] | None = None
    messages: Annotated[tuple[ChatMessage, ...], Meta(max_length=1_024)] | None = None
    prompt_token_ids: Annotated[tuple[TokenId, ...], Meta(max_length=131_072)] | None = None
    model: Annotated[str, Meta(max_length=128)] | None = None
    sampling: SamplingFields = SamplingFields()
    slo: SloFields = NO_SLO
    service_class: Literal["interactive", "standard", "batch"] = msgspec.field(default="standard", name="class")
    priority: Annotated[int, Meta(ge=-8, le=7)] = 0
    quality_floor: Annotated[float, Meta(ge=0, le=1)] | None = None
    task: Annotated[str, Meta(max_length=32)] | None = None
    session_id: Annotated[str, Meta(max_length=64)] | None = None
    mode_hint: ModeHint | None = None
    stream: bool = True
    prefix_id: Annotated[str, Meta(max_length=64)] | None = None
    tags: Annotated[
        dict[Annotated[str, Meta(max_length=32)], Annotated[str, Meta(max_length=128)]], Meta(max_length=8)
    ] = {}


class Cancel(
    Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, tag="cancel", tag_field="t"
):
    """Ask to end a request; exactly one of the two ids. The answer is the request's one terminal message."""

    request_id: Id | None = None
    client_request_id: Id | None = None


class Credit(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="credit", tag_field="t"):
    """`add` further Deltas may be sent."""

    add: Annotated[int, Meta(ge=1, le=65_536)]


class Status(
    Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, tag="status", tag_field="t"
):
    """State of one request; with neither id, of the daemon."""

    request_id: Id | None = None
    client_request_id: Id | None = None


class Fetch(
    Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, tag="fetch", tag_field="t"
):
    """Stored results, by id or everything after `since_seq`."""

    request_ids: Annotated[tuple[Id, ...], Meta(max_length=256)] | None = None
    since_seq: Annotated[int, Meta(ge=0, le=2**62)] | None = None
    max_bytes: Annotated[int, Meta(ge=1, le=MAX_FRAME_BYTES)] = 1024 * 1024


class Acked(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="acked", tag_field="t"):
    """These results were received and may be purged early."""

    request_ids: Annotated[tuple[Id, ...], Meta(max_length=256)]


class Feedback(
    Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, tag="feedback", tag_field="t"
):
    """How good an answer was, 0..1, as its receiver judged it."""

    request_id: Id
    score: Annotated[float, Meta(ge=0, le=1)]
    source: Annotated[str, Meta(max_length=32)] = ""


class Ping(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="ping", tag_field="t"):
    """Are you there, and in which epoch?"""

    n: Annotated[int, Meta(ge=0, le=2**53)]


ClientMessage = Hello | Submit | Cancel | Credit | Status | Fetch | Acked | Feedback | Ping


# --- server to client ------------------------------------------------------------------------------------------------


class Welcome(Struct, frozen=True, kw_only=True, tag="welcome", tag_field="t"):
    """Answer to Hello. `epoch` is random per start of the daemon; `submit_credit` is cumulative per connection."""

    server: str
    epoch: str
    tenant: str
    limits: dict[str, int]
    durable: bool
    submit_credit: int
    features: tuple[str, ...] = ()


class Ack(Struct, frozen=True, kw_only=True, tag="ack", tag_field="t"):
    """The request is accepted and stored as `durable` says; `state` tells a duplicate what became of the first."""

    client_request_id: str
    request_id: str
    seq: int
    duplicate: bool
    state: str
    durable: bool
    submit_credit: int


class Started(Struct, frozen=True, kw_only=True, tag="started", tag_field="t"):
    """The request runs now, in this mode, for the `attempt`-th time (from 1)."""

    request_id: str
    mode: str
    decision_id: str
    attempt: int
    waited_ms: float


class Restarted(Struct, frozen=True, kw_only=True, tag="restarted", tag_field="t"):
    """Forget every Delta of this request so far."""

    request_id: str
    attempt: int
    reason: str


class Delta(Struct, frozen=True, kw_only=True, tag="delta", tag_field="t"):
    """Tokens from position `index` on, with their text."""

    request_id: str
    attempt: int
    index: int
    token_ids: tuple[int, ...]
    text: str


class Usage(Struct, frozen=True, kw_only=True):
    """Tokens: of the prompt, found in the prefix cache, generated."""

    prompt: int
    cached: int
    completion: int


class TimingFields(Struct, frozen=True, kw_only=True):
    """Milliseconds: waiting in msd, to the first token, per further token, inside the engine, end to end."""

    queue_ms: float
    ttft_ms: float
    tpot_ms: float
    engine_ms: float
    e2e_ms: float


class EnergyFields(Struct, frozen=True, kw_only=True):
    """Millijoules; `source` is counter, estimated or simulated."""

    energy_mj: int
    dynamic_mj: int
    static_mj: int
    source: str
    settled: bool


class Done(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="done", tag_field="t"):
    """The one terminal answer of a request that ran (or was aborted)."""

    request_id: str
    attempt: int
    finish_reason: str
    mode: str
    decision_id: str
    usage: Usage
    timings: TimingFields
    reason: str = ""
    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    detached: bool = False
    switched: bool = False
    energy: EnergyFields | None = None
    client_request_id: str = ""


class Error(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="error", tag_field="t"):
    """A refusal, or the terminal state of a request that failed. `message` says what to do."""

    code: str
    message: str
    retryable: bool
    request_id: str | None = None
    client_request_id: str | None = None
    retry_after_ms: int | None = None
    supported: tuple[str, ...] | None = None


class EngineReport(Struct, frozen=True, kw_only=True):
    """One engine in the daemon's status. `state`: starting, up, backoff, failed or stopped, for `state_s` by now."""

    engine: str
    model: str = ""
    state: str = ""
    state_s: float = 0.0
    simulated: bool = False
    num_slots: int = 0
    num_running: int = 0
    num_waiting: int = 0
    """Requests inside the engine that wait for a place in its batch; what waits in msd is not counted here."""
    kv_usage: float = 0.0
    start_s: float | None = None
    num_starts: int = 0
    pids: tuple[int, ...] = ()
    last_error: str = ""
    residency: str = "always"
    """`auto`: msd may put it to sleep, stop it and bring it back."""
    residence: str = ""
    """resident, asleep or cold; with ` (leaving)` or ` (coming)` while it is on its way."""


class CertificateReport(Struct, frozen=True, kw_only=True):
    """One mode on one task (`*`: requests that name none): whether quality lets it serve, and the figures behind it."""

    task: str
    standing: str
    """reference, lossless, certified, simulated (these may serve), undecided, unmeasured, revoked or withdrawn."""
    reason: str = ""
    accuracy: float | None = None
    accuracy_low: float | None = None
    accuracy_high: float | None = None
    """Wilson 95 % interval, from the gate file."""
    num_pairs: int = 0
    num_live_pairs: int = 0
    """Requests with an exact answer that also ran on the reference mode in production."""
    live_difference: float | None = None
    live_evidence: float | None = None
    """Against the mode; at 1 / quality.alpha it is withdrawn."""
    num_live_unscored: int = 0
    """Other requests that did; their answers can only be compared, and take nothing away."""
    live_agreement: float | None = None
    """Share of these that began alike."""


class ModeReport(Struct, frozen=True, kw_only=True):
    """One mode in the daemon's status: how often it was chosen, why (most frequent reason first), what is expected."""

    mode: str
    engine: str = ""
    num_decisions: int = 0
    reasons: tuple[tuple[str, int], ...] = ()
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    quality: float | None = None
    serves: bool = True
    """Quality lets it serve some request that asks for no floor."""
    standing: str = ""
    """In one line."""
    certificates: tuple[CertificateReport, ...] = ()


class UsageReport(Struct, frozen=True, kw_only=True):
    """What answered requests of one mode or tenant took, in mJ, and the tokens they generated."""

    name: str
    energy_mj: int = 0
    estimated_mj: int = 0
    """What of it was estimated and not counted."""
    static_mj: int = 0
    """What of it is the share of the idle power."""
    num_tokens: int = 0
    wasted_mj: int = 0
    """Not in `energy_mj`: work that nobody received."""


class CoefficientReport(Struct, frozen=True, kw_only=True):
    """What energy is split by, per mode, with standard errors (mJ). `confidence`: ok, low, or prior (not learnt)."""

    mode: str
    step_mj: float
    prefill_mj_per_token: float
    decode_mj_per_token: float
    step_error_mj: float = 0.0
    prefill_error_mj: float = 0.0
    decode_error_mj: float = 0.0
    relative_error: float | None = None
    """Standard error of the mode's energy, as a share of it."""
    num_intervals: int = 0
    confidence: str = "prior"


class LedgerReport(Struct, frozen=True, kw_only=True):
    """The energy of one counter since the daemon started, in mJ; field names as the core's `Accounts` has them.

    `requests + wasted + idle + unattributed + running + open + residue = counter + estimated`: running is the share of
    what has not ended, open what is not shared out yet, estimated what was filled in while the counter was away.
    """

    domain: str
    source: str
    counter_mj: int = 0
    estimated_mj: int = 0
    requests_mj: int = 0
    wasted_mj: dict[str, int] = {}
    idle_mj: int = 0
    unattributed_mj: dict[str, int] = {}
    running_mj: int = 0
    open_mj: int = 0
    residue_mj: int = 0
    idle_w: float | None = None
    idle_origin: str = ""
    """stated (by the probe), learnt, configured or unknown."""
    idle_spread_w: float | None = None
    """From the 20th to the 80th percentile of the calm seconds it was learnt from."""
    idle_age_s: float | None = None
    estimated_of: dict[str, int] = {}
    """What of each account was estimated, where that is not 0: `requests`, `wasted: failed`, `idle`, ..."""
    modes: tuple[UsageReport, ...] = ()
    tenants: tuple[UsageReport, ...] = ()
    """The 50 that used the most, and `other`."""


class DaemonStatus(Struct, frozen=True, kw_only=True):
    """The daemon's own status, as plain data in `State.daemon`. A reader does without any field but the first."""

    server: str
    epoch: str = ""
    pid: int = 0
    state: str = ""
    """starting (no mode is warm yet), serving or draining."""
    uptime_s: float = 0.0
    durable: bool = False
    simulated: bool = False
    """Any engine is simulated: then no figure here is that of a real machine."""
    policy: str = ""
    requests: dict[str, int] = {}
    """Counts since the start: submitted = delivered + rejected + aborted + failed + duplicates + pending; restarts."""
    errors: dict[str, int] = {}
    """Refusals and failures by error code."""
    num_waiting: int = 0
    num_waiting_tokens: int = 0
    num_running: int = 0
    num_sessions: int = 0
    idle_with_backlog_s: float = 0.0
    engines: tuple[EngineReport, ...] = ()
    modes: tuple[ModeReport, ...] = ()
    gpu: dict[str, object] | None = None
    """The newest GPU view, with `age_s`; None where nothing is probed."""
    energy: tuple[LedgerReport, ...] = ()
    coefficients: tuple[CoefficientReport, ...] = ()
    residency: dict[str, float] = {}
    """What the planner has done: num_switches, num_moved_requests, transition_s and more. Empty: nothing may move."""
    throttled_s: dict[str, float] = {}
    """How long the GPU's clocks were held down, by reason."""


class State(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="state", tag_field="t"):
    """Where a request stands; or, in `daemon`, a `DaemonStatus` as plain data."""

    request_id: str = ""
    client_request_id: str = ""
    state: str = ""
    attempt: int = 0
    mode: str = ""
    position: int | None = None
    daemon: dict[str, object] | None = None


class Results(Struct, frozen=True, kw_only=True, tag="results", tag_field="t"):
    """Answer to Fetch."""

    items: tuple[Done | Error, ...]
    next_seq: int
    more: bool


class Draining(Struct, frozen=True, kw_only=True, tag="draining", tag_field="t"):
    """No new submits; running requests go on for at most `deadline_ms`."""

    deadline_ms: int


class Pong(Struct, frozen=True, kw_only=True, tag="pong", tag_field="t"):
    """Answer to Ping; a changed `epoch` means that the daemon was restarted."""

    n: int
    epoch: str


ServerMessage = Welcome | Ack | Started | Restarted | Delta | Done | Error | State | Results | Draining | Pong

# --- coding ----------------------------------------------------------------------------------------------------------

DECODE_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""All that decoding hostile bytes can raise (ValidationError is a DecodeError): docs/reference/protocol.md."""

_client_decoder: msgspec.msgpack.Decoder[ClientMessage] = msgspec.msgpack.Decoder(ClientMessage)
_server_decoder: msgspec.msgpack.Decoder[ServerMessage] = msgspec.msgpack.Decoder(ServerMessage)
_encoder = msgspec.msgpack.Encoder()

encode = _encoder.encode


def decode_client(data: bytes | memoryview) -> ClientMessage:
    """Decode what a client sent. Raises one of `DECODE_ERRORS`, or `FieldError` from the cross-field rules."""
    message = _client_decoder.decode(data)
    check_fields(message)
    return message


def decode_server(data: bytes | memoryview) -> ServerMessage:
    """Decode what the daemon sent. Raises one of `DECODE_ERRORS`."""
    return _server_decoder.decode(data)


class _Named(Struct, frozen=True):
    """What can still be read of a message that was refused; never more than a good one may carry."""

    client_request_id: Id | None = None


_named_decoder = msgspec.msgpack.Decoder(_Named)


def client_request_id_of(data: bytes | memoryview) -> str | None:
    """The id in a message that did not decode, so that its refusal can name it; None when that too is unreadable."""
    try:
        return _named_decoder.decode(data).client_request_id
    except DECODE_ERRORS:
        return None


def refusal(
    code: ErrorCode,
    message: str,
    *,
    request_id: str | None = None,
    client_request_id: str | None = None,
    retry_after_ms: int | None = None,
) -> Error:
    """An Error whose `retryable` follows from its code and whose message keeps its bound."""
    return Error(
        code=code,
        message=message if len(message) <= MAX_MESSAGE_CHARS else message[: MAX_MESSAGE_CHARS - 3] + "...",
        retryable=code in RETRYABLE,
        request_id=request_id,
        client_request_id=client_request_id,
        retry_after_ms=retry_after_ms,
    )


class FieldError(ValueError):
    """A rule that spans fields is broken; `path` names the field as the wire does. Not retryable."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{message} - at `$.{path}`")
        self.path = path


def check_fields(message: ClientMessage) -> None:
    """Apply the rules that types cannot say. Raises FieldError."""
    if isinstance(message, Submit):
        forms = (message.prompt is not None) + (message.messages is not None) + (message.prompt_token_ids is not None)
        if forms != 1:
            raise FieldError("prompt", f"Expected exactly one of prompt, messages, prompt_token_ids, got {forms}")
        if message.prompt is not None:
            if not message.prompt:
                raise FieldError("prompt", "Expected a prompt of at least one character")
            # max_length counts characters; only a long prompt can pass it and still be too many bytes.
            if len(message.prompt) > MAX_PROMPT_BYTES // 4 and len(message.prompt.encode()) > MAX_PROMPT_BYTES:
                raise FieldError("prompt", f"Expected at most {MAX_PROMPT_BYTES} bytes of UTF-8")
        elif message.prompt_token_ids is not None:
            if not message.prompt_token_ids:
                raise FieldError("prompt_token_ids", "Expected at least one token id")
        elif not message.messages:
            raise FieldError("messages", "Expected at least one message")
        slo = message.slo
        if slo.deadline_ms is not None and slo.ttft_ms is not None and slo.deadline_ms <= slo.ttft_ms:
            raise FieldError("slo.deadline_ms", "Expected a deadline later than slo.ttft_ms")
    elif isinstance(message, Cancel):
        if (message.request_id is None) == (message.client_request_id is None):
            raise FieldError("request_id", "Expected exactly one of request_id, client_request_id")
    elif isinstance(message, Status):
        if message.request_id is not None and message.client_request_id is not None:
            raise FieldError("request_id", "Expected at most one of request_id, client_request_id")
    elif isinstance(message, Fetch) and (message.request_ids is None) == (message.since_seq is None):
        raise FieldError("request_ids", "Expected exactly one of request_ids, since_seq")


def content_hash(submit: Submit) -> bytes:
    """BLAKE2b-128 of the canonical encoding of `submit` without tags and slo: tells a repeat from a conflict."""
    bare = msgspec.structs.replace(submit, tags={}, slo=NO_SLO) if submit.tags or submit.slo is not NO_SLO else submit
    return hashlib.blake2b(_encoder.encode(bare), digest_size=16).digest()
