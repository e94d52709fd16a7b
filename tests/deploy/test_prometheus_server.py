"""A real Prometheus reads a real distributor: every panel shows something, and alerts fire when something is wrong."""

from __future__ import annotations

import http.server
import json
import re
import shutil
import threading
from urllib.parse import quote

import pytest
import yaml
from dockerfile import ROOT
from stream_exposition import stream_exposition
from support import Distributor, Emitter, Mocks, Process, free_port, get_json, request, running, wait_until
from test_grafana import PANELS, plain

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed; scripts/peers.sh does"),
]
RULES = ROOT / "deploy" / "prometheus" / "fastdist.rules.yml"


class StreamMetrics(http.server.ThreadingHTTPServer):
    """Tells what a replica tells of the stream that it shares with others; all that counts grows with each look."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Exposition)
        told = re.split(r"^(?=# HELP )", stream_exposition(), flags=re.MULTILINE)
        of_streams = re.compile(r"# HELP fastdist_(stream_|packets_duplicate)")
        self.text = "".join(filter(of_streams.match, told))
        self.looks = 0
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def exposition(self) -> str:
        self.looks += 1
        counting = r"^(\w+(?:_total|_bucket|_sum|_count)\S*) (\S+)$"
        return re.sub(counting, lambda line: f"{line[1]} {float(line[2]) + self.looks}", self.text, flags=re.MULTILINE)


class Exposition(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.end_headers()
        self.wfile.write(self.server.exposition().encode())

    def log_message(self, *_) -> None:
        pass


class Prometheus(Process):
    """Prometheus with our rules, so impatient that tests need not wait for minutes."""

    def __init__(self, folder, *targets: int) -> None:
        self.port = free_port()
        configuration = yaml.safe_load((RULES.parent / "prometheus.yml").read_text())
        configuration["global"] = {"scrape_interval": "1s", "evaluation_interval": "250ms"}  # a scrape may last 1 s
        configuration["scrape_configs"][0]["static_configs"] = [
            {"targets": [f"127.0.0.1:{target}" for target in targets]}
        ]
        configuration["rule_files"] = ["rules.yml"]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
        (folder / "rules.yml").write_text(re.sub(r"for: \d+m", "for: 1s", RULES.read_text()))
        super().__init__(
            [
                "prometheus",
                f"--config.file={folder}/prometheus.yml",
                f"--storage.tsdb.path={folder}/tsdb",
                f"--web.listen-address=127.0.0.1:{self.port}",
            ]
        )

    def ask(self, expression: str) -> list:
        return get_json(self.port, f"/api/v1/query?query={quote(expression)}")["data"]["result"]

    def firing(self) -> set[str]:
        """Return the alerts that fire now."""
        return {row["metric"]["alertname"] for row in self.ask('ALERTS{alertstate="firing"}')}

    def wait_until_ready(self) -> None:
        def ready() -> bool:
            try:
                return bool(self.ask('up{job="fastdist"} == 1'))
            except (OSError, AssertionError, json.JSONDecodeError):
                return False

        wait_until(ready, "Prometheus reads the distributor")


@pytest.fixture(scope="module")
def everything(tmp_path_factory, over_tls):
    """Return Prometheus, a distributor with a bit of everything going on, and its mock analyzers."""
    folder = tmp_path_factory.mktemp("prometheus")
    mocks = Mocks()
    mocks.set("A1", failureRate=0.3)
    mocks.set("A3", failureRate=0.3, failureStatus=422)
    distributor = Distributor(folder, mocks, {"health": {"fall": 1000}}, own={"A2": over_tls(folder)})
    stream = StreamMetrics()
    prometheus = Prometheus(folder, distributor.port, stream.server_port)
    with running(mocks, distributor, prometheus):
        prometheus.wait_until_ready()
        emitter = Emitter(distributor.port, 4, pause=0.02).start()
        emitter.wait_for(50)
        assert request(distributor.port, "PATCH", "/analyzers/A4", b'{"state": "draining"}')[0] == 200
        yield prometheus, distributor, mocks
        emitter.stop()
    stream.shutdown()
    stream.server_close()


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_shows_something(panel, everything):
    prometheus, distributor, _ = everything

    def shown() -> bool:
        assert distributor.post(b"[]")[0] == 400
        for body, status in ((b'{"message": "one"}', 200), (b"{", 400)):
            assert request(distributor.port, "POST", "/ingest", body)[0] == status
        # Of a target that shows whom something is true of (== 1, > 0) there is the figure, and perhaps nothing else.
        expressions = [re.sub(r" (== 1|> 0)$", "", plain(target["expr"])) for target in panel["targets"]]
        return all(map(prometheus.ask, expressions))

    wait_until(shown, f"figures of {panel['title']}")


def test_alerts_are_evaluated_without_errors(everything):
    prometheus, _, _ = everything

    def rules() -> list:
        groups = get_json(prometheus.port, "/api/v1/rules")["data"]["groups"]
        found = [rule for group in groups for rule in group["rules"]]
        return found if all(rule["health"] != "unknown" for rule in found) else []

    found = wait_until(rules, "all rules are evaluated")
    assert len(found) == len(re.findall("alert:", RULES.read_text()))
    assert [rule for rule in found if rule["health"] != "ok"] == []


def test_alerts_fire_on_a_service_in_trouble(everything):
    prometheus, distributor, _ = everything
    for expected in ("FastdistAnalyzerFailing", "FastdistDeadLetters"):
        wait_until(lambda name=expected: name in prometheus.firing(), expected, 60)
    assert not {"FastdistDown", "FastdistNotReady", "FastdistNoAnalyzer"} & prometheus.firing()
    distributor.kill_all()
    wait_until(lambda: "FastdistDown" in prometheus.firing(), "FastdistDown", 60)
