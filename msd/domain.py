"""The nouns: frozen msgspec Structs that cross every boundary inside the daemon.

Units are last in names. `t_us` is a monotonic time in integer microseconds (docs/adr/0007). Nothing here does I/O.
`gc=False`: it holds nothing but text and numbers, and a decision makes one per mode; the collector need not look.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Final, Literal

from msgspec import Struct

ServiceClass = Literal["interactive", "standard", "batch"]
SERVICE_CLASSES: tuple[ServiceClass, ...] = ("interactive", "standard", "batch")
FinishReason = Literal["stop", "length", "abort"]
EnergySource = Literal["counter", "estimated", "simulated"]
Precision = Literal["fp32", "bf16", "fp16", "fp8", "int8", "int4"]
Speculation = Literal["none", "ngram", "draft"]
RequestState = Literal["waiting", "running", "finished"]
Residence = Literal["resident", "asleep", "cold"]
"""Where an engine's weights are: on the GPU, in host memory, or nowhere (the process is not running)."""


class Slo(Struct, frozen=True, kw_only=True):
    """What the producer wants: bounds in ms, counted from receipt. None = no bound."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    deadline_ms: float | None = None


class Sampling(Struct, frozen=True, kw_only=True):
    """Sampling parameters in vLLM's vocabulary; None = the engine's default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


class Request(Struct, frozen=True, kw_only=True):
    """The header of one client call: all that decisions need, without the prompt itself.

    `request_id` is msd's own, `(tenant, client_request_id)` is the idempotency key, `content_hash` tells a repeat from
    a conflict. `deadline_us` is absolute (monotonic), derived from `slo.deadline_ms` at receipt.
    """

    request_id: str
    client_request_id: str
    tenant: str
    content_hash: bytes
    received_us: int
    num_prompt_tokens: int
    max_tokens: int
    service_class: ServiceClass = "standard"
    priority: int = 0
    deadline_us: int | None = None
    slo: Slo = Slo()
    model: str | None = None
    mode_hint: str | None = None
    mode_strict: bool = False
    quality_floor: float | None = None
    task: str | None = None
    session_id: str | None = None
    prefix_id: str | None = None
    ignore_eos: bool = False
    stream: bool = True
    prefix_hashes: tuple[int, ...] = ()
    """Chained hashes of the prompt's full blocks of tokens, first block first (msd/core/prefixes.py)."""


class Prompt(Struct, frozen=True, kw_only=True):
    """The body of a request: token ids (length n) and how to sample from them. Never logged."""

    token_ids: tuple[int, ...]
    sampling: Sampling = Sampling()
    tags: dict[str, str] = {}


class Mode(Struct, frozen=True, kw_only=True):
    """What a request can be routed to: an engine in one of its variants, with the traits that policies may use."""

    name: str
    engine: str
    model: str
    precision: Precision = "bf16"
    speculation: Speculation = "none"
    prefix_caching: bool = False
    simulated: bool = False
    quality: float | None = None
    """Exact-match accuracy of this mode, 0..1, as the operator states it; what a gate has measured counts before it."""
    lossless: bool = False
    """It computes what the model's own weights say: no certificate needed (`msd.recipe.is_lossless`)."""
    reference: bool = False
    """What the other modes of its model are compared with, in quality and energy (`msd.recipe.find_references`)."""


class EngineInfo(Struct, frozen=True, kw_only=True):
    """What an engine tells about itself once it is warm."""

    engine: str
    max_model_len: int
    max_num_seqs: int
    kv_capacity_tokens: int
    pids: tuple[int, ...] = ()
    version: str = ""
    idle_ttft_ms: float = 0.0
    """TTFT of the warm-up request, alone on the engine: the estimator's first prior."""
    idle_tpot_ms: float = 0.0
    start_s: float = 0.0
    can_sleep: bool = True
    """Whether it can leave the GPU without being stopped."""


class EngineLoad(Struct, frozen=True, kw_only=True):
    """The engine's own gauges: requests running and waiting inside it, share of KV blocks in use (0..1)."""

    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0


class GpuView(Struct, frozen=True, kw_only=True):
    """Latest snapshot of one GPU. A field that cannot be read is None, never 0. Bytes, watts, MHz, Celsius."""

    source: Literal["nvml", "simulated", "none"] = "none"
    uuid: str = ""
    index: int = 0
    name: str = ""
    t_us: int = 0
    memory_total_bytes: int | None = None
    memory_used_bytes: int | None = None
    memory_free_bytes: int | None = None
    memory_reserved_bytes: int | None = None
    power_instant_w: float | None = None
    power_average_w: float | None = None
    power_limit_w: float | None = None
    sm_util: float | None = None
    mem_util: float | None = None
    sm_clock_mhz: int | None = None
    temperature_c: int | None = None
    throttle_reasons: tuple[str, ...] = ()
    energy_mj: int | None = None
    epoch: int = 0
    error: str = ""


class InstalledGpu(Struct, frozen=True, kw_only=True):
    """One GPU of the host, as its driver lists it. `compute_capability`: (major, minor); None = not told."""

    index: int
    uuid: str
    name: str
    memory_total_bytes: int | None = None
    compute_capability: tuple[int, int] | None = None


class Mask(IntFlag):
    """Why a candidate must not be chosen. 0 = it may be. HINT and SLOTS are wishes and bounds of the moment."""

    MODEL = 1
    HINT = 2
    CONTEXT = 4
    QUALITY = 8
    HEALTH = 16
    MEMORY = 32
    SLOTS = 64
    DEADLINE = 128
    ASLEEP = 256


MASK_WORDS: Final = {
    Mask.MODEL: "serves another model",
    Mask.HINT: "the producer insists on another mode",
    Mask.CONTEXT: "prompt and answer are longer than its context",
    Mask.QUALITY: "not certified for this task, or below the quality floor",
    Mask.HEALTH: "its engine is not up",
    Mask.MEMORY: "no KV memory left for it now",
    Mask.SLOTS: "full: it would wait",
    Mask.DEADLINE: "too late for the deadline",
    Mask.ASLEEP: "asleep: not on the GPU",
}


def reasons_against(mask: int) -> list[str]:
    """Why a candidate must not be chosen, in words."""
    return [words for bit, words in MASK_WORDS.items() if mask & bit]


class Features(Struct, frozen=True, gc=False):
    """What is known of a request before its first token (docs/explanation/architecture.md, step 4).

    Tokens are counts, `arrival_cv` is the coefficient of variation of recent gaps between arrivals (1 = Poisson).
    `shared_prefix`: the producer names one, or some engine's cache likely holds its first blocks.
    """

    num_prompt_tokens: int
    num_expected_tokens: int
    max_tokens: int
    shared_prefix: bool
    task: str | None
    service_class: ServiceClass
    num_running: int
    num_waiting: int
    arrival_cv: float
    memory_pressure: float
    waited_us: int
    slack_us: int | None
    view_age_us: int | None
    num_expected_tokens_p90: int = 0
    arrivals_per_s: float = 0.0
    power_headroom_w: float | None = None
    """Power limit less present power; None where the GPU view knows neither."""
    slo_ttft_ms: float | None = None
    slo_tpot_ms: float | None = None
    session_arm: int = -1
    """The candidate that served this session last: its prefix cache is warm. -1: none."""


class Candidate(Struct, frozen=True, gc=False):
    """One mode in one decision: predicted figures (ms; mJ or None) and the reasons, if any, not to choose it."""

    mode: str
    mask: int
    ttft_ms: float
    tpot_ms: float
    e2el_ms: float
    energy_mj: int | None
    """Marginal: what choosing it adds, not its later share of the box's idle power."""
    num_running: int
    num_free_slots: int
    queue_ms: float = 0.0
    """Expected wait for a slot; part of `ttft_ms` and `e2el_ms`."""
    delay_ms: float = 0.0
    """What it adds to the E2EL of the requests that run beside it, summed over them."""
    num_cached_tokens: int = 0
    """Of its prompt, likely in this mode's prefix cache."""
    num_harmed: int = 0
    """Requests that keep their SLOs so far, and would probably miss one because of it."""
    prompt_ms: float = 0.0
    """Time in which its engine reads its prompt, alone: what decodes there waits for it."""
    shared_ms: float = 0.0
    """Time for which it would make other engines share the GPU with this one."""
    work_ms: float = 0.0
    """GPU time that it takes, if all that runs now ran in this mode: the throughput of a mode, by the request."""


YIELD = -1
"""No arm: the policy lets a request wait behind all those of which it has not said so. Only while something runs."""


class Choice(Struct, frozen=True, gc=False):
    """A policy's answer: index into the candidates or YIELD, the probability with which it was drawn, one line why."""

    arm: int
    propensity: float
    reason: str


class Decision(Struct, frozen=True, kw_only=True):
    """One routing decision, whole: enough to explain it and to replay it afterwards."""

    decision_id: str
    request_id: str
    attempt: int
    t_us: int
    policy: str
    mode: str
    engine: str
    reason: str
    propensity: float
    features: Features
    candidates: tuple[Candidate, ...]
    view: GpuView | None


class Energy(Struct, frozen=True, kw_only=True):
    """A request's share of the counter, in mJ. Absent (None) when nothing was measured, never 0."""

    energy_mj: int
    dynamic_mj: int
    static_mj: int
    source: EnergySource
    settled: bool


class Timings(Struct, frozen=True, kw_only=True):
    """Where a request's time went, in ms. `tpot_ms` is 0 for a single token."""

    queue_ms: float = 0.0
    ttft_ms: float = 0.0
    tpot_ms: float = 0.0
    engine_ms: float = 0.0
    e2e_ms: float = 0.0


class Outcome(Struct, frozen=True, kw_only=True):
    """The terminal state of a request without its text: either a finish reason or an error code."""

    request_id: str
    attempt: int
    finish_reason: FinishReason | None
    error_code: str = ""
    message: str = ""
    mode: str = ""
    decision_id: str = ""
    reason: str = ""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_completion_tokens: int = 0
    timings: Timings = Timings()
    energy: Energy | None = None


class Result(Struct, frozen=True, kw_only=True):
    """What is stored and delivered: the outcome, with the text and token ids that were generated."""

    outcome: Outcome
    client_request_id: str
    tenant: str
    seq: int = 0
    text: str = ""
    token_ids: tuple[int, ...] = ()


class Observation(Struct, frozen=True, kw_only=True):
    """What was measured of a decision: the feedback that policies learn from."""

    decision_id: str
    mode: str
    finish_reason: FinishReason | None
    ttft_ms: float
    tpot_ms: float
    e2el_ms: float
    num_completion_tokens: int
    energy: Energy | None
    slo_met: bool | None
    num_cached_tokens: int = 0


class ExitKind(IntEnum):
    """Who ended an engine: it died by itself (a strike against its requests), or somebody stopped it."""

    DIED = 0
    STOPPED = 1


class Chunk(Struct, frozen=True):
    """What an engine generated since its last chunk: DELTA output, coalesced. The last one has a `finish_reason`."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0


class CounterReading(Struct, frozen=True, kw_only=True):
    """One reading of a physical energy counter. `epoch` changes when the counter was reset."""

    domain: str
    t_us: int
    energy_mj: int
    epoch: int = 0
    source: EnergySource = "counter"
    idle_w: float | None = None
    """The probe's own knowledge of idle power (a simulated GPU states it); None = the ledger learns it."""
    power_w: float | None = None
    """Instant power of the same sample: bridges a counter reset and prices what is not settled yet."""
    limit_w: float | None = None
    """Enforced power limit: a jump beyond twice of it is a glitch. None = glitches cannot be told."""
