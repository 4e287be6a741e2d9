"""A server on 127.0.0.1 that speaks the part of the Hugging Face hub's protocol that uploads and downloads use.

Commits are atomic, as on the hub. Files whose names end in .gz and .safetensors go through the protocol of large files.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.helpers.localserver import LocalServer

TOKEN = "hf_test_token"
LARGE = (".gz", ".safetensors")


class PublishingHub(LocalServer):
    """Model repositories with their commits; use as a context manager. ``endpoint`` is the value for HF_ENDPOINT.

    ``repos`` maps OWNER/NAME to its commits, the oldest first: (id, {path: bytes}). ``requests`` lists what was asked,
    as "METHOD /path". ``before(request)`` is called before each answer, and may return an HTTP status to refuse with.
    """

    def __init__(self) -> None:
        self.repos: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.before: Callable[[str], int | None] = lambda request: None
        super().__init__(_handler(self))
        self.endpoint = self.address

    def add(self, repo: str, files: dict[str, bytes]) -> str:
        """Commit files to a repository, which is made if there is none; return the commit."""
        commits = self.repos.setdefault(repo, [])
        tree = {**(commits[-1][1] if commits else {}), **files}
        parts = [f"{len(commits)} {path} {hashlib.sha1(data).hexdigest()}" for path, data in sorted(tree.items())]
        commit = hashlib.sha1("\n".join(parts or [f"{len(commits)} {repo}"]).encode()).hexdigest()
        commits.append((commit, tree))
        return commit

    def files(self, repo: str) -> dict[str, bytes]:
        """Return the files of the last commit."""
        return self.repos[repo][-1][1]

    def at(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return a commit by its id, or the last one for ``main``."""
        commits = self.repos[repo]
        return commits[-1] if revision == "main" else next((c for c in commits if c[0] == revision), None)


def _handler(hub: PublishingHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            return

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._answer()

        def do_PUT(self) -> None:
            self._answer()

        def _answer(self) -> None:
            body = self._body()
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            if status := hub.before(hub.requests[-1]):
                return self._refuse(status)
            for method, pattern, answer in ROUTES:
                if method == self.command.replace("HEAD", "GET") and (match := re.fullmatch(pattern, path)):
                    return answer(self, body, *match.groups())
            return self._refuse(404)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _send(self, content: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def _json(self, value: Any) -> None:
            self._send(json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _refuse(self, status: int, code: str = "") -> None:
            self._send(b"", {"X-Error-Code": code, "X-Error-Message": code or "refused"}, status)

        def _may_write(self) -> bool:
            return self.headers.get("Authorization") == f"Bearer {TOKEN}"

        def info(self, body: bytes, repo: str, revision: str | None) -> None:
            if repo not in hub.repos:
                return self._refuse(401, "RepoNotFound")  # as for private repositories
            found = hub.at(repo, revision or "main")
            if found is None:
                return self._refuse(404, "RevisionNotFound")
            commit, tree = found
            siblings = [{"rfilename": p, "size": len(data)} for p, data in tree.items()]
            return self._json({"id": repo, "sha": commit, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0})

        def resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
            found = hub.at(repo, revision) if repo in hub.repos else None
            if found is None or path not in found[1]:
                return self._refuse(404, "EntryNotFound" if found else "RevisionNotFound")
            data = found[1][path]
            return self._send(data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": found[0]})

        def create(self, body: bytes) -> None:
            if not self._may_write():
                return self._refuse(401)
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if repo in hub.repos:
                return self._refuse(409)
            hub.add(repo, {".gitattributes": b"*.gz filter=lfs\n"})
            return self._json({"url": f"{hub.endpoint}/{repo}"})

        def validate(self, body: bytes) -> None:
            assert json.loads(body)["content"].startswith("---\n")
            return self._json({})

        def preupload(self, body: bytes, repo: str, revision: str) -> None:
            if not self._may_write():
                return self._refuse(403)
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": p, "uploadMode": "lfs" if p.endswith(LARGE) else "regular"} for p in paths]
            ignored = hub.files(repo).get(".gitignore", b"").decode().split()
            return self._json({"files": [m | {"shouldIgnore": m["path"].partition("/")[0] in ignored} for m in modes]})

        def batch(self, body: bytes, repo: str) -> None:
            objects = []
            for one in json.loads(body)["objects"]:
                upload = {"upload": {"href": f"{hub.endpoint}/large/{one['oid']}"}}
                objects.append(one if one["oid"] in hub.large else one | {"actions": upload})
            return self._json({"transfer": "basic", "objects": objects})

        def put(self, body: bytes, oid: str) -> None:
            if hashlib.sha256(body).hexdigest() != oid:
                return self._refuse(400)
            hub.large[oid] = body
            return self._send(b"")

        def commit(self, body: bytes, repo: str, revision: str) -> None:
            if not self._may_write():
                return self._refuse(403)
            header, *operations = [json.loads(line) for line in body.splitlines()]
            if header["value"].get("parentCommit", hub.repos[repo][-1][0]) != hub.repos[repo][-1][0]:
                return self._refuse(412)
            files = {}
            for one in operations:
                value = one["value"]
                large = one["key"] == "lfsFile"
                files[value["path"]] = hub.large[value["oid"]] if large else base64.b64decode(value["content"])
            commit = hub.add(repo, files)
            return self._json({"commitUrl": f"{hub.endpoint}/{repo}/commit/{commit}", "commitOid": commit})

    repo, rest = "([^/]+/[^/]+)", "([^/]+)"
    ROUTES: list[tuple[str, str, Callable[..., None]]] = [
        ("GET", f"/api/models/{repo}(?:/revision/{rest})?", Handler.info),
        ("GET", f"/{repo}/resolve/{rest}/(.+)", Handler.resolve),
        ("POST", "/api/repos/create", Handler.create),
        ("POST", "/api/validate-yaml", Handler.validate),
        ("POST", f"/api/models/{repo}/preupload/{rest}", Handler.preupload),
        ("POST", rf"/{repo}\.git/info/lfs/objects/batch", Handler.batch),
        ("PUT", f"/large/{rest}", Handler.put),
        ("POST", f"/api/models/{repo}/commit/{rest}", Handler.commit),
    ]
    return Handler
