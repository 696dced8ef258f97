"""F11: producers that are newer than the workers. What old workers do not know is kept, and runs when new ones are there."""

from __future__ import annotations

import subprocess
import sys

import pytest
import redis
from celery import Celery

from millrace import dead_letters
from millrace.settings import Settings
from tests.services import celery_worker, environment, redis_server, until

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def test_a_deploy_in_which_the_producers_come_first(tmp_path):
    """Tasks that the old worker does not know, or not like this, run when the new one is there."""
    old, new = tmp_path / "old", tmp_path / "new"
    for folder, arguments, more in ((old, "name", ""), (new, "name, polite=False", '@app.task(name="g.part")\n')):
        folder.mkdir()
        (folder / "greetings.py").write_text(
            "from worker.app import app\n"
            f'@app.task(name="g.greet", ignore_result=False)\ndef greet({arguments}):\n    return f"{{name}} {{locals()}}"\n'
            + (more and f"{more}def part(name):\n    open('parted', 'w').write(name)\n")
        )
    with redis_server(tmp_path) as url, redis.Redis.from_url(url, decode_responses=True) as client:
        settings = Settings(redis_url=url)
        plain = Celery(broker=url, backend=url)
        arguments = ("-c", "1", "-Q", "celery", "-I", "greetings", "--without-mingle", "--without-gossip")
        with celery_worker(old, *arguments, redis_url=url):
            greeting = plain.send_task("g.greet", ["Ada"], {"polite": True}, queue="celery")
            parting = plain.send_task("g.part", ["Ada"], queue="celery")
            until(lambda: dead_letters.count(client, settings) == 2, "two letters")
        codes = {letter.id: letter.code for letter in dead_letters.letters(client, settings)}
        assert codes == {greeting.id: "wrong_arguments", parting.id: "unknown_task"}
        with celery_worker(new, *arguments, redis_url=url):
            retried = subprocess.run(
                [sys.executable, "-m", "millrace", "dlq", "retry", "--all"],
                env=environment(redis_url=url),
                capture_output=True,
                text=True,
                check=True,
            )
            assert retried.stderr == "Sent again: 2 dead letters.\n"
            until((new / "parted").exists, "the task with the new name")
            until(lambda: plain.AsyncResult(greeting.id).successful(), "the task with the new argument")
            assert "True" in plain.AsyncResult(greeting.id).get()
        assert dead_letters.count(client, settings) == 0
        plain.close()
