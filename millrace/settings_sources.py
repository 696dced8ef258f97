"""Where settings come from besides the environment and `.env`: a running stack, and files with secrets."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

from millrace.errors import SettingsError


def stack_file(data_dir: Path) -> Path:
    """Return the file in which a running embedded stack writes what it started."""
    return data_dir / "run" / "stack.json"


def read_stack(data_dir: Path) -> dict[str, Any]:
    """Return what the embedded stack of `data_dir` wrote; empty where none is running.

    It runs as long as its lock is held: a process id would be believed again once another process has it.
    """
    path = stack_file(data_dir)
    try:
        with path.with_suffix(".lock").open("rb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        pass
    return {}


class StackSource(PydanticBaseSettingsSource):
    """What a running embedded stack started, because what `.env` names did not answer."""

    name = "the running embedded stack"

    def __init__(self, settings_cls: type[BaseSettings], before: tuple[PydanticBaseSettingsSource, ...]) -> None:
        super().__init__(settings_cls)
        self._before = before

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        """Return nothing: the values come all at once."""
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        """Return the settings of the stack that runs on this DATA_DIR."""
        data_dir = next(
            (values["data_dir"] for source in self._before if "data_dir" in (values := source())),
            self.settings_cls.model_fields["data_dir"].default,
        )
        return dict(read_stack(Path(data_dir)).get("settings", {}))


class SecretFileSource(PydanticBaseSettingsSource):
    """`<SECRET>_FILE`: a file whose content is the secret, as Docker and systemd hand them out."""

    name = "*_FILE"

    def __init__(self, settings_cls: type[BaseSettings], secrets: list[str]) -> None:
        super().__init__(settings_cls)
        self._secrets = secrets

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        """Return nothing: the values come all at once."""
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        """Return the secrets whose files are named.

        Raises:
            SettingsError: One of the files cannot be read.
        """
        from dotenv import dotenv_values

        found: dict[str, Any] = {}
        dotenv = dotenv_values(".env")
        for field in self._secrets:
            path = os.environ.get(f"{field.upper()}_FILE") or dotenv.get(f"{field.upper()}_FILE")
            if path:
                try:
                    found[field] = Path(path).read_text(encoding="utf-8").strip()
                except (OSError, UnicodeError) as error:
                    raise SettingsError(
                        f"{field.upper()}_FILE names {path}, which cannot be read: {error}.",
                        "Correct the path or make the file readable.",
                    ) from error
        return found
