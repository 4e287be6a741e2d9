"""A server on 127.0.0.1 in a thread, for as long as its context lasts."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self


class LocalServer:
    """Serves with a handler on a free port; use as a context manager. ``address``: http://127.0.0.1:PORT."""

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        handler.disable_nagle_algorithm = True  # else the body waits 40 ms for the client to acknowledge the header
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
