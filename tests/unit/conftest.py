"""A ledger of either kind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from millrace.batch.ledger import new_id
from millrace.settings import Settings


@pytest.fixture(params=["sqlite", "postgresql"])
def either_settings(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Settings]:
    """Settings of an empty ledger of either kind; PostgreSQL is skipped where there is none."""
    if request.param == "sqlite":
        yield Settings(data_dir=tmp_path / "data")
        return
    server = sa.create_engine(request.getfixturevalue("postgres"), isolation_level="AUTOCOMMIT")
    name = new_id("test")
    # Whoever waits for a lock longer than this is stuck.
    url = server.url.set(database=name).update_query_dict({"options": "-c lock_timeout=10s"})
    with server.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    yield Settings(data_dir=tmp_path / "data", database_url=url.render_as_string(hide_password=False))
    with server.connect() as connection:
        connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
    server.dispose()
