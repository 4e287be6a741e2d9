"""Certificates tested on fresh noise: honest records pass, false ones do not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from scipy import stats

from bench.records import fingerprint
from bench.runs import recheck
from bench.runs.recheck import Audit
from bench.smoothing.anytime import Anytime
from bench.smoothing.engine import Certificate
from bench.smoothing.procedures import Fixed, Votes
from bench.smoothing.scheduler import Batch, Span

FIXED = Fixed(100, 1000, 0.001)
ANYTIME = Anytime(100, 1000, 0.001, (0.25, 0.5, 0.75))


def certificate(procedure: Fixed | Anytime, index: int, p: float, rng: np.random.Generator) -> Certificate:
    """That of an image whose class 0 has probability ``p``, by the procedure itself."""
    run = procedure.certify(0.5, 0)
    wanted: Votes = next(run)
    while True:
        hits = int(rng.binomial(wanted.count, p))
        try:
            wanted = run.send(np.array([hits, wanted.count - hits, 0]))
        except StopIteration as stop:
            return Certificate(**vars(stop.value), index=index, label=0)


def false_alarms(procedure: Fixed | Anytime, records: int, images: int, votes: int) -> int:
    """How many honest records fail: images at every probability, half of them where a certificate hangs by a vote."""
    rng, found = np.random.default_rng(0), 0
    for _ in range(records):
        p = np.where(rng.random(images) < 0.5, rng.uniform(0.5, 1, images), rng.beta(60, 1, images))
        certificates = [certificate(procedure, i, float(q), rng) for i, q in enumerate(p)]
        claims = {c.index: 0 for c in certificates if c.predicted == 0}
        if claims:
            hits = {i: int(rng.binomial(votes, p[i])) for i in claims}
            found += bool(recheck.overstated(procedure, Audit(claims, votes, 0), hits, certificates))
    return found


@pytest.mark.parametrize("votes", [64, 512])
def test_no_honest_fixed_record_of_ten_thousand_is_accused(votes: int) -> None:
    """Each with a chance of at most 1e-6, so any of them with at most 1e-2, for a seed drawn anew."""
    assert false_alarms(FIXED, 10_000, 2, votes) == 0


def test_no_honest_anytime_record_is_accused() -> None:
    """Looks are chosen by their own counts: the level must hold all the same. At most 2e-3 for 2,000 records."""
    assert false_alarms(ANYTIME, 2_000, 2, 512) == 0


@pytest.mark.slow
def test_no_honest_anytime_record_of_ten_thousand_is_accused() -> None:
    assert false_alarms(ANYTIME, 10_000, 4, 512) == 0


@pytest.mark.parametrize("procedure", [FIXED, ANYTIME])
def test_the_level_is_kept_at_every_probability(procedure: Fixed | Anytime) -> None:
    """At a level of 5%, 2,000 records of one image: at most 155 accused, which 5% exceed with a chance below 1e-7."""
    assert stats.binom.sf(155, 2000, 0.05) < 1e-7
    rng = np.random.default_rng(1)
    for p in (0.6, 0.8, 0.95, 0.999):
        accused = 0
        for _ in range(2000):
            c = certificate(procedure, 0, p, rng)
            accused += recheck.fewer((int(rng.binomial(512, p)), 512), (c.top_count, c.n), procedure, 0.05)
        assert accused <= 155, p


@pytest.mark.parametrize(("procedure", "truth"), [(FIXED, 0.9), (ANYTIME, 0.6)])
def test_what_is_false_is_found(procedure: Fixed | Anytime, truth: float) -> None:
    """A record of certainty is not; an anytime look at some 100 votes says less, so a smaller lie is missed there."""
    rng, missed = np.random.default_rng(2), 0
    for _ in range(100):
        certificates = [certificate(procedure, i, 1.0, rng) for i in range(8)]
        audit = Audit(dict.fromkeys(range(8), 0), 512, 0)
        hits = {i: int(rng.binomial(512, truth)) for i in range(8)}
        missed += not recheck.overstated(procedure, audit, hits, certificates)
    assert missed == 0


@pytest.mark.parametrize(("recorded", "found", "missed"), [(1000, 0.97, 0.98), (550, 0.405, 0.42)])
def test_how_small_a_lie_512_fresh_votes_find(recorded: int, found: float, missed: float) -> None:
    """As docs/certification.md says, of a record of 1,000 votes: half of the time at these probabilities."""
    level = recheck.LEVEL / 8
    assert recheck.fewer((round(512 * found), 512), (recorded, 1000), FIXED, level)
    assert not recheck.fewer((round(512 * missed), 512), (recorded, 1000), FIXED, level)


def made(images: int, votes: int, abstain: Sequence[int] = ()) -> list[Certificate]:
    return [
        Certificate(None if i in abstain else 1, 0.1, 10, votes - 10, votes - 20, 0, 10, 0.8, votes, i, 1)
        for i in range(images)
    ]


def test_an_audit_is_of_a_few_certified_images_within_its_share() -> None:
    for images, votes, block in ((500, 100_100, 64), (100, 1100, 256), (20, 612, 256), (3, 120, 16), (1, 40, 64)):
        audit = recheck.at_the_end(made(images, votes, abstain=[0] if images > 1 else []), block)
        assert audit is not None
        cost = len(audit.claims) * audit.votes
        assert 0 < cost <= max(block, 0.02 * images * votes)
        assert set(audit.claims) <= set(range(images)) - ({0} if images > 1 else set())
    assert recheck.at_the_end(made(2, 100, abstain=[0, 1]), 64) is None


def test_each_batch_is_kept_with_the_same_chance() -> None:
    """10,000 times one of five: chi-square at 1e-6, for a seed that the system draws."""
    batches = [Batch(i, (Span("estimate", i, 0, 16),)) for i in range(5)]
    found = np.zeros(5)
    for _ in range(10_000):
        sample = recheck.Sample(16)
        for batch in batches:
            sample.see(batch, np.zeros(16, np.int64))
        assert sample.kept is not None
        found[sample.kept[0].number] += 1
    assert stats.chisquare(found).pvalue > 1e-6


def test_of_a_batch_the_first_block_is_kept() -> None:
    spans = (Span("select", 0, 0, 16), Span("estimate", 1, 32, 48), Span("estimate", 2, 0, 64))
    sample, voted = recheck.Sample(32), np.arange(128)
    sample.see(Batch(7, spans), voted)
    assert sample.kept is not None
    batch, kept = sample.kept
    assert batch == Batch(7, (Span("select", 0, 0, 16), Span("estimate", 1, 32, 16)))
    assert kept.tolist() == voted[:32].tolist()


MACHINE = {"device": "one", "platform": "linux", "packages": {"torch": "2"}}


def test_fingerprints_are_equal_on_one_machine_and_close_on_another() -> None:
    torch.manual_seed(0)
    logits = torch.randn(64, 10)
    one = fingerprint.of(logits.numpy(), 3, MACHINE)
    assert fingerprint.differs(one, fingerprint.of(logits.clone().numpy(), 3, MACHINE)) == ""
    nearly = logits * (1 + 1e-6)
    assert "same kind of machine" in fingerprint.differs(one, fingerprint.of(nearly.numpy(), 3, MACHINE))
    other = MACHINE | {"device": "two"}
    assert fingerprint.differs(one, fingerprint.of(nearly.numpy(), 3, other)) == ""
    for changed in (logits * 1.1, logits + 0.1, logits.roll(1, 0)):
        assert "more than another machine explains" in fingerprint.differs(
            one, fingerprint.of(changed.numpy(), 3, other)
        )
    assert "classes differ" in fingerprint.differs(one, fingerprint.of(logits.flip(1).numpy(), 3, other))
    half = fingerprint.of((logits * 1.01).numpy(), 3, other)
    assert fingerprint.differs(one, half) and not fingerprint.differs(one, half, ["bfloat16"])
    assert "images 3 and 4" in fingerprint.differs(one, fingerprint.of(logits.numpy(), 4, MACHINE))


def test_a_fingerprint_takes_nan_and_infinity() -> None:
    logits = torch.full((16, 3), torch.nan)
    logits[0, 0] = torch.inf
    one = fingerprint.of(logits.numpy(), 0, MACHINE)
    assert fingerprint.differs(one, fingerprint.of(logits.numpy(), 0, MACHINE | {"device": "two"})) == ""
