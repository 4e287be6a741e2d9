"""bench predict: a run's own pictures get its counts under its noise, and its distribution under fresh noise."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from bench.data.card import Card
from bench.data.datasets import load_card, load_split
from bench.data.given import read_picture
from bench.data.sources import SPLIT as SPLIT_NAME
from bench.process.console import ConsoleReporter
from bench.records.record import Record
from bench.runs import prediction
from bench.runs.prediction import Sampling, SmoothedModel, open_model
from bench.runs.rebuilding import finished
from bench.runs.session import Session
from bench.smoothing.noise import Noise
from tests.helpers.commands import TINY, Bench, defense
from tests.helpers.greys import DISTANCES, THRESHOLD, chances, make_card

PICTURES = 12  # of each class
SIGMA, N, N0 = 0.25, 1000, 50
HALF_SPACE = defense("half_space")
LEVEL = 1e-6  # chance that one of the statistical tests below fails for a sound program


def call(*args: object) -> None:
    from bench.cli import main

    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in args])
    assert not stop.value.code


@pytest.fixture(scope="module")
def greys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the half-space on grey pictures of 256 levels, beside its data in ``data``."""
    root = tmp_path_factory.mktemp("greys")
    card = make_card(root / "data", [0.0, 0.1, 0.2, 0.3], PICTURES, ("train", "test"))
    numbers = ("--sigma", SIGMA, "--n", N, "--n0", N0, "--examples", 2 * PICTURES)
    settings = ("--set", f"threshold={THRESHOLD!r}")
    call("run", "--defense", HALF_SPACE, "--dataset", card, *numbers, *settings, "--out", root / "runs")
    (folder,) = (root / "runs").iterdir()
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs on the tiny card of 17 levels: grid noise, float noise, a known label, and the anytime procedure."""
    kinds = {
        "grid": (),
        "float": ("--noise", "float"),
        "label": ("--target", "label"),
        "correct": ("--target", "correct"),
        "anytime": ("--procedure", "anytime", "--n", 600),
    }
    found = {}
    for kind, words in kinds.items():
        out = tmp_path_factory.mktemp(kind)
        call("run", "--defense", "retrain", "--dataset", TINY, *words, "--out", out)
        (found[kind],) = out.iterdir()
    return found


def opened(folder: Path, sampling: Sampling | None = None, **named: str) -> SmoothedModel:
    session = Session(torch.device("cpu"), folder.parent, ConsoleReporter())
    return open_model(finished(folder, "predict with"), session, sampling, **named)


def stored(card: Card, record: Record, folder: Path) -> dict[int, Path]:
    """Save the certified images as PNG files, level k as the nearest of 255 k / (levels - 1)."""
    folder.mkdir()
    split, files = load_split(card, record.identity.split), {}
    for c in record.certificates:
        values = np.rint(split.integers([c.index])[0] * (255 / (card.levels - 1))).astype(np.uint8)
        files[c.index] = folder / f"{c.index}.png"
        Image.fromarray(values[0] if len(values) == 1 else values.transpose(1, 2, 0)).save(files[c.index])
    return files


@pytest.mark.parametrize("kind", ["grid", "float", "anytime"])
def test_under_the_runs_noise_stored_pictures_get_exactly_its_certificates(
    digits: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    model = opened(digits[kind])
    record = model.record
    files = stored(model.card, record, tmp_path / "png")
    noise = Noise(record.identity.seed or 0, record.identity.split)
    for old in record.counted:
        picture = read_picture(model.card, files[old.index])
        assert (picture.changes, picture.fitted) == ((), ())
        new = model.certificate(picture, noise, old.index)
        assert asdict(new) == asdict(replace(old, seconds=new.seconds, label=-1))


def test_radii_under_fresh_noise_are_distributed_as_the_runs(greys: Path) -> None:
    model = opened(greys, defense=HALF_SPACE)
    file = greys.parents[1] / "data" / "test" / "light" / "00.png"
    found = [model(file) for _ in range(60)]
    assert len({p.seed for p in found}) == 60
    assert {(p.name, p.n0, p.n, p.votes) for p in found} == {("light", N0, N, N0 + N)}
    # Votes for the class are binomial with a known probability; the test of the counts is Kolmogorov's, conservative
    # for discrete values. A probability that is off by 0.01, or a sigma by 3%, would fail it.
    right = chances(SIGMA)[1]
    counts = [p.top_count for p in found]
    assert stats.kstest(counts, stats.binom(N, right).cdf).pvalue > LEVEL
    assert abs(sum(counts) - 60 * N * right) < stats.norm.isf(LEVEL / 2) * (60 * N * right * (1 - right)) ** 0.5 + 1
    own = [c.radius for c in model.record.counted if c.label == 1]
    assert stats.ks_2samp([p.radius for p in found], own).pvalue > LEVEL
    # Each certificate is at most alpha likely to exceed the true radius, and holds at what it says.
    true = DISTANCES[1]
    beyond = sum(p.radius > true for p in found)
    assert stats.binom.sf(beyond - 1, 60, 0.001) > LEVEL
    assert all(p.holds(p.radius) and not p.holds(p.radius + 1e-9) for p in found)


def test_predictions_agree_with_the_run_where_votes_are_clear(digits: dict[str, Path], tmp_path: Path) -> None:
    model = opened(digits["grid"], Sampling(n0=300))
    files = stored(model.card, model.record, tmp_path / "png")
    old = [c for c in model.record.counted if c.predicted is not None]
    assert old
    for c, new in zip(old, model.predict([files[c.index] for c in old]), strict=True):
        # Certified by the run at alpha 0.001: the class has more than half of the votes.
        assert new.name == model.card.classes[c.predicted or 0]
        table = np.array([[c.top_count, c.n - c.top_count], [new.top_count, new.n - new.top_count]])
        assert stats.fisher_exact(table).pvalue > LEVEL / len(old)


def test_a_command_prints_classes_radii_and_its_random_seed_which_repeats_it(bench: Bench, greys: Path) -> None:
    test = greys.parents[1] / "data" / "test"
    words = ("predict", greys, test / "light" / "03.png", test / "dark", "--defense", HALF_SPACE, "--radius", 0.1)
    first, second = bench(*words), bench(*words)
    assert first.code == 0, first.err
    lines = first.out.splitlines()
    assert re.search(r"03\.png +light +0\.\d{3} +(yes|no)$", lines[1].rstrip())
    assert len(lines) == 1 + 1 + PICTURES + 1
    seeds = [re.search(r"whose seed was (\d+)$", r.out.rstrip()) for r in (first, second)]
    assert seeds[0] and seeds[1] and seeds[0][1] != seeds[1][1]
    again = bench(*words, "--seed", seeds[0][1])
    assert again.out == first.out

    # A picture's answer depends on the seed, not on the pictures beside it.
    alone = bench("predict", greys, test / "dark" / "05.png", "--defense", HALF_SPACE, "--seed", 7, "--json")
    many = bench(*words, "--seed", 7, "--json")
    (one,) = json.loads(alone.out)["pictures"]
    (same,) = (p for p in json.loads(many.out)["pictures"] if p["picture"].endswith("dark/05.png"))
    assert {**one, "holds": same["holds"]} == same
    assert same["holds"] == (same["radius"] >= 0.1) and same["name"] == "dark" and same["predicted"] == 0
    assert json.loads(many.out)["seed"] == 7 and json.loads(many.out)["asked_radius"] == 0.1


def test_the_noise_is_never_that_of_the_run(digits: dict[str, Path], tmp_path: Path) -> None:
    assert not re.match(SPLIT_NAME, prediction.SPLIT)
    model = opened(digits["grid"], Sampling(n=2000))
    record = model.record
    files = list(stored(model.card, record, tmp_path / "png").values())
    of_run = Noise(record.identity.seed or 0, record.identity.split)
    drawn = [model.certificate(read_picture(model.card, file), of_run) for file in files]
    found = model.predict(files, seed=record.identity.seed)
    # Two counts of 2,000 independent votes are equal with a chance of a few percent, all eight hardly ever.
    assert [p.top_count for p in found] != [c.top_count for c in drawn]


@pytest.mark.parametrize("kind", ["label", "correct"])
def test_the_class_is_always_selected_since_a_picture_has_no_label(
    digits: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    model = opened(digits[kind])
    assert model.procedure.target == "selected"
    files = stored(model.card, model.record, tmp_path / "png")
    assert all(p.n == 100 and p.n0 == 20 for p in model.predict(list(files.values())))


def test_pictures_are_fitted_only_as_told_and_what_was_changed_is_printed(
    bench: Bench, greys: Path, tmp_path: Path
) -> None:
    large, lossy = tmp_path / "large.png", tmp_path / "lossy.jpg"
    Image.new("L", (20, 16), 140).save(large)
    Image.new("L", (8, 8), 140).save(lossy)
    words = ("predict", greys, large, lossy, "--defense", HALF_SPACE)
    refused = bench(*words)
    assert refused.code == 2 and "16x20 pixels, but the card's shape is 8x8; --fit resize-crop" in refused.err
    fitted = bench(*words, "--fit", "resize-crop")
    assert fitted.code == 0, fitted.err
    *_, of_large, of_lossy = fitted.out.splitlines()
    assert "large.png: shorter side scaled to 8 (bilinear), centre cropped to 8x8; the radius holds for the" in of_large
    assert "lossy.jpg: a JPEG copy, whose pixels differ" in of_lossy
    rows = json.loads(bench(*words, "--fit", "resize-crop", "--json").out)["pictures"]
    assert [(len(r["changes"]), len(r["fitted"])) for r in rows] == [(0, 1), (1, 0)]


def test_numbers_of_votes_and_alpha_can_be_changed(bench: Bench, greys: Path) -> None:
    file = greys.parents[1] / "data" / "test" / "light" / "00.png"
    words = ("predict", greys, file, "--defense", HALF_SPACE, "--seed", 1, "--json")
    found = json.loads(bench(*words, "--n", 300, "--n0", 40, "--alpha", 0.05).out)
    (one,) = found["pictures"]
    assert (one["n"], one["n0"], one["votes"], found["procedure"]["alpha"]) == (300, 40, 340, 0.05)
    wider = json.loads(bench(*words, "--n", 300, "--n0", 40).out)["pictures"][0]
    assert wider["top_count"] == one["top_count"] and wider["radius"] < one["radius"]


def test_an_anytime_run_tests_the_radius_asked_for_alone(digits: dict[str, Path], tmp_path: Path) -> None:
    own, asked = opened(digits["anytime"]), opened(digits["anytime"], Sampling(radius=0.1))
    files = list(stored(own.card, own.record, tmp_path / "png").values())
    assert {p.radius for p in own.predict(files)} <= {0.0, 0.25, 0.5}
    found = asked.predict(files)
    assert {p.radius for p in found} == {0.0, 0.1}
    assert [p.holds(0.1) for p in found] == [p.radius == 0.1 for p in found]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--radius", 3), "--radius 3: out of reach at sigma 0.25, n 1000 and alpha 0.001"),
        (("--radius", "nan"), "--radius nan: must be a number from 0 up"),
        (("--n", 3), "--n 3: too few votes for any certificate at alpha 0.001"),
        (("--fit", "croop"), "unknown --fit 'croop'"),
        (("--seed", -1), "--seed -1: must be a whole number from 0"),
        (("--device", "tpu"), "--device tpu: not available"),
    ],
)
def test_numbers_out_of_range_are_refused(bench: Bench, greys: Path, words: tuple[object, ...], problem: str) -> None:
    file = greys.parents[1] / "data" / "test" / "light" / "00.png"
    result = bench("predict", greys, file, "--defense", HALF_SPACE, *words)
    assert result.code == 2 and problem in result.err and not result.out


def test_records_without_a_model_and_unnamed_files_are_refused(bench: Bench, greys: Path, tmp_path: Path) -> None:
    file = greys.parents[1] / "data" / "test" / "light" / "00.png"
    result = bench("predict", greys, file)
    assert result.code == 2 and "its defense is a file, run only where you name it: --defense" in result.err
    begun = Path(shutil.copytree(greys, tmp_path / greys.name))
    info = json.loads((begun / "run.json").read_text())
    for key in ("cost", "metrics", "certificates_sha256"):
        del info[key]
    (begun / "run.json").write_text(json.dumps({**info, "status": "started"}))
    result = bench("predict", begun, file, "--defense", HALF_SPACE)
    assert result.code == 2 and "is not finished; finish it first: bench run" in result.err
    edited = tmp_path / "half_space.py"
    edited.write_text(Path(HALF_SPACE).read_text() + "# edited\n")
    result = bench("predict", greys, file, "--defense", edited)
    assert result.code == 2 and "has changed since certbench" in result.err


def test_weights_that_are_not_cached_are_trained_again_and_the_user_is_told(
    bench: Bench, digits: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = load_card(TINY)
    files = list(stored(card, finished(digits["grid"], "predict with"), tmp_path / "png").values())[:2]
    before = bench("predict", digits["grid"], *files, "--seed", 3, "--json")
    assert before.code == 0 and "training them again" not in before.err
    monkeypatch.setenv("CERTBENCH_CACHE", str(tmp_path / "empty"))
    after = bench("predict", digits["grid"], *files, "--seed", 3, "--json")
    assert "the weights of retrain are not in this cache; training them again" in after.err
    assert after.out == before.out


def test_an_imported_log_has_no_model(bench: Bench, tmp_path: Path) -> None:
    log = tmp_path / "log.tsv"
    log.write_text("idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t3\t3\t0.5\t1\t0:00:01\n1\t1\t-1\t0.0\t0\t0:00:01\n")
    numbers = ("--sigma", 0.25, "--alpha", 0.001, "--n", 1000)
    bench("import", log, "--dataset", "other", *numbers, "--out", tmp_path / "runs")
    (folder,) = (tmp_path / "runs").iterdir()
    result = bench("predict", folder, log)
    assert result.code == 2 and "an imported log comes without its model" in result.err
