"""What every test stands on: no settings of the machine, a folder of its own, and the same examples each time."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, configuration
from hypothesis import settings as hypothesis_settings

from millrace.batch.ledger import Ledger
from millrace.settings import Settings, get_settings, secret_fields
from tests.postgres import postgres_server

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
    """The URL of the database `postgres` of this test run's PostgreSQL server."""
    with postgres_server() as server:
        yield server.url
