"""What a simulated world came to: figures, checks, and a digest that two equal runs share."""

from __future__ import annotations

from msgspec import Struct


class Check(Struct, frozen=True, kw_only=True):
    """One invariant: how often it was looked at, and where it did not hold (the first few)."""

    name: str
    num_checked: int
    num_violations: int
    violations: tuple[str, ...] = ()


class Spread(Struct, frozen=True, kw_only=True):
    """Percentiles over answered requests, in ms; None when there were none."""

    p50: float | None
    p95: float | None
    p99: float | None


class Report(Struct, frozen=True, kw_only=True):
    """One run. Everything but `wall_s` and `speed` is a function of the seed; energies are simulated, in mJ."""

    seed: int
    num_requests: int
    virtual_s: float
    wall_s: float
    speed: float
    """Virtual seconds per second of the wall."""
    num_events: int
    num_steps: int
    num_engine_deaths: int
    submitted: int
    delivered: int
    rejected: int
    aborted: int
    failed: int
    duplicates: int
    pending: int
    restarts: int
    num_prompt_tokens: int
    num_completion_tokens: int
    tokens_per_s: float
    by_mode: dict[str, int]
    """Decisions per mode."""
    by_reason: dict[str, int]
    """Decisions per reason that the policy gave."""
    error_codes: dict[str, int]
    ttft_ms: Spread
    tpot_ms: Spread
    e2el_ms: Spread
    energy_mj: dict[str, int]
    """The ledger: requests, wasted, idle, unattributed, running, counter."""
    mj_per_token: float | None
    checks: tuple[Check, ...]
    digest: str
    last_events: tuple[str, ...] = ()
    """The story before a failed check; empty when all hold."""

    @property
    def is_ok(self) -> bool:
        """Whether every check held."""
        return all(not check.num_violations for check in self.checks)
