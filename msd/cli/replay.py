"""`msd replay`: what a policy would have chosen, over the published matrix or over our own decision log."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
from msgspec import structs

from msd import config as settings
from msd.cli import terminal
from msd.cli.options import Commands, add_json, load_config, natural
from msd.cli.terminal import DASH, table
from msd.errors import EXIT_NO, EXIT_OK, ConfigError

if TYPE_CHECKING:
    from msd.config import PolicyConfig
    from msd.decisions import Record
    from msd.domain import Mode
    from msd.learning.matrix import Matrix, Score
    from msd.learning.off_policy import Estimate, LogScore, LogSummary, Trial
    from msd.learning.replay import Gate
    from msd.ports import Policy

PUBLISHED: Final = (
    "PUBLISHED DATA, REPLAYED: one NVIDIA A100 40 GB, vLLM 0.6.6, Llama-3.1-8B (ModeSwitch-LLM, run_20260508); "
    "nothing here was measured by msd or on this host"
)
PROTOCOL: Final = (
    "cost and learned: leave one family out; no names; latency, TTFT and energy of the judged family are predicted "
    "from the others. Its quality cells are given to every policy as the gate file: quality violations test the "
    "plumbing, energy violations the estimator."
)
ROUNDING: Final = 0.55
"""Of a unit of the last digit: half of it, and what rounding twice adds."""
MATRIX_POLICIES: Final = ("cost", "learned", "rules", "fixed", "oracle")


def add_to(commands: Commands) -> None:
    """Add `replay` to the command line."""
    parser = commands.add_parser(
        "replay",
        help="let policies decide again: over the published matrix, or over our decision log",
        description="Without options: the whole comparison of the published ModeSwitch measurements, and `cost` by a "
        "protocol that hides the answers. With --log: any policy over the decisions that this daemon made. Speedups "
        "are means of ratios. Exit 1 when a figure is not what --expect says.",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--matrix", action="store_true", help="the published matrix (default)")
    source.add_argument("--log", metavar="DIR", help="our own decision log: its folder, or daemon.state_dir")
    parser.add_argument("--policy", metavar="NAME", help="only this policy (default: all)")
    parser.add_argument(
        "--gate",
        choices=("measured", "no_gptq"),
        help="matrix: which modes have passed, as measured or none of GPTQ (default: both)",
    )
    parser.add_argument("--router", metavar="FILE", help="a trained router for --policy learned")
    parser.add_argument("--config", metavar="FILE", help="take [policy] from this configuration")
    parser.add_argument("--seed", type=natural, default=0, metavar="N", help="of policies that draw (default 0)")
    parser.add_argument("--skip-corrupt", action="store_true", help="log: go on without lines that do not hold")
    parser.add_argument("--expect", metavar="FILE", help="matrix: figures (JSON) that must come out")
    add_json(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Replay and print."""
    return _log(options) if options.log else _matrix(options)


# --- the published matrix ---------------------------------------------------------------------------------------------


def _matrix(options: argparse.Namespace) -> int:
    from msd.learning import matrix as published

    if options.policy not in (None, *MATRIX_POLICIES):
        raise ConfigError(
            f"--policy {options.policy} cannot be replayed on the matrix", remedy=f"one of {', '.join(MATRIX_POLICIES)}"
        )
    matrix = published.load()
    config = _policy_config(options)
    parts = list(_parts(matrix, options, config))
    rows = [row for _, part in parts for row in part]
    moved = [] if options.expect is None else differences(Path(options.expect), rows)
    if options.json:
        plain = {
            "ok": not moved,
            "data": PUBLISHED,
            "protocol": PROTOCOL,
            "data_hash": matrix.digest,
            "rows": rows,
            "pareto": {family: matrix.pareto(family) for family in matrix.families},
            "moved": moved,
        }
        print(json.dumps(msgspec.to_builtins(plain), ensure_ascii=False))
    else:
        print("\n".join(_render(matrix, parts, whole=options.policy is None)))
        for line in moved:
            print(terminal.paint(f"MOVED: {line}", "red"))
    return EXIT_NO if moved else EXIT_OK


def _parts(
    matrix: Matrix, options: argparse.Namespace, config: PolicyConfig | None
) -> Iterator[tuple[str, list[Score]]]:
    """Headed groups of rows."""
    from msd.learning import replay

    policy = options.policy
    gates: tuple[Gate, ...] = ("measured", "no_gptq") if options.gate is None else (options.gate,)
    if policy not in ("cost", "learned"):
        rows = replay.table(matrix)
        if policy is not None:
            fixed = {*matrix.modes}
            rows = [row for row in rows if (row.name in fixed if policy == "fixed" else row.name.startswith(policy))]
        yield "speedup and energy against eager FP16, means of ratios", rows
    for gate in gates:
        title = "the gate as measured" if gate == "measured" else "no GPTQ mode has passed the gate"
        rows = []
        if policy in (None, "cost"):
            rows += _cost_rows(matrix, gate, config)
        if policy == "learned":
            rows += _learned_rows(matrix, gate, config, options.router)
        if rows:
            yield f"held-out families, {title}", [*rows, *replay.behind_the_mask(matrix, gate)]


def _cost_rows(matrix: Matrix, gate: Gate, config: PolicyConfig | None) -> list[Score]:
    from msd.learning import replay

    if config is not None:
        return [replay.cost(matrix, gate=gate, config=config.cost)]
    return [
        replay.cost(matrix, gate=gate),
        replay.cost(matrix, gate=gate, revealed=True),
        replay.cost(matrix, gate=gate, known_lengths=False),
    ]


def _learned_rows(matrix: Matrix, gate: Gate, config: PolicyConfig | None, router: str | None) -> list[Score]:
    from msd.learning import replay

    file = router or (config.learned.file if config else "")
    if file:
        from msd import router_file
        from msd.learning.matrix import MODES
        from msd.policy.learned import Learned

        known = router_file.load(Path(file))
        policy = Learned.of(known, list(MODES.values()))
        held_out = known.data_hash != matrix.digest
        return [replay.policy(matrix, f"learned: {known.kind}", policy, gate, trained_on_these=not held_out)]
    from msd.learning.router_training import held_out_matrix
    from msd.router_file import KINDS

    return [held_out_matrix(matrix, kind, gate=gate) for kind in KINDS]


def _render(matrix: Matrix, parts: Sequence[tuple[str, list[Score]]], *, whole: bool) -> list[str]:
    lines = [terminal.paint(PUBLISHED, "yellow"), ""]
    for title, rows in parts:
        is_protocol = title.startswith("held-out")
        lines += [title, *(_held_out_table(rows) if is_protocol else _published_table(rows)), ""]
    if any(title.startswith("held-out") for title, _ in parts):
        lines += [PROTOCOL, ""]
    if whole:
        lines += ["modes that no safe other beats in both latency and energy", *_pareto_table(matrix)]
    return lines


def _published_table(rows: Sequence[Score]) -> list[str]:
    head = ["", "D6", "energy", "F11", "energy", "W605", "energy", "D6/graphs", "energy", "violations"]
    return table(
        head,
        [
            [
                row.name,
                *(_figure(figure) for figure in structs.astuple(row.means)),
                _violations(row),
            ]
            for row in rows
        ],
        left=(0, 9),
    )


def _held_out_table(rows: Sequence[Score]) -> list[str]:
    head = ["", "D6", "energy", "F11", "energy", "least/oracle", "regret", "oracle match", "violations", ""]
    return table(
        head,
        [
            [
                row.name,
                *(
                    _figure(figure)
                    for figure in (
                        row.means.d6_speedup, row.means.d6_energy, row.means.f11_speedup, row.means.f11_energy,
                        row.least_of_oracle,
                    )
                ),
                _share(row.regret),
                _share(row.oracle_match),
                _violations(row),
                row.note,
            ]
            for row in rows
        ],
        left=(0, 8, 9),
    )  # fmt: skip


def _pareto_table(matrix: Matrix) -> list[str]:
    return table(
        ["family", "modes, fastest first"],
        [
            [
                family,
                ", ".join(sorted(matrix.pareto(family), key=lambda mode: matrix.cells[family, mode].latency_ms)),
            ]
            for family in matrix.families
        ],
        left=(0, 1),
    )


def _violations(row: Score) -> str:
    if row.violations is None:
        return row.note or DASH
    told = "; ".join(violation.replace("_eval", "") for violation in row.violations) or "0"
    return f"{told} ({row.note})" if row.note and row.least_of_oracle is None else told


def differences(file: Path, rows: Sequence[Score]) -> list[str]:
    """Where `rows` are not what the file says. A figure there is a string: its digits say how exactly it is meant.

    Raises ConfigError: no such file, or not one of figures.
    """
    try:
        expected = msgspec.json.decode(file.read_bytes(), type=dict[str, dict[str, str | list[str]]])
        figures = {name: _expected(cells) for name, cells in expected.items()}
    except OSError as error:
        raise ConfigError(f"--expect {file}: {error.strerror}", remedy="name a file of figures") from error
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(
            f"--expect {file}: {error}", remedy='it holds {"row": {"d6_speedup": "2.389", "violations": ["family"]}}'
        ) from error
    by_name = {row.name: row for row in rows}
    found = []
    for name, cells in figures.items():
        row = by_name.get(name)
        if row is None:
            found.append(f"{name}: no such row")
            continue
        families = sorted({violation.split(":")[0] for violation in row.violations or ()})
        means = structs.asdict(row.means)
        for cell, (wanted, within) in cells.items():
            is_value = means.get(cell)
            if isinstance(wanted, list):
                if families != sorted(wanted):
                    found.append(f"{name}: violations in {families}, not {sorted(wanted)}")
            elif is_value is None or abs(is_value - wanted) > within:
                found.append(f"{name}: {cell} is {_figure(is_value, 4)}, not {wanted}")
    return found


def _expected(cells: Mapping[str, str | list[str]]) -> dict[str, tuple[float | list[str], float]]:
    """Figures with how far off they may be."""
    return {
        cell: (wanted, 0.0)
        if isinstance(wanted, list)
        else (float(wanted), ROUNDING * 10.0 ** -len(wanted.partition(".")[2]))
        for cell, wanted in cells.items()
    }


# --- our own decision log ---------------------------------------------------------------------------------------------


def _log(options: argparse.Namespace) -> int:
    from msd.learning import off_policy

    config = _policy_config(options)
    log = read_log(options.log, skip_corrupt=options.skip_corrupt)
    summary = off_policy.summarise(log)
    rows = [
        off_policy.evaluate(name, make, log, options.seed)
        for name, make in _log_policies(summary, options.policy, config, options.router)
    ]
    if options.json:
        print(json.dumps(msgspec.to_builtins({"ok": True, "log": summary, "rows": rows}), ensure_ascii=False))
    else:
        print("\n".join(_render_log(options.log, summary, rows)))
    return EXIT_OK


def read_log(folder: str, *, skip_corrupt: bool) -> list[Trial]:
    """The decisions in a log. Raises ConfigError: none there; CorruptDecisionLogError: a line does not hold."""
    from msd import decisions
    from msd.learning import off_policy

    given = Path(folder)
    place = given if decisions.files(given) else given / decisions.FOLDER
    if not decisions.files(place):
        raise ConfigError(
            f"there is no decision log in {given}",
            remedy="name daemon.state_dir of a daemon that has served requests (telemetry.decision_log = true)",
        )
    num_corrupt = 0

    def note(error: decisions.CorruptDecisionLogError) -> None:
        nonlocal num_corrupt
        num_corrupt += 1

    records: Iterator[Record] = decisions.read(place, on_corrupt=note if skip_corrupt else None)
    log = list(off_policy.trials(records))
    if num_corrupt:
        terminal.complain(f"{num_corrupt} lines of {place} do not hold and were left out")
    return log


def _log_policies(
    summary: LogSummary, only: str | None, config: PolicyConfig | None, router: str | None
) -> Iterator[tuple[str, Callable[[Sequence[Mode]], Policy] | None]]:
    """Names and makers of the policies to replay; the maker of what was logged is None."""
    from msd.config import POLICY_NAMES, LearnedConfig, PolicyConfig
    from msd.policy import make_policy
    from msd.policy.oracle import Oracle

    base = config or PolicyConfig()
    if router:
        base = structs.replace(base, learned=LearnedConfig(file=router))

    def maker(name: str, mode: str = "") -> Callable[[Sequence[Mode]], Policy]:
        named = structs.replace(base, name=name, mode=mode)
        if name == "oracle":
            return lambda modes: Oracle(named, modes)
        return lambda modes: make_policy(named, modes)

    if only is not None and only not in (*POLICY_NAMES, "oracle", "logged"):
        raise ConfigError(f"no policy {only!r}", remedy=f"one of {', '.join((*POLICY_NAMES, 'oracle', 'logged'))}")
    yield "logged", None
    if only in (None, "fixed"):
        for mode in summary.modes:
            yield f"fixed on {mode}", maker("fixed", mode)
    others = ("random", "round_robin", "rules", "cost", *(["learned"] if base.learned.file else []), "oracle")
    for name in others if only is None else (only,):
        if name not in ("fixed", "logged"):
            yield name, maker(name)


def _render_log(folder: str, summary: LogSummary, rows: Sequence[LogScore]) -> list[str]:
    simulated = (
        terminal.paint("SIMULATED engines", "yellow") + ": these are not figures of a machine; "
        if (summary.simulated)
        else ""
    )
    lines = [
        f"decision log {folder}: {simulated}{summary.num_decisions:,} decisions by {', '.join(summary.policies)}, "
        f"{summary.num_observed:,} with an answer measured, {summary.num_hinted:,} asked for by producers and left out",
        "",
        "predicted by the estimates that each decision logged, against the reference mode, means of ratios",
        *table(
            ["policy", "speedup", "energy", "regret", "oracle match", "energy over", "SLO missed", "agrees", "modes"],
            [
                [
                    row.name, _figure(row.speedup), _figure(row.energy_ratio), _share(row.regret),
                    _share(row.oracle_match), f"{row.num_energy_violations:,}", f"{row.num_slo_violations:,}",
                    _share(row.matched_share),
                    ", ".join(f"{mode} {share:.0%}" for mode, share in row.share_of_modes.items()),
                ]
                for row in rows
            ],
            left=(0, 8),
        ),
        "",
    ]  # fmt: skip
    if not summary.drawing:
        return [
            *lines,
            "The policy that made this log does not draw (propensity 1): of decisions that differ, nothing was "
            "measured. So there is no estimate from measured outcomes, only the share that agrees. "
            'Serve for a while with policy.name = "random" to have one.',
        ]
    return [
        *lines,
        f"estimated from what was measured of decisions by {', '.join(summary.drawing)}, weighted by 1 / propensity "
        "(SNIPS; in brackets IPS, effective samples)",
        *table(
            ["policy", "E2EL ms", "energy mJ", "SLO kept", "mean weight"],
            [
                [row.name, _estimate(row.e2el_ms), _estimate(row.energy_mj), _estimate(row.slo_met, 3),
                 _figure(row.mean_weight, 2)]
                for row in rows
            ],
        ),
        "A mean weight far from 1: this policy does what was hardly ever tried.",
    ]  # fmt: skip


def _estimate(estimate: Estimate | None, digits: int = 1) -> str:
    if estimate is None:
        return DASH
    return f"{estimate.snips:,.{digits}f} ({estimate.ips:,.{digits}f}, {estimate.effective_samples:,.0f})"


# --- both ------------------------------------------------------------------------------------------------------------


def _policy_config(options: argparse.Namespace) -> PolicyConfig | None:
    """[policy] of the configuration that was named; None: none was."""
    if options.config is None:
        return None
    from msd import router_file

    file = settings.find(options.config)
    return router_file.anchored(load_config(file), file.parent).policy


def _figure(value: float | None, digits: int = 3) -> str:
    return DASH if value is None else f"{value:.{digits}f}"


def _share(value: float | None) -> str:
    return DASH if value is None else f"{value:.1%}"
