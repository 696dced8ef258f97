"""The file `.env`: what in it nobody would read, or Docker Compose would read otherwise."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from pathlib import Path

from millrace.errors import SettingsError

#: Variables that `.env` may hold for Docker Compose itself; they are not Millrace's.
COMPOSE_PREFIXES = ("COMPOSE_", "DOCKER_", "BUILDKIT_")

#: A line of `.env` with a value in single quotes, and that value as it stands there.
_QUOTED = re.compile(r"[^=]*=\s*'((?:\\'|[^'])*)'")


def refuse_misread(secrets: Collection[str], path: Path = Path(".env")) -> None:
    """Refuse a `.env` of which python-dotenv would leave out lines, or Compose make another secret.

    Args:
        secrets: Fields whose values are secrets, in lower case.
        path: The file; none is well too.

    Raises:
        SettingsError: It cannot be read, or not all of it, or not by both alike.
    """
    from dotenv.parser import parse_stream

    try:
        with path.open(encoding="utf-8") as file:
            bindings = list(parse_stream(file))
    except FileNotFoundError:
        return
    except (OSError, UnicodeError) as error:
        raise SettingsError(f".env cannot be read: {error}.", "Save it as a UTF-8 text, readable for you.") from error
    if wrong := [binding.original.line for binding in bindings if binding.error]:
        raise SettingsError(f"Line {wrong[0]} of .env is no NAME=value.", "Correct it, or begin it with #.")
    if not any(binding.key == "COMPOSE_FILE" and binding.value for binding in bindings):
        return
    for binding in bindings:
        if (binding.key or "").lower() not in secrets:
            continue
        quoted = _QUOTED.match(binding.original.string)
        if quoted is None and "$" in (binding.value or ""):
            raise SettingsError(
                f"{binding.key} in .env has a $, which Docker Compose takes for a variable.",
                "Put the value in single quotes.",
            )
        if quoted and r"\\" in quoted[1]:
            raise SettingsError(
                f"{binding.key} in .env has two backslashes together in single quotes: "
                "Docker Compose reads two of them, and Millrace one.",
                "Choose another, or leave the quotes out where it has no $, # or space.",
            )


def unknown_variables(known: Collection[str], env_file: Path = Path(".env")) -> list[tuple[str, str]]:
    """Return the variables of `.env` that are not among the `known`, each with the nearest of these or ""."""
    if not env_file.is_file():
        return []
    from dotenv import dotenv_values

    return [
        (name, next(iter(difflib.get_close_matches(name.upper(), known, 1)), ""))
        for name in dotenv_values(env_file)
        if name.upper() not in known and not name.upper().startswith(COMPOSE_PREFIXES)
    ]
