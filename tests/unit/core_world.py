"""A tiny driver of the scheduler for tests: a clock that the test moves, and the world's obvious answers."""

from __future__ import annotations

from collections import deque
from random import Random
from typing import TypeVar

import msgspec

from msd.config import Config
from msd.core import commands as c
from msd.core import events as e
from msd.core.scheduler import Scheduler
from msd.domain import EngineInfo, ExitKind, FinishReason, Outcome, Request, Slo
from msd.gate import ALL_TASKS, SCHEMA, GateFile, GateRow, Verdict, Withdrawal

AnyCommand = TypeVar("AnyCommand", bound=c.Command)
MAX_MODEL_LEN = 4096
KV_CAPACITY_TOKENS = 100_000


def make_config(
    *,
    modes: int = 2,
    slots: int = 2,
    policy: str | dict[str, object] = "round_robin",
    engines: dict[str, dict[str, object]] | None = None,
    **sections: object,
) -> Config:
    """`modes` simulated engines m0, m1, ... of `slots` slots each; `engines` adds or replaces settings by name."""
    told = engines or {}
    document = {
        "model": [{"name": "toy"}, {"name": "other"}],
        "engine": [
            {
                "name": f"m{i}",
                "model": "toy",
                "kind": "sim",
                "max_num_seqs": slots,
                "sim": {"max_model_len": MAX_MODEL_LEN},
                **told.get(f"m{i}", {}),
            }
            for i in range(modes)
        ],
        "policy": {"name": policy} if isinstance(policy, str) else policy,
        **sections,
    }
    return msgspec.convert(document, Config)


def gate_of(
    verdicts: dict[str, dict[str, Verdict]], *, reference: str = "m0", accuracy_low: float = 0.9, **fields: object
) -> GateFile:
    """A gate file over modes whose recipe is their name: the verdict per mode and task, and the reference's rows."""
    tasks = {task for row in verdicts.values() for task in row} | {ALL_TASKS}
    passed: dict[str, dict[str, Verdict]] = {reference: dict.fromkeys(tasks, "certified"), **verdicts}
    rows = tuple(
        GateRow(
            mode=mode,
            recipe=mode,
            task=task,
            verdict=verdict,
            num_pairs=1_000,
            num_differ=10,
            accuracy=0.95,
            accuracy_low=accuracy_low if mode != reference else 0.97,
            accuracy_high=0.99,
            reference_accuracy=0.98,
            difference=-0.03 if verdict == "revoked" else 0.0,
            difference_low=-0.04,
            difference_high=0.01,
            agreement=1.0,
        )
        for mode, row in passed.items()
        for task, verdict in row.items()
    )
    known: dict[str, object] = {
        "schema": SCHEMA,
        "created": "",
        "command": "",
        "versions": {},
        "host": "",
        "model": "toy",
        "reference": reference,
        "reference_recipe": reference,
        "delta": 0.015,
        "alpha": 0.05,
        "rows": rows,
        "checksum": "c",
    }
    return GateFile(**{**known, **fields})  # type: ignore[arg-type]


class CoreWorld:
    """Answers Append and Complete at once, unless told to hold them; engines run until the test says so.

    As in dispatch, an event that a command causes waits until all commands before it are performed.
    """

    def __init__(
        self,
        config: Config,
        *,
        up: bool = True,
        kv_capacity_tokens: int = KV_CAPACITY_TOKENS,
        gate: GateFile | None = None,
        withdrawn: tuple[Withdrawal, ...] = (),
    ) -> None:
        """`gate` knows the modes by recipes that are their names."""
        self.config = config
        recipes = {engine.name: engine.name for engine in config.engine}
        self.scheduler = Scheduler.from_config(config, Random(1), gate=gate, recipes=recipes, withdrawn=withdrawn)
        self.kv_capacity_tokens = kv_capacity_tokens
        self.t_us = 1_000_000
        self.hold_appends = False
        self.hold_completes = False
        self.hold_aborts = False
        self.num_requests = 0
        self.requests: dict[str, Request] = {}
        self.log: list[c.Command] = []
        self.appending: set[str] = set()
        self.completing: set[str] = set()
        self.aborting: set[str] = set()
        self.running: dict[str, c.Dispatch] = {}
        self.outcomes: dict[str, Outcome] = {}
        self.delivered: dict[str, Outcome] = {}
        self.rejected: dict[str, c.Reject] = {}
        self._seq = 0
        self._events: deque[e.Event] = deque()
        if up:
            for engine in config.engine:
                self.engine_up(engine.name)

    # --- the world's answers -------------------------------------------------------------------------------------

    def post(self, event: e.Event) -> list[c.Command]:
        """Handle an event and all that follows from it at once; returns every command, in order."""
        made: list[c.Command] = []
        self._events.append(event)
        while self._events:
            for command in self.scheduler.handle(self._events.popleft()):
                made.append(command)
                self._perform(command)
        self.log.extend(made)
        return made

    def _perform(self, command: c.Command) -> None:
        match command:
            case c.Append():
                self.appending.add(command.request_id)
                if not self.hold_appends:
                    self._events.append(self._appended(command.request_id))
            case c.Dispatch():
                assert command.request_id not in self.running, "dispatched while it runs"
                self.running[command.request_id] = command
            case c.Complete():
                request_id = command.outcome.request_id
                assert request_id not in self.outcomes, "a second terminal state"
                self.outcomes[request_id] = command.outcome
                self.completing.add(request_id)
                if not self.hold_completes:
                    self._events.append(self._completed(request_id))
            case c.Deliver():
                assert command.request_id not in self.delivered, "delivered twice"
                self.delivered[command.request_id] = self.outcomes[command.request_id]
            case c.Reject():
                assert command.request_id not in self.rejected, "refused twice"
                self.rejected[command.request_id] = command
            case c.Abort():
                self.aborting.add(command.request_id)
                if not self.hold_aborts and command.request_id in self.running:  # not a shadow: those the test ends
                    self._events.append(self._finished(command.request_id, "abort", 0))
            case _:
                pass

    def _appended(self, request_id: str) -> e.Appended:
        self._seq += 1
        self.appending.remove(request_id)
        return e.Appended(self.t_us, request_id, self._seq)

    def _completed(self, request_id: str) -> e.Completed:
        self._seq += 1
        self.completing.remove(request_id)
        return e.Completed(self.t_us, request_id, self._seq)

    def _finished(self, request_id: str, reason: FinishReason, num_tokens: int) -> e.Finished:
        dispatch = self.running.pop(request_id)
        self.aborting.discard(request_id)
        return e.Finished(self.t_us, request_id, dispatch.attempt, reason, num_tokens)

    # --- what a test may let happen ------------------------------------------------------------------------------

    def engine_up(
        self, name: str, *, max_model_len: int = MAX_MODEL_LEN, kv_capacity_tokens: int | None = None
    ) -> list[c.Command]:
        slots = next(engine.max_num_seqs for engine in self.config.engine if engine.name == name)
        info = EngineInfo(
            engine=name,
            max_model_len=max_model_len,
            max_num_seqs=slots,
            kv_capacity_tokens=self.kv_capacity_tokens if kv_capacity_tokens is None else kv_capacity_tokens,
            idle_ttft_ms=10.0,
            idle_tpot_ms=2.0,
        )
        return self.post(e.EngineUp(self.t_us, info))

    def make(self, **fields: object) -> Request:
        """A request with the next id; `deadline_ms` sets the bound and the moment."""
        self.num_requests += 1
        request_id = f"r{self.num_requests}"
        known: dict[str, object] = {
            "request_id": request_id,
            "client_request_id": request_id,
            "tenant": "local",
            "content_hash": b"h",
            "received_us": self.t_us,
            "num_prompt_tokens": 16,
            "max_tokens": 8,
        }
        deadline_ms = fields.pop("deadline_ms", None)
        if isinstance(deadline_ms, int | float):
            known["slo"] = Slo(deadline_ms=float(deadline_ms))
            known["deadline_us"] = self.t_us + int(deadline_ms * 1000)
        request = Request(**{**known, **fields})  # type: ignore[arg-type]
        self.requests[request_id] = request
        return request

    def submit(self, **fields: object) -> str:
        request = self.make(**fields)
        self.post(e.Submitted(self.t_us, request))
        return request.request_id

    def recover(self, **fields: object) -> str:
        request = self.make(**fields)
        self.post(e.Recovered(self.t_us, request))
        return request.request_id

    def appended(self, request_id: str) -> list[c.Command]:
        return self.post(self._appended(request_id))

    def append_failed(self, request_id: str) -> list[c.Command]:
        self.appending.remove(request_id)
        return self.post(e.AppendFailed(self.t_us, request_id, "disk full"))

    def append_duplicated(self, request_id: str, existing_id: str, content_hash: bytes = b"h") -> list[c.Command]:
        self.appending.remove(request_id)
        return self.post(e.AppendDuplicated(self.t_us, request_id, existing_id, content_hash))

    def completed(self, request_id: str) -> list[c.Command]:
        return self.post(self._completed(request_id))

    def first_token(self, request_id: str) -> None:
        dispatch = self.running[request_id]
        self.post(e.FirstToken(self.t_us, request_id, dispatch.attempt, 0))

    def finish(self, request_id: str, reason: FinishReason = "stop", num_tokens: int = 4) -> list[c.Command]:
        return self.post(self._finished(request_id, reason, num_tokens))

    def fail(self, request_id: str, error_code: str = "internal", *, lost: bool = False) -> list[c.Command]:
        dispatch = self.running.pop(request_id)
        self.aborting.discard(request_id)
        return self.post(e.Failed(self.t_us, request_id, dispatch.attempt, error_code, "it broke", lost))

    def lose(self, engine: str) -> None:
        for request_id, dispatch in list(self.running.items()):
            if dispatch.decision.engine == engine:
                self.fail(request_id, "engine_unavailable", lost=True)
        self.post(e.EngineLost(self.t_us, engine, ExitKind.DIED, "died"))

    def cancel(self, request_id: str) -> list[c.Command]:
        return self.post(e.Cancelled(self.t_us, request_id))

    def drain(self, ms: float) -> list[c.Command]:
        return self.post(e.Draining(self.t_us, self.t_us + int(ms * 1000)))

    def wait(self, ms: float) -> list[c.Command]:
        self.t_us += int(ms * 1000)
        return self.post(e.Tick(self.t_us))

    # --- what a test may look at ---------------------------------------------------------------------------------

    def mode_of(self, request_id: str) -> str:
        return self.running[request_id].decision.mode

    def of(self, kind: type[AnyCommand]) -> list[AnyCommand]:
        return [command for command in self.log if isinstance(command, kind)]

    def conserved(self) -> bool:
        """Whether submitted = delivered + rejected + aborted + failed + duplicates + pending."""
        n = self.scheduler.counts
        ended = n.delivered + n.rejected + n.aborted + n.failed + n.duplicates
        return n.submitted == ended + self.scheduler.num_pending
