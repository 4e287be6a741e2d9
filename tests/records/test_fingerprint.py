"""Fingerprints are equal on one kind of machine, close on another, and differ for other functions."""

from __future__ import annotations

import torch

from bench.records import fingerprint

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
