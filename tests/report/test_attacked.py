"""Certified and attacked accuracy in reports: the same images, the budget always beside the numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.records import attacks
from bench.records.record import read_run
from bench.report import figures, tables
from tests.helpers.commands import Bench
from tests.helpers.records import made_up

RECORDS = Path(__file__).parents[2] / "reports" / "digits" / "runs"
BUDGET = (
    "PGD 20 steps x 32 draws x 2 starts, query 20 steps x 128 pairs of draws; decided on 1,000 votes at alpha 0.001"
)


def decision(by: str, radius: float, predicted: int | None) -> dict[str, Any]:
    found = {"by": by, "radius": radius, "distance": radius * 0.999, "predicted": predicted}
    return found | {"top_count": 900, "runner_up_count": 100}


def attacked(folder: Path, outcomes: list[list[int | None]], **changes: Any) -> None:
    """Write an attack at radii .25 and .5; per image the classes decided on the clean image and at each radius."""
    record = read_run(folder)
    settings = {
        **{"version": 1, "run": record.identity.sha256, "certificates": record.info.certificates_sha256},
        **{"preset": "standard", "radii": [0.25, 0.5], "checked": 0.5, "indices": list(range(len(outcomes)))},
        **{"white_box": True, "steps": 20, "draws": 32, "restarts": 2, "query_steps": 20, "query_pairs": 128},
        **{"n": 1000, "alpha": 0.001, **changes},
    }
    name = attacks.AttackSettings.of(settings).name
    lines: list[dict[str, Any]] = [{"attack": name, "settings": settings, "environment": {}}]
    for index, (clean, *others) in enumerate(outcomes):
        results = [decision("clean", 0.0, clean)]
        results += [decision("pgd", r, p) for r, p in zip((0.25, 0.5), others, strict=False)]
        image = {"attack": name, "index": index, "label": index % 10, "results": results}
        lines.append({**image, "gradients": 40, "zero": 0, "alarms": []})
    with (folder / attacks.NAME).open("a") as f:
        f.writelines(json.dumps(line) + "\n" for line in lines)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Ten images, of which the first six are attacked: 0 wrong when clean, 1 and 2 fall, 3 abstains, 4 and 5 hold."""
    made = made_up(tmp_path / "runs", [0.3, 0.1, 0.3, 0.3, 0.6, 0.3, 0.6, 0.6, 0.6, 0.6], wrong=[0])
    attacked(made, [[1], [1, 9], [2, 2, 9], [3, 3, None], [4, 4, 4], [5, 5, 5]])
    return made


def test_the_table_has_both_accuracies_on_the_same_images_and_the_budget(bench: Bench, run: Path) -> None:
    found = bench("report", run.parent)
    assert found.code == 0, found.err
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in found.out.splitlines() if BUDGET in line]
    assert [row[1] for row in rows] == ["0", "0.25", "0.5"]
    # Of 6 images: certified 5, 4 (image 1 has .1) and 1 (image 4); attacked 1, 2 and 3; one abstains at .5.
    assert [row[2].split()[0] for row in rows] == ["83.3", "66.7", "16.7"]
    assert [row[3].split()[0] for row in rows] == ["83.3", "66.7", "50.0"]
    assert [row[4].split()[0] for row in rows] == ["0.0", "0.0", "16.7"]
    assert rows[2][3] == "50.0 (11.8 to 88.2)"  # Clopper-Pearson for 3 of 6, as published tables have it
    assert "An attack that fails proves nothing" in found.out


def test_every_format_has_the_attack_with_its_budget(bench: Bench, run: Path, tmp_path: Path) -> None:
    for suffix in ("md", "tex", "html", "json"):
        out = tmp_path / f"r.{suffix}"
        assert bench("report", run.parent, "--out", out).code == 0
        text = out.read_text()
        if suffix == "json":
            (found,) = json.loads(text)["tables"][0]["attacks"]
            assert found["settings"]["steps"] == 20 and found["accuracy"][2]["attacked"]["count"] == 3
        else:
            assert BUDGET in text
    assert "-attacked.svg)" in (tmp_path / "r.md").read_text()
    (svg,) = tmp_path.glob("*-attacked.svg")
    assert svg.stat().st_size > 1000


def test_the_band_lies_between_what_is_certified_beyond_and_attacked_within(run: Path) -> None:
    (table,) = tables.build(tables.load_records(run)[0]).tables
    (one,) = table.attacks.shown
    radii, low, high = one.band
    assert radii == [0, 0.25, 0.25, 0.5]
    assert low == pytest.approx([100 * 4 / 6] * 2 + [100 / 6] * 2)
    assert high == pytest.approx([100 * 5 / 6] * 2 + [100 * 4 / 6] * 2)


def test_a_report_without_attacks_has_no_figure_of_them(bench: Bench, run: Path, tmp_path: Path) -> None:
    (run / attacks.NAME).unlink()
    found = bench("report", run.parent, "--out", tmp_path / "out")
    assert "ttacked" not in found.out and not list((tmp_path / "out").glob("*-attacked*"))
    (table,) = tables.build(tables.load_records(run)[0]).tables
    assert figures.band(table, tmp_path, "x") == []


def test_the_attack_of_most_effort_is_shown_and_others_are_reported(bench: Bench, run: Path) -> None:
    attacked(run, [[1], [1, 1], [2, 2, 2], [3, 3, 3], [4, 4, 4], [5, 5, 5]], steps=10)  # weaker
    attacked(run, [[1], [1, 9]], steps=40, indices=[0, 1, 2])  # unfinished
    attacked(run, [[1], [1, 9]], run="0" * 64, indices=[0, 1])
    found = bench("report", run.parent)
    assert BUDGET in found.out and "PGD 10 steps" not in found.out and "PGD 40 steps" not in found.out
    assert "1 of other certificates than the run's; 1 unfinished" in found.out
    (run / attacks.NAME).write_text("{}\n")
    damaged = bench("report", run.parent)
    assert damaged.code == 0 and "attacks left out" in damaged.out and BUDGET not in damaged.out


def test_a_copied_record_keeps_its_attacks(bench: Bench, run: Path, tmp_path: Path) -> None:
    assert bench("export", run, "--record", tmp_path / "copies").code == 0
    copy = tmp_path / "copies" / run.name
    assert {f.name for f in copy.iterdir()} == {"run.json", "certificates.jsonl.gz", attacks.COMPRESSED}
    assert attacks.read(copy) == attacks.read(run)
    for format in ("md", "json"):
        both = [bench("report", place, "--format", format).out for place in (run.parent, copy.parent)]
        assert both[0] == both[1] and "attack" in both[0]


def test_reports_of_attacks_import_no_torch(run: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from bench.report import tables, text\n"
        f"print(text.render(tables.build(tables.load_records(Path({str(run.parent)!r}))[0]), 'md'))\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert BUDGET in done.stdout


def test_the_attacks_in_this_repository_lie_above_the_certificates_and_fall_with_the_radius() -> None:
    """As docs/attacks.md says of them; at alpha .001 a false certificate among a few hundred would be a fault."""
    (table,) = tables.build(tables.load_records(RECORDS)[0]).tables
    assert {one.method for one in table.attacks.shown} == {"none", "retrain", "full", "lora", "denoiser"}
    for one in table.attacks.shown:
        assert all(low <= high for low, high in zip(one.lower, one.upper, strict=True))
        assert list(one.upper) == sorted(one.upper, reverse=True) and one.upper[0] > one.upper[-1] + 10
        assert not one.attack.alarms
