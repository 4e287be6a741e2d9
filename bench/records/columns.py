"""Rows of numbers stored as one array per field: a million certificates take about 100 MB, as objects 500 MB.

A row is a dataclass whose fields are annotated ``int``, ``float``, either ``| None``, or ``None`` alone (a field
that is never known, and not stored). ``Columns`` behaves as a list of such rows, which it creates on access;
computations over all rows take one field at a time.
"""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar, get_type_hints, overload

import numpy as np
from numpy.typing import NDArray

LARGEST = sys.float_info.max
NULL = -(2**63)  # None in a column of integers; in one of floats it is NaN
_TYPES: dict[Any, tuple[str, bool]] = {
    int: ("q", False),
    int | None: ("q", True),
    float: ("d", False),
    float | None: ("d", True),
    type(None): ("", True),
}

Row = TypeVar("Row", covariant=True)


class Columns(Sequence[Row], Generic[Row]):
    """Rows of one dataclass, in the order in which they were added."""

    def __init__(self, kind: type[Row]) -> None:
        self._kind = kind
        self._types = {name: _TYPES[hint] for name, hint in get_type_hints(kind).items()}
        self._arrays = {name: array(code) for name, (code, _) in self._types.items() if code}

    def add(self, values: Mapping[str, Any]) -> None:
        """Append a row of these values. Raises ValueError where a field is missing, unknown or of another type."""
        if values.keys() != self._types.keys():
            names = [*(self._types.keys() - values.keys()), *(values.keys() - self._types.keys())]
            raise ValueError(f"fields are missing or unknown: {', '.join(sorted(map(str, names)))}")
        row = {name: _stored(name, values[name], *how) for name, how in self._types.items()}
        for name, kept in self._arrays.items():
            kept.append(row[name])

    def append(self, row: Any) -> None:
        """Append a row of the columns' own kind."""
        self.add(vars(row))

    def column(self, name: str) -> NDArray[Any]:
        """Return a copy of a field of every row, int64 or float64; None is ``NULL`` or NaN."""
        return np.array(self._arrays[name])

    def place(self, name: str, value: int) -> int:
        """Return the first row whose integer field is ``value``. Raises ValueError where there is none."""
        return self._arrays[name].index(value)

    def __len__(self) -> int:
        return len(next(iter(self._arrays.values())))

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._row({name: column[index] for name, column in self._arrays.items()})

    def __iter__(self) -> Iterator[Row]:
        for values in zip(*self._arrays.values(), strict=True):
            yield self._row(dict(zip(self._arrays, values, strict=True)))

    def _row(self, values: dict[str, Any]) -> Row:
        for name, (code, optional) in self._types.items():
            if optional and (not code or (values[name] == NULL if code == "q" else math.isnan(values[name]))):
                values[name] = None
        return self._kind(**values)


def _stored(name: str, value: Any, code: str, optional: bool) -> Any:
    if value is None and optional:
        return math.nan if code == "d" else NULL
    if code == "q" and type(value) is int and NULL < value < 2**63:
        return value
    if code == "d" and (type(value) is float or type(value) is int) and -LARGEST <= value <= LARGEST:
        return value
    raise ValueError(f"{name} is {str(value)[:40]}")


def column(rows: Sequence[Any], name: str) -> NDArray[Any]:
    """Return a field of any rows as an array, None as ``NULL``."""
    if isinstance(rows, Columns):
        return rows.column(name)
    return np.array([NULL if (value := getattr(row, name)) is None else value for row in rows])
