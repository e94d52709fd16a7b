"""What docs/migration/ shows was run: others' configurations and ours split the same packets by the same weights.

Vector and Fluent Bit are in no package registry that tests could install them from. Of theirs, the script is run, and
the files are read.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import sys
import tomllib
from collections import Counter
from itertools import pairwise

import pytest
import yaml
from dockerfile import ROOT
from lupa.luajit21 import LuaRuntime
from support import Distributor, Emitter, Mocks, Process, free_port, get_json, request, running, wait_until

FOLDER = ROOT / "docs" / "migration"
IDS = ("A1", "A2", "A3", "A4", "A5")  # A5 is the reserve
SHARES = {"A1": 0.1, "A2": 0.4, "A3": 0.2, "A4": 0.3}
PACKETS = 400
TOKEN = "Authorization: Bearer change-me\r\n"
JSON = {"Content-Type": "application/json"}
PATHS = os.environ["PATH"] + ":/usr/local/sbin:/usr/sbin:/sbin"
OURS = sorted(path.name for path in FOLDER.glob("*.fastdist.toml"))


@pytest.fixture(scope="module")
def analyzers():
    mocks = Mocks(IDS)
    with running(mocks):
        yield mocks


@pytest.fixture
def mocks(analyzers):
    """Return five analyzers as if they had just been started."""
    analyzers.start_anew()
    return analyzers


def with_ports(name, mocks, port):
    """Return a configuration with the ports that it has here, 3000 of the server and 3001 to 3005 of the analyzers."""
    ports = {f"300{number}": re.findall(r":(\d+)/", mocks.endpoints[f"A{number}"])[0] for number in range(1, 6)}
    text = (FOLDER / name).read_text()
    text = text.replace("listen 3000", "listen 127.0.0.1:3000").replace("bind :3000", "bind 127.0.0.1:3000")
    return re.sub(r"\b300[0-5]\b", lambda match: (ports | {"3000": str(port)})[match[0]], text)


def nginx(folder, mocks, port):
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    text = with_ports("nginx.conf", mocks, port).replace("http {\n", f"http {{\n{temporary}", 1)
    (folder / "nginx.conf").write_text(text)
    directives = f"daemon off; pid {folder}/pid; error_log stderr;"
    return Process([shutil.which("nginx", path=PATHS), "-c", str(folder / "nginx.conf"), "-g", directives])


def haproxy(folder, mocks, port):
    (folder / "haproxy.cfg").write_text(with_ports("haproxy.cfg", mocks, port))
    return Process([shutil.which("haproxy", path=PATHS), "-db", "-f", str(folder / "haproxy.cfg")])


def fastdist(name, folder, mocks):
    (folder / name).write_text(with_ports(name, mocks, 0))
    environment = {
        "WORKER_COUNT": "2",
        "FASTDIST_SERVER__HOST": "127.0.0.1",
        "FASTDIST_QUEUE__PATH": str(folder / "data"),
        "FASTDIST_QUEUE__CAPACITY": "16MiB",
    }
    return Process([sys.executable, "-m", "fastdist", "serve", "--config", str(folder / name)], **environment)


def port_of(process):
    return int(json.loads(process.line_with("fastdist is ready"))["url"].rsplit(":", 1)[1])


def wait_for_port(port):
    def answers():
        with contextlib.suppress(OSError):
            return socket.create_connection(("127.0.0.1", port), timeout=1)

    wait_until(answers, "a server listens").close()


def counts(mocks):
    return {name: mocks.totals(name)["packets"] for name in IDS}


def assert_split(mocks, packets):
    had = counts(mocks)
    assert sum(had.values()) == packets, had
    assert had["A5"] == 0, had
    assert {name: had[name] / packets for name in SHARES} == pytest.approx(SHARES, abs=0.04)


# ---------------------------------------------------------------------------------------------------- nginx and HAProxy


@pytest.mark.parametrize("peer", [nginx, haproxy], ids=lambda peer: peer.__name__)
def test_peer_splits_by_weight_with_failover(peer, mocks, tmp_path):
    if not shutil.which(peer.__name__, path=PATHS):
        pytest.skip(f"{peer.__name__} is not installed; scripts/peers.sh installs it")
    port = free_port()
    process = peer(tmp_path, mocks, port)
    with running(process):
        wait_for_port(port)
        assert request(port, "POST", "/logs", b"{}", JSON)[0] == 401
        emitter = Emitter(port, 8, headers=TOKEN).send(PACKETS)
        assert Counter(emitter.answers.values()) == {200: PACKETS}
        assert_split(mocks, PACKETS)
        mocks.set("A2", refuse=True)
        emitter = Emitter(port, 8, "q", headers=TOKEN).send(100)
        assert Counter(emitter.answers.values()) == {200: 100}


@pytest.mark.parametrize("name", OURS)
def test_our_file_splits_the_same_way(name, mocks, tmp_path):
    process = fastdist(name, tmp_path, mocks)
    with running(process):
        port = port_of(process)
        guarded = "change-me" in (FOLDER / name).read_text()
        assert request(port, "POST", "/logs", b"{}", JSON)[0] == (401 if guarded else 400)
        emitter = Emitter(port, 8, headers=TOKEN).send(PACKETS)
        assert emitter.count(202) == PACKETS
        wait_until(lambda: get_json(port, "/stats")["packets"]["delivered"] == PACKETS, "all are delivered")
        assert_split(mocks, PACKETS)
        mocks.set("A2", refuse=True)
        emitter = Emitter(port, 8, "q", headers=TOKEN).send(100)
        assert emitter.count(202) == 100
        wait_until(lambda: get_json(port, "/stats")["packets"]["delivered"] == PACKETS + 100, "all are delivered")


@pytest.mark.parametrize("peer", ["nginx", "haproxy"])
def test_reserve_gets_packets_if_others_fail(peer, mocks, tmp_path):
    process = fastdist(f"{peer}.fastdist.toml", tmp_path, mocks)
    with running(process):
        port = port_of(process)
        for name in SHARES:
            mocks.set(name, refuse=True)
        Emitter(port, 8, headers=TOKEN).send(100)
        wait_until(lambda: mocks.totals("A5")["packets"] == 100, "the reserve has all")


def test_both_files_have_the_same_weights():
    def shares(weights):
        return {name: weight / sum(weights.values()) for name, weight in weights.items() if weight}

    for name in OURS:
        document = tomllib.loads((FOLDER / name).read_text())
        assert shares({row["id"]: row["weight"] for row in document["analyzers"]}) == pytest.approx(SHARES)
    routes = tomllib.loads((FOLDER / "vector.toml").read_text())["transforms"]["split"]["routes"]
    ends = [0, *(int(re.fullmatch(r"int!\(%draw\) < (\d+)", route["condition"])[1]) for route in routes)]
    assert [(end - start) / 100 for start, end in pairwise(ends)] == list(SHARES.values())


# ------------------------------------------------------------------------------------------------ Vector and Fluent Bit


@pytest.fixture(scope="module")
def ours(analyzers, tmp_path_factory):
    """Return a distributor with the settings that the pages ask for."""
    distributor = Distributor(tmp_path_factory.mktemp("ours"), {name: analyzers.endpoints[name] for name in SHARES})
    with running(distributor):
        yield distributor


def test_fluent_bit_filter_draws_by_weight():
    lua = LuaRuntime()
    lua.execute((FOLDER / "fluent-bit-split.lua").read_text())
    drawn = Counter(lua.globals().draw("packets", 0.0, lua.table())[2]["analyzer"] for _ in range(20_000))
    assert {name: count / 20_000 for name, count in drawn.items()} == pytest.approx(SHARES, abs=0.02)
    (rule,) = [each["rule"] for each in fluent_bit("fluent-bit.yaml")["filters"] if "rule" in each]
    assert all(re.fullmatch(rule.split()[1], name) for name in SHARES)
    outputs = fluent_bit("fluent-bit.yaml")["outputs"]
    assert [(row["match"], row["port"]) for row in outputs] == [(f"A{n}", 3000 + n) for n in range(1, 5)]


def fluent_bit(name):
    return yaml.safe_load((FOLDER / name).read_text())["pipeline"]


def test_fluent_bit_calls_its_script():
    (script,) = [each for each in fluent_bit("fluent-bit.yaml")["filters"] if each["name"] == "lua"]
    assert f"function {script['call']}(tag, timestamp, record)" in (FOLDER / script["script"]).read_text()


def test_send_command_replaces_a_forwarder(ours, tmp_path):
    """As the pages show it: follows, notes how far it is, and delivers what is appended."""
    log, offsets = tmp_path / "app.log", tmp_path / "app.offset"
    log.write_text("one\ntwo\n")
    accepted = ours.stats()["messages"]["accepted"]
    command = [sys.executable, "-m", "fastdist", "send", str(log), "--follow", "--offset-file", str(offsets)]
    process = Process([*command, "--url", f"http://127.0.0.1:{ours.port}"])
    with running(process):
        wait_until(lambda: ours.stats()["messages"]["accepted"] == accepted + 2, "both lines are accepted")
        with log.open("a") as file:
            file.write("three\n")
        wait_until(lambda: ours.stats()["messages"]["accepted"] == accepted + 3, "the third as well")


def test_every_file_is_shown_on_a_page():
    text = "".join(page.read_text() for page in FOLDER.glob("*.md"))
    shown = set(re.findall(r"\{literalinclude\} (\S+)", text))
    assert shown == {path.name for path in FOLDER.iterdir() if path.suffix != ".md"}
