"""An HTTP client that retries temporary failures and rejects malformed answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from time import monotonic, sleep, time
from typing import TypeVar
from urllib.parse import urlsplit

import httpx2
from pydantic import ValidationError

from bench.errors import BenchError, one_line
from bench.io import limits

TOKEN = "CERTBENCH_HTTP_TOKEN"
TIMEOUT = httpx2.Timeout(120.0, connect=10.0)  # seconds without a byte
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds between tries
TRIES = len(PAUSES) + 1
LONGEST = 600.0  # timeout in seconds for a complete answer, even one that arrives byte by byte
LARGEST = 2**20  # maximum bytes of an answer without logits
ERROR_BYTES = 2000  # bytes read of an error's text
LONGEST_PAUSE = 60.0  # maximum seconds to wait for a Retry-After header

_T = TypeVar("_T")


class Refused(BenchError):
    """The server rejected the request, and a retry would not help."""


@dataclass(frozen=True)
class Answer:
    """A complete answer."""

    status: int
    headers: httpx2.Headers
    content: bytes


class Client:
    """Connections to one server, with the user's token. No redirects, since the token is for this server alone."""

    def __init__(self) -> None:
        """Read the token from the environment. Raises BenchError where it cannot be sent."""
        self._token = os.environ.get(TOKEN, "").strip()
        if not (self._token.isascii() and self._token.isprintable()):
            raise BenchError(f"${TOKEN} has characters that an HTTP header cannot have; set it to the token alone")
        headers = {"Accept-Encoding": "identity"}  # a small compressed answer may expand without limit
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
        """Send a request, with retries, and parse the answer.

        Retried with the same bytes: lost connections, timeouts, status 429 and 5xx, malformed answers, and answers of
        more than ``most`` bytes.

        Args:
            url: The address.
            read: Parses the answer; raises ValueError where it is malformed.
            body: Sent by POST; None for GET.
            headers: Further request headers.
            most: Maximum bytes of the answer.

        Raises:
            Refused: The status is an error that a retry would not change.
            BenchError: The address is none, or all ``TRIES`` tries failed.
        """
        try:
            _ = urlsplit(url).port
        except ValueError as e:
            raise BenchError(f"{url} is no address: {one_line(e)}") from None
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
            f"{url}: {why}; tried {TRIES} times in {monotonic() - began:.0f} s; certified images are kept: "
            f"repeat the command to resume"
        )

    def _exchange(self, url: str, body: bytes | None, headers: Mapping[str, str] | None, most: int) -> Answer:
        """Read the complete answer, or the beginning of an error. Raises ValueError beyond ``most`` bytes."""
        content = bytearray()
        with self._client.stream("GET" if body is None else "POST", url, content=body, headers=headers) as answer:
            encoded = answer.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity")
            if encoded and answer.is_success:
                raise ValueError("it is compressed, which was not requested")
            for chunk in answer.iter_raw():
                content += chunk
                if not answer.is_success and len(content) > ERROR_BYTES:
                    break
                if len(content) > most:
                    raise ValueError(f"more than {most:,} bytes")
        return Answer(answer.status_code, answer.headers, b"" if encoded else bytes(content))

    def _status(self, answer: Answer) -> str:
        """Describe an error by its status and text, without the token, which a server may repeat."""
        text = answer.content.decode(errors="replace")
        text = text.replace(self._token, "***") if self._token else text
        text = " ".join(text.split())[:200]
        fix = f"; check ${TOKEN}" if answer.status in (401, 403) else ""
        if 300 <= answer.status < 400:
            fix = "; give the address that it redirects to"
        return f"HTTP {answer.status}{f' ({text})' if text else ''}{fix}"


def _retry_after(value: str, otherwise: float) -> float:
    """Return the seconds of a Retry-After header (a number or a date), at most ``LONGEST_PAUSE``."""
    try:
        seconds = float(value) if value.strip().isdigit() else parsedate_to_datetime(value).timestamp() - time()
    except (ValueError, OverflowError):
        return otherwise
    return min(max(seconds, 0.0), LONGEST_PAUSE)
