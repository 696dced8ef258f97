"""Listings and downloads from a real HTTP server on loopback: a hub that redirects to a CDN on another port."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from millrace.errors import InputError, MillraceError, NotFound, SettingsError, StorageError, Unreachable
from millrace.models import download as module
from millrace.models.download import download
from millrace.models.hub import RemoteFile, look_up

REPO, FILE, COMMIT = "someone/tiny-GGUF", "tiny-q8_0.gguf", "c0ffee" * 6 + "abcd"
BODY = random.Random(7).randbytes(3_000_000)


def sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def git_sha1(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


@dataclass
class Site:
    """What the servers serve, what goes wrong, and what they were asked."""

    body: bytes = BODY
    #: The CDN's; the hub's is the sha256.
    etag: str = '"cdn-1"'
    announced: str = sha256(BODY)
    #: Statuses of the hub for the next requests, before it works.
    statuses: list[int] = field(default_factory=list)
    error_code: str = ""
    error_message: str = ""
    #: For each of the next answers of the CDN: after how many bytes it closes the connection.
    cuts: list[int] = field(default_factory=list)
    #: When set, the CDN stops here in its next answer, without closing, until `release`.
    stall: int = 0
    release: threading.Event = field(default_factory=threading.Event)
    ranges: bool = True
    lfs: bool = True
    #: Instead of the one file's; and instead of the whole answer of the API.
    siblings: list[Any] | None = None
    answer: str = ""
    renamed_from: str = ""
    hub: str = ""
    cdn: str = ""
    #: Method, which server, path, headers.
    log: list[tuple[str, str, str, dict[str, str]]] = field(default_factory=list)

    def asked(self, who: str, method: str = "GET") -> list[dict[str, str]]:
        return [headers for verb, server, _, headers in self.log if (verb, server) == (method, who)]

    def look(self, token: str | None = None) -> RemoteFile:
        remote = look_up(self.hub, REPO, token=token).files[FILE]
        self.log.clear()
        return remote


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site
    name: str

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.site.log.append((self.command, self.name, self.path, dict(self.headers)))
        self.close_connection = True
        if self.name == "hub":
            self.answer_as_hub()
        else:
            self.answer_as_cdn()

    def head(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Connection", "close")
        self.end_headers()

    def answer_as_hub(self) -> None:
        site = self.site
        if site.statuses:
            said = {"X_Error_Code": site.error_code, "X_Error_Message": site.error_message}
            extra = {name: value for name, value in said.items() if value}
            self.head(site.statuses.pop(0), Content_Length="0", **extra)
        elif site.renamed_from and site.renamed_from in self.path:
            self.head(307, Location=self.path.replace(site.renamed_from, REPO, 1), Content_Length="0")
        elif self.path == f"/api/models/{REPO}/revision/main?blobs=true":
            self.list()
        elif self.path != f"/{REPO}/resolve/{COMMIT}/{FILE}":
            self.head(404, Content_Length="0", X_Error_Code="EntryNotFound")
        else:
            self.head(302, Location=f"{site.cdn}/blob?signature=abc", Content_Length="123", ETag='"of-the-redirect"')

    def list(self) -> None:
        site = self.site
        file: dict[str, Any] = {"rfilename": FILE, "size": len(site.body), "blobId": git_sha1(site.body)}
        if site.lfs:
            file["lfs"] = {"sha256": site.announced, "size": len(site.body), "pointerSize": 134}
        siblings = [file] if site.siblings is None else site.siblings
        body = (site.answer or json.dumps({"sha": COMMIT, "siblings": siblings})).encode()
        self.head(200, Content_Length=str(len(body)))
        self.wfile.write(body)

    def answer_as_cdn(self) -> None:
        site = self.site
        start = 0
        wanted = self.headers.get("Range")
        if wanted and site.ranges and self.headers.get("If-Range", site.etag) == site.etag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(site.body):
                self.head(416, Content_Length="0")
                return
        length = len(site.body) - start
        extra = {"Content_Range": f"bytes {start}-{len(site.body) - 1}/{len(site.body)}"} if start else {}
        self.head(206 if start else 200, Content_Length=str(length), ETag=site.etag, **extra)
        end = start + site.cuts.pop(0) if site.cuts else len(site.body)
        if site.stall:
            end, site.stall = start + site.stall, 0
            self.wfile.write(site.body[start:end])
            site.release.wait(60)
        else:
            self.wfile.write(site.body[start:end])


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    # A proxy that the machine is set up with has no business on loopback.
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    site = Site()
    servers = []
    for name in ("hub", "cdn"):
        handler = type(f"Handler_{name}", (Handler,), {"site": site, "name": name})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        setattr(site, name, f"http://127.0.0.1:{server.server_port}")
        servers.append((server, thread))
    yield site
    site.release.set()
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "gguf" / FILE


def left_over(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir() if path != target)


# ---- the listing --------------------------------------------------------------------------------


def test_a_listing_says_what_a_file_is_and_stays_off_the_cdn(site: Site) -> None:
    repository = look_up(site.hub, REPO, token="hf_secret")
    assert repository.commit == COMMIT
    assert repository.files[FILE] == RemoteFile(
        url=f"{site.hub}/{REPO}/resolve/{COMMIT}/{FILE}", size=len(BODY), sha256=sha256(BODY), token="hf_secret"
    )
    assert not site.asked("cdn")
    assert [headers["Authorization"] for headers in site.asked("hub")] == ["Bearer hf_secret"]


def test_a_token_is_not_in_the_repr(site: Site) -> None:
    assert "hf_secret" not in repr(look_up(site.hub, REPO, token="hf_secret"))


def test_a_file_that_is_no_lfs_file_has_the_hash_that_git_gave_it(site: Site) -> None:
    site.lfs = False
    remote = site.look()
    assert (remote.size, remote.sha256, remote.git_sha1) == (len(BODY), None, git_sha1(BODY))


def test_a_renamed_repository_is_followed(site: Site, target: Path) -> None:
    site.renamed_from = "someone/old-name"
    remote = look_up(site.hub, "someone/old-name", token="hf_secret").files[FILE]
    assert remote.sha256 == sha256(BODY)
    assert download(remote, target)
    assert not any("Authorization" in headers for headers in site.asked("cdn"))


def test_names_and_revisions_are_quoted(site: Site) -> None:
    with pytest.raises(NotFound):
        look_up(site.hub + "/", REPO, revision="refs/pr/1")
    assert site.log[0][2] == f"/api/models/{REPO}/revision/refs%2Fpr%2F1?blobs=true"
    site.siblings = [{"rfilename": "a folder/ü#.gguf", "size": 1}]
    assert look_up(site.hub, REPO).files["a folder/ü#.gguf"].url.endswith("/a%20folder/%C3%BC%23.gguf")


@pytest.mark.parametrize("name", ["../a", "a/../../b", "/etc/passwd", "", "a//b", ".", "a\0b", "a\nb", None, 7])
def test_a_path_that_leaves_the_repository_is_left_out(site: Site, name: object) -> None:
    site.siblings = [{"rfilename": name, "size": 1}, "nonsense", {"rfilename": "ok", "size": -1, "lfs": 7}]
    assert look_up(site.hub, REPO).files == {"ok": RemoteFile(f"{site.hub}/{REPO}/resolve/{COMMIT}/ok")}


@pytest.mark.parametrize(
    ("error_code", "what"), [("", "repository"), ("RepoNotFound", "repository"), ("RevisionNotFound", "revision")]
)
def test_404_says_what_is_not_there(site: Site, error_code: str, what: str) -> None:
    site.statuses, site.error_code = [404] * 3, error_code
    with pytest.raises(NotFound, match=f"no such {what}: {REPO} at main"):
        look_up(site.hub, REPO)


@pytest.mark.parametrize(
    ("status", "error_code", "error_message"),
    [
        (403, "", ""),
        (401, "GatedRepo", "Access to this model is restricted."),
        (401, "", "Invalid credentials in Authorization header"),
    ],
)
def test_a_hub_that_denies(site: Site, status: int, error_code: str, error_message: str) -> None:
    site.statuses, site.error_code, site.error_message = [status], error_code, error_message
    with pytest.raises(MillraceError) as caught:
        look_up(site.hub, REPO)
    assert caught.value.code == "hub_denied"
    assert error_message.rstrip(".") in caught.value.message
    assert "HF_TOKEN" in caught.value.hint


@pytest.mark.parametrize("error_code", ["RepoNotFound", ""])
def test_401_of_a_repository_that_is_not_there(site: Site, error_code: str) -> None:
    site.statuses, site.error_code, site.error_message = [401] * 3, error_code, "Invalid username or password."
    with pytest.raises(NotFound) as caught:
        look_up(site.hub, REPO)
    assert "HF_TOKEN" in caught.value.hint


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_that_is_down(site: Site, status: int) -> None:
    site.statuses = [status]
    with pytest.raises(Unreachable, match=f"does not answer: HTTP {status}") as caught:
        look_up(site.hub, REPO)
    assert caught.value.code == "hub_unreachable"


@pytest.mark.parametrize("answer", ["<html>", "[]", "{}", '{"sha": "main", "siblings": []}', '{"sha": 1}', "7"])
def test_a_hub_that_says_nonsense(site: Site, answer: str) -> None:
    site.answer = answer
    with pytest.raises(MillraceError) as caught:
        look_up(site.hub, REPO)
    assert caught.value.code == "hub_error"


def test_a_hub_that_is_a_teapot(site: Site) -> None:
    site.statuses = [418]
    with pytest.raises(MillraceError, match="HTTP 418") as caught:
        look_up(site.hub, REPO)
    assert caught.value.code == "hub_error"


def test_connection_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(Unreachable, match="refused"):
        look_up(f"http://127.0.0.1:{port}", REPO)


def test_a_hub_that_never_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(Unreachable, match="no byte for"):
            look_up(f"http://127.0.0.1:{port}", REPO, timeout=0.2)


def test_a_certificate_that_nobody_has_signed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to make a certificate with")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    words = [
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-subj",
        "/CN=127.0.0.1",
        "-keyout",
        key,
        "-out",
        certificate,
    ]
    subprocess.run(["openssl", *words], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            with pytest.raises(Unreachable, match="cannot be trusted: self-signed") as caught:
                look_up(f"https://127.0.0.1:{server.server_port}", REPO)
            assert caught.value.code == "hub_untrusted"
        finally:
            server.shutdown()
            thread.join()


def test_redirects_that_never_end(site: Site) -> None:
    site.renamed_from = REPO
    with pytest.raises(Unreachable, match="more than 8 redirects"):
        look_up(site.hub, REPO)


@pytest.mark.parametrize("endpoint", ["file:///etc", "huggingface.co", "http://", "http://a:b", "http://[1"])
def test_an_endpoint_that_is_no_address(endpoint: str) -> None:
    with pytest.raises(SettingsError, match="no http or https address"):
        look_up(endpoint, REPO)


@pytest.mark.parametrize("repo", ["gpt2", "a/b/c", "../a", "a/..", "a b/c", "/a", "a/", "https://huggingface.co/a/b"])
def test_a_name_that_is_no_repository(repo: str) -> None:
    with pytest.raises(InputError, match="no name of a repository"):
        look_up("http://127.0.0.1:9", repo)


# ---- download -----------------------------------------------------------------------------------


def test_download_through_the_redirect(site: Site, target: Path) -> None:
    seen: list[tuple[int, int]] = []
    remote = site.look()
    assert download(remote, target, progress=lambda done, total: seen.append((done, total)))
    assert target.read_bytes() == BODY
    assert left_over(target) == []
    assert seen[-1] == (len(BODY), len(BODY))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_the_token_goes_to_the_hub_alone(site: Site, target: Path) -> None:
    site.cuts = [1_000_000]
    download(site.look(token="hf_secret"), target)
    assert [headers["Authorization"] for headers in site.asked("hub")] == ["Bearer hf_secret"] * 2
    assert not any("Authorization" in headers for headers in site.asked("cdn"))


def test_a_cut_connection_is_resumed(site: Site, target: Path) -> None:
    site.cuts = [1_234_567]
    download(site.look(), target)
    assert target.read_bytes() == BODY
    first, second = site.asked("cdn")
    assert "Range" not in first
    assert (second["Range"], second["If-Range"]) == ("bytes=1234567-", '"cdn-1"')
    # Every try asks the hub, because the CDN's address expires.
    assert len(site.asked("hub")) == 2


def test_many_cuts_are_fine_while_there_is_progress(site: Site, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PROGRESS", 100_000)
    site.cuts = [100_000] * 20
    download(site.look(), target)
    assert target.read_bytes() == BODY
    assert len(site.asked("cdn")) == 21


def test_too_many_cuts_without_progress_end_it_and_keep_the_part(
    site: Site, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BACKOFF", 0.001)
    site.cuts = [1000, *[0] * 20]
    with pytest.raises(Unreachable, match=r"cut 8 times .* at 1000 of 3000000 bytes"):
        download(site.look(), target)
    assert not target.exists()
    site.cuts = []
    download(site.look(), target)
    assert site.asked("cdn")[-1]["Range"] == "bytes=1000-"
    assert target.read_bytes() == BODY


def test_a_server_that_has_less_than_it_said_does_not_keep_us_for_ever(
    site: Site, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BACKOFF", 0.001)
    remote = replace(site.look(), size=len(BODY) + 1)
    with pytest.raises(Unreachable):
        download(remote, target)
    assert not target.exists()


def test_busy_servers_are_asked_again(site: Site, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BACKOFF", 0.001)
    remote = site.look()
    site.statuses = [503, 429, 500]
    download(remote, target)
    assert target.read_bytes() == BODY


def test_a_server_without_ranges_sends_it_whole(site: Site, target: Path) -> None:
    site.cuts, site.ranges = [1_000_000], False
    download(site.look(), target)
    assert target.read_bytes() == BODY


def test_another_etag_at_the_cdn_starts_over(site: Site, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_FAILURES", 1)
    old = random.Random(8).randbytes(len(BODY))
    site.body, site.cuts = old, [1_000]
    with pytest.raises(Unreachable):
        download(site.look(), target)
    site.body, site.etag = BODY, '"cdn-2"'
    download(site.look(), target)
    assert site.asked("cdn")[-1]["If-Range"] == '"cdn-1"'
    assert target.read_bytes() == BODY


def test_another_etag_at_the_hub_starts_over(site: Site, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_FAILURES", 1)
    site.cuts = [1_000]
    with pytest.raises(Unreachable):
        download(site.look(), target)
    assert left_over(target) == [f"{FILE}.part", f"{FILE}.part.json"]
    site.body = random.Random(9).randbytes(len(BODY))
    site.announced = sha256(site.body)
    download(site.look(), target)
    # Not even asked for the rest: the note says that the part is of another file.
    assert "Range" not in site.asked("cdn")[-1]
    assert target.read_bytes() == site.body
    assert left_over(target) == []


def test_a_wrong_hash_leaves_nothing(site: Site, target: Path) -> None:
    site.announced = sha256(b"something else")
    with pytest.raises(MillraceError) as caught:
        download(site.look(), target)
    assert caught.value.code == "checksum_mismatch"
    assert sha256(BODY) in caught.value.message
    assert list(target.parent.iterdir()) == []


def test_the_caller_and_the_hub_disagree(site: Site, target: Path) -> None:
    with pytest.raises(MillraceError) as caught:
        download(site.look(), target, sha256="0" * 64)
    assert caught.value.code == "checksum_mismatch"
    assert not site.asked("hub")


def test_no_hash_no_download(site: Site, target: Path) -> None:
    with pytest.raises(MillraceError) as caught:
        download(replace(site.look(), sha256=None), target)
    assert caught.value.code == "checksum_unknown"
    with pytest.raises(MillraceError, match="is no sha256"):
        download(site.look(), target, sha256="abc")


def test_the_callers_hash_is_enough(site: Site, target: Path) -> None:
    remote = replace(site.look(), sha256=None, size=None)
    site.cuts = [2_000_000]
    download(remote, target, sha256=sha256(BODY).upper())
    assert target.read_bytes() == BODY


def test_what_is_there_already_is_not_downloaded(site: Site, target: Path) -> None:
    target.parent.mkdir()
    target.write_bytes(BODY)
    download(site.look(), target)
    assert not site.asked("hub")
    target.write_bytes(b"another file")
    download(site.look(), target)
    assert target.read_bytes() == BODY


def test_a_small_file_is_checked_by_the_hash_that_git_gave_it(site: Site, target: Path) -> None:
    site.lfs, site.cuts = False, [1_000_000]
    remote = site.look()
    assert download(remote, target)
    assert target.read_bytes() == BODY
    assert not download(remote, target)
    site.body = BODY[:-1] + b"x"
    target.unlink()
    with pytest.raises(MillraceError, match="has the git hash") as caught:
        download(remote, target)
    assert caught.value.code == "checksum_mismatch"
    assert list(target.parent.iterdir()) == []


def test_everybody_may_read_what_was_downloaded(site: Site, tmp_path: Path) -> None:
    target = tmp_path / "models" / "gguf" / FILE
    before = os.umask(0o077)
    try:
        download(site.look(), target)
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (target, *target.parents[:2])] == [0o644, 0o755, 0o755]


def test_a_file_that_is_gone(site: Site, target: Path) -> None:
    remote = site.look()
    site.statuses = [404]
    with pytest.raises(NotFound):
        download(remote, target)
    assert list(target.parent.iterdir()) == []


def test_an_empty_file(site: Site, target: Path) -> None:
    site.body, site.announced = b"", sha256(b"")
    download(site.look(), target)
    assert target.read_bytes() == b""
    assert left_over(target) == []


def test_too_little_space(site: Site, target: Path) -> None:
    with pytest.raises(StorageError, match="needs") as caught:
        download(replace(site.look(), size=10**18), target)
    assert caught.value.code == "disk_full"
    assert not site.asked("hub")


def test_a_folder_that_cannot_be_made(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot be written"):
        download(site.look(), tmp_path / "file" / FILE)


def test_one_process_at_a_time(site: Site, target: Path) -> None:
    target.parent.mkdir()
    lock = target.with_name(FILE + ".lock")
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(MillraceError) as caught:
            download(site.look(), target)
    assert caught.value.code == "download_busy"
    # The lock file of a process that is gone blocks nobody.
    assert lock.exists()
    download(site.look(), target)
    assert left_over(target) == []


CHILD = """
import sys
from pathlib import Path
from millrace.models.download import download
from millrace.models.hub import look_up

remote = look_up(sys.argv[1], sys.argv[2]).files[sys.argv[3]]
download(remote, Path(sys.argv[4]), progress=lambda done, total: print(done, flush=True))
"""


def test_a_killed_download_is_resumed(site: Site, target: Path) -> None:
    site.stall = 1_000_000
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, site.hub, REPO, FILE, str(target)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        done = 0
        while done < 1_000_000:
            done = int(process.stdout.readline())
        # Alive, in the middle, and holding the lock.
        with pytest.raises(MillraceError, match="Another process is downloading"):
            download(site.look(), target)
        process.kill()
    site.release.set()
    assert left_over(target) == [f"{FILE}.lock", f"{FILE}.part", f"{FILE}.part.json"]
    note = json.loads(target.with_name(FILE + ".part.json").read_text())
    assert (note["digest"], note["validator"]) == (sha256(BODY), '"cdn-1"')

    download(site.look(), target)
    assert site.asked("cdn")[-1]["Range"] == "bytes=1000000-"
    assert target.read_bytes() == BODY
    assert left_over(target) == []


def test_a_damaged_part_is_found_out(site: Site, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_FAILURES", 1)
    site.cuts = [1_000_000]
    with pytest.raises(Unreachable):
        download(site.look(), target)
    with target.with_name(FILE + ".part").open("r+b") as part:
        part.write(b"a bad sector")
    with pytest.raises(MillraceError) as caught:
        download(site.look(), target)
    assert site.asked("cdn")[-1]["Range"] == "bytes=1000000-"
    assert caught.value.code == "checksum_mismatch"
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize("note", ["", "{", "[]", '{"etag": 1}'])
def test_a_part_with_no_readable_note_starts_over(site: Site, target: Path, note: str) -> None:
    target.parent.mkdir()
    target.with_name(FILE + ".part").write_bytes(b"\0" * 1000)
    target.with_name(FILE + ".part.json").write_text(note)
    download(site.look(), target)
    assert "Range" not in site.asked("cdn")[-1]
    assert target.read_bytes() == BODY
