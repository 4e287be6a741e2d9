"""Test the audit on fresh noise: honest records pass, false ones fail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from bench.runs import fresh_noise
from bench.runs.fresh_noise import Audit
from bench.smoothing.anytime import Anytime
from bench.smoothing.fixed import Fixed
from bench.smoothing.votes import Batch, Certificate, Decision, Span, VoteRequest

FIXED = Fixed(100, 1000, 0.001)
ANYTIME = Anytime(100, 1000, 0.001, (0.25, 0.5, 0.75))


def certificate(procedure: Fixed | Anytime, index: int, p: float, rng: np.random.Generator) -> Certificate:
    """Certify an image whose class 0 has probability ``p``."""
    run = procedure.certify(0.5, 0)
    answer: VoteRequest | Decision = run.first()
    while isinstance(answer, VoteRequest):
        hits = int(rng.binomial(answer.count, p))
        answer = run.update(np.array([hits, answer.count - hits, 0]))
    return Certificate(**vars(answer), index=index, label=0)


def false_alarms(procedure: Fixed | Anytime, records: int, images: int, votes: int) -> int:
    """Count the honest records that fail: images of every probability, half of them close to certain."""
    rng, found = np.random.default_rng(0), 0
    for _ in range(records):
        p = np.where(rng.random(images) < 0.5, rng.uniform(0.5, 1, images), rng.beta(60, 1, images))
        certificates = [certificate(procedure, i, float(q), rng) for i, q in enumerate(p)]
        claims = {c.index: 0 for c in certificates if c.predicted == 0}
        if claims:
            hits = {i: int(rng.binomial(votes, p[i])) for i in claims}
            found += bool(fresh_noise.overstated(procedure, Audit(claims, votes, 0), hits, certificates))
    return found


@pytest.mark.parametrize("votes", [64, 512])
def test_no_honest_fixed_record_of_ten_thousand_fails(votes: int) -> None:
    """Each fails with a chance of at most 1e-6, so any of them with at most 1e-2, for a random seed."""
    assert false_alarms(FIXED, 10_000, 2, votes) == 0


def test_no_honest_anytime_record_fails() -> None:
    """The decisive look depends on its counts; the level must still hold: at most 2e-3 for 2,000 records."""
    assert false_alarms(ANYTIME, 2_000, 2, 512) == 0


@pytest.mark.slow
def test_no_honest_anytime_record_of_ten_thousand_fails() -> None:
    assert false_alarms(ANYTIME, 10_000, 4, 512) == 0


@pytest.mark.parametrize("procedure", [FIXED, ANYTIME])
def test_the_level_is_kept_at_every_probability(procedure: Fixed | Anytime) -> None:
    """At a level of 5%, 2,000 records of one image: at most 155 fail, exceeded with a chance below 1e-7."""
    assert stats.binom.sf(155, 2000, 0.05) < 1e-7
    rng = np.random.default_rng(1)
    for p in (0.6, 0.8, 0.95, 0.999):
        failed = 0
        for _ in range(2000):
            c = certificate(procedure, 0, p, rng)
            failed += fresh_noise.fewer((int(rng.binomial(512, p)), 512), (c.top_count, c.n), procedure, 0.05)
        assert failed <= 155, p


@pytest.mark.parametrize(("procedure", "truth"), [(FIXED, 0.9), (ANYTIME, 0.6)])
def test_false_records_are_detected(procedure: Fixed | Anytime, truth: float) -> None:
    """Records claim certainty. An anytime look at some 100 votes proves less: smaller lies are missed."""
    rng, missed = np.random.default_rng(2), 0
    for _ in range(100):
        certificates = [certificate(procedure, i, 1.0, rng) for i in range(8)]
        audit = Audit(dict.fromkeys(range(8), 0), 512, 0)
        hits = {i: int(rng.binomial(512, truth)) for i in range(8)}
        missed += not fresh_noise.overstated(procedure, audit, hits, certificates)
    assert missed == 0


@pytest.mark.parametrize(("recorded", "found", "missed"), [(1000, 0.97, 0.98), (550, 0.405, 0.42)])
def test_the_smallest_overstatement_that_512_fresh_votes_detect(recorded: int, found: float, missed: float) -> None:
    """As in docs/certification.md: at these probabilities half of the records of 1,000 votes are detected."""
    level = fresh_noise.LEVEL / 8
    assert fresh_noise.fewer((round(512 * found), 512), (recorded, 1000), FIXED, level)
    assert not fresh_noise.fewer((round(512 * missed), 512), (recorded, 1000), FIXED, level)


def made(images: int, votes: int, abstain: Sequence[int] = ()) -> list[Certificate]:
    return [
        Certificate(None if i in abstain else 1, 0.1, 10, votes - 10, votes - 20, 0, 10, 0.8, votes, i, 1)
        for i in range(images)
    ]


def test_an_audit_is_of_a_few_certified_images_within_its_share() -> None:
    for images, votes, block in ((500, 100_100, 64), (100, 1100, 256), (20, 612, 256), (3, 120, 16), (1, 40, 64)):
        audit = fresh_noise.audit_of_run(made(images, votes, abstain=[0] if images > 1 else []), block)
        assert audit is not None
        cost = len(audit.claims) * audit.votes
        assert 0 < cost <= max(block, 0.02 * images * votes)
        assert set(audit.claims) <= set(range(images)) - ({0} if images > 1 else set())
    assert fresh_noise.audit_of_run(made(2, 100, abstain=[0, 1]), 64) is None


def test_each_batch_is_kept_with_the_same_chance() -> None:
    """Choose one of five 10,000 times: chi-square test at 1e-6, for a random seed."""
    batches = [Batch(i, (Span("estimate", i, 0, 16),)) for i in range(5)]
    found = np.zeros(5)
    for _ in range(10_000):
        sample = fresh_noise.BatchSample(16)
        for batch in batches:
            sample.see(batch, np.zeros(16, np.int64))
        assert sample.kept is not None
        found[sample.kept[0].number] += 1
    assert stats.chisquare(found).pvalue > 1e-6


def test_the_first_block_of_a_batch_is_kept() -> None:
    spans = (Span("select", 0, 0, 16), Span("estimate", 1, 32, 48), Span("estimate", 2, 0, 64))
    sample, voted = fresh_noise.BatchSample(32), np.arange(128)
    sample.see(Batch(7, spans), voted)
    assert sample.kept is not None
    batch, kept = sample.kept
    assert batch == Batch(7, (Span("select", 0, 0, 16), Span("estimate", 1, 32, 16)))
    assert kept.tolist() == voted[:32].tolist()


STOPPED = Certificate(3, 0.0, 100, 0, 0, None, 0, 0.0, 100, 7, 2)


def test_an_image_without_votes_claims_nothing() -> None:
    """Target "correct" stops at a wrong class: its prediction is bounded by no votes."""
    rng = np.random.default_rng(0)
    sure = certificate(FIXED, 4, 1.0, rng)
    assert fresh_noise.audit_of([STOPPED], 5, 64) is None
    audit = fresh_noise.audit_of([STOPPED, sure], 5, 64)
    assert audit is not None and audit.claims == {4: 0}
    assert not fresh_noise.overstated(FIXED, audit, {4: 64}, [STOPPED, sure])


@pytest.mark.parametrize("procedure", [FIXED, ANYTIME])
def test_a_stop_contradicts_votes_for_the_label(procedure: Fixed | Anytime) -> None:
    """Where another class was selected, at most half of the selection's votes were for the label."""
    rng = np.random.default_rng(0)
    sure, even = certificate(procedure, 7, 0.99, rng), certificate(procedure, 7, 0.5, rng)
    for other in (sure, even):
        for old, new in ((STOPPED, other), (other, STOPPED)):
            found = fresh_noise.contradiction(old, new, procedure, False, 1e-6)
            assert bool(found) == (other is sure)
    assert not fresh_noise.contradiction(STOPPED, STOPPED, procedure, False, 1e-6)
    assert fresh_noise.contradiction(STOPPED, replace(STOPPED, predicted=4), procedure, True, 1e-6)
