"""The benchmark's own tools tell the truth: analyzers count, the open loop omits nothing, aims are judged."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, request

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "bench"))

import contestants
import measure
import race
import report
import tools
import works

pytestmark = pytest.mark.processes

STALL = 0.3  # seconds


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("tools")
    tools.compile_tools(folder)
    return folder


def test_race_analyzers_count_by_port(compiled):
    ports = tools.free_ports(3)
    with tools.Sink(compiled, ports) as sink:
        for port, headers in ((ports[0], {}), (ports[2], {"X-Packet-Count": "64"}), (ports[2], {})):
            assert request(port, "POST", "/analyze", tools.packet(2), headers)[0] == 200
        assert request(ports[1], "GET", "/health")[0] == 200
        assert sink.each() == [1, 0, 65]
        assert sink.packets() == 66


def test_closed_analyzer_resets_and_refuses(compiled):
    """As one that is killed: its port is closed, its connections are reset; the others go on."""
    ports = tools.free_ports(2)
    with tools.Sink(compiled, ports) as sink, socket.create_connection(("127.0.0.1", ports[1])) as before:
        before.sendall(b"GET /health HTTP/1.1\r\n\r\n")
        assert before.recv(100).startswith(b"HTTP/1.1 200 OK\r\n")
        sink.close(1)
        with pytest.raises(ConnectionResetError):
            before.recv(100)
        with pytest.raises(ConnectionRefusedError):
            request(ports[1], "POST", "/analyze", tools.packet(2))
        assert request(ports[0], "POST", "/analyze", tools.packet(2))[0] == 200
        sink.open(1)
        assert request(ports[1], "POST", "/analyze", tools.packet(2))[0] == 200
        assert sink.each() == [1, 1]


def test_packets_have_the_stated_size():
    assert len(tools.packet(2)) == 452
    assert 18_000 <= len(tools.packet(100)) <= 20_000


def test_mix_is_packets_of_all_sizes():
    """As bench/README.md says it."""
    sizes = [len(body) for body in tools.mix()]
    assert (min(sizes), max(sizes), len(sizes)) == (200, 60_000, 48)
    assert sorted(sizes)[23] < 410 < sorted(sizes)[24]
    assert round(statistics.mean(sizes), -2) == 4800
    assert tools.mix() == tools.mix()
    for body in tools.mix():
        assert all(message["message"] for message in json.loads(body)["messages"])


def test_bodies_are_sent_in_turn(tmp_path):
    if not shutil.which("wrk"):
        pytest.skip("wrk is not installed (scripts/peers.sh installs it)")
    lengths = []

    async def serve(reader, writer):
        while True:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
                lengths.append(len(await reader.readexactly(int(head.lower().split(b"content-length:")[1].split()[0]))))
            except (OSError, EOFError):
                return
            writer.write(b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n")

    async def scenario():
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            return await asyncio.to_thread(tools.Wrk, tmp_path, port, tools.mix(), 1, 1)

    answers = asyncio.run(scenario())
    expected = [len(body) for body in tools.mix()]
    first = expected.index(lengths[0])  # wrk looks at one request before it sends any
    assert lengths[:96] == (expected * 3)[first : first + 96]
    assert 0 < answers.latency["p50"] <= answers.latency["p99"] <= answers.latency["p999"] <= answers.latency["max"]


def test_charged_memory_counts_a_page_once(tmp_path):
    def charged():
        return tools.charged_memory([os.getpid(), os.getpid()], tmp_path) / 2**20

    before = charged()
    memory = os.memfd_create("ring")
    os.posix_fallocate(memory, 0, 16 << 20)
    again = os.dup(memory)
    with (tmp_path / "ring").open("wb") as file:
        file.write(bytes(8 << 20))
        file.flush()
        assert charged() - before == pytest.approx(24, abs=4)
    assert charged() - before == pytest.approx(16, abs=4)
    os.close(memory)
    os.close(again)


def lag(longest, **counts):
    bounds = {"low": 1.0, "high": 8.4, "over": float("inf")}
    return measure.Lag(longest, {bound: counts.get(name, 0) for name, bound in bounds.items()})


@pytest.mark.parametrize(
    ("before", "after", "longest"),
    [
        (lag(3.0, low=9, high=1), lag(5.5, low=20, high=2), 5.5),
        (lag(5.5, low=9, high=1), lag(5.5, low=20, high=1), 1.0),
        (lag(40.0, low=9, over=1), lag(40.0, low=20, high=1, over=1), 8.4),
        (lag(7.0, low=9, high=1), lag(7.0, low=9, high=2), 7.0),
        (lag(7.0, high=1), lag(7.0, high=1), 0.0),
    ],
)
def test_pause_is_that_of_the_interval(before, after, longest):
    """What came before, such as the worker's start, is no part of it."""
    assert measure.longest_since([before], [after]) == longest
    assert measure.longest_since([lag(1.0), before], [lag(1.0), after]) == longest


class StallingServer:
    """Answers 202 at once, but the first request of all only after a while."""

    def __init__(self):
        self.requests = 0

    async def serve(self, reader, writer):
        while True:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except (OSError, EOFError):
                return
            await reader.readexactly(int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0]))
            self.requests += 1
            if self.requests == 1:
                await asyncio.sleep(STALL)
            writer.write(b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n")


def test_stall_is_charged_to_all_due_then(compiled):
    """A closed loop would send nothing while it waits, and see one slow answer in a hundred."""

    async def scenario():
        stalling = StallingServer()
        server = await asyncio.start_server(stalling.serve, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            with tools.Load(compiled, "rate", port, tools.packet(2), 1, 100, 1) as load:
                return await asyncio.to_thread(load.line), stalling.requests

    said, requests = asyncio.run(scenario())
    assert said["sent"] == said["answered"] == requests == 100
    assert said["max"] >= STALL * 1000
    assert said["p90"] > STALL * 1000 / 3  # ten of the packets that were due in the stall waited longer than this


def test_load_says_why_it_cannot_go_on(compiled):
    port = tools.free_ports(1)[0]
    with (
        tools.Load(compiled, "count", port, tools.packet(2), 1, 1) as load,
        pytest.raises(RuntimeError, match="refused"),
    ):
        load.line()


def test_micro_benchmarks_run_as_built():
    """With what `make build` has installed; each once, without measuring."""
    command = [sys.executable, "-m", "pytest", "bench/micro", "-q", "--benchmark-disable"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


# ------------------------------------------------------------------------------------------------------------- report

BATCH, OTHER = (
    works.Work(
        name,
        "throughput",
        works.Load(),
        {"X": name},
        (contestants.Nginx, contestants.Haproxy, contestants.Express),
        (works.Aim("best", at_least=2.0), works.Aim("Express", at_least=20), works.Aim("one", at_least=0.9)),
    )
    for name in ("one", "other")
)


def measured(**figures):
    """Return rounds by run: ``fastdist=[...]`` are figures of the work "one"."""
    kinds = {kind.name: kind for kind in contestants.CONTESTANTS}
    return {BATCH.run(kinds[name]): [{"per_cpu": each} for each in rounds] for name, rounds in figures.items()}


def test_aims_compare_medians_with_the_best():
    rows = report.summary([BATCH], measured(fastdist=[100, 900, 210], nginx=[100, 100], HAProxy=[50, 60, 120]), {})
    best, express, itself = rows["one"]["aims"]
    assert (best["against"], best["value"], best["met"], best["absent"]) == ("nginx", 2.1, True, ["Envoy"])
    assert (express["value"], express["met"]) == (None, None)
    assert itself["value"] == 1.0
    assert rows["one"]["contestants"]["fastdist"]["spread"]["per_cpu"] == [100, 900]


def test_aim_not_reached_is_missed():
    rows = report.summary([BATCH], measured(fastdist=[199], HAProxy=[100], Express=[1]), {})
    assert [aim["met"] for aim in rows["one"]["aims"]] == [False, True, True]


def test_works_are_compared_with_each_other():
    runs = measured(fastdist=[100]) | {OTHER.run(contestants.Fastdist): [{"per_cpu": 80}]}
    rows = report.summary([BATCH, OTHER], runs, {})
    assert (rows["other"]["aims"][2]["value"], rows["other"]["aims"][2]["met"]) == (0.8, False)


def test_peers_share_runs_of_equal_work():
    assert BATCH.run(contestants.Nginx) == OTHER.run(contestants.Nginx)
    assert BATCH.run(contestants.Fastdist) != OTHER.run(contestants.Fastdist)


def test_figures_of_before_are_judged():
    aim = works.Aim("before", at_most=1.1, figure="charged_mib")
    work = BATCH._replace(aims=(aim,))
    runs = {work.run(contestants.Fastdist): [{"per_cpu": 300, "charged_mib": 60}]}
    document = {"works": report.summary([work], runs, {}), "missing": {}}
    assert document["works"]["one"]["aims"] == []
    runs |= {work.run(contestants.Before): [{"per_cpu": 200, "charged_mib": 50}]}
    document = {"works": report.summary([work], runs, {}), "missing": {}}
    (judged,) = document["works"]["one"]["aims"]
    assert (judged["value"], judged["met"]) == (1.2, False)
    (_, columns, ((_, ours, before, *_),)), *_ = report.tables(document)
    assert columns[:3] == ["work", "fastdist", "before"]
    assert (ours, before) == ("300", "200 (x1.50)")


def test_before_has_the_settings_of_fastdist():
    assert BATCH.run(contestants.Before).settings == BATCH.run(contestants.Fastdist).settings


def test_tree_that_is_not_built_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"\.venv/bin/python is not there: `make build` in .* makes it"):
        contestants.Before.use(tmp_path)


def test_errors_of_emitters_are_remarked():
    found = {"median": {"worst": 12.0, "errors": 4}, "rounds": [{}]}
    document = {"missing": {}, "works": {"one": {"contestants": {"nginx": found}}}}
    assert report.remarks(document) == ["one: emitters of nginx saw 4 errors"]


def test_failed_contestant_is_shown_only(compiled, tmp_path, capsys):
    class Broken(contestants.Limit):
        def command(self):
            return ["sh", "-c", "echo it is broken; exit 1"]

    results, run = race.Results({}, {}), works.Run("throughput", works.Load(), Broken)
    race.one(race.Scene(compiled, tmp_path, 1, short=True), run, results)
    assert not results.measured
    failed = {BATCH.run(contestants.Nginx): results.failures[run]}
    document = {"works": report.summary([BATCH], measured(fastdist=[1]), failed), "missing": {"Envoy": "not there"}}
    report.show(document)
    shown = capsys.readouterr().out
    assert "one: nginx failed: RuntimeError: limit does not start" in shown
    assert "it is broken" in shown
    assert "Envoy did not run: not there" in shown


def test_works_and_aims_refer_to_something():
    names = {work.name for work in works.WORKS}
    assert len(names) == len(works.WORKS)
    for work in works.WORKS:
        assert work.figure in report.FIGURES
        for aim in work.aims:
            ran = {kind.name for kind in work.peers} | ({"best"} if contestants.Envoy in work.peers else set())
            assert aim.against in names | ran | {"", "before"}, (work.name, aim)
            assert aim.figure in report.FIGURES
            assert (aim.at_least is None) != (aim.at_most is None)
