"""What the contestants run between: the analyzers (``sink.c``), the load (wrk and ``load.c``), and what /proc says."""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import random
import shlex
import socket
import stat
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from closed_loop import Order, wrk

if TYPE_CHECKING:
    from collections.abc import Sequence

HERE = Path(__file__).parent
WEIGHTS = (10, 40, 20, 30)
TICKS = os.sysconf("SC_CLK_TCK")
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
MESSAGE = {
    "timestamp": "2026-01-02T03:04:05.678Z",
    "level": "info",
    "message": "GET /cart/checkout 200 in 12.8 ms cached",
    "source": "frontend",
    "metadata": {"region": "eu-west-1", "trace": "4bf92f3577b34da6"},
}


def packet(messages: int) -> bytes:
    """Return a packet of that many messages (2: 452 bytes, 100: about 18 KB)."""
    document = {"emitterId": "web-42", "messages": [MESSAGE] * messages, "metadata": {"host": "web-42.example"}}
    return json.dumps(document, separators=(",", ":")).encode()


def mix() -> tuple[bytes, ...]:
    """Return 48 packets of 200 to 60,000 bytes: half below 410, 4.8 KB in the mean; the order is always the same."""
    sizes = [round(200 * 300 ** ((place / 47) ** 3)) for place in range(48)]
    random.Random(48).shuffle(sizes)
    return tuple(map(_sized, sizes))


def _sized(size: int) -> bytes:
    """Return a packet of that many bytes: as many messages as fit, and one of text."""
    message = len(json.dumps(MESSAGE, separators=(",", ":"))) + 1
    fitting = max(0, size - 60) // message
    document: dict[str, Any] = {"emitterId": "web-42", "messages": [*[MESSAGE] * fitting, {"message": ""}]}
    missing = size - len(json.dumps(document, separators=(",", ":")))
    document["messages"][-1] = {"message": "x" * missing}
    return json.dumps(document, separators=(",", ":")).encode()


def weight_of(index: int) -> int:
    """Return the weight of the analyzer with this index; with more than four they repeat."""
    return WEIGHTS[index % len(WEIGHTS)]


def free_ports(count: int) -> tuple[int, ...]:
    """Return that many ports that are free now, of those the kernel gives to no client that connects.

    With one of the others a client that tries to connect while nothing listens may get that very port, and itself.
    """
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(12_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in found:
                found.append(port)
    return tuple(found)


def get(port: int, path: str) -> str:
    """Return what a server on this machine answers."""
    with DIRECT.open(f"http://127.0.0.1:{port}{path}", timeout=10) as response:
        return str(response.read().decode())


def wait_for_port(port: int, process: subprocess.Popen[bytes], seconds: float = 60.0) -> None:
    """Wait until a process listens on ``port``."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise TimeoutError("it has ended" if process.poll() is not None else f"nothing on port {port} after {seconds:g} s")


def compile_tools(folder: Path) -> None:
    """Compile the analyzers and the load into ``folder``."""
    for name in ("sink", "load"):
        command = [os.environ.get("CC", "cc"), "-O2", "-o", str(folder / name), str(HERE / f"{name}.c")]
        subprocess.run(command, check=True)


# ------------------------------------------------------------------------------------------------------------- /proc


def family(pid: int) -> list[int]:
    """Return a process and all its descendants."""
    found, todo = [], [pid]
    while todo:
        pid = todo.pop()
        found.append(pid)
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            todo += [int(child) for child in task.read_text().split()]
    return found


def cpu_of(pids: Sequence[int]) -> tuple[float, float]:
    """Return the seconds of processor these processes have used: user, system."""
    user = system = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        user += int(fields[11])
        system += int(fields[12])
    return user / TICKS, system / TICKS


def private_memory(pids: Sequence[int]) -> int:
    """Return the bytes of memory that these processes hold and do not share."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Private_"):
                total += int(line.split()[1]) * 1024
    return total


def charged_memory(pids: Sequence[int], folder: Path) -> int:
    """Return the bytes of memory that these processes are charged for, each page once.

    That is what is theirs alone or shared among them, memfds, and what the page cache holds of files in ``folder`` that
    they have open. Programs and libraries are not part of it.
    """
    total, seen = 0, set()
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss_Anon:"):
                total += int(line.split()[1]) * 1024
        for path in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found, target = path.stat(), str(path.readlink())
                ours = target.startswith(("/memfd:", f"{folder.resolve()}/"))
                if not ours or not stat.S_ISREG(found.st_mode) or (found.st_dev, found.st_ino) in seen:
                    continue
                seen.add((found.st_dev, found.st_ino))
                total += found.st_blocks * 512 if target.startswith("/memfd:") else _in_page_cache(path, found.st_size)
    return total


def _in_page_cache(path: Path, size: int) -> int:
    """Return how many bytes of a file are in memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    pages = -(-size // mmap.PAGESIZE)
    if not pages:
        return 0
    with path.open("rb") as file:
        length, nowhere = ctypes.c_size_t(size), ctypes.c_long(0)
        at = libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), nowhere)
    if at == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), f"cannot map {path}")
    there = ctypes.create_string_buffer(pages)
    failed = libc.mincore(ctypes.c_void_p(at), length, there)
    error = ctypes.get_errno()
    libc.munmap(ctypes.c_void_p(at), length)
    if failed:
        raise OSError(error, f"cannot tell what of {path} is in memory")
    return sum(page & 1 for page in there.raw) * mmap.PAGESIZE


def idle_seconds() -> float:
    """Return for how long the machine's processors have been idle since it was started, over all of them."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()
    return (int(fields[4]) + int(fields[5])) / TICKS


def memory_available() -> int:
    """Return how many bytes of memory can be had."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


# --------------------------------------------------------------------------------------------------------- analyzers


class Sink:
    """The analyzers: one process that listens on many ports and counts. ``rate``: packets a second it can take.

    ``late``: which of them (from 0) answers after how many milliseconds, as in "1:100"; -1: never. ``step``: by how
    much the Date and the id of an answer grow (None: it has none).
    """

    def __init__(
        self, folder: Path, ports: tuple[int, ...], rate: float = 0, late: str = "", *, step: int | None = None
    ) -> None:
        self.ports = ports
        options = [
            *(["-r", str(rate)] if rate else []),
            *(["-d", late] if late else []),
            *(["-s", str(step)] if step is not None else []),
        ]
        command = [str(folder / "sink"), *options, *map(str, ports)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self.process.stdout
        if self.process.stdout.readline() != b"ready\n":
            raise RuntimeError("the analyzers of the race do not start")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.process.kill()
        self.process.communicate()

    def packets(self) -> int:
        """Return how many packets all of them have had."""
        return int(get(self.ports[0], "/total").split()[0])

    def each(self) -> list[int]:
        """Return how many packets each has had."""
        return [int(line) for line in get(self.ports[0], "/each").split()]

    def cpu(self) -> float:
        """Return the seconds of processor it has used."""
        return sum(cpu_of([self.process.pid]))

    def close(self, index: int) -> None:
        """Have an analyzer (from 1: the first is asked) refuse connections, and reset those it has."""
        get(self.ports[0], f"/close/{index}")

    def open(self, index: int) -> None:
        """Have it listen again."""
        get(self.ports[0], f"/open/{index}")


# -------------------------------------------------------------------------------------------------------------- load


class Wrk:
    """A run of wrk: a closed loop over keep-alive connections, one thread; ``bodies`` are sent in turn.

    ``answered``: requests; ``seconds``: that it took; ``busy``: the share of one processor that wrk itself used;
    ``latency``: milliseconds until the answer, p50 to max. ``step``: by how much its traceparent grows (None: it has
    none).
    """

    def __init__(  # noqa: PLR0913
        self,
        folder: Path,
        port: int,
        bodies: Sequence[bytes],
        seconds: float,
        connections: int,
        *,
        step: int | None = None,
    ) -> None:
        url, (body, *others) = f"http://127.0.0.1:{port}/logs", bodies
        answers = wrk(folder, Order(url, body, seconds, connections, timeout=20, step=step, others=others))
        if answers.refused or answers.errors:
            raise RuntimeError(f"wrk at {url}: {answers.refused} answers were errors, {answers.errors or 'no'} others")
        self.answered, self.seconds, self.busy = answers.taken, answers.seconds, answers.busy
        self.latency = {name: getattr(answers, name) for name in ("p50", "p99", "p999", "max")}


class Load:
    """``load.c`` with these arguments; ``lines`` as they come, each a JSON object."""

    def __init__(self, folder: Path, mode: str, port: int, body: bytes, connections: int, *more: float) -> None:
        target = folder / "body.json"
        target.write_bytes(body)
        self.command = [str(folder / "load"), mode, str(port), str(target), str(connections), *map(str, more)]
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe:
                pipe.close()

    def line(self) -> dict[str, Any]:
        """Return its next line."""
        assert self.process.stdout
        assert self.process.stderr
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{shlex.join(self.command)}: {self.process.stderr.read().strip()}")
        result: dict[str, Any] = json.loads(line)
        if result.get("refused"):
            raise RuntimeError(f"{shlex.join(self.command)}: {result['refused']} answers were errors")
        return result

    def finish(self) -> dict[str, Any]:
        """End its standard input and return the line it says then."""
        assert self.process.stdin
        self.process.stdin.close()
        return self.line()
