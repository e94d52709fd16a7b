"""``make load``: wrk and ab against a distributor of its own and one that runs, and what it says when it cannot."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest
from support import ROOT, Emitter, free_port

pytestmark = pytest.mark.processes

CONNECTIONS = 8

compiler = pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
EITHER = pytest.mark.skipif(
    not (shutil.which("wrk") or shutil.which("ab")), reason="neither wrk nor ab (scripts/peers.sh installs both)"
)


@pytest.fixture(params=["wrk", "ab"])
def tool(request):
    if not shutil.which(request.param):
        pytest.skip(f"{request.param} is not installed (scripts/peers.sh installs it)")
    return request.param


def load(*options, **environment):
    own = ["--seconds", "1", "--connections", str(CONNECTIONS)]
    command = [sys.executable, str(ROOT / "bench" / "load.py"), *own, *options]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FASTDIST_")}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env={**inherited, **environment}
    )


def figures(done):
    """Return {first word of a line: what stands behind it}."""
    return {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.split()}


def all_delivered(done):
    """Return how many packets are said to have been accepted and delivered, all of them."""
    found = re.search(r"^All ([\d,]+) packets that were accepted have been delivered\.$", done.stdout, re.MULTILINE)
    assert found, done.stdout + done.stderr
    return int(found[1].replace(",", ""))


def check_table(done):
    assert done.returncode == 0, done.stdout + done.stderr
    table = figures(done)
    assert float(table["accepted/s"][0].replace(",", "")) > 0
    assert float(table["delivered/s"][0].replace(",", "")) > 0
    assert 0 < float(table["p50"][0]) <= float(table["p99"][0])
    assert table["errors"] == ["0"]
    shares = [float(table[name][1].removesuffix("%")) for name in ("A1", "A2", "A3", "A4")]
    assert shares == pytest.approx([10, 40, 20, 30], abs=0.5)
    assert sum(int(table[name][3].replace(",", "")) for name in ("A1", "A2", "A3", "A4")) == all_delivered(done)


def check_rest(done, delivered):
    """What was under way when the tool stopped may be accepted when all else is delivered and counted."""
    assert 0 <= delivered - all_delivered(done) <= CONNECTIONS


@compiler
def test_load_of_own_service_is_delivered(tool):
    done = load("--tool", tool, "DELIVERY__MODE=batch", FASTDIST_QUEUE__DURABILITY="memory")
    check_table(done)
    assert "QUEUE__DURABILITY=memory DELIVERY__MODE=batch" in done.stdout.splitlines()[0]


def test_a_distributor_that_runs_is_loaded(tool, mocks, serve, tmp_path):
    packet = tmp_path / "packet.json"
    packet.write_text('{"emitterId": "quote\'s",\n"messages": [{"message": "back\\\\slash"}]}')
    settings = {"security": {"tokens": ["secret"]}, "queue": {"capacity": "256MiB"}}
    fastdist = serve(mocks, settings)
    url = f"http://127.0.0.1:{fastdist.port}"
    done = load("--tool", tool, "--url", url, "--packet", str(packet), FASTDIST_TOKEN="secret")
    check_table(done)
    assert f"packets of {len(packet.read_bytes())} bytes" in done.stdout
    assert fastdist.wait_at_rest()["packets"]["delivered"] == len(mocks.delivered())
    check_rest(done, len(mocks.delivered()))


def test_non_202_responses_count_with_reason(tool, mocks, serve):
    fastdist = serve(mocks, {"limits": {"client_rate": 50, "client_burst": 20}})
    done = load("--tool", tool, "--url", f"http://127.0.0.1:{fastdist.port}/logs")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"errors +[\d,]+ +[\d,]+ answers other than 202 \(rateLimited [\d,]+\)", done.stdout), done.stdout
    check_rest(done, fastdist.wait_at_rest()["packets"]["delivered"])


def test_what_stays_queued_is_said_to_be(tool, mocks, serve):
    """The packets are there until the analyzers take them again."""
    fastdist = serve(mocks, {"queue": {"capacity": "256MiB"}})
    mocks.set_all(refuse=True)
    fastdist.wait_for_states("offline")
    done = load("--tool", tool, "--url", f"127.0.0.1:{fastdist.port}", "--patience", "1")
    mocks.set_all(refuse=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(
        r"^0 of [\d,]+ accepted packets have been delivered; [\d,]+ are still queued", done.stdout, re.MULTILINE
    )
    assert figures(done)["A1"][0] == "offline"


def test_other_senders_do_not_delay_it(tool, mocks, serve):
    fastdist = serve(mocks, {"queue": {"capacity": "256MiB"}})
    others = Emitter(fastdist.port, connections=8).start()
    others.wait_for(100)
    done = load("--tool", tool, "--url", f"http://127.0.0.1:{fastdist.port}", "--patience", "3")
    others.stop()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "others go on sending" in done.stdout or all_delivered(done)


# -------------------------------------------------------------------------------------------------- when it cannot load


def test_missing_wrk_and_ab_are_explained(tmp_path):
    done = load(PATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == "load: this needs wrk or ab (apt-get install wrk apache2-utils, or sh scripts/peers.sh)\n"


@EITHER
def test_address_without_server_is_named():
    url = f"http://127.0.0.1:{free_port()}"
    done = load("--url", url)
    assert (done.returncode, done.stderr) == (2, f"load: {url} cannot be reached: [Errno 111] Connection refused\n")


@EITHER
def test_foreign_server_is_not_loaded(mocks):
    url = mocks.endpoints["A1"].removesuffix("/analyze")
    done = load("--url", url)
    assert (done.returncode, done.stderr) == (
        2,
        f"load: {url} answers GET /stats, but not as fastdist does: is it one?\n",
    )
    assert not mocks.delivered()


@EITHER
@pytest.mark.parametrize(
    ("token", "said"), [({}, "put one into FASTDIST_TOKEN"), ({"FASTDIST_TOKEN": "x"}, "is not one of them")]
)
def test_a_token_that_is_asked_for_is_named(mocks, serve, token, said):
    fastdist = serve(mocks, {"security": {"tokens": ["secret"]}})
    done = load("--url", f"http://127.0.0.1:{fastdist.port}", **token)
    assert done.returncode == 2
    assert "asks for a token" in done.stderr
    assert said in done.stderr


@EITHER
def test_refused_packet_is_not_sent_again(mocks, serve, tmp_path):
    (tmp_path / "packet.json").write_text('{"emitterId": "web-42"}')
    fastdist = serve(mocks)
    done = load("--url", f"http://127.0.0.1:{fastdist.port}", "--packet", str(tmp_path / "packet.json"))
    assert done.returncode == 2
    assert "answers a packet of this load with 400" in done.stderr
    assert fastdist.stats()["packets"]["received"] == 1


@EITHER
@compiler
def test_a_port_in_use_is_named(mocks, serve):
    fastdist = serve(mocks)
    done = load("--port", str(fastdist.port))
    assert done.returncode == 2
    assert f"port {fastdist.port} cannot be had" in done.stderr
    assert f"URL=http://127.0.0.1:{fastdist.port}" in done.stderr


@EITHER
@compiler
def test_a_setting_that_is_wrong_is_named():
    done = load("DELIVERY__MODE=quickly")
    assert done.returncode == 2
    assert "delivery.mode" in done.stderr
