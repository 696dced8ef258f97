"""The Hugging Face Hub, or a mirror that speaks like one: what a repository holds, and requests for its files.

A revision is looked up once and becomes a commit, so that all files that are then asked for are of one version.
The token goes to the hub's own origin and to no other: files come from a CDN.
"""

from __future__ import annotations

import http.client
import json
import re
import ssl
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any
from urllib.error import URLError
from urllib.parse import quote, urlencode, urljoin, urlsplit
from urllib.request import HTTPHandler, HTTPSHandler, OpenerDirector, ProxyHandler, Request

import millrace
from millrace.errors import InputError, MillraceError, NotFound, SettingsError, Unreachable

_MAX_REDIRECTS = 8
_MAX_LISTING = 64 << 20  # bytes; a repository of 100,000 files has some 30 MB
_NEAR = 5  # names

_REFUSED = "Invalid credentials in Authorization header"  # as the Hub says it

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


@dataclass(frozen=True)
class RemoteFile:
    """One version of one file, as a hub described it."""

    #: Where to ask for it; with the commit in place of the branch, so that a push during the download
    #: does not change the file under it.
    url: str
    #: Length in bytes; None where the hub did not say.
    size: int | None = None
    #: Lower-case hex; None for a file that is no LFS file.
    sha256: str | None = None
    #: Git's own hash of the file; None for an LFS file.
    git_sha1: str | None = None
    #: Sent to the origin of `url` alone.
    token: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Repository:
    """One commit of a repository, and its files by their path in it."""

    #: `owner/name`, as it was asked for.
    name: str
    commit: str
    files: dict[str, RemoteFile]


def look_up(
    endpoint: str, repo: str, *, revision: str = "main", timeout: float = 5.0, token: str | None = None
) -> Repository:
    """Ask the hub which files a repository has.

    Args:
        endpoint: The hub's address, such as `https://huggingface.co`.
        repo: `owner/name`.
        revision: Branch, tag or commit.
        timeout: Seconds to wait for the hub.
        token: Access token for gated and private repositories.

    Raises:
        InputError: `repo` is no `owner/name`.
        NotFound: The hub has no such repository or revision.
        MillraceError: `hub_denied`, when the hub wants a token or another one; `hub_error`, when it answers
            with something that makes no sense.
        SettingsError: The endpoint is no http or https address.
        Unreachable: `hub_unreachable`, when no hub answers there, or only with 429 or 5xx; `hub_untrusted`,
            when its TLS certificate cannot be trusted.
    """
    if not _REPOSITORY.fullmatch(repo):
        raise InputError(f"{repo!r} is no name of a repository.", "Give OWNER/NAME, as on the hub's page.")
    endpoint = endpoint.rstrip("/")
    path = f"/api/models/{repo}/revision/{quote(revision, safe='')}?blobs=true"
    try:
        answer = _ask(endpoint, path, f"{repo} at {revision}", timeout=timeout, token=token)
    except NotFound as error:
        if near := _near(endpoint, repo, timeout=timeout, token=token):
            raise NotFound(error.message, f"Near to it are {', '.join(near)}.") from None
        raise
    commit, siblings = (answer.get("sha"), answer.get("siblings")) if isinstance(answer, dict) else (None, None)
    if not isinstance(commit, str) or not _SHA1.fullmatch(commit) or not isinstance(siblings, list):
        raise hub_error(f"no list of files for {repo}")
    base = f"{endpoint}/{repo}/resolve/{commit}"
    files = {}
    for sibling in siblings:
        name = sibling.get("rfilename") if isinstance(sibling, dict) else None
        if isinstance(name, str) and _is_plain(name):
            files[name] = _described(sibling, f"{base}/{quote(name)}", token)
    return Repository(repo, commit, files)


def _described(sibling: dict[str, Any], url: str, token: str | None) -> RemoteFile:
    lfs = sibling.get("lfs")
    lfs = lfs if isinstance(lfs, dict) else {}
    size = lfs.get("size", sibling.get("size"))
    # An LFS file's git hash is that of its pointer.
    return RemoteFile(
        url,
        size=size if isinstance(size, int) and size >= 0 else None,
        sha256=_hex(lfs.get("sha256"), _SHA256),
        git_sha1=None if lfs else _hex(sibling.get("blobId"), _SHA1),
        token=token,
    )


def _hex(value: object, pattern: re.Pattern[str]) -> str | None:
    return value if isinstance(value, str) and pattern.fullmatch(value) else None


def _is_plain(name: str) -> bool:
    """Whether a path stays in its repository; it becomes one on our disk."""
    return name.isprintable() and not {"", ".", ".."}.intersection(name.split("/"))


def _near(endpoint: str, repo: str, *, timeout: float, token: str | None) -> list[str]:
    """Return names that somebody may have meant, the owner's first; nothing where the hub does not help."""
    owner, _, name = repo.partition("/")
    with suppress(MillraceError):
        for query in ({"author": owner, "limit": 500}, {"search": name, "limit": 50}):
            answer = _ask(endpoint, f"/api/models?{urlencode(query)}", owner, timeout=timeout, token=token)
            entries = answer if isinstance(answer, list) else []
            names = [str(entry["id"]) for entry in entries if isinstance(entry, dict) and "id" in entry]
            if repo in names:  # it is the revision that is not there
                return []
            if near := get_close_matches(repo, names, _NEAR):
                return near
    return []


def _ask(endpoint: str, path: str, name: str, *, timeout: float, token: str | None) -> Any:
    """Return the JSON that the hub's API answers."""
    try:
        with _trusted(endpoint), closing(open_url("GET", endpoint + path, timeout=timeout, token=token)) as response:
            if response.status == 429 or response.status >= 500:
                raise _unreachable(endpoint, f"HTTP {response.status}")
            raise_for_status(response, name, "repository")
            return json.loads(response.read(_MAX_LISTING))
    except ValueError:
        raise hub_error(f"something that is no JSON for {name}") from None
    except (OSError, http.client.HTTPException) as error:
        raise _unreachable(endpoint, reason(error, timeout)) from error


def _unreachable(endpoint: str, why: str) -> Unreachable:
    return Unreachable(
        f"{endpoint} does not answer: {why}.",
        "Try again later, or set HF_ENDPOINT to a mirror that you can reach.",
        code="hub_unreachable",
    )


# ---- requests -----------------------------------------------------------------------------------


def open_url(
    method: str, url: str, *, timeout: float, token: str | None, headers: dict[str, str] | None = None
) -> http.client.HTTPResponse:
    """Send a request and follow redirects; the last answer is returned whatever its status.

    Raises:
        SettingsError: The URL is no http or https address.
        OSError: The connection failed, or no byte came for `timeout` seconds.
    """
    opener, home = _opener(), origin(url)
    for _ in range(_MAX_REDIRECTS):
        if origin(url)[0] not in {"http", "https"}:
            raise _no_address(url)
        request = Request(url, method=method, headers={"Accept-Encoding": "identity", **(headers or {})})  # noqa: S310 - checked above
        request.add_header("User-Agent", f"millrace/{millrace.__version__}")
        if token and origin(url) == home:
            request.add_header("Authorization", f"Bearer {token}")
        response: http.client.HTTPResponse = opener.open(request, timeout=timeout)
        if response.status not in {301, 302, 303, 307, 308} or "Location" not in response.headers:
            return response
        with closing(response):
            url = urljoin(url, response.headers["Location"])
    raise http.client.HTTPException(f"more than {_MAX_REDIRECTS} redirects")


def _opener() -> OpenerDirector:
    # Not `build_opener`: its handlers speak file: and ftp:, follow redirects with the token still on them,
    # and raise for a status. Proxies are taken from the environment, as everywhere in urllib.
    opener = OpenerDirector()
    for handler in (ProxyHandler(), HTTPHandler(), HTTPSHandler()):
        opener.add_handler(handler)
    return opener


def origin(url: str) -> tuple[str, str, int]:
    """Return scheme, host and port.

    Raises:
        SettingsError: The URL cannot be read, or names no host.
    """
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        raise _no_address(url) from None
    if not parts.hostname:
        raise _no_address(url)
    return parts.scheme, parts.hostname, port


def _no_address(url: str) -> SettingsError:
    return SettingsError(f"{url!r} is no http or https address.", "Correct the address of the hub.")


def raise_for_status(response: http.client.HTTPResponse, name: str, what: str = "file") -> None:
    """Turn a status of 400 and more into an error; `what` is not there where the hub does not say what is not.

    Raises:
        NotFound: `name` is not there.
        MillraceError: `hub_denied` or `hub_error`.
    """
    status, headers = response.status, response.headers
    code, said = headers.get("X-Error-Code", ""), headers.get("X-Error-Message", "")
    # Who shows no token is told 401, often without a code, of a repository that is not there.
    unknown = code == "RepoNotFound" or (not code and what == "repository" and said != _REFUSED)
    what = {"RepoNotFound": "repository", "RevisionNotFound": "revision"}.get(code, what)
    if status in {404, 410} or (status == 401 and unknown):
        private = " A private model needs HF_TOKEN." if what == "repository" else ""
        raise NotFound(f"The hub has no such {what}: {name}.", f"Check the name on the hub's page.{private}")
    if status in {401, 403}:
        raise MillraceError(
            f"The hub does not let us have {name} (HTTP {status}){': ' + said.rstrip('.') if said else ''}.",
            "Check the name. For a gated or private model, accept its licence on the hub and set HF_TOKEN.",
            code="hub_denied",
        )
    if status >= 400:
        raise hub_error(f"HTTP {status} for {name}")


def raise_if_untrusted(error: BaseException, url: str) -> None:
    """Turn a certificate that cannot be trusted into an error of its own: another try does not help.

    Raises:
        Unreachable: `hub_untrusted`.
    """
    cause = error.reason if isinstance(error, URLError) else error
    if isinstance(cause, ssl.SSLCertVerificationError):
        raise Unreachable(
            f"The certificate of {url} cannot be trusted: {cause.verify_message}.",
            "If a proxy of your company opens TLS, point SSL_CERT_FILE to its certificate.",
            code="hub_untrusted",
        ) from error


@contextmanager
def _trusted(url: str) -> Iterator[None]:
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        raise_if_untrusted(error, url)
        raise


def reason(error: BaseException, timeout: float) -> str:
    """Return why a connection failed, in words."""
    cause = error.reason if isinstance(error, URLError) else error
    if isinstance(cause, TimeoutError):
        return f"no byte for {timeout:.0f} s"
    return str(cause) or type(cause).__name__


def hub_error(what: str) -> MillraceError:
    """Return the error for an answer that makes no sense."""
    return MillraceError(
        f"The hub answered {what}.", "Check that the address is that of a Hugging Face hub.", code="hub_error"
    )
