"""Replicas of the service for tests: processes that share a stream, analyzers, and the ledgers of both sides."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter

from support import Distributor, Emitter, get_json, request, wait_until

WEIGHTS = {"A1": 0.1, "A2": 0.4, "A3": 0.2, "A4": 0.3}


class Replicas:
    """Replicas of one service in folders of their own, with a common configuration."""

    def __init__(self, folder, mocks, settings, **more):
        self.folder, self.mocks, self.jetstream, self.more = folder, mocks, settings, more
        self.all = []

    def start(self, environment=None, **sections):
        """Start one more replica; ``sections`` of its configuration differ from the others'."""
        folder = self.folder / f"replica{len(self.all)}"
        folder.mkdir()
        settings = {
            "queue": {"path": str(folder / "data"), "backend": "jetstream"},
            "server": {"workers": 1},
            "jetstream": {
                "servers": list(self.jetstream.servers),
                "stream": self.jetstream.stream,
                "replicas": self.jetstream.replicas,
                "max_bytes": f"{self.jetstream.max_bytes}B",
                "ack_wait": f"{self.jetstream.ack_wait}s",
            },
        }
        for source in (self.more, sections):
            for section, keys in source.items():
                settings.setdefault(section, {}).update(keys)
        self.all.append(Replica(folder, self.mocks, settings, **(environment or {})))
        return self.all[-1]

    def kill_all(self):
        for replica in self.all:
            if replica.process.poll() is None:
                replica.kill_all()

    @property
    def alive(self):
        return [replica for replica in self.all if replica.process.poll() is None]

    def wait_at_rest(self, seconds=60.0):
        """Wait until nothing waits or is in flight anywhere; return the stream's figures."""
        return wait_until(self._at_rest, "rest", seconds, self._settled)

    def _settled(self):
        return sum(replica.stats()["packets"]["delivered"] for replica in self.alive)

    def _at_rest(self):
        """Whether it was so twice, further apart than figures are old."""
        seen = []
        for _ in range(2):
            everything = [replica.stats() for replica in self.alive]
            stream = everything[0]["stream"]
            seen.append((stream["stored"], [each["packets"] for each in everything]))
            old = any(not each["stream"]["replicas"]["current"] for each in everything)  # figures: there is no leader
            busy = stream["queued"] or stream["inFlight"] or old
            if busy or any(each["packets"]["inFlight"] for each in everything):
                return None
            time.sleep(1.1)
        return stream if seen[0] == seen[1] else None


class Replica(Distributor):
    """A replica."""

    def health(self):
        return get_json(self.port, "/health")

    def ready(self):
        return request(self.port, "GET", "/ready")[0]

    def wait_ready(self, seconds=30.0):
        wait_until(lambda: self.ready() == 200, "readiness", seconds)

    def problem(self, body=None, **headers):
        """Post a packet that is refused; return the status, and the problem."""
        status, _, text = self.post(**({"body": body} if body else {}), **headers)
        return status, json.loads(text)


class Watch(threading.Thread):
    """Notes how an answer changes over time, until it is left."""

    def __init__(self, look, pause=0.05):
        super().__init__(daemon=True)
        self.look, self.pause, self.seen, self._over = look, pause, [], threading.Event()

    def run(self):
        while not self._over.wait(self.pause):
            value = self.look()
            if not self.seen or self.seen[-1] != value:
                self.seen.append(value)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self.join(10)


def emitter(replica, **options):
    """Return an emitter with keys of its own that posts to a replica."""
    return Emitter(replica.port, **options)


def compare(emitters, delivered, *, twice=0):
    """Compare ledgers: what was accepted was delivered, once but for ``twice`` packets, and nothing else was."""
    accepted = set().union(*(each.accepted for each in emitters))
    may = accepted.union(*(each.unknown for each in emitters))
    lost = accepted - delivered.keys()
    phantom = delivered.keys() - may
    more = Counter({name: count for name, count in delivered.items() if count > 1})
    assert (len(lost), len(phantom)) == (0, 0), (sorted(lost)[:5], sorted(phantom)[:5])
    assert len(more) <= twice, f"{len(more)} delivered more than once"
    return accepted
