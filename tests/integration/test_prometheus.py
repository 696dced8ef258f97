"""A real Prometheus with our configuration finds everything that the dashboard and the alerts ask for."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from celery import Celery

from tests.cli import batch_file
from tests.scripted_engine import scripted_engine
from tests.services import ROOT, celery_worker, free_port, redis_server, until

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

DOCKER = ROOT / "docker"
DASHBOARD = json.loads((DOCKER / "grafana/dashboards/millrace.json").read_text())
ALERTS = yaml.safe_load((DOCKER / "alerts.yml").read_text())["groups"][0]["rules"]
KEY = "engine-key"
#: What a selector finds only on another engine, or where Redis has a limit.
ELSEWHERE = ("vllm:", "millrace_trouble")

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")), reason="Prometheus is not installed"
)


def queries() -> list[tuple[str, str]]:
    """Return (panel's title, query) of every query of the dashboard."""
    return [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]


class Prometheus:
    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **query: str) -> Any:
        try:
            with urllib.request.urlopen(f"{self.url}{path}?{urllib.parse.urlencode(query)}", timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 503:  # it is starting
                    return None
                raise AssertionError(f"{query}: {error.read().decode()}") from None
        except OSError:
            return None

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Return (labels, value) of each series that an expression gives now."""
        found = self.get("/api/v1/query", query=expression)
        return [(one["metric"], float(one["value"][1])) for one in found["result"]]

    def alerts(self) -> dict[str, str]:
        """Return each rule's state: inactive, pending or firing."""
        (group,) = self.get("/api/v1/rules")["groups"]
        assert [rule for rule in group["rules"] if rule["health"] == "err"] == []
        return {rule["name"]: rule["state"] for rule in group["rules"]}


@contextlib.contextmanager
def prometheus(folder: Path, **environment: object) -> Iterator[Prometheus]:
    """Run docker/prometheus.sh; everything is looked at each second."""
    shutil.copytree(DOCKER, folder / "docker")
    config = folder / "docker" / "prometheus.yml"
    config.write_text(config.read_text().replace("15s", "1s"))
    port = free_port()
    variables = {"PATH": os.environ["PATH"], "TMPDIR": str(folder), "PROMETHEUS_PORT": str(port)}
    variables |= {name: str(value) for name, value in environment.items()}
    command = ["sh", str(folder / "docker" / "prometheus.sh"), f"--storage.tsdb.path={folder / 'data'}"]
    with (
        (folder / "prometheus.log").open("wb") as log,
        subprocess.Popen(command, env=variables, stdout=log, stderr=log, cwd=folder) as process,
    ):
        try:
            found = Prometheus(f"http://127.0.0.1:{port}")
            said = (folder / "prometheus.log").read_text
            until(lambda: found.get("/api/v1/targets") or process.poll() is not None, said)
            assert process.poll() is None, said()
            yield found
        finally:
            process.terminate()


@needs_prometheus
def test_every_query_finds_what_it_asks_for(tmp_path: Path) -> None:
    (tmp_path / "prometheus").mkdir()
    metrics_port = free_port()
    rules = [
        {"when": {"contains": "poison"}, "then": {"do": "status", "status": 400}},
        {"when": {"contains": "Question", "every": 10}, "then": {"do": "status", "status": 503}},
    ]
    with (
        redis_server(tmp_path) as redis,
        scripted_engine(slots=4, api_key=KEY, tokens_per_second=40, rules=rules) as engine,
        celery_worker(
            tmp_path,
            *("--concurrency", "2"),
            redis_url=redis,
            llm_server_url=engine.url,
            llm_api_key=KEY,
            metrics_port=metrics_port,
            batch_processes=1,
        ),
        prometheus(
            tmp_path / "prometheus",
            METRICS_PORT=metrics_port,
            LLM_PORT=engine.root.rpartition(":")[2],
            LLM_API_KEY=KEY,
        ) as server,
        Celery(broker=redis, backend=redis) as plain,
    ):
        # The worker and the engine, with its key; the four places of container workers are down.
        until(lambda: sum(value for _, value in server.query("up")) == 2, lambda: str(server.get("/api/v1/targets")))
        (tmp_path / "q.jsonl").write_text(batch_file(150, model="scripted"))
        plain.send_task("batch.plan", args=[str(tmp_path / "q.jsonl")], queue="batch").get(timeout=90)
        for text in ["one", "poison", *["two"] * 30]:
            plain.send_task("inference.chat", args=[[{"role": "user", "content": text}]], queue="interactive")

        for title, expression in queries():
            for text in ("poison", "two"):  # so that no rate runs dry, however long the queries take
                plain.send_task("inference.chat", args=[[{"role": "user", "content": text}]], queue="interactive")
            asked = expression.replace("$__rate_interval", "10s")
            if title == "Redis's memory" and "limit" in asked:  # the test's Redis has none
                asked = asked.removesuffix(" > 0")

            def answered(asked: str = asked) -> bool:
                found = server.query(asked)
                return bool(found) and not any(value != value for _, value in found)  # NaN

            until(answered, f"an answer to {title}: {asked}", 40)
        for selector in selectors():
            until(lambda selector=selector: server.query(selector), f"series of {selector}")

        states = until(lambda: (found := server.alerts()) and "unknown" not in found.values() and found, "rules")
        assert states["MillraceEngineDown"] == states["MillraceNoWorker"] == states["MillraceRedisDown"] == "inactive"
        engine.kill()
        until(lambda: server.alerts()["MillraceEngineDown"] == "pending", lambda: str(server.alerts()))


def selectors() -> list[str]:
    """Return every selector of a metric in the dashboard and the alerts, with its labels."""
    expressions = [expression for _, expression in queries()] + [rule["expr"] for rule in ALERTS]
    pattern = r"\b(?:millrace_|llamacpp:|vllm:)\w+(?:\{[^}]*\})?"
    found = {selector for expression in expressions for selector in re.findall(pattern, expression)}
    return sorted(selector for selector in found if not selector.startswith(ELSEWHERE))


#: Series as promtool writes them, one value a minute, and the alerts that fire after the minutes given.
CASES: list[tuple[dict[str, str], int, set[str]]] = [
    ({}, 2, {"MillraceNoWorker"}),
    ({'millrace_workers{queue="batch"}': "2 0x20", 'millrace_up{part="redis"}': "1x20"}, 3, {"MillraceNoWorker"}),
    ({'millrace_workers{queue="batch"}': "2x20", 'millrace_up{part="redis"}': "1x20"}, 9, set()),
    ({'millrace_up{part="redis"}': "1 0x20"}, 3, {"MillraceRedisDown"}),
    ({'millrace_up{part="ledger"}': "1 0x20"}, 3, {"MillraceLedgerDown"}),
    ({'millrace_up{part="engine"}': "1 0x20"}, 5, set()),
    ({'millrace_up{part="engine"}': "1 0x20"}, 7, {"MillraceEngineDown"}),
    ({'millrace_up{part="redis"}': "1x20", 'millrace_trouble{code="disk_full"}': "1x20"}, 7, {"MillraceRowsWait"}),
    ({'millrace_up{part="redis"}': "1x20", 'millrace_trouble{code="engine_timeout"}': "1x20"}, 7, set()),
    (
        {'millrace_up{part="redis"}': "1x20", 'millrace_queue_oldest_age_seconds{queue="interactive"}': "61+60x20"},
        3,
        {"MillraceInteractiveWaits"},
    ),
    (
        {
            'millrace_up{part="engine"}': "1x60",
            'millrace_batches{status="in_progress"}': "1x60",
            'millrace_batch_requests_total{model="m",status="completed"}': "0+9x5 45x60",
        },
        50,
        {"MillraceBatchStands"},
    ),
    (
        {
            'millrace_up{part="engine"}': "1x60",
            'millrace_batch_requests_total{model="m",status="completed"}': "0+70x60",
            'millrace_batch_requests_total{model="m",status="failed"}': "0+30x60",
        },
        30,
        {"MillraceRowsFail"},
    ),
    (
        {
            'millrace_up{part="redis"}': "1x20",
            "millrace_redis_memory_bytes": "900x20",
            "millrace_redis_memory_limit_bytes": "1000x20",
        },
        7,
        {"MillraceRedisMemory"},
    ),
    (
        {
            'millrace_up{part="redis"}': "1x20",
            "millrace_redis_memory_bytes": "900x20",
            "millrace_redis_memory_limit_bytes": "0x20",
        },
        7,
        set(),
    ),
    (
        {
            'millrace_up{part="redis"}': "1x20",
            "millrace_data_dir_free_bytes": "9x20",
            "millrace_data_dir_size_bytes": "100x20",
        },
        7,
        {"MillraceDiskFull"},
    ),
]


@needs_prometheus
def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    assert {name for _, _, fired in CASES for name in fired} == {rule["alert"] for rule in ALERTS}
    for series, minutes, fired in CASES:
        assert firing(tmp_path, series, minutes) == fired, (series, minutes)


def firing(folder: Path, series: dict[str, str], minutes: int) -> set[str]:
    """Return the alerts that fire after so many minutes, as promtool finds it."""
    names = [rule["alert"] for rule in ALERTS]
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        # No alert is without labels, so promtool objects to each, and tells what it got instead.
        "alert_rule_test": [{"eval_time": f"{minutes}m", "alertname": name, "exp_alerts": [{}]} for name in names],
    }
    (folder / "test.yml").write_text(yaml.safe_dump({"rule_files": [str(DOCKER / "alerts.yml")], "tests": [test]}))
    command = ["promtool", "test", "rules", str(folder / "test.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    told = dict(re.findall(r"alertname: (\w+).*?got:(\[.*?\])(?=\n|$)", done.stdout + done.stderr, re.DOTALL))
    assert list(told) == names, done
    return {name for name, got in told.items() if got != "[]"}


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    (source,) = yaml.safe_load((DOCKER / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((DOCKER / "grafana/provisioning/dashboards/millrace.yml").read_text())["providers"]
    compose = yaml.safe_load((ROOT / "docker-compose.monitoring.yml").read_text())["services"]["grafana"]
    mounts = [volume.split(":")[1] for volume in compose["volumes"]]
    assert provider["options"]["path"] in mounts
    assert compose["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"].startswith(provider["options"]["path"])
    assert DASHBOARD["uid"] == "millrace"
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["datasource"] == {"type": "prometheus", "uid": source["uid"]}
        assert panel["type"] in ("stat", "timeseries", "state-timeline")
        assert panel["fieldConfig"]["defaults"]["unit"] in ("short", "s", "bytes")
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"]
    places = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(places)) == len(places), "panels overlap"
    assert max(x for x, _ in places) < 24
