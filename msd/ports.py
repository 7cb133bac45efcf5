"""The ports: everything that touches the world, as Protocols. The pure core is given them by `dispatch`.

Each port has a real adapter and a simulated or in-memory one that ships with the package; one contract suite in
tests/contract runs on both.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from random import Random
from typing import Protocol, TypeVar

from msd.domain import (
    Candidate,
    Choice,
    Chunk,
    CounterReading,
    Decision,
    Energy,
    EngineInfo,
    EngineLoad,
    ExitKind,
    Features,
    FinishReason,
    GpuView,
    Observation,
    Prompt,
    Request,
    Residence,
    Result,
)
from msd.wire import ChatMessage, Delta, ServerMessage, Submit

T = TypeVar("T")


class Clock(Protocol):
    """Monotonic time."""

    def now_us(self) -> int:
        """Microseconds since an arbitrary start; never goes back."""
        ...


class Tokenizer(Protocol):
    """Text to token ids and back, without the engine. Thread-safe: long prompts are encoded off the loop."""

    fingerprint: str
    """Equal for two tokenizers that give equal ids for every text."""
    vocab_size: int
    """Every id that it knows is below."""

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of `text`, with the special tokens that the model expects in front."""
        ...

    def encode_chat(self, messages: Sequence[ChatMessage]) -> tuple[int, ...]:
        """Token ids of a conversation through the chat template. Raises ValueError when the model has none."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of `token_ids`, special tokens left out."""
        ...


class Engine(Protocol):
    """One live inference engine. Not restartable: after `stop` or a loss, a new object takes its name."""

    name: str
    simulated: bool

    async def start(self) -> EngineInfo:
        """Load, warm up and measure one idle request. Raises EngineStartError with the engine's last lines."""
        ...

    def generate(self, request_id: str, prompt: Prompt, max_tokens: int, priority: int) -> AsyncGenerator[Chunk]:
        """Stream coalesced deltas; the last has a finish reason. Closing the generator aborts and frees the slot.

        Raises EngineLostError when the engine died, RequestRefusedByEngineError when only this request is at fault.
        """
        ...

    def load(self) -> EngineLoad:
        """The engine's own gauges, as of its last step."""
        ...

    async def sleep(self, level: int) -> None:
        """Leave the GPU, with nothing running: weights to host memory (level 1) or away (2); `wake` brings them back.

        Only for an engine whose `EngineInfo.can_sleep`. Raises EngineError when it fails: the engine is of no more use.
        """
        ...

    async def wake(self) -> None:
        """Be as after `start` again. Raises EngineError when it fails: the engine is of no more use."""
        ...

    async def lost(self) -> tuple[ExitKind, str]:
        """Wait until the engine dies without having been stopped; say why."""
        ...

    async def stop(self) -> None:
        """Free everything and leave no process behind, within a bounded time. Idempotent."""
        ...


class EngineSink(Protocol):
    """Where the pool reports to; called on the loop, never blocks."""

    def on_chunk(self, request_id: str, attempt: int, chunk: Chunk) -> None:
        """Tokens came; the first chunk of an attempt is its first token."""
        ...

    def on_finished(self, request_id: str, attempt: int, finish_reason: FinishReason) -> None:
        """The attempt ended by itself, or by abort; its slot is free."""
        ...

    def on_failed(self, request_id: str, attempt: int, error_code: str, message: str, lost: bool) -> None:
        """The attempt ended without an answer; `lost`: with its engine."""
        ...

    def on_engine_starting(self, engine: str) -> None:
        """An engine begins to load and warm up; `on_engine_up` or `on_engine_lost` ends it."""
        ...

    def on_engine_up(self, info: EngineInfo) -> None:
        """An engine is warm and takes requests."""
        ...

    def on_engine_lost(self, engine: str, kind: ExitKind, reason: str) -> None:
        """An engine takes no requests (any more), or did not start. Its attempts have been reported before."""
        ...

    def on_engine_asleep(self, engine: str, residence: Residence, took_s: float) -> None:
        """An engine left the GPU because it was told to: asleep or, also where it cannot sleep, cold."""
        ...

    def on_engine_stepped(self, engine: str, load: EngineLoad, progress: tuple[tuple[str, int], ...]) -> None:
        """Gauges, and (request_id, tokens generated so far) of what runs; at most 20 times a second per engine."""
        ...


class GpuProbe(Protocol):
    """Reads a GPU: on its own thread where reading can block. Never raises after `start`."""

    def start(self) -> None:
        """Begin sampling. Raises ProbeError when there is no device to read."""
        ...

    def latest(self) -> GpuView | None:
        """Newest snapshot; lock-free."""
        ...

    def readings(self) -> list[CounterReading]:
        """Counter readings since the last call, oldest first; bounded."""
        ...

    def stop(self) -> None:
        """End sampling; does not wait for a stuck driver call."""
        ...


class JournalListener(Protocol):
    """Where a journal reports to; called on the loop."""

    def on_appended(self, request_id: str, seq: int) -> None:
        """The request is stored as durably as the journal can."""
        ...

    def on_append_duplicate(self, request_id: str, existing_id: str, content_hash: bytes) -> None:
        """Not stored: `(tenant, client_request_id)` names a finished request, `existing_id`."""
        ...

    def on_append_failed(self, request_id: str, message: str) -> None:
        """Outcome unknown; nothing may be promised."""
        ...

    def on_completed(self, request_id: str, seq: int) -> None:
        """The terminal state is stored; the answer may go out. `seq` orders results for Fetch."""
        ...


class Journal(Protocol):
    """The durable queue: append, attempt, complete. Results are kept within configured bounds."""

    durable: bool

    async def start(self, listener: JournalListener) -> list[Request]:
        """Open; return the headers of pending requests, oldest first."""
        ...

    def append(self, request: Request, prompt: Prompt) -> None:
        """Store a new request; the listener hears the outcome."""
        ...

    def attempted(self, request_id: str, attempt: int) -> None:
        """Note an attempt; rides the next commit and is not awaited."""
        ...

    async def read_prompt(self, request_id: str) -> Prompt:
        """The body of a pending request. Raises JournalError when it cannot be read."""
        ...

    def complete(self, result: Result) -> None:
        """Store the one terminal state with its result; the listener hears when. A second one is a counted no-op."""
        ...

    def settle(self, request_id: str, energy: Energy) -> None:
        """Replace a stored result's provisional energy, if it is still kept."""
        ...

    def is_full(self, tenant: str, client_request_id: str) -> bool:
        """Whether unacknowledged results leave no room for a new one. A key that has its result needs none."""
        ...

    async def find(
        self, tenant: str, request_id: str | None = None, client_request_id: str | None = None
    ) -> Result | None:
        """One stored result of this tenant, by either id."""
        ...

    async def fetch(self, tenant: str, since_seq: int, max_bytes: int) -> tuple[list[Result], int, bool]:
        """Stored results after `since_seq`: (results, next_seq, more)."""
        ...

    def acknowledge(self, tenant: str, request_ids: Sequence[str]) -> None:
        """The tenant has these results; they may be purged early."""
        ...

    async def stop(self) -> None:
        """Flush and close."""
        ...


class Policy(Protocol):
    """Chooses a mode. Only the core calls it. Candidates come in the order of the modes it was made with."""

    name: str

    def choose(self, features: Features, candidates: Sequence[Candidate], rng: Random) -> Choice:
        """Pick an arm whose mask is 0 or SLOTS only (then the request waits for that mode). At least one has."""
        ...

    def update(self, decision: Decision, observation: Observation) -> None:
        """Learn from what was measured."""
        ...

    def dump(self) -> dict[str, object]:
        """State as plain data."""
        ...

    def load(self, state: dict[str, object]) -> None:
        """Take up a dumped state."""
        ...


class Session(Protocol):
    """One connected client, as egress sees it. Never blocks, always bounded."""

    tenant: str
    closed: bool

    @property
    def submit_credit(self) -> int:
        """Cumulative number of submits that this session may have made, by now; goes into each Ack."""
        ...

    def send(self, message: ServerMessage) -> None:
        """Queue a control message (all but Delta); a client that lets too many pile up is closed."""
        ...

    def send_delta(self, delta: Delta) -> bool:
        """Send tokens; False = no credit or no room: keep coalescing until the session calls `Intake.resume`."""
        ...


class Intake(Protocol):
    """What an ingress may ask of the daemon; every answer comes through the session."""

    def submit(self, submit: Submit, session: Session) -> None:
        """Take a decoded request from an authenticated session."""
        ...

    def cancel(self, session: Session, request_id: str | None, client_request_id: str | None) -> None:
        """Ask to end a request of the session's tenant."""
        ...

    def status(self, session: Session, request_id: str | None, client_request_id: str | None) -> None:
        """Answer State; with neither id, the daemon's own."""
        ...

    def fetch(self, session: Session, request_ids: Sequence[str] | None, since_seq: int | None, max_bytes: int) -> None:
        """Answer Results."""
        ...

    def acknowledge(self, session: Session, request_ids: Sequence[str]) -> None:
        """Results were received."""
        ...

    def follow(self, session: Session, request_id: str, attempt: int, index: int) -> None:
        """Deltas of a running request (or its result) go to this session, from token `index` of `attempt` on."""
        ...

    def resume(self, session: Session) -> None:
        """The session has credit and room again."""
        ...

    def gone(self, session: Session) -> None:
        """The session is closed; its requests go on, their results wait for Fetch."""
        ...


class Offload(Protocol):
    """Runs heavy computing off the loop: a thread in production, inline in the simulation."""

    def run(self, function: Callable[[], T]) -> Awaitable[T]:
        """Await the function's result; its exception is raised here."""
        ...
