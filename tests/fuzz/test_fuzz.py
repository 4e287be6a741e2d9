"""Any untrusted input ends in a result or one clear line. docs/security.md says how much was tried."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

from tests.fuzz import cards_and_logs, data, folders, judging, progress, served, shifted, transformers_folders

QUICK = {
    cards_and_logs.cards: 100,
    cards_and_logs.random_cards: 50,
    cards_and_logs.logs: 60,
    cards_and_logs.random_logs: 40,
    folders.run_folders: 60,
    folders.random_run_folders: 10,
    folders.baselines: 20,
    progress.logs_of_runs: 60,
    progress.shards: 80,
    data.picture_folders: 60,
    data.parquets: 80,
    data.weights: 60,
    shifted.tables: 60,
    shifted.arrays: 60,
    transformers_folders.transformers_folders: 60,
    served.answers: 150,
    served.raw_replies: 100,
    served.models: 20,
}
# Bytes without structure: every such input is refused.
REFUSED = {cards_and_logs.random_cards, cards_and_logs.random_logs}


def check(prop: Callable[..., None], examples: int, same: bool) -> None:
    """Check a property on ``examples`` inputs: the ``same`` every time, or new ones."""
    keep = settings(
        max_examples=examples,
        derandomize=same,
        database=None,
        deadline=None,  # each input has its own limit
        # Failing inputs are not shrunk, which would take minutes.
        phases=[Phase.generate] if same else list(Phase),
        suppress_health_check=list(HealthCheck),
    )
    keep(prop)()


def name(prop: Any) -> str:
    return str(prop.__name__)


pytestmark = pytest.mark.filterwarnings("ignore:::PIL")  # about damaged pictures


@pytest.mark.parametrize("prop", QUICK, ids=name)
def test_a_result_or_one_clear_line(prop: Callable[..., None]) -> None:
    judging.outcomes.clear()
    check(prop, QUICK[prop], same=True)
    if prop not in REFUSED:  # a property that reads none of its inputs tests too little
        first = next(iter(judging.outcomes)).rpartition(": ")[0]
        assert judging.outcomes[f"{first}: read"], judging.outcomes


@pytest.mark.slow
@pytest.mark.parametrize("prop", QUICK, ids=name)
def test_many_new_inputs(prop: Callable[..., None]) -> None:
    check(prop, 50 * QUICK[prop], same=False)
