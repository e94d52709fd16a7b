"""Replicas that share a stream, while its NATS servers, they themselves, their workers and the analyzers fail."""

from __future__ import annotations

import random
import signal
import time

import pytest
from experiment import DELIVERY, QUICK_RETRIES, form
from nats_servers import BINARY, Servers, running
from replicas import Replicas
from support import free_port, kill_worker, wait_until

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.processes,
    pytest.mark.slow,
    pytest.mark.skipif(not BINARY.exists(), reason="nats-server is not installed (it comes with make build)"),
]
CLAIM = 256  # packets that a worker holds at most, and that one fault may have delivered twice
ACK_WAIT = 6.0  # seconds


class Shared:
    """Two replicas in an experiment, with an emitter each, and the servers of their stream."""

    def __init__(self, experiment, servers, name):
        self.experiment, self.servers, self.name = experiment, servers, name
        settings = servers.settings(name, ack_wait=ACK_WAIT)
        self.mocks = experiment.analyzers()
        self.replicas = Replicas(
            experiment.folder,
            self.mocks,
            settings,
            jetstream={"claim": CLAIM, "publish_timeout": "4s"},
            delivery=DELIVERY,
            retry=QUICK_RETRIES,
            health={"rise": 1},
        )
        self.running = {port: self._start(port) for port in (free_port(), free_port())}
        for experiment.port in self.running:
            experiment.emitter(connections=12).start()

    def _start(self, port):
        replica = self.replicas.start(server={"port": port})
        self.experiment.processes.append(replica)
        self.experiment.fastdist = replica
        return replica

    def go_on(self, packets):
        """Wait until so many more packets were accepted of each emitter."""
        for emitter in self.experiment.emitters:
            emitter.wait_for(packets)

    def leader(self):
        return wait_until(lambda: self.servers.leader(self.name), "a leader", 60)

    # ---- faults

    def kill_leader(self):
        leader = self.leader()
        leader.kill()
        time.sleep(2)
        leader.start()

    def stop_leader(self):
        leader = self.leader()
        leader.signal(signal.SIGSTOP)
        time.sleep(4)
        leader.signal(signal.SIGCONT)

    def lose_a_disk(self):
        server = random.choice(self.servers.all)
        server.kill()
        server.wipe()
        server.start()

    def lose_the_quorum(self):
        killed = random.sample(self.servers.all, 2)
        for server in killed:
            server.kill()
        time.sleep(3)
        for server in killed:
            server.start()

    def kill_replica(self):
        port = random.choice(list(self.running))
        self.running[port].kill_all()
        self.running[port] = self._start(port)  # with an empty folder

    def kill_a_worker(self):
        kill_worker(random.choice(list(self.running.values())).worker_pids()[0])

    def lose_analyzers(self):
        self.mocks.set_all(refuse=True)
        time.sleep(2)
        self.mocks.set_all(refuse=False)

    # ---- the end

    def judge(self, fault, faults):
        """Have everything come to rest and compare the ledgers."""
        for emitter in self.experiment.emitters:
            emitter.stop()
        accepted = set().union(*(emitter.accepted for emitter in self.experiment.emitters))
        wait_until(
            lambda: accepted <= self.mocks.delivered().keys(),
            "all that was accepted is delivered",
            60,
            lambda: len(self.mocks.delivered()),
        )
        self.replicas.wait_at_rest(120)
        return self.experiment.judge(fault, bound=faults * CLAIM * len(self.running), at_rest=False)


FAULTS = {
    "the stream's leader kill -9": Shared.kill_leader,
    "the stream's leader SIGSTOP for 4 s": Shared.stop_leader,
    "a NATS server loses its disk": Shared.lose_a_disk,
    "two of three NATS servers kill -9": Shared.lose_the_quorum,
    "a replica kill -9, its disk lost": Shared.kill_replica,
    "a replica's worker kill -9": Shared.kill_a_worker,
    "all analyzers refuse for 2 s": Shared.lose_analyzers,
}
MIXED = "any of these, in turn"


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    made = Servers(tmp_path_factory.mktemp("nats"), 3)
    with running(made):
        yield made


@pytest.mark.parametrize("fault", form([MIXED], [*FAULTS, MIXED]))
def test_shared_queue_loses_nothing(experiment, servers, fault):
    count = form(4, 20) if fault == MIXED else 5
    mixed = random.choices(list(FAULTS.values()), k=count)
    shared = Shared(experiment, servers, f"CHAOS{len(experiment.verdicts)}")
    shared.go_on(200)
    for number in range(count):
        cause = mixed[number] if fault == MIXED else FAULTS[fault]
        cause(shared)
        servers.wait()  # one fault at a time: two disks that are lost before the first is full again are too many
        shared.go_on(form(100, 300))
    shared.judge(f"shared queue: {fault}", count)
