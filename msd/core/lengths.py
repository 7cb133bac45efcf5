"""The output-length learner: how many tokens will a request of this kind generate?

Per length class (tenant, task, log2 prompt, log2 max_tokens) a decayed histogram of 32 log-spaced bins; its median and
90th percentile are cached at update, so asking costs one look-up. Unseen classes fall back to their tenant-free parent,
then to half the bound (docs/reference/policies.md; modeswitch spec, section 6). An aborted request is censored: it
would have generated at least what it had, and counts as that.
"""

from __future__ import annotations

from math import log2

from msd.domain import Request

LengthClass = tuple[str, str, int, int]
_BINS = 32
_BINS_PER_OCTAVE = 2
_DECAY = 0.99
_MAX_CLASSES = 4_096
_MIN_SEEN = 3
_SETTLED = 64
_EVERY = 8
_RESCALE_AT = 1e9
_OVERRUN = 1.5


class _Histogram:
    """Decay by growing the weight of new entries instead of shrinking all old ones; rescaled before it overflows."""

    __slots__ = ("_bins", "_num", "_total", "_weight", "q50", "q90")

    def __init__(self) -> None:
        self._bins = [0.0] * _BINS
        self._num = 0
        self._total = 0.0
        self._weight = 1.0
        self.q50 = 0
        """Tokens; 0 until enough was seen."""
        self.q90 = 0

    def add(self, index: int) -> None:
        self._grow()
        self._bins[index] += self._weight
        self._added()

    def add_at_least(self, index: int) -> None:
        """Share the new weight over the bins from `index` on as the old weight is (Efron's redistribution)."""
        self._grow()
        beyond = sum(self._bins[index:])
        if beyond > 0.0:
            share = 1.0 + self._weight / beyond
            for i in range(index, _BINS):
                self._bins[i] *= share
        else:
            # Longer than all that was seen: the bound itself is the best guess there is.
            self._bins[index] += self._weight
        self._added()

    def _grow(self) -> None:
        self._weight /= _DECAY
        if self._weight > _RESCALE_AT:
            self._bins = [x / self._weight for x in self._bins]
            self._total /= self._weight
            self._weight = 1.0

    def _added(self) -> None:
        self._total += self._weight
        self._num += 1
        # The quantiles move slowly once there is a past; finding them is most of the cost.
        if self._num >= _MIN_SEEN and (self._num < _SETTLED or self._num % _EVERY == 0):
            self._find_quantiles()

    def _find_quantiles(self) -> None:
        half, most = 0.5 * self._total, 0.9 * self._total
        below, q50 = 0.0, 0
        for i, x in enumerate(self._bins):
            below += x
            if not q50 and below >= half:
                q50 = max(1, round(2 ** (i / _BINS_PER_OCTAVE)))
            if below >= most:
                self.q50 = q50
                self.q90 = max(1, round(2 ** (i / _BINS_PER_OCTAVE)))
                return


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

    def expect(self, request: Request, cls: LengthClass) -> tuple[int, int]:
        """Median and 90th percentile of its output tokens, at most `max_tokens`; exactly that when EOS is ignored.

        Of a class that nobody knows: half the bound, and the bound.
        """
        most = request.max_tokens
        if request.ignore_eos:
            return most, most
        histogram = self._classes.get(cls)
        if histogram is None or not histogram.q50:
            histogram = self._classes.get(_parent(cls))
            if histogram is None or not histogram.q50:
                return max(1, most // 2), most
        return min(most, histogram.q50), min(most, histogram.q90)

    def learn(self, cls: LengthClass, num_tokens: int) -> None:
        """A request of this class ended by itself after `num_tokens`."""
        index = _BIN_OF[num_tokens] if num_tokens < len(_BIN_OF) else _bin_of(num_tokens)
        self._histogram(cls).add(index)
        self._histogram(_parent(cls)).add(index)

    def learn_at_least(self, cls: LengthClass, num_tokens: int) -> None:
        """A request of this class was aborted when it had `num_tokens`: it would have generated no fewer."""
        for known in (cls, _parent(cls)):
            # A class that nobody has finished a request of stays unknown.
            if (histogram := self._classes.get(known)) is not None:
                histogram.add_at_least(_bin_of(num_tokens))

    def _histogram(self, cls: LengthClass) -> _Histogram:
        histogram = self._classes.pop(cls, None)
        if histogram is None:
            if len(self._classes) >= _MAX_CLASSES:
                del self._classes[next(iter(self._classes))]
            histogram = _Histogram()
        self._classes[cls] = histogram
        return histogram


def overrun(num_tokens: int, max_tokens: int) -> int:
    """Output tokens to expect of a request that has already generated more than nine of ten of its class do."""
    return min(max_tokens, int(_OVERRUN * num_tokens))


def _parent(cls: LengthClass) -> LengthClass:
    """The same class of any tenant."""
    return ("", cls[1], cls[2], cls[3])


def _bin_of(num_tokens: int) -> int:
    return min(_BINS - 1, int(_BINS_PER_OCTAVE * log2(max(1, num_tokens)) + 0.5))


_BIN_OF = tuple(_bin_of(num_tokens) for num_tokens in range(4_096))
"""The bins of usual lengths, looked up instead of computed."""
