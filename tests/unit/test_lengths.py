"""The output-length learner: a median and a 90th percentile per class, bounded memory."""

from __future__ import annotations

from random import Random

import pytest

from msd.core.lengths import LengthLearner, overrun
from msd.domain import Request


def request(
    *, tenant: str = "t", task: str | None = "qa", prompt: int = 100, max_tokens: int = 256, ignore_eos: bool = False
) -> Request:
    return Request(
        request_id="r",
        client_request_id="r",
        tenant=tenant,
        content_hash=b"",
        received_us=0,
        num_prompt_tokens=prompt,
        max_tokens=max_tokens,
        task=task,
        ignore_eos=ignore_eos,
    )


def taught(lengths: list[int], **fields: object) -> LengthLearner:
    learner = LengthLearner()
    for length in lengths:
        learner.learn(learner.classify(request(**fields)), length)  # type: ignore[arg-type]
    return learner


def expect(learner: LengthLearner, wanted: Request) -> int:
    return learner.expect(wanted, learner.classify(wanted))[0]


def expect_p90(learner: LengthLearner, wanted: Request) -> int:
    return learner.expect(wanted, learner.classify(wanted))[1]


def test_unseen_classes_expect_half_the_bound() -> None:
    learner = LengthLearner()
    assert expect(learner, request(max_tokens=256)) == 128
    assert expect(learner, request(max_tokens=1)) == 1
    assert expect_p90(learner, request(max_tokens=256)) == 256


def test_two_observations_are_not_yet_knowledge() -> None:
    assert expect(taught([10, 10]), request()) == 128
    assert expect(taught([10, 10, 10]), request()) == pytest.approx(10, abs=2)


@pytest.mark.parametrize("length", [1, 2, 3, 8, 50, 159, 1_000, 30_000])
def test_the_median_is_right_to_a_bin(length: int) -> None:
    expected = expect(taught([length] * 10, max_tokens=100_000), request(max_tokens=100_000))
    assert length / 1.2 <= expected <= length * 1.2


def test_the_median_ignores_a_few_long_answers() -> None:
    assert expect(taught([20, 20, 20, 20, 250, 250, 20, 20]), request()) == pytest.approx(20, rel=0.2)


def test_expectation_never_exceeds_the_bound() -> None:
    learner = taught([400] * 5, max_tokens=511)
    assert expect(learner, request(max_tokens=257)) == 257


def test_without_eos_the_bound_is_the_length() -> None:
    assert expect(taught([10] * 10), request(ignore_eos=True)) == 256


def test_classes_are_told_apart_by_tenant_task_prompt_and_bound() -> None:
    learner = taught([10] * 10)
    classes = {
        learner.classify(request(**fields))
        for fields in ({}, {"tenant": "u"}, {"task": None}, {"prompt": 200}, {"max_tokens": 100})
    }
    assert len(classes) == 5
    assert learner.classify(request(prompt=64)) == learner.classify(request(prompt=127))


def test_another_tenant_starts_from_what_all_have_shown() -> None:
    learner = taught([10] * 10)
    assert expect(learner, request(tenant="new")) == expect(learner, request())
    for _ in range(10):
        learner.learn(learner.classify(request(tenant="new")), 100)
    assert expect(learner, request(tenant="new")) == pytest.approx(100, rel=0.2)
    assert expect(learner, request()) == pytest.approx(10, rel=0.2)


def test_old_lengths_are_forgotten() -> None:
    learner = taught([10] * 500)
    for _ in range(150):
        learner.learn(learner.classify(request()), 200)
    assert expect(learner, request()) == pytest.approx(200, rel=0.2)


def test_weights_do_not_overflow_in_a_long_life() -> None:
    """Decay by growing weights is rescaled: 1.01^5,000 would be 1e21."""
    rng = Random(1)
    learner = taught([rng.choice((8, 32)) for _ in range(5_000)])
    assert expect(learner, request()) in (8, 32)
    for _ in range(200):
        learner.learn(learner.classify(request()), 128)
    assert expect(learner, request()) == pytest.approx(128, rel=0.2)


def test_memory_is_bounded_and_the_class_unused_for_longest_goes() -> None:
    learner = LengthLearner()
    kept = learner.classify(request(tenant="kept"))
    for _ in range(5):
        learner.learn(kept, 10)
    for i in range(6_000):
        learner.learn(learner.classify(request(tenant=f"t{i}")), 200)
        if i % 1_000 == 0:
            learner.learn(kept, 10)
    assert len(learner._classes) <= 4_096
    assert expect(learner, request(tenant="kept")) == pytest.approx(10, rel=0.2)
    assert learner.classify(request(tenant="t0")) not in learner._classes


# --- the 90th percentile, and what is not yet over -------------------------------------------------------------------


def test_one_in_ten_is_longer_than_the_90th_percentile() -> None:
    learner = taught([20] * 70 + [200] * 10 + [20] * 10 + [200] * 5 + [20] * 5)
    assert expect(learner, request()) == pytest.approx(20, rel=0.2)
    assert expect_p90(learner, request()) == pytest.approx(200, rel=0.2)
    assert expect_p90(taught([20] * 96 + [200] + [20] * 3), request()) == pytest.approx(20, rel=0.2)
    assert learner.expect(request(max_tokens=150), learner.classify(request())) == (expect(learner, request()), 150)
    assert expect_p90(learner, request(ignore_eos=True)) == 256


def test_an_abort_says_that_it_would_have_been_no_shorter() -> None:
    learner = taught([8] * 20 + [100] * 20)
    cls = learner.classify(request())
    for _ in range(60):
        learner.learn_at_least(cls, 50)
    # All that is known beyond 50 is 100: that is where they would have gone.
    assert expect(learner, request()) == pytest.approx(100, rel=0.2)
    early = taught([8] * 20 + [100] * 21)
    before = early.expect(request(), cls)
    for _ in range(60):
        early.learn_at_least(cls, 1)
    assert early.expect(request(), cls) == before, "an abort at the first token says nothing"


def test_an_abort_beyond_all_that_was_seen_counts_as_its_length() -> None:
    learner = taught([8] * 10)
    for _ in range(100):
        learner.learn_at_least(learner.classify(request()), 60)
    assert expect(learner, request()) == pytest.approx(60, rel=0.2)


def test_aborts_alone_teach_nothing() -> None:
    learner = LengthLearner()
    for _ in range(10):
        learner.learn_at_least(learner.classify(request()), 10)
    assert expect(learner, request()) == 128


def test_who_is_past_expectation_is_expected_to_go_on() -> None:
    assert overrun(100, 1_000) == 150
    assert overrun(100, 120) == 120
