"""What traffic asks for: rates per coarse class (prompt x output x modes allowed), over 30 s and over 300 s.

Beside the rates it knows how far the whole of them swings: a queue costs more in a burst than it saves in a lull, so
that the mean rate alone says too little. Counting a request is one dict look-up; averages are made when a plan is.
"""

from __future__ import annotations

from math import exp, sqrt

from msgspec import Struct, structs

FAST_S, SLOW_S = 30.0, 300.0
MAX_CLASSES = 12
"""More are merged into the largest one of the same modes: a plan's cost grows with them."""
_CHANCE = 1.5
"""How much of the rate's variance is put down to chance, in variances of Poisson arrivals: 1 and what it errs by."""
_CALM = 0.15
"""A swing below this is none."""
_NEGLIGIBLE = 1e-4
"""Requests a second of the slow average below which a class is forgotten."""


class Class(Struct, frozen=True):
    """One class of traffic. Rates in requests a second, tokens are means."""

    fast_per_s: float
    slow_per_s: float
    num_prompt_tokens: float
    num_output_tokens: float
    eligible: int
    """Bit set of the modes that may serve it."""
    silent_s: float = 0.0
    """How long none has come."""


class _Sums:
    """Of one class since the last fold, and its averages."""

    __slots__ = ("eligible", "fast", "num", "num_output", "num_prompt", "output", "prompt", "silent_s", "slow")

    def __init__(self, eligible: int) -> None:
        self.eligible = eligible
        self.num = self.prompt = self.output = 0
        self.fast = self.slow = self.silent_s = 0.0
        self.num_prompt = self.num_output = 0.0


class Demand:
    """Counts arrivals; `fold` turns them into averages, corrected for the short time they have run at first."""

    def __init__(self) -> None:
        self._sums: dict[tuple[int, int, int], _Sums] = {}
        self._began_us = -1
        self._folded_us = -1
        self._fast = self._slow = self._variance = 0.0
        self.swing = 0.0
        """How far the rate of all requests goes above and below its mean, as a share of it; at most 1."""

    def note(self, num_prompt_tokens: int, num_output_tokens: int, eligible: int) -> None:
        """A request arrived."""
        key = (num_prompt_tokens.bit_length(), num_output_tokens.bit_length(), eligible)
        sums = self._sums.get(key)
        if sums is None:
            sums = self._sums[key] = _Sums(eligible)
        sums.num += 1
        sums.prompt += num_prompt_tokens
        sums.output += num_output_tokens

    def age_s(self, t_us: int) -> float:
        """How long the averages have run."""
        return (t_us - self._began_us) * 1e-6 if self._began_us >= 0 else 0.0

    @property
    def num_known(self) -> float:
        """About how many requests the slow averages rest on."""
        return self._slow * SLOW_S

    def fold(self, t_us: int) -> list[Class]:
        """The classes as of now, largest work first."""
        if self._began_us < 0 or not self._sums:  # nothing has come yet: the averages begin with the first request
            self._began_us = self._folded_us = t_us
            self._fast = self._slow = self._variance = 0.0
            return []
        span_s = (t_us - self._folded_us) * 1e-6
        if span_s <= 0:
            return []
        self._folded_us = t_us
        age_s = self.age_s(t_us)
        fast_gain, slow_gain = 1.0 - exp(-span_s / FAST_S), 1.0 - exp(-span_s / SLOW_S)
        fast_weight, slow_weight = 1.0 - exp(-age_s / FAST_S), 1.0 - exp(-age_s / SLOW_S)
        num = sum(sums.num for sums in self._sums.values())
        before = 1.0 - exp(-(age_s - span_s) / FAST_S)
        self._note_swing(num / span_s, span_s, before, slow_weight, fast_gain, slow_gain)
        classes = []
        for key, sums in list(self._sums.items()):
            rate = sums.num / span_s
            sums.silent_s = 0.0 if sums.num else sums.silent_s + span_s
            sums.fast += fast_gain * (rate - sums.fast)
            sums.slow += slow_gain * (rate - sums.slow)
            if sums.num:
                gain = fast_gain if sums.num_prompt else 1.0
                sums.num_prompt += gain * (sums.prompt / sums.num - sums.num_prompt)
                sums.num_output += gain * (sums.output / sums.num - sums.num_output)
                sums.num = sums.prompt = sums.output = 0
            elif sums.slow < _NEGLIGIBLE:
                del self._sums[key]
                continue
            classes.append(
                Class(
                    sums.fast / fast_weight,
                    sums.slow / slow_weight,
                    sums.num_prompt,
                    sums.num_output,
                    sums.eligible,
                    sums.silent_s,
                )
            )
        classes.sort(key=_work, reverse=True)
        return _merged(classes)

    def _note_swing(
        self, rate: float, span_s: float, before: float, slow_weight: float, fast_gain: float, slow_gain: float
    ) -> None:
        """Compare the rate with what the fast average foresaw: slow changes are no swing. `before`: its weight then."""
        surprise = 0.0
        if before > 0.5:
            foreseen = self._fast / before
            surprise = (rate - foreseen) ** 2 - _CHANCE * foreseen / span_s
        self._variance += slow_gain * (surprise - self._variance)
        self._fast += fast_gain * (rate - self._fast)
        self._slow += slow_gain * (rate - self._slow)
        swing = sqrt(max(0.0, self._variance * slow_weight)) / self._slow if self._slow else 0.0
        self.swing = min(1.0, swing) if swing >= _CALM else 0.0


def hushed(classes: list[Class], modes: int) -> list[Class]:
    """The same, but what these modes serve comes at most once in as long as none of it has come.

    The average of a stream that has stopped says for minutes that it goes on.
    """
    served = [traffic for traffic in classes if traffic.eligible & modes]
    silent_s = min((traffic.silent_s for traffic in served), default=0.0)
    rate = sum(traffic.fast_per_s for traffic in served)
    if rate * silent_s <= 1.0:
        return classes
    share = 1.0 / (rate * silent_s)
    return [
        structs.replace(traffic, fast_per_s=share * traffic.fast_per_s) if traffic.eligible & modes else traffic
        for traffic in classes
    ]


def _work(traffic: Class) -> float:
    return (traffic.fast_per_s + traffic.slow_per_s) * (traffic.num_prompt_tokens * 0.01 + traffic.num_output_tokens)


def _merged(classes: list[Class]) -> list[Class]:
    """At most MAX_CLASSES and one per set of modes: small ones go to the largest class of the same modes."""
    kept, rest = classes[:MAX_CLASSES], classes[MAX_CLASSES:]
    for small in rest:
        for i, large in enumerate(kept):
            if large.eligible == small.eligible:
                kept[i] = _add(large, small)
                break
        else:
            kept.append(small)
    return kept


def _add(a: Class, b: Class) -> Class:
    weight_a, weight_b = a.fast_per_s + a.slow_per_s, b.fast_per_s + b.slow_per_s
    share = weight_b / max(1e-12, weight_a + weight_b)
    return Class(
        a.fast_per_s + b.fast_per_s,
        a.slow_per_s + b.slow_per_s,
        a.num_prompt_tokens + share * (b.num_prompt_tokens - a.num_prompt_tokens),
        a.num_output_tokens + share * (b.num_output_tokens - a.num_output_tokens),
        a.eligible,
        min(a.silent_s, b.silent_s),
    )
