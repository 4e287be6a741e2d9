"""Where base classifiers come from: a card's recipe, timm, the hub, a local file or folder.

Each is described first (``Blueprint``: architecture, input, where the weights are) and only then
loaded, trained clean, or given a new head, once; every defense of a comparison shares the result.
Weights are read here, from safetensors alone, and handed to timm, which never opens a file itself:
left alone it falls back to pickles.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from bench import hub, objectives, tensors, training
from bench.base import BaseModel, Classifier, state_sha256
from bench.cache import Entry, source_sha256
from bench.cards import Card, Split
from bench.errors import BenchError, one_line, unknown
from bench.interface import Schedule

# The head that a base of other classes gets: a linear layer on frozen, standardised features of the clean images.
# Without standardising, a base whose features vary little ends far below what logistic regression finds.
PROBE = Schedule(epochs=20, batch=64, lr=1e-2, weight_decay=0.0, warmup=0.1)
_PROBE_BLOCK = 64  # images a forward pass while features are computed

WEIGHTS_FILE = "model.safetensors"
_KINDS = "timm:MODEL, hf-hub:OWNER/NAME, a .safetensors file or a timm folder"


@dataclass(frozen=True)
class Weights:
    """Where a blueprint's weights are: ``open`` reads them, and says what to record of their source."""

    open: Callable[[], tuple[dict[str, Tensor], dict[str, Any]]]
    # timm's own adaptation (renamed keys, position embeddings of another size) or key by key as they are.
    adapt: bool


@dataclass(frozen=True)
class Blueprint:
    """A base classifier before its weights: ``classes`` are those its weights have (0: no head)."""

    card: Card
    name: str
    architecture: str
    args: dict[str, Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int] | None
    classes: int
    config: dict[str, Any] | None = None  # timm's pretrained_cfg where it is not the architecture's own
    weights: Weights | None = None  # None: fresh ones
    schedule: Schedule | None = None  # clean training on the card's data, if any

    def describe(self) -> dict[str, Any]:
        """What the tensors do not tell, JSON-able."""
        return {"architecture": self.architecture, "args": self.args, "resize": self.size and list(self.size)}

    def fresh(self, classes: int) -> Classifier:
        """The architecture with fresh weights. Raises BenchError where timm cannot make it."""
        return Classifier(self._create(classes, None), self.mean, self.std, self.size)

    def load(self) -> tuple[Classifier, dict[str, Any]]:
        """The architecture with its stored weights, and the record of their source. Raises BenchError."""
        assert self.weights is not None
        stored, record = self.weights.open()
        stored, mean, std = _plain(stored, self.mean, self.std)
        if self.weights.adapt:
            model = self._create(self.classes, stored)
        else:
            model = self._create(self.classes, None)
            tensors.check(f"{record.get('file', self.name)} does not fit base {self.name}", model.state_dict(), stored)
            model.load_state_dict(stored)
        module = Classifier(model, mean, std, self.size).eval()
        with torch.inference_mode():
            try:
                out = module(torch.zeros(1, *self.card.shape))
            except (RuntimeError, AssertionError, ValueError) as e:
                shape = "x".join(map(str, self.card.shape))
                raise BenchError(f"base {self.name} cannot take {shape} images: {one_line(e)}") from None
        if self.classes and tuple(out.shape) != (1, self.classes):
            raise BenchError(f"base {self.name} gives {list(out.shape)} for an image, not [1, {self.classes}] logits")
        return module, record

    def _create(self, classes: int, stored: dict[str, Tensor] | None) -> nn.Module:
        import timm

        # Nothing of where timm would look: the tensors are here, or are not wanted.
        config = None if self.config is None else {**self.config, "num_classes": classes}
        if stored is not None:
            config = {**(config or {}), "state_dict": stored, "custom_load": False}
        try:
            model: nn.Module = timm.create_model(
                self.architecture,
                pretrained=stored is not None,
                pretrained_cfg=config,
                num_classes=classes,
                **self.args,
            )
        except (RuntimeError, TypeError, ValueError, AssertionError, KeyError) as e:
            # torch names the key that does not fit on the second line.
            lines = [line.strip() for line in str(e).splitlines()[:2]]
            why = " ".join(lines)[:300] or type(e).__name__
            raise BenchError(f"base {self.name}: timm cannot make {self.architecture}: {why}") from None
        model.pretrained_cfg.pop("state_dict", None)  # type: ignore[union-attr,operator]
        return model


def choose_base(card: Card, preset: str, base: str | None) -> str:
    """Which base: the one asked for, the preset's, or the card's first recipe.

    Raises BenchError for a name nobody knows, a missing file and a pickled one, before anything loads.
    """
    name = base or card.presets[preset].base or next(iter(card.bases), "")
    if not name:
        raise BenchError(f"card {card.name} has no [bases.NAME] recipe; give --base {_KINDS}")
    if name in card.bases or _hub_id(name):
        return name
    if name.startswith("timm:"):
        _timm_config(name.removeprefix("timm:"), name)
    elif Path(name).is_dir():
        for needed in ("config.json", WEIGHTS_FILE):
            if not (Path(name) / needed).is_file():
                raise _not_in(f"folder {name}", needed)
    elif Path(name).exists() or "/" in name or Path(name).suffix in (".safetensors", *tensors.PICKLED):
        tensors.refuse_pickle(Path(name))
    else:
        error = unknown("base", name, card.bases)
        raise BenchError(f"{error}; or {_KINDS}")
    return name


def blueprint(card: Card, name: str) -> Blueprint:
    """Describe the base of that name (a recipe, timm:..., hub id, file or folder). Raises BenchError.

    Of a hub id this fetches config.json; of a bare file it reads the weights, whose shapes say what it is.
    """
    if name in card.bases:
        return _recipe(card, name)
    if name.startswith("timm:"):
        return _published(card, name, name.removeprefix("timm:"), {})
    repo = _hub_id(name)
    if repo:
        repo, _, revision = repo.partition("@")
        config = _fetch(card, repo, "config.json", revision or "main")
        # The weights of the very commit the config is of, whatever is pushed meanwhile.
        weights = Weights(lambda: _from_hub(card, repo, hub.commit(config)), adapt=True)
        return _configured(card, name, _json(config, f"hub id {name}"), weights)
    path = Path(name)
    if path.is_dir():
        weights = Weights(lambda: _from_file(path / WEIGHTS_FILE), adapt=True)
        return _configured(card, path.resolve().name, _json(path / "config.json", f"folder {path}"), weights)
    return _file(card, path)


def untrained_base(card: Card, name: str, device: torch.device) -> BaseModel:
    """A base of that architecture for the card's classes with fresh weights: what estimates are made on."""
    plan = blueprint(card, name)
    return _model(plan, plan.fresh(len(card.classes)).to(device), {}, device)


def load_base(
    card: Card,
    name: str,
    train: Split,
    validation: Split,
    device: torch.device,
    progress: training.Progress,
    weights: Path | None = None,
) -> BaseModel:
    """The base of that name, for the card's classes; ``weights`` replaces its own by a user's file.

    What training it takes (a recipe's clean one, or a linear probe where the classes differ) is done
    once, whatever the defenses' seeds, and cached. ``meta`` says where the weights come from, and what
    the training cost. Raises BenchError with one line saying what to mend.
    """
    plan, classes = blueprint(card, name), len(card.classes)
    if weights is not None:
        own = Weights(lambda: _from_file(weights), adapt=False)
        plan = replace(plan, weights=own, schedule=None, classes=classes)
    if plan.weights is None:
        with training.fixed_rng(0):
            module, meta = plan.fresh(classes), {"source": {"kind": "trained here"}}
    else:
        module, record = plan.load()
        meta = {"source": record}
    module = module.to(device)
    if plan.schedule is not None:
        meta |= _train_clean(plan, module, train, validation, device, progress)
    elif plan.classes != classes:
        meta |= _probe(plan, module, train, validation, device, progress)
    return _model(plan, module, meta, device)


def _model(plan: Blueprint, module: Classifier, meta: dict[str, Any], device: torch.device) -> BaseModel:
    classes = len(plan.card.classes)

    def untrained(count: int) -> nn.Module:
        return plan.fresh(count).to(device)

    normalisation = {"mean": module.mean.flatten().tolist(), "std": module.std.flatten().tolist()}
    return BaseModel(plan.name, module, untrained, classes, meta, plan.describe() | normalisation)


# Sources ---------------------------------------------------------------------------------------------


def _recipe(card: Card, name: str) -> Blueprint:
    recipe = card.bases[name]
    try:
        schedule = TypeAdapter(Schedule).validate_python(recipe.schedule)
    except ValidationError as e:
        raise BenchError(f"card {card.name}: bases.{name}.schedule: {e.errors()[0]['msg']}") from None
    if recipe.pretrained:
        return replace(_published(card, name, recipe.model, recipe.args), schedule=schedule)
    size = _size(card, recipe.args, _architecture_config(recipe.model, f"card {card.name}: bases.{name}"))
    plan = Blueprint(card, name, recipe.model, recipe.args, card.mean, card.std, size, len(card.classes))
    return replace(plan, schedule=schedule)


def _published(card: Card, name: str, model: str, args: dict[str, Any]) -> Blueprint:
    """A model timm knows by name, with the weights it is published with."""
    config = _timm_config(model, name)
    repo = config.pop("hf_hub_id", None)
    if not repo or config.get("hf_hub_filename"):
        raise BenchError(f"base {name}: timm has no safetensors of {model} on the hub, and pickles are refused")
    weights = Weights(lambda: _from_hub(card, repo, "main"), adapt=True)
    return _stated(card, name, model, args, config, weights)


def _configured(card: Card, name: str, config: dict[str, Any], weights: Weights) -> Blueprint:
    """A model described by timm's config.json."""
    architecture, args = config.get("architecture"), dict(config.get("model_args") or {})
    if not isinstance(architecture, str):
        raise BenchError(f"base {name}: its config states no timm architecture; only timm models can be bases")
    # Before timm 0.9 the pretrained_cfg was the whole file.
    stated = config.get("pretrained_cfg") or {k: v for k, v in config.items() if k != "architecture"}
    classes = config.get("num_classes", args.pop("num_classes", stated.get("num_classes")))
    base = _architecture_config(architecture, f"base {name}")
    merged = base | {k: v for k, v in stated.items() if k in base or k in _config_keys()}
    merged |= {} if classes is None else {"num_classes": classes}
    # A config is somebody else's: it may set the model's arguments, not where timm reads files.
    forbidden = sorted(set(args) & (set(_create_parameters()) | {"pretrained_strict", "pretrained_filter_fn"}))
    if forbidden:
        raise BenchError(f"base {name}: model_args may not set {forbidden[0]}")
    return _stated(card, name, architecture, args, merged, weights)


def _stated(
    card: Card, name: str, architecture: str, args: dict[str, Any], config: dict[str, Any], weights: Weights
) -> Blueprint:
    """A model whose pretrained_cfg is known: its normalisation, its input, its classes."""
    from timm.models import filter_pretrained_cfg

    config = filter_pretrained_cfg(config, remove_source=True)  # type: ignore[no-untyped-call]
    try:
        channels = int(args.get("in_chans") or config["input_size"][0])
        mean, std = (tuple(float(v) for v in config[key]) for key in ("mean", "std"))
        size, classes = _size(card, args, config), int(config["num_classes"])
    except (KeyError, TypeError, ValueError, IndexError) as e:
        raise BenchError(f"base {name}: its config is not timm's: {one_line(e)}") from None
    if not len(mean) == len(std) == channels:
        raise BenchError(f"base {name}: {channels} channels and a mean of {len(mean)} and std of {len(std)} values")
    if card.shape[0] not in (1, channels):
        raise BenchError(f"base {name} takes {channels} channels; images of {card.name} have {card.shape[0]}")
    return Blueprint(card, name, architecture, args, mean, std, size, classes, config, weights)


def _file(card: Card, path: Path) -> Blueprint:
    """A local safetensors file: described by a sidecar or its metadata, or by the recipe its shapes fit."""
    stored = tensors.read(path)
    record = {"kind": "file", "file": path.name, "sha256": stored.sha256}
    opened = lambda: (dict(stored.tensors), record)  # noqa: E731
    sidecar = next((f for f in (Path(f"{path}.json"), path.with_suffix(".json")) if f.is_file()), None)
    if sidecar is not None:
        config = _json(sidecar, f"file {path}")
    elif "architecture" in stored.metadata:
        config = {k: _value(v) for k, v in stored.metadata.items()}
    else:
        plain, _, _ = _plain(stored.tensors, (), ())
        return replace(_fitting(card, path, plain), weights=Weights(opened, adapt=False), name=path.name)
    stated = config.get("pretrained_cfg") or {}
    if "mean" not in stated:
        config = {**config, "pretrained_cfg": {**stated, "mean": card.mean, "std": card.std}}
    return _configured(card, path.name, config, Weights(opened, adapt=True))


def _fitting(card: Card, path: Path, stored: Mapping[str, Tensor]) -> Blueprint:
    """The card's recipe whose tensors have the file's names and shapes, the head's number of classes left open."""
    fits: list[Blueprint] = []
    nearest: tuple[int, str] | None = None
    for name in card.bases:
        plan = _recipe(card, name)
        head = str((plan.config or _architecture_config(plan.architecture, name)).get("classifier")) + ".weight"
        classes = int(stored[head].shape[0]) if head in stored else len(card.classes)
        # The card's normalisation, whatever the recipe trains from: a bare file states none.
        plan = replace(plan, classes=classes, schedule=None, mean=card.mean, std=card.std)
        with torch.device("meta"):  # shapes only, nothing allocated
            wrong = tensors.mismatches(plan.fresh(classes).model.state_dict(), stored)
        if not wrong:
            fits.append(plan)
        elif nearest is None or len(wrong) < nearest[0]:
            nearest = len(wrong), f"{wrong[0]} in recipe {name}"
    mend = f"say what it is in {path}.json: timm's config.json, with architecture, model_args, pretrained_cfg"
    if not fits:
        why = nearest[1] if nearest else "it has none"
        raise BenchError(f"{path} fits no base recipe of card {card.name}: {why}; {mend}")
    if any(plan.describe() != fits[0].describe() for plan in fits):
        names = " and ".join(plan.name for plan in fits)
        raise BenchError(f"{path} fits the recipes {names} of card {card.name} alike; {mend}")
    return fits[0]


def _from_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    stored = tensors.read(path)
    return stored.tensors, {"kind": "file", "file": path.name, "sha256": stored.sha256}


def _from_hub(card: Card, repo: str, revision: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    path = _fetch(card, repo, WEIGHTS_FILE, revision)
    stored = tensors.read(path)
    return stored.tensors, {
        "kind": "hub",
        "id": repo,
        "revision": hub.commit(path),
        "file": WEIGHTS_FILE,
        "sha256": stored.sha256,
    }


def _hub_id(name: str) -> str:
    """OWNER/NAME[@REVISION] of a hub id, empty for other names."""
    if name.startswith("hf-hub:"):
        return name.removeprefix("hf-hub:")
    return name if name.startswith("timm/") else ""


def _fetch(card: Card, repo: str, filename: str, revision: str) -> Path:
    here = [name for name, recipe in card.bases.items() if not recipe.pretrained]
    mend = "connect once, set HF_HUB_CACHE to a cache that has it, or give --base a folder with its config.json and "
    mend += WEIGHTS_FILE + (f", or a base trained here: --base {here[0]}" if here else "")
    try:
        return hub.fetch(repo, filename, revision, "model", mend)
    except hub.MissingFile:
        raise _not_in(f"hub id {repo}", filename) from None


def _not_in(where: str, filename: str) -> BenchError:
    if filename == WEIGHTS_FILE:
        return BenchError(
            f"{where} has no {WEIGHTS_FILE}: pickled weights are refused, since opening one can run code hidden in "
            f"it; where you trust them, convert them with torch.load(..., weights_only=True) and safetensors' save_file"
        )
    return BenchError(f"{where} has no {filename}: it is no timm model")


def _timm_config(model: str, name: str) -> dict[str, Any]:
    """timm's pretrained_cfg of a model by name. Raises BenchError for a name timm does not know."""
    import timm

    if not timm.is_model(model):
        raise unknown("timm model", model, timm.list_models(pretrained=True))
    return _architecture_config(model, f"base {name}")


def _architecture_config(model: str, where: str) -> dict[str, Any]:
    from timm.models import resolve_pretrained_cfg

    try:
        config: dict[str, Any] = resolve_pretrained_cfg(model).to_dict()  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as e:
        raise BenchError(f"{where}: {one_line(e)}") from None
    return config


def _size(card: Card, args: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[int, int] | None:
    """The height and width the model takes, None where that is the card's."""
    size = args.get("img_size") or config["input_size"][-2:]
    height, width = (size, size) if isinstance(size, int) else (int(v) for v in size)
    return None if (height, width) == card.shape[1:] else (height, width)


def _plain(
    stored: Mapping[str, Tensor], mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[dict[str, Tensor], tuple[float, ...], tuple[float, ...]]:
    """timm's own keys, and the normalisation: certbench's files hold it, and "model." before each key."""
    if {"mean", "std"} <= set(stored) and all(k in ("mean", "std") or k.startswith("model.") for k in stored):
        mean, std = (tuple(stored[k].flatten().tolist()) for k in ("mean", "std"))
        stored = {k.removeprefix("model."): v for k, v in stored.items() if k not in ("mean", "std")}
    return dict(stored), mean, std


def _json(path: Path, what: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise BenchError(f"{what}: {path.name} cannot be read: {one_line(e)}") from None
    if not isinstance(value, dict):
        raise BenchError(f"{what}: {path.name} must hold a JSON object")
    return value


def _value(text: str) -> Any:
    """A metadata value: JSON where it is, else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _config_keys() -> set[str]:
    from timm.models import PretrainedCfg

    return {f.name for f in fields(PretrainedCfg)}


def _create_parameters() -> set[str]:
    import timm

    return set(signature(timm.create_model).parameters) - {"kwargs"}


# Training --------------------------------------------------------------------------------------------


def _train_clean(
    plan: Blueprint,
    module: Classifier,
    train: Split,
    validation: Split,
    device: torch.device,
    progress: training.Progress,
) -> dict[str, Any]:
    """Train every weight on clean images, or take that from the cache; what to record of it."""
    assert plan.schedule is not None
    card, classes = plan.card, len(plan.card.classes)
    start = None if plan.weights is None else state_sha256(module)
    if start is not None and plan.classes != classes:
        _new_head(module, classes, device)
    identity = plan.describe() | {
        "normalisation": [plan.mean, plan.std],
        "start": start,
        "schedule": asdict(plan.schedule),
        "train": train.sha256(),
        "augment": card.augment,
        "classes": classes,
        "device": device.type,
        "training": source_sha256(training.__file__),
    }
    entry = Entry(f"{card.name}-base-{plan.name}", identity)
    with entry.lock():
        trained = entry.load()
        if trained is None:
            spent: list[float] = []
            job = training.TrainingJob(
                train, card.augment, 0.0, objectives.clean, 0, device, entry.checkpoint, progress, spent
            )
            job.train(module, lambda x, y, draw: objectives.clean(lambda z, _: module(z), x, y, draw), plan.schedule)
            accuracy = _accuracy(plan, module, validation, device)
            meta = {"train_seconds": sum(spent), "validation_clean_accuracy": accuracy}
            trained = entry.save(module.state_dict(), meta)
    module.load_state_dict(trained.state)
    return {k: trained.meta[k] for k in ("train_seconds", "validation_clean_accuracy")}


def _probe(
    plan: Blueprint,
    module: Classifier,
    train: Split,
    validation: Split,
    device: torch.device,
    progress: training.Progress,
) -> dict[str, Any]:
    """Give the base a head for the card's classes, trained on clean images, all else frozen; what to record."""
    card, classes = plan.card, len(plan.card.classes)
    start = state_sha256(module)
    head = _new_head(module, classes, device)
    prefix = next(name for name, m in module.named_modules() if m is head)
    identity = plan.describe() | {
        "start": start,
        "probe": asdict(PROBE),
        "train": train.sha256(),
        "classes": classes,
        "device": device.type,
        "training": source_sha256(training.__file__),
    }
    entry = Entry(f"{card.name}-probe", identity)
    with entry.lock():
        trained = entry.load()
        if trained is None:
            module.eval().requires_grad_(False)
            spent: list[float] = []
            features = _features(module, head, train, device, progress, spent)
            center, scale = features.standardise()
            head.requires_grad_(True)
            job = training.TrainingJob(
                features, (), 0.0, objectives.clean, 0, device, entry.checkpoint, progress, spent
            )
            job.train(head, lambda x, y, draw: objectives.clean(lambda z, _: head(z), x, y, draw), PROBE)
            with torch.no_grad():  # so that the head takes the features as the base makes them
                head.weight.div_(torch.from_numpy(scale).to(device))
                head.bias.sub_(head.weight @ torch.from_numpy(center).to(device))
            accuracy = _accuracy(plan, module, validation, device)
            meta = {"probe_seconds": sum(spent), "probe_validation_clean_accuracy": accuracy}
            state = {f"{prefix}.{k}": v for k, v in head.state_dict().items()}
            trained = entry.save(state, meta)
    module.load_state_dict(trained.state, strict=False)
    keep = {k: trained.meta[k] for k in ("probe_seconds", "probe_validation_clean_accuracy")}
    return keep | {"probe": asdict(PROBE), "probed_from_classes": plan.classes}


def _new_head(module: Classifier, classes: int, device: torch.device) -> nn.Linear:
    """Replace the head by a fresh linear layer for ``classes``. Raises BenchError where it is not one layer."""
    with training.fixed_rng(0):
        module.model.reset_classifier(classes)  # type: ignore[operator]
    module.to(device)
    head = module.head()
    if not isinstance(head, nn.Linear):
        kind = type(head).__name__
        raise BenchError(f"this base's head is a {kind}, no linear layer: use a base with {classes} classes")
    return head


@dataclass(frozen=True)
class _Features:
    """What a frozen base makes of a split, in place of its pixels; satisfies ``training.Rows``."""

    values: NDArray[np.float32]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self, indices: Any) -> NDArray[np.float32]:
        """The given rows' features, [len(indices), features]."""
        values: NDArray[np.float32] = self.values[indices]
        return values

    def standardise(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Shift and scale every feature to mean 0 and deviation 1, in place; the center and scale taken out.

        A feature that hardly varies is scaled less: divided by its own deviation it would pass on mostly noise.
        """
        center, deviation = self.values.mean(axis=0), self.values.std(axis=0)
        scale = np.maximum(deviation, 0.01 * float(deviation.mean()) or 1.0).astype(np.float32)
        self.values[:] = (self.values - center) / scale
        return center, scale


def _features(
    module: Classifier,
    head: nn.Module,
    split: Split,
    device: torch.device,
    progress: training.Progress,
    spent: list[float],
) -> _Features:
    """The head's input for every image, [images, features]: once, since nothing before the head is trained."""
    caught: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    rows: list[NDArray[np.float32]] = []
    started = time.perf_counter()
    try:
        with torch.inference_mode():
            for start in range(0, len(split), _PROBE_BLOCK):
                part = np.arange(start, min(start + _PROBE_BLOCK, len(split)))
                caught.clear()
                module(torch.from_numpy(split.pixels(part)).to(device))
                if len(caught) != 1 or caught[0].ndim != 2:
                    raise BenchError("this base's head does not see one vector an image: no linear probe can be made")
                rows.append(caught[0].float().cpu().numpy())
                progress(int(part[-1]) + 1, len(split), float("nan"))
    finally:
        hook.remove()
    spent.append(time.perf_counter() - started)
    return _Features(np.concatenate(rows), split.labels)


def _accuracy(plan: Blueprint, module: Classifier, split: Split, device: torch.device) -> float:
    right, total = _model(plan, module, {}, device).accuracy(split, list(range(len(split))))
    return right / total
