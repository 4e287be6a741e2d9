"""Files of a base, from a folder or a repository of the hub: its configs, and weights that are read later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from bench.data.card import Card
from bench.io import hub, tensors
from bench.models.base import WeightsSource
from bench.models.blueprints import Weights

STEM, CONFIG = "model", "config.json"
WEIGHTS_FILE = f"{STEM}.safetensors"


def hub_id(name: str) -> str:
    """Return OWNER/NAME[@REVISION] of a hub id, and an empty string for other names."""
    if name.startswith("hf-hub:"):
        return name.removeprefix("hf-hub:")
    return name if name.startswith("timm/") else ""


def hub_weights(card: Card, repo: str, revision: str) -> Weights:
    """Return the weights of a hub repository, which are fetched later."""

    def read() -> tuple[dict[str, Tensor], WeightsSource]:
        fetched: list[Path] = []

        def fetch(name: str) -> Path:
            fetched.append(fetch_file(card, repo, name, revision))
            return fetched[-1]

        stored, name = tensors.read_stored(STEM, fetch)
        commit = hub.commit(fetched[-1])
        return stored.tensors, {"kind": "hub", "id": repo, "revision": commit, "file": name, "sha256": stored.sha256}

    return Weights(read, adapt=True)


def fetch_file(card: Card, repo: str, filename: str, revision: str) -> Path:
    """Return the local path of a file of a hub repository. Raises BenchError saying what else can be given."""
    here = [name for name, recipe in card.bases.items() if not recipe.pretrained]
    fix = "connect once, set HF_HUB_CACHE to a cache that has it, or give --base a folder with its config.json and "
    fix += WEIGHTS_FILE + (f", or a base trained here: --base {here[0]}" if here else "")
    try:
        return hub.fetch(repo, filename, revision, "model", fix)
    except hub.MissingFile:
        raise not_in(f"hub id {repo}", filename) from None


def folder_weights(folder: Path) -> Weights:
    """Return the weights of a folder, which are read later."""

    def read() -> tuple[dict[str, Tensor], WeightsSource]:
        stored, name = tensors.read_stored(STEM, lambda name: local_file(folder, name))
        return stored.tensors, file_record(folder / name, stored)

    return Weights(read, adapt=True)


def local_file(folder: Path, name: str) -> Path:
    """Return the path of a folder's file. Raises MissingFile where there is none of that name."""
    if not (folder / name).is_file():
        raise hub.MissingFile(f"{folder} has no file {name!r}")
    return folder / name


def optional(fetch: Callable[[str], Path], filename: str) -> Path | None:
    """Return the path of a file of a folder or repository, None where it has none of that name."""
    try:
        return fetch(filename)
    except hub.MissingFile:
        return None


def not_in(where: str, filename: str, others: Sequence[str] = ()) -> hub.MissingFile:
    """Make the error of a folder or repository that lacks a file."""
    if others:
        return hub.MissingFile(f"{where} has no {filename}; it has {', '.join(others)}: give one of these as --base")
    if filename == CONFIG:
        return hub.MissingFile(
            f"{where} has no {filename}: it is not a model of timm or transformers; give another base"
        )
    return hub.MissingFile(
        f"{where} has no {filename}: pickled weights are refused, since reading them can run hidden code; convert "
        f"its file, without running any: bench convert FILE --to {filename} --as tensors"
    )


def file_record(path: Path, stored: tensors.Stored) -> WeightsSource:
    """Return the record of a local file of weights."""
    return {"kind": "file", "file": path.name, "sha256": stored.sha256}
