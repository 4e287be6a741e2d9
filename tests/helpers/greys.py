"""Grey pictures of two classes, on which the half-space (helpers/defenses/half_space.py) is known in closed form.

A vote of the half-space is right with probability Phi(distance / sigma), where the distance in l2 is that of the
picture from the boundary: the radius of the smoothed classifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from scipy import stats

SIZE = 64  # pixels
GREYS = (115, 140)  # of class 0 and class 1
# The sum of the integer pixels that a vote must exceed to be for class 1: no integer, so no vote is a tie.
EDGE = SIZE * 127 + 32.5
THRESHOLD = EDGE / SIZE / 255
DISTANCES = [SIZE**0.5 * abs(g / 255 - THRESHOLD) for g in GREYS]  # 0.39, of each class

CARD = """
name = "greys"
shape = [1, 8, 8]
radii = {radii}
classes = {classes}
source = {{ reader = "folder", folder = ".", lossless = true, {parts} }}

[bases.vit]
model = "vit_tiny_patch16_224"
args = {{ img_size = 8, patch_size = 4, embed_dim = 4, depth = 1, num_heads = 1, in_chans = 1 }}
schedule = {{ epochs = 1, batch = 8 }}
"""


def chances(sigma: float) -> list[float]:
    """Return the probability that a vote is right, for each class."""
    return [float(stats.norm.cdf(distance / sigma)) for distance in DISTANCES]


def make_card(
    root: Path,
    radii: Sequence[float],
    pictures: int,
    parts: Sequence[str] = ("train", "test", "validation"),
    classes: Sequence[str] = ("dark", "light"),
) -> str:
    """Write a card and its pictures, ``pictures`` equal ones of a class in each part; return the card's path."""
    for part in parts:
        for name, grey in zip(classes, GREYS, strict=True):
            (root / part / name).mkdir(parents=True)
            for i in range(pictures):
                Image.new("L", (8, 8), grey).save(root / part / name / f"{i:02}.png")
    named = ", ".join(f'{part} = "{part}"' for part in parts)
    card = root / "greys.toml"
    card.write_text(CARD.format(radii=list(radii), classes=str(list(classes)).replace("'", '"'), parts=named))
    return str(card)
