"""`msd explain`: why one request was sent to its mode, and whether the reasons held. Reads the decision log itself."""

from __future__ import annotations

import argparse

import msgspec

from msd import decisions
from msd.cli.decisions import Log, NotInLogError, add_log, predictions, signed, when
from msd.cli.options import Commands, add_json
from msd.cli.terminal import number, paint, table
from msd.decisions import Decided, Episode, Observed
from msd.domain import Candidate, Decision, Features, reasons_against
from msd.errors import EXIT_OK


def add_to(commands: Commands) -> None:
    """Add `explain` to the command line."""
    parser = commands.add_parser(
        "explain",
        help="why a request was sent to its mode, and what came of it",
        description="Show the decision of one request from the decision log: what was known of it, every candidate "
        "with its predictions or the reasons against it, the choice, and then what was measured. The daemon need not "
        "run. Exit 1 when the log does not know the request.",
    )
    parser.add_argument("request", metavar="REQUEST_ID", help="msd's id of the request, or the client's")
    add_log(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print every attempt of the request; exit 1 when there is none."""
    log = Log(options)
    episodes = find(log, options.request)
    log.tell_skipped()
    if not episodes:
        raise NotInLogError(
            f"no decision about request {options.request!r} in {log.folder}",
            remedy="it may not have been sent to a mode yet, or the oldest part of the log with it is gone; see --log",
        )
    if options.json:
        print(msgspec.json.encode({"attempts": [_plain(episode) for episode in episodes]}).decode())
    else:
        print("\n\n".join("\n".join(render(episode)) for episode in episodes))
    return EXIT_OK


def find(log: Log, wanted: str) -> list[Episode]:
    """Every attempt of the request with that id, of msd or of its client, oldest first."""
    decided: list[Decided] = []
    observed: dict[str, Observed] = {}
    for record in log.read(containing=decisions.needle(wanted)):
        match record:
            case Decided() if wanted in (record.decision.request_id, record.client_request_id):
                decided.append(record)
            case Observed() if record.request_id == wanted:
                observed[record.observation.decision_id] = record
    # An observation does not name the client's id: those are found in a second pass.
    for request_id in {d.decision.request_id for d in decided} - {wanted}:
        for record in log.read(containing=decisions.needle(request_id)):
            if isinstance(record, Observed) and record.request_id == request_id:
                observed[record.observation.decision_id] = record
    return [Episode(decided=d, observed=observed.get(d.decision.decision_id)) for d in decided]


def render(episode: Episode) -> list[str]:
    """One attempt as lines for a person."""
    decided = episode.decided
    decision = decided.decision
    names = f"client's id {decided.client_request_id}, tenant {decided.tenant}"
    lines = [
        paint(f"request {decision.request_id}, attempt {decision.attempt}", "bold") + f" ({names})",
        f"decided {when(decided.t_unix_us, date=True)} by policy {decision.policy}, "
        f"{decided.since_receipt_us * 1e-3:,.1f} ms after receipt",
        "",
        *_features(decision),
        "",
        *_candidates(decision),
        "",
        f"chosen: {paint(decision.mode, 'bold')}, because: {decision.reason}",
        _propensity(decision.propensity),
        "",
        *_measured(episode),
    ]
    return lines


def _features(decision: Decision) -> list[str]:
    f = decision.features
    view = decision.view
    rows = [
        ["prompt", f"{f.num_prompt_tokens:,} tokens" + (", likely shares a prefix" if f.shared_prefix else "")],
        [
            "output",
            f"{f.num_expected_tokens:,} tokens expected (nine in ten: at most {f.num_expected_tokens_p90:,}), "
            f"{f.max_tokens:,} allowed",
        ],
        ["task, class", f"{f.task or 'not named'}, {f.service_class}"],
        ["time left", _time_left(f)],
        ["load", f"{f.num_running:,} running, {f.num_waiting:,} waiting, KV memory {f.memory_pressure:.0%} in use"],
        ["arrivals", f"{f.arrivals_per_s:,.1f}/s, gaps vary by {f.arrival_cv:.2f} of their mean (1: at random)"],
    ]  # fmt: skip
    if f.session_arm >= 0:
        rows.append(["session", f"served last by {decision.candidates[f.session_arm].mode}"])
    if view is None or view.source == "none":
        rows.append(["GPU", "no view of it"])
    else:
        age_ms = None if f.view_age_us is None else f.view_age_us * 1e-3
        parts = [
            f"view {number(age_ms, 'ms', 0)} old" + (" (simulated)" if view.source == "simulated" else ""),
            "" if view.power_instant_w is None else f"{view.power_instant_w:,.0f} W drawn",
            "" if f.power_headroom_w is None else f"{f.power_headroom_w:,.0f} W below its limit",
        ]
        rows.append(["GPU", ", ".join(part for part in parts if part)])
    return [paint("what was known", "bold"), *(f"  {name:12} {text}" for name, text in rows)]


def _time_left(f: Features) -> str:
    bounds = [
        "no deadline" if f.slack_us is None else f"{f.slack_us * 1e-3:,.0f} ms to the deadline",
        "" if f.slo_ttft_ms is None else f"TTFT within {f.slo_ttft_ms:,.0f} ms",
        "" if f.slo_tpot_ms is None else f"TPOT within {f.slo_tpot_ms:,.1f} ms",
        f"waited {f.waited_us * 1e-3:,.1f} ms",
    ]
    return ", ".join(bound for bound in bounds if bound)


def _candidates(decision: Decision) -> list[str]:
    rows = [
        [
            f"{'>' if candidate.mode == decision.mode else ' '} {candidate.mode}",
            *_predicted(candidate),
            "; ".join(reasons_against(candidate.mask)),
        ]
        for candidate in decision.candidates
    ]
    head = [
        "  candidate", "TTFT ms", "of it wait", "TPOT ms", "E2EL ms", "delays others", "J", "cached", "running", "free",
        "why not",
    ]  # fmt: skip
    return table(head, rows, left=(0, 10))


def _predicted(c: Candidate) -> list[str]:
    return [
        number(c.ttft_ms), number(c.queue_ms), number(c.tpot_ms, digits=2), number(c.e2el_ms), number(c.delay_ms),
        number(None if c.energy_mj is None else c.energy_mj * 1e-3, digits=2), f"{c.num_cached_tokens:,}",
        str(c.num_running), str(c.num_free_slots),
    ]  # fmt: skip


def _propensity(propensity: float) -> str:
    if propensity >= 1.0:
        return "propensity 1: not drawn, the same again in the same state"
    return f"propensity {propensity:.3g}: drawn with this probability"


def _measured(episode: Episode) -> list[str]:
    if episode.observed is None:
        return ["nothing was measured: it has not ended (or its energy is not settled), or it ended without an answer"]
    seen = episode.observed.observation
    rows = [
        [f"  {p.name}, {p.unit}", number(p.predicted, digits=2), number(p.measured, digits=2), signed(p.error)]
        for p in predictions(episode)
    ]
    lines = table(["measured, from the decision on", "predicted", "measured", "off"], rows)
    met = {None: "", True: "; its SLOs were kept", False: "; its SLOs were missed"}[seen.slo_met]
    lines.append(f"it ended with {seen.finish_reason} after {seen.e2el_ms:,.1f} ms from receipt to the last token{met}")
    if seen.energy is not None:
        energy = seen.energy
        lines.append(
            f"energy {energy.energy_mj * 1e-3:,.2f} J = {energy.dynamic_mj * 1e-3:,.2f} J of its own (as above) + "
            f"{energy.static_mj * 1e-3:,.2f} J as its share of idle power ({energy.source})"
        )
    return lines


def _plain(episode: Episode) -> dict[str, object]:
    return {
        "decided": episode.decided,
        "observed": episode.observed,
        "why_not": {c.mode: reasons_against(c.mask) for c in episode.decided.decision.candidates if c.mask},
        "predictions": predictions(episode),
    }
