"""NATS servers for tests: one or three real ones, to be killed, stopped, wiped and started again."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

from support import free_port, wait_until

from fastdist.settings import Jetstream

BINARY = Path(sys.executable).with_name("nats-server")
MAX_PAYLOAD = 12_000_000
PR_SET_PDEATHSIG = 1  # of prctl


def die_with_parent():
    """Have a child killed with the process that has begun it, however that ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextlib.contextmanager
def running(*clusters):
    """Have servers run, and end them even if some do not start."""
    try:
        for servers in clusters:
            servers.start()
        yield
    finally:
        for servers in clusters:
            servers.end()


class Server:
    """A nats-server with its data in a folder; ``routes``: the ports of all servers of its cluster."""

    def __init__(self, folder, name, routes=(), extra="", *, jetstream=True):
        self.folder, self.name, self.extra, self.jetstream = Path(folder) / name, name, extra, jetstream
        self.port, self.monitor = free_port(), free_port()
        self.route, self.routes = (free_port() if routes is not None else 0), []
        self.process = None

    @property
    def url(self):
        return f"nats://127.0.0.1:{self.port}"

    def write(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [
            f"server_name: {self.name}",
            f"listen: 127.0.0.1:{self.port}",
            f"http: 127.0.0.1:{self.monitor}",
            f"max_payload: {MAX_PAYLOAD}",
            self.extra,
        ]
        if self.jetstream:
            store = f'store_dir: "{self.folder}/data", max_file_store: 1TB, max_memory_store: 64MB'
            lines.append(f"jetstream {{ {store} }}")
        if self.routes:
            urls = ", ".join(f"nats://127.0.0.1:{port}" for port in self.routes)
            lines.append(f"cluster {{ name: test, listen: 127.0.0.1:{self.route}, routes: [{urls}] }}")
        (self.folder / "nats.conf").write_text("\n".join(lines) + "\n")

    def start(self):
        self.write()
        log = (self.folder / "log").open("ab")
        environment = os.environ | {"GOMAXPROCS": "1"}  # three of them share two cores with everything else
        command = [str(BINARY), "-c", str(self.folder / "nats.conf")]
        self.process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env=environment,
            preexec_fn=die_with_parent,  # noqa: PLW1509  (one call of the system, which takes no lock)
        )
        log.close()

    @property
    def runs(self):
        return self.process is not None and self.process.poll() is None

    def signal(self, number):
        """Send a signal; what is to stop has stopped then, with all its threads."""
        self.process.send_signal(number)
        if number == signal.SIGSTOP:
            wait_until(lambda: set(self._states()) == {"T"}, f"{self.name} has stopped")

    def _states(self):
        """Yield the state of each thread, as in /proc."""
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            yield (task / "stat").read_text().rpartition(")")[2].split()[0]

    def kill(self):
        if self.runs:
            self.process.kill()
            self.process.wait()

    def end(self):
        if self.runs:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
        self.kill()

    def wipe(self):
        shutil.rmtree(self.folder / "data", ignore_errors=True)

    def is_healthy(self):
        assert self.runs, (self.folder / "log").read_text()[-2000:]
        with contextlib.suppress(OSError):
            url = f"http://127.0.0.1:{self.monitor}/healthz"
            with urllib.request.urlopen(url, timeout=1) as reply:
                return json.load(reply)["status"] == "ok"
        return False

    def ask(self, path):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.monitor}{path}", timeout=5) as reply:
            return json.load(reply)


class Servers:
    """One server, or three that are a cluster."""

    def __init__(self, folder, count=1, extra="", *, jetstream=True):
        names = [f"n{number}" for number in range(1, count + 1)]
        routes = () if count > 1 else None
        self.all = [Server(folder, name, routes, extra, jetstream=jetstream) for name in names]
        for server in self.all:
            server.routes = [each.route for each in self.all] if count > 1 else []

    def start(self):
        for server in self.all:
            server.start()
        self.wait()

    def wait(self):
        """Wait until JetStream works on all of them."""
        wait_until(lambda: all(server.is_healthy() for server in self.all), "healthy NATS servers", 60)

    def end(self):
        for server in self.all:
            server.end()

    def restore(self):
        """Have all of them run and know each other again, whatever a test has done to them."""
        for server in self.all:
            if server.runs:
                server.signal(signal.SIGCONT)
            else:
                server.start()
        self.wait()

    @property
    def urls(self):
        return tuple(server.url for server in self.all)

    def named(self, name):
        return next(server for server in self.all if server.name == name)

    def others(self, name):
        return [server for server in self.all if server.name != name]

    def leader(self, stream):
        """Return the server that leads a stream, and None without one."""
        for server in self.all:
            with contextlib.suppress(OSError, ValueError):
                accounts = server.ask("/jsz?streams=true")["account_details"]
                for detail in accounts[0].get("stream_detail", []):
                    if detail["name"] == stream and (leader := detail["cluster"].get("leader")):
                        return self.named(leader)
        return None

    def settings(self, stream, **changes):
        """Return settings for a stream of these servers."""
        known = {"servers": self.urls, "stream": stream, "replicas": len(self.all), "max_bytes": 64 << 20}
        return Jetstream(**known | changes)
