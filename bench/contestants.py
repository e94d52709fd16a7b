"""Who runs in the race: fastdist and its peers, each started with the same four analyzers behind it, 10/40/20/30."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

HERE = Path(__file__).parent
WEIGHTS = (10, 40, 20, 30)
TICKS = os.sysconf("SC_CLK_TCK")


class Analyzers(NamedTuple):
    """The sink's ports, in the order of WEIGHTS."""

    ports: tuple[int, ...]

    def packets(self) -> int:
        """Return how many packets all of them have had."""
        return sum(self.each())

    def each(self) -> list[int]:
        """Return how many packets each has had."""
        return [int(_get(port, "/count").split()[0]) for port in self.ports]


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _get(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as response:
        return str(response.read().decode())


def wait_for_port(port: int, seconds: float = 15.0) -> None:
    """Wait until something listens on ``port``."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise TimeoutError(f"nothing listens on port {port} after {seconds:g} s")


def build_sink(folder: Path) -> Path:
    """Compile the analyzers."""
    target = folder / "sink"
    subprocess.run(["cc", "-O2", "-o", str(target), str(HERE / "sink.c")], check=True)
    return target


class Contestant:
    """A server under test: ``start`` it in a folder of its own, ``stop`` it; ``cpu`` is what its processes used."""

    name = ""
    queues = False  # whether it answers before it has delivered

    def __init__(self, folder: Path, analyzers: Analyzers) -> None:
        self.folder, self.analyzers = folder, analyzers
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)

    @classmethod
    def missing(cls) -> str:
        """Return what has to be installed for it to run, "" if nothing."""
        return ""

    def command(self) -> list[str]:
        """Return the command that runs it in the foreground."""
        raise NotImplementedError

    def start(self) -> None:
        """Start it and wait until it listens."""
        log = (self.folder / "log").open("ab")
        self.process = subprocess.Popen(self.command(), stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for_port(self.port)
        except TimeoutError as error:
            raise RuntimeError(f"{self.name} does not start:\n{(self.folder / 'log').read_text()[-2000:]}") from error

    def stop(self) -> None:
        """End it and all its processes."""
        if self.process is None:
            return
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process = None

    def pids(self) -> list[int]:
        """Return its processes, children included."""
        assert self.process
        found, todo = [], [self.process.pid]
        while todo:
            pid = todo.pop()
            found.append(pid)
            for task in Path(f"/proc/{pid}/task").glob("*/children"):
                todo += [int(child) for child in task.read_text().split()]
        return found

    def cpu(self) -> float:
        """Return the seconds of processor (user and system) that its processes have used."""
        ticks = 0
        for pid in self.pids():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / TICKS

    def resident(self) -> int:
        """Return the bytes of memory its processes hold that are not shared (private, resident)."""
        total = 0
        for pid in self.pids():
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Private_"):
                    total += int(line.split()[1]) * 1024
        return total


class Fastdist(Contestant):
    """fastdist, with settings as environment variables."""

    name = "fastdist"
    queues = True
    settings: Mapping[str, str] = {}

    def command(self) -> list[str]:
        analyzers = "".join(
            f'[[analyzers]]\nid = "A{i}"\nendpoint = "http://127.0.0.1:{port}/analyze"\nweight = {WEIGHTS[i % 4]}\n'
            for i, port in enumerate(self.analyzers.ports)
        )
        config = self.folder / "fastdist.toml"
        config.write_text(
            f'[server]\nhost = "127.0.0.1"\nport = {self.port}\n[queue]\npath = "{self.folder}/data"\n{analyzers}'
        )
        variables = [f"FASTDIST_{name}={value}" for name, value in self.settings.items()]
        return ["env", *variables, sys.executable, "-m", "fastdist", "serve", "--config", str(config)]

    def start(self) -> None:
        shutil.rmtree(self.folder / "data", ignore_errors=True)
        super().start()
        _get(self.port, "/ready")


class Nginx(Contestant):
    """nginx as a weighted reverse proxy with keep-alive to the analyzers."""

    name = "nginx"

    @classmethod
    def missing(cls) -> str:
        return "" if shutil.which("nginx") else "nginx"

    def command(self) -> list[str]:
        servers = "".join(
            f"    server 127.0.0.1:{port} weight={WEIGHTS[i % 4]};\n" for i, port in enumerate(self.analyzers.ports)
        )
        config = self.folder / "nginx.conf"
        config.write_text(f"""
worker_processes {os.cpu_count()};
daemon off;
pid {self.folder}/pid;
error_log {self.folder}/error.log warn;
events {{ worker_connections 20000; }}
http {{
  access_log off;
  client_body_temp_path {self.folder}/body;
  proxy_temp_path {self.folder}/proxy;
  fastcgi_temp_path {self.folder}/fastcgi;
  uwsgi_temp_path {self.folder}/uwsgi;
  scgi_temp_path {self.folder}/scgi;
  client_body_buffer_size 64k;
  keepalive_requests 1000000000;
  upstream analyzers {{
{servers}    keepalive 128;
    keepalive_requests 1000000000;
  }}
  server {{
    listen 127.0.0.1:{self.port} reuseport backlog=4096;
    location / {{
      proxy_pass http://analyzers;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
    }}
  }}
}}
""")
        return ["nginx", "-c", str(config), "-p", str(self.folder)]


class Haproxy(Contestant):
    """HAProxy, round robin by weight, connections to the analyzers reused."""

    name = "haproxy"

    @classmethod
    def missing(cls) -> str:
        return "" if shutil.which("haproxy") else "haproxy"

    def command(self) -> list[str]:
        servers = "".join(
            f"  server a{i} 127.0.0.1:{port} weight {WEIGHTS[i % 4]} check\n"
            for i, port in enumerate(self.analyzers.ports)
        )
        config = self.folder / "haproxy.cfg"
        config.write_text(f"""
global
  nbthread {os.cpu_count()}
  maxconn 9000
defaults
  mode http
  timeout connect 1s
  timeout client 75s
  timeout server 5s
  http-reuse always
frontend in
  bind 127.0.0.1:{self.port} backlog 4096
  default_backend analyzers
backend analyzers
  balance roundrobin
{servers}""")
        return ["haproxy", "-db", "-f", str(config)]
