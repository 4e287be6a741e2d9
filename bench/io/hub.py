"""Files of the Hugging Face hub: downloaded once into the hub's own cache, listed, and uploaded in one commit.

HF_ENDPOINT, HF_HUB_CACHE, HF_HOME and HF_HUB_OFFLINE are read at every call: huggingface_hub itself reads them when it
is first imported, which may be too early.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bench.errors import BenchError, one_line
from bench.io import limits

Kind = Literal["model", "dataset"]
# A commit, tag or branch. It becomes a path in the hub's cache, so it must not lead out of it.
REVISION = r"^[A-Za-z0-9_][A-Za-z0-9_-]*([./][A-Za-z0-9_-]+)*$"

WAIT = 5.0  # timeout in seconds for the hub's first answer; HF_HUB_ETAG_TIMEOUT overrides it
PAUSE = 30.0  # seconds without a retry after an endpoint was unreachable, since a data set may have many files
_failed: dict[str | None, tuple[float, str]] = {}  # endpoint -> when it was unreachable, and why


class MissingFile(BenchError):
    """The repository exists and has no such file."""


class NoRepository(BenchError):
    """There is no such repository, or it is private."""


def fetch(repo: str, filename: str, revision: str, kind: Kind, fix: str = "") -> Path:
    """Return the local path of a repository's file, downloaded if it is not in the cache.

    ``commit(path)`` returns the commit of the revision.

    Args:
        repo: OWNER/NAME.
        filename: Path of the file in the repository.
        revision: A commit, tag or branch.
        kind: "model" or "dataset".
        fix: End of the message where there is neither a network nor a cached copy.

    Raises:
        MissingFile: The repository has no such file.
        BenchError: There is no such repository or revision, or the file cannot be downloaded.
    """
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_download, hf_hub_url

    _check_revision(kind, repo, revision)
    endpoint = _endpoint()
    what = f"{kind} {repo!r}"
    unreachable = "HF_HUB_OFFLINE is set" if _offline() else ""

    def get(local: bool) -> Path:
        path = hf_hub_download(
            repo,
            filename,
            repo_type=kind,
            revision=revision,
            endpoint=endpoint,
            cache_dir=_cache(),
            local_files_only=local,
        )
        return Path(path)

    with _one_line_errors(what, revision, f"download {filename} of"):
        try:
            if re.fullmatch("[0-9a-f]{40}", revision):  # a commit never changes, so a cached copy is current
                with suppress(errors.LocalEntryNotFoundError):
                    return get(local=True)
            if not unreachable:
                # Checked first, since offline, downloads retry noisily for 30 s. With a timeout of its own: the
                # library's excludes the DNS lookup, which takes a minute where no name server answers.
                try:
                    url = hf_hub_url(repo, filename, repo_type=kind, revision=revision, endpoint=endpoint)
                    unreachable = _unreachable(endpoint, lambda: get_hf_file_metadata(url, endpoint=endpoint))
                except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError):
                    raise
                except errors.HfHubHTTPError as e:  # a proxy's answer, or the hub is down
                    unreachable = one_line(e)
            return get(local=bool(unreachable))
        except errors.LocalEntryNotFoundError:
            fix = fix or "connect once, or set HF_HUB_CACHE to a cache that has it"
            raise BenchError(f"no copy of {filename} of hub {what} and no network ({unreachable}): {fix}") from None
        except errors.EntryNotFoundError:
            raise MissingFile(f"hub {what} has no file {filename!r} at revision {revision!r}") from None


@contextmanager
def _one_line_errors(what: str, revision: str, doing: str) -> Iterator[None]:
    """Turn errors of the hub's library into a BenchError of one line; ``doing``: what was tried with ``what``."""
    from huggingface_hub import errors

    try:
        yield
    except BenchError:
        raise
    except errors.GatedRepoError:
        raise BenchError(f"hub {what} is gated; accept its terms on the hub, then run: hf auth login") from None
    except errors.RepositoryNotFoundError:
        raise NoRepository(f"the hub has no {what}, or it is private; check the id, or run: hf auth login") from None
    except errors.RevisionNotFoundError:
        raise BenchError(f"hub {what} has no revision {revision!r}; give a commit, tag or branch that it has") from None
    except Exception as e:  # an invalid id, a full disk, a lost connection
        raise BenchError(f"cannot {doing} hub {what}: {one_line(e)}; repeat the command to retry") from None


@dataclass(frozen=True)
class Listing:
    """The files of a repository at a commit, with their bytes."""

    commit: str
    files: dict[str, int]


def listing(repo: str, revision: str = "main") -> Listing:
    """List the files of a model repository.

    Args:
        repo: OWNER/NAME.
        revision: A commit, tag or branch.

    Raises:
        NoRepository: There is no such repository, or it is private.
        BenchError: There is no such revision, or no network.
    """
    from huggingface_hub import HfApi

    _check_revision("model", repo, revision)
    with _one_line_errors(f"model {repo!r}", revision, "list the files of"):
        api = HfApi(endpoint=_endpoint())
        why = "HF_HUB_OFFLINE is set" if _offline() else ""
        if why := why or _unreachable(_endpoint(), lambda: api.model_info(repo, revision=revision)):
            raise BenchError(f"hub model {repo!r}: no network ({why}); connect, then repeat the command")
        info = api.model_info(repo, revision=revision, files_metadata=True)
        return Listing(str(info.sha), {file.rfilename: file.size or 0 for file in info.siblings or []})


def upload(repo: str, files: Mapping[str, Path], message: str, token: str, parent: str | None) -> str:
    """Upload files to a model repository in one commit, and return the commit. A failed upload changes nothing there.

    Args:
        repo: OWNER/NAME; created where ``parent`` is None.
        files: Path in the repository -> local file.
        message: Of the commit.
        token: That may write.
        parent: The commit to which the files are added; where another one came in between, the upload is refused.

    Raises:
        BenchError: The token may not write there, or the upload failed.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, errors
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():  # they would fill a log
        disable_progress_bars()
    with _one_line_errors(f"model {repo!r}", "main", "publish to"):
        api = HfApi(endpoint=_endpoint(), token=token)
        try:
            if parent is None:
                api.create_repo(repo)
            added = [CommitOperationAdd(name, str(file)) for name, file in files.items()]
            return str(api.create_commit(repo, added, commit_message=message, parent_commit=parent).oid)
        except errors.HfHubHTTPError as e:
            status = e.response.status_code if e.response is not None else None
            if status in (401, 403):
                raise BenchError(
                    f"hub model {repo!r}: the token may not write there ({status}); set HF_TOKEN to one that may"
                ) from None
            if status == 412:
                raise BenchError(f"hub model {repo!r}: changed meanwhile; repeat the command") from None
            raise


def commit(path: Path) -> str:
    """Return the commit of a fetched file, which the cache keeps at snapshots/<commit>/<filename>."""
    return path.parts[len(path.parts) - path.parts[::-1].index("snapshots")]


def _unreachable(endpoint: str | None, ask: Callable[[], object]) -> str:
    """Return why ``endpoint`` does not answer ``ask``, empty where it does. Raises an error that it answers with."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    given = os.environ.get("HF_HUB_ETAG_TIMEOUT", "")
    seconds = float(given) if given.isdigit() and int(given) else WAIT
    when, why = _failed.get(endpoint, (-PAUSE, ""))
    if time.monotonic() - when >= PAUSE:
        try:
            limits.within(seconds, ask)
            return ""
        except (HfHubHTTPError, EntryNotFoundError):
            raise
        except TimeoutError:
            why = f"no answer in {seconds:.0f} s; HF_HUB_ETAG_TIMEOUT sets the timeout"
        except Exception as e:  # httpx's types differ between its versions
            why = one_line(e)
        _failed[endpoint] = time.monotonic(), why
    return why


def _check_revision(kind: Kind, repo: str, revision: str) -> None:
    if not re.fullmatch(REVISION, revision):
        raise BenchError(f"hub {kind} {repo!r}: {revision!r} is not a revision; give a commit, tag or branch")


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _cache() -> str | None:
    if cache := os.environ.get("HF_HUB_CACHE"):
        return cache
    home = os.environ.get("HF_HOME")
    return str(Path(home) / "hub") if home else None
