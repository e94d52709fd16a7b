"""Reloads and overrides while packets flow: none is lost, none delivered twice, no connection dropped."""

from __future__ import annotations

import json
import os
import random
import signal
import time

import pytest
from experiment import ANALYZERS, BATCHES, DELIVERY, form
from support import WEIGHTS, request, wait_until


def write_config(experiment, weights: dict[str, float]) -> None:
    """Replace the analyzers in the configuration, at one stroke."""
    path = experiment.fastdist.config
    text = path.read_text().partition("[[analyzers]]")[0]
    for name, weight in weights.items():
        text += f'[[analyzers]]\nid = "{name}"\nendpoint = "{experiment.mocks.endpoints[name]}"\nweight = {weight}\n'
    beside = path.with_suffix(".beside")
    beside.write_text(text)
    beside.replace(path)


def change(experiment, method: str, path: str, document: object = None) -> int:
    body = None if document is None else json.dumps(document).encode()
    return request(experiment.port, method, path, body)[0]


@pytest.mark.parametrize("delivery", [DELIVERY, BATCHES], ids=["single", "batch"])
def test_reloads_twice_a_second(experiment, delivery):
    """Weights change, analyzers come and go; what is in flight to one that is removed finishes, or goes elsewhere."""
    experiment.analyzers("--latency", "0.005", "--jitter", "0.02")
    fastdist = experiment.serve({"delivery": delivery})
    emitter = experiment.emitter().start().wait_for(100)
    rng = random.Random(random.random())
    reloads = form(6, 40)
    for done in range(reloads):
        some = rng.sample(ANALYZERS, rng.randint(1, 4))
        write_config(experiment, {name: rng.choice([0.1, 0.5, 1, 7]) for name in some})
        os.kill(fastdist.process.pid, signal.SIGHUP)
        time.sleep(0.5)
        # Else, on a slow machine, several signals share a reload.
        wait_until(lambda done=done: fastdist.output.count("configuration reloaded") > done, "it is reloaded")
    write_config(experiment, WEIGHTS)
    os.kill(fastdist.process.pid, signal.SIGHUP)
    wait_until(
        lambda: {name: row["weight"] for name, row in fastdist.analyzers().items()} == WEIGHTS, "the last one holds"
    )
    emitter.wait_for(200)
    experiment.judge(f"SIGHUP twice a second ({delivery.get('mode', 'single')})")
    assert {*emitter.answers.values()} == {202}
    assert sum(row["restarts"] for row in fastdist.stats()["workers"]) == 0


def test_reloads_of_a_wrong_configuration(experiment):
    experiment.analyzers()
    fastdist = experiment.serve()
    emitter = experiment.emitter().start().wait_for(100)
    good = fastdist.config.read_text()
    for wrong in ("", good.replace("weight = 0.4", "weight = -1"), good + "[nonsense]\n", good[: len(good) // 2]):
        fastdist.config.write_text(wrong)
        before = fastdist.output.count("the old one stays")
        os.kill(fastdist.process.pid, signal.SIGHUP)
        if wrong:  # an empty file has the defaults: four analyzers elsewhere
            wait_until(lambda before=before: fastdist.output.count("the old one stays") > before, "it is refused")
            assert change(experiment, "POST", "/admin/reload") == 422
    fastdist.config.write_text(good)
    assert change(experiment, "POST", "/admin/reload") == 200
    emitter.wait_for(200)
    experiment.judge("reloads of a wrong configuration")
    assert {*emitter.answers.values()} == {202}


def test_overrides_under_load_are_kept(experiment):
    """By requests to any worker, one after the other, and over a kill -9 of everything."""
    experiment.analyzers()
    experiment.serve()
    emitter = experiment.emitter().start().wait_for(100)
    rng = random.Random(random.random())
    expected: dict[str, dict[str, object]] = {}
    for _ in range(form(2, 6)):
        for _ in range(form(15, 60)):
            name = rng.choice(ANALYZERS[1:])  # A1 stays, so that one is always left
            kind = rng.choice(["weight", "state", "clear"])
            if kind == "clear":
                assert change(experiment, "DELETE", f"/analyzers/{name}/override") == 200
                expected.pop(name, None)
                continue
            value: object = rng.choice([0, 0.25, 3]) if kind == "weight" else rng.choice(["draining", "online"])
            assert change(experiment, "PATCH", f"/analyzers/{name}", {kind: value}) == 200
            override = expected.setdefault(name, {})
            override[kind] = value
            if override.get("state") == "online":
                del override["state"]
            time.sleep(0.01)
        expected = {name: override for name, override in expected.items() if override}
        shown = {name: row["override"] for name, row in experiment.fastdist.analyzers().items() if row["override"]}
        assert shown == expected
        experiment.fastdist.kill_all()
        experiment.serve()
        shown = {name: row["override"] for name, row in experiment.fastdist.analyzers().items() if row["override"]}
        assert shown == expected
        emitter.wait_for(100)
    for name in ANALYZERS:
        assert change(experiment, "DELETE", f"/analyzers/{name}/override") == 200
    assert {name: row["weight"] for name, row in experiment.fastdist.analyzers().items()} == WEIGHTS
    emitter.wait_for(100)
    experiment.judge("PATCH and DELETE of overrides, everything killed", bound=form(2, 6) * 2 * 8 * 4 * 2)
