"""A base on a remote server, queried by the Open Inference Protocol v2 over HTTP.

https://github.com/kserve/open-inference-protocol, supported by Triton, KServe, MLServer and OpenVINO: ``GET
.../v2/models/NAME`` describes the model, ``POST .../infer`` returns the logits of a batch. Tensors are sent as raw
float32 where the server has the binary_tensor_data extension, else as JSON numbers with all digits. A batch is one
request, whatever its size. An answer that is not logits of the right shape is an error (see ``bench.io.http``), so no
vote is ever invented.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast
from urllib.parse import urlsplit

import httpx2
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import Tensor, nn

from bench.data.card import Card
from bench.errors import BenchError, one_line
from bench.interface import Access
from bench.io.files import digest
from bench.io.http import LARGEST, TOKEN, Answer, Client, Refused
from bench.models.base import BaseModel, BlackBox, View
from bench.smoothing.noise import Noise, Vote
from bench.smoothing.task import block_rows

PROBES = 16  # noisy images of the fingerprint

_FLOATS = {"FP16": "<f2", "FP32": "<f4", "FP64": "<f8"}


def is_url(name: str) -> bool:
    """Return whether the name of a base is a server's address."""
    return name.startswith(("http://", "https://"))


def checked_url(url: str) -> str:
    """Return the address without a final slash. Raises BenchError where it is not a model's, or may have a secret."""
    try:
        parts = urlsplit(url)
        httpx2.URL(url)
    except (ValueError, httpx2.InvalidURL) as e:
        raise BenchError(f"--base: invalid address: {one_line(e)}; give http://HOST:PORT/v2/models/NAME") from None
    if "@" in parts.netloc or parts.query or parts.fragment:
        # Refused without showing it, since --base is recorded and printed in reports.
        raise BenchError(f"--base: an address must not contain a user, password or query; put a token in ${TOKEN}")
    if not parts.hostname or not re.fullmatch(r"(/.*)?/v2/models/[^/]+(/versions/[^/]+)?/?", parts.path):
        raise BenchError(f"--base {url}: must be http://HOST:PORT/v2/models/NAME; /versions/VERSION may follow")
    return url.rstrip("/")


# The used parts of the protocol's objects -------------------------------------------------------------


@dataclass(frozen=True)
class _Server:
    name: str | None = None
    version: str | None = None
    extensions: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Tensor:
    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any] | None = None
    data: list[Any] | None = None


@dataclass(frozen=True)
class _Model:
    name: str
    inputs: list[_Tensor]
    outputs: list[_Tensor]
    platform: str | None = None


@dataclass(frozen=True)
class _Answer:
    outputs: list[_Tensor]
    model_version: str | None = None


class Served(BlackBox):
    """A remote model as a module, pixels in [0, 1] to logits; connects at the first query."""

    version: str | None = None  # as sent with the first logits

    def __init__(self, url: str, card: Card) -> None:
        super().__init__()
        self.url, self._card = url, card
        self._answered = False

    @cached_property
    def _client(self) -> Client:
        return Client()

    @cached_property
    def server(self) -> _Server:
        """The server's description; empty where a gateway only shows models."""
        root = self.url[: self.url.rindex("/models/")]
        try:
            return self._client.ask(root, lambda a: TypeAdapter(_Server).validate_json(a.content))
        except Refused:
            return _Server()

    @property
    def encoding(self) -> str:
        """How tensors are sent: binary or json."""
        return "binary" if "binary_tensor_data" in self.server.extensions else "json"

    @cached_property
    def model(self) -> _Model:
        """The server's description of the model. Raises BenchError where it does not fit the card."""
        found = self._client.ask(self.url, lambda a: TypeAdapter(_Model).validate_json(a.content))
        card, classes = self._card, len(self._card.classes)
        if len(found.inputs) != 1 or len(found.outputs) != 1:
            counts = f"{len(found.inputs)} inputs and {len(found.outputs)} outputs"
            raise BenchError(f"base {self.url} has {counts}; serve a model with one of each: images, logits")
        given, made = found.inputs[0], found.outputs[0]
        if given.datatype != "FP32" or made.datatype not in _FLOATS:
            kinds = f"{given.datatype} to {made.datatype}"
            raise BenchError(f"base {self.url} maps {kinds}; serve one from FP32 pixels in [0, 1] to float logits")
        if not _fits(given.shape, card.shape):
            wanted = [-1, *card.shape]
            raise BenchError(
                f"base {self.url} takes {given.shape}, images of {card.name} are {wanted} (-1: any number); serve a "
                f"model for these images"
            )
        if not _fits(made.shape, (classes,)):
            raise BenchError(
                f"base {self.url} gives {made.shape}, {card.name} needs {[-1, classes]}: "
                f"a remote model cannot get a new head, so serve one with {classes} classes"
            )
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Query logits, float32 [B, classes], of pixels [B, C, H, W]."""
        body, headers = self._request(x.detach().cpu().numpy().astype("<f4", order="C"))
        shape = [len(x), len(self._card.classes)]
        most = LARGEST + 64 * math.prod(shape)  # as text a number takes at most 25 bytes
        logits, version = self._client.ask(f"{self.url}/infer", lambda a: self._read(a, shape), body, headers, most)
        if self._answered and version != self.version:
            raise BenchError(
                f"base {self.url} now answers with model version {version}, not {self.version}, so it is another base; "
                f"repeat the command, or add /versions/VERSION to the address"
            )
        self.version, self._answered = version, True
        return torch.from_numpy(logits).to(x.device)

    def _request(self, pixels: NDArray[np.float32]) -> tuple[bytes, dict[str, str]]:
        given: dict[str, Any] = {"name": self.model.inputs[0].name, "shape": pixels.shape, "datatype": "FP32"}
        wanted: dict[str, Any] = {"name": self.model.outputs[0].name}
        if self.encoding == "binary":
            given["parameters"], wanted["parameters"] = {"binary_data_size": pixels.nbytes}, {"binary_data": True}
            head = json.dumps({"inputs": [given], "outputs": [wanted]}).encode()
            headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
            return head + pixels.tobytes(), headers
        if not np.isfinite(pixels).all():
            raise BenchError("a defense queries the base with pixels that are not finite, which JSON cannot represent")
        given["data"] = pixels.ravel().tolist()  # doubles, whose digits restore the float32 however they are parsed
        return json.dumps({"inputs": [given], "outputs": [wanted]}).encode(), {"Content-Type": "application/json"}

    def _read(self, answer: Answer, shape: list[int]) -> tuple[NDArray[np.float32], str | None]:
        """Parse logits and the model's version. Raises ValueError where the answer has no logits of that shape."""
        content = answer.content
        head = int(answer.headers.get("Inference-Header-Content-Length", len(content)))
        if not 0 <= head <= len(content):
            raise ValueError(f"a head of {head} bytes in an answer of {len(content)}")
        found = TypeAdapter(_Answer).validate_json(content[:head])
        names = [o.name for o in found.outputs]
        if names != [self.model.outputs[0].name]:
            raise ValueError(f"outputs {names}, not {[self.model.outputs[0].name]}")
        (output,) = found.outputs
        if output.datatype not in _FLOATS or output.shape != shape:
            raise ValueError(f"{output.datatype} {output.shape}, not a float tensor of shape {shape}")
        if output.data is None:
            values = np.frombuffer(content[head:], _FLOATS[output.datatype])
        else:
            listed = np.array(output.data, object).ravel().tolist()
            if not {type(v) for v in listed} <= {int, float, type(None)}:
                raise ValueError("data that are not numbers")
            values = np.array(listed, np.float64)  # null becomes NaN, which JSON cannot represent otherwise
        if values.size != math.prod(shape):
            raise ValueError(f"{values.size} numbers for shape {shape}")
        with np.errstate(over="ignore"):
            return values.reshape(shape).astype(np.float32), found.model_version


def _fits(stated: list[int], wanted: tuple[int, ...]) -> bool:
    """Return whether a stated shape is any number of rows of the wanted one; -1 means any number."""
    pairs = zip(stated[1:], wanted, strict=False)
    return len(stated) == len(wanted) + 1 and stated[0] == -1 and all(s in (-1, w) for s, w in pairs)


class HTTPBase(BaseModel):
    """A remote base that only answers queries.

    Its weights cannot be hashed. Its identity is the address, the server's description of the model, and a fingerprint:
    for each of ``PROBES`` fixed noisy images the class with the largest logit and that logit, rounded to about 1/256 of
    the largest of all, so that another machine's last bits rarely matter (where they do, the same model counts as
    another). The fingerprint is taken before a defense learns from the base's answers, and compared after training and
    at the end of certification. It detects another model, but proves nothing about the weights: a model that differs by
    less, or that was replaced and restored between two checks, is not detected, and a server that knows the images can
    forge it.
    """

    module: Served

    def __init__(self, card: Card, url: str) -> None:
        super().__init__(url, len(card.classes), Served(url, card))
        self.batch = block_rows(card.shape, torch.device("cpu"))
        self.meta = {"source": {"kind": "served"}}
        self._shape = card.shape

    @property
    def sha256(self) -> str:
        """Hash of the identity."""
        return cast(str, self._identity["sha256"])

    @cached_property
    def _identity(self) -> dict[str, Any]:
        served = self.module
        fingerprint = self._fingerprint()  # first, since the version comes with it
        self.meta["source"] |= {"server": served.server.name, "server_version": served.server.version}
        found = {
            "name": self.name,
            "model": served.model.name,
            "version": served.version,
            "platform": served.model.platform,
            "tensors": served.encoding,
            "fingerprint": fingerprint,
        }
        return found | {"sha256": digest(found)}

    def identity(self) -> dict[str, Any]:
        """Return address, model, version, platform, encoding of tensors, and fingerprint."""
        return self._identity

    def check_unchanged(self, defense: str) -> None:
        """Raise BenchError where the fingerprint differs from that at the beginning of the command."""
        if self._identity["fingerprint"] != self._fingerprint():
            raise BenchError(
                f"base {self.name} gives other logits than when this command began, so its model was replaced; "
                f"delete the incomplete run folder of {defense} and repeat the command"
            )

    def untrained(self, classes: int) -> nn.Module:
        """Raise BenchError, since the architecture is unknown."""
        raise BenchError(
            f"base {self.name} answers queries only, so it cannot be trained from scratch; use a local base"
        )

    def view(self, access: Access) -> View:
        """Return the base restricted to ``access``. Raises BenchError for a wrong address, before any training."""
        if access >= Access.QUERY:
            _ = self.module.model
        return super().view(access)

    def _fingerprint(self) -> list[list[float] | None]:
        noise = Noise(0, "fingerprint").normals([Vote("probe", 0, i) for i in range(PROBES)], math.prod(self._shape))
        logits = self.module(noise.mul(0.5).add(0.5).view(PROBES, *self._shape)).double().numpy()
        finite = np.isfinite(logits).all(1)
        largest = np.abs(logits[finite]).max(initial=0.0)
        step = 2.0 ** (math.frexp(largest)[1] - 8)
        return [
            [int(row.argmax()), float(np.round(row.max() / step) * step)] if ok else None
            for row, ok in zip(logits, finite, strict=True)
        ]
