"""Write the weights of a finished run for other programs (``bench export --weights``).

The run is rebuilt from its record as ``bench verify`` does, under the same rules for untrusted records, and must be the
function that was certified. What is written is loaded again and must give the same logits.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import globalstate, plugins
from bench.errors import BenchError
from bench.io.files import write_text, writing
from bench.models import timm_folders
from bench.models.arithmetic import deterministic
from bench.models.base import Classifier, LocalBase
from bench.models.load import load_base
from bench.models.names import choose_base
from bench.models.peft_folders import FolderWeights
from bench.models.served import is_url
from bench.records.record import Record
from bench.records.verify import check_record
from bench.runs import fitting, rebuilding
from bench.runs.context import PartTraining
from bench.runs.model_card import model_card
from bench.runs.prepared import PreparedRun
from bench.runs.rebuilding import from_cache
from bench.runs.session import Session
from bench.smoothing.noise import Noise, TrainDraw
from bench.training.weights import stored

CARD = "README.md"
_CHECKED = 32  # noisy images on which logits are compared


def finished(path: Path) -> Record:
    """Read the record of a finished run. Raises BenchError where it has no weights or fails a check of bench verify."""
    record = rebuilding.finished(path, "export")
    if problem := next((f"{f.check}: {f.problem}" for f in check_record(path) if f.problem), ""):
        raise BenchError(f"{path}: the record fails its audit, {problem}; see bench verify {path}")
    if is_url(str(record.info.arguments.get("base"))):
        raise BenchError(f"{path}: its base is a server's, whose weights are not here; nothing can be exported")
    return record


def export_weights(
    record: Record,
    session: Session,
    out: Path,
    merged: bool,
    defense: str | None = None,
) -> list[Path]:
    """Write a run's weights and a model card.

    Args:
        record: As ``finished`` returns it.
        session: With a ``rebuilding.UntrainedReporter``.
        out: A folder that does not exist yet, or a .safetensors file.
        merged: Write the merged model even where the defense's weights have a folder of their own.
        defense: The defense's file, which is run only where the user names it.

    Returns:
        The files.

    Raises:
        BenchError: The weights are not in the cache, the run cannot be rebuilt here, or its function is not one model.
    """
    run = from_cache(record, session, defense)
    single = out.suffix == ".safetensors"
    files = [out, out.with_suffix(".json"), out.with_suffix(".md")] if single else [out]
    if taken := next((f for f in files if f.exists()), None):
        raise BenchError(f"{taken} exists; give another name, or move it away")
    fix = "choose another place with --weights"
    with writing(out, fix), plugins.restricted_to([defense] if defense else []):
        partial = out.with_name(f".partial-{out.name}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            if issubclass(run.plan.cls, FolderWeights) and not merged and not single:
                library, use = "peft", _write_peft(run, session, partial, out)
            else:
                library, use = "timm", _write_merged(record, run, session, partial, out)
            write_text(partial / CARD, model_card(record, library, use))
            if not single:
                partial.rename(out)
                return sorted(out.iterdir())
            for file, name in zip(files, (timm_folders.WEIGHTS, timm_folders.CONFIG, CARD), strict=True):
                (partial / name).rename(file)
            return files
        finally:
            shutil.rmtree(partial, ignore_errors=True)


# A folder of peft -------------------------------------------------------------------------------------


def _write_peft(run: PreparedRun, session: Session, folder: Path, out: Path) -> list[str]:
    """Write the unmerged defense as its library keeps it; return how it is loaded."""
    base, plan, train = run.materials.base, run.plan, run.materials.train
    assert isinstance(base, LocalBase), "a served base has no layers to adapt"
    with session.reporter.training(plan.defense) as progress:
        defense = fitting.construct(plan, base, session.device, PartTraining(train, progress))
        trained = fitting.weights_of(plan, base, train, session.device, progress, defense)
    fitting.load(defense, trained, plan.defense)
    assert isinstance(defense, FolderWeights)
    probed = "before_probe" in base.meta  # its head is nowhere else
    source = base.meta.get("source", {})
    defense.eval().write_folder(folder, source.get("id") or base.name, probed)
    made = "with the weights of the base"
    if source.get("kind") == "trained here":
        made += ", which bench export --weights writes from a run of none on it"
    made += "; the head is in this folder" if probed else ""
    return [
        *_model(base, len(plan.card.classes), made),
        f"model = peft.PeftModel.from_pretrained(model, {out.name!r})",
        *_normalised(base.module, plan.card.shape),
        f"# or: bench run --defense {plan.defense} --weights {out.name} --dataset {plan.card.name} --base {plan.base}",
    ]


def _model(base: LocalBase, classes: int, weights: str) -> list[str]:
    args = "".join(f", {k}={v!r}" for k, v in base.architecture["args"].items())
    name = base.architecture["architecture"]
    return [
        *_registered(name),
        f"model = timm.create_model({name!r}, num_classes={classes}{args})  # {weights}",
    ]


def _registered(architecture: str) -> list[str]:
    """Return the line without which timm does not know an architecture of certbench, if it is one."""
    from bench.models.architectures import timm

    own = timm.model_entrypoint(architecture.partition(".")[0]).__module__.startswith("timm.")
    return [] if own else [f"import bench.models.architectures  # registers {architecture} with timm"]


def _normalised(module: Any, shape: tuple[int, int, int]) -> list[str]:
    mean, std = (value.flatten().tolist() for value in (module.mean, module.std))
    size = "" if module.size is None else f"; {shape[1]}x{shape[2]} images are resized to {module.size} after the noise"
    return [f"# logits = model((pixels + noise - mean) / std), with pixels in [0, 1], mean {mean}, std {std}{size}"]


# One timm model ---------------------------------------------------------------------------------------


def _write_merged(record: Record, run: PreparedRun, session: Session, folder: Path, out: Path) -> list[str]:
    """Write the certified function as one timm model, and check that it is loaded as a base; return how."""
    base, card = run.materials.base, run.plan.card
    module = _one_model(record, run)
    assert isinstance(base, LocalBase)
    config = timm_folders.config_of(base, module, card.shape, card.classes)
    timm_folders.write(module, config, folder / timm_folders.WEIGHTS, folder / timm_folders.CONFIG)
    splits = (run.materials.train, run.materials.validation)
    name = choose_base(card, run.plan.preset, str(folder))
    with session.reporter.training("the exported model") as progress:
        again = load_base(card, name, *splits, session.device, progress)
    x = _noisy(run)
    with torch.no_grad(), deterministic():
        if not torch.equal(again.module(x), module(x)):
            raise BenchError(
                f"{record.path}: timm computes other logits from the exported model; report this to certbench"
            )
    loaded = [] if out.suffix else [f"model = timm.create_model('local-dir:{out.name}', pretrained=True)"]
    return [
        *(_registered(config["architecture"]) if loaded else []),
        *loaded,
        *_normalised(module, card.shape),
        f"# or: bench run --defense none --base {out.name} --dataset {card.name}",
    ]


def _one_model(record: Record, run: PreparedRun) -> Classifier:
    """Return the one model that the certified function is. Raises BenchError where it is another function."""
    base, defense = run.materials.base, run.fitted.defense
    if isinstance(base, LocalBase):
        inside: Sequence[Any] = [m for m in defense.modules() if isinstance(m, Classifier)] or [base.module]
        plain = {k: v.shape for k, v in base.untrained(len(run.plan.card.classes)).state_dict().items()}
        x = _noisy(run)
        if len(inside) == 1 and {k: v.shape for k, v in inside[0].state_dict().items()} == plain:
            with torch.no_grad(), globalstate.fixed_rng(0), deterministic():
                if torch.equal(_logits(run, x), inside[0](x)):
                    return inside[0]  # type: ignore[no-any-return]
    file = stored(record.identity.defense.weights or "none")
    own = f"; its own tensors are {file}, which bench run --weights takes" if file else ""
    raise BenchError(
        f"{record.path}: the function of {run.plan.defense} is not one timm model with the base's layers, so it cannot "
        f"be written as one; possible for defenses that change the base's own weights, such as lora and full{own}"
    )


def _noisy(run: PreparedRun) -> Tensor:
    split, device = run.split, run.task.device
    x = torch.from_numpy(split.pixels(np.array(run.indices[:_CHECKED]))).to(device)
    return x + _draw(run, len(x)).normal(*x.shape[1:])


def _draw(run: PreparedRun, rows: int) -> TrainDraw:
    return TrainDraw(Noise(0, "check"), 0, rows, run.plan.sigma, run.task.device)


def _logits(run: PreparedRun, x: Tensor) -> Tensor:
    return run.fitted.defense(x, _draw(run, len(x)))  # type: ignore[no-any-return]
