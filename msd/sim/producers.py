"""Producers of a simulated world: in-memory sessions that submit in bursts, cancel, repeat themselves, read slowly.

Open loop: arrivals are drawn in advance of any answer. Every session checks what it is sent, as a client would.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from random import Random
from typing import TypeVar

from msd.dispatch import Dispatcher
from msd.domain import SERVICE_CLASSES
from msd.sim.checks import Checks
from msd.sim.weather import MODEL, TASKS, TENANTS, Weather
from msd.wire import (
    NO_SLO,
    Ack,
    Delta,
    Done,
    Error,
    ModeHint,
    Restarted,
    SamplingFields,
    ServerMessage,
    SloFields,
    Submit,
)

T = TypeVar("T")

PROMPT_POOL_TOKENS = 8_192
MAX_PROMPT_TOKENS = 4_000
MAX_OUTPUT_TOKENS = 1_500
LONG_TEXT_SHARE = 0.01
TEXT_SHARE = 0.1
HINT_SHARE = 0.05
GREEDY_SHARE = 0.8
MOST_REPEATABLE = 32
NUM_PREFIXES = 8
SESSION_SHARE = 0.3
CREDIT_PERIOD_S = 0.5
CREDIT_PER_PERIOD = 20


_EXACT = SamplingFields(ignore_eos=True)
_GREEDY = SamplingFields(temperature=0.0)


def _pick(values: Sequence[T], drawn: float) -> T:
    """One of them, by a number drawn from [0, 1): a third of what Random.choice takes."""
    return values[int(drawn * len(values))]


class _Asked:
    """What a session knows of one of its requests."""

    __slots__ = ("attempt", "num_answers", "num_asked", "num_read", "request_id")

    def __init__(self) -> None:
        self.request_id: str | None = None
        self.attempt = 0
        self.num_asked = 0
        self.num_answers = 0
        self.num_read = 0


class SimSession:
    """One connected client in memory; checks the order and completeness of what it receives."""

    def __init__(self, tenant: str, number: int, credit: int | None, checks: Checks) -> None:
        """`credit`: Deltas that may be under way; None: reads at once."""
        self.tenant = tenant
        self.name = f"{tenant}.{number}"
        self.closed = False
        self.credit = credit
        self.submit_credit = 1 << 40
        self.asked: dict[str, _Asked] = {}
        """By client_request_id."""
        self._by_id: dict[str, _Asked] = {}
        self._checks = checks

    def ask(self, client_request_id: str) -> None:
        """A submit, or a cancel, of this name goes out: each may be answered once."""
        self.asked.setdefault(client_request_id, _Asked()).num_asked += 1

    def send(self, message: ServerMessage) -> None:
        """Take a control message."""
        match message:
            case Ack():
                asked = self.asked[message.client_request_id]
                asked.request_id = message.request_id
                self._by_id[message.request_id] = asked
            case Done():
                self._answered(message.client_request_id, message)
            case Error():
                if message.client_request_id is not None:
                    self._answered(message.client_request_id, None)
            case Restarted():
                known = self._by_id.get(message.request_id)
                if known is not None:
                    known.attempt, known.num_read = message.attempt, 0

    def send_delta(self, delta: Delta) -> bool:
        """Take tokens, if there is credit."""
        if self.credit is not None:
            if self.credit <= 0:
                return False
            self.credit -= 1
        known = self._by_id.get(delta.request_id)
        if known is None:
            self._checks.expect("answers", False, "a Delta of {} came to {} before its Ack", delta, self)
            return True
        index = delta.index
        if index == 0:  # a first attempt, or one that was lost before this session read any of it
            known.attempt, known.num_read = delta.attempt, 0
        in_order = index == known.num_read and delta.attempt == known.attempt
        self._checks.expect("answers", in_order, "{} at {}: Delta out of order", delta.request_id, self.name)
        known.num_read = index + len(delta.token_ids)
        return True

    def _answered(self, client_request_id: str, done: Done | None) -> None:
        asked = self.asked.get(client_request_id)
        if asked is None:
            self._checks.expect("answers", False, "{} was answered and never asked by {}", client_request_id, self.name)
            return
        asked.num_answers += 1
        once = asked.num_answers <= asked.num_asked
        self._checks.expect("answers", once, "{} at {} has too many answers", client_request_id, self.name)
        if done is not None and done.text is None and asked.request_id == done.request_id and asked.num_asked == 1:
            whole = asked.num_read == done.usage.completion
            self._checks.expect("answers", whole, "{} at {} lacks tokens", client_request_id, self.name)


class Producers:
    """Drives all sessions from the loop's timers; sets `all_sent` after the last submit."""

    def __init__(
        self, dispatcher: Dispatcher, weather: Weather, num_requests: int, rng: Random, checks: Checks
    ) -> None:
        self.all_sent = asyncio.Event()
        self.sessions: list[SimSession] = []
        self.num_submits = 0
        self._dispatcher = dispatcher
        self._weather = weather
        self._left = num_requests
        self._rng = rng
        self._checks = checks
        self._loop = asyncio.get_running_loop()
        self._open: list[SimSession] = []
        self._in_burst = False
        self._phase_ends_s = self._loop.time()
        self._pool = tuple(rng.choices(range(4_096), k=PROMPT_POOL_TOKENS + MAX_PROMPT_TOKENS))
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._last: deque[tuple[SimSession, Submit]] = deque(maxlen=MOST_REPEATABLE)

    def start(self) -> None:
        """Connect and begin to submit."""
        for i in range(self._weather.num_tenants):
            for _ in range(self._weather.sessions_per_tenant):
                self._open.append(self._connect(TENANTS[i]))
        self._again("submit", self._gap_s(), self._submit)
        if any(session.credit is not None for session in self._open) or self._weather.slow_share:
            self._again("credit", CREDIT_PERIOD_S, self._give_credit)
        if self._weather.vanish_per_s:
            self._again("vanish", self._rng.expovariate(self._weather.vanish_per_s), self._vanish)

    def stop(self) -> None:
        """No more timers."""
        for timer in self._timers.values():
            timer.cancel()

    def _again(self, name: str, delay_s: float, function: Callable[[], None]) -> None:
        self._timers[name] = self._loop.call_later(delay_s, function)

    def _connect(self, tenant: str) -> SimSession:
        slow = self._rng.random() < self._weather.slow_share
        session = SimSession(tenant, len(self.sessions), CREDIT_PER_PERIOD if slow else None, self._checks)
        self.sessions.append(session)
        return session

    def _gap_s(self) -> float:
        """Gap to the next arrival: Poisson at a rate that switches between bursts and calm, its mean as wanted."""
        now_s = self._loop.time()
        if now_s >= self._phase_ends_s:
            self._in_burst = not self._in_burst
            self._phase_ends_s = now_s + self._rng.expovariate(1 / self._weather.phase_s)
        factor = self._weather.burst_factor
        calm_rate = 2 * self._weather.rate_per_s / (1 + factor)
        return self._rng.expovariate(calm_rate * factor if self._in_burst else calm_rate)

    def _give_credit(self) -> None:
        for session in self._open:
            if session.credit is not None:
                session.credit += CREDIT_PER_PERIOD
                self._dispatcher.resume(session)
        self._again("credit", CREDIT_PERIOD_S, self._give_credit)

    def _vanish(self) -> None:
        """A client goes away mid stream; another connects as its tenant."""
        place = self._rng.randrange(len(self._open))
        old = self._open[place]
        old.closed = True
        self._dispatcher.gone(old)
        self._open[place] = self._connect(old.tenant)
        self._again("vanish", self._rng.expovariate(self._weather.vanish_per_s), self._vanish)

    # --- one request -------------------------------------------------------------------------------------------------

    def _submit(self) -> None:
        rng, weather = self._rng, self._weather
        session = self._open[int(rng.random() * len(self._open))]
        repeat = self._repeat() if rng.random() < weather.repeat_share + weather.conflict_share else None
        if repeat is not None:
            session, submit = repeat
        else:
            submit = self._make(f"c{self.num_submits}")
            self._last.append((session, submit))
        self.num_submits += 1
        session.ask(submit.client_request_id)
        self._dispatcher.submit(submit, session)
        if rng.random() < weather.cancel_share:
            delay_s = rng.expovariate(1.0) if rng.random() < 0.8 else 0.0
            self._loop.call_later(delay_s, self._cancel, session, submit.client_request_id)
        self._left -= 1
        if self._left:
            self._again("submit", self._gap_s(), self._submit)
        else:
            self.all_sent.set()

    def _repeat(self) -> tuple[SimSession, Submit] | None:
        """One of the latest requests again: the same, or with another body under the same name."""
        recent = [(session, submit) for session, submit in self._last if not session.closed]
        if not recent:
            return None
        session, submit = self._rng.choice(recent)
        shares = (self._weather.repeat_share, self._weather.conflict_share)
        if self._rng.choices((False, True), shares)[0]:
            submit = self._make(submit.client_request_id)
        return session, submit

    def _cancel(self, session: SimSession, client_request_id: str) -> None:
        if not session.closed:
            session.ask(client_request_id)
            self._dispatcher.cancel(session, None, client_request_id)

    def _make(self, client_request_id: str) -> Submit:
        rng, weather = self._rng, self._weather
        num_output, num_prompt = weather.mean_output_tokens, weather.mean_prompt_tokens
        if not weather.exact_output:
            num_output = min(MAX_OUTPUT_TOKENS, 1 + int(rng.expovariate(1 / num_output)))
            num_prompt = min(MAX_PROMPT_TOKENS, 1 + int(num_prompt * rng.lognormvariate(-0.3, 0.8)))
        first = int(rng.random() * PROMPT_POOL_TOKENS)
        odd = rng.random() < weather.odd_share
        kind = rng.random()
        text = None
        if not weather.exact_output and kind < TEXT_SHARE:
            text = "lorem " * (num_prompt if kind > LONG_TEXT_SHARE else 2_000)
        deadline_ms = rng.expovariate(1 / 4_000) + 1 if rng.random() < weather.deadline_share else None
        session_id = task = None
        if weather.prefix_share and rng.random() < weather.prefix_share:
            prefix = int(rng.random() * NUM_PREFIXES)
            first = prefix * (PROMPT_POOL_TOKENS // NUM_PREFIXES)
            session_id = f"s{prefix}" if rng.random() < SESSION_SHARE else None
        sampling = _EXACT if weather.exact_output else SamplingFields(seed=rng.randrange(99))
        if weather.shadow_share:
            task = _pick((None, *TASKS), rng.random())
            sampling = _GREEDY if rng.random() < GREEDY_SHARE else sampling
        return Submit(
            client_request_id=client_request_id,
            max_tokens=num_output,
            prompt=text,
            prompt_token_ids=None if text is not None else self._pool[first : first + num_prompt],
            model=_pick((None, None, MODEL), rng.random()) if not (odd and kind < 0.3) else "no-such-model",
            sampling=sampling,
            task=task,
            session_id=session_id,
            slo=NO_SLO if deadline_ms is None else SloFields(deadline_ms=min(deadline_ms, 60_000.0)),
            service_class=_pick(SERVICE_CLASSES, rng.random()),
            priority=_pick((0, 0, 0, -2, 3), rng.random()),
            quality_floor=0.99 if odd and kind > 0.6 else _pick((None, None, 0.93), rng.random()),
            mode_hint=ModeHint(mode=_pick(("full", "int8"), rng.random()), strict=rng.random() < 0.5)
            if rng.random() < HINT_SHARE
            else None,
            stream=rng.random() < 0.9,
        )
