"""What every test stands on: no settings of the machine, a folder of its own, and the same examples each time."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, configuration
from hypothesis import settings as hypothesis_settings

from millrace.batch.ledger import Ledger
from millrace.settings import Settings, get_settings, secret_fields

hypothesis_settings.register_profile(
    "millrace",
    derandomize=True,
    deadline=None,
    database=None,
    # One judges by the clock, and a loaded machine would decide; the other forbids tmp_path and ledger.
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
hypothesis_settings.load_profile("millrace")
# Its notes on the code under test; by default they go to the current folder, which is every test's own.
configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "millrace-hypothesis")

# A shell starts what runs in its background with SIGINT ignored, nohup with SIGHUP; the commands under test
# would inherit that, and not hear of a Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def _no_settings_of_this_machine() -> Iterator[None]:
    names = {field.upper() for field in Settings.model_fields} | {f"{field.upper()}_FILE" for field in secret_fields()}
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.upper() in names]:
            patch.delenv(name)
        yield


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No .env and no millrace-data but the test's own."""
    monkeypatch.chdir(tmp_path)
    get_settings.cache_clear()
    yield
    get_settings.cache_clear()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data")


@pytest.fixture
def ledger(settings: Settings) -> Iterator[Ledger]:
    with contextlib.closing(Ledger.open(settings)) as ledger:
        yield ledger


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """A PostgreSQL server of this test run: the URL of its database `postgres`."""
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    found = str(programs[-1]) if programs else shutil.which("initdb")
    if found is None:
        pytest.skip("no PostgreSQL server is installed")
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="millrace-pg-"))  # a short path: it holds a Unix socket
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        user: dict[str, str] = {}
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            try:
                account = pwd.getpwnam("postgres")
            except KeyError:
                pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
            os.chown(folder, account.pw_uid, account.pw_gid)
            user = {"user": "postgres"}
        data, control = folder / "data", Path(found).with_name("pg_ctl")
        _run([found, "-D", str(data), "-U", "postgres", "-A", "trust", "--no-sync", "-E", "UTF8"], folder, **user)
        options = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off -c max_connections=50"
        _run([str(control), "-D", str(data), "-w", "-l", str(folder / "log"), "-o", options, "start"], folder, **user)
        stack.callback(_run, [str(control), "-D", str(data), "-m", "immediate", "stop"], folder, **user)
        yield f"postgresql+psycopg://postgres@/postgres?host={folder}"


def _run(command: list[str], folder: Path, **options: str) -> None:
    # Not pipes: the server would hold them open.
    with (folder / "output").open("w+b") as output:
        code = subprocess.run(command, cwd=folder, stdout=output, stderr=output, timeout=60, check=False, **options)
        output.seek(0)
        assert code.returncode == 0, f"{command}: {output.read().decode()}"
