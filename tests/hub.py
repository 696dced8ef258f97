"""A Hugging Face Hub on loopback: its API, its redirects to a CDN, and transfers that are cut."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS = (".gguf", ".safetensors", ".bin", ".pth")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def commit_of(name: str) -> str:
    """Return the commit that this Hub makes of a word."""
    return hashlib.sha1(name.encode()).hexdigest()


@dataclass
class Hub:
    """What the Hub has, what goes wrong, and what it was asked."""

    #: Files by path, by revision, by repository.
    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    #: Repositories whose files need this token.
    gated: set[str] = field(default_factory=set)
    token: str = "hf_right"
    #: The next transfer of this path ends after so many bytes.
    cuts: dict[str, int] = field(default_factory=dict)
    #: The next transfer of this path stops after so many bytes, without an end, until `release`.
    stalls: dict[str, int] = field(default_factory=dict)
    release: threading.Event = field(default_factory=threading.Event)
    #: Bytes that the listing says a path has, where it does not tell the truth.
    announced: dict[str, int] = field(default_factory=dict)
    #: A status for every request, where the Hub is ill.
    status: int = 0
    #: Called when a listing was sent.
    listed: Callable[[], None] | None = None
    url: str = ""
    cdn: str = ""
    #: Paths whose bytes were asked for, with their Range.
    transfers: list[tuple[str, str | None]] = field(default_factory=list)
    #: Authorization of each request, by server.
    logins: list[tuple[str, str | None]] = field(default_factory=list)

    def add(self, repo: str, files: dict[str, bytes], revision: str = "main") -> None:
        self.repos.setdefault(repo, {})[revision] = files

    def asked(self) -> list[str]:
        """Return the paths of all transfers."""
        return [path for path, _ in self.transfers]

    def at(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return the commit of a revision and its files."""
        for name, files in self.repos.get(repo, {}).items():
            commit = commit_of(repo + name + "".join(map(sha256, files.values())))
            if revision in (name, commit):
                return commit, files
        # A commit outlives the branch that pointed to it.
        return self._old.get((repo, revision))

    _old: dict[tuple[str, str], tuple[str, dict[str, bytes]]] = field(default_factory=dict)

    def push(self, repo: str, files: dict[str, bytes]) -> None:
        """Put another commit behind main."""
        before = self.at(repo, "main")
        assert before is not None
        self._old[repo, before[0]] = before
        self.repos[repo]["main"] = files


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    name: str

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        hub = self.hub
        self.close_connection = True
        hub.logins.append((self.name, self.headers["Authorization"]))
        url = urlsplit(self.path)
        path = unquote(url.path)
        if hub.status:
            self.send(hub.status)
        elif self.name == "cdn":
            repo, commit, file = path.removeprefix("/").split("|")
            self.transfer(repo, commit, file)
        elif path == "/api/models":
            self.search({key: values[0] for key, values in parse_qs(url.query).items()})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
            self.listing(found[1], found[2])
        elif found := re.fullmatch(r"/api/resolve-cache/models/([^/]+/[^/]+)/(\w+)/(.+)", path):
            self.transfer(found[1], found[2], found[3])
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(found[1], found[2], found[3])
        else:
            self.send(404)

    def send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def with_token(self) -> bool:
        return self.headers["Authorization"] == f"Bearer {self.hub.token}"

    def search(self, query: dict[str, str]) -> None:
        names = [
            repo
            for repo in self.hub.repos
            if repo.startswith(query.get("author", "") + "/" if "author" in query else "")
            and query.get("search", "").lower() in repo.lower()
        ]
        self.send(200, json.dumps([{"id": name} for name in names]).encode())

    def listing(self, repo: str, revision: str) -> None:
        if repo not in self.hub.repos:
            said = {"X_Error_Message": "Invalid username or password."}
            self.send(404 if self.with_token() else 401, X_Error_Code="RepoNotFound", **said)
            return
        if (found := self.hub.at(repo, revision)) is None:
            self.send(404, X_Error_Code="RevisionNotFound")
            return
        commit, files = found
        siblings = []
        for name, content in files.items():
            size = self.hub.announced.get(name, len(content))
            sibling: dict[str, Any] = {"rfilename": name, "size": size}
            sibling["blobId"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            if name.endswith(LFS):
                sibling["lfs"] = {"sha256": sha256(content), "size": size, "pointerSize": 135}
                sibling["blobId"] = hashlib.sha1(b"the pointer").hexdigest()
            siblings.append(sibling)
        self.send(200, json.dumps({"id": repo, "sha": commit, "siblings": siblings}).encode())
        if self.hub.listed:
            self.hub.listed()

    def resolve(self, repo: str, commit: str, file: str) -> None:
        found = self.hub.at(repo, commit)
        if found is None or file not in found[1]:
            self.send(404, X_Error_Code="EntryNotFound")
        elif repo in self.hub.gated and not self.with_token():
            said = f"Access to model {repo} is restricted. You must have access to it and be authenticated."
            self.send(401, X_Error_Code="GatedRepo", X_Error_Message=said)
        elif file.endswith(LFS):
            self.send(302, Location=f"{self.hub.cdn}/{repo}|{commit}|{file}?Signature=abc")
        else:
            self.send(307, Location=f"/api/resolve-cache/models/{repo}/{commit}/{file}")

    def transfer(self, repo: str, commit: str, file: str) -> None:
        hub, found = self.hub, self.hub.at(repo, commit)
        assert found is not None
        content = found[1][file]
        hub.transfers.append((file, self.headers["Range"]))
        tag = f'"{sha256(content)[:8]}"'
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        start = int(asked[1]) if asked and self.headers.get("If-Range", tag) == tag else 0
        extra = {"Content_Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        end = start + hub.cuts.pop(file, len(content))
        stall = hub.stalls.pop(file, None)
        body = content[start : end if stall is None else start + stall]
        length = str(len(content) - start)
        self.send(206 if start else 200, body, ETag=tag, Content_Length=length, **extra)
        if stall is not None:
            self.wfile.flush()
            hub.release.wait(60)


@contextlib.contextmanager
def hub_server() -> Iterator[Hub]:
    """Run a Hub that has nothing yet, and its CDN on another port."""
    hub = Hub()
    with contextlib.ExitStack() as stack:
        for name in ("hub", "cdn"):
            handler = type(f"Handler_{name}", (_Handler,), {"hub": hub, "name": name})
            server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), handler))
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            setattr(hub, "url" if name == "hub" else "cdn", f"http://127.0.0.1:{server.server_port}")
        stack.callback(hub.release.set)
        yield hub
