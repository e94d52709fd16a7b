"""Replicas behind the balancer of ``deploy/``: restarted one after the other, killed, and no emitter minds."""

from __future__ import annotations

import os
import shutil

import pytest
from replicas import Replicas, compare
from support import BODY, ROOT, Emitter, Mocks, Process, free_port, request, running, wait_until

HAPROXY = shutil.which("haproxy", path=os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin")
pytestmark = pytest.mark.skipif(HAPROXY is None, reason="haproxy is not installed; scripts/peers.sh installs it")
CONFIG = ROOT / "deploy" / "compose" / "haproxy.cfg"
IN_FLIGHT = 4 * 32  # analyzers, delivery.connections


@pytest.fixture
def balanced(tmp_path, one, name):
    """Return two replicas, and the port of the balancer in front of them."""
    mocks = Mocks()
    with running(mocks):
        replicas = Replicas(tmp_path, mocks, one.settings(name, ack_wait=6.0))
        try:
            ports = [free_port(), free_port()]
            for port in ports:
                replicas.start(server={"port": port, "workers": 1})
            balancer = free_port()
            text = CONFIG.read_text().replace("bind :3000", f"bind 127.0.0.1:{balancer}")
            for number, port in enumerate(ports, 1):
                text = text.replace(f"fastdist-{number}:3000", f"127.0.0.1:{port}")
            file = tmp_path / "haproxy.cfg"
            file.write_text(text)
            with running(Process([HAPROXY, "-f", str(file)])):
                wait_until(lambda: answers(balancer), "the balancer")
                yield replicas, balancer
        finally:
            replicas.kill_all()


def answers(port):
    try:
        return request(port, "GET", "/ready")[0] == 200
    except OSError:
        return False


def test_restarts_are_not_seen(balanced):
    replicas, port = balanced
    emitter = Emitter(port, 8, pause=0.005).start()
    emitter.wait_for(200)
    for replica in list(replicas.all):
        assert replica.stop() == 0
        emitter.wait_for(200)
        replicas.start(server={"port": replica.port, "workers": 1}).wait_ready()
        emitter.wait_for(200)
    emitter.stop()
    replicas.wait_at_rest()
    assert {status for status in emitter.answers.values() if status != 202} == set()
    compare([emitter], replicas.mocks.delivered())


def test_what_a_kill_leaves_is_sent_again(balanced):
    """Under the same keys, to whichever replica is there: all is stored once, and nothing is lost."""
    replicas, port = balanced
    emitter = Emitter(port, 8, pause=0.0).start()
    emitter.wait_for(500)
    replicas.all[0].kill_all()
    emitter.wait_for(500)
    emitter.stop()
    open_ones = [key for key, status in emitter.answers.items() if status != 202]
    for key in open_ones:
        headers = {"Content-Type": "application/json", "Idempotency-Key": key}
        wait_until(lambda headers=headers: request(port, "POST", "/logs", BODY, headers)[0] == 202, key)
    stream = replicas.wait_at_rest()
    assert stream["stored"] >= len(emitter.answers)  # and more, of messages that were stored again in part
    delivered = replicas.mocks.delivered()
    assert delivered.keys() == emitter.answers.keys()
    twice = [key for key, times in delivered.items() if times > 1]
    assert len(twice) <= IN_FLIGHT
