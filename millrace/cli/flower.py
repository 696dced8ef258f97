"""`millrace flower`: Celery's web monitor, with a login and without prompts."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Annotated

import typer

from millrace import presence
from millrace.cli.output import say
from millrace.errors import MillraceError, SettingsError
from millrace.settings import Settings, get_settings


def flower(
    listen: Annotated[str, typer.Option(help="Address to listen on; in a container 0.0.0.0.")] = "127.0.0.1",
) -> None:
    """Run Flower, which shows workers, tasks and queues in a browser, until Ctrl-C."""
    settings = get_settings()
    login = _login(settings)
    presence.ping(settings)
    asyncio.run(_flower(settings, login, listen))


def _login(settings: Settings) -> str:
    login = settings.flower_basic_auth.get_secret_value() if settings.flower_basic_auth else ""
    user, _, password = login.partition(":")
    # Flower cannot compare others than ASCII.
    if not user or not password or not login.isascii():
        raise SettingsError(
            "FLOWER_BASIC_AUTH is not set to a user:password of ASCII characters.",
            "Set it in .env: it is the login that the browser asks for.",
            code="flower_login",
        )
    return login


async def _flower(settings: Settings, login: str, listen: str) -> None:
    try:
        from worker.flower import serving
    except ModuleNotFoundError as error:
        raise MillraceError(
            f"Flower needs the package {error.name}, which is not installed.",
            "Run pip install 'millrace[flower]'.",
            code="extra_missing",
        ) from error
    stopping = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    async with serving(settings, login, listen):
        may = "only shows" if settings.flower_read_only else "may end tasks and workers"
        say(f"Flower is at http://{listen}:{settings.flower_port} and {may}. Ctrl-C ends it.")
        await stopping.wait()
    # A question to workers is repeated until Redis is back, in a thread that Python would wait for.
    os._exit(0)
