"""Dead letters with bounds: never over them, all that goes is counted, and what is there is in view."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families
from small_disk import fill, small_disk
from support import BODY, Emitter, Mocks, free_port, get_json, kill_worker, request, wait_until

FASTDIST = [sys.executable, "-m", "fastdist"]
MIB = 2**20
FIVE = ("A1", "A2", "A3", "A4", "A5")
EVEN = dict.fromkeys(FIVE, 0.2)
# However many packets it refuses: none of them is tried elsewhere, and it stays online.
BELIEVED = {"health": {"fall": 10_000}}


@pytest.fixture
def five(start):
    """Five mock analyzers, of which the last refuses all packets."""
    mocks = start(Mocks, FIVE)
    mocks.set("A5", status=422)
    return mocks


def files_in(folder):
    return sorted((folder / "dead-letters").glob("*.ndjson"))


def size_of(folder):
    """Return how large the files are that are there at one moment, at least: while one is looked at another may go."""
    sizes = {}
    for path in files_in(folder):
        with contextlib.suppress(FileNotFoundError):
            sizes[path] = path.stat().st_size
    return sum(size for path, size in sizes.items() if path.exists())


class Watch:
    """The largest size that the files were seen to have together."""

    def __init__(self, folder):
        self.folder, self.largest, self._over = folder, 0, threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()

    def _look(self):
        while not self._over.is_set():
            self.largest = max(self.largest, size_of(self.folder))
            time.sleep(0.001)


def metric(port, name):
    """Return {labels: value} of a metric."""
    text = request(port, "GET", "/metrics")[2].decode()
    return {
        tuple(sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    }


def gauge(fastdist):
    return sum(metric(fastdist.port, "fastdist_dead_letter_packets").values())


def given_up(fastdist):
    """Return how many packets have become dead letters, at rest: about a fifth."""
    return fastdist.wait_at_rest()["packets"]["deadLettered"]


def discarded(fastdist):
    return sum(fastdist.stats()["deadLetters"]["discarded"].values())


def replay(run, fastdist, *options):
    words = ["dead-letters", "replay", fastdist.folder / "data", "--url", f"http://127.0.0.1:{fastdist.port}", *options]
    process = run(*FASTDIST, *words)
    return process.wait(), process.output


def test_a_refusing_analyzer_on_a_small_disk(five, serve, run, tmp_path):
    """Every fifth of 10,000 packets is refused: two and more MiB of dead letters on 4 MiB, beside a queue of one."""
    with small_disk(tmp_path / "data", "4M") as disk:
        settings = {
            "queue": {"durability": "disk", "capacity": "1MiB"},
            "dead_letters": {"max_bytes": "1MiB"},
            **BELIEVED,
        }
        fastdist = serve(five, settings, weights=EVEN)
        with Watch(disk) as watch:
            emitter = Emitter(fastdist.port, connections=8).send(10_000)
            all_of_them = given_up(fastdist)
        refused = emitter.count(503)  # on a busy machine the queue of 1 MiB may be full; the disk never is
        assert refused == fastdist.stats()["rejected"]["queueFull"]
        assert len(emitter.accepted) == 10_000 - refused >= 5000
        assert 0.5 * MIB < watch.largest <= MIB + MIB // 16, "a file is an eighth of a worker's part"
        assert all_of_them == pytest.approx(len(emitter.accepted) / 5, abs=10)
        wait_until(lambda: size_of(disk) <= MIB - MIB // 16, "there is room for a file, so that no more is discarded")

        def agree():
            return gauge(fastdist) == len(fastdist.dead_letters()) == all_of_them - discarded(fastdist)

        wait_until(agree, "the gauge has what is there")
        gone, there = discarded(fastdist), fastdist.dead_letters()
        assert gone + len(there) == all_of_them
        assert gone > 200
        assert metric(fastdist.port, "fastdist_dead_letter_packets_discarded_total") == {
            (("reason", "max_age"),): 0,
            (("reason", "max_bytes"),): gone,
        }
        assert fastdist.stats()["deadLetters"]["counts"] == [
            {"reason": "refused", "analyzer": "A5", "packets": len(there)}
        ]
        five.set_all(status=None)
        wait_until(lambda: replay(run, fastdist)[0] == 0, "all are replayed")
        wait_until(lambda: gauge(fastdist) == 0, "the gauge is 0")
        assert metric(fastdist.port, "fastdist_dead_letter_packets")[("analyzer", "A5"), ("reason", "refused")] == 0
        fastdist.wait_at_rest()
        delivered = five.delivered()
        missing = emitter.accepted - delivered.keys()
        assert len(missing) == gone, "what is not delivered was discarded, and counted"
        assert set(delivered.values()) == {1}


def test_figures_survive_restarts(five, serve, run, tmp_path):
    """With another number of workers, whose bound is the same, and an analyzer that is gone."""
    settings = {"dead_letters": {"max_bytes": "256KiB"}, **BELIEVED}
    fastdist = serve(five, settings, weights=EVEN)
    Emitter(fastdist.port, connections=4).send(2000)
    all_of_them = given_up(fastdist)
    wait_until(
        lambda: size_of(tmp_path / "data") <= 240 * 1024, "there is room for a file, so that no more is discarded"
    )
    wait_until(lambda: gauge(fastdist) == len(fastdist.dead_letters()), "the gauge has what is there")
    first, there = discarded(fastdist), len(fastdist.dead_letters())
    assert fastdist.stop() == 0
    assert first + there == all_of_them
    with Watch(tmp_path / "data") as watch:
        fastdist = serve(five, settings | {"server": {"workers": 3}}, weights=EVEN)
        wait_until(lambda: gauge(fastdist) == there - discarded(fastdist) > 0, "what is there is known again")
        emitter = Emitter(fastdist.port, connections=6).send(2000)
        there += given_up(fastdist)
    assert watch.largest <= 256 * 1024 + 16 * 1024
    wait_until(lambda: there == discarded(fastdist) + len(fastdist.dead_letters()), "all are there or counted")
    assert len(emitter.accepted) == 2000
    command = run(*FASTDIST, "dead-letters", "purge", str(tmp_path / "data"), "--yes")
    assert command.wait() == 0
    wait_until(lambda: gauge(fastdist) == 0, "the gauge is 0 after a purge")


def test_views_show_the_last_without_packets(five, serve, run, tmp_path):
    fastdist = serve(five, BELIEVED, weights=EVEN)
    emitter = Emitter(fastdist.port).send(150)
    all_of_them = given_up(fastdist)
    wait_until(lambda: get_json(fastdist.port, "/dead-letters")["packets"] == all_of_them, "all are counted")
    shown = get_json(fastdist.port, "/dead-letters")
    dead_letters = sorted(fastdist.dead_letters(), key=lambda each: each["deadLetteredAt"], reverse=True)
    assert [each["id"] for each in shown["last"]] == [each["id"] for each in dead_letters[:20]]
    for described, whole in zip(shown["last"], dead_letters, strict=False):
        assert described == {"bytes": len(BODY)} | {key: whole[key] for key in described if key != "bytes"}
        assert not {"body", "bodyBase64", "response"} & described.keys()
    assert (shown["files"], shown["bytes"]) == (len(files_in(tmp_path / "data")), size_of(tmp_path / "data"))
    assert shown["counts"] == [{"reason": "refused", "analyzer": "A5", "packets": all_of_them}]
    health = get_json(fastdist.port, "/health")["deadLetters"]
    assert (health["packets"], health["bytes"]) == (all_of_them, shown["bytes"])
    assert 0 < health["fileSystemUsed"] < 1
    listed = run(*FASTDIST, "dead-letters", "list", str(tmp_path / "data"), "--json")
    assert listed.wait() == 0
    responses = {json.loads(line)["response"] for line in listed.output.splitlines()}
    assert len(responses) == 1
    (response,) = responses
    assert "422" in response or "error" in response, response
    table = run(*FASTDIST, "dead-letters", "list", str(tmp_path / "data"))
    assert table.wait() == 0
    assert " ".join(response.split())[:40] in table.output
    assert response not in fastdist.output
    assert len(emitter.accepted) == 150


def test_bounds_change_with_a_reload(five, serve, tmp_path):
    fastdist = serve(five, BELIEVED, weights=EVEN)
    Emitter(fastdist.port).send(1500)
    assert given_up(fastdist) == len(fastdist.dead_letters()) > 290
    bounds = '[dead_letters]\nmax_bytes = "64KiB"\npath = "elsewhere"\n'
    fastdist.config.write_text(bounds + fastdist.config.read_text())
    status, _, body = request(fastdist.port, "POST", "/admin/reload")
    assert (status, json.loads(body)["needsRestart"]) == (200, ["dead_letters.path"])
    wait_until(lambda: discarded(fastdist) > 0, "some are discarded")
    assert fastdist.line_with("dead letters discarded")
    Emitter(fastdist.port).send(500)
    all_of_them = given_up(fastdist)
    wait_until(lambda: size_of(tmp_path / "data") <= 64 * 1024, "the bound holds")
    wait_until(lambda: discarded(fastdist) + len(fastdist.dead_letters()) == all_of_them, "all are there or counted")
    fastdist.config.write_text(fastdist.config.read_text().replace(bounds, '[dead_letters]\nmax_age = "1s"\n'))
    assert request(fastdist.port, "POST", "/admin/reload")[0] == 200
    wait_until(lambda: fastdist.dead_letters() == [], "all have become too old")
    assert fastdist.stats()["deadLetters"]["discarded"]["maxAge"] > 0
    assert discarded(fastdist) == all_of_them


def test_a_replay_runs_beside_the_bound(five, serve, run, tmp_path):
    """It holds files while others are discarded; whatever it has sent is delivered, and nothing else is missing."""
    settings = {"dead_letters": {"max_bytes": "128KiB"}, "queue": {"durability": "disk", "sync_interval": "50ms"}}
    fastdist = serve(five, settings | BELIEVED, weights=EVEN)
    emitter = Emitter(fastdist.port, connections=4).start()
    wait_until(lambda: discarded(fastdist) > 100, "some were discarded")
    for _ in range(5):
        status, output = replay(run, fastdist, "--limit", "50")
        assert status in (0, 1), output
        assert "Traceback" not in output
        assert "stopped" not in output, output
    emitter.stop()
    fastdist.wait_at_rest()
    five.set_all(status=None)
    wait_until(lambda: replay(run, fastdist)[0] == 0, "the rest is replayed")
    fastdist.wait_at_rest()
    missing = emitter.accepted - five.delivered().keys()
    assert len(missing) <= discarded(fastdist)
    assert fastdist.dead_letters() == []
    assert list((tmp_path / "data" / "dead-letters").iterdir()) == [], "no journal is left"


def test_a_killed_worker_under_the_bound(five, serve, tmp_path):
    settings = {"dead_letters": {"max_bytes": "128KiB"}, "queue": {"durability": "disk", "capacity": "16MiB"}}
    fastdist = serve(five, settings | BELIEVED, weights=EVEN)
    with Watch(tmp_path / "data") as watch:
        emitter = Emitter(fastdist.port, connections=4).start()
        for kills in range(1, 4):
            before = discarded(fastdist)
            wait_until(lambda before=before: discarded(fastdist) > before + 30, "some are discarded")
            kill_worker(fastdist.worker_pids()[kills % 2])
            wait_until(
                lambda kills=kills: sum(row["restarts"] for row in fastdist.stats()["workers"]) >= kills, "it restarts"
            )
            emitter.wait_for(100)
        emitter.stop()
        stats = fastdist.wait_at_rest()
    assert watch.largest <= 128 * 1024 + 16 * 1024
    there = {each["id"] for each in fastdist.dead_letters()}
    missing = emitter.accepted - five.delivered().keys() - there
    assert len(missing) <= discarded(fastdist)
    assert stats["packets"]["deadLettered"] <= discarded(fastdist) + len(fastdist.dead_letters()), "twice at worst"
    before = discarded(fastdist)
    fastdist.kill_all()
    with Watch(tmp_path / "data") as watch:
        fastdist = serve(five, settings | BELIEVED | {"server": {"workers": 3}}, weights=EVEN)
        again = Emitter(fastdist.port, connections=4, prefix="again").send(1000)
        fastdist.wait_at_rest()
        wait_until(lambda: gauge(fastdist) == len(fastdist.dead_letters()), "the gauge has what is there")
    assert watch.largest <= 128 * 1024 + 16 * 1024
    there = {each["id"] for each in fastdist.dead_letters()}
    missing = (emitter.accepted | again.accepted) - five.delivered().keys() - there
    assert len(missing) <= before + discarded(fastdist)


def test_a_full_file_system_is_warned_of(five, serve, run, tmp_path):
    with small_disk(tmp_path / "dead", "4M") as disk:
        fastdist = serve(five, {"dead_letters": {"path": str(disk)}, **BELIEVED}, weights=EVEN)
        Emitter(fastdist.port).send(50)
        all_of_them = given_up(fastdist)
        assert not (tmp_path / "data" / "dead-letters").exists()
        wait_until(lambda: gauge(fastdist) == all_of_them > 0, "they are counted")
        assert "warning" not in get_json(fastdist.port, "/health")["deadLetters"]
        fill(disk)
        wait_until(lambda: "warning" in get_json(fastdist.port, "/health")["deadLetters"], "it is warned of")
        line = json.loads(fastdist.line_with("over 80% full"))
        assert (line["level"], line["problem"]) == ("warning", "dead_letters_fill_disk")
        purge = run(*FASTDIST, "dead-letters", "purge", str(disk), "--yes")
        assert purge.wait() == 0
        assert f"removed {all_of_them}" in purge.output
        wait_until(
            lambda: "warning" not in get_json(fastdist.port, "/health")["deadLetters"], "no dead letters, no warning"
        )
        fastdist.line_with("resolved: dead letters fill their file system")
        assert sum("over 80% full" in line for line in fastdist.lines) == 1, "it is said once"


def test_a_bound_heals_a_full_disk(five, serve, tmp_path):
    """As the runbook of the alert has it: what is oldest goes, and what waited is written."""
    with small_disk(tmp_path / "dead", "2M") as disk:
        fastdist = serve(five, {"dead_letters": {"path": str(disk)}, **BELIEVED}, weights=EVEN)
        emitter = Emitter(fastdist.port, connections=8).start()
        fastdist.line_with("No space left on device", 120)
        wait_until(lambda: fastdist.stats()["packets"]["queued"] > 50, "what is given up stays queued")
        emitter.stop()
        text = fastdist.config.read_text()
        fastdist.config.write_text(text.replace("[dead_letters]", '[dead_letters]\nmax_bytes = "1MiB"'))
        assert request(fastdist.port, "POST", "/admin/reload")[0] == 200
        all_of_them = given_up(fastdist)
        there = [line for path in disk.glob("*.ndjson") for line in path.read_text().splitlines()]
        assert sum(map(len, there)) <= MIB
        assert all_of_them == discarded(fastdist) + len(there)
        missing = emitter.accepted - five.delivered().keys() - {json.loads(line)["id"] for line in there}
        assert len(missing) == discarded(fastdist)


def test_a_folder_that_cannot_be_used(run, tmp_path):
    (tmp_path / "file").write_text("in its place")
    config = tmp_path / "fastdist.toml"
    config.write_text(
        f'[server]\nport = {free_port()}\n[queue]\npath = "{tmp_path}/data"\n'
        f'[dead_letters]\npath = "{tmp_path}/file/dead"\n'
    )
    process = run(*FASTDIST, "serve", "--config", str(config))
    assert process.wait() == 3
    assert "dead_letters.path" in process.output
    assert "Traceback" not in process.output
