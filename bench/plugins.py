"""Defense names -> classes: built-in files, the entry-point group ``bench.defenses``, ``./path.py``.

Listing reads source text and imports nothing, so that one broken plug-in hurts nobody and
``bench list`` stays quick; a class is imported only when it is selected.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from bench.errors import BenchError, one_line, unknown
from bench.plugin_source import own_modules, source_sha256

if TYPE_CHECKING:
    from bench.interface import Defense

GROUP = "bench.defenses"
_runnable: ContextVar[frozenset[Path] | None] = ContextVar("runnable", default=None)  # None: whatever was typed


@dataclass(frozen=True)
class Listed:
    """What a listing says of a defense, read from its source."""

    name: str
    summary: str
    family: str
    trains: str
    access: str
    paper: str
    where: str


def _builtin() -> dict[str, Path]:
    folder = Path(__file__).parent.parent / "defenses"
    return {f.stem.replace("_", "-"): f for f in sorted(folder.glob("*.py")) if f.stem != "__init__"}


def _plugins() -> dict[str, str]:
    """Name -> module of the installed plug-ins; a name of ours cannot be taken over."""
    return {e.name: e.value.partition(":")[0] for e in entry_points(group=GROUP) if e.name not in _builtin()}


def names() -> list[str]:
    """Every defense that can be given by name."""
    return [*_builtin(), *_plugins()]


def listing() -> list[Listed]:
    """All named defenses, without importing any."""
    rows = [_read(name, path, "built in") for name, path in _builtin().items()]
    for name, module in _plugins().items():
        try:
            spec = importlib.util.find_spec(module)
        except ImportError:
            spec = None
        if spec is None or spec.origin is None:
            rows.append(Listed(name, f"(module {module} is not importable)", "", "", "", "", module))
        else:
            rows.append(_read(name, Path(spec.origin), module))
    return rows


def _read(name: str, path: Path, where: str) -> Listed:
    try:
        tree = ast.parse(path.read_text())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as e:  # the last two: nested too deep
        return Listed(name, f"(unreadable: {one_line(e)})", "", "", "", "", where)
    fields = {"family": "other", "trains": "other", "access": "WEIGHTS", "paper": ""}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any("Defense" in ast.unparse(b) for b in node.bases):
            for line in node.body:
                if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
                    key = line.targets[0].id
                    if key in fields:
                        fields[key] = ast.unparse(line.value).strip("'\"").removeprefix("Access.")
    summary = (ast.get_docstring(tree) or "").partition("\n")[0]
    return Listed(name, summary, fields["family"], fields["trains"], fields["access"], fields["paper"], where)


def load(name: str) -> tuple[type[Defense], str]:
    """The class of a defense and the hash of its source (see ``plugin_source.source_sha256``).

    Raises BenchError saying which file failed and why.
    """
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise BenchError(f"no defense file at {name}")
        allowed = _runnable.get()
        if allowed is not None and path.resolve() not in allowed:
            raise BenchError(f"{name} is named by a record alone, so it is not run; where you trust it, bench run it")
        module = _import_file(path, _module_name(path))
    elif name in _builtin():
        path = _builtin()[name]
        module = _import(f"defenses.{path.stem}", name)
    elif name in _plugins():
        module = _import(_plugins()[name], name)
        path = Path(str(module.__file__))
    else:
        raise unknown("defense", name, names())
    return _class_in(module, path), source_sha256(path)


@contextmanager
def only(files: Iterable[str]) -> Iterator[None]:
    """Within, no defense file is run but these: the names come from a record, not from whoever typed the command."""
    before = _runnable.set(frozenset(Path(f).resolve() for f in files))
    try:
        yield
    finally:
        _runnable.reset(before)


def short_name(name: str) -> str:
    """The name under which runs of a defense are filed: ``./my_defense.py`` is my-defense."""
    return Path(name).stem.replace("_", "-") if name.endswith(".py") else name


def _import(module: str, name: str) -> ModuleType:
    from bench import globalstate  # here, since torch takes a while to import and listing needs none

    try:
        with globalstate.restored_torch_settings(name, "when it was imported"):
            return importlib.import_module(module)
    except Exception as e:
        raise BenchError(f"defense {name}: importing {module} failed: {one_line(e)}") from e


def _module_name(path: Path) -> str:
    """A name of its own, so that two files called mine.py do not meet."""
    return f"bench_defense_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"


def sources(names: Iterable[str]) -> dict[str, bytes]:
    """The files that another process needs to know the classes of the files among ``names``, by place and name.

    Each in a folder of its own, named as its module, beside the modules of its own folder that it imports.
    """
    found: dict[str, bytes] = {}
    for path in (Path(name) for name in names if name.endswith(".py")):
        module = _module_name(path)
        found[f"{module}/{module}.py"] = path.read_bytes()
        found |= {f"{module}/{name}": data for name, data in own_modules(path).items()}
    return found


def import_sources(sources: Mapping[str, bytes], folder: Path) -> None:
    """Make the classes of ``sources`` known under the same module names; their files are written to ``folder``."""
    for name, source in sources.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source)
    for path in sorted({folder / name.partition("/")[0] for name in sources}):
        _import_file(path / f"{path.name}.py", path.name)


def _import_file(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    from bench import globalstate  # here, since torch takes a while to import and listing needs none

    try:
        with globalstate.restored_torch_settings(str(path), "when it was imported"):
            spec.loader.exec_module(module)
    except Exception as e:
        raise BenchError(f"{path}: {one_line(e)}") from e
    return module


def _class_in(module: ModuleType, path: Path) -> type[Defense]:
    from bench.interface import Defense

    found = [
        c
        for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, Defense) and c.__module__ == module.__name__
    ]
    if len(found) != 1:
        what = ", ".join(c.__name__ for c in found) or "none"
        raise BenchError(f"{path} must define exactly one subclass of bench.interface.Defense; found {what}")
    return found[0]
