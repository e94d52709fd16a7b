"""Configurations with many analyzers, or with many faults, do the workers no harm."""

from __future__ import annotations

import json

from support import request, wait_until

QUIET = {
    "server": {"max_connections": 100},
    "delivery": {"connections": 1},
    "health": {"interval": "1h", "timeout": "30s"},
}


def many(mocks, count: int) -> dict[str, str]:
    """Return analyzers with ids as long as they may be, all of them served by the mocks."""
    endpoints = list(mocks.endpoints.values())
    return {f"{number:064}": endpoints[number % len(endpoints)] for number in range(count)}


def test_2000_analyzers_start_and_reload(mocks, serve):
    """Their ids alone fill more than a process takes on its command line, or a stream reads as one line by default."""
    analyzers = many(mocks, 2000)
    fastdist = serve(analyzers, QUIET, weights=dict.fromkeys(analyzers, 1.0))
    pids = fastdist.worker_pids()
    text = fastdist.config.read_text()
    fastdist.config.write_text(text.replace("weight = 1.0", "weight = 3.0", 1))
    status, _, body = request(fastdist.port, "POST", "/admin/reload", b"")
    assert (status, json.loads(body)["needsRestart"]) == (200, [])
    weights = [row["weight"] for row in fastdist.analyzers().values()]
    assert sorted(weights) == [1.0] * 1999 + [3.0]
    assert fastdist.post()[0] == 202
    wait_until(lambda: fastdist.stats()["packets"]["delivered"] == 1, "the packet is delivered")
    assert fastdist.worker_pids() == pids
    assert [row["restarts"] for row in fastdist.stats()["workers"]] == [0, 0]


def test_thousands_of_faults_kill_no_worker(mocks, serve):
    fastdist = serve(mocks)
    pids = fastdist.worker_pids()
    right = fastdist.config.read_text()
    wrong = "".join(f'[[analyzers]]\nid = "B{number}"\nendpoint = "x"\nweight = -1\n' for number in range(1000))
    fastdist.config.write_text(right + wrong)
    status, headers, body = request(fastdist.port, "POST", "/admin/reload", b"")
    assert (status, headers["content-type"]) == (422, "application/problem+json")
    errors = [row["detail"] for row in json.loads(body)["errors"]]
    assert errors[0].startswith("analyzers[4].endpoint: ")
    assert "1900 more" in errors[-1]
    assert fastdist.worker_pids() == pids
    fastdist.config.write_text(right)
    assert request(fastdist.port, "POST", "/admin/reload", b"")[0] == 200
    assert [row["restarts"] for row in fastdist.stats()["workers"]] == [0, 0]
