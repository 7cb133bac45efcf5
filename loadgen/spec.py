"""The spec: what traffic is wanted, as frozen Structs. spec_reader.py reads them from TOML."""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from msd.wire import MAX_DURATION_MS, MAX_TOKENS

MAX_SHOTS = 64

Name = Annotated[str, Meta(min_length=1, max_length=32, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Positive = Annotated[float, Meta(gt=0, le=1e9)]
NotNegative = Annotated[float, Meta(ge=0, le=1e9)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
OpenFraction = Annotated[float, Meta(gt=0, lt=1)]
NumTokens = Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
Milliseconds = Annotated[float, Meta(gt=0, le=MAX_DURATION_MS)]
Count = Annotated[int, Meta(ge=1, le=10_000_000)]


# --- run -------------------------------------------------------------------------------------------------------------


class PlanSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long, and from which seed."""

    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0
    duration_s: Positive


class RunSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the plan is carried out and judged. Requests of the warm-up and cool-down (by intended time) are cut."""

    warmup_s: NotNegative = 0.0
    cooldown_s: NotNegative = 0.0
    timeout_s: Positive = 120.0
    max_in_flight: Count = 20_000
    max_lateness_p99_ms: Positive = 2.0
    """A run whose sender was later than this is invalid."""


# --- classes ---------------------------------------------------------------------------------------------------------


class SloSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What makes a request of the class good: all that are given."""

    ttft_ms: Milliseconds | None = None
    tpot_ms: Milliseconds | None = None
    itl_p99_ms: Milliseconds | None = None
    e2el_ms: Milliseconds | None = None


class Fixed(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="fixed", tag_field="kind"):
    """Always the same length."""

    tokens: NumTokens


class Uniform(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="uniform", tag_field="kind"):
    """Every length from `low` to `high`, both included, alike."""

    low: NumTokens
    high: NumTokens


class Lognormal(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="lognormal", tag_field="kind"):
    """Lognormal by any two of mean, p50, p95; clipped to 1 .. `max`."""

    mean: Positive | None = None
    p50: Positive | None = None
    p95: Positive | None = None
    max: NumTokens = MAX_TOKENS


Length = Fixed | Uniform | Lognormal


class TaskMix(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An exact-answer task at some levels, with its weight in the class."""

    task: str
    levels: Annotated[tuple[int, ...], Meta(min_length=1, max_length=16)]
    weight: Positive = 1.0


class ShotsPrefix(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="shots", tag_field="kind"):
    """Worked examples before the question, the same ones for all requests of a group, task and level."""

    num_shots: Annotated[int, Meta(ge=1, le=MAX_SHOTS)]
    groups: Count = 1
    fraction: Fraction = 1.0
    zipf: NotNegative = 0.0


class GroupsPrefix(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="groups", tag_field="kind"):
    """The first `tokens` token ids are those of one of `groups` groups, popular by rank ** -zipf."""

    tokens: NumTokens
    groups: Count = 1
    fraction: Fraction = 1.0
    zipf: NotNegative = 0.0


class ModeWish(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A mode to ask for; `strict`: it or an error."""

    mode: Annotated[str, Meta(min_length=1, max_length=64)]
    strict: bool = False


class ClassSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A traffic class: either exact-answer `tasks`, or token counts by `input` and `output`."""

    name: Name
    share: Annotated[float, Meta(gt=0, le=1)]
    slo: SloSpec = SloSpec()
    tenant: Name | None = None
    service_class: Literal["interactive", "standard", "batch"] = "standard"
    priority: Annotated[int, Meta(ge=-8, le=7)] = 0
    model: Annotated[str, Meta(max_length=128)] | None = None
    quality_floor: Fraction | None = None
    deadline_ms: Milliseconds | None = None
    mode_hint: ModeWish | None = None
    tasks: Annotated[tuple[TaskMix, ...], Meta(max_length=64)] = ()
    hint_task: bool = True
    """Tell msd the task's name."""
    input: Length | None = None
    output: Length | None = None
    prefix: ShotsPrefix | GroupsPrefix | None = None


class ContentSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Token ids that made-up prompts are drawn from: `token_low` <= id < `token_high`."""

    token_low: Annotated[int, Meta(ge=0, le=2**31 - 2)] = 16
    token_high: Annotated[int, Meta(ge=1, le=2**31 - 1)] = 96


# --- arrivals --------------------------------------------------------------------------------------------------------


class Constant(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="constant", tag_field="kind"):
    """Equal gaps."""


class Poisson(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="poisson", tag_field="kind"):
    """Independent arrivals."""


class Square(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="square", tag_field="kind"):
    """Poisson whose rate is at level `high` for `duty` of each period, else `low`; only their ratio matters."""

    low: NotNegative
    high: Positive
    period_s: Positive
    duty: OpenFraction = 0.5


class OnOffSource(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One source: correlation time, its part c of the index of dispersion at wide windows, share of time on."""

    tau_s: Positive
    c: Positive
    p: OpenFraction = 0.2

    def rates(self, rate_rps: float) -> tuple[float, float]:
        """Return (r, mu) in requests/s: the rate while on, and its mean, within a total of `rate_rps`."""
        variance = self.c * rate_rps / (2.0 * self.tau_s)
        on_rps: float = (variance / (self.p * (1.0 - self.p))) ** 0.5
        return on_rps, on_rps * self.p


class OnOff(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="onoff", tag_field="kind"):
    """Superposed on/off sources over a constant base that fills up to the rate."""

    sources: Annotated[tuple[OnOffSource, ...], Meta(min_length=1, max_length=64)]

    def base_rps(self, rate_rps: float) -> float:
        """What is left for the constant base; negative when the sources alone exceed the rate."""
        return rate_rps - sum(source.rates(rate_rps)[1] for source in self.sources)


Process = Constant | Poisson | Square | OnOff


class ArrivalSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When requests come: `rate_rps` is the mean of every process."""

    rate_rps: Positive
    process: Process = Poisson()


class Spec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={"classes": "class"}):
    """The whole spec."""

    title: Annotated[str, Meta(max_length=128)] = ""
    plan: PlanSpec
    run: RunSpec = RunSpec()
    classes: Annotated[tuple[ClassSpec, ...], Meta(min_length=1, max_length=256)]
    arrivals: ArrivalSpec
    content: ContentSpec = ContentSpec()


def fingerprint(spec: Spec) -> str:
    """Hash of all that the plan depends on but the seed."""
    bare = msgspec.structs.replace(spec, plan=msgspec.structs.replace(spec.plan, seed=0))
    return hashlib.sha256(msgspec.json.encode(bare, order="deterministic")).hexdigest()[:16]
