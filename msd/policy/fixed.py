"""`fixed`: always one mode; the baseline that every other policy is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from msd.config import PolicyConfig
from msd.domain import Candidate, Choice, Decision, Features, Mask, Mode, Observation
from msd.errors import ConfigError
from msd.policy.least_loaded import least_loaded


class Fixed:
    """Routes to the configured mode, and waits for it; another one only when that one must not serve the request."""

    name = "fixed"

    def __init__(self, config: PolicyConfig, modes: Sequence[Mode]) -> None:
        names = [mode.name for mode in modes]
        wanted = config.mode or (names[0] if names else "")
        if wanted not in names:
            raise ConfigError(f"policy.mode = {wanted!r} is not a mode", remedy=f"one of {', '.join(names)}")
        self._arm = names.index(wanted)
        self._reason = f"fixed on {wanted}"

    def choose(self, features: Features, candidates: Sequence[Candidate], rng: Random) -> Choice:
        """The configured arm, or the least loaded feasible one when its mask forbids it."""
        mask = candidates[self._arm].mask
        if mask in (0, int(Mask.SLOTS)):
            return Choice(self._arm, 1.0, self._reason)
        arm = least_loaded(candidates, range(len(candidates)))
        return Choice(arm, 1.0, f"{self._reason}, which is masked ({Mask(mask)!r}); least loaded instead")

    def update(self, decision: Decision, observation: Observation) -> None:
        """Nothing to learn."""

    def dump(self) -> dict[str, object]:
        """No state."""
        return {}

    def load(self, state: dict[str, object]) -> None:
        """No state."""
