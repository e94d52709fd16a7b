"""What must not keep replicas from delivering: analyzers that fail, packets that fail, a pause that one asks for."""

from __future__ import annotations

import pytest
from replicas import Replicas, compare, emitter
from support import Mocks, own_body, request, wait_until


@pytest.fixture(scope="module")
def lasting_mocks():
    mocks = Mocks()
    yield mocks
    mocks.kill_all()


@pytest.fixture
def mocks(lasting_mocks):
    lasting_mocks.start_anew()
    return lasting_mocks


@pytest.fixture
def replicas(tmp_path, mocks, one, name):
    """Replicas on a single server."""
    made = Replicas(tmp_path, mocks, one.settings(name, ack_wait=6.0))
    yield made
    made.kill_all()


def test_failed_analyzers_are_tried_again(replicas, mocks):
    """Deliveries have taken all of them offline, so packets are claimed for trials."""
    mocks.set_all(status=500)
    replica = replicas.start()
    sender = emitter(replica).send(50)
    wait_until(lambda: {row["state"] for row in replica.analyzers().values()} == {"offline"}, "all offline")
    wait_until(lambda: replica.stats()["packets"]["inFlight"] == 0, "nothing claimed")
    mocks.set_all(**mocks.harmless)
    replicas.wait_at_rest()
    compare([sender], mocks.delivered())


def test_paused_analyzer_keeps_only_its_own(replicas, mocks):
    """More packets than a worker claims at once wait for it, as their emitters are its own; the others' do not."""
    mocks.set("A2", status=503, retryAfter=300)
    replica = replicas.start(distribution={"strategy": "sticky"})
    for number in range(600):
        assert replica.post(own_body(f"p{number}"), Idempotency_Key=f"p{number}")[0] == 202
    wait_until(lambda: len(mocks.delivered()) > 300, "the packets of all other emitters", 60)
    mocks.set_all(**mocks.harmless)
    assert request(replica.port, "PATCH", "/analyzers/A2", b'{"state": "online"}')[0] == 200
    replicas.wait_at_rest()
    assert mocks.delivered() == {f"p{number}": 1 for number in range(600)}
