"""JSON objects that are validated and kept exactly, and the number types that records use."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from bench.errors import BenchError
from bench.smoothing.votes import MAX_VOTES

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def unchanged(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """Validate a number and keep it as given: 1 and 1.0 have different hashes."""
    validate(value)
    return value


Whole = Annotated[int, Field(ge=0, lt=2**63)]
Votes = Annotated[int, Field(ge=1, le=MAX_VOTES)]
Number = Annotated[float, WrapValidator(unchanged)]
Amount = Annotated[float, Field(ge=0, le=1e30), WrapValidator(unchanged)]
Positive = Annotated[float, Field(gt=0, le=1e30), WrapValidator(unchanged)]
Open = Annotated[float, Field(gt=0, lt=1), WrapValidator(unchanged)]
Share = Annotated[float, Field(ge=0, le=1), WrapValidator(unchanged)]
Radii = Annotated[list[Amount], Field(min_length=1, max_length=100)]


class Stored(BaseModel):
    """A validated JSON object. ``as_json`` returns it with the same keys and values, unknown ones included."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow", frozen=True)

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> Self:
        """Validate a JSON object. Raises BenchError naming the first field that is wrong."""
        try:
            return cls.model_validate(value)
        except ValidationError as e:
            first = e.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise BenchError(f"{where}: {first['msg']}" if where else first["msg"]) from None

    def as_json(self) -> dict[str, Any]:
        """Return the JSON object that was validated; fields that it does not have stay absent."""
        fields = type(self).model_fields
        known = {f.alias or name: getattr(self, name) for name, f in fields.items() if name in self.model_fields_set}
        return {k: _as_json(v) for k, v in (known | (self.model_extra or {})).items()}

    def replace(self, **changes: Any) -> Self:
        """Return the object with other values for some keys, validated. Raises BenchError as ``of`` does."""
        return self.of(self.as_json() | {k: _as_json(v) for k, v in changes.items()})


def _as_json(value: Any) -> Any:
    if isinstance(value, Stored):
        return value.as_json()
    if isinstance(value, list) and value and isinstance(value[0], Stored):
        return [v.as_json() for v in value]
    return value


def parse_json(text: str | bytes) -> Any:
    """Parse JSON, and escape half a surrogate pair, which no file or table can hold. Raises ValueError."""
    value = json.loads(text)
    return _escape_surrogates(value) if _SURROGATE.search(text if isinstance(text, bytes) else text.encode()) else value


def _escape_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {_escape_surrogates(k): _escape_surrogates(v) for k, v in value.items()}
    return [_escape_surrogates(v) for v in value] if isinstance(value, list) else value
