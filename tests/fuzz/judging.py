"""Shared parts of the fuzz tests: strategies for inputs, and the check of each reader.

Inputs are valid ones with a few changes (``changed``, ``cut``), or bytes without structure. ``judge`` requires a
result or one clear line, within a time limit, and nothing written elsewhere; ``outcomes`` counts both.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from bench.errors import BenchError, shown

LONGEST = 10.0  # processor seconds that any input may take
outcomes: Counter[str] = Counter()

SCRATCH = Path(tempfile.mkdtemp(prefix="fuzz-")).resolve()
_watched: list[str] = []  # files written outside the scratch folder while a target runs
_watching = False


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if not _watching:
        return
    if event == "open":
        path, _, flags = args
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        if not writes or isinstance(path, int):
            return
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate"):
        path = args[1] if event in ("os.rename", "os.symlink", "os.link") else args[0]
    elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
        _watched.append(f"{event} {args}")
        return
    else:
        return
    where = os.path.realpath(os.fsdecode(path)) if isinstance(path, str | bytes | os.PathLike) else ""
    # Python's own cache, and the folder that torch makes for its compiler when it is first used.
    ours = where.startswith((str(SCRATCH), "/dev/null")) or "__pycache__" in where or "torchinductor" in where
    if where and not ours:
        _watched.append(f"{event} {where}")


sys.addaudithook(_audit)


@contextmanager
def scratch() -> Iterator[Path]:
    """Yield an empty folder, the only place that may be written."""
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        yield Path(folder)


def judge(name: str, read: Callable[[], object]) -> bool:
    """Return whether ``read`` gave a result (True) or refused (False); any other outcome fails."""
    global _watching
    _watched.clear()
    began = time.process_time()
    _watching = True
    try:
        read()
        fine = True
    except BenchError as e:
        said = shown(str(e))
        assert said, "a refusal that says nothing"
        assert said.isprintable()
        assert "Traceback" not in said
        fine = False
    finally:
        _watching = False
    spent = time.process_time() - began
    outcomes[f"{name}: {'read' if fine else 'refused'}"] += 1
    assert not _watched, f"{name} touched {_watched[:3]}"
    assert spent < LONGEST, f"{name} took {spent:.1f} s"
    return fine


# Strategies ------------------------------------------------------------------------------------------

NASTY: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 255, 2**31, 2**53 + 1, 2**63, 10**30, 10**400),
    *(0.0, -0.0, 0.5, 1.5, 1e-320, 1e308, float("nan"), float("inf"), float("-inf")),
    *(
        "",
        "x",
        "0",
        "1",
        "fixed",
        "../../x",
        "/etc/passwd",
        "./evil.py",
        "a\nb",
        "\x1b[2J",
        "\ud800",
        "é" * 300,
        "%s{0}",
    ),
    *([], {}, [[]], [0] * 300, [None], {"": None}, {"kind": "anytime"}, [1, 1], [0.5, 0.25]),
]
values = st.sampled_from(NASTY) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=6,
)
edits = st.lists(
    st.tuples(st.integers(0, 2**16), st.sampled_from(["replace", "delete", "add", "double"]), values),
    min_size=1,
    max_size=3,
)
# A change of bytes: the place, the number of bytes removed, and the bytes inserted.
_cut = st.tuples(st.integers(0, 2**16), st.integers(0, 64), st.binary(max_size=12))
_no: list[tuple[int, int, bytes]] = []
cuts = st.just(_no) | st.just(_no) | st.just(_no) | st.lists(_cut, max_size=2)  # mostly whole, else nothing parses


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container of a JSON value with each of its keys."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(pairs):
        yield value, key
        yield from _places(inner)


def changed(value: Any, changes: list[tuple[int, str, Any]]) -> Any:
    """Copy a JSON value and apply each change somewhere in it."""
    value = copy.deepcopy(value)
    for at, how, new in changes:
        new = copy.deepcopy(new)  # a second change must not alter NASTY's own lists
        places = list(_places(value))
        if not places:
            return new
        inside, key = places[at % len(places)]
        if how == "replace":
            inside[key] = new
        elif how == "delete":
            del inside[key]
        elif how == "double" and isinstance(inside, list):
            inside.append(inside[key])
        elif isinstance(inside, dict):
            inside[new if isinstance(new, str) else "extra"] = new
        else:
            inside.insert(key, new)
    return value


def cut(data: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    """Replace some bytes."""
    for at, gone, new in changes:
        at %= len(data) + 1
        data = data[:at] + new + data[at + gone :]
    return data


def dumped(value: Any) -> bytes:
    """Write any value as JSON text, also NaN and lone surrogates."""
    return json.dumps(value).encode()
