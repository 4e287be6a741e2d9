"""HTTP with patience: what may pass is asked again, the same bytes, and an answer that makes no sense is none."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from time import monotonic, sleep, time
from typing import TypeVar

import httpx2
from pydantic import ValidationError

from bench.errors import BenchError, one_line
from bench.io import limits

TOKEN = "CERTBENCH_HTTP_TOKEN"
TIMEOUT = httpx2.Timeout(120.0, connect=10.0)  # seconds without a byte
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds between tries
TRIES = len(PAUSES) + 1
LONGEST = 600.0  # seconds that one answer may take, however steadily it drips
LARGEST = 2**20  # bytes of an answer that holds no logits
SAID = 2000  # bytes read of what a server says of an error
LONGEST_PAUSE = 60.0  # however long a server asks to be left alone (Retry-After)

_T = TypeVar("_T")


class Refused(BenchError):
    """The server understood, and will not."""


@dataclass(frozen=True)
class Answer:
    """What came back, whole."""

    status: int
    headers: httpx2.Headers
    content: bytes


class Client:
    """One server's connections, with the user's token, which is sent nowhere else: redirections are not followed."""

    def __init__(self) -> None:
        """Raises BenchError where the token cannot be sent."""
        self._token = os.environ.get(TOKEN, "").strip()
        if not (self._token.isascii() and self._token.isprintable()):
            raise BenchError(f"${TOKEN} holds characters that no HTTP header can")
        headers = {"Accept-Encoding": "identity"}  # a small compressed answer may stand for one without end
        headers |= {"Authorization": f"Bearer {self._token}"} if self._token else {}
        self._client = httpx2.Client(headers=headers, timeout=TIMEOUT)

    def ask(
        self,
        url: str,
        read: Callable[[Answer], _T],
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        most: int = LARGEST,
    ) -> _T:
        """What ``read`` makes of the answer; a ValueError of its is an answer that cannot be right.

        Asked again, the same bytes, while the line breaks, or the server is silent, slow without end, busy
        (429), failing (5xx) or answers nonsense or more than ``most`` bytes. Raises Refused at any other
        status, BenchError after ``TRIES`` tries.
        """
        began = monotonic()
        for pause in (*PAUSES, None):
            try:
                answer = limits.within(LONGEST, lambda: self._exchange(url, body, headers, most))
                if 200 <= answer.status < 300:
                    return read(answer)
                why = self._status(answer)
                if answer.status != 429 and answer.status < 500:
                    raise Refused(f"{url}: {why}")
                if pause is not None:
                    pause = _retry_after(answer.headers.get("Retry-After", ""), pause)
            except (httpx2.RequestError, httpx2.InvalidURL, TimeoutError) as e:
                why = one_line(e)
            except ValidationError as e:
                first = e.errors(include_url=False, include_input=False)[0]
                why = f"malformed answer: {first['msg']} {'.'.join(map(str, first['loc']))}".rstrip()
            except (ValueError, OverflowError) as e:
                why = f"malformed answer: {e}"
            if pause is not None:
                sleep(pause)
        raise BenchError(
            f"{url}: {why}; tried {TRIES} times in {monotonic() - began:.0f} s; nothing certified is lost: "
            f"type the same command again to go on"
        )

    def _exchange(self, url: str, body: bytes | None, headers: Mapping[str, str] | None, most: int) -> Answer:
        """The whole answer as sent; of one that is no success, its beginning. Raises ValueError beyond ``most``."""
        content = bytearray()
        with self._client.stream("GET" if body is None else "POST", url, content=body, headers=headers) as answer:
            encoded = answer.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity")
            if encoded and answer.is_success:
                raise ValueError("it is compressed, which was not asked for")
            for chunk in answer.iter_raw():
                content += chunk
                if not answer.is_success and len(content) > SAID:
                    break
                if len(content) > most:
                    raise ValueError(f"more than {most:,} bytes")
        return Answer(answer.status_code, answer.headers, b"" if encoded else bytes(content))

    def _status(self, answer: Answer) -> str:
        """Status and what the server says of it, without the token should it repeat that."""
        text = answer.content.decode(errors="replace")
        said = text.replace(self._token, "***") if self._token else text
        said = " ".join(said.split())[:200]
        mend = f"; is ${TOKEN} right?" if answer.status in (401, 403) else ""
        if 300 <= answer.status < 400:
            mend = "; give the address that it leads to"
        return f"HTTP {answer.status}{f' ({said})' if said else ''}{mend}"


def _retry_after(value: str, otherwise: float) -> float:
    """Seconds that a Retry-After header (a number, or a date) asks for, up to ``LONGEST_PAUSE``."""
    try:
        seconds = float(value) if value.strip().isdigit() else parsedate_to_datetime(value).timestamp() - time()
    except (ValueError, OverflowError):
        return otherwise
    return min(max(seconds, 0.0), LONGEST_PAUSE)
