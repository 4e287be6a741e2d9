"""Versions of the training code that trained weights depend on: part of their identity in the cache.

A module of this package states a VERSION, raised whenever weights trained by it would change. So moving or rewording
code does not invalidate trained weights (``tests/training/test_versions.py`` pins each version to its code).
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from bench import plugins
from bench.training import bfloat16, loop, objectives

PACKAGE = "bench.training."


def of(*objective_names: str) -> dict[str, int]:
    """Return the versions of the training loop and of the named objectives, by name."""
    return {"loop": loop.VERSION} | {f"objective {name}": objectives.VERSIONS[name] for name in objective_names}


def of_arithmetic(name: str) -> dict[str, int]:
    """Return the version of the arithmetic that training computes in; none of float32."""
    return {"bfloat16": bfloat16.VERSION} if name == "bfloat16" else {}


def used_by(cls: type, objective: str) -> dict[str, int]:
    """Return the versions of the training code that the source of a class uses, by name.

    The class's file is parsed, with the modules of its folder that it imports. The training loop always counts; every
    other module or objective where it is imported.

    Args:
        cls: A defense or a part.
        objective: Name of the job's objective, which counts where the source calls ``job.objective`` or a ``loss``.
    """
    if cls.__module__.startswith(PACKAGE):
        return of() | _versions(cls.__module__)
    found = of()
    for source in plugins.source_files(Path(inspect.getfile(cls))).values():
        for node in plugins.parsed(source):
            for module, name in _imports(node):
                found |= _versions(module, name)
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("objective", "loss"):
                found |= of(objective)
    return found


def _imports(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield the modules that a statement may import, each with the name that is imported from it."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, "") for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
        for alias in node.names:
            yield node.module or "", alias.name
            yield f"{node.module}.{alias.name}", ""


def _versions(module: str, name: str = "") -> dict[str, int]:
    """Return the versions of a module of this package: all of its objectives where ``name`` is none of them."""
    stem = module.removeprefix(PACKAGE)
    of_objectives = module == objectives.__name__
    if not of_objectives and (stem == module or not (Path(__file__).parent / f"{stem.replace('.', '/')}.py").is_file()):
        return {}
    if of_objectives or stem.startswith("objectives."):
        return of(*([name] if name in objectives.VERSIONS else objectives.VERSIONS))
    version: int | None = getattr(import_module(module), "VERSION", None)
    return {} if version is None else {stem: version}
