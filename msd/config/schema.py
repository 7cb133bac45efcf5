"""The settings: every section of config.toml as a frozen Struct. The reference page is generated from this file.

A field's `description` is written for the person who edits the file; units are last in names. Constraints stand in the
type, so that `msd check` can say what is allowed. Rules that span fields are in `msd.config.rules`.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from msgspec import Meta, Struct, field

from msd.domain import Precision, ServiceClass, Speculation

Name = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Count = Annotated[int, Meta(ge=1, le=10_000_000)]
Bytes = Annotated[int, Meta(ge=0, le=10**13)]
Seconds = Annotated[float, Meta(gt=0, le=86_400)]
Share = Annotated[float, Meta(ge=0, le=1)]
Weight = Annotated[int, Meta(ge=1, le=1_000)]
Milliseconds = Annotated[float, Meta(ge=0, le=10_000)]
Millijoules = Annotated[float, Meta(ge=0, le=1e7)]
Ratio = Annotated[float, Meta(ge=0, le=1e6)]
Watts = Annotated[float, Meta(ge=0, le=10_000)]

POLICY_NAMES: Final = ("fixed", "random", "round_robin", "least_loaded", "rules", "cost", "learned")
"""What `policy.name` may be. The policies themselves are above this layer; a test holds the two lists together."""


class DaemonConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The process as a whole."""

    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="Least severe event that is logged.")
    ] = "info"
    log_format: Annotated[
        Literal["auto", "text", "json"],
        Meta(description="`auto`: coloured text on a terminal, JSON lines elsewhere (journald)."),
    ] = "auto"
    drain_s: Annotated[
        Seconds,
        Meta(description="After SIGTERM, running requests may go on for this long. TimeoutStopSec must be 30 s more."),
    ] = 60.0
    seed: Annotated[Annotated[int, Meta(ge=0, le=2**63 - 1)], Meta(description="Seed of the policies' randomness.")] = 0
    run_dir: Annotated[
        str,
        Meta(
            description="Folder of engine logs. Empty: `$RUNTIME_DIRECTORY`, `$XDG_RUNTIME_DIR/msd` or a temporary one."
        ),
    ] = ""
    state_dir: Annotated[
        str,
        Meta(
            description="Folder of what outlives the process (the decision log). Empty: `$STATE_DIRECTORY`, "
            "`$XDG_STATE_HOME/msd` or `~/.local/state/msd`."
        ),
    ] = ""


class ZmqIngressConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The ZeroMQ socket that producers push requests to."""

    endpoints: Annotated[
        tuple[str, ...],
        Meta(
            min_length=1,
            max_length=8,
            description=(
                "`ipc:///path` or `tcp://host:port`. `ipc://` alone is the default socket: `$MSD_ENDPOINT`, else "
                "`/run/msd/msd.sock`, else below `$XDG_RUNTIME_DIR`."
            ),
        ),
    ] = ("ipc://",)
    insecure_tcp: Annotated[
        bool, Meta(description="Allow tcp without CURVE, on loopback addresses only; its peers are tenant `local`.")
    ] = False
    curve_secret_key_file: Annotated[
        str, Meta(description="File with the server's CURVE secret key (Z85, 40 characters). Needed for tcp.")
    ] = ""
    curve_keys_dir: Annotated[
        str, Meta(description="Folder of client public keys: file `NAME.key` (Z85) gives tenant `NAME`.")
    ] = ""
    max_frame_bytes: Annotated[
        Annotated[int, Meta(ge=1_024, le=64 * 1024 * 1024)],
        Meta(description="A peer that sends a larger frame is disconnected."),
    ] = 4 * 1024 * 1024
    max_sessions: Annotated[Count, Meta(description="Connected clients; further ones are refused.")] = 4_096
    heartbeat_s: Annotated[
        Seconds, Meta(description="Heartbeat interval; a peer that is silent for three of them is gone.")
    ] = 2.0
    session_idle_s: Annotated[Seconds, Meta(description="A session that says nothing for this long is forgotten.")] = (
        3_600.0
    )


class HttpIngressConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The HTTP socket: `/metrics` for Prometheus and `/health`; loopback unless you say otherwise."""

    listen: Annotated[
        str,
        Meta(
            pattern=r"^$|^(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]*):[0-9]{1,5}$",
            description="`host:port`, for example `127.0.0.1:9464`; without a host: loopback. Empty: no HTTP socket.",
        ),
    ] = ""


class IngressConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The front doors."""

    zmq: Annotated[ZmqIngressConfig, Meta(description="ZeroMQ.")] = ZmqIngressConfig()
    http: Annotated[HttpIngressConfig, Meta(description="HTTP.")] = HttpIngressConfig()


class LimitsConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bounds: of what waits, of what one request may ask, of what one client may pile up."""

    max_waiting: Annotated[
        Count, Meta(description="Requests that may wait; further ones are refused with `queue_full`.")
    ] = 20_000
    max_waiting_tokens: Annotated[
        Annotated[int, Meta(ge=1, le=10**12)],
        Meta(description="Tokens that may wait: prompts plus the `max_tokens` of their answers."),
    ] = 50_000_000
    max_waiting_per_tenant: Annotated[Count, Meta(description="Requests of one tenant that may wait.")] = 10_000
    max_attempts: Annotated[
        Annotated[int, Meta(ge=1, le=16)],
        Meta(description="Runs of one request, each ended by its engine's loss, before it is given up: `dead_letter`."),
    ] = 4
    submit_credit: Annotated[
        Count, Meta(description="Requests one connection may have unfinished; `msd.client` waits beyond that.")
    ] = 4_096
    class_weights: Annotated[
        dict[ServiceClass, Weight],
        Meta(description="Shares of service under backlog, in tokens, by service class; none starves."),
    ] = field(default_factory=lambda: {"interactive": 16, "standard": 4, "batch": 1})
    outbox_messages: Annotated[
        Count, Meta(description="Control messages that one client may leave unread; then its session is closed.")
    ] = 1_024
    pending_delta_bytes: Annotated[
        Count,
        Meta(description="Text and ids of one stream that may wait for their reader; then the stream is detached."),
    ] = 64 * 1024
    session_delta_bytes: Annotated[Count, Meta(description="The same, over all streams of one client.")] = (
        4 * 1024 * 1024
    )
    decisions_kept: Annotated[Count, Meta(description="Latest decisions kept in memory, for `msd status`.")] = 1_024


class TenantConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Someone who may ask.

    Without any `[[tenant]]`, whoever may open the ipc socket is tenant `local`. With one or more, a user who is in none
    of them is refused.
    """

    name: Annotated[Name, Meta(description="Its name in ledger, metrics and fair queueing.")]
    uids: Annotated[
        tuple[Annotated[int, Meta(ge=0, le=2**32 - 1)], ...],
        Meta(max_length=1_024, description="User ids whose ipc connections are this tenant's."),
    ] = ()
    weight: Annotated[Weight, Meta(description="Share of service under backlog, within a service class.")] = 1
    may_act_as: Annotated[bool, Meta(description="Its connections may name another tenant to act for (a gateway).")] = (
        False
    )


class ModelConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A language model, as producers name it."""

    name: Annotated[Name, Meta(description="What requests put in `model`.")]
    path: Annotated[
        str,
        Meta(description="Folder in Hugging Face format, relative to the configuration file. Empty only if simulated."),
    ] = ""
    tokenizer: Annotated[str, Meta(description="Folder of its tokenizer. Empty: the model's.")] = ""


class SimEngineConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Truth of a simulated engine.

    One step takes `step_ms + prefill_ms_per_token * prompt tokens + decode_ms_per_request * running requests`, and
    energy likewise.
    """

    step_ms: Annotated[Milliseconds, Meta(description="Fixed time of a step (reading the weights).")] = 8.0
    prefill_ms_per_token: Annotated[Milliseconds, Meta(description="Time per prompt token.")] = 0.05
    decode_ms_per_request: Annotated[Milliseconds, Meta(description="Time per running request and step.")] = 0.3
    step_mj: Annotated[Millijoules, Meta(description="Energy of a step's fixed part.")] = 2_000.0
    prefill_mj_per_token: Annotated[Millijoules, Meta(description="Energy per prompt token.")] = 10.0
    decode_mj_per_token: Annotated[Millijoules, Meta(description="Energy per generated token.")] = 95.0
    weights_bytes: Annotated[Bytes, Meta(description="GPU memory of weights and graphs.")] = 2_000_000_000
    kv_capacity_tokens: Annotated[Count, Meta(description="Tokens that the KV cache holds.")] = 200_000
    max_model_len: Annotated[Count, Meta(description="Longest prompt plus output, in tokens.")] = 8_192
    start_s: Annotated[Annotated[float, Meta(ge=0, le=3_600)], Meta(description="Time to come up.")] = 0.2
    sleep_s: Annotated[
        Annotated[float, Meta(ge=0, le=3_600)], Meta(description="Mean time to go to sleep (with `residency = auto`).")
    ] = 0.3
    wake_s: Annotated[Annotated[float, Meta(ge=0, le=3_600)], Meta(description="Mean time to wake.")] = 0.5
    tokens_per_step: Annotated[
        Annotated[float, Meta(ge=1, le=16)],
        Meta(description="Mean tokens per decode step; speculation accepts more than 1."),
    ] = 1.0
    output_tokens: Annotated[
        Annotated[int, Meta(ge=0, le=131_072)],
        Meta(description="Mean output length where the end of sequence is honoured. 0: always `max_tokens`."),
    ] = 0


class EngineConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One engine: a recipe of weights and arguments, and thereby a mode that requests are routed to."""

    name: Annotated[Name, Meta(description="Name of the engine and of its mode.")]
    model: Annotated[Name, Meta(description="The `[[model]]` that it serves.")]
    preset: Annotated[
        str,
        Meta(
            description="A recipe by name, such as `int8_w8a8` (`msd modes` lists them): sets precision, speculation, "
            "caching and `args`; what stands beside it wins. Empty: none."
        ),
    ] = ""
    kind: Annotated[
        Literal["vllm", "sim", "noop"],
        Meta(description="`vllm`: real. `sim`: simulated, and labelled so. `noop`: answers at once, for benchmarks."),
    ] = "vllm"
    weights: Annotated[
        str,
        Meta(description="Folder of other weights of the model, such as a quantised checkpoint. Empty: its `path`."),
    ] = ""
    draft: Annotated[
        str,
        Meta(description="Folder of the draft model or EAGLE head that speculation proposes with. Empty: none."),
    ] = ""
    precision: Annotated[Precision, Meta(description="What policies take it for; the weights or `args` decide.")] = (
        "bf16"
    )
    speculation: Annotated[
        Speculation, Meta(description="What policies take it for; `args.speculative_config` sets it up.")
    ] = "none"
    prefix_caching: Annotated[bool, Meta(description="Keep KV blocks of shared prefixes; handed to the engine.")] = (
        False
    )
    max_num_seqs: Annotated[
        Annotated[int, Meta(ge=1, le=65_536)], Meta(description="Slots: requests that run in it at once.")
    ] = 32
    quality: Annotated[
        Share | None,
        Meta(
            description="Known exact-match accuracy, where no gate has measured it; requests with a higher "
            "`quality_floor` are not sent here."
        ),
    ] = None
    residency: Annotated[
        Literal["always", "auto"],
        Meta(description="`always`: stays on the GPU. `auto`: msd may put it to sleep or stop it, and bring it back."),
    ] = "always"
    gpu_bytes: Annotated[
        Bytes,
        Meta(description="GPU memory it takes (weights, graphs, KV cache), as measured. 0: from the profile, if any."),
    ] = 0
    args: Annotated[dict[str, object], Meta(description="Further AsyncEngineArgs, by vLLM's names.")] = {}
    env: Annotated[dict[str, str], Meta(description="Environment of this engine's processes.")] = {}
    start_timeout_s: Annotated[Seconds, Meta(description="A start that takes longer has failed.")] = 600.0
    sim: Annotated[SimEngineConfig, Meta(description="For kind `sim`.")] = SimEngineConfig()


class RulesConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Thresholds of the published ModeSwitch rules (arXiv 2605.23057, controller)."""

    batch_pressure_high: Annotated[
        Count, Meta(description="Requests running and waiting that count as high batch pressure (rule 1).")
    ] = 4
    memory_pressure: Annotated[
        Share, Meta(description="Share of an engine's KV cache in use that counts as pressure (rule 3).")
    ] = 0.9
    short_prompt_tokens: Annotated[Count, Meta(description="Rule 7: a prompt of at most this.")] = 384
    short_output_tokens: Annotated[Count, Meta(description="Rule 7: an expected output of at most this.")] = 64
    long_output_tokens: Annotated[Count, Meta(description="Rule 8: an expected output of at least this.")] = 128
    long_prompt_tokens: Annotated[Count, Meta(description="Rule 9: a prompt of at least this.")] = 768


class CostConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `cost` minimises: predicted latency, energy and SLO misses of a request and of those beside it."""

    latency_weight: Annotated[Ratio, Meta(description="Cost of a second of E2EL.")] = 1.0
    energy_weight: Annotated[Ratio, Meta(description="Cost of a kilojoule. 0: energy does not count.")] = 0.2
    slo_weight: Annotated[
        Ratio, Meta(description="Cost of each second by which an SLO or deadline is missed, beside its latency.")
    ] = 10.0
    miss_weight: Annotated[
        Ratio, Meta(description="Cost of each SLO that is likely missed, a request's own or another's, in seconds.")
    ] = 3.0
    patience_s: Annotated[
        Seconds,
        Meta(
            description="A request that would make others miss their SLOs waits while it cannot keep its own. By each "
            "such time that it has waited it may harm one more."
        ),
    ] = 30.0
    tie: Annotated[
        Share, Meta(description="Costs this close are equal; then the session's own mode, or the emptier one.")
    ] = 0.02
    energy_ratio_max: Annotated[
        Ratio,
        Meta(
            description="A mode may take at most this many times the energy of its model's reference mode "
            "(quality.reference, else the first lossless one), unless nothing else is left. 0: no bound."
        ),
    ] = 0.0


class LearnedConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A router that `msd train-router` has trained."""

    file: Annotated[str, Meta(description="The trained router (JSON), relative to the configuration file.")] = ""


class PolicyConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which mode serves a request."""

    name: Annotated[str, Meta(description=f"One of {', '.join(f'`{name}`' for name in POLICY_NAMES)}.")] = "cost"
    mode: Annotated[str, Meta(description="For `fixed`: the mode. Empty: that of the first engine.")] = ""
    profile: Annotated[
        str,
        Meta(
            description="Profile of this host that `msd profile` wrote: first estimates of every mode. Empty: each "
            "engine's own warm-up."
        ),
    ] = ""
    rules: Annotated[RulesConfig, Meta(description="For `rules`.")] = RulesConfig()
    cost: Annotated[CostConfig, Meta(description="For `cost`.")] = CostConfig()
    learned: Annotated[LearnedConfig, Meta(description="For `learned`.")] = LearnedConfig()


class QualityConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which modes may serve which task: the gate file, and how it is watched in production."""

    gate: Annotated[
        str,
        Meta(
            description="Gate file that `msd gate` wrote, relative to the configuration file. Empty: none, and only "
            "lossless modes of real engines are used."
        ),
    ] = ""
    ungated: Annotated[
        Literal["mask", "allow"],
        Meta(description="Modes that have not passed the gate: never use them, or use them at your own risk."),
    ] = "mask"
    all_masked: Annotated[
        Literal["error", "reference"],
        Meta(description="When quality forbids every mode: refuse the request, or serve it on the reference mode."),
    ] = "error"
    reference: Annotated[
        str,
        Meta(
            description="The mode that others are compared with, in quality and energy. Empty: the gate "
            "file's, else the first lossless one, best without speculation."
        ),
    ] = ""
    delta: Annotated[
        Annotated[float, Meta(gt=0, le=0.5)],
        Meta(description="Largest loss of accuracy against the reference mode that passes."),
    ] = 0.015
    alpha: Annotated[
        Annotated[float, Meta(gt=0, le=0.5)],
        Meta(description="Probability with which a mode may be judged wrongly."),
    ] = 0.05
    shadow_share: Annotated[
        Share,
        Meta(description="Share of requests that also run on the reference mode, when it is idle. 0: none."),
    ] = 0.01


class ResidencyConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which engines with `residency = "auto"` are on the GPU, asleep or cold; and how reluctantly that changes."""

    plan_interval_s: Annotated[Seconds, Meta(description="How often the plan is made anew.")] = 5.0
    min_dwell_s: Annotated[Seconds, Meta(description="A set of resident engines stays at least this long.")] = 30.0
    hysteresis: Annotated[
        Annotated[float, Meta(ge=1, le=100)],
        Meta(description="A switch must gain at least this many times its cost."),
    ] = 1.5
    horizon_s: Annotated[Seconds, Meta(description="Longest time over which a switch may earn its cost.")] = 300.0
    drain_s: Annotated[
        Seconds,
        Meta(description="Requests of an engine that leaves may finish for this long, then are re-routed."),
    ] = 10.0
    reserve_bytes: Annotated[Bytes, Meta(description="GPU memory that stays free.")] = 1_000_000_000
    max_asleep_bytes: Annotated[
        Bytes, Meta(description="Host memory for the weights of engines that sleep; beyond it they are stopped.")
    ] = 64_000_000_000
    sleep_level: Annotated[
        Literal[1, 2], Meta(description="vLLM's: 1 keeps the weights in host memory, 2 discards them.")
    ] = 1


class EnergyConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The energy ledger, which shares the counter's delta among requests, idle, wasted and unattributed."""

    static_share: Annotated[
        Literal["share", "box"],
        Meta(description="`share`: idle power is split over what runs; `box`: it stays the box's."),
    ] = "share"
    idle_w: Annotated[Watts, Meta(description="Idle power to go by until it has been learnt.")] = 0.0


class TelemetryConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the GPU view and the energy counter come from."""

    probe: Annotated[
        Literal["auto", "nvml", "sim", "none"],
        Meta(
            description="`auto`: the simulated GPU if all engines are simulated, else NVML if there is one, else none."
        ),
    ] = "auto"
    rapl: Annotated[bool, Meta(description="Read the CPU package's counter too (needs read permission).")] = False
    device: Annotated[str, Meta(description="UUID or index of the GPU.")] = "0"
    sample_hz: Annotated[
        Annotated[float, Meta(ge=0.1, le=100)], Meta(description="Counter and power readings a second.")
    ] = 20.0
    sim_memory_bytes: Annotated[
        Annotated[int, Meta(ge=1, le=10**13)], Meta(description="Memory of the simulated GPU.")
    ] = 80_000_000_000
    sim_idle_w: Annotated[Watts, Meta(description="Idle power of the simulated GPU.")] = 75.0
    decision_log: Annotated[
        bool, Meta(description="Keep every decision and what came of it on disk, for `msd explain` and `msd replay`.")
    ] = True
    decision_log_bytes: Annotated[
        Annotated[int, Meta(ge=65_536, le=10**12)], Meta(description="The oldest part of the log goes beyond this.")
    ] = 256 * 1024 * 1024


class JournalConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where requests and results are kept. Only in memory for now: Welcome and Ack say `durable: false`."""

    kind: Annotated[Literal["memory"], Meta(description="`memory`: lost with the process.")] = "memory"
    max_result_bytes: Annotated[
        Annotated[int, Meta(ge=1_024, le=10**12)],
        Meta(description="Stored results of one tenant, as memory. Unacknowledged ones are never dropped early."),
    ] = 64 * 1024 * 1024
    max_total_result_bytes: Annotated[
        Annotated[int, Meta(ge=1_024, le=10**13)], Meta(description="The same over all tenants.")
    ] = 1024 * 1024 * 1024
    retention_s: Annotated[
        Seconds, Meta(description="A result, and with it its idempotency key, is kept this long; then it is forgotten.")
    ] = 86_400.0


class Config(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole of config.toml."""

    daemon: DaemonConfig = DaemonConfig()
    ingress: IngressConfig = IngressConfig()
    limits: LimitsConfig = LimitsConfig()
    tenant: Annotated[tuple[TenantConfig, ...], Meta(max_length=1_024)] = ()
    model: Annotated[tuple[ModelConfig, ...], Meta(max_length=64)] = ()
    engine: Annotated[tuple[EngineConfig, ...], Meta(max_length=64)] = ()
    policy: PolicyConfig = PolicyConfig()
    quality: QualityConfig = QualityConfig()
    residency: ResidencyConfig = ResidencyConfig()
    energy: EnergyConfig = EnergyConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    journal: JournalConfig = JournalConfig()
