"""Best-sigma curves: the sigma of a radius is chosen on validation images, never on test images."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.records.columns import Columns
from bench.records.grouping import reach
from bench.records.record import Record, read_run
from bench.report import envelopes
from bench.smoothing import bounds
from bench.smoothing.votes import Certificate
from tests.helpers.commands import TINY, Result
from tests.helpers.records import RADII, made_up

Bench = Callable[..., Result]
SIGMAS = (0.12, 0.25, 0.5)


@pytest.fixture(scope="module")
def pattern(tmp_path_factory: pytest.TempPathFactory) -> Record:
    return read_run(made_up(tmp_path_factory.mktemp("runs"), [0.3] * 10))


def record(pattern: Record, split: str, sigma: float, radii: Sequence[float], seed: int = 0) -> Record:
    """The pattern certified on another split at another sigma, with these radii."""
    of_split = {"split": split, "images": split, "indices": list(range(len(radii)))}
    identity = pattern.identity.replace(sigma=sigma, train_sigma=sigma, seed=seed, **of_split)
    certificates = Columns(Certificate)
    for i, radius in enumerate(radii):
        certificates.append(replace(pattern.counted[0], index=i, label=1, predicted=1, radius=radius))
    return replace(pattern, info=pattern.info.replace(identity=identity), certificates=certificates)


SHARES = st.lists(st.sampled_from([0.0, 0.1, 0.3, 0.6, 0.9]), min_size=6, max_size=6)


@given(validation=st.tuples(SHARES, SHARES, SHARES), one=st.tuples(SHARES, SHARES, SHARES), other=st.data())
def test_the_choice_is_a_function_of_validation_alone(
    pattern: Record, validation: tuple[list[float], ...], one: tuple[list[float], ...], other: st.DataObject
) -> None:
    chosen = []
    for test in (one, other.draw(st.tuples(SHARES, SHARES, SHARES))):
        runs = [record(pattern, "validation", s, radii) for s, radii in zip(SIGMAS, validation, strict=True)]
        tests = [record(pattern, "test", s, radii) for s, radii in zip(SIGMAS, test, strict=True)]
        (found,) = envelopes.find([*tests, *runs])
        (row,) = found.curves
        assert row.sigmas == list(SIGMAS) and not found.lacking
        for point in row.points:
            within = [k for k in range(3) if point.radius <= reach(tests[k])]
            counts = [sum(r >= point.radius for r in validation[k]) for k in within]
            at = within[counts.index(max(counts))]  # the smallest sigma of equals
            assert point.sigma == SIGMAS[at]
            assert point.validation == pytest.approx(max(counts) / 6)
            held = sum(r >= point.radius for r in test[at])
            assert (point.value, point.low, point.high) == pytest.approx((held / 6, *bounds.interval(held, 6)))
        assert {p.radius for p in row.points} == {r for r in RADII if r <= max(map(reach, tests))}
        chosen.append([(p.radius, p.sigma, p.validation) for p in row.points])
    assert chosen[0] == chosen[1]


def test_each_test_part_has_its_own_curves_chosen_on_validation(pattern: Record) -> None:
    parts = {"test": [0.6] * 6, "test-ood": [0.0] * 6, "train": [0.9] * 6}
    runs = [record(pattern, part, sigma, radii) for part, radii in parts.items() for sigma in SIGMAS]
    runs += [record(pattern, "validation", s, [0.1 * k] * 6) for k, s in enumerate(SIGMAS)]
    found = {e.split: e for e in envelopes.find(runs)}
    assert list(found) == ["test", "test-ood"]  # training images have none
    for name, envelope in found.items():
        (curve,) = envelope.curves
        assert [p.sigma for p in curve.points] == [p.sigma for p in found["test"].curves[0].points]
        assert curve.points[1].value == float(name == "test")
        assert f"{name} images" in envelope.heading and f"95% interval are of the {name} images" in envelope.note


def test_a_row_needs_two_sigmas_of_the_same_method_and_seeds_on_both_splits(pattern: Record) -> None:
    def runs(split: str, sigmas: Sequence[float], seeds: Sequence[int] = (0,), **change: Any) -> list[Record]:
        made = [record(pattern, split, s, [0.3] * 6, seed) for s in sigmas for seed in seeds]
        return [replace(r, info=r.info.replace(identity=r.identity.replace(**change))) for r in made]

    tests = runs("test", (0.25, 0.5))
    assert envelopes.find([]) == [] and envelopes.find(runs("validation", (0.25, 0.5))) == []
    assert envelopes.find(runs("test", (0.25,))) == []  # one sigma: nothing to choose
    (ready,) = envelopes.find(tests + runs("validation", (0.25, 0.5)))
    assert len(ready.curves) == 1 and ready.lacking == [] and ready.validation_images == 6
    for others in (
        [],
        runs("validation", (0.25,)),
        runs("validation", (0.25, 0.5), seeds=(1,)),
        runs("validation", (0.25, 0.5), bound="another"),
        runs("validation", (0.25, 0.5), base={"name": "vit", "sha256": "a" * 64}),
        runs("validation", (0.25, 0.5), defense=pattern.identity.defense.replace(config={"rank": 8})),
        runs("validation", (0.25, 0.5), train_sigma=0.3),
    ):
        (found,) = envelopes.find(tests + others)
        assert found.curves == [] and found.lacking == ["lora"]
        assert "--split validation" in found.note
    # Of three sigmas on test only those two can be chosen that validation has too.
    (partly,) = envelopes.find(runs("test", SIGMAS) + runs("validation", (0.25, 0.5)))
    assert partly.curves[0].sigmas == [0.25, 0.5]
    # Seeds are pooled.
    (seeds,) = envelopes.find(runs("test", (0.25, 0.5), (0, 1)) + runs("validation", (0.25, 0.5), (0, 1)))
    assert seeds.curves[0].label == "lora (2 seeds)" and "Left out" not in seeds.note


def test_only_seeds_on_both_splits_are_in_a_curve(pattern: Record) -> None:
    # Seed 1 was run on test images alone, and certifies everything there.
    tests = [record(pattern, "test", s, [0.3] * 3 + [0.0] * 3) for s in (0.25, 0.5)]
    tests += [record(pattern, "test", 0.25, [0.9] * 6, seed=1)]
    validation = [record(pattern, "validation", s, [0.3] * 6) for s in (0.25, 0.5)]
    (found,) = envelopes.find(tests + validation)
    (curve,) = found.curves
    assert (curve.label, curve.points[1].value) == ("lora", 0.5)
    assert "Left out: runs of lora whose seed was not run on validation images too." in found.note
    (both,) = envelopes.find([*tests, *validation, record(pattern, "validation", 0.25, [0.3] * 6, seed=1)])
    assert both.curves[0].label == "lora (1 to 2 seeds)" and both.curves[0].points[1].value == 0.75
    assert "Left out" not in both.note


def runs_of(out: Path, split: str, radii: Mapping[float, Sequence[float | None]], name: str = "lora_&|<b>") -> None:
    of_split: dict[str, Any] = {"split": split, "images": split}
    for sigma, found in radii.items():
        made_up(out, found, name=name, sigma=sigma, train_sigma=sigma, **of_split)


def test_every_format_shows_the_curve_and_labels_validation(bench: Bench, tmp_path: Path) -> None:
    """On validation .25 is best at 0 and .5 at .5; on test the reverse."""
    good, poor = [0.6] * 9 + [None], [0.1] * 9 + [None]
    runs_of(tmp_path / "runs", "test", {0.25: [0.3] * 4 + [None] * 6, 0.5: [0.6] * 3 + [0.1] * 7})
    lacking = bench("report", tmp_path / "runs")
    assert "best-sigma curve:" not in lacking.out and "--split validation and the same sigmas and seeds" in lacking.out
    runs_of(tmp_path / "runs", "validation", {0.25: [*good[:8], 0.1, 0.1], 0.5: poor})
    shown = bench("report", tmp_path / "runs")
    assert shown.code == 0, shown.err
    at = shown.out.index("best-sigma curve: 10 test images")
    (row,) = (line for line in shown.out[at:].splitlines() if line.startswith("| lora"))
    cells = [c.strip() for c in row.replace(r"\|", "/").split("|")]
    assert cells[1:3] == [r"lora_&/\<b\>", "0.25, 0.5"]
    assert cells[3].startswith("40.0% at 0.25<br><sub>12.2-")
    assert shown.out.count("These are validation images, for choosing settings") == 2
    assert shown.out.index("10 test images") < shown.out.index("10 validation images")
    one = next(r for r in (tmp_path / "runs").iterdir() if read_run(r).identity.split == "validation")
    assert bench("report", one, "--out", tmp_path / "out").code == 0
    assert {f.name.partition("-s0")[0] for f in (tmp_path / "out").glob("*.svg")} == {"digits-validation"}

    (found,) = json.loads(bench("report", tmp_path / "runs", "--format", "json").out)["envelopes"]
    (method,) = found["rows"]
    # Beyond .615 no image can be certified at .25.
    assert [(p["sigma"], p["value"]) for p in method["points"]] == [(0.25, 0.4), (0.25, 0.4), (0.25, 0.0), (0.5, 0.0)]
    latex = bench("report", tmp_path / "runs", "--format", "latex").out
    name = r"lora\_\&\textbar{}\textless{}b\textgreater{}"
    assert name + r" & 0.25, 0.5 & \certified{40.0 (0.25)}{[" in latex
    assert bench("report", tmp_path / "runs", "--format", "html", "--out", tmp_path / "page.html").code == 0
    page = (tmp_path / "page.html").read_text()
    assert "<h3>Best-sigma curve</h3>" in page and "lora_&amp;|&lt;b&gt;" in page and "<b>" not in page
    assert "digits, validation images</h2>" in page


def test_published_results_are_never_shown_with_validation_images(bench: Bench, tmp_path: Path) -> None:
    for split in ("test", "validation"):
        made_up(tmp_path / split, [0.3] * 10, dataset="cifar10", split=split)
        shown = bench("report", tmp_path / split, "--published").out
        assert ("Cohen 2019" in shown) == (split == "test")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A defense certified at two sigmas on both splits."""
    from bench.cli import main

    out = tmp_path_factory.mktemp("real")
    flags = ["run", "--defense", "none", "--sigma", ".12,.25", "--device", "cpu"]
    for split in ("test", "validation"):
        with pytest.raises(SystemExit) as stop:
            main([*flags, "--dataset", TINY, "--split", split, "--out", str(out)])
        assert not stop.value.code
    return out


def test_a_real_run_of_the_validation_split(bench: Bench, real: Path, tmp_path: Path) -> None:
    records = {(r.identity.split, r.identity.sigma): r for r in map(read_run, real.iterdir())}
    assert len(records) == 4
    (found,) = envelopes.find(list(records.values()))
    assert [row.sigmas for row in found.curves] == [[0.12, 0.25]]
    one, other = records["test", 0.25], records["validation", 0.25]
    assert one.identity.images != other.identity.images
    assert one.identity.base == other.identity.base
    verified = bench("verify", other.path)
    assert verified.code == 0 and "drawn again from the seed give the recorded counts, exactly" in verified.out
    refused = bench("compare", one.path, other.path)
    assert refused.code == 3 and "split is test and validation" in refused.err
    again = bench("run", "--defense", "none", "--dataset", TINY, "--split", "validation", "--out", real)
    assert again.code == 0 and "already complete" in again.err

    for record in (one, other):
        shutil.copytree(record.path, tmp_path / "both" / record.path.name)
    shutil.copytree(one.path, tmp_path / "one" / one.path.name)
    baseline = tmp_path / "baseline.json"
    assert bench("check", tmp_path / "both", "--baseline", baseline, "--update").code == 0
    assert bench("check", tmp_path / "both", "--baseline", baseline).code == 0
    missing = bench("check", tmp_path / "one", "--baseline", baseline)
    assert missing.code == 3 and "validation images" in missing.out and "--split validation" in missing.out


def test_votes_of_two_splits_have_other_noise() -> None:
    """The same image number on another split is another key."""
    from bench.smoothing.noise import Noise, Vote

    key = [Vote("estimate", 3, 0)]
    assert (Noise(0, "test").words(key, 8) != Noise(0, "validation").words(key, 8)).any()


def test_a_small_validation_split_is_taken_whole(bench: Bench, tmp_path: Path) -> None:
    """A preset's number is meant for test: of a smaller validation split, all images are taken. --examples is exact."""
    card = tmp_path / "card.toml"
    card.write_text(Path(TINY).read_text().replace("validation = 100", "validation = 5"))
    args = ("run", "--defense", "none", "--dataset", card, "--split", "validation", "--dry-run", "--json")
    (row,) = json.loads(bench(*args).out)
    assert row["images"] == 5
    refused = bench(*args, "--examples", "8")
    assert refused.code == 2 and "must be 1 to 5 (the validation split's size)" in refused.err
    (row,) = json.loads(bench(*args, "--examples", "every:2").out)
    assert row["images"] == 3
    unknown = bench(*args[:-4], "--split", "training")
    assert unknown.code == 2 and "unknown --split 'training'" in unknown.err
