"""A simulated engine on the shared simulated GPU: continuous batching with a stated model, labelled `simulated`.

The model (parameters: `config.SimEngineConfig`; the GPU's own part: `msd.simgpu`):

- The engine works in **steps**. A step takes `step_ms + prefill_ms_per_token * prompt tokens admitted in it +
  decode_ms_per_request * requests running`, alone on the GPU; other busy engines slow it down by their number.
- Requests are **admitted** in order of arrival at the beginning of a step, up to `max_num_seqs`, MAX_PREFILL_TOKENS of
  prompts per step, and while prompt plus output bound fit into the KV cache (reserved at once: nothing is preempted).
  A prompt is prefilled whole in one step and gives its first token at the step's end.
- A running request gains `tokens_per_step` tokens per step (a fraction adds up: 1.5 gives 1, 2, 1, 2, ...).
- With **prefix caching**, full blocks of a prompt that were computed before and not pushed out since (least recently
  used first, as many as the KV cache holds) are not computed again; they take KV room all the same.
- A step draws `step_mj + prefill_mj_per_token * prompt tokens + decode_mj_per_token * tokens generated`, times a
  seeded noise of 3 %; its time is exact, or has a seeded log-normal noise (`step_noise`) in worlds that ask for one.
- **Output** is filler: words from a fixed table, from a place that the prompt and the seed give. Its length is
  `max_tokens`; when EOS is honoured, what the request's tag `sim_output_tokens` says, or geometric with the mean
  `output_tokens`, where set, also given by the prompt. Stop strings are honoured. Chunked prefill and preemption are
  not modelled.

How it runs: no task, no thread, no clock of its own. One timer of the loop is set to the next *interesting* instant (a
prefill is over, a request finishes, deltas are due); steps in between are taken in one jump. A request that arrives
cuts the jump at the boundary of the step under way, so that jumping changes no result.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator
from enum import Enum
from functools import lru_cache
from heapq import heappop, heappush
from math import ceil, log, sqrt
from random import Random
from zlib import crc32

from msgspec import msgpack

from msd.config import EngineConfig
from msd.core.prefixes import BLOCK_TOKENS, hash_blocks
from msd.domain import Chunk, EngineInfo, EngineLoad, ExitKind, FinishReason, Prompt
from msd.engine.tokens import SIM_WORD_CHARS, SIM_WORDS
from msd.errors import EngineError, EngineLostError, EngineStartError, RequestRefusedByEngineError
from msd.ports import Clock
from msd.simgpu import SimGpu

EMIT_INTERVAL_MS = 20.0
MAX_PREFILL_TOKENS = 8_192
MAX_WAITING_PER_SLOT = 2
"""The engine's own queue holds this many times `max_num_seqs`; beyond, it refuses."""
ENERGY_NOISE = 0.03
NOISE_WIDTH = ENERGY_NOISE * sqrt(12)
"""Of the uniform distribution with that standard deviation: it costs a fifth of a Gaussian one."""
WARM_UP_PROMPT_TOKENS = 32
TRANSITION_SIGMA = 0.2
"""Of the log-normal factor on the time of each sleep and wake."""
FILLER_TOKENS = 16_384
OUTPUT_TAG = "sim_output_tokens"
"""Tag of a request that says how long its answer is, if EOS is honoured; traffic of known lengths is made with it."""


@lru_cache(maxsize=1)
def _filler() -> tuple[tuple[int, ...], str]:
    """Two rounds of the filler: ids, and their text at SIM_WORD_CHARS each."""
    rng = Random(0)
    once = tuple(rng.choices(range(len(SIM_WORDS)), k=FILLER_TOKENS))
    text = "".join([SIM_WORDS[token_id] for token_id in once])
    return once + once, text + text


class _State(Enum):
    NEW = "it is not up"
    UP = "up"
    ASLEEP = "it sleeps"
    LOST = "lost"
    STOPPED = "it was stopped"


class _Run:
    """One request inside the engine: its answer, decided on arrival, and how much of it has come.

    `begin`: where in the filler; `text_chars`: characters of text in all; `step`: the engine's count of steps when the
    first token came; `ready` and `sent`: tokens that the generator may give, and has given.
    """

    __slots__ = (
        "begin", "blocks", "finish_reason", "kv_tokens", "length", "num_cached_tokens", "num_prompt_tokens", "over",
        "ready", "request_id", "sent", "step", "text_chars", "waiter",
    )  # fmt: skip

    def __init__(self, request_id: str, num_prompt_tokens: int, kv_tokens: int, begin: int, length: int) -> None:
        self.request_id = request_id
        self.num_prompt_tokens = num_prompt_tokens
        self.blocks: tuple[int, ...] = ()
        self.num_cached_tokens = 0
        self.kv_tokens = kv_tokens
        self.begin = begin
        self.length = length
        self.finish_reason: FinishReason = "length"
        self.text_chars = length * SIM_WORD_CHARS
        self.step = 0
        self.ready = 0
        self.sent = 0
        self.over = False  # finished or aborted: it holds no slot
        self.waiter: asyncio.Future[None] | None = None

    def wake(self, ready: int) -> None:
        self.ready = ready
        waiter = self.waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def next_chunk(self, ids: tuple[int, ...], text: str) -> Chunk:
        first, last = self.sent, self.ready
        if last - first > FILLER_TOKENS:
            last = first + FILLER_TOKENS
        self.sent = last
        begin = (self.begin + first) % FILLER_TOKENS
        end = begin + last - first
        end_char = end * SIM_WORD_CHARS
        if last * SIM_WORD_CHARS > self.text_chars:  # a stop string is not part of the text
            end_char = max(begin * SIM_WORD_CHARS, end_char - last * SIM_WORD_CHARS + self.text_chars)
        finish_reason = self.finish_reason if last == self.length and self.over else None
        return Chunk(ids[begin:end], text[begin * SIM_WORD_CHARS : end_char], finish_reason, self.num_cached_tokens)


class SimEngine:
    """One simulated engine. All its state is written on the loop, by its own timer and by its generators."""

    simulated = True

    def __init__(
        self,
        config: EngineConfig,
        gpu: SimGpu,
        clock: Clock,
        rng: Random,
        *,
        emit_interval_ms: float = EMIT_INTERVAL_MS,
        step_noise: float = 0.0,
    ) -> None:
        self.name = config.name
        self._sim = config.sim
        self._max_num_seqs = config.max_num_seqs
        self._gpu = gpu
        self._clock = clock
        self._rng = rng
        self._step_noise = step_noise
        self._cache_blocks = config.sim.kv_capacity_tokens // BLOCK_TOKENS if config.prefix_caching else 0
        self._cache: OrderedDict[int, None] = OrderedDict()
        self._emit_interval_us = round(emit_interval_ms * 1_000)
        self._filler_ids, self._filler_text = _filler()
        self._waiting: dict[str, _Run] = {}
        self._running: dict[str, _Run] = {}
        self._prefilling: list[_Run] = []
        # Heap of (step of the last token, order of admission, run); an aborted run stays until its step or a sweep.
        self._finishing: list[tuple[int, int, _Run]] = []
        self._kv_reserved = 0
        self._num_admitted = 0
        self._step = 0
        self._jump_steps = 0  # steps under way in one jump; 0 = the engine is idle
        self._jump_step_us = 0.0
        self._emit_us = 0
        self._timer: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None  # known from `start` on
        self._state = _State.NEW
        self._sleep_level = 1
        self._hung = False
        self._broken: set[str] = set()
        self._garbled = 0
        self._exit: asyncio.Future[tuple[ExitKind, str]] | None = None

    # --- the port --------------------------------------------------------------------------------------------------

    async def start(self) -> EngineInfo:
        """Take memory on the GPU and come up after `start_s`. Raises EngineStartError when the weights do not fit."""
        sim = self._sim
        if not self._gpu.attach(self.name, sim.weights_bytes, self._share_changed):
            free = self._gpu.memory_bytes - self._gpu.memory_used_bytes
            line = f"out of memory: {sim.weights_bytes} bytes of weights, {free} bytes are free on the simulated GPU"
            raise EngineStartError(f"engine {self.name} did not start: {line}", last_lines=(line,))
        self._loop = asyncio.get_running_loop()
        self._exit = self._loop.create_future()
        await asyncio.sleep(sim.start_s)
        if self._state is not _State.NEW:
            raise EngineStartError(f"engine {self.name} was stopped while it started")
        self._state = _State.UP
        alone_ms = sim.step_ms + sim.decode_ms_per_request
        return EngineInfo(
            engine=self.name,
            max_model_len=sim.max_model_len,
            max_num_seqs=self._max_num_seqs,
            kv_capacity_tokens=sim.kv_capacity_tokens,
            version="simulated",
            idle_ttft_ms=alone_ms + sim.prefill_ms_per_token * WARM_UP_PROMPT_TOKENS,
            idle_tpot_ms=alone_ms / sim.tokens_per_step,
            start_s=sim.start_s,
        )

    async def generate(self, request_id: str, prompt: Prompt, max_tokens: int, priority: int) -> AsyncGenerator[Chunk]:
        """Stream coalesced filler; `priority` is ignored, as by vLLM's default first-come scheduler."""
        self._check_up()
        run = self._plan(request_id, prompt, max_tokens)
        self._waiting[request_id] = run
        if len(self._running) < self._max_num_seqs:
            self._cut_jump()
        loop = asyncio.get_running_loop()
        try:
            while True:
                if run.ready == run.sent:
                    waiter = run.waiter = loop.create_future()
                    await waiter
                if self._state is not _State.UP:
                    self._check_up()
                chunk = run.next_chunk(self._filler_ids, self._filler_text)
                yield chunk
                if chunk.finish_reason is not None:
                    return
        finally:
            self._forget(run)

    def load(self) -> EngineLoad:
        """Requests running and waiting; share of the KV cache that is reserved."""
        return EngineLoad(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            kv_usage=self._kv_reserved / self._sim.kv_capacity_tokens,
        )

    async def sleep(self, level: int) -> None:
        """Free the memory of the weights after about `sleep_s`; at level 2 `wake` takes `start_s`."""
        self._check_up()
        assert not self._running, "put to sleep while requests run"
        assert not self._waiting, "put to sleep while requests wait"
        self._state = _State.ASLEEP
        self._sleep_level = level
        self._cache.clear()
        await self._take_s("sleep", self._sim.sleep_s)
        self._gpu.detach(self.name, self._clock.now_us())

    async def wake(self) -> None:
        """Take the memory again and be up after about `wake_s`. Raises EngineError when it is taken."""
        if self._state is not _State.ASLEEP:
            raise EngineError(f"engine {self.name} does not sleep: {self._state.value}")
        if not self._gpu.attach(self.name, self._sim.weights_bytes, self._share_changed):
            free = self._gpu.memory_bytes - self._gpu.memory_used_bytes
            raise EngineError(
                f"engine {self.name} cannot wake: {self._sim.weights_bytes} bytes of weights, {free} bytes are free"
            )
        await self._take_s("wake", self._sim.wake_s if self._sleep_level == 1 else self._sim.start_s)
        self._state = _State.UP

    async def _take_s(self, what: str, seconds: float) -> None:
        await asyncio.sleep(seconds * self._rng.lognormvariate(0.0, TRANSITION_SIGMA))
        if self._state is not _State.ASLEEP:
            raise EngineLostError(f"engine {self.name}: {self._state.value}")
        if what in self._broken:
            self._broken.discard(what)
            raise EngineError(f"engine {self.name}: the {what} failed, as it was told to")
        if what == "wake" and "answers" in self._broken:
            self._garbled = 1

    async def lost(self) -> tuple[ExitKind, str]:
        """Wait for `die`."""
        assert self._exit is not None, "lost() before start()"
        return await asyncio.shield(self._exit)

    async def stop(self) -> None:
        """Free the memory; generators that are still open raise EngineLostError."""
        if self._state is not _State.LOST:
            self._end(_State.STOPPED)

    # --- faults, for tests and simulated worlds --------------------------------------------------------------------

    def die(self, kind: ExitKind = ExitKind.DIED, reason: str = "killed by a test") -> None:
        """Lose the engine as a killed process is lost: its requests, its memory. Nothing happens unless it is up."""
        if self._state in (_State.UP, _State.ASLEEP) and self._exit is not None and not self._exit.done():
            self._exit.set_result((kind, reason))
            self._end(_State.LOST)

    def break_next(self, what: str) -> None:
        """Let the next `sleep` or `wake` fail, or (`answers`) the engine talk gibberish after its next wake."""
        assert what in ("sleep", "wake", "answers"), what
        self._broken.add(what)

    def drift(self) -> None:
        """Answer otherwise than before: what a canary or a comparison with another engine is to find."""
        self._garbled = 1

    def hang(self) -> None:
        """Make no progress any more while looking healthy; the work in hand keeps the GPU no longer than it takes."""
        self._hung = True

    # --- one request ------------------------------------------------------------------------------------------------

    def _plan(self, request_id: str, prompt: Prompt, max_tokens: int) -> _Run:
        """Decide the whole answer: where in the filler it begins, how long it is and why it ends. Or refuse it."""
        num_prompt_tokens = len(prompt.token_ids)
        room = self._sim.max_model_len - num_prompt_tokens
        if room < 1:
            raise RequestRefusedByEngineError(
                f"the prompt has {num_prompt_tokens} tokens, engine {self.name} takes {self._sim.max_model_len - 1}",
                error_code="context_overflow",
            )
        length = min(max_tokens, room)
        kv_tokens = num_prompt_tokens + length
        if kv_tokens > self._sim.kv_capacity_tokens:
            raise RequestRefusedByEngineError(
                f"{kv_tokens} tokens never fit into a KV cache of {self._sim.kv_capacity_tokens}",
                error_code="context_overflow",
            )
        if len(self._waiting) >= self._max_num_seqs * MAX_WAITING_PER_SLOT:
            raise RequestRefusedByEngineError(
                f"engine {self.name} holds as many requests as it may", error_code="queue_full"
            )
        assert request_id not in self._waiting, f"{request_id} waits already"
        assert request_id not in self._running, f"{request_id} runs already"
        # crc32 of bytes, not hash(): the same on every machine. Sixteen ids: the whole prompt would cost 20 us.
        seed = prompt.sampling.seed
        ends = (*prompt.token_ids[-16:], num_prompt_tokens, -1 if seed is None else seed)
        digest = crc32(msgpack.encode(ends))
        begin = (digest + self._garbled) % FILLER_TOKENS
        run = _Run(request_id, num_prompt_tokens, kv_tokens, begin, length)
        if self._cache_blocks:
            run.blocks = hash_blocks(prompt.token_ids)
        mean = self._sim.output_tokens
        told = prompt.tags.get(OUTPUT_TAG, "")
        if told.isdecimal() and not prompt.sampling.ignore_eos:
            num_tokens = max(1, int(told))
            if num_tokens <= length:
                run.length, run.finish_reason, run.text_chars = num_tokens, "stop", num_tokens * SIM_WORD_CHARS
        elif mean > 1 and not prompt.sampling.ignore_eos:
            uniform = ((digest >> 8) + 1) / (2**24 + 1)
            num_tokens = 1 + int(log(uniform) / log(1 - 1 / mean))
            if num_tokens <= length:
                run.length, run.finish_reason, run.text_chars = num_tokens, "stop", num_tokens * SIM_WORD_CHARS
        if prompt.sampling.stop:
            self._plan_stop(run, prompt.sampling.stop)
        return run

    def _plan_stop(self, run: _Run, stop: tuple[str, ...]) -> None:
        begin = run.begin * SIM_WORD_CHARS
        # Beyond one round the filler repeats: what has not come by then never comes.
        text = self._filler_text[begin : begin + min(run.length, FILLER_TOKENS) * SIM_WORD_CHARS]
        found = [(start + len(word), start) for word in stop if (start := text.find(word)) >= 0]
        if found:
            end, start = min(found)
            # The stop string's tokens are generated; it is not part of the text, as in vLLM.
            run.length, run.finish_reason, run.text_chars = ceil(end / SIM_WORD_CHARS), "stop", start

    def _forget(self, run: _Run) -> None:
        """Free the request's place, whether it finished or was aborted."""
        if self._waiting.get(run.request_id) is run:
            del self._waiting[run.request_id]
        elif not run.over:
            self._release(run)
            self._cut_jump()

    def _release(self, run: _Run) -> None:
        run.over = True
        self._kv_reserved -= run.kv_tokens
        self._running.pop(run.request_id, None)

    def _check_up(self) -> None:
        if self._state is not _State.UP:
            lost = self._exit is not None and self._exit.done()
            reason = self._exit.result()[1] if lost and self._exit is not None else self._state.value
            raise EngineLostError(f"engine {self.name} is lost: {reason}")

    # --- steps ------------------------------------------------------------------------------------------------------

    def _begin_jump(self, now_us: int) -> None:
        """Start one step with newcomers in it, or all steps until something interesting comes; or fall idle."""
        sim = self._sim
        newcomers = self._prefilling = self._take_in() if self._waiting else []
        num_running = len(self._running)
        if not num_running:
            self._jump_steps = 0
            self._gpu.end_work(self.name, now_us)
            return
        num_prefill_tokens = 0
        for run in newcomers:
            num_prefill_tokens += run.num_prompt_tokens - run.num_cached_tokens
        step_ms = sim.step_ms + sim.prefill_ms_per_token * num_prefill_tokens + sim.decode_ms_per_request * num_running
        if self._step_noise:
            step_ms *= self._rng.lognormvariate(0.0, self._step_noise)
        self._jump_step_us = max(1.0, step_ms * 1_000)
        self._jump_steps = steps = 1 if newcomers else self._steps_to_next(now_us)
        num_decoded = len(newcomers) + sim.tokens_per_step * (num_running - len(newcomers)) * steps
        energy_mj = (
            sim.step_mj * steps + sim.prefill_mj_per_token * num_prefill_tokens + sim.decode_mj_per_token * num_decoded
        )
        noise = 1.0 + (self._rng.random() - 0.5) * NOISE_WIDTH / sqrt(steps)
        due_us = self._gpu.start_work(self.name, self._jump_step_us * steps, energy_mj * noise, now_us)
        self._set_timer(due_us, now_us)

    def _take_in(self) -> list[_Run]:
        newcomers: list[_Run] = []
        room = MAX_PREFILL_TOKENS
        while self._waiting and len(self._running) < self._max_num_seqs:
            run = next(iter(self._waiting.values()))
            if run.kv_tokens > self._sim.kv_capacity_tokens - self._kv_reserved:
                break
            if newcomers and run.num_prompt_tokens > room:
                break
            room -= run.num_prompt_tokens
            del self._waiting[run.request_id]
            self._running[run.request_id] = run
            self._kv_reserved += run.kv_tokens
            newcomers.append(run)
        if self._cache_blocks:
            for run in newcomers:
                run.num_cached_tokens = self._find_cached(run)
            for run in newcomers:
                self._keep(run.blocks)
        return newcomers

    def _find_cached(self, run: _Run) -> int:
        """Tokens at the prompt's beginning that need not be computed; the last token always is."""
        num_blocks = 0
        for block in run.blocks[: (run.num_prompt_tokens - 1) // BLOCK_TOKENS]:
            if block not in self._cache:
                break
            num_blocks += 1
        return num_blocks * BLOCK_TOKENS

    def _keep(self, blocks: tuple[int, ...]) -> None:
        """The prompt's blocks are in the cache now; of one prompt the tail goes before the head."""
        cache = self._cache
        for block in reversed(blocks):
            cache[block] = None
            cache.move_to_end(block)
        while len(cache) > self._cache_blocks:
            cache.popitem(last=False)

    def _steps_to_next(self, now_us: int) -> int:
        """Steps until the first request finishes or deltas are due, whichever comes first."""
        while self._finishing[0][2].over:
            heappop(self._finishing)
        steps = self._finishing[0][0] - self._step
        share_us = self._jump_step_us * (self._gpu.num_busy() + 1)
        return max(1, min(steps, ceil((self._emit_us - now_us) / share_us)))

    def _cut_jump(self) -> None:
        """Something changed: let the jump end with the step under way; begin at once if the engine was idle."""
        if self._state is not _State.UP or self._hung:
            return
        now_us = self._clock.now_us()
        if self._jump_steps == 0:
            self._begin_jump(now_us)
        elif self._jump_steps > 1:
            done_us = self._gpu.done_us(self.name, now_us)
            if done_us is None:
                return  # the jump is over; its timer is about to say so
            steps = max(1, ceil(done_us / self._jump_step_us))
            if steps < self._jump_steps:
                self._jump_steps = steps
                self._gpu.shorten_work(self.name, self._jump_step_us * steps, now_us)
                self._set_timer(self._gpu.due_us(self.name, now_us), now_us)

    def _share_changed(self) -> None:
        """Other engines got busy or idle: the work in hand is due at another time."""
        now_us = self._clock.now_us()
        self._set_timer(self._gpu.due_us(self.name, now_us), now_us)

    def _set_timer(self, due_us: int, now_us: int) -> None:
        """Wake when the work in hand is due."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._state is _State.UP and not self._hung and self._jump_steps:
            assert self._loop is not None, "work before start()"
            # Half a microsecond late on purpose: loops keep time in floats, and must not wake us just before.
            self._timer = self._loop.call_later((due_us - now_us + 0.5) / 1e6, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if self._hung:
            return
        now_us = self._clock.now_us()
        due_us = self._gpu.due_us(self.name, now_us)
        if due_us > now_us:
            self._set_timer(due_us, now_us)
            return
        self._end_jump(now_us)
        self._begin_jump(now_us)

    def _end_jump(self, now_us: int) -> None:
        """Count the steps of the jump, give first tokens and last ones, and deltas if they are due."""
        self._step += self._jump_steps
        tokens_per_step = self._sim.tokens_per_step
        for run in self._prefilling:
            if run.over:
                continue
            run.step = self._step
            self._num_admitted += 1
            last_step = self._step + ceil((run.length - 1) / tokens_per_step)
            heappush(self._finishing, (last_step, self._num_admitted, run))
            run.wake(1)
        finishing = self._finishing
        while finishing and finishing[0][0] <= self._step:
            run = heappop(finishing)[2]
            if not run.over:
                self._release(run)
                run.wake(run.length)
        if now_us >= self._emit_us:
            self._emit_us = now_us + self._emit_interval_us
            step = self._step
            for run in self._running.values():
                ready = min(run.length, 1 + int((step - run.step) * tokens_per_step))
                if ready > run.ready:
                    run.wake(ready)
        if len(finishing) > 2 * len(self._running) + self._max_num_seqs:
            self._finishing = sorted(entry for entry in self._finishing if not entry[2].over)

    def _end(self, state: _State) -> None:
        self._state = state
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._gpu.detach(self.name, self._clock.now_us())
        runs = [*self._waiting.values(), *self._running.values()]
        self._waiting.clear()
        self._running.clear()
        self._kv_reserved = 0
        for run in runs:
            run.kv_tokens = 0
            run.wake(run.ready)
