"""A synthetic load whose energy is known per request, told to a ledger as a daemon would hear of it (energy spec).

Simulated: engines that batch continuously, each step with its energy and 3 % noise; a counter in whole millijoules that
steps every 20 or 100 ms with its own phase and is read 20 times a second; progress told every 50 ms, first tokens and
ends at once. Engines run beside each other at their own speed; power ramps and sensor lag are not modelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from random import Random

from msgspec import Struct

from msd.config import EnergyConfig
from msd.core.energy_domain import Coefficients
from msd.core.ledger import Ledger
from msd.domain import CounterReading
from msd.learning.energy_model import FIT_EVERY_S, EnergyModel, Fit

TRUTH = {"fp16": Coefficients(4_000.0, 10.0, 100.0), "int4": Coefficients(1_600.0, 12.0, 90.0)}
ALL_ONES = {mode: Coefficients(1.0, 1.0, 1.0) for mode in TRUTH}
IDLE_W = 75.0
LEAD_US = 12_000_000
"""Calm before the load: the ledger learns the idle power in it, as in a daemon whose engines have just come up."""
READ_EVERY_US = TELL_EVERY_US = 50_000
STEP_US = {"fp16": 25_000, "int4": 14_000}
PREFILL_US_PER_TOKEN, DECODE_US_PER_REQUEST = 60, 300
MAX_BATCH = 32
ENERGY_NOISE = 0.03
ARRIVAL_SHAPE = 0.5
MEDIAN_PROMPT, MEDIAN_OUTPUT, SPREAD = 245, 90, 0.7
DOMAIN = "sim:0"


class KnownLoad(Struct, frozen=True):
    """What happened: news in order of time, and what each request took in truth (dynamic mJ)."""

    news: list[tuple[int, int, str, str, int]]
    """(us, order, what, request id, number); what: start, first, token, end."""
    true_mj: dict[str, float]
    mode_of: dict[str, str]
    start_us: dict[str, int]
    readings: list[tuple[int, int]]
    """(us, mJ) as sampled."""


class Accuracy(Struct, frozen=True):
    """How well a ledger charged a known load, as shares of the true energy.

    `wape`: sum of absolute errors per request; `bias`: the worst mode's error in sum.
    """

    wape: float
    bias: float
    num_requests: int
    fit: Fit | None


def make_load(seed: int, modes: Sequence[str], duration_s: float, counter_step_us: int, rate_per_s: float) -> KnownLoad:
    """Serve Gamma arrivals of lognormal lengths on each of `modes` for `duration_s`, and until all is done."""
    rng = Random(seed)
    news: list[tuple[int, int, str, str, int]] = []
    true_mj: dict[str, float] = {}
    mode_of: dict[str, str] = {}
    start_us: dict[str, int] = {}
    steps: list[tuple[int, int, float]] = []
    for mode in modes:
        costs = TRUTH[mode]
        arrivals: list[tuple[int, str, int, int]] = []
        t_us = float(LEAD_US)
        while t_us < LEAD_US + duration_s * 1e6:
            t_us += rng.gammavariate(ARRIVAL_SHAPE, 1 / (ARRIVAL_SHAPE * rate_per_s)) * 1e6
            prompt = max(1, int(rng.lognormvariate(log(MEDIAN_PROMPT), SPREAD)))
            output = max(2, int(rng.lognormvariate(log(MEDIAN_OUTPUT), SPREAD)))
            arrivals.append((int(t_us), f"{mode}-{len(arrivals):05}", prompt, output))
        arrivals.reverse()
        running: dict[str, list[int]] = {}
        now_us = 0
        told_us = full_until_us = 0
        while arrivals or running:
            if not running:
                now_us = max(now_us, arrivals[-1][0])
            members = list(running)
            noise = rng.gauss(1.0, ENERGY_NOISE)
            duration_us = STEP_US[mode] + DECODE_US_PER_REQUEST * len(members)
            energy_mj = costs.step_mj + costs.decode_mj_per_token * len(members)
            prefills: dict[str, float] = {}
            while arrivals and arrivals[-1][0] <= now_us and len(running) < MAX_BATCH:
                arrived_us, request_id, prompt, output = arrivals.pop()
                # It is sent to the engine when there is a slot, and begins with the engine's next step.
                sent_us = max(arrived_us, full_until_us)
                news.append((sent_us, 2, "start", request_id, prompt))
                start_us[request_id], mode_of[request_id] = sent_us, mode
                running[request_id] = [0, output]
                prefills[request_id] = costs.prefill_mj_per_token * prompt
                energy_mj += prefills[request_id]
                duration_us += PREFILL_US_PER_TOKEN * prompt
                true_mj[request_id] = 0.0
            for request_id in running:
                own_mj = prefills.get(request_id, costs.decode_mj_per_token)
                true_mj[request_id] += noise * (own_mj + costs.step_mj / len(running))
            steps.append((now_us, now_us + duration_us, energy_mj * noise))
            now_us += duration_us
            if len(running) >= MAX_BATCH:
                full_until_us = now_us
            tells = now_us - told_us >= TELL_EVERY_US
            for request_id, done in list(running.items()):
                done[0] += 1
                if done[0] == 1:
                    news.append((now_us, 0, "first", request_id, 1))
                elif done[0] >= done[1]:
                    news.append((now_us, 1, "end", request_id, done[0]))
                    del running[request_id]
                elif tells:
                    news.append((now_us, 0, "token", request_id, done[0]))
            if tells:
                told_us = now_us
    news.sort()
    readings = _count(steps, counter_step_us, rng.randrange(counter_step_us), rng.randrange(READ_EVERY_US))
    return KnownLoad(news, true_mj, mode_of, start_us, readings)


def _count(steps: list[tuple[int, int, float]], step_us: int, phase_us: int, first_us: int) -> list[tuple[int, int]]:
    """The counter as sampled: it takes the sum of power at its own steps, in whole millijoules."""
    end_us = max(end for _, end, _ in steps) + 10_000_000
    drawn = [0.0] * (end_us // step_us + 3)
    for start, end, energy_mj in steps:
        at_us = start
        while at_us < end:
            slot = (at_us - phase_us) // step_us + 1
            until_us = min(end, slot * step_us + phase_us)
            drawn[slot] += energy_mj * (until_us - at_us) / (end - start)
            at_us = until_us
    shown: list[int] = []
    total_mj = 0.0
    for slot, energy_mj in enumerate(drawn):
        total_mj += energy_mj + IDLE_W * (step_us if slot else phase_us) / 1_000
        shown.append(int(total_mj))
    readings = []
    for at_us in range(first_us, end_us, READ_EVERY_US):
        last_tick = (at_us - phase_us) // step_us
        readings.append((at_us, shown[last_tick] if last_tick >= 0 else 0))
    return readings


def charge(
    load: KnownLoad,
    *,
    priors: dict[str, Coefficients],
    learns: bool,
    hears_progress: bool = True,
    stated_idle_w: float | None = None,
    judged_from_s: float = 0.0,
    judged_until_s: float = float("inf"),
) -> Accuracy:
    """Tell a ledger of the load, fit every ten seconds if it `learns`, and compare what it charged with the truth.

    Judged are the requests that started between the two moments, counted from the first arrival. Without
    `hears_progress` only first tokens and ends are told. `stated_idle_w`: the idle power that the ledger is told; None
    lets it learn.
    """
    ledger = Ledger(EnergyConfig(), priors)
    model = EnergyModel(priors)
    charged: dict[str, int] = {}
    next_fit_us = LEAD_US + int(FIT_EVERY_S * 1e6)
    fit: Fit | None = None
    news = [(*item, 0) for item in load.news]
    news += [(t_us, 3, "read", "", 0, energy_mj) for t_us, energy_mj in load.readings]
    ledger.resident(sorted(set(load.mode_of.values())))
    for t_us, _, what, request_id, number, energy_mj in sorted(news):
        match what:
            case "start":
                ledger.started(t_us, request_id, load.mode_of[request_id], number)
            case "first":
                ledger.first_token(t_us, request_id, 0)
            case "token":
                if hears_progress:
                    ledger.progress(t_us, request_id, number)
            case "end":
                ledger.ended(t_us, request_id, "requests", "", "t", number)
            case _:
                reading = CounterReading(
                    domain=DOMAIN, t_us=t_us, energy_mj=energy_mj, source="simulated", idle_w=stated_idle_w
                )
                for settled_id, energy in ledger.counter(reading):
                    charged[settled_id] = energy.dynamic_mj
                if t_us >= next_fit_us:
                    next_fit_us += int(FIT_EVERY_S * 1e6)
                    equations = ledger.take_equations()
                    if learns and (fit := model.fit(equations) or fit) is not None:
                        ledger.fitted(fit.coefficients)
    assert set(charged) == set(load.true_mj), "a request was not settled"
    assert all(accounts.residue_mj == 0 for accounts in ledger.accounts())
    first_us, last_us = LEAD_US + judged_from_s * 1e6, LEAD_US + judged_until_s * 1e6
    judged = [name for name, t_us in load.start_us.items() if first_us <= t_us < last_us]
    errors = {name: charged[name] - load.true_mj[name] for name in judged}
    wape = sum(abs(error) for error in errors.values()) / sum(load.true_mj[name] for name in judged)
    biases = []
    for mode in sorted(set(load.mode_of.values())):
        of_mode = [name for name in judged if load.mode_of[name] == mode]
        true_mj = sum(load.true_mj[name] for name in of_mode)
        biases.append(abs(sum(errors[name] for name in of_mode)) / true_mj if true_mj else 0.0)
    return Accuracy(wape, max(biases), len(judged), fit)
