"""The output-length learner: how many tokens will a request of this kind generate?

Per length class (tenant, task, log2 prompt, log2 max_tokens) a decayed histogram of 32 log-spaced bins; the median is
cached at update, so asking costs one look-up. Unseen classes fall back to their tenant-free parent, then to half the
bound (docs/reference/policies.md; modeswitch spec, section 6). Aborted requests are censored and never learnt from.
"""

from __future__ import annotations

from math import log2

from msd.domain import Request

LengthClass = tuple[str, str, int, int]
_BINS = 32
_BINS_PER_OCTAVE = 2
_DECAY = 0.99
_MAX_CLASSES = 4_096
_MIN_WEIGHT = 3.0


class _Histogram:
    __slots__ = ("bins", "median", "total")

    def __init__(self) -> None:
        self.bins = [0.0] * _BINS
        self.total = 0.0
        self.median = 0

    def add(self, num_tokens: int) -> None:
        bins = self.bins
        for i in range(_BINS):
            bins[i] *= _DECAY
        bins[min(_BINS - 1, int(_BINS_PER_OCTAVE * log2(max(1, num_tokens)) + 0.5))] += 1.0
        self.total = self.total * _DECAY + 1.0
        below, half = 0.0, self.total / 2
        for i in range(_BINS):
            below += bins[i]
            if below >= half:
                self.median = max(1, round(2 ** (i / _BINS_PER_OCTAVE)))
                break


class LengthLearner:
    """Learns output lengths from finished requests. Bounded: the class unused for longest makes room."""

    def __init__(self) -> None:
        self._classes: dict[LengthClass, _Histogram] = {}

    @staticmethod
    def classify(request: Request) -> LengthClass:
        """The request's length class."""
        return (
            request.tenant,
            request.task or "",
            request.num_prompt_tokens.bit_length(),
            request.max_tokens.bit_length(),
        )

    def expect(self, request: Request, cls: LengthClass) -> int:
        """Expected output tokens, at most `max_tokens`; exactly that when EOS is ignored."""
        if request.ignore_eos:
            return request.max_tokens
        for key in (cls, ("", *cls[1:])):
            histogram = self._classes.get(key)
            if histogram is not None and histogram.total >= _MIN_WEIGHT:
                return min(request.max_tokens, histogram.median)
        return max(1, request.max_tokens // 2)

    def learn(self, cls: LengthClass, num_tokens: int) -> None:
        """A request of this class ended by itself after `num_tokens`."""
        for key in (cls, ("", *cls[1:])):
            histogram = self._classes.pop(key, None)
            if histogram is None:
                if len(self._classes) >= _MAX_CLASSES:
                    del self._classes[next(iter(self._classes))]
                histogram = _Histogram()
            self._classes[key] = histogram
            histogram.add(num_tokens)
