"""bench attack on a classifier whose smallest adversarial distance is known, and on records that are forged.

All pictures of a class are the same grey, as in test_half_space.py. The smoothed half-space is a half-space again, with
the same boundary whatever sigma; a picture lies 0.39 from it. Nearer than that no attack can succeed. Where an attacked
image is .11 beyond it, a vote is for the other class with probability Phi(.11 / .25) = .67, so 500 votes decide that at
alpha .001 but for a chance of 2e-5.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from bench.records import attacks
from bench.records.attack_writer import AttackFile
from bench.records.masking import checks
from bench.records.record import read_run
from tests.helpers.commands import TINY, Bench, defense
from tests.helpers.greys import DISTANCES, GREYS, THRESHOLD, make_card
from tests.helpers.records import made_up, seal

SIGMA, N, PICTURES = 0.25, 1000, 4


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_card(tmp_path_factory.mktemp("greys"), [0.0, 0.3, 0.5], PICTURES)


def certified(card: str, out: Path, name: str = "half_space", *more: object) -> Path:
    from bench.cli import main

    known = ("--defense", defense(name), "--set", f"threshold={THRESHOLD!r}", "--examples", 2 * PICTURES)
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in ("run", "--dataset", card, *known, "--sigma", SIGMA, "--n", N, "--out", out, *more)])
    assert not stop.value.code
    (run,) = out.iterdir()
    return run


@pytest.fixture(scope="module")
def runs(card: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of the half-space with each noise, and of the one with shattered gradients."""
    place = tmp_path_factory.mktemp("runs")
    found = {noise: certified(card, place / noise, "half_space", "--noise", noise) for noise in ("grid", "float")}
    return found | {"shattered": certified(card, place / "shattered", "shattered")}


def copied(run: Path, place: Path) -> Path:
    return Path(shutil.copytree(run, place / run.name))


def attack(bench: Bench, run: Path, *more: object, name: str = "half_space", code: int = 0) -> Any:
    found = bench("attack", run, "--defense", defense(name), "--preset", "quick", *more, "--json")
    assert found.code == code, found.err
    return json.loads(found.out)[0]


@pytest.mark.parametrize("noise", ["grid", "float"])
def test_an_attack_succeeds_just_beyond_the_true_distance_and_never_within(
    bench: Bench, runs: dict[str, Path], tmp_path: Path, noise: str
) -> None:
    run = copied(runs[noise], tmp_path)
    found = attack(bench, run, "--radii", ".3,.38,.5")
    assert min(DISTANCES) > 0.385
    by_radius = {row["radius"]: row for row in found["accuracy"]}
    for radius in (0.0, 0.3, 0.38):
        # A decision for the other class would be false: a chance of at most .001 each, of 8 images and 5 decisions.
        assert by_radius[radius]["attacked"]["value"] == 1
    assert by_radius[0.5]["attacked"]["value"] == 0
    assert found["alarms"] == []
    (one,) = attacks.read(run)
    for image in one.images:
        (hit,) = [r for r in image.results if r.by == "pgd" and r.radius == 0.5]
        # In the direction of all pixels the ball's 0.5 is used up, to a step of the grid.
        assert hit.predicted == 1 - image.label and 0.495 < hit.distance <= 0.5
        right = stats.norm.cdf((DISTANCES[image.label] - hit.distance) / SIGMA)
        assert stats.binomtest(hit.top_count, 500, 1 - right).pvalue > 1e-7
    record = read_run(run)
    certified = [one.certified(record, r).value for r in (0.0, 0.3, 0.38, 0.5)]
    attacked = [one.attacked_accuracy(r).value for r in (0.0, 0.3, 0.38, 0.5)]
    assert certified == sorted(certified, reverse=True) and attacked == sorted(attacked, reverse=True)
    assert all(low <= high for low, high in zip(certified, attacked, strict=True))


def test_votes_of_an_attack_are_not_those_of_the_run(bench: Bench, runs: dict[str, Path], tmp_path: Path) -> None:
    """Each image's decision without perturbation has other votes: equal counts of 8 images have a chance below 1e-9."""
    run = copied(runs["grid"], tmp_path)
    attack(bench, run, "--radii", ".3")
    (one,) = attacks.read(run)
    clean = [image.results[0].top_count for image in one.images]
    assert len(set(clean)) > 1  # images of one grey have different noise
    attack(bench, run, "--radii", ".2")
    again = [image.results[0].top_count for image in attacks.read(run)[1].images]
    assert clean != again  # another attack draws other votes


def test_no_sign_of_masking_where_gradients_are_true(bench: Bench, runs: dict[str, Path], tmp_path: Path) -> None:
    found = attack(bench, copied(runs["grid"], tmp_path), "--radii", ".5")
    assert [c["status"] for c in found["checks"]] == ["ok"] * 5
    assert "it changes the class of 0 of 8 images at r = 0.5, PGD of 8" in found["checks"][4]["text"]


def test_shattered_gradients_are_detected(bench: Bench, runs: dict[str, Path], tmp_path: Path) -> None:
    found = attack(bench, copied(runs["shattered"], tmp_path), "--radii", ".6", name="shattered")
    box, zero, step, _, _ = found["checks"]
    assert box["status"] == "warning"
    assert "query changes the class of 8 of 8 images up to r = 0.6, PGD of 0" in box["text"]
    assert zero["status"] == "warning" and "(100.0%)" in zero["text"]
    assert step["status"] == "no evidence"
    # The query attack counts: the attacked accuracy is not fooled.
    assert found["accuracy"][-1]["attacked"]["value"] == 0


def test_without_gradients_answers_are_enough(bench: Bench, card: str, tmp_path: Path) -> None:
    run = certified(card, tmp_path / "runs", "blind")
    found = attack(bench, run, "--radii", ".3,.6", name="blind")
    assert found["settings"]["white_box"] is False
    assert [row["attacked"]["value"] for row in found["accuracy"]] == [1, 1, 0]
    assert found["checks"][0]["status"] == "no evidence"
    assert {r.by for image in attacks.read(run)[0].images for r in image.results} == {
        "clean",
        "query",
        "noise",
        "unbounded",
    }


def test_gradients_pass_a_base_that_the_defense_only_queries(bench: Bench, tmp_path: Path) -> None:
    """The certificates hold against attackers who know the base, so the attack uses it; the record stays true."""
    assert bench("run", "--defense", "none", "--dataset", TINY, "--out", tmp_path, "--n", 300).code == 0
    (run,) = tmp_path.iterdir()
    found = bench("attack", run, "--preset", "quick", "--radii", ".5", "--images", 2, "--json")
    assert found.code == 0, found.err
    assert json.loads(found.out)[0]["settings"]["white_box"] is True
    (one,) = attacks.read(run)
    assert sum(image.gradients for image in one.images) > 0 and sum(image.zero for image in one.images) == 0
    assert bench("verify", run).code == 0


def forged(run: Path, place: Path) -> Path:
    """Give image 0 the certificate that all votes agree, with the hash of the changed file."""
    copy = copied(run, place)
    record = read_run(copy)
    file = copy / "certificates.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    p_lower, radius = record.identity.procedure.recompute(SIGMA, N, N, record.identity.noise.tau)
    line = next(one for one in lines if one["index"] == 0)
    line |= {"top_count": N, "runner_up": None, "runner_up_count": 0, "p_lower": p_lower, "radius": radius}
    file.write_text("".join(json.dumps(one) + "\n" for one in lines))
    assert radius > 0.6
    return seal(copy)


@pytest.mark.parametrize("noise", ["grid", "float"])
def test_a_false_certificate_sounds_the_alarm(bench: Bench, runs: dict[str, Path], tmp_path: Path, noise: str) -> None:
    run = forged(runs[noise], tmp_path)
    found = bench("attack", run, "--defense", defense("half_space"), "--preset", "quick", "--radii", ".5")
    assert found.code == 1
    assert "ALARM" in found.err and "image 0: certified as class 0 up to r = 0.61" in found.err
    assert "at most 0.0" in found.err
    assert ("noise is float" in found.err) == (noise == "float")
    (one,) = attacks.read(run)
    assert {image.index for image, _ in one.alarms} == {0}
    # Of steps along the true gradient, .5 - .39 beyond the boundary, 500 votes miss the class with a chance of 1e-5.
    # An estimated direction ends nearer to it, so its second decision may abstain.
    confirmed = [alarm for _, alarm in one.alarms if alarm.confirmed]
    assert {"pgd", "step"} <= {alarm.by for alarm in confirmed}
    # Several decisions contradict the one false certificate, so chance is compared with the number of images.
    assert f"confirmed by a second decision: {len(confirmed)}, on 1 image;" in found.err
    assert "such images in expectation" in found.err
    for _, alarm in one.alarms:
        assert alarm.distance <= alarm.radius
        clean, attacked = (np.load(run / f) for f in alarm.files if f.endswith(".npy"))
        scale = 255 if noise == "grid" else 1
        assert np.allclose(clean * (255 / scale), GREYS[0], atol=1e-3)
        distance = np.sqrt(np.sum((attacked.astype(float) - clean) ** 2)) / scale
        assert distance == pytest.approx(alarm.distance, rel=1e-6)
        shown = [np.asarray(Image.open(run / f)) for f in alarm.files if f.endswith(".png")]
        assert (shown[0] == GREYS[0]).all() and not (shown[1] == GREYS[0]).all()
    # Nothing is attacked again, and the alarm stays.
    again = bench("attack", run, "--defense", defense("half_space"), "--preset", "quick", "--radii", ".5")
    assert again.code == 1 and "already complete" in again.err and "ALARM" in again.err


def test_an_interrupted_attack_resumes_to_the_same_bytes(
    bench: Bench, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = copied(runs["grid"], tmp_path / "whole"), copied(runs["grid"], tmp_path / "cut")
    attack(bench, whole, "--radii", ".5")
    append, done = AttackFile.append, list[int]()

    def interrupted(self: AttackFile, image: attacks.AttackedImage) -> None:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(image.index)
        append(self, image)

    with monkeypatch.context() as m:
        m.setattr(AttackFile, "append", interrupted)
        stopped = bench("attack", cut, "--defense", defense("half_space"), "--preset", "quick", "--radii", ".5")
    assert stopped.code == 130 and "repeat the command to resume" in stopped.err
    file = cut / attacks.NAME
    assert len(attacks.read(cut)[0].images) == 3
    with file.open("a") as f:
        f.write('{"attack": "torn')  # as a power failure leaves it
    attack(bench, cut, "--radii", ".5")
    assert file.read_bytes() == (whole / attacks.NAME).read_bytes()


def test_a_dry_run_states_the_budget_and_writes_nothing(bench: Bench, runs: dict[str, Path], tmp_path: Path) -> None:
    run = copied(runs["grid"], tmp_path)
    found = bench("attack", run, "--defense", defense("half_space"), "--dry-run", "--preset", "quick", "--images", 3)
    assert found.code == 0, found.err
    # At each of two radii 10 steps x 8 draws, one step and an unbounded attack: 2 * 80 + 8 + 80 backward passes.
    assert "744 backward passes" in found.err and "3 images at r = 0.3, 0.5" in found.err
    assert "12,000 votes" in found.err  # 2 attacks at 2 radii, clean, one step, noise and unbounded: 8 x 500 an image
    assert not (run / attacks.NAME).exists()
    real = attack(bench, run, "--images", 3)
    assert sum(len(i.results) for i in attacks.read(run)[0].images) * 500 <= 12_000
    assert [len(real["settings"]["indices"]), real["settings"]["n"]] == [3, 500]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--preset", "huge"], "unknown preset"),
        (["--radii", "0,.5"], "radii above 0"),
        (["--radii", "a"], "radii above 0"),
        (["--images", "9"], "the run has 1 to 8"),
        (["--images", "0"], "the run has 1 to 8"),
    ],
)
def test_wrong_options_are_one_line(bench: Bench, runs: dict[str, Path], words: list[str], error: str) -> None:
    found = bench("attack", runs["grid"], "--defense", defense("half_space"), *words)
    assert found.code == 2 and error in found.err and found.err.count("\n") == 1


def test_too_few_votes_are_advised_by_whose_they_are(bench: Bench, tmp_path: Path) -> None:
    """At alpha 1e-200, 666 votes decide: the paper's budget has them, if the run does."""
    for n, fix in ((1000, "use --preset paper"), (600, "attack a run of --n 666 or more")):
        procedure = {"kind": "fixed", "n0": 100, "n": n, "alpha": 1e-200, "target": "selected"}
        run = made_up(tmp_path / str(n), [None, None], procedure=procedure)
        found = bench("attack", run, "--preset", "quick")
        assert found.code == 2 and "which needs 666" in found.err and fix in found.err, found.err


def test_a_file_that_is_not_named_is_not_run(bench: Bench, runs: dict[str, Path]) -> None:
    found = bench("attack", runs["grid"])
    assert found.code == 2 and "run only where you name it" in found.err


def test_several_runs_are_all_checked_first_and_a_named_file_is_of_the_run_that_has_one(
    bench: Bench, runs: dict[str, Path], tmp_path: Path
) -> None:
    made = bench("run", "--defense", "none", "--dataset", TINY, "--out", tmp_path, "--n", 100, "--json")
    plain, own = Path(json.loads(made.out)[0]["path"]), copied(runs["grid"], tmp_path)
    words = ("attack", plain, own, "--preset", "quick", "--radii", ".25", "--images", 1)
    refused = bench(*words)
    assert refused.code == 2 and "run only where you name it" in refused.err
    assert not (plain / attacks.NAME).exists()  # nothing was attacked before
    found = bench(*words, "--defense", defense("half_space"), "--json")
    assert found.code == 0, found.err
    assert [Path(one["run"]) for one in json.loads(found.out)] == [plain, own]


def test_what_cannot_be_attacked_is_refused(bench: Bench, tmp_path: Path) -> None:
    run = made_up(tmp_path, [0.1, 0.2])
    (run / "certificates.jsonl").write_text(
        (run / "certificates.jsonl").read_text().replace('"label": 1', '"label": 2')
    )
    found = bench("attack", run)
    assert found.code == 2 and "was changed after the run finished" in found.err
    assert bench("attack", tmp_path / "none").code == 2


def test_a_damaged_file_of_attacks_is_one_line(bench: Bench, runs: dict[str, Path], tmp_path: Path) -> None:
    run = copied(runs["grid"], tmp_path)
    attack(bench, run, "--radii", ".5", "--images", 2)
    file = run / attacks.NAME
    header, *lines = file.read_text().splitlines(keepends=True)
    for text in (header + header, "".join(lines), header + lines[1], header + lines[0] * 2, "[]\n", header + "{}\n"):
        file.write_text(text)
        found = bench("attack", run, "--defense", defense("half_space"), "--radii", ".5", "--images", 2)
        assert found.code == 2 and "not a line of an attack" in found.err and found.err.count("\n") == 1


def test_a_changed_file_of_attacks_gives_no_traceback(bench: Bench, runs: dict[str, Path], tmp_path: Path) -> None:
    run = copied(runs["grid"], tmp_path)
    attack(bench, run, "--radii", ".5", "--images", 2)
    file = run / attacks.NAME
    header, first, second = (json.loads(line) for line in file.read_text().splitlines())
    first["results"] = [r for r in first["results"] if r["by"] != "unbounded"]
    file.write_text("".join(json.dumps(line) + "\n" for line in (header, first, second)))
    found = attack(bench, run, "--radii", ".5", "--images", 2)
    assert "1 of 1 images change their class" in found["checks"][3]["text"]

    # Half a surrogate pair, which no table can hold, is escaped.
    settings = header["settings"] | {"preset": "quick\ud800"}
    shown = attacks.AttackSettings.of(header["settings"] | {"preset": "quick\\ud800"})
    lines = (
        header | {"settings": settings, "attack": shown.name},
        *(x | {"attack": shown.name} for x in (first, second)),
    )
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = bench("report", run.parent)
    assert report.code == 0 and "quick\\ud800" in report.out.replace("\\\\", "\\"), report.err


def test_an_attack_on_other_certificates_is_not_shown(bench: Bench, runs: dict[str, Path], tmp_path: Path) -> None:
    run = copied(runs["grid"], tmp_path)
    attack(bench, run, "--radii", ".5", "--images", 2)
    changed = forged(run, tmp_path / "other")
    done, left_out = attacks.of_run(read_run(changed))
    assert done == [] and "1 of other certificates" in left_out
    assert len(attacks.of_run(read_run(run))[0]) == 1


def test_masking_checks_say_when_there_is_nothing_to_see() -> None:
    settings = {"version": 1, "run": "r", "certificates": None, "preset": "quick", "radii": [0.5], "checked": 0.5}
    settings |= {"indices": [0], "white_box": True, "steps": 1, "draws": 1, "restarts": 1}
    settings |= {"query_steps": 1, "query_pairs": 1, "n": 100, "alpha": 0.001}
    result = {"by": "clean", "radius": 0.0, "distance": 0.0, "predicted": 1, "top_count": 90, "runner_up_count": 10}
    image = {"attack": "a", "index": 0, "label": 0, "results": [result], "gradients": 0, "zero": 0, "alarms": []}
    one = attacks.Attack(attacks.AttackSettings.of(settings), read_environment(), [attacks.AttackedImage.of(image)])
    (check,) = checks(one)
    assert check.status == "no evidence" and one.attacked_accuracy(0.0).count == 0


def read_environment() -> Any:
    from bench.records.schema import Environment

    return Environment.of({})
