"""Versions of training code: pinned to the code, and counted for the defenses that use it and no others."""

from __future__ import annotations

import ast
import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from bench import plugins
from bench.data.datasets import load_splits
from bench.models.load import untrained_base
from bench.options import RunOptions
from bench.runs import fitting
from bench.runs.context import PartTraining
from bench.runs.plan import Plan, make_plans
from bench.training import autoencoder, bfloat16, clean, denoising, diffusion, loop, objectives, prompts, spsa, versions
from bench.training.autoencoder import MaskedAutoencoder
from bench.training.objectives import attacks, catrs, macer, method, plain, smoothadv, smoothmix
from tests.helpers.commands import TINY, defense

LOSSES: dict[str, Callable[..., Any]] = {
    "clean": objectives.clean,
    "gaussian": objectives.gaussian,
    "stability": objectives.stability,
    "consistency": objectives.consistency,
    "dign": objectives.dign,
    "smoothadv": smoothadv.SmoothAdv,
    "smoothadv-ddn": smoothadv.SmoothAdvDDN,
    "macer": macer.MACER,
    "smoothmix": smoothmix.SmoothMix,
    "catrs": catrs.CATRS,
}
# The code that each version stands for.
PINNED = {
    "loop": (1, "9a91611c816a30d6"),
    "clean": (2, "8b617ef898d937bc"),
    "bfloat16": (1, "1cdce84e584d3903"),
    "spsa": (1, "1508bb5e21263cff"),
    "autoencoder": (1, "462aa627c9db045b"),
    "diffusion": (1, "56c970d429880c08"),
    "denoising": (1, "3635c26494a1886b"),
    "prompts": (1, "a0f873c1e8456c3b"),
    "objective clean": (1, "cd6c4c6bf6233135"),
    "objective gaussian": (1, "f147e0a2bdab2078"),
    "objective stability": (2, "53e29713ee68700d"),
    "objective consistency": (2, "8de72318a3fad939"),
    "objective dign": (1, "c482352220d69770"),
    "objective smoothadv": (1, "39b9aabb41d0ca66"),
    "objective smoothadv-ddn": (1, "e67d7c7da99f2c88"),
    "objective macer": (1, "5b0ecd80ea560aa2"),
    "objective smoothmix": (1, "933d13d0a9e8b3fc"),
    "objective catrs": (1, "6ce823f5ac0728e3"),
}


def canonical(node: Any) -> Any:
    """A syntax tree without docstrings, imports and positions, the same in every version of Python."""
    if isinstance(node, ast.AST):
        left_out = ("ctx", "kind", "type_comment", "type_params")
        fields = {k: v for k, v in ast.iter_fields(node) if k not in left_out and v not in (None, [])}
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            fields["body"] = node.body[1:]
        return [type(node).__name__, {k: canonical(v) for k, v in fields.items()}]
    if isinstance(node, list):
        return [canonical(n) for n in node if not isinstance(n, ast.Import | ast.ImportFrom)]
    return repr(node)


def code_sha256(*trees: ast.AST) -> str:
    return hashlib.sha256(repr([canonical(tree) for tree in trees]).encode()).hexdigest()[:16]


def of_module(module: ModuleType) -> str:
    return code_sha256(ast.parse(inspect.getsource(module)))


def of_objective(name: str) -> str:
    """Hash of an objective's function or class, and of what it uses of its package: functions, classes, constants."""
    defined: dict[str, ast.stmt] = {}
    files = (method, attacks, plain, smoothadv, macer, smoothmix, catrs)
    for node in (node for file in files for node in ast.parse(inspect.getsource(file)).body):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined[node.name] = node
        elif isinstance(node, ast.Assign):
            defined |= {n.id: node for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    used, new = set[str](), {LOSSES[name].__name__}
    while new:
        used |= new
        named = {n.id for one in new for n in ast.walk(defined[one]) if isinstance(n, ast.Name)}
        new = (named & defined.keys()) - used
    return code_sha256(*(node for n, node in defined.items() if n in used))


def current() -> dict[str, tuple[int, str]]:
    found = {
        m.__name__.rpartition(".")[2]: (m.VERSION, of_module(m))
        for m in (loop, clean, bfloat16, spsa, autoencoder, diffusion, denoising, prompts)
    }
    return found | {f"objective {name}": (objectives.VERSIONS[name], of_objective(name)) for name in LOSSES}


@pytest.mark.parametrize("name", PINNED)
def test_each_version_is_pinned_to_its_code(name: str) -> None:
    version, sha256 = current()[name]
    assert (version, sha256) == PINNED[name], (
        f"the code of {name} in bench/training has changed. Would the same training now give other weights (or, for "
        f"autoencoder, other features)? If so, raise its VERSION. Then set PINNED[{name!r}] = (VERSION, {sha256!r})"
    )


def test_all_versions_are_pinned() -> None:
    assert set(current()) == set(PINNED)
    assert set(objectives.VERSIONS) == set(LOSSES) == {"clean", *objectives.OBJECTIVES}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ('def f():\n    """Old."""\n    return 1', 'def f():  # new\n    """New."""\n\n    return 1', True),
        ("import a\nx = a.b", "from c import a\nx = a.b", True),
        ("x = 1", "x = 2", False),
        ("x = None", "x = []", False),
        ("def f(x): return x", "def f(x): return -x", False),
    ],
)
def test_the_pin_ignores_prose_and_imports_alone(one: str, other: str, same: bool) -> None:
    assert (code_sha256(ast.parse(one)) == code_sha256(ast.parse(other))) is same


@pytest.mark.parametrize(
    ("name", "uses"),
    [
        ("full", set()),
        ("lora", set()),
        ("denoiser", {"objective gaussian"}),
        ("two-stage", {"objective clean", "objective gaussian"}),
        ("coordinator", {"objective gaussian", "spsa", "autoencoder", "prompts"}),
        ("diffusion", {"diffusion", "denoising"}),
        ("finetuned-diffusion", {"diffusion", "denoising", "objective gaussian"}),  # its fit calls its own loss
        (defense("own_loss"), set()),
    ],
)
def test_a_class_uses_what_its_source_imports(name: str, uses: set[str]) -> None:
    assert set(versions.used_by(plugins.load(name)[0], "gaussian")) == {"loop"} | uses


def test_a_built_in_part_uses_its_own_version() -> None:
    assert versions.used_by(MaskedAutoencoder, "clean") == {"loop": loop.VERSION, "autoencoder": autoencoder.VERSION}


@pytest.mark.parametrize(
    ("source", "uses"),
    [
        ("import bench.training.spsa", {"spsa"}),
        ("from bench.training import spsa as s", {"spsa"}),
        ("from bench.training.objectives import dign, gaussian", {"objective dign", "objective gaussian"}),
        ("from bench.training import objectives", {f"objective {name}" for name in LOSSES}),
        ("from bench.training.objectives.plain import dign", {"objective dign"}),
        ("from bench.training.objectives.attacks import pgd", {f"objective {name}" for name in LOSSES}),
        ("from bench.training import weights, nothing", set()),
        ("def loss(self, x, y, draw, job): return 2 * job.objective(self.logits, x, y, draw)", {"objective gaussian"}),
        ("from helper import step", {"spsa"}),
    ],
)
def test_a_plugin_uses_what_it_and_its_helpers_import(source: str, uses: set[str], tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("from bench.training.spsa import SPSA as step\n")
    file = tmp_path / "mine.py"
    file.write_text(
        f"import bench.interface\ndef unused():\n    {source}\n"
        "class Mine(bench.interface.Defense):\n    def logits(self, x, draw): return x\n"
    )
    assert set(versions.used_by(plugins.load(str(file))[0], "gaussian")) == {"loop"} | uses


def plan(name: str, **given: Any) -> Plan:
    options = RunOptions(defenses=name, dataset=TINY, sigma="0.5", **given)
    return make_plans(options)[0]


@pytest.mark.parametrize(
    ("name", "given", "uses"),
    [
        ("lora", {}, {"objective gaussian"}),
        ("lora", {"objective": "dign"}, {"objective dign"}),
        ("denoiser", {}, {"objective gaussian"}),
        ("denoiser", {"objective": "macer", "settings": ("objective=clf",)}, {"objective macer"}),
        (defense("own_loss"), {}, set()),
        ("joint", {"base": "vit"}, {"objective gaussian"}),
        ("coordinator", {}, {"objective gaussian", "spsa", "autoencoder", "prompts"}),
    ],
)
def test_weights_depend_on_what_their_defense_uses(
    name: str, given: dict[str, Any], uses: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    of = plan(name, **given)
    (train,) = load_splits(of.card, "train")
    train = train.first(20)
    base = untrained_base(of.card, of.base, cpu)

    def identity() -> dict[str, Any]:
        built = fitting.construct(of, base, cpu, PartTraining(train, lambda *_: None, most=1))
        return fitting.weights_identity(of, base, train, cpu, fitting.context_of(built))

    before = identity()
    assert set(before["versions"]) == {"loop"} | uses
    monkeypatch.setattr(spsa, "VERSION", 99)
    assert (identity() != before) is ("spsa" in uses)
