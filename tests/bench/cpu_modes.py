"""`cost` against each fixed mode and the rules on real vLLM engines on the CPU, through the whole daemon, in bursts.

One daemon with the testbed's modes (bf16, int8, ngram: those that its gate certifies) serves everybody in turn: only
the policy changes, by the event `ConfigChanged`. So no contestant pays for a start, and all meet the same neighbours.
What the machine does beside it falls on all; the order of the contestants rotates from seed to seed.

Traffic: seven families of exact-answer problems and plain text, in seeded bursts of four times the calm's rate. SLOs
are three times the idle TTFT and TPOT of bf16 per family (a shared machine is not quieter than that). The best fixed
mode is chosen by goodput on another seed than those that judge. Energy: none is measured on a CPU without counters, and
what is absent counts as not better.

`python -m tests.bench.cpu_modes CONFIG` is the daemon; a line of JSON on its standard input is its next policy.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

import msgspec
import uvloop
from msgspec import Struct

from msd import config as settings
from msd import logs, tasks
from msd.client import Client
from msd.client.aio import AsyncClient
from msd.client.submits import SubmitFields
from msd.config import PolicyConfig
from msd.core.events import ConfigChanged
from msd.daemon import Daemon
from msd.errors import MsdError
from msd.wire import DaemonStatus, Done
from tests.bench.harness import ROOT, CannotMeasureError, Options, Row, row, say, skipped
from tests.bench.vllm_engines import ENVIRON, require_vllm

TARGET = "cpu_modes"
MODES = ("bf16", "int8", "ngram")
REFERENCE = "bf16"
MODEL = "tiny-large"
INT8 = ROOT / "build" / "testbed" / "tiny-large-int8"
SLOTS = 16
SLO_FACTOR = 3.0
LOAD = 0.4
"""Of what the reference mode finishes a second when it is flooded."""
BURST_FACTOR = 4.0
PHASE_S = 2.0
FLOOD = 150
LETTERS = "abcdefghijklmnopqrstuvwxyz "
PATIENCE_S = 60.0
START_S = 240.0
STOP_S = 60.0
NOT_WORSE = 0.98
"""Repeats of one contestant differ by more than 2 % here; less is no difference."""


class Family(Struct, frozen=True, kw_only=True):
    """One kind of request: a problem with one right answer, or text of so many characters (tokens) to go on from.

    The testbed's models were trained on bare questions: worked examples before them would only make them wrong.
    """

    name: str
    task: str | None = None
    level: int = 1
    prompt_tokens: int = 0
    shared_tokens: int = 0
    output_tokens: int = 0


FAMILIES = (
    Family(name="short answer", task="add", level=3),
    Family(name="hard answer", task="count", level=4),
    Family(name="longer answer", task="copy", level=4),
    Family(name="longer answer, harder", task="reverse", level=4),
    Family(name="long prompt", prompt_tokens=600, output_tokens=8),
    Family(name="shared prefix", prompt_tokens=640, shared_tokens=600, output_tokens=16),
    Family(name="long output", prompt_tokens=40, output_tokens=48),
)


class Ask(Struct, frozen=True, kw_only=True):
    """One request of a plan."""

    t_s: float
    family: int
    prompt: str
    max_tokens: int
    answer: str | None


class Answer(Struct, frozen=True, kw_only=True):
    """What came of it; `done` None: refused or failed."""

    ask: Ask
    ttft_ms: float = math.inf
    tpot_ms: float = 0.0
    e2el_ms: float = math.inf
    is_right: bool | None = None
    mode: str = ""
    energy_mj: int | None = None


class Bound(Struct, frozen=True, kw_only=True):
    """SLOs of a family."""

    ttft_ms: float
    tpot_ms: float


class Score(Struct, frozen=True, kw_only=True):
    """One contestant on one seed."""

    goodput_per_s: float
    good_share: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    e2el_p50_ms: float
    accuracy: float
    num_failed: int
    mix: dict[str, int]


def measure(options: Options) -> list[Row]:
    """Rows of the comparison."""
    require_vllm()
    if not INT8.is_dir():
        raise CannotMeasureError(f"{INT8} is missing: make testbed")
    duration_s = options.scaled(12, 5)
    seeds = range(11, 11 + max(2, min(options.repeats, 3)))
    with tempfile.TemporaryDirectory(prefix="msd-bench-") as folder, _Host(Path(folder)) as host:
        say(f"{TARGET}: starting {len(MODES)} engines")
        host.wait_up()
        capacity = asyncio.run(_flood(host))
        bounds = asyncio.run(_idle(host))
        say(f"{TARGET}: {REFERENCE} finishes {capacity:.1f} requests/s; load {LOAD:g} of it; {bounds}")
        rate = LOAD * capacity
        chosen = {mode: _play(host, _fixed(mode), 1, rate, duration_s, bounds) for mode in MODES}
        best = max(chosen, key=lambda mode: chosen[mode].goodput_per_s)
        policies = {
            **{f"fixed on {mode}": _fixed(mode) for mode in MODES},
            "rules": _named("rules"),
            "cost": _named("cost"),
        }
        scores: dict[str, list[Score]] = {name: [] for name in policies}
        for turn, seed in enumerate(seeds):
            names = list(policies)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                scores[name].append(_play(host, policies[name], seed, rate, duration_s, bounds))
                say(f"{TARGET}: seed {seed}, {name}: {_line(scores[name][-1])}")
        host.stop()
    return _rows(scores, f"fixed on {best}")


def _rows(scores: dict[str, list[Score]], best: str) -> list[Row]:
    def of(name: str, field: str) -> list[float]:
        return [getattr(score, field) for score in scores[name]]

    def against(field: str) -> list[float]:
        return [a / b if b else math.inf for a, b in zip(of("cost", field), of(best, field), strict=True)]

    goodput, latency = against("goodput_per_s"), against("e2el_p50_ms")
    right = [a - b for a, b in zip(of("cost", "accuracy"), of(best, "accuracy"), strict=True)]
    faster, better = statistics.median(latency), statistics.median(right)
    not_worse = faster <= 1 / NOT_WORSE and better >= -(1 - NOT_WORSE)
    wins = not_worse and (faster < NOT_WORSE or better > 0.0)
    rows = [
        row(f"goodput, cost / {best} (chosen on another seed)", "x", goodput, target=TARGET, op=">=", bar=NOT_WORSE),
        row(f"E2EL p50, cost / {best}", "x", latency, target=TARGET),
        row(f"right answers, cost less {best}", "share", right, target=TARGET, op=">="),
        row(
            "better in latency or right answers, and not worse in the other (1 = yes)", "", [float(wins)],
            target=TARGET, op=">=", bar=1.0,
        ),
        skipped(f"energy per token, cost / {best}", "x", "no energy counter on this CPU: absent counts as not better"),
    ]  # fmt: skip
    for name in scores:
        note = _line(scores[name][-1])
        rows.append(row(f"goodput of {name} (last: {note})", "1/s", of(name, "goodput_per_s"), target=TARGET, op=">="))
        rows.append(row(f"E2EL p50 of {name}", "ms", of(name, "e2el_p50_ms"), target=TARGET))
        rows.append(row(f"right answers of {name}", "share", of(name, "accuracy"), target=TARGET, op=">="))
    return rows


def _line(score: Score) -> str:
    mix = ", ".join(f"{mode} {count}" for mode, count in sorted(score.mix.items()))
    return (
        f"{score.goodput_per_s:.1f} good/s ({score.good_share:.0%}), TTFT p50 {score.ttft_p50_ms:.0f} p99 "
        f"{score.ttft_p99_ms:.0f} ms, E2EL p50 {score.e2el_p50_ms:.0f} ms, {score.accuracy:.1%} right, "
        f"{score.num_failed} failed; {mix}"
    )


def _fixed(mode: str) -> dict[str, object]:
    return {"name": "fixed", "mode": mode}


def _named(name: str) -> dict[str, object]:
    return {"name": name}


# --- traffic ---------------------------------------------------------------------------------------------------------


def _plan(seed: int, rate_per_s: float, duration_s: float) -> list[Ask]:
    """Bursts and calm by turns, PHASE_S each on average; the mean rate as wanted."""
    rng = Random(f"{TARGET}/{seed}")
    asks: list[Ask] = []
    calm = 2.0 / (1.0 + BURST_FACTOR)
    t_s, ends_s, in_burst = 0.0, rng.uniform(0.0, 2 * PHASE_S), rng.random() < 0.5
    while True:
        while t_s >= ends_s:
            in_burst = not in_burst
            ends_s += rng.uniform(0.5 * PHASE_S, 1.5 * PHASE_S)
        t_s += rng.expovariate(rate_per_s * calm * (BURST_FACTOR if in_burst else 1.0))
        if t_s >= duration_s:
            return asks
        asks.append(_ask(rng, t_s, rng.randrange(len(FAMILIES))))


def _ask(rng: Random, t_s: float, index: int) -> Ask:
    family = FAMILIES[index]
    if family.task is None:
        own = rng.choices(LETTERS, k=family.prompt_tokens - family.shared_tokens)
        shared = Random("shared").choices(LETTERS, k=family.shared_tokens)
        return Ask(t_s=t_s, family=index, prompt="".join(shared + own), max_tokens=family.output_tokens, answer=None)
    problem = tasks.generate(family.task, family.level, rng.randrange(1_000_000))
    return Ask(t_s=t_s, family=index, prompt=problem.prompt, max_tokens=problem.max_tokens, answer=problem.answer)


async def _send(client: AsyncClient, ask: Ask, bounds: Sequence[Bound] | None) -> Answer:
    bound = None if bounds is None else bounds[ask.family]
    slo = {} if bound is None else {"ttft_ms": bound.ttft_ms, "tpot_ms": bound.tpot_ms}
    fields: SubmitFields = {
        "model": MODEL,
        "slo": slo,
        "sampling": {"temperature": 0.0, "ignore_eos": ask.answer is None},
    }
    task = FAMILIES[ask.family].task
    if task is not None:
        fields["task"] = task
    handle = client.submit(ask.prompt, max_tokens=ask.max_tokens, **fields)
    try:
        done: Done = await handle.result(PATIENCE_S)
    except MsdError:
        return Answer(ask=ask)
    return Answer(
        ask=ask,
        ttft_ms=done.timings.ttft_ms,
        tpot_ms=done.timings.tpot_ms,
        e2el_ms=done.timings.e2e_ms,
        is_right=None if ask.answer is None else tasks.grade(ask.answer, done.text or ""),
        mode=done.mode,
        energy_mj=None if done.energy is None else done.energy.energy_mj,
    )


async def _flood(host: _Host) -> float:
    """Requests that the reference mode finishes a second when all come at once; warms every mode up before."""
    rng = Random("flood")
    spent_s = math.inf
    async with AsyncClient(host.endpoint) as client:
        for mode in (*MODES, REFERENCE):
            host.use(_fixed(mode))
            asks = [_ask(rng, 0.0, i % len(FAMILIES)) for i in range(FLOOD if mode == REFERENCE else 3 * SLOTS)]
            began = time.monotonic()
            answers = await asyncio.gather(*(_send(client, ask, None) for ask in asks))
            spent_s = time.monotonic() - began
            if any(not answer.mode for answer in answers):
                raise CannotMeasureError(f"{mode} refused or failed requests that it is certified for")
    return FLOOD / spent_s


async def _idle(host: _Host) -> list[Bound]:
    """SLO_FACTOR times the reference mode's medians, one request at a time."""
    rng = Random("idle")
    host.use(_fixed(REFERENCE))
    bounds = []
    async with AsyncClient(host.endpoint) as client:
        for index in range(len(FAMILIES)):
            answers = [await _send(client, _ask(rng, 0.0, index), None) for _ in range(7)]
            ttft_ms = statistics.median(answer.ttft_ms for answer in answers[1:])
            tpots = [answer.tpot_ms for answer in answers[1:] if answer.tpot_ms > 0]
            tpot_ms = statistics.median(tpots) if tpots else ttft_ms
            bounds.append(Bound(ttft_ms=round(SLO_FACTOR * ttft_ms, 1), tpot_ms=round(SLO_FACTOR * tpot_ms, 1)))
    return bounds


def _play(
    host: _Host, policy: dict[str, object], seed: int, rate_per_s: float, duration_s: float, bounds: Sequence[Bound]
) -> Score:
    host.use(policy)
    answers = asyncio.run(_play_plan(host.endpoint, _plan(seed, rate_per_s, duration_s), bounds))
    good = [
        answer
        for answer in answers
        if answer.ttft_ms <= bounds[answer.ask.family].ttft_ms
        and answer.tpot_ms <= bounds[answer.ask.family].tpot_ms
        and answer.is_right is not False
    ]
    graded = [answer.is_right for answer in answers if answer.is_right is not None]
    ttfts = sorted(answer.ttft_ms for answer in answers if answer.mode)
    e2els = sorted(answer.e2el_ms for answer in answers if answer.mode)
    if not e2els or not graded:
        raise CannotMeasureError(f"{policy}: nothing was answered")
    mix: dict[str, int] = {}
    for answer in answers:
        mix[answer.mode or "none"] = mix.get(answer.mode or "none", 0) + 1
    return Score(
        goodput_per_s=len(good) / duration_s,
        good_share=len(good) / len(answers),
        ttft_p50_ms=statistics.median(ttfts),
        ttft_p99_ms=ttfts[(len(ttfts) - 1) * 99 // 100],
        e2el_p50_ms=statistics.median(e2els),
        accuracy=sum(graded) / len(graded),
        num_failed=sum(not answer.mode for answer in answers),
        mix=mix,
    )


async def _play_plan(endpoint: str, plan: Sequence[Ask], bounds: Sequence[Bound]) -> list[Answer]:
    """Open loop: each request at its time, whatever the answers do."""
    async with AsyncClient(endpoint) as client, asyncio.TaskGroup() as group:
        began = time.monotonic()
        sent = []
        for ask in plan:
            await asyncio.sleep(max(0.0, ask.t_s - (time.monotonic() - began)))
            sent.append(group.create_task(_send(client, ask, bounds)))
        return list(await asyncio.gather(*sent))


# --- the daemon ------------------------------------------------------------------------------------------------------


class _Host:
    """The daemon in a process of its own, whose policy changes when it is told to."""

    def __init__(self, folder: Path) -> None:
        self.endpoint = f"ipc://{folder}/msd.sock"
        self._config, self._log = folder / "config.toml", folder / "daemon.log"
        environ = ", ".join(f"{name} = {json.dumps(value)}" for name, value in ENVIRON.items())
        testbed = ROOT / "testbed"
        body = (
            f'[daemon]\ndrain_s = 5\nrun_dir = "{folder}/run"\nstate_dir = "{folder}/state"\n'
            f'[ingress.zmq]\nendpoints = ["{self.endpoint}"]\n'
            f'[[model]]\nname = "{MODEL}"\npath = {json.dumps(str(testbed / "models" / MODEL))}\n'
            f"[quality]\ngate = {json.dumps(str(testbed / 'gate.json'))}\nshadow_share = 0.0\n"
            '[telemetry]\nprobe = "none"\n'
        )
        # As in testbed/demo.toml: the gate's certificates are for these recipes.
        traits = {
            "bf16": 'precision = "bf16"\nprefix_caching = true\n',
            "int8": f'precision = "int8"\nweights = {json.dumps(str(INT8))}\n',
            "ngram": 'precision = "bf16"\nspeculation = "ngram"\n',
        }
        extra = {
            "ngram": ', speculative_config = { method = "ngram", num_speculative_tokens = 4, prompt_lookup_max = 4 }'
        }
        for mode in MODES:
            body += (
                f'[[engine]]\nname = "{mode}"\nmodel = "{MODEL}"\n{traits[mode]}max_num_seqs = {SLOTS}\n'
                f"env = {{ {environ} }}\nargs = {{ max_model_len = 2048, enforce_eager = true, "
                f"kv_cache_memory_bytes = 268_435_456{extra.get(mode, '')} }}\n"
            )
        self._config.write_text(body)

    def __enter__(self) -> _Host:
        command = [sys.executable, "-m", "tests.bench.cpu_modes", str(self._config)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=log, stderr=log)
        return self

    def __exit__(self, *error: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()

    def use(self, policy: dict[str, object]) -> None:
        """Who decides from now on; returns when it does."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(policy).encode() + b"\n")
        self._process.stdin.flush()
        with Client(self.endpoint) as client:
            until_s = time.monotonic() + 10.0
            while msgspec.convert(client.status(), DaemonStatus).policy != policy["name"]:
                if time.monotonic() > until_s:
                    raise CannotMeasureError(f"the daemon does not take the policy {policy}: {self._told()}")
                time.sleep(0.05)
        # The name says nothing of the mode: by then the line before has been read as well.
        time.sleep(0.1)

    def wait_up(self) -> None:
        """Wait until every engine is warm. Raises CannotMeasureError."""
        until_s = time.monotonic() + START_S
        with Client(self.endpoint, timeout_s=START_S) as client:
            while time.monotonic() < until_s and self._process.poll() is None:
                status = msgspec.convert(client.status(), DaemonStatus)
                if sum(engine.state == "up" for engine in status.engines) == len(MODES):
                    return
                if errors := [engine.last_error for engine in status.engines if engine.last_error]:
                    raise CannotMeasureError(f"an engine did not start: {errors[0][-500:]}")
                time.sleep(0.2)
        raise CannotMeasureError(f"the engines were not up within {START_S:g} s: {self._told()}")

    def stop(self) -> None:
        """End the daemon. Raises CannotMeasureError when it does not."""
        self._process.terminate()
        try:
            code = self._process.wait(STOP_S)
        except subprocess.TimeoutExpired as error:
            raise CannotMeasureError(f"the daemon did not stop within {STOP_S:g} s") from error
        if code:
            raise CannotMeasureError(f"the daemon ended with {code}: {self._told()}")

    def _told(self) -> str:
        return self._log.read_text()[-500:]


async def _serve(config_file: Path) -> None:
    config = settings.load(config_file)
    logs.configure(config.daemon)
    daemon = Daemon(config, config_file.parent)
    loop = asyncio.get_running_loop()
    read = os.fdopen(sys.stdin.fileno(), "rb", buffering=0)
    left = b""

    def on_line() -> None:
        nonlocal left
        *lines, left = (left + read.read(65_536)).split(b"\n")
        for line in lines:
            policy = msgspec.json.decode(line, type=PolicyConfig)
            daemon.post(ConfigChanged(time.monotonic_ns() // 1_000, policy))

    loop.add_reader(read.fileno(), on_line)
    try:
        await daemon.run()
    finally:
        loop.remove_reader(read.fileno())


def main() -> None:
    """Be the daemon."""
    uvloop.run(_serve(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
