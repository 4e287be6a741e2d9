"""Feed random inputs to the readers of untrusted files: python tests/fuzz/search.py PROPERTY[,...]|all SECONDS

Options: --guided prefers inputs that reach new code of bench, one property at a time (atheris; Linux only: pip install
atheris); --seed N repeats a search. A failure does not end the search. For each property it prints how many inputs were
tried (bytes from which hypothesis makes no input do not count), how many were read or refused, and each distinct
failure with its input. Exit code 1 where there was a failure.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LENGTHS = [64, 256, 1024, 4096]  # bytes from which hypothesis makes an input
sys.path.insert(0, str(HERE.parents[1]))

failures: Counter[str] = Counter()
shown: dict[str, str] = {}


def attempt(prop: Any, data: bytes) -> bool:
    """Return whether the bytes made an input; keep a failure under the place that raised it."""
    try:
        return prop.hypothesis.fuzz_one_input(data) is not None
    except Exception as e:
        frames = [f for f in traceback.extract_tb(e.__traceback__) if "hypothesis" not in f.filename]
        inside = [f for f in frames if "/bench/" in f.filename] or frames
        key = f"{type(e).__name__} at {Path(inside[-1].filename).name}:{inside[-1].lineno} {inside[-1].line}"
        failures[key] += 1
        shown.setdefault(key, f"{e!s:.300}\n    {data.hex()[:200]}\n    " + "\n    ".join(map(str, frames[-6:])))
        return True


def report(name: str, began: float, tried: int) -> None:
    """Print how many inputs were tried, and with which outcomes."""
    from tests.fuzz.judging import outcomes

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # of the process; on Linux in kilobytes
    said = ", ".join(f"{what} {count:,}" for what, count in sorted(outcomes.items()))
    spent = time.monotonic() - began
    print(f"{name}: {tried:,} inputs in {spent:.0f} s; {said}; {len(failures)} distinct failures; peak {peak:,} MB")
    for key, count in failures.most_common():
        print(f"  {count} x {key}\n    {shown[key]}")
    sys.stdout.flush()


def main() -> None:
    """Search until the time is up."""
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("property")
    args.add_argument("seconds", type=float)
    args.add_argument("--guided", action="store_true")
    args.add_argument("--seed", type=int, default=0)
    given = args.parse_args()
    warnings.simplefilter("ignore")  # Pillow's, about damaged pictures
    logging.getLogger("timm").setLevel(logging.ERROR)
    if given.guided:
        import atheris

        with atheris.instrument_imports(include=["bench"]):
            from tests.fuzz import cards_and_logs, data, folders, judging, progress, served, shifted
    else:
        from tests.fuzz import cards_and_logs, data, folders, judging, progress, served, shifted
    known = {
        name: prop
        for module in (cards_and_logs, data, folders, progress, served, shifted)
        for name, prop in vars(module).items()
    }
    every = [name for name, prop in known.items() if hasattr(prop, "hypothesis")]
    names = every if given.property == "all" else given.property.split(",")
    began, tried = time.monotonic(), 0
    prop = known[names[0]]

    def one(data: bytes) -> None:
        nonlocal tried
        tried += attempt(prop, data)

    source = random.Random(given.seed)
    if given.guided:
        folder = tempfile.mkdtemp(prefix="fuzz-")
        for number in range(100):  # an empty corpus takes long to reach a valid length
            (Path(folder) / str(number)).write_bytes(source.randbytes(source.choice(LENGTHS)))
        flags = [f"-max_len={LENGTHS[-1]}", "-len_control=0", f"-seed={given.seed + 1}", "-verbosity=0", folder]

        def timed(data: bytes) -> None:
            one(data)
            if time.monotonic() - began > given.seconds:
                report(given.property, began, tried)
                shutil.rmtree(folder)
                os._exit(bool(failures))  # as libFuzzer exits: no exit handler may run

        atheris.Setup([sys.argv[0], *flags], timed)
        atheris.Fuzz()
    failed = False
    for name in names:
        prop, began, tried = known[name], time.monotonic(), 0
        source.seed(given.seed)
        while time.monotonic() - began < given.seconds:
            one(source.randbytes(source.choice(LENGTHS)))
        report(name, began, tried)
        failed |= bool(failures)
        for kept in (failures, shown, judging.outcomes):
            kept.clear()
    sys.exit(failed)


if __name__ == "__main__":
    main()
