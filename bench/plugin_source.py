"""The source that a defense's file consists of: the file and the modules of its own folder that it imports."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from pathlib import Path

from bench.errors import BenchError, one_line


def source_sha256(path: Path) -> str:
    """The sha256 of a file and of what it imports of its own folder; of the file's bytes alone where that is nothing.

    Read from the source, not from what was imported, so that it is the same in every process. Imports by a computed
    name are not seen. Raises BenchError where one of the files cannot be read.
    """
    files = own_modules(path)
    h = hashlib.sha256(_bytes(path))
    for name, data in files.items():
        h.update(f"\n|{name}|{len(data)}|".encode() + data)
    return h.hexdigest()


def own_modules(path: Path) -> dict[str, bytes]:
    """The modules of a file's folder that it imports, and those that they import: name below the folder -> source."""
    root = path.resolve().parent
    found: dict[str, bytes] = {}
    todo = [path.resolve()]
    seen = {path.resolve()}
    while todo:
        for file in _imported(todo.pop(), root):
            if file not in seen:
                seen.add(file)
                todo.append(file)
                found[file.relative_to(root).as_posix()] = _bytes(file)
    return dict(sorted(found.items()))


def _imported(file: Path, root: Path) -> Iterator[Path]:
    try:
        tree = ast.parse(_bytes(file))
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # importing it says what is wrong
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _files(alias.name, root, root)
        elif isinstance(node, ast.ImportFrom):
            folder = file.parent
            for _ in range(node.level - 1):
                folder = folder.parent
            start, module = (folder, node.module or "") if node.level else (root, node.module or "")
            for alias in node.names:  # each may be a module or a name in one
                yield from _files(f"{module}.{alias.name}".strip("."), start, root)


def _files(name: str, start: Path, root: Path) -> Iterator[Path]:
    """The files of a dotted name, packages on the way included, where they lie below ``root``."""
    package = root.name  # an absolute import within a package names the package first
    parts = name.split(".")
    if parts[0] == "bench":  # of a checkout, where the file lies beside it: its versions are recorded by themselves
        return
    for words in [parts, parts[1:]] if parts[0] == package else [parts]:
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
