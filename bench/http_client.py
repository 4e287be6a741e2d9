"""HTTP with patience: what may pass is asked again, the same bytes, and an answer that makes no sense is none."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from time import monotonic, sleep, time
from typing import TypeVar

import httpx2
from pydantic import ValidationError

from bench.errors import BenchError, one_line

TOKEN = "CERTBENCH_HTTP_TOKEN"
TIMEOUT = httpx2.Timeout(120.0, connect=10.0)  # seconds without a byte
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds between tries
TRIES = len(PAUSES) + 1
LONGEST_PAUSE = 60.0  # however long a server asks to be left alone (Retry-After)

_T = TypeVar("_T")


class Refused(BenchError):
    """The server understood, and will not."""


class Client:
    """One server's connections, with the user's token."""

    def __init__(self) -> None:
        """Raises BenchError where the token cannot be sent."""
        self._token = os.environ.get(TOKEN, "").strip()
        if not (self._token.isascii() and self._token.isprintable()):
            raise BenchError(f"${TOKEN} holds characters that no HTTP header can")
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        self._client = httpx2.Client(headers=headers, timeout=TIMEOUT)

    def ask(
        self,
        url: str,
        read: Callable[[httpx2.Response], _T],
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> _T:
        """What ``read`` makes of the answer; a ValueError of its is an answer that cannot be right.

        Asked again, the same bytes, while the line breaks, or the server is silent, busy (429), failing
        (5xx) or answers nonsense. Raises Refused at any other status, BenchError after ``TRIES`` tries.
        """
        began = monotonic()
        for pause in (*PAUSES, None):
            try:
                answer = self._client.request("GET" if body is None else "POST", url, content=body, headers=headers)
                if answer.is_success:
                    return read(answer)
                why = self._status(answer)
                if answer.status_code != 429 and answer.status_code < 500:
                    raise Refused(f"{url}: {why}")
                if pause is not None:
                    pause = _retry_after(answer.headers.get("Retry-After", ""), pause)
            except httpx2.RequestError as e:
                why = one_line(e)
            except ValidationError as e:
                first = e.errors()[0]
                why = f"malformed answer: {first['msg']} {'.'.join(map(str, first['loc']))}".rstrip()
            except (ValueError, OverflowError) as e:
                why = f"malformed answer: {e}"
            if pause is not None:
                sleep(pause)
        raise BenchError(
            f"{url}: {why}; tried {TRIES} times in {monotonic() - began:.0f} s; nothing certified is lost: "
            f"type the same command again to go on"
        )

    def _status(self, answer: httpx2.Response) -> str:
        """Status and what the server says of it, without the token should it repeat that."""
        said = answer.text.replace(self._token, "***") if self._token else answer.text
        said = " ".join(said.split())[:200]
        mend = f"; is ${TOKEN} right?" if answer.status_code in (401, 403) else ""
        return f"HTTP {answer.status_code}{f' ({said})' if said else ''}{mend}"


def _retry_after(value: str, otherwise: float) -> float:
    """Seconds that a Retry-After header (a number, or a date) asks for, up to ``LONGEST_PAUSE``."""
    try:
        seconds = float(value) if value.strip().isdigit() else parsedate_to_datetime(value).timestamp() - time()
    except ValueError:
        return otherwise
    return min(max(seconds, 0.0), LONGEST_PAUSE)
