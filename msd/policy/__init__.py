"""WHICH mode: pure policies. To add one: a class with choose/update/dump/load in its own file, and a line below."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence

from msd.config import PolicyConfig
from msd.domain import Mode
from msd.errors import ConfigError
from msd.policy.cost import Cost
from msd.policy.fixed import Fixed
from msd.policy.learned import Learned
from msd.policy.least_loaded import LeastLoaded
from msd.policy.random import RandomMode
from msd.policy.round_robin import RoundRobin
from msd.policy.rules import Rules
from msd.ports import Policy

POLICIES: dict[str, Callable[[PolicyConfig, Sequence[Mode]], Policy]] = {
    "fixed": Fixed,
    "random": RandomMode,
    "round_robin": RoundRobin,
    "least_loaded": LeastLoaded,
    "rules": Rules,
    "cost": Cost,
    "learned": Learned,
}


def make_policy(config: PolicyConfig, modes: Sequence[Mode]) -> Policy:
    """The policy that `config` names, over `modes` in their order. Raises ConfigError with the nearest name."""
    make = POLICIES.get(config.name)
    if make is None:
        near = difflib.get_close_matches(config.name, POLICIES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"one of {', '.join(sorted(POLICIES))}"
        raise ConfigError(f"policy.name = {config.name!r} is not a policy", remedy=hint)
    return make(config, modes)
