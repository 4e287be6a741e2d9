"""Find and load defenses: built-in files, the entry-point group ``bench.defenses``, and ``./path.py``.

Listing parses source text and imports nothing, so one broken plug-in cannot break the listing, and ``bench list``
is fast. Only selected defenses are imported.
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

if TYPE_CHECKING:
    from bench.interface import Defense

GROUP = "bench.defenses"
_allowed: ContextVar[frozenset[Path] | None] = ContextVar("allowed", default=None)  # None: every file


@dataclass(frozen=True)
class DefenseSummary:
    """What a listing shows of a defense, parsed from its source."""

    name: str
    summary: str
    family: str
    trains: str
    access: str
    paper: str
    where: str


# Names ------------------------------------------------------------------------------------------------


def _builtin() -> dict[str, Path]:
    folder = Path(__file__).parent.parent / "defenses"
    return {f.stem.replace("_", "-"): f for f in sorted(folder.glob("*.py")) if f.stem != "__init__"}


def _installed() -> dict[str, str]:
    """Map each installed plug-in's name to its module; a plug-in cannot take a built-in name."""
    return {e.name: e.value.partition(":")[0] for e in entry_points(group=GROUP) if e.name not in _builtin()}


def names() -> list[str]:
    """Return the names of all built-in and installed defenses."""
    return [*_builtin(), *_installed()]


def short_name(name: str) -> str:
    """Return the name of a defense in run folders and tables: ``./my_defense.py`` is my-defense."""
    return Path(name).stem.replace("_", "-") if name.endswith(".py") else name


def listing() -> list[DefenseSummary]:
    """Summarise all named defenses without importing any."""
    rows = [_summarise(name, path, "built in") for name, path in _builtin().items()]
    for name, module in _installed().items():
        try:
            spec = importlib.util.find_spec(module)
        except ImportError:
            spec = None
        if spec is None or spec.origin is None:
            rows.append(DefenseSummary(name, f"(module {module} is not importable)", "", "", "", "", module))
        else:
            rows.append(_summarise(name, Path(spec.origin), module))
    return rows


def _summarise(name: str, path: Path, where: str) -> DefenseSummary:
    try:
        tree = ast.parse(path.read_text())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as e:  # the last two: nested too deeply
        return DefenseSummary(name, f"(unreadable: {one_line(e)})", "", "", "", "", where)
    fields = {"family": "other", "trains": "other", "access": "WEIGHTS", "paper": ""}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any("Defense" in ast.unparse(b) for b in node.bases):
            for line in node.body:
                if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
                    key = line.targets[0].id
                    if key in fields:
                        fields[key] = ast.unparse(line.value).strip("'\"").removeprefix("Access.")
    summary = (ast.get_docstring(tree) or "").partition("\n")[0]
    return DefenseSummary(name, summary, fields["family"], fields["trains"], fields["access"], fields["paper"], where)


# Classes ----------------------------------------------------------------------------------------------


def load(name: str) -> tuple[type[Defense], str]:
    """Import a defense.

    Args:
        name: A built-in or installed name, or the path of a .py file.

    Returns:
        Its class, and the sha256 of its source (see ``source_sha256``).

    Raises:
        BenchError: The name is unknown, or its file cannot be imported or does not define exactly one defense.
    """
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise BenchError(f"no defense file at {name}")
        allowed = _allowed.get()
        if allowed is not None and path.resolve() not in allowed:
            raise BenchError(
                f"the record names the defense file {name}, and code named by a record is not run; if you trust it, "
                f"run it yourself: bench run --defense {name}"
            )
        module = _import_file(path, _module_name(path))
    elif name in _builtin():
        path = _builtin()[name]
        module = _import(f"defenses.{path.stem}", name)
    elif name in _installed():
        module = _import(_installed()[name], name)
        path = Path(str(module.__file__))
    else:
        raise unknown("defense", name, names())
    return _class_in(module, path), source_sha256(path)


@contextmanager
def restricted_to(files: Iterable[str]) -> Iterator[None]:
    """Let ``load`` run no defense file but these while the context lasts, for names that come from a record."""
    before = _allowed.set(frozenset(Path(f).resolve() for f in files))
    try:
        yield
    finally:
        _allowed.reset(before)


def _import(module: str, name: str) -> ModuleType:
    from bench import globalstate  # here, since importing torch is slow and listing does not need it

    try:
        with globalstate.restored_torch_settings(name, "when it was imported"):
            return importlib.import_module(module)
    except Exception as e:
        raise BenchError(f"defense {name}: importing {module} failed: {one_line(e)}") from e


def _module_name(path: Path) -> str:
    """Return a module name unique to the path, so that two files called mine.py do not collide."""
    return f"bench_defense_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"


def _import_file(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    from bench import globalstate  # here, since importing torch is slow and listing does not need it

    try:
        with globalstate.restored_torch_settings(str(path), "when it was imported"):
            spec.loader.exec_module(module)
    except Exception as e:
        raise BenchError(f"{path}: {one_line(e)}") from e
    return module


def _class_in(module: ModuleType, path: Path) -> type[Defense]:
    from bench.interface import Defense  # here, since it imports torch

    found = [
        c
        for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, Defense) and c.__module__ == module.__name__
    ]
    if len(found) != 1:
        what = ", ".join(c.__name__ for c in found) or "none"
        raise BenchError(f"{path} must define exactly one subclass of bench.interface.Defense; found {what}")
    return found[0]


# Defense files for other processes --------------------------------------------------------------------


def sources(names: Iterable[str]) -> dict[str, bytes]:
    """Return the source files that another process needs to import those of ``names`` that are files.

    Each defense file gets a folder named as its module, together with the modules of its own folder that it imports.
    """
    found: dict[str, bytes] = {}
    for path in (Path(name) for name in names if name.endswith(".py")):
        module = _module_name(path)
        own, *others = source_files(path).items()
        found[f"{module}/{module}.py"] = own[1]
        found |= {f"{module}/{name}": data for name, data in others}
    return found


def import_sources(sources: Mapping[str, bytes], folder: Path) -> None:
    """Write the files of ``sources`` to ``folder`` and import them under the same module names."""
    for name, source in sources.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source)
    for path in sorted({folder / name.partition("/")[0] for name in sources}):
        _import_file(path / f"{path.name}.py", path.name)


# Source -----------------------------------------------------------------------------------------------


def source_sha256(path: Path) -> str:
    """Return the sha256 of a defense's source: its file, and the modules of the same folder that it imports.

    The source is parsed, not imported, so the hash is the same in every process. Imports by a computed name are not
    found. Raises BenchError where a file cannot be read.
    """
    own, *others = source_files(path).items()
    h = hashlib.sha256(own[1])
    for name, data in others:
        h.update(f"\n|{name}|{len(data)}|".encode() + data)
    return h.hexdigest()


def source_files(path: Path) -> dict[str, bytes]:
    """Return the files of a defense's source by their names below its folder, its own file first."""
    path = path.resolve()
    root, todo = path.parent, [path]
    found = {path: _bytes(path)}
    while todo:
        for file in _imported(todo.pop(), root):
            if file not in found:
                found[file] = _bytes(file)
                todo.append(file)
    own, *others = ((file.relative_to(root).as_posix(), data) for file, data in found.items())
    return dict([own, *sorted(others)])


def parsed(source: bytes) -> Iterator[ast.AST]:
    """Yield all syntax nodes of Python source; none where it has an error, which importing it reports."""
    try:
        yield from ast.walk(ast.parse(source))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return


def _imported(file: Path, root: Path) -> Iterator[Path]:
    for node in parsed(_bytes(file)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _files(alias.name, root, root)
        elif isinstance(node, ast.ImportFrom):
            folder = file.parent
            for _ in range(node.level - 1):
                folder = folder.parent
            start, module = (folder, node.module or "") if node.level else (root, node.module or "")
            for alias in node.names:  # each may be a module, or a name in one
                yield from _files(f"{module}.{alias.name}".strip("."), start, root)


def _files(name: str, start: Path, root: Path) -> Iterator[Path]:
    """Yield the files of a dotted name that lie below ``root``, with those of the packages that contain it."""
    parts = name.split(".")
    if parts[0] == "bench":  # found where the file lies in a checkout; its versions are recorded separately
        return
    # An absolute import within a package begins with the package's name.
    for words in [parts, parts[1:]] if parts[0] == root.name else [parts]:
        place = start
        for word in words:
            place = place / word
            for file in (place.with_suffix(".py"), place / "__init__.py"):
                if file.is_file() and file.resolve().is_relative_to(root):
                    yield file.resolve()


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise BenchError(f"{path}: cannot be read: {one_line(e)}") from None
