"""A worker's page of metrics, as tests read it."""

from __future__ import annotations

import urllib.request


def page(port: int, host: str = "127.0.0.1") -> str:
    """Return the page; "" while nobody answers."""
    try:
        with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=10) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            text: str = answer.read().decode()
            return text
    except OSError:
        return ""


def values(text: str) -> dict[str, float]:
    """Return each series of a page with its value; each is there once."""
    pairs = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    found = {series: float(value) for series, value in pairs}
    assert len(found) == len(pairs)
    return found


def scrape(port: int, host: str = "127.0.0.1") -> dict[str, float]:
    """Return what a worker exposes now; nothing while it does not answer."""
    return values(page(port, host))
