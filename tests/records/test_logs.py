"""Reading released logs: every way to write a log reads the same, and no text breaks it."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bench.errors import BenchError
from bench.records.flaws import LogParameters
from bench.records.logs import read_log
from tests.helpers.logs import HEADER, ROWS, change, text

FORMS = {
    "crlf": text(ROWS).replace("\n", "\r\n").encode(),
    "mark": b"\xef\xbb\xbf" + text(ROWS).encode(),
    "blank": ("\n" + text(ROWS) + "\n\n  \n").encode(),
    "no end": text(ROWS).rstrip().encode(),
    "trailing tab": text([[*r, ""] for r in ROWS]).encode(),
    "spaces": text(ROWS).replace("\t", "   ").encode(),
    "scientific": text([[*r[:3], f"{float(r[3]):.5e}", *r[4:]] for r in ROWS]).encode(),
    "floats": text([[r[0], f"{r[1]}.0", f"{r[2]}.0", r[3], f"{r[4]}.0", r[5]] for r in ROWS]).encode(),
    "capitals": text(ROWS, HEADER.upper()).encode(),
    "truth": text([[*r[:4], "True" if r[4] == "1" else "False", r[5]] for r in ROWS]).encode(),
    "other order": text(ROWS[::-1]).encode(),
    "seconds": text([[*r[:5], "1.542e1" if ":" in r[5] else r[5]] for r in ROWS]).encode(),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_way_to_write_the_same_log_reads_the_same(form: str) -> None:
    stated = LogParameters("cohen", "any-data", 0.25, 0.001, 1000)
    expected = read_log(text(ROWS).encode(), stated, [0.25], 0)
    assert expected.flags == []
    assert read_log(FORMS[form], stated, [0.25], 0) == expected


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("0:02:32.717239", 152.717239), ("1 day, 1:00:01", 90001.0), ("2 days, 0:00:00.5", 172800.5), ("7", 7.0)],
)
def test_times(time: str, seconds: float) -> None:
    log = read_log(change(0, 5, time).encode(), LogParameters("cohen", "d", 0.25, 0.001, 1000), [], 0)
    assert log.certificates[0].seconds == pytest.approx(seconds) and log.flags == []


FIELD = st.one_of(
    st.integers(-(10**20), 10**20).map(str),
    st.floats().map(str),
    st.sampled_from(["", "-1", "1e400", "1e-999999999", "9" * 5000, "0x1", "1_0", "\u0663", "1 day, 0:00:01", "sNaN"]),
    st.text(max_size=5),
)


@given(
    rows=st.lists(st.lists(FIELD, min_size=5, max_size=7), max_size=12), format=st.sampled_from(["cohen", "adaptive"])
)
@example(rows=[[str(i), "1", "1", "0.1", "1", "1"] for i in (*range(20), 2**53)], format="cohen")
@settings(max_examples=50, deadline=None)
def test_whatever_a_file_holds_gives_sound_certificates_or_one_line(rows: list[list[str]], format: str) -> None:
    stated, refused = LogParameters(format, "d", 0.25, 0.001, 1000), ""
    try:
        log = read_log(text(rows).encode("utf-8", "ignore"), stated, [0.25], 10)
    except BenchError as e:
        refused = str(e)
    if refused:
        assert refused.isprintable()
        return
    certificates, flags = log.certificates, log.flags
    assert len({c.index for c in certificates}) == len(certificates) > 0
    for c in certificates:
        assert c.index >= 0 and c.label >= 0 and (c.predicted is None or c.predicted >= 0)
        assert math.isfinite(c.radius) and c.radius >= 0 and (c.predicted is not None or c.radius == 0)
        json.dumps(vars(c), allow_nan=False)
    assert all(flag.isprintable() for flag in flags)
