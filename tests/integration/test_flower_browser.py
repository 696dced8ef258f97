"""Flower in a real browser: log in, see the worker, find a finished task and the queues' depths."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.flower import LOGIN, WORKER, Watched, watched
from tests.services import until

pytest.importorskip("flower", reason="the extra `flower` is not installed")
pytest.importorskip("selenium", reason="selenium is not installed")
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = ("disable-background-networking", "disable-component-update", "disable-sync", "disable-quic")
#: Where the picture of docs/flower.md goes, when it is to be made anew.
PICTURE = os.environ.get("FLOWER_PICTURE", "")


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Chrome]:
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("Chromium and its chromedriver are not installed")
    options = ChromeOptions()
    options.binary_location = program
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "no-first-run", *QUIET, "window-size=1280,1000"):
        options.add_argument(f"--{argument}")
    options.add_argument(f"--user-data-dir={tmp_path / 'browser'}")
    chrome = Chrome(options, ChromeService(driver, log_output=str(tmp_path / "chromedriver.log")))
    try:
        yield chrome
    finally:
        chrome.quit()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Watched]:
    with watched(tmp_path) as site:
        yield site


def rows(browser: Chrome, table: str) -> list[list[str]]:
    """Return the texts of a table's cells."""
    return browser.execute_script(
        "return [...document.querySelectorAll(`#${arguments[0]} tbody tr`)]"
        ".map(row => [...row.cells].map(cell => cell.textContent.trim()))",
        table,
    )


def test_a_person_finds_what_they_look_for(site: Watched, browser: Chrome) -> None:
    place = f"127.0.0.1:{site.flower.port}"
    prompts = ["Name a river.", "Name a lake.", "Name a mill."]
    for prompt in prompts:
        message = {"role": "user", "content": prompt}
        sent = site.plain.send_task("inference.chat", args=[[message]], queue="interactive")
        sent.get(timeout=90)
    for queue, priority, count in (("batch", 3, 24), ("batch", 0, 3), ("batch", 9, 5), ("models", 3, 1)):
        for _ in range(count):
            site.plain.send_task("nobody.runs.this", queue=queue, priority=priority, ignore_result=True)
    site.flower.task(sent.id, "SUCCESS")
    pictures = []

    def see(page: str, seen: Callable[[list[list[str]]], bool]) -> None:
        browser.get(f"http://{place}/{page}")
        table = f"{page}-table" if page != "broker" else "queue-table"
        until(lambda: seen(rows(browser, table)), lambda: f"{page}: {rows(browser, table)}")
        assert not [prompt for prompt in prompts if prompt in browser.page_source]
        parts = ("nav.app-navbar", ".page-section") if not pictures else (".page-section",)
        pictures.extend(browser.find_element(By.CSS_SELECTOR, part).screenshot_as_base64 for part in parts)

    browser.get(f"http://{place}/")
    assert "Flower" not in browser.page_source
    browser.get(f"http://{LOGIN}@{place}/")
    see("workers", lambda found: [row[:2] for row in found] == [[WORKER, "Online"]])
    see(
        "tasks",
        lambda found: any(row[0] == "inference.chat" and sent.id in row[1] and row[2] == "SUCCESS" for row in found),
    )
    depths = {"batch": "32", "celery": "0", "interactive": "0", "maintenance": "0", "models": "1"}
    see("broker", lambda found: {row[0]: row[1] for row in found} == depths)
    if PICTURE:
        save_picture(browser, pictures)


def save_picture(browser: Chrome, parts: list[str]) -> None:
    """Write the parts, PNGs in base64, below each other."""
    browser.get("about:blank")
    images = "".join(f"<img style='display: block' src='data:image/png;base64,{part}'>" for part in parts)
    page = f"<div style='width: min-content'>{images}</div>"
    browser.execute_script("document.body.style.margin = 0; document.body.innerHTML = arguments[0]", page)
    until(lambda: browser.execute_script("return [...document.images].every(image => image.complete)"), "the parts")
    browser.set_window_size(1400, 200 + browser.execute_script("return document.body.scrollHeight"))
    Path(PICTURE).write_bytes(browser.find_element(By.TAG_NAME, "div").screenshot_as_png)
