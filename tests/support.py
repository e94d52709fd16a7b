"""What tests with real processes are made of: the mock analyzers, a distributor, emitters that keep a ledger."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import http.client
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parent.parent
WEIGHTS = {"A1": 0.1, "A2": 0.4, "A3": 0.2, "A4": 0.3}
PACKET = {
    "emitterId": "web-42",
    "messages": [
        {
            "timestamp": "2026-01-02T03:04:05.678Z",
            "level": "info",
            "message": "GET /cart/checkout 200 in 12.8 ms for a customer who came from the newsletter",
            "source": "frontend",
            "metadata": {"region": "eu-west-1", "trace": "4bf92f3577b34da6a3ce929d0e0e4736"},
        },
        {"level": "warn", "message": "payment provider answered slowly", "source": "payments"},
    ],
    "metadata": {"host": "web-42.example"},
}
BODY = json.dumps(PACKET, separators=(",", ":")).encode()


def own_body(name: str) -> bytes:
    """Return a packet unlike any other, for tests that compare bodies byte for byte."""
    return b'{ "emitterId": "%s",\t"messages":[{"message":"caf\xc3\xa9 %s", "\\u00fc":1e2}] }' % ((name.encode(),) * 2)


def wait_until(
    condition: Callable[[], Any], what: str, seconds: float = 30.0, progress: Callable[[], Any] = lambda: None
) -> Any:
    """Return what ``condition`` returns once it is true; fail, saying ``what`` was awaited, after ``seconds``.

    The time begins again whenever ``progress`` has become another: how long much work takes is the machine's affair.
    """
    began = time.monotonic()
    end, last, pause = began + seconds, progress(), 0.005
    while True:
        result = condition()
        if result:
            return result
        if (now := progress()) != last:
            end, last = time.monotonic() + seconds, now
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds:g} s: {what}")
        time.sleep(pause)  # longer and longer: to look takes processor time from what is awaited
        pause = min(1.5 * pause, max(0.05, (time.monotonic() - began) / 20))


def kill_worker(pid: int) -> None:
    """Kill a worker, and wait for its end: until then it may be given connections, which are reset with it."""
    process = psutil.Process(pid)
    process.kill()
    with contextlib.suppress(psutil.NoSuchProcess):
        wait_until(lambda: process.status() == psutil.STATUS_ZOMBIE, f"process {pid} has ended")


GIVEN: set[int] = set()


def free_port() -> int:
    """Return a port that nothing listens on, and that no connection is given as its own while nothing does.

    One from the ephemeral range may be taken by a client that tries to connect, even to itself. Nothing keeps
    others from taking it before we do; processes of one run have ranges of their own.
    """
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    ports = range(12_000, 30_000)[number :: int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))]
    while True:
        port = random.SystemRandom().choice(ports)
        if port in GIVEN:
            continue
        GIVEN.add(port)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def request(
    port: int, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Send one request on a connection of its own; return status, headers (lower case) and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
    finally:
        connection.close()


def get_json(port: int, path: str) -> Any:
    """GET a JSON document that must be there."""
    status, _, body = request(port, "GET", path)
    assert status == 200, (path, status, body)
    return json.loads(body)


class Process:
    """A child in a session of its own, whose output is kept."""

    def __init__(
        self, command: list[str], cwd: Path = ROOT, pass_fds: tuple[int, ...] = (), **environment: str
    ) -> None:
        env = {name: value for name, value in os.environ.items() if not name.startswith("FASTDIST_")}
        env.pop("PORT", None)
        env.pop("WORKER_COUNT", None)
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=env | environment,
            start_new_session=True,
            text=True,
            pass_fds=pass_fds,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def line_with(self, text: str, seconds: float = 30.0) -> str:
        """Return the first line that has ``text`` in it, once there is one."""

        def look() -> str | None:
            ended = self.process.poll() is not None
            if ended:
                self._reader.join(5)  # its last words are in the pipe yet
            found = next((line for line in list(self.lines) if text in line), None)
            if found is None and ended:
                raise AssertionError(f"ended ({self.process.returncode}) without saying {text!r}:\n{self.output}")
            return found

        return str(wait_until(look, f"a line with {text!r}; so far:\n{self.output}", seconds))

    def wait_for_lines(self, text: str, count: int) -> None:
        """Wait until at least that many lines have ``text`` in them."""
        wait_until(lambda: sum(text in line for line in list(self.lines)) >= count, f"{count} lines with {text!r}")

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def wait(self, seconds: float = 60.0) -> int:
        status = self.process.wait(seconds)
        self._reader.join(5)
        return status

    def kill_all(self) -> None:
        """Kill -9 the process and everything it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.wait()


class Mocks(Process):
    """Mock analyzers, on free ports, driven through their common control port."""

    def __init__(self, ids: tuple[str, ...] = ("A1", "A2", "A3", "A4"), *options: str, ports: list[int] | None = None):
        wanted = ",".join(str(port) for port in ports or [0] * len(ids))
        command = [sys.executable, "-m", "mock_analyzers", "--ids", ",".join(ids), "--ports", wanted]
        super().__init__([*command, "--control-port", "0", *options])
        self.ids = ids
        self.control_port = int(self.line_with("control").rsplit(":", 1)[1].split("/")[0])
        self.endpoints = {name: self.line_with(f"{name} ").split()[-1] for name in ids}
        self.harmless: dict[str, object] = get_json(self.control_port, f"/control/{ids[0]}")["options"]

    def set(self, name: str, **options: object) -> None:
        status, _, body = request(self.control_port, "POST", f"/control/{name}", json.dumps(options).encode())
        assert status == 200, body

    def set_all(self, **options: object) -> None:
        for name in self.ids:
            self.set(name, **options)

    def totals(self, name: str) -> dict[str, int]:
        totals: dict[str, int] = get_json(self.control_port, f"/control/{name}")["totals"]
        return totals

    def start_anew(self) -> None:
        """Make them what they were at the start: harmless, without connections, with empty ledgers."""
        self.set_all(refuse=True)
        self.set_all(**self.harmless)
        self.reset()

    def reset(self) -> None:
        """Empty the ledgers."""
        for name in self.ids:
            assert request(self.control_port, "POST", f"/control/{name}/reset", b"")[0] == 200

    def digests(self) -> dict[str, str]:
        """Return {packet id: digest of its body}, over all analyzers that ``verify``."""
        digests: dict[str, str] = {}
        for name in self.ids:
            digests.update(get_json(self.control_port, f"/control/{name}/digests"))
        return digests

    def ledger(self) -> dict[str, dict[str, tuple[int, int, int]]]:
        """Return {analyzer: {packet id: (acknowledged, received, ambiguous)}}."""
        ledger = {}
        for name in self.ids:
            _, _, text = request(self.control_port, "GET", f"/control/{name}/ids")
            rows = (line.split() for line in text.decode().splitlines())
            ledger[name] = {row[0]: (int(row[1]), int(row[2]), int(row[3])) for row in rows}
        return ledger

    def delivered(self) -> dict[str, int]:
        """Return {packet id: times an analyzer answered 2xx}, over all analyzers."""
        delivered: dict[str, int] = {}
        for rows in self.ledger().values():
            for name, (acknowledged, _, ambiguous) in rows.items():
                if acknowledged + ambiguous:
                    delivered[name] = delivered.get(name, 0) + acknowledged + ambiguous
        return delivered


class Fleet:
    """Mock analyzers in a process each, which can be ended and started again on the same port.

    What they acknowledged stands in a file each, which outlives them: SIGTERM writes all of it, only then ends.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder, self.options = folder, options
        self.each = {name: self._start(name, 0) for name in WEIGHTS}
        self.endpoints = {name: mock.endpoints[name] for name, mock in self.each.items()}

    def _start(self, name: str, port: int) -> Mocks:
        ledger = str(self.folder / f"ledger-{name}")
        return Mocks((name,), "--ledger", ledger, *self.options, ports=[port])

    def set(self, name: str, **options: object) -> None:
        self.each[name].set(name, **options)

    def end(self, name: str) -> None:
        """End the process of an analyzer; requests it has not answered are cut off."""
        self.each[name].signal(signal.SIGTERM)
        self.each[name].wait()

    def restart(self, name: str) -> None:
        self.each[name] = self._start(name, int(self.endpoints[name].rsplit(":", 1)[1].split("/")[0]))

    def delivered(self) -> dict[str, int]:
        """Return {packet id: times an analyzer answered 2xx}, over all analyzers; ends them."""
        delivered: dict[str, int] = {}
        for name, mock in self.each.items():
            if mock.process.poll() is None:
                self.end(name)
            for line in (self.folder / f"ledger-{name}").read_text().splitlines():
                packet = line.split()[0]
                delivered[packet] = delivered.get(packet, 0) + 1
        return delivered

    def kill_all(self) -> None:
        for mock in self.each.values():
            mock.kill_all()

    @property
    def output(self) -> str:
        return "\n".join(mock.output for mock in self.each.values())


class Distributor(Process):
    """fastdist on a free port, set up by a configuration file made of ``settings`` (section -> key -> value)."""

    def __init__(  # noqa: PLR0913  (tests name what they change)
        self,
        folder: Path,
        mocks: Mocks | Fleet | dict[str, str],
        settings: dict[str, dict[str, object]] | None = None,
        *,
        weights: dict[str, float] | None = None,
        own: dict[str, str] | None = None,
        port: int = 0,
        prefix: tuple[str, ...] = (),
        pass_fds: tuple[int, ...] = (),
        **environment: str,
    ) -> None:
        """Start it; ``prefix`` is a command that runs the one behind it. ``own``: further lines of single analyzers."""
        self.folder = folder
        endpoints = mocks if isinstance(mocks, dict) else mocks.endpoints
        merged: dict[str, dict[str, object]] = {
            "server": {"host": "127.0.0.1", "port": port, "workers": 2},
            "queue": {"path": str(folder / "data"), "durability": "memory", "capacity": "64MiB"},
            # On a busy machine mocks take their time; tests of checks that hang have a time-out of their own.
            "health": {"interval": "200ms", "timeout": "5s"},
        }
        for section, keys in (settings or {}).items():
            merged.setdefault(section, {}).update(keys)
        text = "".join(
            f"[{section}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
            for section, keys in merged.items()
        )
        for name, endpoint in endpoints.items():
            weight = (weights or WEIGHTS)[name]
            text += f'[[analyzers]]\nid = "{name}"\nendpoint = "{endpoint}"\nweight = {weight}\n'
            text += (own or {}).get(name, "")
        self.config = folder / "fastdist.toml"
        self.config.write_text(text)
        self.settings = merged
        command = [*prefix, sys.executable, "-m", "fastdist", "serve", "--config", str(self.config)]
        super().__init__(command, pass_fds=pass_fds, **environment)
        ready = json.loads(self.line_with("fastdist is ready", 120))  # thousands of analyzers on a busy machine
        self.port = int(ready["url"].rsplit(":", 1)[1])
        self.views_port = int(ready.get("admin", ready["url"]).rsplit(":", 1)[1])

    def stats(self) -> Any:
        return get_json(self.views_port, "/stats")

    def analyzers(self) -> dict[str, Any]:
        return {row["id"]: row for row in get_json(self.views_port, "/analyzers")["analyzers"]}

    def post(self, body: bytes = BODY, **headers: str) -> tuple[int, dict[str, str], bytes]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return request(self.port, "POST", "/logs", body, {"Content-Type": "application/json"} | named)

    def wait_for_state(self, name: str, state: str, seconds: float = 20.0) -> None:
        wait_until(lambda: self.analyzers()[name]["state"] == state, f"{name} {state}", seconds)

    def wait_for_states(self, state: str, seconds: float = 20.0) -> None:
        """Wait until all analyzers are in this state."""
        wait_until(lambda: {row["state"] for row in self.analyzers().values()} == {state}, f"all {state}", seconds)

    def dead_letters(self) -> list[dict[str, Any]]:
        """Return all dead letters, of any worker; a line that is just being written does not count yet."""
        files = sorted((self.folder / "data" / "dead-letters").glob("*.ndjson"))
        lines = []
        for file in files:
            with contextlib.suppress(FileNotFoundError):  # it was discarded meanwhile
                lines += file.read_text().split("\n")[:-1]
        return [json.loads(line) for line in lines]

    def worker_pids(self) -> list[int]:
        """Return the processes of the workers that run."""
        return [int(row["pid"]) for row in self.stats()["workers"] if row["pid"]]

    def wait_at_rest(self, seconds: float = 60.0) -> Any:
        """Wait until nothing is queued or in flight; check the accounting; return /stats."""

        def at_rest() -> Any:
            """Look twice: each worker publishes its gauges every 20 ms, if it is not kept from it."""
            before = self.stats()["packets"]
            time.sleep(0.1)
            stats = self.stats()
            packets = stats["packets"]
            quiet = packets["queued"] == 0 and packets["inFlight"] == 0
            settled = packets["delivered"] + packets["deadLettered"] + packets["lost"]
            all_known = packets["accepted"] + packets["recovered"] == settled
            return stats if quiet and all_known and packets == before else None

        def handled() -> int:
            packets = self.stats()["packets"]
            return int(packets["delivered"] + packets["deadLettered"])

        try:
            stats = wait_until(at_rest, "nothing queued or in flight", seconds, handled)
        except AssertionError as error:
            raise AssertionError(f"{error}; {json.dumps(self.stats()['packets'])}") from None
        check_identity(stats)
        return stats

    def stop(self) -> int:
        """SIGTERM, and wait."""
        self.signal(signal.SIGTERM)
        return self.wait()


def check_identity(stats: Any) -> None:
    """accepted + recovered = delivered + queued + inFlight + deadLettered + lost; received = accepted + rejected."""
    packets = stats["packets"]
    left = packets["accepted"] + packets["recovered"]
    right = packets["delivered"] + packets["queued"] + packets["inFlight"] + packets["deadLettered"]
    right += packets["lost"]
    assert left == right, packets
    assert packets["received"] == packets["accepted"] + packets["rejected"], packets
    assert packets["delivered"] == sum(row["delivered"] for row in stats["analyzers"]), stats


@contextlib.contextmanager
def running(*processes: Process) -> Iterator[None]:
    """Kill the processes at the end, whatever happens; show what they said if it was a failure."""
    try:
        yield
    except BaseException:
        for process in processes:
            sys.stderr.write(f"---- {process.process.args}\n{process.output[-6000:]}\n")
        raise
    finally:
        for process in processes:
            process.kill_all()


class Emitter:
    """Emitters on ``connections`` keep-alive connections; each packet has an id, and its answer goes into the ledger.

    ``answers`` maps ids to a status, or to None where the connection broke before the answer, or that says it is not
    known: such a packet may or may not have been accepted. ``body`` is every packet's, or a function of its id.
    ``headers`` are lines ended by CR LF. Those that ``send`` a number of packets do so as fast as they can; those that
    ``start`` pause after each.
    """

    def __init__(  # noqa: PLR0913  (tests name what they change)
        self,
        port: int,
        connections: int = 16,
        prefix: str = "p",
        body: bytes | Callable[[str], bytes] = BODY,
        *,
        headers: str = "",
        source: str = "127.0.0.1",
        pause: float = 0.005,
    ) -> None:
        self.port, self.connections, self.prefix, self.body = port, connections, prefix, body
        self.headers, self.source, self.pause = headers, source, pause
        self.answers: dict[str, int | None] = {}
        self.broken_when_kept = 0  # connections that carried an answer and then broke under a request
        self.without_retry_after = 0  # answers 429 or 503 that do not say when to try again
        self.enough = threading.Event()
        self._limit = 0
        self._thread: threading.Thread | None = None
        self._count = 0
        self._counts: Counter[int] = Counter()

    def send(self, packets: int) -> Emitter:
        """Send ``packets`` and return."""
        self.pause = 0.0
        self._limit = self._count + packets
        asyncio.run(self._run())
        return self

    def start(self) -> Emitter:
        """Send until ``stop``."""
        self._limit = 1 << 60
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()
        return self

    def stop(self) -> Emitter:
        self.enough.set()
        assert self._thread
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self

    def wait_for(self, packets: int) -> Emitter:
        """Wait until so many more have been accepted."""
        enough = self.count(202) + packets
        wait_until(lambda: self.count(202) >= enough, f"{enough} packets accepted", progress=lambda: self.count(202))
        return self

    def count(self, status: int) -> int:
        """Return how many answers had this status so far."""
        return self._counts[status]

    @property
    def accepted(self) -> set[str]:
        return {name for name, status in self.answers.copy().items() if status in (200, 202)}

    @property
    def unknown(self) -> set[str]:
        return {name for name, status in self.answers.copy().items() if status is None}

    async def _run(self) -> None:
        await asyncio.gather(*(self._connection() for _ in range(self.connections)))

    async def _connection(self) -> None:
        """Send one packet after another, on a new connection wherever one breaks or is closed."""
        while self._count < self._limit and not self.enough.is_set():
            try:
                reader, writer = await asyncio.open_connection(
                    "127.0.0.1", self.port, local_addr=(self.source, 0) if self.source != "127.0.0.1" else None
                )
            except OSError:  # nothing was sent
                await asyncio.sleep(0.02)
                continue
            kept = False
            try:
                while self._count < self._limit and not self.enough.is_set() and await self._exchange(reader, writer):
                    kept = True
            except (OSError, EOFError, TimeoutError):
                self.broken_when_kept += kept
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Send a packet and read its answer; return whether the connection stays open."""
        self._count += 1
        name = f"{self.prefix}-{self._count}"
        body = self.body if isinstance(self.body, bytes) else self.body(name)
        self.answers[name] = None
        writer.write(
            b"POST /logs HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nIdempotency-Key: "
            + f"{name}\r\n{self.headers}Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        async with asyncio.timeout(20):
            head = await reader.readuntil(b"\r\n\r\n")
            self.answers[name] = status = int(head[9:12])
            self._counts[status] += 1
            lower = head.lower()
            answer = await reader.readexactly(int(lower.split(b"content-length:")[1].split(b"\r\n")[0]))
        if status == 503 and b'"stored":"unknown"' in answer:
            self.answers[name] = None
        if status in (429, 503) and b"\r\nretry-after: " not in lower:
            self.without_retry_after += 1
        if status not in (200, 202):
            await asyncio.sleep(0.05)
        elif self.pause:
            await asyncio.sleep(self.pause)
        return b"\r\nconnection: close" not in lower


def compare(
    emitter: Emitter,
    mocks: Mocks | Fleet,
    *,
    max_duplicates: int = 0,
    refused: set[str] | frozenset[str] = frozenset(),
) -> None:
    """Compare the ledgers of emitters and analyzers: nothing lost, nothing invented, few sent twice.

    ``refused``: what became dead letters, which no analyzer may have taken.
    """
    delivered = mocks.delivered()
    assert not refused & delivered.keys(), "a dead letter that was delivered"
    lost = emitter.accepted - delivered.keys() - refused
    phantoms = delivered.keys() - emitter.accepted - emitter.unknown
    duplicates = sum(times - 1 for times in delivered.values())
    assert not lost, f"{len(lost)} of {len(emitter.accepted)} lost, such as {sorted(lost)[:5]}"
    assert not phantoms, f"{len(phantoms)} delivered that were never accepted, such as {sorted(phantoms)[:5]}"
    assert duplicates <= max_duplicates, f"{duplicates} duplicates"


def copied_pages(name: str) -> int:
    """Return how many pages of mappings of this file, as far as they are private, this process has written to."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first:
            ours = any(name in word for word in rest)
        elif ours and first == "Anonymous:":
            total += int(rest[0]) * 1024 // os.sysconf("SC_PAGE_SIZE")
    return total


def sync_address(sync: Callable[[int], int]) -> int:
    """Return the address of a C function that calls this one, for ``SyncThread``; it lasts as long as the process."""
    function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(sync)
    _lasting.append(function)
    return ctypes.cast(function, ctypes.c_void_p).value


_lasting: list[object] = []


@contextlib.contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """Have every write behind this offset of a file fail, in the midst if need be."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
