"""syslog-ng and rsyslog, as Debian builds them: what they are given arrives, as long as they try."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from clients_harness import LEVELS, SCENARIOS, Client
from support import ROOT, wait_until

PEERS = ROOT / "build" / "peers"  # scripts/peers.sh unpacks them there
SEVERITIES = {"debug": 7, "info": 6, "warn": 4, "error": 3}

SYSLOG_NG = """\
@version: {version}
{modules}
options {{ time-reopen(1); keep-hostname(yes); frac-digits(6); stats-freq(0); }};
source s {{ unix-stream("{socket}" flags(syslog-protocol)); }};
destination d {{ http(url("http://127.0.0.1:{port}{path}") headers("Content-Type: application/x-ndjson")
    body("{action}$(format-json --scope rfc5424 --key ISODATE)") delimiter("\\n") body-suffix("\\n")
    batch-lines(20) batch-timeout(50) timeout(20)); }};
log {{ source(s); destination(d); flags(flow-control); }};
"""

RSYSLOG = """\
global(workDirectory="{folder}")
module(load="imptcp")
module(load="omelasticsearch")
module(load="impstats" interval="1" format="json" log.file="{folder}/stats" log.syslog="off" ruleset="none")
ruleset(name="none") {{ stop }}
input(type="imptcp" path="{socket}")
template(name="document" type="list" option.jsonf="on") {{
  property(outname="@timestamp" name="timereported" dateFormat="rfc3339" format="jsonf")
  property(outname="message" name="msg" format="jsonf")
  property(outname="severity" name="syslogseverity-text" format="jsonf")
  property(outname="host" name="hostname" format="jsonf")
  property(outname="program" name="programname" format="jsonf")
  property(outname="data" name="structured-data" format="jsonf")
}}
action(name="send" type="omelasticsearch" server="127.0.0.1" serverport="{port}" template="document" searchIndex="logs"
  bulkmode="on" errorFile="{folder}/errors" queue.type="LinkedList" queue.dequeueBatchSize="20"
  action.resumeRetryCount="-1" action.resumeInterval="1")
"""


def find(name, folders):
    """Return the path of a program and of a module that it needs; None if either is missing."""
    program = shutil.which(name, path=f"{PEERS}/usr/sbin:{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin")
    modules = [path for root in (PEERS, Path("/")) for pattern in folders for path in root.glob(pattern)]
    return (program, modules[0].parent) if program and modules else None


NG = find("syslog-ng", ["usr/lib/syslog-ng/*/libhttp.so"])
RS = find("rsyslogd", ["usr/lib/*/rsyslog/omelasticsearch.so"])
LIBRARIES = ":".join(str(path) for path in (*PEERS.glob("lib/*"), *PEERS.glob("usr/lib/*")) if path.is_dir())


class Daemon(Client):
    """A daemon that is given lines of RFC 5424 by a socket."""

    pause = 0.05

    def __init__(self, name, port, folder, run):
        super().__init__(name, port)
        self.folder = folder / name
        self.folder.mkdir()
        self.socket = str(self.folder / "in")
        self.process = run(*self.command(), LD_LIBRARY_PATH=LIBRARIES)
        self.connection = socket.socket(socket.AF_UNIX)
        wait_until(self.connect, "it listens")

    def command(self):
        raise NotImplementedError

    def connect(self):
        assert self.process.process.poll() is None, self.process.output
        with contextlib.suppress(OSError):
            self.connection.connect(self.socket)
            return True
        return False

    def log(self, numbers):
        for number in numbers:
            time = f"2026-01-02T03:04:05.{number:06}Z"
            line = f'1 {time} {self.name} shop 42 - [cart@32473 number="{number}" user="Zoë"] {self.text(number)}\n'
            self.connection.sendall(f"<{128 + SEVERITIES[LEVELS[number % 4]]}>{line}".encode())

    def expected(self, number):
        return {
            "message": self.text(number),
            "level": LEVELS[number % 4],
            "source": "shop",
            "timestamp": f"2026-01-02T03:04:05.{number:06}Z",
        }


class SyslogNg(Daemon):
    """``http()``, which tries every batch until it is taken, in the order of the lines."""

    path, action = "/ingest", ""

    @functools.cached_property
    def version(self):
        environment = os.environ | {"LD_LIBRARY_PATH": LIBRARIES}
        command = [NG[0], "--version", f"--module-path={NG[1]}"]
        text = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        return re.search(r"\((\d+\.\d+)", text)[1]

    def command(self):
        modules = "\n".join(f"@module {name}" for name in ("afsocket", "http", "json-plugin", "syslogformat"))
        (self.folder / "conf").write_text(
            SYSLOG_NG.format(
                version=self.version,
                modules=modules,
                socket=self.socket,
                port=self.port,
                path=self.path,
                action=self.action,
            )
        )
        files = [f"--{kind}={self.folder}/{kind}" for kind in ("persist-file", "pidfile", "control")]
        return [NG[0], "-F", "--no-caps", f"--cfgfile={self.folder}/conf", f"--module-path={NG[1]}", *files]

    def count(self, name):
        with socket.socket(socket.AF_UNIX) as control:
            control.connect(str(self.folder / "control"))
            control.sendall(b"STATS\n")
            rows = read_stats(control)
        return sum(int(row[5]) for row in rows if row[0] == "dst.http" and row[4] == name)

    def finish(self):
        wait_until(lambda: self.count("written") >= self.sent, "all are written", 60, lambda: self.count("written"))
        assert self.count("dropped") == 0
        self.tell(True, range(self.count("written")))

    def expected(self, number):
        data = {"_SDATA": {"cart@32473": {"number": str(number), "user": "Zoë"}}, "PID": "42", "FACILITY": "local0"}
        return super().expected(number) | {"metadata": data}


class SyslogNgBulk(SyslogNg):
    """The same, as its ``elasticsearch-http()`` writes it."""

    path, action = "/_bulk", '{\\"index\\":{\\"_index\\":\\"shop\\"}}\\n'

    def expected(self, number):
        wanted = super().expected(number)
        return wanted | {"metadata": wanted["metadata"] | {"_index": "shop"}}


class Rsyslog(Daemon):
    """``omelasticsearch``, which does not look at the status: what is refused stands in its file of errors."""

    retries = False

    def command(self):
        text = RSYSLOG.format(folder=self.folder, socket=self.socket, port=self.port)
        (self.folder / "conf").write_text(text)
        return [RS[0], "-n", "-f", self.folder / "conf", "-i", self.folder / "pid", "-M", RS[1]]

    def gave_up(self):
        return (self.folder / "errors").exists()

    def waiting(self):
        """Return how many records it has not dealt with."""
        stats = self.folder / "stats"
        lines = stats.read_text().splitlines() if stats.exists() else []
        rows = [json.loads(line[line.index("{") :]) for line in lines if line.endswith("}")]
        queue = [row for row in rows if row.get("name") == "send queue"]
        return self.sent - queue[-1]["enqueued"] + queue[-1]["size"] if queue else self.sent

    def finish(self):
        wait_until(lambda: self.waiting() == 0, "the queue is empty", 60, self.waiting)
        text = (self.folder / "errors").read_text() if self.gave_up() else ""
        lost = {int(number) for number in re.findall(rf"{self.name}\\*/(\d+) ", text)}
        self.tell(False, lost)
        self.tell(True, set(range(self.sent)) - lost)

    def expected(self, number):
        data = f'[cart@32473 number="{number}" user="Zoë"]'
        return super().expected(number) | {"metadata": {"_index": "logs", "data": data}}


def read_stats(control):
    """Return the rows of ``syslog-ng-ctl stats``."""
    text = b""
    while not text.endswith(b"\n.\n"):
        text += control.recv(65536)
    return [line.split(";") for line in text.decode().splitlines() if line.count(";") == 5]


@pytest.mark.skipif(not (NG and RS), reason="needs syslog-ng and rsyslog (scripts/peers.sh unpacks them)")
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_what_is_accepted_arrives(mocks, serve, run, tmp_path, scenario):
    def make(port):
        kinds = {"syslog-ng": SyslogNg, "syslog-ng-bulk": SyslogNgBulk, "rsyslog": Rsyslog}
        return [kind(name, port, tmp_path, run) for name, kind in kinds.items()]

    scenario(mocks, serve, make)
