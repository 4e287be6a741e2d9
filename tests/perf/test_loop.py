"""The time of a table: this engine compared with the certification loop that papers publish. Run by ``make perf``."""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.models.arithmetic import deterministic
from bench.options import RunOptions
from bench.process.console import ConsoleReporter
from bench.records import metrics
from bench.runs.certifier import DeviceCertifier
from bench.runs.plan import make_plans
from bench.runs.session import Session
from bench.smoothing.engine import certify
from bench.smoothing.noise import Noise, TrainDraw
from bench.smoothing.votes import Certificate
from tests.helpers.loop import BATCH, published_loop
from tests.helpers.turns import paired

SIGMA, N0, N, ALPHA, IMAGES = 0.25, 100, 10_000, 0.001, 5


@pytest.mark.parametrize(("kind", "target"), [("fixed", "selected"), ("anytime", "selected"), ("anytime", "label")])
def test_engine_against_the_published_loop(
    benchmark: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path, kind: str, target: str
) -> None:
    """Ratio of seconds for the same table of the same trained digits classifier, n = 10,000."""
    (plan,) = make_plans(
        RunOptions(defenses="full", dataset="digits", sigma=str(SIGMA), n0=N0, n=N, procedure=kind, target=target)
    )
    device = torch.device("cpu")
    session = Session(device, tmp_path, ConsoleReporter())
    run = session.prepare(plan)
    task, images = run.task, run.indices[:IMAGES]
    placed = DeviceCertifier(run.certifier, task, images[0])
    placed.use_threads(session.threads)
    tau = run.identity.noise.tau
    test = run.split
    unused = TrainDraw(Noise(0, "test"), 0, BATCH, SIGMA, device)  # this defense draws nothing
    tables: dict[str, list[float]] = {}

    def ours() -> None:
        with deterministic(), torch.inference_mode():
            found = list(certify([placed.device], lambda y: plan.procedure.certify(SIGMA, y, tau), images))
        tables["ours"] = certified(found)

    def theirs() -> None:
        hits = np.zeros(len(plan.card.radii))
        with torch.inference_mode():
            for i in images:
                x = torch.from_numpy(test.pixels([i])[0])
                model = partial(run.fitted.defense, draw=unused)
                top, radius = published_loop(model, x, task.classes, SIGMA, N0, N, ALPHA)
                hits += (top == test.labels[i]) & (radius >= np.array(plan.card.radii))
        tables["theirs"] = (hits / len(images)).tolist()

    def certified(found: list[Certificate]) -> list[float]:
        return [rate.value for rate in metrics.summarise(found, plan.card.radii).certified_accuracy]

    ratios = paired(theirs, ours, 3)
    with capsys.disabled():
        print(
            f"\n{kind}, {target}: published loop / engine: median {statistics.median(ratios):.2f} "
            f"(from {min(ratios):.2f} to {max(ratios):.2f}); tables {tables}"
        )
    benchmark.extra_info["ratio"] = statistics.median(ratios)
    benchmark.pedantic(ours, rounds=1)
    # The noise differs, so one image near a radius may be certified by one of them only.
    assert np.abs(np.subtract(tables["ours"], tables["theirs"])).max() <= 1 / IMAGES
