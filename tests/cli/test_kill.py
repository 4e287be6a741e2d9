"""kill -9 at any moment, then the same command: nothing lost, nothing repeated, the same counts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY

ARGS = ["run", "--defense", "full", "--dataset", TINY, "--examples", "60", "--n", "400", "--set", "epochs=8"]


def command(out: Path, cache: Path, *extra: str) -> subprocess.Popen[bytes]:
    env = {**os.environ, "CERTBENCH_CACHE": str(cache)}
    run = [sys.executable, "-m", "bench", *ARGS, *extra, "--out", str(out)]

    def heed_ctrl_c() -> None:  # a suite started in the background has it ignored, and children inherit that
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(run, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=heed_ctrl_c)


def certificates(out: Path) -> list[dict[str, object]]:
    (file,) = out.glob("*/certificates.jsonl")
    rows = [{**json.loads(line), "seconds": 0} for line in file.read_text().splitlines()]
    return sorted(rows, key=lambda r: r["index"])


def test_killed_and_resumed_equals_undisturbed(tmp_path: Path) -> None:
    whole = command(tmp_path / "whole", tmp_path / "cache-a")
    began = time.monotonic()
    assert whole.wait() == 0, whole.stderr.read().decode() if whole.stderr else ""
    took = time.monotonic() - began
    kept: list[dict[str, object]] = []
    kills = 0
    # In training, and twice in certification, once the first certificates are there.
    for wanted in (0, 5, 25):
        process = command(tmp_path / "parts", tmp_path / "cache-b")
        deadline = time.monotonic() + 10 * took + 60
        while process.poll() is None and time.monotonic() < deadline:
            files = list((tmp_path / "parts").glob("*/certificates.jsonl"))
            done = len(files[0].read_text().splitlines()) if files else 0
            started = any((tmp_path / "cache-b").glob("tiny-*"))
            if (wanted == 0 and started) or (wanted and done >= wanted):
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.005)
        process.wait()
        if list((tmp_path / "parts").glob("*/certificates.jsonl")):
            (file,) = (tmp_path / "parts").glob("*/certificates.jsonl")
            text = file.read_text()
            now = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
            assert now[: len(kept)] == kept  # what was certified before is still there, as it was
            kept = now
    assert kills == 3
    last = command(tmp_path / "parts", tmp_path / "cache-b")
    assert last.wait() == 0
    assert certificates(tmp_path / "parts") == certificates(tmp_path / "whole")
    assert [p.name for p in (tmp_path / "parts").iterdir()] == [p.name for p in (tmp_path / "whole").iterdir()]


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_says_how_to_resume(tmp_path: Path) -> None:
    process = command(tmp_path / "runs", tmp_path / "cache", "--n", "40000")
    while not list((tmp_path / "runs").glob("*/certificates.jsonl")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    err = process.stderr.read().decode()
    assert process.wait() == 130
    assert "same command again to resume" in err
    assert "Traceback" not in err
