"""The ledger's database: SQLite or PostgreSQL, opened, brought up to date, and its errors in words."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Self

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

from millrace.errors import MillraceError, NotFound, StorageError, Unreachable
from millrace.settings import Settings, hide_password

#: The schema this code knows: the newest file in migrations/versions.
REVISION = "0002"
_MIGRATION_LOCK = 0x6D696C6C  # PostgreSQL's advisory lock of those who migrate; any number that is ours
LOCK_WAIT = 15.0  # seconds a writer waits for another one before the ledger counts as locked


class Database:
    """An open database. Its methods may be called from any thread."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine

    @classmethod
    def open(cls, settings: Settings) -> Self:
        """Open the ledger and bring its tables up to date.

        Raises:
            Unreachable: It does not answer (ledger_unreachable), is held by someone else
                (ledger_locked) or was written by a newer Millrace (ledger_newer).
            StorageError: Its folder cannot be written.
        """
        url = sa.make_url(settings.ledger_url)
        if url.get_backend_name() == "sqlite":
            _make_folder(Path(url.database or ""))
        database = cls.connect(settings)
        try:
            database._migrate()
        except BaseException:
            database.close()
            raise
        return database

    @classmethod
    def there(cls, settings: Settings) -> Self | None:
        """Open the ledger that there is, as `open` does; None where none was made yet. Nothing is made.

        Raises:
            StorageError: DATA_DIR is no folder; or see `open`.
            NotFound: Batches lie in DATA_DIR, and the ledger that knew them does not (ledger_missing).
            Unreachable: See `open`.
        """
        if settings.data_dir.exists() and not settings.data_dir.is_dir():
            raise StorageError(f"DATA_DIR is {settings.data_dir}, which is no folder.", "Name a folder.")
        url = sa.make_url(settings.ledger_url)
        if url.get_backend_name() != "sqlite" or Path(url.database or "").exists():
            return cls.open(settings)
        batches = settings.data_dir / "batches"
        if found := sum(1 for _ in batches.glob("batch_*")):
            raise NotFound(
                f"{url.database} is not there, and it knew the {found} batches whose files lie in {batches}.",
                "Restore it (`millrace restore`), or set DATABASE_URL to where it is.",
                code="ledger_missing",
            )
        return None

    @classmethod
    def connect(cls, settings: Settings) -> Self:
        """Return a ledger as it stands, its tables unchecked.

        Raises:
            MillraceError: The driver of PostgreSQL is not installed.
        """
        url = sa.make_url(settings.ledger_url)
        if url.get_backend_name() == "sqlite":
            engine = sa.create_engine(url, connect_args={"timeout": LOCK_WAIT, "check_same_thread": False}, pool_size=8)
            sa.event.listen(engine, "connect", _on_sqlite_connect)
            sa.event.listen(engine, "begin", _on_sqlite_begin)
            return cls(engine)
        try:
            return cls(sa.create_engine(url, pool_pre_ping=True))
        except ImportError as error:
            raise MillraceError(
                "DATABASE_URL names PostgreSQL, but its driver is not installed.",
                "Run pip install 'millrace[postgres]'.",
                code="extra_missing",
            ) from error

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()

    @cached_property
    def address(self) -> str:
        """The ledger's URL without its password."""
        return hide_password(self.engine.url.render_as_string(hide_password=True))

    @contextlib.contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """Yield a connection that only reads: it waits for no writer."""
        with self._errors(), self.engine.connect() as connection:
            connection.execution_options(read_only=True)
            with connection.begin():
                yield connection

    @contextlib.contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """Yield a connection in a transaction that is committed at the end."""
        with self._errors(), self.engine.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OperationalError as error:
            reason = str(error.orig)
            if "locked" in reason or "busy" in reason:
                raise Unreachable(
                    f"The ledger {self.address} is locked by another program.",
                    "Close what holds it (a database browser, a backup) and try again.",
                    code="ledger_locked",
                ) from error
            if "full" in reason:
                raise StorageError(
                    f"The disk that holds the ledger {self.address} is full.",
                    "Free some space and try again; finished rows are kept.",
                    code="disk_full",
                ) from error
            raise Unreachable(
                f"The ledger {self.address} does not answer: {reason.splitlines()[0]}.",
                "Check DATABASE_URL and DATA_DIR; in a container, WORKER_USER must be able to write DATA_DIR.",
                code="ledger_unreachable",
            ) from error
        except DBAPIError as error:
            if not isinstance(error.orig, sqlite3.DatabaseError) or isinstance(error, IntegrityError):
                raise
            raise Unreachable(
                f"{self.address} is no ledger, or a damaged one: {error.orig}.",
                "Restore that file, move it away, or point DATA_DIR elsewhere.",
                code="ledger_unreachable",
            ) from error

    def _migrate(self) -> None:
        # The version is read with plain SQL: importing Alembic costs 100 ms, and almost every start
        # finds the ledger up to date.
        if self.revision() == REVISION:
            return
        with self.write() as connection:
            # A writer's transaction: two processes that start at once migrate one after the other.
            if connection.dialect.name == "postgresql":
                connection.execute(sa.text(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})"))
            current = _current_revision(connection)
            if current is not None and current > REVISION:
                raise Unreachable(
                    f"The ledger {self.address} is of version {current}; this Millrace knows {REVISION}.",
                    "Use the newer Millrace, or another DATA_DIR.",
                    code="ledger_newer",
                )
            if current != REVISION:
                _run_migrations(connection)

    def revision(self) -> str | None:
        """Return the version of its tables; None where there are none."""
        with self.read() as connection:
            return _current_revision(connection)


def _make_folder(database: Path) -> None:
    try:
        database.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # it will hold prompts and answers
    except OSError as error:
        raise StorageError(
            f"The ledger's folder {database.parent} cannot be made: {error.strerror or error}.",
            "Set DATA_DIR to a folder that is yours to write; in a container, WORKER_USER to its owner.",
        ) from error


def _current_revision(connection: sa.Connection) -> str | None:
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    version: str | None = connection.scalar(sa.text("SELECT version_num FROM alembic_version"))
    return version


#: Alembic keeps its context in module globals: one migration at a time in a process.
_MIGRATING = threading.Lock()


def _run_migrations(connection: sa.Connection) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    with _MIGRATING:
        command.upgrade(config, "head")


def _on_sqlite_connect(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # we write BEGIN ourselves, see below
    deadline = time.monotonic() + LOCK_WAIT
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            break
        except sqlite3.OperationalError as error:
            # Two who open a new file at once: SQLite tells one of them so at once, whatever its timeout.
            if "locked" not in str(error) or time.monotonic() >= deadline:
                raise
            time.sleep(0.01)
    # FULL: a shard that is recorded as done stays done after a power cut.
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")


def _on_sqlite_begin(connection: sa.Connection) -> None:
    # IMMEDIATE: a transaction that will write takes its lock first; upgrading a read lock later fails
    # at once with "database is locked" instead of waiting.
    read_only = connection.get_execution_options().get("read_only")
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")
