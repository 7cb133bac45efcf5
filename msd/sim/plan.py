"""The traffic of the simulated contest: seeded plans of requests in families, and the session that plays one back.

Families are those of the published deployment and answer-short workloads (prompt lengths as really tokenised). A plan
is a function of its seed, shape, rate and duration: every contestant gets the same requests at the same instants, open
loop: nobody's slowness delays the next arrival.
"""

from __future__ import annotations

import asyncio
from random import Random
from typing import Literal

from msgspec import Struct, structs

from msd.dispatch import Dispatcher
from msd.engine.sim import OUTPUT_TAG
from msd.sim.checks import Checks
from msd.sim.producers import SimSession
from msd.sim.truth import EIGHT_BIT, LOSSLESS
from msd.sim.weather import MODEL, TENANTS, Weather
from msd.wire import SamplingFields, SloFields, Submit

Shape = Literal["bursts", "steady", "drift", "flip", "idle"]
SHAPES: tuple[Shape, ...] = ("bursts", "steady", "drift", "flip")
BURST_FACTOR = 4.0
"""Rate in a burst over the rate in between."""
PHASE_S = (10.0, 30.0)
"""Length of bursts, and of the calm between them: uniform, 20 s on average."""
FLIP_S = 25.0
PROMPT_SPREAD = 0.1
"""Sigma of the log-normal prompt length."""
NUM_PREFIXES = 8
_UNIQUE_TOKENS = 16
_POOL_TOKENS = 16_384
_LONGEST_PROMPT = 3_900


class Family(Struct, frozen=True, kw_only=True):
    """One kind of request. `quality_floor`: the rank of the worst mode that is certified for it (None: any)."""

    name: str
    prompt_tokens: int
    output_tokens: int
    max_tokens: int
    task: str | None = None
    quality_floor: float | None = None
    shared_tokens: int = 0
    output_spread: float = 0.0
    long: bool = False
    """In which half of the mix it is when the mix flips."""


FAMILIES = (
    Family(name="short_short", prompt_tokens=229, output_tokens=32, max_tokens=32),
    Family(name="short_long", prompt_tokens=234, output_tokens=128, max_tokens=128, long=True),
    Family(name="long_short", prompt_tokens=1_380, output_tokens=32, max_tokens=32, long=True),
    Family(name="long_long", prompt_tokens=1_380, output_tokens=128, max_tokens=128, long=True),
    Family(
        name="shared_prefix", prompt_tokens=1_452, output_tokens=128, max_tokens=128, shared_tokens=1_430, long=True
    ),
    Family(name="memory_pressure", prompt_tokens=2_722, output_tokens=128, max_tokens=128, long=True),
    Family(name="mmlu_pro", prompt_tokens=293, output_tokens=1, max_tokens=8, task="mmlu_pro", quality_floor=EIGHT_BIT),
    Family(
        name="truthfulqa", prompt_tokens=180, output_tokens=1, max_tokens=8, task="truthfulqa", quality_floor=EIGHT_BIT
    ),
    Family(name="gpqa", prompt_tokens=280, output_tokens=1, max_tokens=8, task="gpqa", quality_floor=LOSSLESS),
    Family(name="mlu", prompt_tokens=224, output_tokens=1, max_tokens=8, task="mlu", quality_floor=EIGHT_BIT),
    Family(
        name="gsm8k",
        prompt_tokens=148,
        output_tokens=159,
        max_tokens=384,
        task="gsm8k",
        quality_floor=EIGHT_BIT,
        output_spread=0.35,
    ),
)
_SHORT = tuple(i for i, family in enumerate(FAMILIES) if not family.long)
_LONG = tuple(i for i, family in enumerate(FAMILIES) if family.long)
_ALL = tuple(range(len(FAMILIES)))


class Planned(Struct, frozen=True):
    """One request of a plan: when, and what. `family` is an index into FAMILIES."""

    t_s: float
    family: int
    num_prompt_tokens: int
    num_output_tokens: int
    prefix: int


class Bounds(Struct, frozen=True, kw_only=True):
    """SLOs of a family in ms; no TPOT where an answer is one token."""

    ttft_ms: float
    tpot_ms: float | None


class Plan(Struct, frozen=True, kw_only=True):
    """All requests of one match."""

    seed: int
    shape: Shape
    rate_per_s: float
    duration_s: float
    requests: tuple[Planned, ...]


def make_plan(seed: int, shape: Shape, rate_per_s: float, duration_s: float) -> Plan:
    """Draw a plan whose mean rate is `rate_per_s`."""
    rng = Random(f"{seed}/plan/{shape}")
    requests = []
    in_burst = rng.random() < 0.5
    phase_ends_s = rng.uniform(0.0, PHASE_S[1])
    calm = 2.0 / (1.0 + BURST_FACTOR)
    t_s = 0.0
    while True:
        factor = 1.0
        if shape == "bursts":
            while t_s >= phase_ends_s:
                in_burst = not in_burst
                phase_ends_s += rng.uniform(*PHASE_S)
            factor = calm * BURST_FACTOR if in_burst else calm
        elif shape == "drift":
            factor = 0.4 + 1.2 * t_s / duration_s
        t_s += rng.expovariate(rate_per_s * factor)
        if t_s >= duration_s:
            break
        among = _ALL
        if shape == "flip":
            among = _LONG if int(t_s / FLIP_S) % 2 else _SHORT
        requests.append(_draw(rng, t_s, rng.choice(among)))
    return Plan(seed=seed, shape=shape, rate_per_s=rate_per_s, duration_s=duration_s, requests=tuple(requests))


def idle_plan(seed: int, num_each: int = 9, gap_s: float = 6.0) -> Plan:
    """Each family a few times, every request alone; the shared prefix is in the cache from its second time on."""
    rng = Random(f"{seed}/plan/idle")
    order = [family for _ in range(num_each) for family in _ALL]
    drawn = [_draw(rng, gap_s * (1 + i), family) for i, family in enumerate(order)]
    requests = tuple(structs.replace(planned, prefix=0) for planned in drawn)
    duration_s = gap_s * (1 + len(order))
    return Plan(seed=seed, shape="idle", rate_per_s=1.0 / gap_s, duration_s=duration_s, requests=requests)


def _draw(rng: Random, t_s: float, index: int) -> Planned:
    family = FAMILIES[index]
    num_prompt = max(_UNIQUE_TOKENS + 1, round(family.prompt_tokens * rng.lognormvariate(0.0, PROMPT_SPREAD)))
    if family.shared_tokens:
        num_prompt = family.shared_tokens + max(_UNIQUE_TOKENS + 1, family.prompt_tokens - family.shared_tokens)
    num_output = family.output_tokens
    if family.output_spread:
        num_output = round(num_output * rng.lognormvariate(-(family.output_spread**2) / 2, family.output_spread))
    prefix = rng.randrange(NUM_PREFIXES)
    return Planned(t_s, index, min(num_prompt, _LONGEST_PROMPT), min(max(1, num_output), family.max_tokens), prefix)


class Player:
    """Plays a plan back: one tenant, one session, no cancels; the plan's instants, whatever the answers do."""

    def __init__(
        self,
        plan: Plan,
        bounds: tuple[Bounds, ...] | None,
        judged: bool,
        dispatcher: Dispatcher,
        weather: Weather,
        num_requests: int,
        rng: Random,
        checks: Checks,
    ) -> None:
        """`judged`: requests carry their quality floors. The last five are what a world hands to its traffic."""
        self.all_sent = asyncio.Event()
        self.session = SimSession(TENANTS[0], 0, None, checks)
        self.sessions = [self.session]
        self._plan = plan
        self._bounds = bounds
        self._judged = judged
        self._dispatcher = dispatcher
        self._loop = asyncio.get_running_loop()
        self._begin_s = self._loop.time()
        self._next = 0
        self._timer: asyncio.TimerHandle | None = None
        pool = Random(f"{plan.seed}/pool")
        self._pool = tuple(pool.choices(range(4_096), k=_POOL_TOKENS + _LONGEST_PROMPT))

    def start(self) -> None:
        """Wait for the first request's time."""
        self._begin_s = self._loop.time()
        self._wait()

    def stop(self) -> None:
        """No more timers."""
        if self._timer is not None:
            self._timer.cancel()

    def _wait(self) -> None:
        if self._next >= len(self._plan.requests):
            self.all_sent.set()
            return
        due_s = self._begin_s + self._plan.requests[self._next].t_s
        self._timer = self._loop.call_at(due_s, self._submit)

    def _submit(self) -> None:
        number, self._next = self._next, self._next + 1
        submit = self._make(number, self._plan.requests[number])
        self.session.ask(submit.client_request_id)
        self._dispatcher.submit(submit, self.session)
        self._wait()

    def _make(self, number: int, planned: Planned) -> Submit:
        family = FAMILIES[planned.family]
        shared: tuple[int, ...] = ()
        if family.shared_tokens:
            shared = self._pool[planned.prefix : planned.prefix + family.shared_tokens]
        # A head of its own: no two prompts but those of one prefix begin alike.
        own = tuple(number // 4_096**i % 4_096 for i in range(2)) * (_UNIQUE_TOKENS // 2)
        rest = planned.num_prompt_tokens - len(shared) - len(own)
        first = number * 977 % _POOL_TOKENS
        bounds = None if self._bounds is None else self._bounds[planned.family]
        slo = SloFields() if bounds is None else SloFields(ttft_ms=bounds.ttft_ms, tpot_ms=bounds.tpot_ms)
        return Submit(
            client_request_id=f"c{number}",
            max_tokens=family.max_tokens,
            prompt_token_ids=(*shared, *own, *self._pool[first : first + rest]),
            model=MODEL,
            sampling=SamplingFields(),
            slo=slo,
            quality_floor=family.quality_floor if self._judged else None,
            task=family.task,
            tags={OUTPUT_TAG: str(planned.num_output_tokens)},
            stream=False,
        )
