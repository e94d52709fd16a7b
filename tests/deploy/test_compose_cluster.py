"""The compose file of several replicas: in agreement with the other, with itself, with NATS and HAProxy."""

from __future__ import annotations

import http.server
import os
import re
import shutil
import subprocess
import threading
from collections import Counter

import pytest
import yaml
from clusters import check, jetstream, loaded, nats_accepts, needs_nats_server
from dockerfile import ROOT, setting
from support import Process, free_port, request, running, wait_until
from test_compose import seconds

from fastdist.config import load
from fastdist.supervisor.processes import LATE

DEPLOY = ROOT / "deploy"
PLAIN = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
COMPOSE = yaml.safe_load((DEPLOY / "compose.cluster.yaml").read_text())
SERVICES = {
    name: PLAIN["services"][service["extends"]["service"]] | service if "extends" in service else service
    for name, service in COMPOSE["services"].items()
}
NATS = ("nats-1", "nats-2", "nats-3")
REPLICAS = ("fastdist-1", "fastdist-2")
CONFIG = DEPLOY / "compose" / "cluster.toml"
NATS_CONF = (DEPLOY / "compose" / "nats.conf").read_text()
HAPROXY_CFG = (DEPLOY / "compose" / "haproxy.cfg").read_text()
HAPROXY = shutil.which("haproxy", path=os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin")
needs_haproxy = pytest.mark.skipif(HAPROXY is None, reason="haproxy is not installed; scripts/peers.sh installs it")


def test_all_services_of_the_cluster_exist():
    assert set(SERVICES) == {*NATS, *REPLICAS, "balancer", "a1", "a2", "a3", "a4", "prometheus", "grafana"}
    assert {each["extends"]["file"] for each in SERVICES.values() if "extends" in each} == {"compose.yaml"}


def test_each_server_has_a_name_and_a_disk():
    names = [SERVICES[name]["environment"]["SERVER_NAME"] for name in NATS]
    assert names == list(NATS)
    assert [SERVICES[name]["volumes"][-1] for name in NATS] == [f"{name}:/data" for name in NATS]
    assert "server_name: $SERVER_NAME" in NATS_CONF
    assert re.findall(r"nats://([\w-]+):6222", NATS_CONF) == list(NATS)


def test_replicas_keep_nothing_on_a_disk():
    path = loaded(CONFIG).queue.path
    for name in REPLICAS:
        assert [volume for volume in SERVICES[name]["volumes"] if not volume.startswith("./")] == []
        assert [each.partition(":")[0] for each in SERVICES[name]["tmpfs"]] == [path]


def test_the_configuration_passes_the_check():
    assert check(CONFIG) == ""
    assert [server.removeprefix("nats://") for server in jetstream(CONFIG).servers] == [f"{name}:4222" for name in NATS]


def test_password_is_the_same_everywhere():
    passwords = {SERVICES[name]["environment"]["NATS_PASSWORD"] for name in NATS}
    passwords |= {SERVICES[name]["environment"]["FASTDIST_JETSTREAM__PASSWORD"] for name in REPLICAS}
    assert len(passwords) == 1
    assert passwords.pop().startswith("${NATS_PASSWORD")
    assert "password: $NATS_PASSWORD\n" in NATS_CONF
    assert f"user: {jetstream(CONFIG).user}\n" in NATS_CONF


def test_servers_store_what_replicas_send():
    server, stream = loaded(CONFIG).server, jetstream(CONFIG)
    assert int(re.search(r"max_payload: (\d+)MB", NATS_CONF)[1]) << 20 > server.max_body
    assert int(re.search(r"max_file_store: (\d+)GB", NATS_CONF)[1]) << 30 > 2 * stream.max_bytes
    assert re.search(r"^  sync_interval: always$", NATS_CONF, re.MULTILINE)


@needs_nats_server
def test_nats_server_takes_its_configuration():
    assert "configuration file" in nats_accepts(DEPLOY / "compose" / "nats.conf")


def test_configured_analyzers_are_services():
    assert loaded(CONFIG).analyzers == load(DEPLOY / "compose" / "fastdist.toml", {}, {}).config.analyzers


def test_there_is_time_to_drain():
    drain = loaded(CONFIG).server.drain_timeout
    for name in REPLICAS:
        assert seconds(SERVICES[name]["stop_grace_period"]) >= drain + LATE
        assert int(SERVICES[name]["environment"]["WORKER_COUNT"]) == SERVICES[name]["cpus"]


def test_prometheus_scrapes_both_replicas():
    plain, cluster = (
        yaml.safe_load((DEPLOY / "prometheus" / f"prometheus{kind}.yml").read_text()) for kind in ("", ".cluster")
    )
    (job,) = cluster["scrape_configs"]
    port = setting("fastdist", "EXPOSE").text
    assert job["static_configs"][0].pop("targets") == [f"{name}:{port}" for name in REPLICAS]
    del plain["scrape_configs"][0]["static_configs"][0]["targets"]
    assert cluster == plain
    assert "--config.file=/etc/prometheus/prometheus.cluster.yml" in SERVICES["prometheus"]["command"]
    assert SERVICES["prometheus"]["command"][1:] == PLAIN["services"]["prometheus"]["command"][1:]


def test_promtool_accepts_its_configuration(promtool):
    command = [promtool, "check", "config", str(DEPLOY / "prometheus" / "prometheus.cluster.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# -------------------------------------------------------------------------------------------------------- the balancer


class Replica(http.server.ThreadingHTTPServer):
    """Stands in for one: ready or not, and it may close connections on requests that it has read."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.ready, self.closes = True, False
        self.seen = Counter()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, *_):
        """The balancer resets the connections of its checks."""


class Answers(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer(200 if self.server.ready else 503)

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen[self.headers["Idempotency-Key"]] += 1
        if self.server.closes:
            self.close_connection = True
            return
        self.answer(202)

    def answer(self, status):
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def balanced(tmp_path):
    """Return the balancer's port and what stands behind it."""
    replicas = [Replica() for _ in REPLICAS]
    port = free_port()
    text = HAPROXY_CFG.replace("bind :3000", f"bind 127.0.0.1:{port}")
    for name, replica in zip(REPLICAS, replicas, strict=True):
        assert f"server {name} {name}:3000\n" in text
        text = text.replace(f"{name} {name}:3000", f"{name} 127.0.0.1:{replica.server_port}")
    file = tmp_path / "haproxy.cfg"
    file.write_text(text)
    with running(Process([HAPROXY, "-f", str(file)])):

        def answers():
            try:
                return request(port, "GET", "/balancer")[0] == 200
            except OSError:
                return False

        wait_until(answers, "the balancer")
        yield port, replicas
    for replica in replicas:
        replica.shutdown()
        replica.server_close()


def post(port, key):
    return request(port, "POST", "/logs", b"{}", {"Content-Type": "application/json", "Idempotency-Key": key})[0]


@needs_haproxy
def test_haproxy_takes_its_configuration():
    command = [HAPROXY, "-c", "-f", str(DEPLOY / "compose" / "haproxy.cfg")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^    server (\S+)", HAPROXY_CFG, re.MULTILINE) == list(REPLICAS)
    assert "./compose/haproxy.cfg:/usr/local/etc/haproxy/haproxy.cfg:ro" in SERVICES["balancer"]["volumes"]


@needs_haproxy
def test_balancer_asks_who_is_ready(balanced):
    port, (first, second) = balanced
    first.ready = False

    def only_the_other():
        first.seen.clear()
        assert {post(port, f"p-{number}") for number in range(20)} == {202}
        return not first.seen

    wait_until(only_the_other, "packets for the other only")
    first.ready, second.ready = True, False
    wait_until(lambda: post(port, "again") == 202 and first.seen["again"], "packets for the first")
    first.ready = False
    wait_until(lambda: request(port, "GET", "/balancer")[0] == 503, "that none is left")
    assert post(port, "nowhere") == 503


@needs_haproxy
def test_balancer_sends_no_packet_twice(balanced):
    """What was sent may be stored: only its emitter may send it again, under its key."""
    port, (first, second) = balanced
    first.closes = second.closes = True
    for number in range(20):
        assert post(port, f"p-{number}") == 502
    assert first.seen + second.seen == {f"p-{number}": 1 for number in range(20)}


@needs_haproxy
def test_balancer_passes_over_who_is_gone(balanced):
    port, (first, _) = balanced
    first.shutdown()
    first.server_close()
    assert {post(port, f"p-{number}") for number in range(20)} == {202}
