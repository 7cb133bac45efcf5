"""Who may serve what: every standing, every reason, floors, models, and what production took away."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest

from msd.cli.gate import find_reference
from msd.config import QualityConfig
from msd.core.certificates import Certificates
from msd.domain import Mode, Request
from msd.gate import ALL_TASKS, GateFile, Withdrawal
from msd.policy.cost import reference_arms
from tests.unit.core_world import CoreWorld, gate_of, make_config

REFERENCE = Mode(name="m0", engine="m0", model="toy", lossless=True)
INT8 = Mode(name="m1", engine="m1", model="toy", precision="int8")
GRAPHS = Mode(name="m2", engine="m2", model="toy", lossless=True)
SMALL = Mode(name="m3", engine="m3", model="other", lossless=True)
SIMULATED = Mode(name="m1", engine="m1", model="toy", precision="int8", simulated=True)


def request_of(**fields: object) -> Request:
    known: dict[str, object] = {
        "request_id": "r",
        "client_request_id": "r",
        "tenant": "t",
        "content_hash": b"",
        "received_us": 0,
        "num_prompt_tokens": 1,
        "max_tokens": 1,
    }
    return Request(**{**known, **fields})  # type: ignore[arg-type]


def certificates(
    modes: Sequence[Mode],
    gate: GateFile | None = None,
    *,
    recipes: dict[str, str] | None = None,
    withdrawn: Sequence[Withdrawal] = (),
    **quality: object,
) -> Certificates:
    config = msgspec.convert(quality, QualityConfig)
    return Certificates(modes, config, gate, recipes or {mode.name: mode.name for mode in modes}, withdrawn)


# --- without a gate file ---------------------------------------------------------------------------------------------


def test_without_a_gate_file_only_lossless_modes_of_real_engines_serve() -> None:
    known = certificates([REFERENCE, INT8, GRAPHS])
    assert [known.refusal(arm, request_of()) for arm in range(3)] == [
        "",
        "not measured: there is no gate file (run `msd gate`)",
        "",
    ]
    assert [known.summary(arm).text for arm in (0, 2)] == ["reference", "lossless"]
    assert not known.summary(1).serves


def test_without_a_gate_file_simulated_engines_serve_and_are_called_so() -> None:
    known = certificates([REFERENCE, SIMULATED])
    assert known.refusal(1, request_of()) == ""
    assert known.of(1, None).standing == "simulated"


def test_with_a_gate_file_simulated_engines_are_gated_too() -> None:
    known = certificates([REFERENCE, SIMULATED], gate_of({"m1": {"copy": "revoked", "*": "revoked"}}))
    assert "revoked" in known.refusal(1, request_of(task="copy"))


def test_the_operator_may_allow_what_has_not_passed() -> None:
    known = certificates([REFERENCE, INT8], ungated="allow")
    assert known.refusal(1, request_of()) == ""
    assert "allow" in known.summary(1).text


# --- with one --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "why"),
    [
        ("copy", ""),
        ("sort", "revoked on sort at -3.0 points in 1,000 pairs"),
        ("add", "undecided on add after 1,000 pairs (run `msd gate` with more)"),
        ("chat", "not measured on task 'chat'"),
        (None, "revoked on sort at -3.0 points in 1,000 pairs"),
    ],
)
def test_a_certificate_is_for_a_task(task: str | None, why: str) -> None:
    verdicts = {"m1": {"copy": "certified", "sort": "revoked", "add": "undecided", "*": "certified"}}
    known = certificates([REFERENCE, INT8], gate_of(verdicts))  # type: ignore[arg-type]
    assert known.refusal(1, request_of(task=task)) == why
    assert known.refusal(0, request_of(task=task)) == ""


def test_requests_without_a_task_need_all_tasks_together_and_none_revoked() -> None:
    assert (
        certificates([REFERENCE, INT8], gate_of({"m1": {"copy": "undecided", "*": "certified"}})).refusal(
            1, request_of()
        )
        == ""
    )
    undecided = certificates([REFERENCE, INT8], gate_of({"m1": {"copy": "certified", "*": "undecided"}}))
    assert "undecided" in undecided.refusal(1, request_of())


def test_a_row_of_another_recipe_does_not_count_and_is_named() -> None:
    gate = gate_of({"m1": {"copy": "certified", "*": "certified"}})
    known = certificates([REFERENCE, INT8], gate, recipes={"m0": "m0", "m1": "changed"})
    assert known.refusal(1, request_of(task="copy")) == "measured for another recipe: run `msd gate`"
    assert known.strangers() == ["m1: measured for another recipe (run `msd gate`)"]


def test_a_row_counts_for_whoever_has_its_recipe_whatever_the_name() -> None:
    gate = gate_of({"old name": {"copy": "certified", "*": "certified"}})
    known = certificates([REFERENCE, INT8], gate, recipes={"m0": "m0", "m1": "old name"})
    assert known.refusal(1, request_of(task="copy")) == ""


def test_rows_for_modes_that_are_not_here_are_named() -> None:
    known = certificates([REFERENCE], gate_of({"gone": {"*": "certified"}}))
    assert known.strangers() == ["gone: no engine has this name or this recipe"]


def test_a_file_with_another_reference_says_nothing() -> None:
    gate = gate_of({"m1": {"*": "certified"}})
    known = certificates([REFERENCE, INT8], gate, recipes={"m0": "other weights", "m1": "m1"})
    assert known.refusal(1, request_of()) == "the gate file compares with another recipe than m0's (run `msd gate`)"
    assert known.refusal(0, request_of()) == ""


# --- models ----------------------------------------------------------------------------------------------------------


def test_a_request_that_names_a_model_is_compared_within_it() -> None:
    known = certificates([REFERENCE, INT8, SMALL], gate_of({"m1": {"*": "certified"}, "m3": {"*": "revoked"}}))
    assert known.refusal(2, request_of(model="other")) == "", "its own full-precision mode"
    assert known.refusal(1, request_of(model="toy")) == ""


def test_another_models_mode_needs_a_certificate_where_no_model_is_named() -> None:
    assert "not measured" in certificates([REFERENCE, SMALL]).refusal(1, request_of())
    gate = gate_of({"m3": {"copy": "certified", "sort": "revoked", "*": "revoked"}})
    known = certificates([REFERENCE, SMALL], gate)
    assert known.refusal(1, request_of(task="copy")) == ""
    assert "revoked" in known.refusal(1, request_of(task="sort"))


def test_a_lossy_mode_of_another_model_has_nobody_to_be_compared_with() -> None:
    small8 = Mode(name="m4", engine="m4", model="other", precision="int8")
    known = certificates([REFERENCE, SMALL, small8], gate_of({"m4": {"*": "certified"}}))
    assert known.refusal(2, request_of(model="other")) == "not compared with the reference of model other"


# --- floors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("floor", "why"), [(0.0, ("", "")), (0.9, ("", "")), (0.95, ("", "0.9")), (0.98, ("0.97", "0.9"))]
)
def test_a_floor_is_held_against_the_lower_bound(floor: float, why: tuple[str, str]) -> None:
    known = certificates([REFERENCE, INT8], gate_of({"m1": {"copy": "revoked", "*": "revoked"}}))
    asked = request_of(task="copy", quality_floor=floor)
    assert (known.refusal(0, asked), known.refusal(1, asked)) == why


def test_lossless_modes_reach_what_the_reference_reaches() -> None:
    known = certificates([REFERENCE, GRAPHS], gate_of({}))
    assert known.accuracy(1, None) == 0.97


def test_a_stated_accuracy_counts_only_where_none_is_measured() -> None:
    stated = msgspec.structs.replace(INT8, quality=0.95)
    gate = gate_of({"m1": {"copy": "revoked"}}, accuracy_low=0.1)
    known = certificates([REFERENCE, stated], gate)
    assert known.refusal(1, request_of(task="copy", quality_floor=0.9)) == "0.1", "measured, whatever was stated"
    assert known.refusal(1, request_of(task="chat", quality_floor=0.9)) == "", "nothing was measured there"
    anew = certificates([REFERENCE, stated], gate, recipes={"m0": "m0", "m1": "changed"})
    assert anew.accuracy(1, "copy") == 0.95, "the row is another recipe's"
    elsewhere = certificates([REFERENCE, stated], gate, recipes={"m0": "other weights", "m1": "m1"})
    assert elsewhere.accuracy(1, "copy") == 0.95, "the file is another reference's"


def test_an_unknown_accuracy_keeps_no_floor() -> None:
    assert certificates([REFERENCE]).refusal(0, request_of(quality_floor=0.1)) == "unknown"


# --- withdrawn in production -----------------------------------------------------------------------------------------


def test_what_was_withdrawn_stays_out_until_another_gate_file() -> None:
    gate = gate_of({"m1": {"copy": "certified", "sort": "certified", "*": "certified"}})
    known = certificates([REFERENCE, INT8], gate)
    gone = known.withdraw(1, "copy", 400, -0.05, 25.0)
    reason = "withdrawn in production on copy after 400 pairs (-5.0 points)"
    assert known.refusal(1, request_of(task="copy")) == reason
    assert known.refusal(1, request_of()) == reason, "good overall means good everywhere"
    assert known.refusal(1, request_of(task="sort")) == ""
    assert known.refusal(1, request_of(task="copy", quality_floor=0.5)) == reason, "its figures hold no more"
    assert known.refusal(1, request_of(task="copy", quality_floor=0.0)) == ""
    again = certificates([REFERENCE, INT8], gate, withdrawn=[gone])
    assert again.refusal(1, request_of(task="copy")) == reason
    anew = msgspec.structs.replace(gate, checksum="measured again")
    assert certificates([REFERENCE, INT8], anew, withdrawn=[gone]).refusal(1, request_of(task="copy")) == ""


def test_only_certified_modes_are_on_trial() -> None:
    gate = gate_of({"m1": {"copy": "certified", "sort": "revoked", "*": "revoked"}})
    known = certificates([REFERENCE, INT8, GRAPHS], gate)
    assert known.on_trial(1, "copy") is not None
    assert [known.on_trial(arm, task) for arm, task in ((1, "sort"), (1, None), (0, "copy"), (2, "copy"))] == [None] * 4


EAGER = Mode(name="eager", engine="eager", model="toy", precision="fp16", lossless=True)
SPEC = Mode(name="spec", engine="spec", model="toy", precision="fp16", speculation="ngram", lossless=True)
FP8_KV = Mode(name="fp8_kv", engine="fp8_kv", model="toy", precision="bf16")


@pytest.mark.parametrize(
    ("modes", "named", "marked"),
    [
        ([EAGER, REFERENCE, INT8, SMALL], "m0", ["m0", "m3"]),
        ([EAGER, REFERENCE, INT8, SMALL], "", ["eager", "m3"]),
        ([SPEC, REFERENCE, SMALL], "", ["m0", "m3"]),
        ([SPEC, INT8], "", ["spec"]),
        ([FP8_KV, REFERENCE], "", ["m0"]),
        ([FP8_KV, INT8], "", []),
        ([REFERENCE, INT8], "m1", ["m1"]),
    ],
)
def test_every_part_of_the_house_has_the_same_references(modes: list[Mode], named: str, marked: list[str]) -> None:
    """What certificates compare with, `msd gate` asks first, fallbacks go to, and `cost` bounds energy by."""
    known = certificates(modes, reference=named)
    assert sorted(mode.name for mode in known.modes if mode.reference) == sorted(marked)
    home = known.modes[known.reference].name if known.reference >= 0 else ""
    assert home == (marked[0] if marked else "")
    assert known.reference_for(request_of(model="toy")) == known.reference
    for arm, mode in enumerate(known.modes):
        own = [one for one in known.modes if one.model == mode.model and one.reference] or [mode]
        assert known.modes[reference_arms(known.modes)[arm]] == own[0]
    if SMALL in modes:
        assert known.reference_for(request_of(model="other")) == modes.index(SMALL)


def test_the_command_and_the_scheduler_have_the_certificates_reference() -> None:
    lossy: dict[str, object] = {"precision": "int8"}
    for named, home in (("", "m1"), ("m2", "m2")):
        config = make_config(modes=3, engines={"m0": lossy}, quality={"reference": named})
        assert find_reference(config) == home
        scheduler = CoreWorld(config).scheduler
        assert [book.name for book in scheduler.fleet.books if book.mode.reference] == [home]
        assert scheduler.certificates.modes[scheduler.certificates.reference].name == home


def test_the_reference_can_be_named() -> None:
    lone = Mode(name="m1", engine="m1", model="toy", precision="int8")
    assert certificates([lone]).reference == -1
    named = certificates([lone], reference="m1")
    assert named.refusal(0, request_of()) == ""
    assert named.describe(0)[0][0] == ALL_TASKS
