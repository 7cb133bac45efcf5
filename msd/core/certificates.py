"""Certificates: which mode may serve which task, and why not. Made from the gate file; live trials can only take away.

The words of `Standing`, from the best: `reference` (what others are compared with), `lossless` (computes what the
reference computes: no certificate needed), `certified`, `simulated` (an engine of filler, without a gate file),
`undecided`, `unmeasured`, `revoked` (by the gate), `withdrawn` (in production). The first four may serve.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from msgspec import Struct, structs

from msd.config import QualityConfig
from msd.domain import Mode, Request
from msd.gate import ALL_TASKS, GateFile, GateRow, Withdrawal
from msd.recipe import find_references

Standing = Literal["reference", "lossless", "certified", "simulated", "undecided", "unmeasured", "revoked", "withdrawn"]
MAY_SERVE: frozenset[Standing] = frozenset({"reference", "lossless", "certified", "simulated"})
REMEDY = "run `msd gate`"


class Certificate(Struct, frozen=True):
    """How one mode stands on one task; `reason` says in a few words why it may not serve, and is empty if it may."""

    standing: Standing
    reason: str = ""
    row: GateRow | None = None


class Summary(Struct, frozen=True):
    """One line on one mode."""

    serves: bool
    text: str


class Certificates:
    """Answers for every (mode, task). Modes are known by their place in the fleet, rows by the hash of their recipe."""

    def __init__(
        self,
        modes: Sequence[Mode],
        config: QualityConfig,
        gate: GateFile | None = None,
        recipes: Mapping[str, str] | None = None,
        withdrawn: Sequence[Withdrawal] = (),
    ) -> None:
        """`recipes`: of each mode by name (`msd.recipe.recipe_hashes`). `withdrawn`: by earlier runs of the daemon."""
        self._config = config
        self._gate = gate
        known = recipes or {}
        references = find_references(modes, config, gate, known)
        self._references = references.of_model
        marked = set(self._references.values())
        self.modes = tuple(structs.replace(mode, reference=arm in marked) for arm, mode in enumerate(modes))
        """As they were given, with the references marked."""
        self.reference = references.home
        """The mode that others are compared with; -1 when there is none here."""
        self.recipes = [known.get(mode.name, "") for mode in modes]
        self._rows = {(row.recipe, row.task): row for row in gate.rows} if gate is not None else {}
        self._measured = {row.mode for row in gate.rows} if gate is not None else set()
        self.tasks = sorted({row.task for row in gate.rows} - {ALL_TASKS}) if gate is not None else []
        self._home = (
            self.modes[self.reference].model if self.reference >= 0 else gate.model if gate is not None else None
        )
        self._misfit = self._find_misfit()
        self._withdrawn: dict[tuple[int, str], Withdrawal] = {}
        for one in withdrawn:
            for arm, recipe in enumerate(self.recipes):
                if gate is not None and one.gate == gate.checksum and one.recipe == recipe:
                    self._withdrawn[arm, one.task] = one

    # --- the questions -----------------------------------------------------------------------------------------------

    def refusal(self, arm: int, request: Request) -> str:
        """Why quality keeps the mode from serving the request; empty when it does not."""
        floor = request.quality_floor
        if floor is None:
            return self._uncertified(arm, request.task, request.model)
        if floor == 0:
            return ""
        accuracy = self.accuracy(arm, request.task)
        if accuracy is None:
            return "unknown"
        if accuracy < floor:
            return format(accuracy, ".3g")
        if self._withdrawal(arm, request.task) is not None and self._config.ungated == "mask":
            return self.of(arm, request.task).reason
        return ""

    def of(self, arm: int, task: str | None) -> Certificate:
        """How the mode stands on a task (None: on requests that name none), for requests of the reference's model."""
        mode = self.modes[arm]
        if arm == self.reference:
            return Certificate("reference", row=self._row(arm, task))
        if mode.lossless and mode.model == self._home:
            return Certificate("lossless", row=self._row(arm, task))
        if self._gate is None:
            if mode.simulated:
                return Certificate("simulated")
            return Certificate("unmeasured", f"not measured: there is no gate file ({REMEDY})")
        if self._misfit:
            return Certificate("unmeasured", self._misfit)
        row = self._rows.get((self.recipes[arm], task or ALL_TASKS))
        if row is None:
            return Certificate("unmeasured", self._unmeasured(arm, task))
        on = _on(row.task)
        gone = self._withdrawal(arm, task)
        if gone is not None:
            return Certificate("withdrawn", f"withdrawn in production {_on(gone.task)}after {_figures(gone)}", row)
        if row.verdict == "undecided":
            return Certificate("undecided", f"undecided {on}after {row.num_pairs:,} pairs ({REMEDY} with more)", row)
        revoked = row if row.verdict == "revoked" else self._revoked_somewhere(arm) if task is None else None
        if revoked is not None:
            lost = (
                f"revoked {_on(revoked.task)}at {revoked.difference * 100:+.1f} points in {revoked.num_pairs:,} pairs"
            )
            return Certificate("revoked", lost, row)
        return Certificate("certified", row=row)

    def accuracy(self, arm: int, task: str | None) -> float | None:
        """What the mode is known to reach in the task at least: the gate's lower bound, else as configured."""
        row = self._row(arm, task)
        return self.modes[arm].quality if row is None else row.accuracy_low

    def reference_for(self, request: Request) -> int:
        """The mode that serves when quality forbids all others: of the request's model, or -1."""
        if request.model is None or request.model == self._home:
            return self.reference
        return self._references.get(request.model, -1)

    def on_trial(self, arm: int, task: str | None) -> GateRow | None:
        """The row that a live pair of this mode on this task is held against; None: nothing to take away."""
        if self._gate is None or arm == self.reference:
            return None
        certificate = self.of(arm, task)
        return certificate.row if certificate.standing == "certified" else None

    def describe(self, arm: int) -> list[tuple[str, Certificate]]:
        """Every task of the gate file and `*`, with how the mode stands there."""
        return [(ALL_TASKS, self.of(arm, None)), *((task, self.of(arm, task)) for task in self.tasks)]

    def strangers(self) -> list[str]:
        """The rows that speak of no mode here, in words: per mode of the gate file one line."""
        if self._gate is None:
            return []
        if self._misfit:
            return [self._misfit]
        here = {mode.name for mode in self.modes}
        notes = dict[str, str]()
        for row in self._gate.rows:
            if row.recipe in self.recipes:
                continue
            known = row.mode in here
            notes[row.mode] = f"{row.mode}: " + (
                f"measured for another recipe ({REMEDY})" if known else "no engine has this name or this recipe"
            )
        return list(notes.values())

    def summary(self, arm: int) -> Summary:
        """How the mode stands in one line; it serves if it may serve any request without a floor."""
        described = self.describe(arm)
        overall = described[0][1]
        if self._config.ungated == "allow":
            return Summary(True, f"{overall.standing}; serves all the same: quality.ungated is allow")
        if overall.standing in ("reference", "lossless", "simulated"):
            return Summary(True, overall.standing)
        passed = [task for task, certificate in described[1:] if certificate.standing == "certified"]
        reasons = dict.fromkeys(certificate.reason for _, certificate in described if certificate.reason)
        if not reasons:
            return Summary(True, "certified")
        kept = f"certified for {', '.join(passed)} only; " if passed else ""
        return Summary(bool(passed), kept + "; ".join(reasons))

    def withdrawn(self, arm: int, task: str) -> Withdrawal | None:
        """What was withdrawn in production for exactly this task or `*`."""
        return self._withdrawn.get((arm, task))

    # --- live --------------------------------------------------------------------------------------------------------

    def withdraw(self, arm: int, task: str, num_pairs: int, difference: float, capital: float) -> Withdrawal:
        """The mode was found worse on the task (or `*`): it stays out until a new gate file certifies it again."""
        assert self._gate is not None, "nothing to withdraw"
        made = Withdrawal(
            mode=self.modes[arm].name,
            recipe=self.recipes[arm],
            task=task,
            gate=self._gate.checksum,
            num_pairs=num_pairs,
            difference=difference,
            capital=capital,
        )
        self._withdrawn[arm, task] = made
        return made

    # --- inside ------------------------------------------------------------------------------------------------------

    def _find_misfit(self) -> str:
        """Why the whole gate file says nothing about these modes; empty when it does."""
        gate = self._gate
        if gate is None or self.reference < 0 or self.recipes[self.reference] == gate.reference_recipe:
            return ""
        name = self.modes[self.reference].name
        return f"the gate file compares with another recipe than {name}'s ({REMEDY})"

    def _uncertified(self, arm: int, task: str | None, model: str | None) -> str:
        if self._config.ungated == "allow":
            return ""
        mode = self.modes[arm]
        if model is not None and model != self._home:
            # The gate file speaks of another model: among this one's modes, only what needs no certificate.
            if mode.lossless or (mode.simulated and self._gate is None):
                return ""
            return f"not compared with the reference of model {model}"
        return self.of(arm, task).reason

    def _row(self, arm: int, task: str | None) -> GateRow | None:
        """The mode's own row, or the reference's where it computes the same."""
        gate = self._gate
        if gate is None or self._misfit:
            return None
        found = self._rows.get((self.recipes[arm], task or ALL_TASKS))
        mode = self.modes[arm]
        if found is None and mode.lossless and mode.model == self._home:
            found = self._rows.get((gate.reference_recipe, task or ALL_TASKS))
        return found

    def _unmeasured(self, arm: int, task: str | None) -> str:
        recipe = self.recipes[arm]
        if any(known == recipe for known, _ in self._rows):
            return "not measured on requests without a task" if task is None else f"not measured on task {task!r}"
        if self.modes[arm].name in self._measured:
            return f"measured for another recipe: {REMEDY}"
        return f"not in the gate file: {REMEDY}"

    def _withdrawal(self, arm: int, task: str | None) -> Withdrawal | None:
        if not self._withdrawn:
            return None
        if task is not None:
            return self._withdrawn.get((arm, task))
        # Found worse anywhere, it is not good overall.
        return next((gone for (i, _), gone in self._withdrawn.items() if i == arm), None)

    def _revoked_somewhere(self, arm: int) -> GateRow | None:
        for task in self.tasks:
            row = self._rows.get((self.recipes[arm], task))
            if row is not None and row.verdict == "revoked":
                return row
        return None


def _on(task: str) -> str:
    return "" if task == ALL_TASKS else f"on {task} "


def _figures(gone: Withdrawal) -> str:
    return f"{gone.num_pairs:,} pairs ({gone.difference * 100:+.1f} points)"
