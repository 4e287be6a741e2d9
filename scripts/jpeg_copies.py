"""Estimate what a JPEG copy of a data set costs a base: encode its pictures once more, and classify both.

    python scripts/jpeg_copies.py [--dataset cifar10] [--base vit-cpu] [--split test]

The originals are not at hand, so the loss of one more encoding stands in for that of the first. To lose as much as a
first encoding does, it has the pictures' own quantization tables, but blocks that begin elsewhere: in place, most
coefficients are multiples of the tables' steps already and nothing would change.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin
from scipy.stats import binomtest

from bench.data.datasets import load_card, load_splits
from bench.data.pictures import Pictures
from bench.models.load import load_base

SHIFT = (3, 5)  # rows and columns; odd, so that halved colour channels begin elsewhere too


def encoded_again(data: bytes, shift: tuple[int, int] = SHIFT) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the pixels [H, W, C] of a JPEG file, and those after one more encoding of the picture moved by ``shift``.

    Raises ValueError for another format.
    """
    with Image.open(io.BytesIO(data)) as picture:
        if not isinstance(picture, JpegImagePlugin.JpegImageFile):
            raise ValueError(f"a {picture.format} picture, not JPEG")
        before = np.asarray(picture.convert("RGB"))
        tables, sampling = picture.quantization, JpegImagePlugin.get_sampling(picture)
    out = io.BytesIO()
    moved = Image.fromarray(np.roll(before, shift, (0, 1)))
    moved.save(out, "JPEG", qtables=tables, subsampling=sampling)
    with Image.open(out) as picture:
        after = np.roll(np.asarray(picture.convert("RGB")), [-s for s in shift], (0, 1))
    return before, after


def main(argv: Sequence[str] | None = None) -> None:
    """Print the accuracy of a base on pictures as stored and encoded once more."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--base", default="vit-cpu", help="a recipe of the card; trained if it is not in the cache")
    parser.add_argument("--split", choices=["validation", "test"], default="test")
    given = parser.parse_args(argv)
    card = load_card(given.dataset)
    train, validation, split = load_splits(card, "train", "validation", given.split)
    assert isinstance(split.images, Pictures)
    pairs = [encoded_again(bytes(split.images.stamp(row))) for row in split.images.rows.tolist()]
    base = load_base(card, given.base, train, validation, torch.device("cpu"), lambda *_: None)
    right = []
    for version in map(np.stack, zip(*pairs, strict=True)):
        pixels = torch.from_numpy(version.transpose(0, 3, 1, 2).astype(np.float32) / 255)
        with torch.inference_mode():
            found = torch.cat([base.module(part).argmax(1) for part in torch.tensor_split(pixels, 40)])
        right.append(found.numpy() == split.labels)
    lost, won = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    interval = binomtest(lost, max(1, lost + won)).proportion_ci(0.95)
    errors = [np.square(after.astype(float) - before).mean() for before, after in pairs]
    print(f"{len(split):,} {given.split} images, base {given.base}")
    print(f"one more encoding changes a pixel by {np.sqrt(np.mean(errors)):.2f} of 255 (root mean square)")
    print(f"right as stored {np.mean(right[0]):.2%}, encoded once more {np.mean(right[1]):.2%}")
    low, high = ((2 * end - 1) * (lost + won) / len(split) for end in interval)
    print(f"{lost} images lost, {won} won: {(lost - won) / len(split):.2%} of accuracy [{low:.2%}, {high:.2%}]")


if __name__ == "__main__":
    main()
