"""The plan: every request of a run with its intended time, made from spec and seed alone and kept as JSON lines.

Line 1 is a header (spec, seed, statistics), then one row per request. One seed gives the same bytes on every run with
the same numpy; numpy does not promise equal streams across versions, so a replay reads the file and never regenerates.
"""

from __future__ import annotations

import gzip
import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from loadgen import arrivals, lengths
from loadgen.idc import index_of_dispersion
from loadgen.spec import ClassSpec, ShotsPrefix, Spec, fingerprint
from msd import tasks

VERSION = 1
IDC_WINDOWS_S = (1, 10)
MAX_PROMPT_SEED = 2**48
GZIP_MAGIC = b"\x1f\x8b"


class PlanError(ValueError):
    """The file is no plan that this loadgen can run. Recoverable by the user: make it anew from its spec."""


class PlannedRequest(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """One request to be: `t_us` from the start. `output_tokens` is exact for made-up prompts, a bound for tasks."""

    id: Annotated[int, Meta(ge=0)]
    t_us: Annotated[int, Meta(ge=0)]
    traffic_class: str = msgspec.field(name="class")
    tenant: str | None = None
    priority: int = 0
    model: str | None = None
    task: str | None = None
    level: int = 0
    prefix_id: str | None = None
    prefix_seed: int = 0
    prefix_tokens: int = 0
    num_shots: int = 0
    input_tokens: int = 0
    output_tokens: int
    prompt_seed: int


class PlanStatistics(Struct, frozen=True, kw_only=True):
    """What the plan turned out to be; `rate_peak_rps` is the fullest second, `idc` by window, None where too short."""

    num_requests: int
    rate_mean_rps: float
    rate_peak_rps: int
    idc: dict[str, float | None]
    requests_per_class: dict[str, int]
    input_tokens: int
    output_tokens: int


class Header(Struct, frozen=True, kw_only=True, tag="loadgen plan", tag_field="kind"):
    """Line 1 of a plan."""

    version: int
    seed: int
    spec_hash: str
    numpy: str
    statistics: PlanStatistics
    spec: Spec


class Plan(Struct, frozen=True):
    """A header and its requests, by time."""

    header: Header
    requests: list[PlannedRequest]

    def lines(self) -> Iterator[bytes]:
        """Yield the canonical JSON lines."""
        encode = msgspec.json.Encoder(order="deterministic").encode
        yield encode(self.header) + b"\n"
        for request in self.requests:
            yield encode(request) + b"\n"

    def digest(self) -> str:
        """Hash of the plan's bytes: two runs compare only when it is equal."""
        hasher = hashlib.sha256()
        for line in self.lines():
            hasher.update(line)
        return hasher.hexdigest()[:16]

    def times_us(self) -> NDArray[np.int64]:
        """Intended times: sorted int64[n]."""
        return np.fromiter((request.t_us for request in self.requests), dtype=np.int64, count=len(self.requests))


def stream(seed: int, purpose: str) -> np.random.Generator:
    """Return the random stream of a purpose: streams of other names and seeds are independent of it."""
    digest = hashlib.blake2b(purpose.encode(), digest_size=16).digest()
    words = np.frombuffer(digest, dtype="<u4").tolist()
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, *words])))


def make(spec: Spec) -> Plan:
    """Draw the plan of a spec."""
    seed = spec.plan.seed
    times = arrivals.sample(
        spec.arrivals,
        [(traffic.name, traffic.share) for traffic in spec.classes],
        spec.plan.duration_s,
        lambda purpose: stream(seed, purpose),
    )
    rows = [row for traffic in spec.classes for row in _class_rows(traffic, times[traffic.name], seed)]
    # Stable: at equal times the order of the spec decides.
    rows.sort(key=lambda row: row.t_us)
    requests = [msgspec.structs.replace(row, id=index) for index, row in enumerate(rows)]
    header = Header(
        version=VERSION,
        seed=seed,
        spec_hash=fingerprint(spec),
        numpy=np.__version__,
        statistics=_statistics(spec, requests),
        spec=spec,
    )
    return Plan(header, requests)


def save(plan: Plan, path: Path) -> None:
    """Write the plan, gzipped when the name ends so; equal plans give equal files."""
    if path.suffix == ".gz":
        with path.open("wb") as raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as file:
            file.writelines(plan.lines())
    else:
        with path.open("wb") as file:
            file.writelines(plan.lines())


def load(path: Path) -> Plan:
    """Read a plan, gzipped or not. Raises PlanError."""
    try:
        data = path.read_bytes()
        if data.startswith(GZIP_MAGIC):
            data = gzip.decompress(data)
        first, _, rest = data.partition(b"\n")
        header = msgspec.json.decode(first, type=Header)
        requests = msgspec.json.Decoder(PlannedRequest).decode_lines(rest)
    except (OSError, EOFError, UnicodeDecodeError, msgspec.DecodeError) as error:
        raise PlanError(f"{path}: not a plan: {error}") from error
    if header.version != VERSION:
        raise PlanError(f"{path}: plan version {header.version}, this loadgen reads {VERSION}")
    known = {traffic.name for traffic in header.spec.classes}
    previous = 0
    for request in requests:
        if request.traffic_class not in known or request.t_us < previous:
            raise PlanError(f"{path}: request {request.id} is out of order or of a class that the header does not name")
        previous = request.t_us
    return Plan(header, requests)


def is_plan(path: Path) -> bool:
    """Say whether a file looks like a plan and not like a spec."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(2)
    return start == GZIP_MAGIC or start[:1] == b"{"


def _class_rows(traffic: ClassSpec, times_us: NDArray[np.int64], seed: int) -> Iterator[PlannedRequest]:
    def rng(purpose: str) -> np.random.Generator:
        return stream(seed, f"class/{traffic.name}/{purpose}")

    count = len(times_us)
    prompt_seeds = rng("prompt_seed").integers(0, MAX_PROMPT_SEED, size=count).tolist()
    groups, prefix_seeds = _prefixes(traffic, count, rng("prefix"), rng("prefix_seed"))
    picks, levels = _problems(traffic, count, rng("task"), rng("level"))
    prefix_tokens = 0 if traffic.prefix is None or isinstance(traffic.prefix, ShotsPrefix) else traffic.prefix.tokens
    num_shots = traffic.prefix.num_shots if isinstance(traffic.prefix, ShotsPrefix) else 0
    inputs = outputs = [0] * count
    if traffic.input is not None and traffic.output is not None:
        inputs = lengths.sample(traffic.input, count, rng("input"), minimum=prefix_tokens + 1).tolist()
        outputs = lengths.sample(traffic.output, count, rng("output")).tolist()
    for index, t_us in enumerate(times_us.tolist()):
        group = groups[index]
        task = traffic.tasks[picks[index]].task if traffic.tasks else None
        prefix_id = None if group is None else f"{traffic.name}/{task or ''}{levels[index] or ''}/{group}"
        yield PlannedRequest(
            id=0,
            t_us=t_us,
            traffic_class=traffic.name,
            tenant=traffic.tenant,
            priority=traffic.priority,
            model=traffic.model,
            task=task,
            level=levels[index],
            prefix_id=prefix_id,
            prefix_seed=0 if group is None else prefix_seeds[group],
            prefix_tokens=0 if group is None else prefix_tokens,
            num_shots=0 if group is None else num_shots,
            input_tokens=inputs[index],
            output_tokens=outputs[index] if task is None else tasks.longest_answer(task, levels[index]) + 1,
            prompt_seed=prompt_seeds[index],
        )


def _prefixes(
    traffic: ClassSpec, count: int, rng: np.random.Generator, seed_rng: np.random.Generator
) -> tuple[list[int | None], list[int]]:
    """Return the prefix group of each request (None = no prefix) and the seed of each group."""
    prefix = traffic.prefix
    if prefix is None:
        return [None] * count, []
    weights = np.arange(1, prefix.groups + 1, dtype=np.float64) ** -prefix.zipf
    bounds = np.cumsum(weights) / weights.sum()
    draws = rng.random((count, 2))
    groups = np.minimum(np.searchsorted(bounds, draws[:, 1], side="right"), prefix.groups - 1).tolist()
    shared = (draws[:, 0] < prefix.fraction).tolist()
    seeds = seed_rng.integers(0, MAX_PROMPT_SEED, size=prefix.groups).tolist()
    return [group if has else None for group, has in zip(groups, shared, strict=True)], seeds


def _problems(
    traffic: ClassSpec, count: int, task_rng: np.random.Generator, level_rng: np.random.Generator
) -> tuple[list[int], list[int]]:
    """Return for each request the index into the class's tasks and the level; zeros where there are no tasks."""
    if not traffic.tasks:
        return [0] * count, [0] * count
    weights = np.array([mix.weight for mix in traffic.tasks])
    bounds = np.cumsum(weights) / weights.sum()
    drawn = np.searchsorted(bounds, task_rng.random(count), side="right")
    picks = np.minimum(drawn, len(traffic.tasks) - 1).tolist()
    draws = level_rng.random(count).tolist()
    levels = [traffic.tasks[pick].levels for pick in picks]
    return picks, [choice[int(draw * len(choice))] for choice, draw in zip(levels, draws, strict=True)]


def _statistics(spec: Spec, requests: list[PlannedRequest]) -> PlanStatistics:
    times_s = np.array([request.t_us for request in requests], dtype=np.float64) / arrivals.MICROSECONDS
    duration_s = spec.plan.duration_s
    per_class = Counter(request.traffic_class for request in requests)
    idc = {f"{window}_s": index_of_dispersion(times_s, duration_s, window) for window in IDC_WINDOWS_S}
    return PlanStatistics(
        num_requests=len(requests),
        rate_mean_rps=round(len(requests) / duration_s, 3),
        rate_peak_rps=int(np.bincount(times_s.astype(np.int64)).max()) if requests else 0,
        idc={window: None if value is None else round(value, 3) for window, value in idc.items()},
        requests_per_class={traffic.name: per_class[traffic.name] for traffic in spec.classes},
        input_tokens=sum(request.input_tokens for request in requests),
        output_tokens=sum(request.output_tokens for request in requests),
    )
