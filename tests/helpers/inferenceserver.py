"""A server on 127.0.0.1 that serves a model by the Open Inference Protocol v2, and can be told to misbehave."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.helpers.localserver import LocalServer

NAME, INPUT, OUTPUT = "toy", "pixels", "logits"

Fault = Callable[[int], str]


class InferenceServer(LocalServer):
    """Serves ``model``, a map from float pixels to logits; use as a context manager.

    ``fault(k)`` says what goes wrong with the k-th request for logits: "" nothing, a number (with
    ";SECONDS" for Retry-After) that status, or one of ``drop``, ``slow``, ``text``, ``cut``, ``rows``,
    ``classes``, ``words``, ``dtype``, ``name``. While ``down``, every connection is dropped.
    """

    def __init__(
        self, model: Callable[[Tensor], Tensor], shape: tuple[int, ...], classes: int, binary: bool = False
    ) -> None:
        self.model, self.binary = model, binary
        self.fault: Fault = lambda number: ""
        self.down = False
        self.version: str | None = "1"
        self.strict_json = False  # null in place of NaN
        self.metadata: dict[str, Any] = {
            "name": NAME,
            "versions": ["1"],
            "platform": "pytorch_libtorch",
            "inputs": [{"name": INPUT, "datatype": "FP32", "shape": [-1, *shape]}],
            "outputs": [{"name": OUTPUT, "datatype": "FP32", "shape": [-1, classes]}],
        }
        self.requests: list[str] = []  # "METHOD /path", whether answered or not
        self.tokens: set[str | None] = set()  # Authorization as received
        self.bodies: list[bytes] = []  # of the requests for logits
        super().__init__(_handler(self))
        self.url = f"{self.address}/v2/models/{NAME}"


def _handler(server: InferenceServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._note()
            extensions = ["binary_tensor_data"] if server.binary else []
            if server.down:
                self.close_connection = True
            elif self.path == "/v2":
                self._json(200, {"name": "test", "version": "9", "extensions": extensions})
            elif self.path == f"/v2/models/{NAME}":
                self._json(200, server.metadata)
            else:
                self._json(404, {"error": f"no {self.path}"})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self._note()
            fault = server.fault(len(server.bodies))
            server.bodies.append(body)
            status, _, retry_after = fault.partition(";")
            if server.down or fault == "drop":
                self.close_connection = True
            elif status.isdigit():
                said = {"error": f"no luck, {self.headers['Authorization']}"}
                self._json(int(status), said, {"Retry-After": retry_after} if retry_after else {})
            elif fault == "text":
                self._send(200, b"<html>maintenance</html>", {})
            else:
                if fault == "slow":
                    time.sleep(0.6)
                self._infer(body, fault)

        def log_message(self, format: str, *args: object) -> None:
            return

        def _note(self) -> None:
            server.requests.append(f"{self.command} {self.path}")
            server.tokens.add(self.headers["Authorization"])

        def _infer(self, body: bytes, fault: str) -> None:
            head = int(self.headers.get("Inference-Header-Content-Length", len(body)))
            request = json.loads(body[:head])
            (given,), (wanted,) = request["inputs"], request["outputs"]
            assert (given["name"], given["datatype"], wanted["name"]) == (INPUT, "FP32", OUTPUT)
            if "data" in given:
                pixels = np.array(given["data"], np.float64).astype(np.float32)
            else:
                assert given["parameters"]["binary_data_size"] == len(body) - head
                pixels = np.frombuffer(body[head:], "<f4").copy()
            assert pixels.size == math.prod(given["shape"])
            with torch.inference_mode():
                logits = server.model(torch.from_numpy(pixels).view(given["shape"])).numpy()
            logits = {"rows": logits[1:], "classes": logits[:, 1:]}.get(fault, logits)
            output: dict[str, Any] = {"name": OUTPUT, "datatype": "FP32", "shape": list(logits.shape)}
            output |= {"dtype": {"datatype": "INT64"}, "name": {"name": "other"}}.get(fault, {})
            answer: dict[str, Any] = {"model_name": NAME, "outputs": [output]}
            if server.version is not None:
                answer["model_version"] = server.version
            raw, headers = b"", {}
            if wanted.get("parameters", {}).get("binary_data"):
                raw = logits.astype("<f4").tobytes()
                output["parameters"] = {"binary_data_size": len(raw)}
                headers = {"Inference-Header-Content-Length": str(len(json.dumps(answer)))}
            else:
                numbers = logits.astype(np.float64).ravel().tolist()
                output["data"] = [None if server.strict_json and math.isnan(v) else v for v in numbers]
                if fault == "words":
                    output["data"] = [str(v) for v in numbers]
            whole = json.dumps(answer).encode() + raw
            self._send(200, whole[: len(whole) // 2] if fault == "cut" else whole, headers)

        def _json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
            self._send(status, json.dumps(value).encode(), headers or {})

        def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            try:
                self.wfile.write(body)
            except BrokenPipeError:  # the client gave up on a slow answer
                self.close_connection = True

    return Handler
