"""Fuzz the replies of a remote base, which are untrusted."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import io
import json
import math
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPResponse
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from bench.data.datasets import load_card
from bench.errors import BenchError, one_line
from bench.io import http
from bench.io.http import Answer
from bench.models.served import Served, _Model, _Server
from tests.fuzz.judging import changed, cut, cuts, dumped, edits, judge

# Answers of a served base ----------------------------------------------------------------------------

SHAPE = [2, 3]
_ANSWER = {
    "model_name": "toy",
    "model_version": "1",
    "outputs": [{"name": "logits", "datatype": "FP32", "shape": SHAPE, "data": [1.5, -2.0, 0.25, 3.0, 1e-3, -7.0]}],
}
_MODEL = {
    "name": "toy",
    "platform": "x",
    "inputs": [{"name": "pixels", "datatype": "FP32", "shape": [-1, 1, 8, 8]}],
    "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, 3]}],
}


class RawServer:
    """A server on 127.0.0.1 that sends ``reply`` to every request and closes the connection."""

    def __init__(self) -> None:
        self.reply = b""
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/v2/models/toy"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._socket.accept()
            with connection, contextlib.suppress(OSError):
                connection.settimeout(5)
                with connection.makefile("rb") as asked:
                    headers = dict(x.lower().split(b": ", 1) for x in iter(asked.readline, b"\r\n") if b": " in x)
                    asked.read(int(headers.get(b"content-length", b"0")))
                connection.sendall(self.reply)


@functools.cache
def raw_server() -> RawServer:
    """One for all inputs."""
    return RawServer()


@functools.cache
def client() -> http.Client:
    """One for all inputs."""
    return http.Client()


def understood(head: bytes, raw: bytes) -> Any:
    """Read the logits of an answer independently of bench; None where there are none of ``SHAPE``."""
    try:
        answer = json.loads(head)
        (output,) = answer["outputs"]
        if output["name"] != "logits" or output["shape"] != SHAPE:
            return None
        kind = {"FP16": "<f2", "FP32": "<f4", "FP64": "<f8"}[output["datatype"]]
        if output.get("data") is None:
            numbers = np.frombuffer(raw, kind).astype(np.float64).tolist()
        else:
            numbers = [math.nan if v is None else v for v in _flat(output["data"])]
        if len(numbers) != 6 or any(type(v) not in (int, float) for v in numbers):
            return None
        with np.errstate(over="ignore"):
            return np.array([float(v) for v in numbers]).astype(np.float32).reshape(SHAPE)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _flat(value: Any) -> list[Any]:
    return [x for v in value for x in _flat(v)] if isinstance(value, list) else [value]


def _served() -> Served:
    card = load_card("digits")
    served = Served(raw_server().url, dataclasses.replace(card, classes=("a", "b", "c")))
    served._client = client()
    served.server = _Server()
    served.model = TypeAdapter(_Model).validate_python(_MODEL)
    return served


@contextmanager
def _no_pauses() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(http, "sleep", lambda _: None)
        yield


@given(
    edits,
    cuts,
    st.integers(-3, 400) | st.none(),
    st.booleans(),
    st.booleans(),
)
def answers(changes: list[Any], torn: list[Any], head: int | None, binary: bool, kept: bool) -> None:
    """Read a damaged answer with changed fields: the result is what it states, or a refusal."""
    answer = _ANSWER if kept else changed(_ANSWER, changes)
    raw = b""
    if binary:
        raw = np.array(_ANSWER["outputs"][0]["data"], "<f4").tobytes()  # type: ignore[index]
        if isinstance(answer, dict) and isinstance(answer.get("outputs"), list) and answer["outputs"]:
            answer = copy.deepcopy(answer)
            if isinstance(answer["outputs"][0], dict):
                answer["outputs"][0].pop("data", None)
    content = cut(dumped(answer) + raw, torn)
    headers = {}
    if binary or head is not None:
        headers["Inference-Header-Content-Length"] = str(len(dumped(answer)) if head is None else head)
    served = _served()
    got: list[Any] = []
    reply = Answer(200, httpx2.Headers(headers), content)

    def read() -> None:
        try:
            got.append(served._read(reply, SHAPE))
        except (ValueError, OverflowError) as e:  # Client.ask treats these as a malformed answer
            raise BenchError(f"malformed: {one_line(e)}") from None

    if judge("answer", read):
        split = int(headers.get("Inference-Header-Content-Length", len(content)))
        wanted = understood(content[:split], content[split:])
        assert wanted is not None, "logits out of an answer that holds none"
        np.testing.assert_array_equal(got[0][0], wanted)


def _reply(status: str, headers: list[tuple[bytes, bytes]], framing: str, body: bytes) -> bytes:
    """Write an HTTP answer; ``framing``: how its end is marked."""
    if framing == "length":
        headers = [*headers, (b"Content-Length", b"%d" % len(body))]
    elif framing == "chunked":
        headers = [*headers, (b"Transfer-Encoding", b"chunked")]
        body = b"".join(b"%x\r\n%b\r\n" % (len(c), c) for c in (body[:50], body[50:], b"") if c or not body[50:])
    return f"HTTP/1.1 {status}\r\n".encode() + b"".join(a + b": " + b + b"\r\n" for a, b in headers) + b"\r\n" + body


_NAMES = [b"Content-Length", b"Transfer-Encoding", b"Content-Encoding", b"Content-Type", b"Location", b"Retry-After"]
_NAMES += [b"Inference-Header-Content-Length", b"X"]
_VALUES = [b"0", b"-1", b"9" * 30, b"chunked", b"gzip", b"br, gzip", b"text/x; charset=base64_codec"]
_VALUES += [b"%d" % len(dumped(_ANSWER)), b"http://127.0.0.1:9/", b"Thu, 01 Jan 0001 00:00:00 GMT", b"\xff\xfe"]
_VALUES += ["²".encode()]
_STATUSES = ["302 Found", "404 no", "429 busy", "500 no", "099 x", "999 x", "200", "abc"]
# Mostly valid answers: otherwise no input would reach the logits.
_headers = st.lists(st.tuples(st.sampled_from(_NAMES), st.sampled_from(_VALUES) | st.binary(max_size=8)), max_size=3)
_bodies = st.sampled_from([dumped(_ANSWER)] * 4 + [b"", b"5\r\nhello\r\n0\r\n\r\n", b"[" * 5000])
_bodies |= edits.map(lambda changes: dumped(changed(_ANSWER, changes))) | st.binary(max_size=60)
_built = st.builds(
    lambda torn, *parts: cut(_reply(*parts), torn),
    cuts,
    st.sampled_from(["200 OK"] * 8 + _STATUSES),
    st.just([]) | st.just([]) | _headers,
    st.sampled_from(["length", "length", "chunked", "until closed"]),
    _bodies,
)
replies = _built | _built | _built | st.binary(max_size=300)


class _Line:
    """The part of a socket that http.client uses."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, _mode: str) -> io.BytesIO:
        return io.BytesIO(self._data)


def heard(reply: bytes) -> Any:
    """Read the logits of a raw answer with http.client (which bench does not use) and ``understood``."""
    response = HTTPResponse(_Line(reply), method="POST")  # type: ignore[arg-type]
    response.begin()
    body = response.read()
    head = int(response.headers.get("Inference-Header-Content-Length", len(body)))
    return understood(body[:head], body[head:])


@given(replies)
def raw_replies(reply: bytes) -> None:
    """Read random bytes as a reply: the logits of the body, or one clear line after the retries."""
    server = raw_server()
    server.reply = reply
    served = _served()
    got: list[Any] = []
    with _no_pauses():
        if judge("reply", lambda: got.append(served.forward(torch.zeros(2, 1, 8, 8)))):
            wanted = heard(reply)
            assert wanted is not None, "logits out of an answer that holds none"
            np.testing.assert_array_equal(got[0].numpy(), wanted)


@given(edits, cuts)
def models(changes: list[Any], torn: list[Any]) -> None:
    """Read a changed description of a server and its model."""
    server = raw_server()
    body = cut(dumped(changed(_MODEL, changes)), torn)
    server.reply = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body
    served = Served(server.url, dataclasses.replace(load_card("digits"), classes=("a", "b", "c")))
    served._client = client()
    with _no_pauses():
        judge("model", lambda: (served.server, served.model))
