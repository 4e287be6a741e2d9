"""A server on 127.0.0.1 that speaks the part of the Hugging Face hub's protocol that downloads use."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote, urlsplit

from tests.helpers.localserver import LocalServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"  # what ``main`` resolves to


class HubServer(LocalServer):
    """Serves ``files``, {(kind, repo, path): bytes} with kind "model" or "dataset"; use as a context manager.

    ``main`` resolves to ``COMMIT`` and any 40-digit revision to itself, other revisions do not exist.
    ``endpoint`` is the value for HF_ENDPOINT; ``requests`` lists what was asked, as "METHOD /path".
    """

    def __init__(self, files: Mapping[tuple[str, str, str], bytes]) -> None:
        self.requests: list[str] = []
        super().__init__(_handler(files, self.requests))
        self.endpoint = self.address


def _handler(files: Mapping[tuple[str, str, str], bytes], requests: list[str]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def log_message(self, format: str, *args: object) -> None:
            requests.append(f"{self.command} {self.path}")

        def _answer(self, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            match = re.fullmatch(r"/(datasets/)?([^/]+(?:/[^/]+)?)/resolve/([^/]+)/(.+)", path)
            if match is None:
                return self._refuse(404, "", "not a resolve address")
            kind, repo, revision, name = "dataset" if match[1] else "model", match[2], match[3], match[4]
            if (kind, repo) not in {key[:2] for key in files}:  # the hub hides private repositories behind this 401
                return self._refuse(401, "RepoNotFound", "Repository not found")
            if revision != "main" and not re.fullmatch("[0-9a-f]{40}", revision):
                return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            commit = COMMIT if revision == "main" else revision
            if (kind, repo, name) not in files:
                return self._refuse(404, "EntryNotFound", "Entry not found", commit)
            content = files[kind, repo, name]
            start = int(m[1]) if (m := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))) else 0
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", commit)
            self.end_headers()
            if body:
                self.wfile.write(content[start:])

        def _refuse(self, status: int, code: str, message: str, commit: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            if code:
                self.send_header("X-Error-Code", code)
            if commit:
                self.send_header("X-Repo-Commit", commit)
            self.send_header("X-Error-Message", message)
            self.end_headers()

    return Handler
