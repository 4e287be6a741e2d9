"""Write the attacks on a run, one process at a time, so that a killed attack loses at most the image being attacked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.errors import BenchError
from bench.io.files import writing
from bench.process.locks import Lock
from bench.records.attacks import NAME, Attack, AttackedImage, AttackSettings, attacks_file, read
from bench.records.schema import Environment

SPACE = "all images so far are kept: free space there, and repeat the command to resume"


class AttackFile:
    """The section of an attack that this process writes: begun, or resumed where it exists."""

    def __init__(self, folder: Path, settings: AttackSettings, environment: Environment) -> None:
        """Lock the run folder. Raises BenchError where it cannot be written, or another process writes it."""
        self._file = attacks_file(folder)
        if self._file.name != NAME:
            raise BenchError(f"{self._file} is a copy, to which nothing is added; attack the run itself")
        if self._file.is_symlink():
            raise BenchError(f"{self._file} is a link, and bench writes through none; move it away")
        with writing(folder, "attack a copy of the run in another folder"):
            self._lock = Lock(folder, named=False)
            if not self._lock.take():
                raise BenchError(f"{folder} is being written by another process{self._lock.held_by()}; wait for it")
        try:
            self._drop_torn_line()
            found = next((a for a in read(folder) if a.settings.sha256 == settings.sha256), None)
            if found is None:
                header = {"attack": settings.name, "settings": settings.as_json(), "environment": environment.as_json()}
                self._write(header)
            self.attack = found or Attack(settings, environment)
        except BaseException:
            self.close()
            raise

    @property
    def left(self) -> list[int]:
        """The images still to be attacked."""
        return self.attack.settings.indices[len(self.attack.images) :]

    def append(self, image: AttackedImage) -> None:
        """Add one image's line and hand it to the operating system."""
        self._write(image.as_json())
        self.attack.images.append(image)

    def close(self) -> None:
        """Let another process write."""
        self._lock.release()

    def _write(self, value: dict[str, Any]) -> None:
        with writing(self._file, SPACE):
            try:
                with self._file.open("a", encoding="utf-8") as f:
                    f.write(json.dumps(value) + "\n")
            except OSError:
                self._drop_torn_line()
                raise

    def _drop_torn_line(self) -> None:
        if not self._file.exists():
            return
        text = self._file.read_bytes()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            with self._file.open("r+b") as f:
                f.truncate(whole)
