"""Clients for Node, as they are: what they were told is accepted arrives as it was logged."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from clients_harness import LEVELS, SCENARIOS, Client
from support import ROOT, wait_until

CLIENTS = ROOT / "build" / "node"  # scripts/peers.sh installs them there
NODE = shutil.which("node")


class Node:
    """A process that logs with all of them."""

    def __init__(self, port):
        script = Path(__file__).parent / "node" / "send.mjs"
        command = [NODE, str(script), str(CLIENTS), str(port)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.clients = {kind.name: kind(kind.name, port, self) for kind in (ElasticsearchHelper, PinoLoki, WinstonHttp)}
        self.finished = set()
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        for line in self.process.stdout:
            told = json.loads(line)
            if "finished" in told:
                self.finished.add(told["name"])
            else:
                client = self.clients[told["name"]]
                client.tell(True, told["accepted"])
                client.tell(False, told["refused"])

    def say(self, *words):
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()

    def end(self):
        self.process.kill()
        self.process.communicate()


class NodeClient(Client):
    """One of its clients."""

    retries = False
    pause = 0.05

    def __init__(self, name, port, node):
        super().__init__(name, port)
        self.node = node

    def log(self, numbers):
        self.node.say(self.name, numbers.start, numbers.stop)

    def finish(self):
        self.node.say(self.name, "finish")
        wait_until(lambda: self.name in self.node.finished, "all is told", 60, lambda: len(self.accepted))

    def check_time(self, number, message):
        """Say nothing: the other process did not say when it logged."""


class ElasticsearchHelper(NodeClient):
    name = "elastic-js"
    retries = True

    def expected(self, number):
        return {
            "timestamp": f"2026-01-02T03:04:05.{number:06}Z",
            "message": self.text(number),
            "level": LEVELS[number % 4],
            "source": "cart",
            "metadata": {"number": number, "user": {"name": "Zoë"}, "_index": "shop"},
        }


class PinoLoki(NodeClient):
    name = "pino-loki"

    def expected(self, number):
        metadata = {"number": str(number), "user": "Zoë", "job": "shop", "hostname": self.name}
        return {"level": LEVELS[number % 4], "source": "shop", "metadata": metadata}

    def check(self, number, message, emitter):
        super().check(number, message, emitter)
        assert json.loads(message["message"])["msg"] == self.text(number)


class WinstonHttp(NodeClient):
    name = "winston"

    def expected(self, number):
        return {
            "message": self.text(number),
            "level": LEVELS[number % 4],
            "source": "shop",
            "metadata": {"number": number, "user": "Zoë"},
        }


@pytest.mark.skipif(
    not (NODE and (CLIENTS / ".made").exists()), reason="needs node, and clients (scripts/peers.sh installs them)"
)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_what_is_accepted_arrives(mocks, serve, request, scenario):
    def make(port):
        node = Node(port)
        request.addfinalizer(node.end)
        return list(node.clients.values())

    scenario(mocks, serve, make)
