"""How good predictions are at the moment of decision: of E2EL on real CPU engines, of energy on the simulated GPU.

Real engines: `msd serve` with three live vLLM engines of the testbed's model (bf16 with prefix caching, INT8, ngram
speculation). Bursts of mixed families come over ZeroMQ; of half of the requests the length is known (`ignore_eos`), of
the others it is learnt. Predictions are those of the chosen candidate in the decision log, from decision to last token;
judged are the decisions made after 200 observations. MAPE: mean of |predicted - measured| / measured.

The judged runs are under policy `random`, so that every mode sees every kind of request and of load, at 6 requests a
second in bursts: what three engines on two cores can serve. Beside them, for the record: 10 a second in steeper bursts,
which is more than that (requests queue inside of the engines, and what a request meets is who comes after it), and
policy `cost`, whose data are selective: it sees of a mode what it has sent there. The engines share the cores with all
else that runs: how much that was is a row, for no estimator knows of it.

How much can be known at a decision? Asked of 2 x 420 requests while others kept both cores busy (load 7 to 12), MAPE of
E2EL: gradient boosted trees, cross-validated, on what the decision record holds: 78 %; the core: 79 %; the
same trees in hindsight, told the output's length, who ran beside it and what prompts were read meanwhile: 44 %. Alone,
a token took 4 to 6 ms; beside five requests, with two other engines busy, 57 to 130. What is missing there is who comes
next and what other processes do, not a better line.

Simulated GPU: virtual worlds (`msd.sim`) of three engines that share one GPU, in bursts, at 0.3, 0.6 and 0.9 of what
they can do; the coefficients are fitted from the counter as the world goes. Measured is each request's dynamic energy
as the ledger settled it; judged is the second half. All of that is labelled simulated.
"""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import msgspec
from msgspec import Struct, structs

from msd import decisions, tasks
from msd.client import AsyncClient, Client, RequestError
from msd.config import Config
from msd.core import commands as c
from msd.core.commands import Command
from msd.core.events import Event
from msd.core.scheduler import Scheduler
from msd.domain import Candidate, Decision, Observation
from msd.sim.weather import STEADY
from msd.sim.world import run_world
from msd.wire import DaemonStatus
from tests.bench.harness import ROOT, CannotMeasureError, Options, Row, all_cpu_s, row, say, tree_cpu_s
from tests.bench.vllm_engines import ENVIRON, MODEL, MODEL_NAME, require_vllm

TARGET = "estimator"
BAR_E2EL, BAR_ENERGY = 20.0, 10.0
NUM_TAUGHT = 200
BURST_S, CALM_S = 2.0, 4.0
START_S, STOP_S, ANSWER_S = 300.0, 60.0, 120.0
MAX_REPEATS = 3
UTILISATIONS = (0.3, 0.6, 0.9)
INT8 = ROOT / "build" / "testbed" / f"{MODEL_NAME}-int8"

FAMILIES = {"short_short": (32, 12), "short_long": (32, 96), "long_short": (640, 12), "long_long": (640, 96)}
"""Prompt and output tokens."""
PREFIX_TOKENS = 512
TASK_MAX_TOKENS = 40


class Load(Struct, frozen=True):
    """What comes, and who decides. `factor`: how much more comes in bursts than in between."""

    rate_per_s: float
    factor: float
    policy: str

    def __str__(self) -> str:
        return f"{self.rate_per_s:g}/s in bursts x{self.factor:g}, {self.policy}"

    def at(self, at_s: float) -> float:
        """The rate at this moment."""
        calm = self.rate_per_s * (BURST_S + CALM_S) / (self.factor * BURST_S + CALM_S)
        return calm * self.factor if at_s % (BURST_S + CALM_S) < BURST_S else calm


JUDGED = Load(6.0, 3.0, "random")
OTHERS = (Load(10.0, 4.0, "random"), Load(6.0, 3.0, "cost"))
"""For the record, once."""


class Judged(Struct, frozen=True):
    """One prediction beside what was measured, times from the decision, in ms."""

    candidate: Candidate
    observation: Observation
    since_receipt_ms: float
    length_known: bool

    def e2el_error(self) -> float:
        """Relative error of the whole prediction, output length included."""
        measured_ms = self.observation.e2el_ms - self.since_receipt_ms
        return abs(self.candidate.e2el_ms - measured_ms) / measured_ms

    def ttft_error(self) -> float:
        """Relative error of the time to the first token."""
        measured_ms = self.observation.ttft_ms - self.since_receipt_ms
        return abs(self.candidate.ttft_ms - measured_ms) / measured_ms

    def tpot_error(self) -> float | None:
        """Relative error of the time per further token; None where there is none."""
        measured_ms = self.observation.tpot_ms
        return abs(self.candidate.tpot_ms - measured_ms) / measured_ms if measured_ms else None

    def energy_error(self) -> float | None:
        """Relative error of the dynamic energy; None where it was not measured or not predicted."""
        energy, predicted_mj = self.observation.energy, self.candidate.energy_mj
        if energy is None or not energy.dynamic_mj or predicted_mj is None:
            return None
        return abs(predicted_mj - energy.dynamic_mj) / energy.dynamic_mj


def measure(options: Options) -> list[Row]:
    """Rows of both parts."""
    repeats = min(options.repeats, MAX_REPEATS)
    return [*_energy_rows(options, repeats), *_engine_rows(options, repeats)]


def _mape(judged: Sequence[Judged], error: Callable[[Judged], float | None]) -> float:
    errors = [found for one in judged if (found := error(one)) is not None]
    if not errors:
        raise CannotMeasureError("nothing to judge predictions by")
    return statistics.fmean(errors) * 100


def _rows(
    runs: list[list[Judged]],
    kinds: Sequence[tuple[str, Callable[[Judged], bool], Callable[[Judged], float | None], float | None]],
) -> list[Row]:
    """A row of MAPE per kind: its name, whom it is over, whose error, and the bar."""
    made = []
    for name, belongs, error, bar in kinds:
        subsets = [[one for one in run if belongs(one)] for run in runs]
        values = [_mape(subset, error) for subset in subsets if subset]
        if values:
            made.append(row(name, "%", values, target=TARGET, bar=bar))
    return made


# --- real engines ----------------------------------------------------------------------------------------------------


def _engine_rows(options: Options, repeats: int) -> list[Row]:
    num_requests = int(options.scaled(700, 420))
    of_e2el = Judged.e2el_error

    def serve(load: Load, repeats: int) -> tuple[list[list[Judged]], list[float]]:
        runs, others = [], []
        for repeat in range(repeats):
            say(f"{TARGET}: real engines, {load}, {repeat + 1} of {repeats}: starting three")
            judged, busy_cores = _serve_and_judge(load, num_requests, repeat)
            runs.append(judged)
            others.append(busy_cores)
        return runs, others

    runs, others = serve(JUDGED, repeats)
    kinds: list[tuple[str, Callable[[Judged], bool], Callable[[Judged], float | None], float | None]] = [
        (f"real CPU engines, {JUDGED}: MAPE of E2EL", lambda one: True, of_e2el, BAR_E2EL),
        ("of these, length known (ignore_eos)", lambda one: one.length_known, of_e2el, None),
        ("of these, length learnt", lambda one: not one.length_known, of_e2el, None),
        ("MAPE of TTFT (from the decision)", lambda one: True, Judged.ttft_error, None),
        ("MAPE of TPOT", lambda one: True, Judged.tpot_error, None),
    ]
    for mode in sorted({one.candidate.mode for run in runs for one in run}):
        kinds.append((f"E2EL on {mode}", lambda one, mode=mode: one.candidate.mode == mode, of_e2el, None))  # type: ignore[misc]
    made = [*_rows(runs, kinds), _busy_row(JUDGED, others)]
    for load in OTHERS:
        runs, others = serve(load, 1)
        made += _rows(runs, [(f"real CPU engines, {load}: MAPE of E2EL", lambda one: True, of_e2el, None)])
        made.append(_busy_row(load, others))
    return made


def _busy_row(load: Load, busy_cores: list[float]) -> Row:
    return row(f"{load}: cores that other processes kept busy meanwhile", "cores", busy_cores, target=TARGET)


def _serve_and_judge(load: Load, num_requests: int, seed: int) -> tuple[list[Judged], float]:
    """One daemon, one plan: the judged half, and how many cores others kept busy while it came."""
    require_vllm()
    if not INT8.is_dir():
        raise CannotMeasureError(f"{INT8} is missing: make testbed")
    with tempfile.TemporaryDirectory(prefix="msd-bench-") as folder:
        config, log = Path(folder) / "config.toml", Path(folder) / "daemon.log"
        endpoint = f"ipc://{folder}/msd.sock"
        config.write_text(_config(folder, endpoint, load.policy))
        with log.open("wb") as file:
            daemon = subprocess.Popen(
                [sys.executable, "-m", "msd", "serve", "--config", str(config)], cwd=ROOT, stdout=file, stderr=file
            )
        try:
            _wait_up(endpoint, daemon, 3, log)
            say(f"{TARGET}: {num_requests} requests in bursts")
            began_s, before_s = time.monotonic(), _others_cpu_s(daemon.pid)
            known = asyncio.run(_fire(endpoint, load, num_requests, seed))
            busy_cores = (_others_cpu_s(daemon.pid) - before_s) / (time.monotonic() - began_s)
            daemon.terminate()
            daemon.wait(STOP_S)
        finally:
            if daemon.poll() is None:
                daemon.kill()
                daemon.wait()
        return _judge(Path(folder) / "state" / decisions.FOLDER, known), busy_cores


def _others_cpu_s(daemon_pid: int) -> float:
    """CPU time used by all but the daemon with its engines, and this process."""
    return all_cpu_s() - tree_cpu_s(daemon_pid) - time.process_time()


def _config(folder: str, endpoint: str, policy: str) -> str:
    environ = ", ".join(f"{name} = {msgspec.json.encode(value).decode()}" for name, value in ENVIRON.items())
    args = "max_model_len = 2048, enforce_eager = true, kv_cache_memory_bytes = 268_435_456"
    ngram = 'speculative_config = { method = "ngram", num_speculative_tokens = 4, prompt_lookup_max = 4 }'
    engines = (
        ("bf16", 'precision = "bf16"\nprefix_caching = true', args),
        ("int8", f'precision = "int8"\nweights = "{INT8}"', args),
        ("ngram", 'precision = "bf16"\nspeculation = "ngram"', f"{args}, {ngram}"),
    )
    body = (
        f'[daemon]\ndrain_s = 5\nrun_dir = "{folder}/run"\nstate_dir = "{folder}/state"\n'
        f'[ingress.zmq]\nendpoints = ["{endpoint}"]\n[[model]]\nname = "{MODEL_NAME}"\npath = "{MODEL}"\n'
        f'[policy]\nname = "{policy}"\n[quality]\nungated = "allow"\n[telemetry]\nprobe = "none"\n'
    )
    for name, traits, arguments in engines:
        body += (
            f'[[engine]]\nname = "{name}"\nmodel = "{MODEL_NAME}"\n{traits}\nmax_num_seqs = 16\n'
            f"env = {{ {environ} }}\nargs = {{ {arguments} }}\n"
        )
    return body


def _wait_up(endpoint: str, daemon: subprocess.Popen[bytes], num_engines: int, log: Path) -> None:
    until_s = time.monotonic() + START_S
    while not Path(endpoint.removeprefix("ipc://")).exists():
        if daemon.poll() is not None or time.monotonic() > until_s:
            raise CannotMeasureError(f"the daemon did not start: {log.read_text()[-500:]}")
        time.sleep(0.2)
    with Client(endpoint, timeout_s=START_S) as client:
        while time.monotonic() < until_s and daemon.poll() is None:
            status = msgspec.convert(client.status(), DaemonStatus)
            if sum(engine.state == "up" for engine in status.engines) == num_engines:
                return
            time.sleep(0.5)
    raise CannotMeasureError(f"{num_engines} engines were not up within {START_S:g} s: {log.read_text()[-500:]}")


async def _fire(endpoint: str, load: Load, num_requests: int, seed: int) -> dict[str, bool]:
    """Send the plan; return for each request that was answered whether its length was known beforehand."""
    rng = Random(seed)
    shared = _text(rng, PREFIX_TOKENS)
    known: dict[str, bool] = {}
    async with AsyncClient(endpoint) as client, asyncio.TaskGroup() as running:
        began = time.monotonic()
        at_s = 0.0
        for number in range(num_requests):
            at_s += rng.expovariate(load.at(at_s))
            prompt, max_tokens, task = _draw(rng, number, shared)
            await asyncio.sleep(began + at_s - time.monotonic())
            ignore_eos = task is None
            running.create_task(_one(client, prompt, max_tokens, task, ignore_eos, known))
    return known


def _draw(rng: Random, number: int, shared: str) -> tuple[str, int, str | None]:
    """A prompt, its bound, and its task where the answer ends by itself: every second one does."""
    if number % 2:
        task = rng.choice(tasks.TASKS)
        problem = tasks.generate(task, rng.randint(1, 4), rng.randrange(10**6), num_shots=rng.choice((1, 8)))
        return problem.prompt, TASK_MAX_TOKENS, task
    family = rng.choice((*FAMILIES, "shared_prefix"))
    if family == "shared_prefix":
        return shared + _text(rng, 64), 48, None
    num_prompt_tokens, num_tokens = FAMILIES[family]
    return _text(rng, num_prompt_tokens), num_tokens, None


def _text(rng: Random, num_tokens: int) -> str:
    """Letters: the testbed's tokens are characters."""
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz0123456789=:+", k=num_tokens))


async def _one(
    client: AsyncClient, prompt: str, max_tokens: int, task: str | None, ignore_eos: bool, known: dict[str, bool]
) -> None:
    fields: dict[str, str] = {} if task is None else {"task": task}
    handle = client.submit(
        prompt,
        max_tokens=max_tokens,
        stream=False,
        sampling={"ignore_eos": ignore_eos, "temperature": 0.0},
        **fields,  # type: ignore[arg-type]
    )
    try:
        done = await handle.result(ANSWER_S)
    except RequestError as error:
        raise CannotMeasureError(f"a request failed: {error}") from error
    known[done.request_id] = ignore_eos


def _judge(folder: Path, known: dict[str, bool]) -> list[Judged]:
    """Decisions made after `NUM_TAUGHT` observations, with what came of them."""
    num_observed = 0
    late: set[str] = set()
    records = list(decisions.read(folder))
    for record in records:
        match record:
            case decisions.Observed():
                num_observed += 1
            case decisions.Decided() if num_observed >= NUM_TAUGHT:
                late.add(record.decision.decision_id)
            case _:
                pass
    judged = []
    for episode in decisions.episodes(iter(records)):
        decision, observed = episode.decided.decision, episode.observed
        if decision.decision_id in late and observed is not None and decision.request_id in known:
            since_ms = episode.decided.since_receipt_us * 1e-3
            judged.append(Judged(_chosen(decision), observed.observation, since_ms, known[decision.request_id]))
    if len(judged) < NUM_TAUGHT // 2:
        raise CannotMeasureError(f"only {len(judged)} decisions after {NUM_TAUGHT} of {num_observed} observations")
    return judged


def _chosen(decision: Decision) -> Candidate:
    return next(candidate for candidate in decision.candidates if candidate.mode == decision.mode)


# --- the simulated GPU -----------------------------------------------------------------------------------------------


def _energy_rows(options: Options, repeats: int) -> list[Row]:
    num_requests = int(options.scaled(4_000, 1_500))
    made = []
    for exact in (True, False):
        lengths = "known" if exact else "learnt"
        pooled: list[list[Judged]] = [[] for _ in range(repeats)]
        for utilisation in UTILISATIONS:
            runs = []
            for repeat in range(repeats):
                say(f"{TARGET}: simulated, lengths {lengths}, load {utilisation}, {repeat + 1} of {repeats}")
                runs.append(_world(repeat + 1, num_requests, utilisation, exact, "random"))
                pooled[repeat] += runs[-1]
            name = f"simulated GPU, load {utilisation}, lengths {lengths}: MAPE of energy"
            made += _rows(runs, [(name, lambda one: True, Judged.energy_error, None)])
            name = f"simulated GPU, load {utilisation}, lengths {lengths}: MAPE of E2EL"
            made += _rows(runs, [(name, lambda one: True, Judged.e2el_error, None)])
        name = f"simulated GPU, all loads, lengths {lengths}: MAPE of energy"
        made += _rows(pooled, [(name, lambda one: True, Judged.energy_error, BAR_ENERGY)])
    say(f"{TARGET}: simulated, policy cost")
    chosen = [
        [one for load in UTILISATIONS for one in _world(repeat + 1, num_requests, load, True, "cost")]
        for repeat in range(repeats)
    ]
    for told, error in (("energy", Judged.energy_error), ("E2EL", Judged.e2el_error)):
        name = f"simulated GPU, all loads, lengths known, policy cost: MAPE of {told}"
        made += _rows(chosen, [(name, lambda one: True, error, None)])
    return made


def _world(seed: int, num_requests: int, utilisation: float, exact: bool, policy: str) -> list[Judged]:
    weather = structs.replace(
        STEADY,
        rate_per_s=20.0,
        burst_factor=4.0,
        mean_prompt_tokens=300,
        exact_output=exact,
        utilisation=utilisation,
        policy=policy,
    )
    seen: list[tuple[Decision, Observation]] = []
    received_us: dict[str, int] = {}

    def make_scheduler(config: Config, rng: Random) -> Scheduler:
        scheduler = Scheduler.from_config(config, rng)
        handle = scheduler.handle

        def watched(event: Event) -> list[Command]:
            commands = handle(event)
            for command in commands:
                match command:
                    case c.Dispatch():
                        entry = scheduler.entry(command.request_id)
                        assert entry is not None, "dispatched what is not open"
                        received_us[command.decision.decision_id] = entry.request.received_us
                    case c.Observe():
                        seen.append((command.decision, command.observation))
                    case _:
                        pass
            return commands

        scheduler.handle = watched  # type: ignore[method-assign]
        return scheduler

    report = run_world(seed, num_requests, weather=weather, make_scheduler=make_scheduler)
    if not report.is_ok:
        raise CannotMeasureError(f"the world of seed {seed} broke")
    seen.sort(key=lambda pair: pair[0].t_us)
    return [
        Judged(_chosen(decision), observation, (decision.t_us - received_us[decision.decision_id]) * 1e-3, exact)
        for decision, observation in seen[len(seen) // 2 :]
    ]
