"""The file of a run's certificates: ``certificates.jsonl``, or the gzip copy of it that a repository keeps.

Hashes are those of the uncompressed lines, so a copy has the hash that the finished run wrote.
"""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

from bench.errors import BenchError
from bench.io import limits
from bench.io.files import file_sha256

NAME = "certificates.jsonl"
COMPRESSED = NAME + limits.GZIP


def certificates_file(folder: Path) -> Path:
    """Return a run's file of certificates, which need not exist. Raises BenchError where there are two."""
    plain, compressed = folder / NAME, folder / COMPRESSED
    if not compressed.exists():
        return plain
    if plain.exists():
        raise BenchError(f"{folder} has {NAME} and {COMPRESSED}, which may differ; move one of them away")
    return compressed


def sha256(file: Path) -> str:
    """Return the hash of a run's lines, uncompressed. Raises BenchError beyond the limits of compressed files."""
    if file.suffix != limits.GZIP:
        return file_sha256(file)
    found = hashlib.sha256()
    for line in limits.lines(file, limits.CERTIFICATE):
        found.update(line)
    return found.hexdigest()


def compressed(file: Path) -> bytes:
    """Return a run's lines as gzip, the same bytes at any time."""
    return gzip.compress(b"".join(limits.lines(file, limits.CERTIFICATE)), mtime=0)
