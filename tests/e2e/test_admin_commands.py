"""``fastdist reload`` and ``fastdist analyzers`` against a running distributor."""

from __future__ import annotations

import sys

from support import Emitter, wait_until

FASTDIST = [sys.executable, "-m", "fastdist"]


def test_analyzers_are_drained_and_reset(mocks, serve, run):
    fastdist = serve(mocks)

    def analyzers(*words):
        command = run(*FASTDIST, "analyzers", *words, "--url", f"http://127.0.0.1:{fastdist.port}")
        assert command.wait() == 0, command.output
        return [line.split() for line in command.lines]

    assert [row[:3] for row in analyzers("list")[1:]] == [
        ["A1", "online", "0.1"],
        ["A2", "online", "0.4"],
        ["A3", "online", "0.2"],
        ["A4", "online", "0.3"],
    ]
    assert analyzers("drain", "A2")[1][:3] == ["A2", "draining", "0.4"]
    assert analyzers("weight", "A1", "0.3")[1][:3] == ["A1", "online", "0.3*"]
    Emitter(fastdist.port).send(400)
    fastdist.wait_at_rest()
    assert mocks.totals("A2")["ids"] == 0
    assert analyzers("online", "A2")[1][1] == "online"
    assert analyzers("reset", "A1")[1][:3] == ["A1", "online", "0.1"]
    assert all(row["override"] is None for row in fastdist.analyzers().values())


def test_reload_and_its_refusals(mocks, serve, run):
    fastdist = serve(mocks, {"security": {"admin_tokens": ["admin"]}})
    url = ("--url", f"http://127.0.0.1:{fastdist.port}")
    text = fastdist.config.read_text()
    refused = run(*FASTDIST, "reload", *url)
    assert refused.wait() == 4
    assert refused.lines[0].endswith("give one by --token or FASTDIST_TOKEN")
    fastdist.config.write_text(text.replace("weight = 0.1", "weight = -1"))
    bad = run(*FASTDIST, "reload", *url, FASTDIST_TOKEN="admin")
    assert bad.wait() == 4
    assert any(
        line.startswith("fastdist: analyzers[0].weight: must be >= 0 (") and f"{fastdist.config}:" in line
        for line in bad.lines
    ), bad.lines
    assert fastdist.analyzers()["A1"]["weight"] == 0.1
    fastdist.config.write_text(text.replace("weight = 0.1", "weight = 0.7").replace("64MiB", "65MiB"))
    good = run(*FASTDIST, "reload", *url, "--token", "admin")
    assert good.wait() == 0
    changed = "changed: analyzers[A1].weight: 0.1 -> 0.7"
    assert good.lines == ["the configuration was read again", changed, "needs a restart: queue.capacity"]
    wait_until(lambda: fastdist.analyzers()["A1"]["weight"] == 0.7, "the new weight")
