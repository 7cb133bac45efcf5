"""Measures engines for a profile, through the ports alone: real and simulated engines, real and virtual time.

A **cell** is a workload family at a batch size: that many requests are sent at once, again and again, until there are
enough repeats and, where a counter measures energy, a window long enough to trust it. Engines are measured one after
another, each alone on the device; so comparisons of energy between modes are not interleaved in time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import aclosing
from random import Random
from statistics import median

import msgspec
from msgspec import Struct

from msd import tasks
from msd.domain import CounterReading, EngineInfo, Prompt, Sampling
from msd.learning.fitting import fit_energy, fit_tpot, fit_ttft
from msd.ports import Clock, Engine, GpuProbe, Tokenizer
from msd.profile import Measured, ModeProfile

EDGE_LIMIT_S = 1.0
"""A counter steps every 10 to 120 ms: one that has not moved for this long does not count."""
POLL_S = 0.005
SETTLE_S = 3.0
IDLE_S = 5.0
CELL_LIMIT_S = 60.0
"""A cell ends with the repeat under way after this long, whatever was asked for."""
MAX_REPEATS = 1_000
NUM_SWEEP = 6
SWEEP_REPEATS = 5
"""Times as many: answers of one token cost little."""
SMALLEST_SWEEP_TOKENS = 16
VIEW_S = 0.5
"""Until a view of the memory is newer than what has just happened (it is read five times a second)."""
ROOM = 0.9
"""Of the longest context that the largest family may take."""
NATURAL_TASKS = ("copy", "reverse", "sort")
NUM_NATURAL = 12
NATURAL_TOKENS = 64
ENOUGH_NATURAL = 4


class Family(Struct, frozen=True, kw_only=True):
    """A kind of workload, in tokens; the first `num_shared_tokens` of its prompts are always alike."""

    name: str
    num_prompt_tokens: int
    num_output_tokens: int
    num_shared_tokens: int = 0


FAMILIES = (
    Family(name="short_short", num_prompt_tokens=128, num_output_tokens=32),
    Family(name="short_long", num_prompt_tokens=128, num_output_tokens=128),
    Family(name="long_short", num_prompt_tokens=1_024, num_output_tokens=32),
    Family(name="long_long", num_prompt_tokens=1_024, num_output_tokens=128),
    Family(name="shared_prefix", num_prompt_tokens=1_024, num_output_tokens=128, num_shared_tokens=896),
    Family(name="long_answer", num_prompt_tokens=128, num_output_tokens=512),
)
"""The paper's deployment families, and long answers."""
PREFILL = "prefill"
"""Family of the sweep: one-token answers to prompts of growing length, alone."""
FAMILY_NAMES = (*(family.name for family in FAMILIES), PREFILL)


class Plan(Struct, frozen=True, kw_only=True):
    """What to measure of every mode. `energy_s`: least window of a cell where a counter measures; 0 = no energy."""

    families: tuple[str, ...] = FAMILY_NAMES
    batches: tuple[int, ...] = (1, 4, 16)
    num_repeats: int = 3
    energy_s: float = 10.0
    seed: int = 0


class Cell(Struct, frozen=True):
    """One cell to measure."""

    family: Family
    batch_size: int


class Run(Struct, frozen=True):
    """One request as its client saw it: times in us, of each chunk with the tokens so far."""

    sent_us: int
    times_us: tuple[int, ...]
    tokens: tuple[int, ...]
    num_cached_tokens: int
    finish_reason: str
    ended_us: int = 0


class Subject(Struct, frozen=True, kw_only=True):
    """A mode to be measured: how to make its engine, and what its profile has to say of it."""

    mode: str
    make: Callable[[], Engine]
    tokenizer: Tokenizer
    recipe: str
    settings: dict[str, object]
    max_num_seqs: int
    sleep_level: int = 1


def cells_of(plan: Plan, max_model_len: int, max_num_seqs: int) -> tuple[Cell, ...]:
    """The cells of a mode: families scaled to its context, batches that it has slots for."""
    families = {family.name: family for family in FAMILIES}
    chosen = [families[name] for name in plan.families if name != PREFILL]
    longest = max(family.num_prompt_tokens + family.num_output_tokens for family in FAMILIES)
    scale = min(1.0, ROOM * max_model_len / longest)
    batches = [size for size in plan.batches if size <= max_num_seqs] or [1]
    cells = [Cell(_scaled(family, scale), size) for family in chosen for size in batches]
    if PREFILL in plan.families:
        top = max(SMALLEST_SWEEP_TOKENS * 2, int(ROOM * max_model_len * (scale if scale < 1.0 else 0.8)))
        top = min(top, max_model_len - 1, 4_096)
        ratio = (top / SMALLEST_SWEEP_TOKENS) ** (1 / (NUM_SWEEP - 1))
        sizes = sorted({round(SMALLEST_SWEEP_TOKENS * ratio**step) for step in range(NUM_SWEEP)})
        cells += [Cell(Family(name=PREFILL, num_prompt_tokens=size, num_output_tokens=1), 1) for size in sizes]
    return tuple(cells)


def _scaled(family: Family, scale: float) -> Family:
    return Family(
        name=family.name,
        num_prompt_tokens=max(2, int(family.num_prompt_tokens * scale)),
        num_output_tokens=max(2, int(family.num_output_tokens * scale)),
        num_shared_tokens=int(family.num_shared_tokens * scale),
    )


class Meter:
    """Energy of a span of time, between two changes of the GPU's counter (energy spec: never on one's own clock)."""

    def __init__(self, probe: GpuProbe, clock: Clock) -> None:
        self._probe = probe
        self._clock = clock
        self._newest: CounterReading | None = None

    async def edge(self) -> CounterReading | None:
        """Wait for the counter's next change; None when there is no counter or it stands still."""
        until_us = self._clock.now_us() + int(EDGE_LIMIT_S * 1e6)
        while True:
            changed = None
            for reading in self._probe.readings():
                newest, self._newest = self._newest, reading
                if changed is None and newest is not None and reading.energy_mj != newest.energy_mj:
                    changed = reading
            if changed is not None:
                return changed
            if self._clock.now_us() >= until_us:
                return None
            await asyncio.sleep(POLL_S)

    @property
    def stated_idle_w(self) -> float | None:
        """Idle power, where the probe itself knows it."""
        return self._newest.idle_w if self._newest is not None else None


def spent_mj(before: CounterReading | None, after: CounterReading | None) -> int | None:
    """Energy between two edges; None when either is missing or the counter was reset."""
    if before is None or after is None or before.epoch != after.epoch or after.source == "estimated":
        return None
    return after.energy_mj - before.energy_mj


class Profiler:
    """Measures one mode after another; each starts its engine and stops it."""

    def __init__(
        self,
        probe: GpuProbe,
        clock: Clock,
        plan: Plan,
        on_step: Callable[[str, str, int, int], None],
        on_cell: Callable[[ModeProfile], None],
    ) -> None:
        """`on_step`: (mode, what it does now, cells done, cells in all). `on_cell`: the mode's profile so far."""
        self._probe = probe
        self._clock = clock
        self._plan = plan
        self._on_step = on_step
        self._on_cell = on_cell
        self._meter = Meter(probe, clock)
        self._num_sent = 0
        self.idle_w: float | None = None
        """Mean idle power with one engine resident; None until it was measured."""

    async def measure(self, subject: Subject, known: ModeProfile | None = None) -> ModeProfile:
        """The mode's profile; the cells of `known` (an interrupted run) are taken over. Raises EngineError."""
        before_bytes = self._used_bytes()
        engine = subject.make()
        self._on_step(subject.mode, "starting the engine", 0, 0)
        try:
            info = await engine.start()
            profile = known or ModeProfile(
                mode=subject.mode,
                recipe=subject.recipe,
                ttft_ms=(0.0, 0.0, 0.0),
                tpot_ms=(0.0, 0.0, 0.0),
                eos_step_ms=0.0,
                settings=subject.settings,
            )
            profile = msgspec.structs.replace(profile, start_s=info.start_s)
            has_energy = await self._measure_idle() if self._plan.energy_s else False
            cells = cells_of(self._plan, info.max_model_len, min(info.max_num_seqs, subject.max_num_seqs))
            peak_bytes = self._used_bytes()
            for done, cell in enumerate(cells):
                self._on_step(subject.mode, describe(cell), done, len(cells))
                if any(_is_of(old, cell) for old in profile.cells):
                    continue
                measured = await self._measure_cell(engine, subject.tokenizer, cell, has_energy)
                used_bytes = self._used_bytes()
                if used_bytes is not None:
                    peak_bytes = max(used_bytes, peak_bytes or 0)
                profile = msgspec.structs.replace(profile, cells=(*profile.cells, measured))
                if before_bytes is not None and peak_bytes is not None:
                    profile = msgspec.structs.replace(profile, gpu_bytes=max(0, peak_bytes - before_bytes))
                self._on_cell(profile)
            self._on_step(subject.mode, "ends of answers, sleep and wake", len(cells), len(cells))
            profile = fitted(profile, self.idle_w)
            eos_step_ms = await self._measure_eos(engine, info, subject.tokenizer)
            profile = msgspec.structs.replace(profile, eos_step_ms=eos_step_ms)
            if info.can_sleep:
                profile = await self._measure_sleep(engine, subject, profile, before_bytes)
        finally:
            await engine.stop()
        self._on_cell(profile)
        return profile

    # --- one cell --------------------------------------------------------------------------------------------------

    async def _measure_cell(self, engine: Engine, tokenizer: Tokenizer, cell: Cell, has_energy: bool) -> Measured:
        rng = Random(f"{self._plan.seed} {cell.family.name} {cell.family.num_prompt_tokens} {cell.batch_size}")
        shared = _random_ids(rng, tokenizer, cell.family.num_shared_tokens)
        # Once beforehand: new shapes compile, and a shared prefix comes into the cache.
        await self._run_batch(engine, cell, self._prompts(rng, tokenizer, cell, shared))
        batches: list[tuple[Run, ...]] = []
        # The sweep's answers of one token are for TTFT; what a prompt costs is seen in the families too.
        before = await self._meter.edge() if has_energy and cell.family.name != PREFILL else None
        window_s = self._plan.energy_s if before is not None else 0.0
        num_repeats = self._plan.num_repeats * (SWEEP_REPEATS if cell.family.name == PREFILL else 1)
        began_us = self._clock.now_us()
        while len(batches) < MAX_REPEATS:
            batches.append(await self._run_batch(engine, cell, self._prompts(rng, tokenizer, cell, shared)))
            elapsed_s = (self._clock.now_us() - began_us) / 1e6
            enough = len(batches) >= num_repeats and elapsed_s >= window_s
            if enough or elapsed_s >= CELL_LIMIT_S:
                break
        busy_s = (self._clock.now_us() - began_us) / 1e6
        after = await self._meter.edge() if before is not None else None
        energy_mj = spent_mj(before, after)
        if energy_mj is not None and before is not None and after is not None:
            # The edges lie a little outside the runs: what was drawn there is idle.
            idle_s = max(0.0, (after.t_us - before.t_us) / 1e6 - busy_s)
            energy_mj -= round((self.idle_w or 0.0) * 1_000 * idle_s)
        return summarise(cell, batches, busy_s, energy_mj)

    async def _run_batch(self, engine: Engine, cell: Cell, prompts: Sequence[Prompt]) -> tuple[Run, ...]:
        async with asyncio.TaskGroup() as group:
            sent = [group.create_task(self._run(engine, prompt, cell.family.num_output_tokens)) for prompt in prompts]
        return tuple(task.result() for task in sent)

    async def _run(self, engine: Engine, prompt: Prompt, max_tokens: int) -> Run:
        self._num_sent += 1
        sent_us, times, tokens, cached, reason = self._clock.now_us(), [], [], 0, ""
        count = 0
        async with aclosing(engine.generate(f"profile-{self._num_sent}", prompt, max_tokens, 0)) as chunks:
            async for chunk in chunks:
                cached = cached or chunk.num_cached_tokens
                reason = chunk.finish_reason or ""
                if chunk.token_ids:
                    count += len(chunk.token_ids)
                    times.append(self._clock.now_us())
                    tokens.append(count)
        ended_us = self._clock.now_us()
        return Run(sent_us, tuple(times) or (ended_us,), tuple(tokens) or (0,), cached, reason, ended_us)

    def _prompts(self, rng: Random, tokenizer: Tokenizer, cell: Cell, shared: tuple[int, ...]) -> list[Prompt]:
        own = cell.family.num_prompt_tokens - len(shared)
        sampling = Sampling(temperature=0.0, ignore_eos=True)
        return [
            Prompt(token_ids=shared + _random_ids(rng, tokenizer, own), sampling=sampling)
            for _ in range(cell.batch_size)
        ]

    # --- the rest of a mode ----------------------------------------------------------------------------------------

    async def _measure_idle(self) -> bool:
        """Find out whether a counter counts, and what the device draws with the engine resident and idle."""
        if await self._meter.edge() is None and await self._meter.edge() is None:
            return False
        if self._meter.stated_idle_w is not None:
            self.idle_w = self._meter.stated_idle_w
            return True
        await asyncio.sleep(SETTLE_S)
        before = await self._meter.edge()
        await asyncio.sleep(IDLE_S)
        after = await self._meter.edge()
        energy_mj = spent_mj(before, after)
        if energy_mj is not None and before is not None and after is not None and after.t_us > before.t_us:
            watts = energy_mj * 1_000 / (after.t_us - before.t_us)
            self.idle_w = watts if self.idle_w is None else min(self.idle_w, watts)
        return self.idle_w is not None

    async def _measure_eos(self, engine: Engine, info: EngineInfo, tokenizer: Tokenizer) -> float:
        """What an answer that ends by itself takes beyond the same answer cut off at its length; 0 when too few do."""
        beyond = []
        for number in range(NUM_NATURAL):
            problem = tasks.generate(NATURAL_TASKS[number % len(NATURAL_TASKS)], 2, number)
            prompt = Prompt(token_ids=tokenizer.encode(problem.prompt), sampling=Sampling(temperature=0.0))
            max_tokens = min(NATURAL_TOKENS, info.max_model_len - len(prompt.token_ids) - 1)
            if max_tokens < 2:
                break
            natural = await self._run(engine, prompt, max_tokens)
            if natural.finish_reason == "stop" and natural.tokens[-1] > 0:
                on = Prompt(token_ids=prompt.token_ids, sampling=Sampling(temperature=0.0, ignore_eos=True))
                cut = await self._run(engine, on, natural.tokens[-1])
                beyond.append((decoding_us(natural) - decoding_us(cut)) / 1e3)
        return max(0.0, median(beyond)) if len(beyond) >= ENOUGH_NATURAL else 0.0

    async def _measure_sleep(
        self, engine: Engine, subject: Subject, profile: ModeProfile, before_bytes: int | None
    ) -> ModeProfile:
        """Put it to sleep and wake it."""
        began_us = self._clock.now_us()
        await engine.sleep(subject.sleep_level)
        asleep_us = self._clock.now_us()
        await asyncio.sleep(VIEW_S)
        asleep_bytes = self._used_bytes()
        woken_from_us = self._clock.now_us()
        await engine.wake()
        woken_us = self._clock.now_us()
        left_bytes = 0
        if asleep_bytes is not None and before_bytes is not None:
            left_bytes = max(0, asleep_bytes - before_bytes)
        return msgspec.structs.replace(
            profile,
            sleep_s=(asleep_us - began_us) / 1e6,
            wake_s=(woken_us - woken_from_us) / 1e6,
            asleep_bytes=left_bytes,
        )

    def _used_bytes(self) -> int | None:
        view = self._probe.latest()
        return view.memory_used_bytes if view is not None else None


def summarise(cell: Cell, batches: Sequence[tuple[Run, ...]], busy_s: float, energy_mj: int | None) -> Measured:
    """Medians over all requests of a cell; throughput and energy over all of its time."""
    runs = [run for batch in batches for run in batch]
    tpots = [tpot for batch in batches for tpot in decode_ms_per_token(batch)]
    num_tokens = sum(run.tokens[-1] for run in runs)
    return Measured(
        family=cell.family.name,
        num_prompt_tokens=cell.family.num_prompt_tokens,
        num_cached_tokens=round(median(run.num_cached_tokens for run in runs)),
        num_output_tokens=cell.family.num_output_tokens,
        batch_size=cell.batch_size,
        num_repeats=len(batches),
        ttft_ms=max(0.001, median(run.times_us[0] - run.sent_us for run in runs) / 1e3),
        tpot_ms=median(tpots) if tpots else 0.0,
        e2el_ms=median(run.times_us[-1] - run.sent_us for run in runs) / 1e3,
        tokens_per_s=num_tokens / busy_s,
        mj_per_token=energy_mj / num_tokens if energy_mj is not None else None,
    )


def decoding_us(run: Run) -> int:
    """From the first token to the end of the stream, which a last chunk without a token may be."""
    return run.ended_us - run.times_us[0]


def decode_ms_per_token(batch: Sequence[Run]) -> list[float]:
    """TPOT of each request while the whole batch decodes: from the last first token on, so that no prefill is in it."""
    from_us = max(run.times_us[0] for run in batch)
    found = []
    for run in batch:
        start = max(index for index, t_us in enumerate(run.times_us) if t_us <= from_us)
        num_tokens = run.tokens[-1] - run.tokens[start]
        if num_tokens > 0:
            found.append((run.times_us[-1] - run.times_us[start]) / 1e3 / num_tokens)
    return found


def fitted(profile: ModeProfile, idle_w: float | None) -> ModeProfile:
    """The profile with the lines and energies that its cells give."""
    if any(cell.batch_size == 1 for cell in profile.cells):
        profile = msgspec.structs.replace(profile, ttft_ms=_three(fit_ttft(profile.cells).coefficients))
    if any(cell.tpot_ms > 0 for cell in profile.cells):
        profile = msgspec.structs.replace(profile, tpot_ms=_three(fit_tpot(profile.cells).coefficients))
    energy = fit_energy(profile.cells, idle_w) if idle_w is not None else None
    if energy is not None:
        step, prefill, decode = _three(energy.coefficients)
        profile = msgspec.structs.replace(
            profile, step_mj=step, prefill_mj_per_token=prefill, decode_mj_per_token=decode
        )
    return profile


def describe(cell: Cell) -> str:
    """The cell in a few words."""
    family = cell.family
    return f"{family.name} {family.num_prompt_tokens}/{family.num_output_tokens} tokens, batch of {cell.batch_size}"


def _is_of(measured: Measured, cell: Cell) -> bool:
    return (measured.family, measured.num_prompt_tokens, measured.num_output_tokens, measured.batch_size) == (
        cell.family.name,
        cell.family.num_prompt_tokens,
        cell.family.num_output_tokens,
        cell.batch_size,
    )


def _random_ids(rng: Random, tokenizer: Tokenizer, count: int) -> tuple[int, ...]:
    return tuple(rng.choices(range(tokenizer.vocab_size), k=count))


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    first, second, third = values
    return first, second, third
