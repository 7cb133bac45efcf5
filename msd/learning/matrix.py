"""The published measurements (data/modeswitch): what each mode took on each workload family, and how to judge choices.

One NVIDIA A100 40 GB, vLLM 0.6.6, Llama-3.1-8B, one request at a time: nothing of it was measured by msd. With
L = latency and E = energy per token, speedup = L(fp16_baseline) / L(mode) and energy = E(mode) / E(fp16_baseline), per
family; all figures are means of these ratios over families (modeswitch spec, sections 3 and 4).
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Final

from msgspec import Struct

from msd.domain import Mode
from msd.errors import ConfigError

FOLDER: Final = Path(__file__).resolve().parent.parent / "data" / "modeswitch"
MATRIX_FILE: Final = "family_mode_matrix__run_20260508.csv"
ONLINE_FILE: Final = "online_controller__run_20260508.csv"
NUM_ROWS: Final = 73
NUM_LIVE_ROWS: Final = 11

REFERENCE: Final = "fp16_baseline"
"""Eager FP16: what the published figures compare with."""
GRAPHS: Final = "prefix_caching"
"""FP16 with CUDA graphs: on prompts that share nothing, that is all that this mode has."""
SHARED_PREFIX: Final = "shared_prefix_chat"
CACHED_TOKENS: Final = 1_430
"""Of the shared-prefix family's prompt, what a prefix cache holds."""

ACCURACY_DROP_MAX: Final = 1.5
ENERGY_RATIO_MAX: Final = 1.00
MEMORY_RATIO_MAX: Final = 1.02
ROUGE_DROP_MAX: Final = 0.02

MODES: Final = {
    mode.name: mode
    for mode in (
        Mode(name=REFERENCE, engine=REFERENCE, model="llama", precision="fp16", reference=True),
        Mode(name=GRAPHS, engine=GRAPHS, model="llama", precision="fp16", prefix_caching=True),
        Mode(name="int8_quant", engine="int8_quant", model="llama", precision="int8"),
        Mode(
            name="speculative_decoding",
            engine="speculative_decoding",
            model="llama",
            precision="fp16",
            speculation="draft",
        ),
        Mode(name="gptq_4bit", engine="gptq_4bit", model="llama", precision="int4"),
        Mode(
            name="gptq_plus_prefix_caching",
            engine="gptq_plus_prefix_caching",
            model="llama",
            precision="int4",
            prefix_caching=True,
        ),
    )
}
"""The modes that serve one request at a time, the reference first; the two batched ones are not comparable."""


class Cell(Struct, frozen=True, kw_only=True):
    """One family in one mode: means over its runs. Accuracy in per cent, ROUGE-L against a canned answer 0..1."""

    family: str
    mode: str
    num_nominal_tokens: int
    """The published controller's idea of the prompt: a target in words, and 512 for every benchmark."""
    num_prompt_tokens: int
    max_tokens: int
    batch_size: int
    latency_ms: float
    ttft_ms: float
    energy_per_token_j: float
    memory_mib: float
    num_output_tokens: float
    accuracy_pct: float | None
    rouge_l: float | None


class LiveRow(Struct, frozen=True, kw_only=True):
    """One family in the published controller's live run: the mode that it chose, ratios against eager FP16."""

    family: str
    mode: str
    latency_ms: float
    speedup: float
    energy_ratio: float
    memory_ratio: float
    accuracy_pct: float | None
    reference_accuracy_pct: float | None


class Means(Struct, frozen=True, kw_only=True):
    """Speedups and energy ratios against eager FP16; None where a family was not measured.

    `d6`: the six deployment families. `f11`: all eleven. `w605`: the source's own weights, a row per prompt variant of
    the six and one for each of the five. `graphs`: the six against FP16 with CUDA graphs.
    """

    d6_speedup: float
    d6_energy: float
    f11_speedup: float | None
    f11_energy: float | None
    w605_speedup: float | None
    w605_energy: float | None
    graphs_speedup: float
    graphs_energy: float


class Score(Struct, frozen=True, kw_only=True):
    """A policy's choices, judged by what was measured of them."""

    name: str
    means: Means
    violations: tuple[str, ...] | None
    """`family: what`; None where the question does not arise (an oracle without constraints, a batch of 4)."""
    modes: dict[str, str] = {}
    """The choice per family."""
    least_of_oracle: float | None = None
    """Least speedup of a family, relative to the oracle's within the same constraints."""
    regret: float | None = None
    """Mean over families of latency / the oracle's latency - 1."""
    oracle_match: float | None = None
    """Share of families in which the choice is the oracle's."""
    share_of_modes: dict[str, float] = {}
    note: str = ""


class Matrix:
    """The table of families and modes."""

    def __init__(self, cells: Iterable[Cell], live: Iterable[LiveRow], digest: str) -> None:
        self.cells = {(cell.family, cell.mode): cell for cell in cells}
        self.live = tuple(live)
        self.digest = digest
        """Hash of the files that it was read from."""
        self.families = tuple(dict.fromkeys(family for family, _ in self.cells))
        self.modes = tuple(dict.fromkeys(mode for _, mode in self.cells))
        self.deployment = tuple(f for f in self.families if self.cells[f, REFERENCE].accuracy_pct is None)
        """The families without a grader; the others are question sets with one."""

    def measured(self, family: str) -> tuple[str, ...]:
        """The comparable modes that have a row for this family, in the order of MODES."""
        return tuple(mode for mode in MODES if (family, mode) in self.cells)

    def speedup(self, family: str, mode: str, reference: str = REFERENCE) -> float:
        """How many times faster than the reference."""
        return self.cells[family, reference].latency_ms / self.cells[family, mode].latency_ms

    def energy_ratio(self, family: str, mode: str, reference: str = REFERENCE) -> float:
        """Energy per token, relative to the reference's."""
        return self.cells[family, mode].energy_per_token_j / self.cells[family, reference].energy_per_token_j

    def quality_fault(self, family: str, mode: str) -> str:
        """What the gate file holds against this mode here; empty: nothing. A cell that is missing counts as safe."""
        cell, base = self.cells[family, mode], self.cells[family, REFERENCE]
        if cell.accuracy_pct is not None and base.accuracy_pct is not None:
            drop = base.accuracy_pct - cell.accuracy_pct
            if drop > ACCURACY_DROP_MAX:
                return f"accuracy {-drop:+.0f}"
        if cell.rouge_l is not None and base.rouge_l is not None and base.rouge_l - cell.rouge_l > ROUGE_DROP_MAX:
            return f"ROUGE-L {cell.rouge_l - base.rouge_l:+.3f}"
        return ""

    def faults(self, family: str, mode: str) -> tuple[str, ...]:
        """Every constraint that the measured row breaks."""
        found = []
        if fault := self.quality_fault(family, mode):
            found.append(fault)
        if (energy := self.energy_ratio(family, mode)) > ENERGY_RATIO_MAX:
            found.append(f"energy x{energy:.2f}")
        memory = self.cells[family, mode].memory_mib / self.cells[family, REFERENCE].memory_mib
        if memory > MEMORY_RATIO_MAX:
            found.append(f"memory x{memory:.3f}")
        return tuple(found)

    def oracle(self, family: str, *, constrained: bool = True, without: str = "") -> str:
        """The mode of least latency, of those that break no constraint; `without`: none whose name begins so."""
        allowed = [mode for mode in self.measured(family) if not (without and mode.startswith(without))]
        if constrained:
            allowed = [mode for mode in allowed if not self.faults(family, mode)]
        return min(allowed, key=lambda mode: self.cells[family, mode].latency_ms)

    def pareto(self, family: str) -> tuple[str, ...]:
        """The modes that no other safe one beats in both latency and energy: an oracle of latency alone hides them."""
        safe = [mode for mode in self.measured(family) if not self.quality_fault(family, mode)]
        figures = {
            mode: (self.cells[family, mode].latency_ms, self.cells[family, mode].energy_per_token_j) for mode in safe
        }
        return tuple(
            mode
            for mode, (latency_ms, energy_j) in figures.items()
            if not any(
                other != mode and figures[other][0] <= latency_ms and figures[other][1] <= energy_j for other in safe
            )
        )

    def score(
        self, name: str, modes: Mapping[str, str], *, judged: bool = True, without: str = "", note: str = ""
    ) -> Score:
        """Judge one choice per family. `without`: the oracle that it is compared with does without those modes, too."""
        speedups = {family: self.speedup(family, mode) for family, mode in modes.items()}
        energies = {family: self.energy_ratio(family, mode) for family, mode in modes.items()}
        violations = tuple(
            f"{family}: {fault}" for family, mode in modes.items() for fault in self.faults(family, mode)
        )
        best = {family: self.oracle(family, without=without) for family in modes}
        ratios = [speedups[family] / self.speedup(family, best[family]) for family in modes]
        whole = len(modes) == len(self.families)
        compared = judged and whole
        return Score(
            name=name,
            means=self.means(speedups, energies),
            violations=violations if judged else None,
            modes=dict(modes),
            least_of_oracle=min(ratios) if compared else None,
            regret=fmean(1 / ratio - 1 for ratio in ratios) if compared else None,
            oracle_match=fmean(modes[family] == best[family] for family in modes) if compared else None,
            share_of_modes=_shares(modes.values()),
            note=note,
        )

    def means(self, speedups: Mapping[str, float], energies: Mapping[str, float]) -> Means:
        """Means of ratios per family; needs the deployment families at least."""
        six = self.deployment
        others = [family for family in self.families if family not in six]
        whole = all(family in speedups for family in others)

        def f11(ratios: Mapping[str, float]) -> float | None:
            return fmean(ratios[family] for family in self.families) if whole else None

        def w605(ratios: Mapping[str, float]) -> float | None:
            if not whole:
                return None
            total = 100 * sum(ratios[family] for family in six) + sum(ratios[family] for family in others)
            return total / (100 * len(six) + len(others))

        return Means(
            d6_speedup=fmean(speedups[family] for family in six),
            d6_energy=fmean(energies[family] for family in six),
            f11_speedup=f11(speedups),
            f11_energy=f11(energies),
            w605_speedup=w605(speedups),
            w605_energy=w605(energies),
            graphs_speedup=fmean(speedups[family] / self.speedup(family, GRAPHS) for family in six),
            graphs_energy=fmean(energies[family] / self.energy_ratio(family, GRAPHS) for family in six),
        )


def load(folder: Path = FOLDER) -> Matrix:
    """Read the two tables. Raises ConfigError: missing, or not those tables."""
    digest = hashlib.blake2b(digest_size=16)
    rows = {name: _read(folder / name, digest) for name in (MATRIX_FILE, ONLINE_FILE)}
    try:
        cells = [_cell(row) for row in rows[MATRIX_FILE]]
        live = [_live(row) for row in rows[ONLINE_FILE]]
        matrix = Matrix(cells, live, digest.hexdigest())
        if (len(matrix.cells), len(live)) != (NUM_ROWS, NUM_LIVE_ROWS):
            raise ValueError(f"{len(matrix.cells)} and {len(live)} rows, not {NUM_ROWS} and {NUM_LIVE_ROWS}")
        return matrix
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{folder}: not the published tables: {error!r}", remedy="install msd again") from error


def _read(file: Path, digest: hashlib.blake2b) -> list[dict[str, str]]:
    try:
        content = file.read_bytes()
        digest.update(content)
        return list(csv.DictReader(content.decode().splitlines()))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: {error}", remedy="install msd again") from error


def _cell(row: Mapping[str, str]) -> Cell:
    return Cell(
        family=row["workload_family"],
        mode=row["mode"],
        num_nominal_tokens=int(row["prompt_tokens_nominal"]),
        num_prompt_tokens=int(row["prompt_tokens_est"]),
        max_tokens=int(row["max_new_tokens"]),
        batch_size=int(row["num_requests_in_batch"]),
        latency_ms=float(row["latency_ms"]),
        ttft_ms=float(row["ttft_ms"]),
        energy_per_token_j=float(row["energy_per_token_j"]),
        memory_mib=float(row["peak_gpu_memory_mib"]),
        num_output_tokens=float(row["output_tokens_derived"]),
        accuracy_pct=_optional(row["accuracy_pct"]),
        rouge_l=_optional(row["reference_rouge_l"]),
    )


def _live(row: Mapping[str, str]) -> LiveRow:
    return LiveRow(
        family=row["workload_family"],
        mode=row["mode_selected"],
        latency_ms=float(row["latency_ms"]),
        speedup=float(row["latency_speedup"]),
        energy_ratio=float(row["energy_per_token_ratio"]),
        memory_ratio=float(row["memory_ratio"]),
        accuracy_pct=_optional(row["accuracy_pct"]),
        reference_accuracy_pct=_optional(row["fp16_accuracy_pct"]),
    )


def _optional(text: str) -> float | None:
    return float(text) if text else None


def _shares(modes: Iterable[str]) -> dict[str, float]:
    chosen = list(modes)
    return {mode: chosen.count(mode) / len(chosen) for mode in dict.fromkeys(chosen)}
