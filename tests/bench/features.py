"""What each feature costs: extraction once per request at 1,400 prompt tokens, whole and part by part.

`Bench` is a busy core's memory of the past: eight modes whose prefix caches, sessions and length classes are full of
earlier requests. `extract_once` does all that one request needs before its decision: the hashes of its blocks, its
length class, its Features. `decision.py` prints it beside the decision's own time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from random import Random

import msgspec
from msgspec import structs

from msd.config import Config
from msd.core.entry import Entry
from msd.core.features import Arrivals, Extractor, Sessions, extract
from msd.core.fleet import Fleet, mode_of
from msd.core.lengths import LengthLearner
from msd.core.prefixes import BLOCK_TOKENS, PrefixIndex, hash_blocks
from msd.domain import EngineInfo, Features, GpuView, Request
from tests.bench.harness import Options, Row, row

TARGET = "features"
NUM_MODES = 8
PROMPT_TOKENS = 1_400
OUTPUT_TOKENS = 128
KV_CAPACITY_TOKENS = 500_000
NUM_KNOWN_PROMPTS = 2_500
"""Enough to fill all eight caches: from then on each new block pushes out an old one."""
NUM_SESSIONS = 500
BAR_US = 150.0


class Bench:
    """A core's memory of the past, and new requests to extract features of."""

    def __init__(self, num_prompt_tokens: int = PROMPT_TOKENS, num_modes: int = NUM_MODES) -> None:
        engines = [
            {"name": f"m{i}", "model": "toy", "kind": "sim", "prefix_caching": True, "max_num_seqs": 16}
            for i in range(num_modes)
        ]
        config = msgspec.convert({"model": [{"name": "toy"}], "engine": engines}, Config)
        self.fleet = Fleet([(mode_of(engine), engine.max_num_seqs, None) for engine in config.engine])
        self.extractor = Extractor(self.fleet)
        self.lengths = LengthLearner()
        self.view = GpuView(t_us=0, power_limit_w=700.0, power_instant_w=300.0)
        self.t_us = 0
        self._rng = Random(1)
        self._num_prompt_tokens = num_prompt_tokens
        self._system_prompt = self.token_ids(num_prompt_tokens * 3 // 4)
        """Shared by every second prompt."""
        self._num_requests = 0
        for engine in config.engine:
            info = EngineInfo(
                engine=engine.name, max_model_len=8_192, max_num_seqs=16, kv_capacity_tokens=KV_CAPACITY_TOKENS
            )
            self.fleet.engine_up(info)
            self.extractor.engine_up(info)
        for number in range(NUM_KNOWN_PROMPTS):
            entry = self.entry(self.request(self.prompt(number % 2 == 0)))
            self.features(entry)
            entry.parked = number % num_modes
            self.remember(entry)

    def token_ids(self, num: int) -> tuple[int, ...]:
        """As many random ones."""
        return tuple(self._rng.randrange(128_000) for _ in range(num))

    def prompt(self, shares: bool) -> tuple[int, ...]:
        """A new prompt; `shares`: it begins like others."""
        if not shares:
            return self.token_ids(self._num_prompt_tokens)
        return self._system_prompt + self.token_ids(self._num_prompt_tokens - len(self._system_prompt))

    def request(self, token_ids: tuple[int, ...]) -> Request:
        """The request of that prompt, all but its hashes."""
        self._num_requests += 1
        self.t_us += 5_000
        return Request(
            request_id=f"r{self._num_requests}",
            client_request_id="",
            tenant=f"t{self._num_requests % 8}",
            content_hash=b"",
            received_us=self.t_us,
            num_prompt_tokens=len(token_ids),
            max_tokens=256,
            deadline_us=self.t_us + 5_000_000,
            task=("chat", "summary", None)[self._num_requests % 3],
            session_id=f"s{self._num_requests % NUM_SESSIONS}",
            prefix_hashes=hash_blocks(token_ids),
        )

    def entry(self, request: Request) -> Entry:
        """Its entry in the books, with the length to expect."""
        entry = Entry(request, (0,) * len(self.fleet.books), (1 << len(self.fleet.books)) - 1)
        entry.length_class = self.lengths.classify(request)
        entry.expected_tokens, entry.expected_p90_tokens = self.lengths.expect(request, entry.length_class)
        return entry

    def features(self, entry: Entry) -> Features:
        """As the scheduler asks for them."""
        self.extractor.arrivals.note(self.t_us)
        return self.extractor.features(entry, self.t_us, 3, self.view)

    def remember(self, entry: Entry) -> None:
        """What a request leaves behind once it has run."""
        self.extractor.dispatched(entry, entry.parked)
        self.extractor.first_token(entry, 0)
        self.extractor.ended(entry.parked, OUTPUT_TOKENS)
        self.lengths.learn(entry.length_class, OUTPUT_TOKENS)


def extract_once(bench: Bench, request: Request, token_ids: tuple[int, ...]) -> Features:
    """All of one request's extraction, from its token ids to its Features."""
    return bench.features(bench.entry(structs.replace(request, prefix_hashes=hash_blocks(token_ids))))


def measure(options: Options) -> list[Row]:
    """Medians and 99th percentiles over requests, then each part by itself."""
    num = int(options.scaled(2_000, 200))
    whole = [_whole(num) for _ in range(options.repeats)]
    parts = [_parts(num) for _ in range(options.repeats)]
    rows = [
        _row("whole extraction, 1,400 tokens, 8 modes, p50", [_quantile(times, 0.5) for times in whole], bar=BAR_US),
        _row("the same, p99", [_quantile(times, 0.99) for times in whole]),
    ]
    return rows + [_row(name, [repeat[name] for repeat in parts]) for name in parts[0]]


def _whole(num: int) -> list[float]:
    bench, times = Bench(), []
    for number in range(num):
        token_ids = bench.prompt(number % 2 == 0)
        request = bench.request(token_ids)
        began = time.perf_counter()
        extract_once(bench, request, token_ids)
        times.append((time.perf_counter() - began) * 1e6)
    return times


def _parts(num: int) -> dict[str, float]:
    """Median cost of each part in us, by name."""
    bench = Bench()
    prompts = [bench.prompt(number % 2 == 0) for number in range(64)]
    requests = [bench.request(prompt) for prompt in prompts]
    entries = [bench.entry(request) for request in requests]
    shared, alone = entries[::2], entries[1::2]
    prefixes, fleet, view, t_us = bench.extractor.prefixes, bench.fleet, bench.view, bench.t_us
    sessions, arrivals = Sessions(), Arrivals()

    def cached(entry: Entry) -> object:
        return prefixes.cached(entry.request.prefix_hashes, entry.request.num_prompt_tokens)

    def session(entry: Entry) -> object:
        sessions.served(entry.request.tenant, entry.request.session_id or "", 1)
        return sessions.arm(entry.request.tenant, entry.request.session_id or "")

    def arrival(entry: Entry) -> object:
        arrivals.note(entry.request.received_us)
        return arrivals.cv, arrivals.per_s(entry.request.received_us)

    def length(entry: Entry) -> object:
        return bench.lengths.expect(entry.request, bench.lengths.classify(entry.request))

    def put_together(entry: Entry) -> object:
        return extract(entry, t_us, fleet, 3, 1.0, view, 200.0, 1)

    found = {
        "hashes of the prompt's blocks (at accept)": _median_us(hash_blocks, prompts, num),
        "shared prefix: look-up, nothing shared": _median_us(cached, alone, num),
        "shared prefix: look-up, held by 8 modes": _median_us(cached, shared, num),
        "expected output: class, q50, q90": _median_us(length, entries, num),
        "arrivals: cv and rate": _median_us(arrival, entries, num),
        "session: who served it": _median_us(session, entries, num),
        "memory pressure (8 engines)": _median_us(lambda _: fleet.memory_pressure(), entries, num),
        "all others, memory pressure and the Struct": _median_us(put_together, entries, num),
    }
    # Afterwards, not before the decision: what the prompt leaves behind at its first token.
    fresh = [bench.request(bench.prompt(False)) for _ in range(num)]
    found["afterwards: remember a prompt in a full cache"] = _remember_us(prefixes, fresh)
    return found


def _remember_us(prefixes: PrefixIndex, requests: Sequence[Request]) -> float:
    times = []
    for number, request in enumerate(requests):
        began = time.perf_counter()
        prefixes.computed(number % NUM_MODES, request.prefix_hashes)
        times.append((time.perf_counter() - began) * 1e6)
    return statistics.median(times)


def _median_us(part: Callable[..., object], values: Sequence[object], num: int) -> float:
    """Median over `num` rounds of one call, in us; a round calls once per value, so that the clock costs nothing."""
    times = []
    for _ in range(max(10, num // 10)):
        began = time.perf_counter()
        for value in values:
            part(value)
        times.append((time.perf_counter() - began) / len(values) * 1e6)
    return statistics.median(times)


def _quantile(times: Sequence[float], share: float) -> float:
    return sorted(times)[int(share * (len(times) - 1))]


def _row(name: str, repeats: Sequence[float], *, bar: float | None = None) -> Row:
    return row(name, "us", repeats, target=TARGET, bar=bar)


assert PROMPT_TOKENS // BLOCK_TOKENS * NUM_KNOWN_PROMPTS > NUM_MODES * KV_CAPACITY_TOKENS // BLOCK_TOKENS // 2
