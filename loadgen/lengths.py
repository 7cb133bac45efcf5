"""Token lengths: how long prompts and answers are."""

from __future__ import annotations

import math
from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from loadgen.spec import Fixed, Length, Lognormal, Uniform

Z95 = 1.6448536269514722
"""The normal distribution's 95th percentile."""


def sample(length: Length, count: int, rng: np.random.Generator, minimum: int = 1) -> NDArray[np.int64]:
    """Draw `count` lengths in tokens, none below `minimum`: int64[count]."""
    match length:
        case Fixed(tokens=tokens):
            drawn = np.full(count, tokens, dtype=np.int64)
        case Uniform(low=low, high=high):
            drawn = rng.integers(low, high, size=count, endpoint=True)
        case Lognormal():
            mu, sigma = parameters(length)
            drawn = np.minimum(np.rint(np.exp(mu + sigma * rng.standard_normal(count))), length.max).astype(np.int64)
        case _:
            assert_never(length)
    return np.maximum(drawn, minimum)


def parameters(length: Lognormal) -> tuple[float, float]:
    """Return (mu, sigma) of log length from whichever two of mean, p50, p95 are given.

    ln p50 = mu, ln mean = mu + sigma^2 / 2, ln p95 = mu + 1.645 sigma. With mean and p95 the smaller root is taken: the
    larger one has nearly all its weight in a tail beyond any context.
    """
    if length.p50 is not None and length.p95 is not None:
        return math.log(length.p50), math.log(length.p95 / length.p50) / Z95
    if length.p50 is not None and length.mean is not None:
        return math.log(length.p50), math.sqrt(2.0 * math.log(length.mean / length.p50))
    assert length.mean is not None
    assert length.p95 is not None
    sigma = Z95 - math.sqrt(Z95 * Z95 - 2.0 * math.log(length.p95 / length.mean))
    return math.log(length.mean) - sigma * sigma / 2.0, sigma
