"""The augmentation resized-crop: torchvision's boxes, cut out of the original pictures, seeded by the step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import resized_crop

from bench.data.datasets import load_card, load_splits
from bench.data.split import Split
from bench.errors import BenchError
from bench.training import loop, objectives
from tests.helpers.madeup import png

DRAWS = 4000
SIZES = [(60, 40), (31, 90), (300, 20), (16, 16), (500, 375)]  # width and height; the second and third rarely fit
CARD = """
name = "photos"
shape = [3, 16, 20]
classes = 2
augment = ["resized-crop", "flip"]
source = {{ reader = "{reader}", folder = "photos", train = "train{suffix}", resize = 24 }}
splits = {{ test = 2, validation = 2 }}
"""


@pytest.fixture(params=["folder", "parquet"])
def train(request: pytest.FixtureRequest, tmp_path: Path) -> Split:
    """Twelve pictures of several sizes, larger and smaller than the card's."""
    pictures = [png("RGB", SIZES[i % 4]) for i in range(16)]
    (tmp_path / "photos").mkdir()
    if request.param == "parquet":
        table = pa.table({"image": pictures, "label": [i % 2 for i in range(16)]})
        pq.write_table(table, tmp_path / "photos" / "train.parquet")
    for i, data in enumerate(pictures):
        file = tmp_path / "photos" / "train" / str(i % 2) / f"{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    suffix = ".parquet" if request.param == "parquet" else ""
    (tmp_path / "card.toml").write_text(CARD.format(reader=request.param, suffix=suffix))
    return load_splits(load_card(str(tmp_path / "card.toml")), "train")[0]


def boxes(width: int, height: int) -> np.ndarray:
    uniform = torch.rand(DRAWS, loop.CROP_TRIES, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return np.array([loop._crop_box(u, width, height) for u in uniform.tolist()])


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_boxes_are_distributed_as_torchvisions(width: int, height: int) -> None:
    torch.manual_seed(1)
    image = torch.zeros(3, height, width)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(DRAWS)]  # top, left, h, w
    )[:, [1, 0, 3, 2]]
    ours = boxes(width, height)
    left, top, w, h = ours.T
    assert left.min() >= 0 and top.min() >= 0 and w.min() > 0 and h.min() > 0
    assert (left + w).max() <= width and (top + h).max() <= height
    for value in (
        lambda b: b[:, 0],
        lambda b: b[:, 1],
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 2] / b[:, 3],
        lambda b: b[:, 0] + b[:, 2] / 2,
        lambda b: b[:, 1] + b[:, 3] / 2,
    ):
        assert ks_2samp(value(ours), value(theirs)).pvalue > 1e-4  # 30 tests
    if (width, height) == (500, 375):  # where nearly every first try of most areas fits, these are the formula's
        small = w * h < 0.3 * width * height
        ratio = np.log(w / h)[small]
        assert np.log(3 / 4) - 0.02 < ratio.min() and ratio.max() < np.log(4 / 3) + 0.02
        assert abs(ratio.mean()) < 5 * np.log(4 / 3) / 3**0.5 / len(ratio) ** 0.5
        assert 0.08 * 0.98 < (w * h).min() / (width * height) < 0.1 and (w * h).max() / (width * height) > 0.95


@pytest.mark.parametrize(("width", "height", "box"), [(300, 20, (136, 0, 27, 20)), (31, 90, (0, 24, 31, 41))])
def test_without_a_fitting_try_the_box_is_torchvisions_central_one(
    width: int, height: int, box: tuple[int, int, int, int]
) -> None:
    whole = [[1.0, 0.5, 0.0, 0.0]] * loop.CROP_TRIES  # the whole area, square: fits into neither
    assert loop._crop_box(whole, width, height) == box
    assert loop._crop_box(whole, 40, 40) == (0, 0, 40, 40)


def job(train: Split, folder: Path, augment: tuple[str, ...] = ("resized-crop",), seed: int = 0) -> loop.TrainingJob:
    cpu = torch.device("cpu")
    return loop.TrainingJob(train, augment, 0.0, objectives.clean, seed, cpu, folder / "c.pt", lambda *_: None)


def test_crops_are_of_the_original_pictures(train: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    box = (3, 2, 11, 9)

    def chosen(uniform: object, width: int, height: int) -> tuple[int, int, int, int]:
        asked.append((width, height))
        return box

    monkeypatch.setattr(loop, "_crop_box", chosen)
    (step,) = job(train, tmp_path).steps(1, 12)
    assert set(asked) == set(SIZES[:4])
    files = [Image.open(f).convert("RGB") for f in (tmp_path / "photos" / "train").glob("*/*.png")]
    left, top, w, h = box
    wanted = {np.asarray(resized_crop(f, top, left, h, w, [16, 20])).transpose(2, 0, 1).tobytes() for f in files}
    found = (step.x * 255).round().to(torch.uint8).numpy()
    assert found.shape == (12, 3, 16, 20)
    assert {row.tobytes() for row in found} <= wanted  # torchvision's pixels, to the last bit
    # Elsewhere pictures are read as certification reads them.
    assert train.pixels([0]).shape == (1, 3, 16, 20) and len(asked) == 12


def test_crops_depend_on_the_step_alone(train: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    state = torch.nn.Linear(1, 1)

    def seen(folder: str, stop: int = 6, seed: int = 0) -> list[Tensor]:
        (tmp_path / folder).mkdir(exist_ok=True)
        found = []
        for step in job(train, tmp_path / folder, ("resized-crop", "flip"), seed).steps(6, 4, state):
            if step.number == stop:
                break
            found.append(step.x)
        return found

    undisturbed = seen("a")
    torch.rand(100)  # other use of the global state
    begun = seen("b", stop=2)
    rest = seen("b")
    assert (len(undisturbed), len(begun), len(rest)) == (6, 2, 4)
    for one, other in zip(undisturbed, [*begun, *rest], strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(undisturbed[0], undisturbed[3])  # the same rows would be cropped differently
    assert not torch.equal(seen("c", seed=1)[0], undisturbed[0])


def test_each_step_crops_an_image_anew(train: Split, tmp_path: Path) -> None:
    distinct = []
    for i in range(len(train)):
        (tmp_path / str(i)).mkdir()
        steps = job(train.select([i]), tmp_path / str(i)).steps(9, 1)
        distinct.append(len({step.x.numpy().tobytes() for step in steps}))
    assert max(distinct) == 9  # of the larger pictures; the longest one nearly always has the central box


def test_a_run_says_that_it_crops(train: Split, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    capsys.readouterr()
    train, test = load_splits(load_card(str(tmp_path / "card.toml")), "train", "test")
    stated = (
        "in training random crops resized to 16x20 (resized-crop), elsewhere shorter side resized to 24 (bilinear), "
        "centre cropped to 16x20"
    )
    assert stated in capsys.readouterr().err and stated in train.origin and test.origin.count("resized-crop") == 1


@pytest.mark.parametrize(
    ("old", "new"), [('"flip"]', '"crop"]'), ('reader = "{reader}", folder = "photos", train', "{reader}")]
)
def test_a_card_that_cannot_crop_so_is_refused(tmp_path: Path, old: str, new: str) -> None:
    text = CARD.format(reader="folder", suffix="")
    if new == "{reader}":
        text = text.partition("source")[0].replace("[3, 16, 20]", "[1, 8, 8]").replace("= 2", "= 10")
        text += 'levels = 17\nsource = { reader = "sklearn:digits" }\n'
    else:
        text = text.replace(old, new)
    (tmp_path / "card.toml").write_text(text)
    with pytest.raises(BenchError, match="augment: resized-crop needs pictures, and replaces crop"):
        load_card(str(tmp_path / "card.toml"))


def test_pictures_that_have_the_shape_need_no_resize(tmp_path: Path) -> None:
    """And one that has not is refused in training as elsewhere."""
    for label in "01":
        folder = tmp_path / "photos" / "train" / label
        folder.mkdir(parents=True)
        for i in range(4):
            (folder / f"{i}.png").write_bytes(png("RGB", (20, 16)))
    text = CARD.format(reader="folder", suffix="").replace(", resize = 24", "")
    (tmp_path / "card.toml").write_text(text)
    (train,) = load_splits(load_card(str(tmp_path / "card.toml")), "train")
    (step,) = job(train, tmp_path).steps(1, 4)
    assert step.x.shape == (4, 3, 16, 20)
    for file in (tmp_path / "photos" / "train").glob("*/*.png"):
        file.write_bytes(png("RGB", (21, 16)))
    (train,) = load_splits(load_card(str(tmp_path / "card.toml")), "train")
    (tmp_path / "c.pt").unlink()
    with pytest.raises(BenchError, match="16x21 pixels, but the card's shape is 16x20"):
        list(job(train, tmp_path).steps(1, 4))
