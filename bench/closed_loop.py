"""wrk and ab: load in a closed loop over keep-alive connections, each with one request under way.

Both are run as one would by hand, and what they print is read. Mind that wrk counts as a time-out what was answered
late, not what never was, and that ab counts a request whose connection broke among the complete ones.
"""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import time
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

TYPE = "application/json"
AB_AT_MOST = 200_000  # requests a second: ab ends after so many, and keeps a record of each
UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3, "m": 60e3, "h": 3600e3}


class Answers(NamedTuple):
    """What a load generator saw.

    ``taken``: requests that were answered 2xx; ``refused``: answered otherwise; ``errors``: {kind: how many} of the
    rest; ``p50``, ``p99``: milliseconds until the answer, 0 if there was none. ``seconds``: how long it ran; ``busy``:
    the share of the processors it could use (one for each of its threads) that it did use. ``p999``, ``max``:
    milliseconds, of wrk only.
    """

    taken: int
    refused: int
    errors: dict[str, int]
    p50: float
    p99: float
    seconds: float = 0.0
    busy: float = 0.0
    p999: float = 0.0
    max: float = 0.0


class Order(NamedTuple):
    """What a load generator is to do.

    Of ``wrk`` only: ``timeout``, seconds from which an answer is late; ``step``, by how much the
    traceparent of a request is above that of the one before (None: it has none); ``others``: bodies that are sent in
    turn with ``body`` (with them there is no ``step``); ``keys``: the beginning of Idempotency-Keys, one each.
    """

    url: str
    body: bytes
    seconds: float
    connections: int
    threads: int = 1
    headers: Mapping[str, str] = {}
    timeout: float = 2.0
    step: int | None = None
    others: Sequence[bytes] = ()
    keys: str = ""


# ----------------------------------------------------------------------------------------------------------------- wrk


def wrk(folder: Path, order: Order) -> Answers:
    """Run wrk, with its files in ``folder``. Raises RuntimeError with what it says if it cannot."""
    script = _post_script(folder, order)
    options = ["--latency", f"-t{order.threads}", f"-c{order.connections}", f"-d{order.seconds:g}"]
    command = ["wrk", *options, "--timeout", f"{order.timeout:g}", "-s", str(script), order.url]
    said, seconds, used = _run(command)
    return read_wrk(said)._replace(seconds=seconds, busy=used / order.threads)


TRACED = """local count = 0
function request()
  count = count + %d
  wrk.headers["traceparent"] = string.format("00-%%032x-%%016x-01", count, count)
  return wrk.format()
end
"""
KEYED = """local count = 0
function request()
  count = count + 1
  wrk.headers["Idempotency-Key"] = string.format("%s%%d", count)
  return wrk.format()
end
"""
# Files are closed: wrk takes no connection whose descriptor is much higher than the number of its connections.
READ = """local function read(path)
  local file = assert(io.open(path, "rb"))
  local data = file:read("*a")
  file:close()
  return data
end
"""
IN_TURN = """local requests, count = {}, 0
function init()
  for place = 1, %d do
    requests[place] = wrk.format(nil, nil, nil, read(%s .. place))
  end
end
function request()
  count = count %% #requests + 1
  return requests[count]
end
"""
SLOWEST = """function done(_, latency)
  print(string.format("p99.9 and max, us: %.0f %.0f", latency:percentile(99.9), latency.max))
end
"""


def _post_script(folder: Path, order: Order) -> Path:
    """Write the script that has wrk post. Headers stand in it: other users of the machine see command lines."""
    body, script = folder / "body", folder / "post.lua"
    body.write_bytes(order.body)
    headers = {"Content-Type": TYPE, **order.headers}
    script.touch(mode=0o600)
    script.write_text(
        READ
        + f'wrk.method = "POST"\nwrk.body = read({json.dumps(str(body))})\n'
        + "".join(f"wrk.headers[{json.dumps(name)}] = {json.dumps(value)}\n" for name, value in headers.items())
        + (TRACED % order.step if order.step is not None else "")
        + (KEYED % order.keys if order.keys else "")
        + (_in_turn(folder, order) if order.others else "")
        + SLOWEST
    )
    return script


def _in_turn(folder: Path, order: Order) -> str:
    """Write the bodies into files of their own; return the part of the script that sends them."""
    bodies = (order.body, *order.others)
    for place, body in enumerate(bodies, 1):
        (folder / f"body-{place}").write_bytes(body)
    return IN_TURN % (len(bodies), json.dumps(str(folder / "body-")))


def read_wrk(said: str) -> Answers:
    """Return what ``wrk --latency`` has printed."""
    answered = _count(r"(\d+) requests in ", said)
    refused = _count(r"Non-2xx or 3xx responses: (\d+)", said, 0)
    found = re.search(r"Socket errors: (.*)", said)
    counted = re.findall(r"(\w+) (\d+)", found[1]) if found else []
    names = {"connect": "connections refused", "read": "read errors", "write": "write errors", "timeout": "time-outs"}
    errors = {names[kind]: int(count) for kind, count in counted if int(count)}
    latency = {percent: float(value) * UNITS[unit] for percent, value, unit in LATENCY.findall(said)}
    slowest = re.search(r"p99\.9 and max, us: (\d+) (\d+)", said)
    p999, longest = (float(us) / 1e3 for us in slowest.groups()) if slowest else (0.0, 0.0)
    taken = answered - refused
    return Answers(taken, refused, errors, latency.get("50", 0.0), latency.get("99", 0.0), p999=p999, max=longest)


LATENCY = re.compile(r"^\s+(\d+)%\s+([\d.]+)(us|ms|s|m|h) *$", re.MULTILINE)


# ------------------------------------------------------------------------------------------------------------------ ab


def ab(folder: Path, order: Order) -> Answers:
    """Run ab, with its files in ``folder``. Raises RuntimeError with what it says if it cannot."""
    body, percentiles = folder / "body", folder / "percentiles.csv"
    body.write_bytes(order.body)
    percentiles.unlink(missing_ok=True)
    most = max(order.connections, int(order.seconds * AB_AT_MOST))
    options = ["-k", "-l", "-r", "-q", "-c", str(order.connections), "-t", f"{order.seconds:g}", "-n", str(most)]
    headers = [word for name, value in order.headers.items() for word in ("-H", f"{name}: {value}")]
    command = ["ab", *options, *headers, "-e", str(percentiles), "-p", str(body), "-T", TYPE, order.url]
    said, seconds, used = _run(command)
    return read_ab(said, percentiles.read_text() if percentiles.exists() else "")._replace(seconds=seconds, busy=used)


def read_ab(said: str, percentiles: str) -> Answers:
    """Return what ``ab -l`` has printed, and written by ``-e``: milliseconds with more digits than it prints."""
    complete = _count(r"Complete requests:\s+(\d+)", said)
    refused = _count(r"Non-2xx responses:\s+(\d+)", said, 0)
    found = re.search(r"\(Connect: (\d+), Receive: (\d+), Length: \d+, Exceptions: (\d+)\)", said)
    counts = [*map(int, found.groups())] if found else [0, 0, 0]
    counts.append(_count(r"Write errors:\s+(\d+)", said, 0))
    names = ("connections refused", "read errors", "broken connections", "write errors")
    errors = {name: count for name, count in zip(names, counts, strict=True) if count}
    latency = {row[0]: float(row[1]) for row in csv.reader(percentiles.splitlines()) if row[0].isdecimal()}
    broken = errors.get("read errors", 0) + errors.get("connections refused", 0)
    taken = max(0, complete - refused - broken)
    return Answers(taken, refused, errors, latency.get("50", 0.0), latency.get("99", 0.0))


# ---------------------------------------------------------------------------------------------------------------- both


PROGRAMS: dict[str, Callable[[Path, Order], Answers]] = {"wrk": wrk, "ab": ab}


def _run(command: list[str]) -> tuple[str, float, float]:
    """Return what it printed, the seconds it took, and the share of one processor it used."""
    before, began = os.times(), time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    after, seconds = os.times(), time.monotonic() - began
    if done.returncode:
        # Not the command: a token may stand in it.
        raise RuntimeError(f"{command[0]} could not go on: {(done.stderr + done.stdout).strip()[-500:]}")
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return done.stdout, seconds, used / seconds


def _count(pattern: str, said: str, otherwise: int | None = None) -> int:
    """Return the number that the pattern finds. Raises RuntimeError where it has to be there and is not."""
    found = re.search(pattern, said)
    if found:
        return int(found[1])
    if otherwise is None:
        raise RuntimeError(f"what was printed is not understood:\n{said.strip()[-500:]}")
    return otherwise
