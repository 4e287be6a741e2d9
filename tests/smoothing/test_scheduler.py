"""The scheduler: lost, late and duplicate answers change no certificate."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.smoothing.anytime import Anytime
from bench.smoothing.dispatch import Dispatcher
from bench.smoothing.fixed import Fixed
from bench.smoothing.scheduler import Scheduler
from bench.smoothing.votes import TILE, Batch, Certificate, Counts, Decision, ImageProcedure, Span, Voted, VoteRequest

CLASSES = 3
FIXED = Fixed(33, 210, 0.01)
ANYTIME = Anytime(20, 2000, 0.01, (0.25, 0.5))


def draw(batch: Batch) -> Voted:
    """Draw votes that depend only on their keys, as a valid model's do; some are NaN."""
    rows = []
    for span in batch.spans:
        assert span.first % TILE == span.rows % TILE == 0
        for i in range(span.rows):
            key = f"{span.purpose}|{span.image}|{span.first + i}".encode()
            u = int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big") / 2**32
            p = 0.5 + (span.image * 7 % 10) / 20
            rows.append(span.image % CLASSES if u < p else CLASSES if u > 0.98 else (span.image + 1) % CLASSES)
    return np.array(rows, np.int64)


class BackAndForth:
    """A procedure that changes to another purpose and back, with speculative votes before each change."""

    def __init__(self) -> None:
        self.requests = [
            VoteRequest(purpose, count, later=60)
            for purpose, count in (("a", 30), ("b", 20), ("a", 50), ("a", 7), ("b", 40))
        ]
        self.total = np.zeros(CLASSES + 1, np.int64)

    def first(self) -> VoteRequest:
        return self.requests[0]

    def update(self, counts: Counts) -> VoteRequest | Decision:
        self.total += counts * (1 if self.requests.pop(0).purpose == "a" else 1000)
        if self.requests:
            return self.requests[0]
        return Decision(None, 0.0, 0, int(self.total.sum()), int(self.total[0]), 1, int(self.total[1]), 0.0, 147)


def start(kind: str, label: int) -> ImageProcedure:
    if kind == "back and forth":
        return BackAndForth()
    return (FIXED if kind == "fixed" else ANYTIME).certify(0.5, label)


def scheduler(kind: str, images: list[int]) -> Scheduler:
    return Scheduler(lambda label: start(kind, label), lambda i: i % CLASSES, CLASSES, images)


def bare(c: Certificate) -> Certificate:
    return replace(c, seconds=0.0)


def alone(kind: str, image: int) -> Certificate:
    """Certify without a scheduler, by a plain loop: votes 0, 1, 2, ... of each purpose, each once."""
    procedure = start(kind, image % CLASSES)
    seen: Counter[str] = Counter()
    answer: VoteRequest | Decision = procedure.first()
    while isinstance(answer, VoteRequest):
        first, last = seen[answer.purpose], seen[answer.purpose] + answer.count
        end = -(-last // TILE) * TILE
        span = Span(answer.purpose, image, 0, end)
        voted = draw(Batch(0, (span,)))[first:last]
        seen[answer.purpose] = last
        answer = procedure.update(np.bincount(voted, minlength=CLASSES + 1))
    return Certificate(**vars(answer), index=image, label=image % CLASSES)


class FakeWorker:
    """A worker that keeps its batches until the test answers them."""

    def __init__(self) -> None:
        self.has: list[tuple[int, Batch]] = []

    def send(self, run: int, batch: Batch) -> None:
        self.has.append((run, batch))
        assert len(self.has) <= 2, "one batch under way and the next"


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_workers_any_order_losses_and_duplicates(data: st.DataObject) -> None:
    """Two runs share workers that join, leave with batches, and answer late, out of order or twice."""
    kinds = [data.draw(st.sampled_from(["fixed", "anytime", "back and forth"])) for _ in range(2)]
    images = [data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=6, unique=True)) for _ in range(2)]
    runs = [scheduler(k, i) for k, i in zip(kinds, images, strict=True)]
    dispatcher = Dispatcher()
    for number, run in enumerate(runs):
        dispatcher.open(
            number, run, data.draw(st.sampled_from([16, 48, 128])), data.draw(st.sampled_from([None, 16, 48]))
        )
    workers = [FakeWorker() for _ in range(data.draw(st.integers(1, 6)))]
    for worker in workers:
        dispatcher.join(worker)
    found: list[dict[int, Certificate]] = [{}, {}]
    ghosts: list[tuple[FakeWorker, int, Batch]] = []  # answers of workers that left, and second answers
    trouble = data.draw(st.integers(0, 30))

    def answer(worker: FakeWorker, number: int, batch: Batch) -> None:
        for c in dispatcher.answer(worker, number, batch.number, draw(batch), 1.0):
            assert c.index not in found[number]
            found[number][c.index] = bare(c)

    rounds = 0
    while not all(run.done for run in runs):
        rounds += 1
        assert rounds < 20_000
        dispatcher.fill()
        busy = [w for w in dispatcher.workers if isinstance(w, FakeWorker) and w.has]
        assert busy, "no worker has a batch, and images are left"
        worker = busy[data.draw(st.integers(0, len(busy) - 1))] if rounds < 60 else busy[rounds % len(busy)]
        event = data.draw(st.sampled_from(["answer", "twice", "leave", "ghost"])) if trouble > 0 else "answer"
        trouble -= event != "answer"
        if event == "leave":
            assert dispatcher.leave(worker) == Counter((n, b.number) for n, b in worker.has)
            ghosts += [(worker, n, b) for n, b in worker.has]
            dispatcher.join(FakeWorker())
        elif event == "ghost" and ghosts:
            worker, number, batch = ghosts.pop()
            if (number, batch) in worker.has:  # a duplicate: the dispatcher takes the second answer for it
                worker.has.remove((number, batch))
            answer(worker, number, batch)
        else:
            number, batch = worker.has.pop(0)
            answer(worker, number, batch)
            if event == "twice":
                ghosts.append((worker, number, batch))
    for ghost in ghosts:
        answer(*ghost)
    for number in range(2):
        assert found[number] == {i: alone(kinds[number], i) for i in images[number]}


def one_at_a_time(run: Scheduler, rows: int) -> Iterator[tuple[Batch, list[Certificate]]]:
    while not run.done:
        batch = run.next_batch(rows)
        assert batch is not None
        yield batch, run.receive(batch.number, draw(batch), 1.0)


@pytest.mark.parametrize("kind", ["fixed", "anytime", "back and forth"])
def test_one_at_a_time_is_the_plain_loop(kind: str) -> None:
    images = list(range(12))
    found = [c for _, decided in one_at_a_time(scheduler(kind, images), 64) for c in decided]
    assert sorted((bare(c) for c in found), key=lambda c: c.index) == [alone(kind, i) for i in images]


def test_seconds_are_divided_among_images() -> None:
    steps = list(one_at_a_time(scheduler("fixed", list(range(7))), 128))
    assert sum(c.seconds for _, decided in steps for c in decided) == pytest.approx(len(steps))


def test_a_second_answer_is_ignored() -> None:
    run, found, batches = scheduler("fixed", [0, 1]), list[Certificate](), 0
    while not run.done:
        batch = run.next_batch(48, speculate=False)
        assert batch is not None
        found += run.receive(batch.number, draw(batch), 1.0)
        assert run.receive(batch.number, draw(batch), 1.0) == []
        batches += 1
    assert sum(c.seconds for c in found) == pytest.approx(batches)
    assert sorted((bare(c) for c in found), key=lambda c: c.index) == [alone("fixed", 0), alone("fixed", 1)]


def test_requested_votes_come_first_then_new_images_then_speculative_votes() -> None:
    run = scheduler("anytime", [0, 1, 2])
    first = run.next_batch(32, speculate=False)  # 20 votes select the class of one image: two tiles
    assert first is not None and [s.image for s in first.spans] == [0]
    second = run.next_batch(32, speculate=False)
    assert second is not None and [s.image for s in second.spans] == [1]
    assert run.receive(first.number, draw(first), 1.0) == []
    third = run.next_batch(32, speculate=False)  # image 0 now waits for votes, and image 2 is new
    assert third is not None and [(s.image, s.purpose) for s in third.spans] == [(0, "estimate")]
    fourth = run.next_batch(96, speculate=False)
    assert fourth is not None and [s.image for s in fourth.spans] == [0, 2, 0]
    assert run.next_batch(32, speculate=False) is None  # no image waits for votes
    ahead = run.next_batch(32)
    assert ahead is not None and {s.image for s in ahead.spans} == {0}


def test_the_oldest_batch_is_duplicated_once_for_an_idle_worker() -> None:
    run = scheduler("fixed", [0, 1])
    out = [run.next_batch(48, speculate=False), run.next_batch(48, speculate=False)]
    assert [run.next_batch(48), run.next_batch(48), run.next_batch(48)] == [*out, None]
    assert run.next_batch(48, speculate=False) is None


def test_a_duplicate_counts_as_a_batch() -> None:
    """A worker gets a duplicate of its own batch when the other worker leaves: it has two, and gets no third."""
    dispatcher, one, other = Dispatcher(), FakeWorker(), FakeWorker()
    dispatcher.open(0, scheduler("fixed", [0]), 48)
    dispatcher.join(one)
    dispatcher.join(other)
    dispatcher.fill()
    assert one.has == other.has and len(one.has) == 1
    dispatcher.leave(other)
    dispatcher.fill()
    assert len(one.has) == 2
    number, batch = one.has.pop()
    dispatcher.answer(one, number, batch.number, draw(batch), 1.0)
    dispatcher.fill()
    assert len(one.has) == 2
    assert dispatcher.leave(one) == Counter((n, b.number) for n, b in one.has)


def test_an_answer_of_another_length_is_refused() -> None:
    run = scheduler("fixed", [0])
    batch = run.next_batch(64)
    assert batch is not None
    with pytest.raises(ValueError, match="votes for a batch of"):
        run.receive(batch.number, draw(batch)[1:], 1.0)
