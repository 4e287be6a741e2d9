"""Certificates kept as columns: the rows that went in come out, what is no certificate is refused, little memory."""

from __future__ import annotations

import json
import math
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.errors import BenchError
from bench.records import metrics
from bench.records.columns import NULL, Columns, column
from bench.records.record import ImportedCertificate, read_run
from bench.smoothing.votes import Certificate
from tests.helpers.records import begun

LARGE = st.integers(NULL + 1, 2**63 - 1)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
MAYBE = st.none() | st.integers(0, 9)
CERTIFICATES = st.builds(
    Certificate,
    predicted=MAYBE,
    radius=st.floats(0, 2),
    n0=LARGE,
    n=LARGE,
    top_count=LARGE,
    runner_up=MAYBE,
    runner_up_count=LARGE,
    p_lower=FLOATS,
    votes=LARGE,
    index=LARGE,
    label=st.integers(0, 9),
    seconds=FLOATS,
)
CLAIMS = st.builds(
    ImportedCertificate,
    index=LARGE,
    label=st.integers(0, 9),
    predicted=MAYBE,
    radius=st.floats(0, 2),
    votes=st.none() | LARGE,
    seconds=st.none() | FLOATS,
)


@given(rows=st.lists(CERTIFICATES, max_size=8) | st.lists(CLAIMS, min_size=1, max_size=8))
def test_rows_come_out_as_they_went_in(rows: list[Certificate] | list[ImportedCertificate]) -> None:
    kept: Columns[Certificate | ImportedCertificate] = Columns(
        ImportedCertificate if rows and isinstance(rows[0], ImportedCertificate) else Certificate
    )
    for row in rows:
        kept.append(row)
    assert list(kept) == rows and len(kept) == len(rows)
    assert [kept[i] for i in range(-len(rows), len(rows))] == [*rows, *rows]
    assert kept[1:] == rows[1:] and kept[::-1] == rows[::-1]
    with pytest.raises(IndexError):
        kept[len(rows)]
    for name in ("index", "predicted", "radius"):
        assert column(kept, name).tolist() == column(rows, name).tolist()
    if rows:
        first = next(i for i, row in enumerate(kept) if row.index == rows[-1].index)
        assert kept.place("index", rows[-1].index) == first


@given(rows=st.lists(CERTIFICATES, max_size=30), radii=st.lists(st.floats(0, 2), max_size=4), data=st.data())
def test_a_summary_is_what_counting_one_by_one_gives(
    rows: list[Certificate], radii: list[float], data: st.DataObject
) -> None:
    radii = radii + data.draw(st.lists(st.sampled_from([r.radius for r in rows] or [0.0]), max_size=2))
    kept = Columns(Certificate)
    for row in rows:
        kept.append(row)
    for label in (None, 3):
        own = [r for r in rows if label in (None, r.label)]
        found = metrics.summarise(kept, radii, label)
        assert found == metrics.summarise(rows, radii, label)
        assert found.images == len(own)
        right = [r for r in own if r.predicted == r.label]
        assert [p.count for p in found.certified_accuracy] == [sum(r.radius >= x for r in right) for x in radii]
        assert found.abstained.count == sum(r.predicted is None for r in own)
        assert found.acr == pytest.approx(math.fsum(r.radius for r in right) / max(1, len(own)))
    json.dumps(metrics.summarise(kept, radii).as_json())


def test_an_image_counts_at_its_own_radius() -> None:
    """As every anytime certificate has it: a radius of the grid itself."""
    rows = [Certificate(3, r, 10, 100, 90, None, 0, 0.8, 110, index=i, label=3) for i, r in enumerate((0.25, 0.5))]
    found = metrics.summarise(rows, [0.25, math.nextafter(0.25, 1), 0.5, math.nextafter(0.5, 1)])
    assert [p.count for p in found.certified_accuracy] == [2, 1, 1, 0]


GOOD = vars(Certificate(1, 0.1, 10, 100, 90, None, 0, 0.8, 110, index=1, label=1, seconds=0.5))


def _begun(folder: Path, count: int) -> None:
    """Write a run.json of ``count`` images, none of them done."""
    (folder / "run.json").write_text(json.dumps(begun(count).as_json()))


@pytest.mark.parametrize(
    "change",
    [
        {"index": "1"},
        {"index": 1.0},
        {"index": None},
        {"index": True},
        {"index": 2**63},
        {"index": NULL},
        {"label": [1]},
        {"predicted": 0.5},
        {"radius": "0.1"},
        {"radius": None},
        {"radius": math.nan},
        {"radius": math.inf},
        {"radius": 10**400},
        {"p_lower": False},
        {"seconds": {}},
        {"unknown": 1},
    ],
    ids=str,
)
def test_what_is_of_another_type_is_refused_with_its_line(tmp_path: Path, change: dict[str, object]) -> None:
    _begun(tmp_path, 3)
    lines = [json.dumps(GOOD | {"index": 2}), json.dumps(GOOD | change)]
    (tmp_path / "certificates.jsonl").write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(BenchError, match=r"certificates.jsonl:2: not a certificate: .{5,}"):
        read_run(tmp_path)


@pytest.mark.parametrize("line", [b"\xff\xfe", b"[" * 100_000, b"[]", b"1", b"", json.dumps({"index": 1}).encode()])
def test_a_line_that_is_no_row_is_refused(tmp_path: Path, line: bytes) -> None:
    _begun(tmp_path, 2)
    (tmp_path / "certificates.jsonl").write_bytes(line + b"\n")
    with pytest.raises(BenchError, match=r"certificates.jsonl:1: (not a certificate|a line of more than)"):
        read_run(tmp_path)


def test_a_claim_knows_no_counts() -> None:
    imported = vars(ImportedCertificate(1, 1, 1, 0.5))
    with pytest.raises(ValueError, match="n is 5"):
        Columns(ImportedCertificate).add(imported | {"n": 5})


def test_a_certificate_takes_little_memory(tmp_path: Path) -> None:
    """At most 110 bytes each once read (twelve numbers of eight, and the room arrays grow by), 150 while reading.

    The identity's own list of images, which is no certificate's, is not counted.
    """
    rows, one = 20_000, Certificate(1, 0.1, 100, 1000, 900, 0, 100, 0.8, 1100, label=1, seconds=0.5)
    _begun(tmp_path, rows)
    with (tmp_path / "certificates.jsonl").open("w") as f:
        f.writelines(json.dumps(vars(replace(one, index=i))) + "\n" for i in range(rows))
    read_run(tmp_path)
    tracemalloc.start()
    try:
        record = read_run(tmp_path)
        held, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(record.certificates) == rows
    images = record.identity.indices
    other = sys.getsizeof(images) + sum(map(sys.getsizeof, images))
    assert held - other <= 110 * rows
    assert most - other <= 150 * rows
