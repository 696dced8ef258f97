"""Fetch one file from a Hugging Face hub, or from a server that speaks like one, and be sure of its bytes.

    hub.look_up ──> RemoteFile ── download ──> Part ── rename ──> target

What is relied on, and what is not:

- A file is what its hash says; the hub names a sha256 for every LFS file, and git's own hash for the small
  ones. Without one nothing is downloaded.
- A cut connection or a killed process costs the bytes that were under way. The next try hashes the part
  again and asks for the rest with `Range`; `If-Range` makes a server that has another file send it whole.
- `target` appears by rename after its bytes are synced, so it is never half a file.
- The hub redirects to a CDN with a signed, short-lived address, so every try starts at the hub again.
"""

from __future__ import annotations

import http.client
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from millrace.errors import MillraceError, Unreachable
from millrace.models.hub import RemoteFile, hub_error, open_url, origin, raise_for_status, raise_if_untrusted, reason
from millrace.models.part import CHUNK, Checksum, Part, check_space, lock, make_folder, storage_errors

_STALL = 30.0  # seconds without a byte after which a connection counts as cut
_MAX_FAILURES = 8  # in a row, each with less than `_PROGRESS` bytes
_PROGRESS = 1 << 20  # bytes; a server that cuts every connection after this many still gets us to the end
_BACKOFF = 0.5  # seconds to wait after the second fruitless try; the first is repeated at once; doubles
_MAX_BACKOFF = 30.0  # seconds

_SHA256 = re.compile(r"[0-9a-f]{64}")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")

#: Called with the bytes that are on disk and the bytes of the whole file; 0 for a size nobody knows yet.
Progress = Callable[[int, int], None]


def download(remote: RemoteFile, target: Path, *, sha256: str | None = None, progress: Progress | None = None) -> bool:
    """Download a file to `target`, going on where an earlier download of it stopped.

    Returns at once (after hashing) when `target` has the right bytes already; replaces it when it has others.

    Args:
        remote: From `hub.look_up`.
        target: The file to write; its folder is made if it is not there.
        sha256: The hash that the file must have; the hub's own where it is None.
        progress: Called after every piece that was written, in this thread.

    Returns:
        Whether it was downloaded now; False when `target` was there already.

    Raises:
        MillraceError: `checksum_unknown`, when neither the caller nor the hub gives a hash;
            `checksum_mismatch`, when the bytes are not those of the hash; `download_busy`, when another
            process is downloading the same file; `hub_denied` and `hub_error` as in `hub.look_up`.
        NotFound: The file is gone from the hub.
        Unreachable: The connection was cut too often; what has arrived is kept for the next call.
        StorageError: The disk is full (`disk_full`) or cannot be written.
    """
    wanted = checksum(remote, sha256)
    with storage_errors(target):
        make_folder(target.parent)
        with lock(target):
            if target.is_file() and wanted.matches(target):
                return False
            with closing(Part(target, wanted)) as part:
                check_space(target.parent, target.name, (remote.size or part.length) - part.length)
                _fetch(remote, part, progress)
                part.finish()
    return True


def checksum(remote: RemoteFile, sha256: str | None = None) -> Checksum:
    """Return what a file must hash to, by the caller's word and the hub's.

    Raises:
        MillraceError: `checksum_unknown`, when there is neither; `checksum_mismatch`, when they differ.
    """
    given = sha256.strip().lower() if sha256 is not None else None
    if given is not None and not _SHA256.fullmatch(given):
        raise MillraceError(
            f"{sha256!r} is no sha256: it must be 64 hexadecimal digits.",
            "Copy it from the file's page on the hub, or leave it out.",
            code="checksum_unknown",
        )
    if given and remote.sha256 and given != remote.sha256:
        raise MillraceError(
            f"The hub's {remote.url} has the sha256 {remote.sha256}, not the expected {given}.",
            "Someone has changed the file on the hub. Choose the revision you meant, or correct the sha256.",
            code="checksum_mismatch",
        )
    if known := given or remote.sha256:
        return Checksum("sha256", known, remote.size)
    if remote.git_sha1 and remote.size is not None:
        return Checksum("git", remote.git_sha1, remote.size)
    raise MillraceError(
        f"Nobody says what {remote.url} must contain: the hub gives no hash and neither did you.",
        "Give the file's sha256.",
        code="checksum_unknown",
    )


class _Cut(Exception):
    """A try ended before the file did; another one may do better."""

    def __init__(self, reason: str, *, wait: float = 0.0) -> None:
        super().__init__(reason)
        #: Seconds that the server asked us to stay away.
        self.wait = wait


def _fetch(remote: RemoteFile, part: Part, progress: Progress | None) -> None:
    """Try until the part is as long as the file."""
    failures, furthest = 0, part.length
    while remote.size is None or part.length < remote.size:
        try:
            _fetch_once(remote, part, progress)
        except _Cut as cut:
            # Measured from the furthest point, or a server that makes us start over again and again would
            # have us do so for ever.
            failures = 0 if part.length - furthest >= _PROGRESS else failures + 1
            furthest = max(furthest, part.length)
            if failures >= _MAX_FAILURES:
                raise Unreachable(
                    f"The download of {part.target.name} was cut {failures} times in a row: {cut}.",
                    f"Run it again when the network is better; the {part.length} bytes so far are kept.",
                ) from cut
            if failures > 1 or cut.wait:
                backoff = min(_MAX_BACKOFF, _BACKOFF * 2.0 ** max(0, failures - 2))
                time.sleep(max(cut.wait, random.uniform(backoff / 2, backoff)))
        else:
            return


def _fetch_once(remote: RemoteFile, part: Part, progress: Progress | None) -> None:
    headers = {}
    if part.length:
        headers["Range"] = f"bytes={part.length}-"
        if part.validator:
            headers["If-Range"] = part.validator
    with _network_errors(remote.url):
        response = open_url("GET", remote.url, timeout=_STALL, token=remote.token, headers=headers)
    with closing(response):
        _raise_for_get(response, remote, part)
        total = _place(response, remote, part)
        part.begin(_strong_etag(response))
        while True:
            with _network_errors(remote.url):
                # As much as one read of the socket brings: a piece that waits to be full is lost by a cut.
                chunk = response.read1(CHUNK)
            if not chunk:
                break
            part.append(chunk)
            if progress is not None:
                progress(part.length, total or 0)
            if total is not None and part.length >= total:
                # Not asked for more: too long a body fails by its hash, and need not be read to its end.
                break
    if total is not None and part.length < total:
        # http.client ends a body that was cut as if it were whole.
        raise _Cut(f"the server closed the connection at {part.length} of {total} bytes")


def _raise_for_get(response: http.client.HTTPResponse, remote: RemoteFile, part: Part) -> None:
    status = response.status
    on_hub = origin(response.url) == origin(remote.url)
    if status == 416:
        part.restart()
        raise _Cut("the server does not have the rest of what we have")
    if status in {408, 425, 429} or status >= 500:
        raise _Cut(f"HTTP {status}", wait=_retry_after(response))
    if status == 403 and not on_hub:
        raise _Cut("HTTP 403 from the CDN, as for a signed address that is too old")
    raise_for_status(response, remote.url)
    if status not in {200, 206}:
        raise hub_error(f"HTTP {status} for {remote.url}")


def _place(response: http.client.HTTPResponse, remote: RemoteFile, part: Part) -> int | None:
    """Make the part end where the body begins, and return the length of the whole file."""
    if response.status == 200:
        if part.length:
            # The server knows no ranges, or has another file than the one that the part is of.
            part.restart()
        return remote.size if remote.size is not None else response.length
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if match is None or int(match[1]) != part.length:
        part.restart()
        raise _Cut("the server sent another range than the one asked for")
    if remote.size is not None:
        return remote.size
    return int(match[2]) if match[2] != "*" else None


@contextmanager
def _network_errors(url: str) -> Iterator[None]:
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        raise_if_untrusted(error, url)
        raise _Cut(reason(error, _STALL)) from error


def _retry_after(response: http.client.HTTPResponse) -> float:
    """Return the seconds of Retry-After, at most `_MAX_BACKOFF`; 0 where it is missing or a date."""
    with suppress(ValueError):
        return min(_MAX_BACKOFF, max(0.0, float(response.headers.get("Retry-After", "0"))))
    return 0.0


def _strong_etag(response: http.client.HTTPResponse) -> str | None:
    """Return the ETag as it was sent; a weak one promises too little for `If-Range`."""
    etag: Any = response.headers.get("ETag")
    return etag if isinstance(etag, str) and etag.startswith('"') else None
