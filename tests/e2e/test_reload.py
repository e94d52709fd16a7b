"""A reload while the service runs: of a file that is empty, half-written, or gone."""

from __future__ import annotations

import hashlib
import json
import signal

import pytest
from support import request, wait_until

TOKEN = {"Authorization": "Bearer a-token-of-a-test"}
SECURITY = {"security": {"tokens": ["a-token-of-a-test"]}}


def status_of_post(fastdist, **headers):
    return fastdist.post(b'{"emitterId":"e","messages":[{"message":"m"}]}', **headers)[0]


@pytest.mark.parametrize(
    "ending", [None, "[[analyzers]]", "[security]"], ids=["empty", "first part", "no last section"]
)
def test_reload_of_half_a_file_is_refused(mocks, serve, ending):
    fastdist = serve(mocks, SECURITY)
    sections = fastdist.config.read_text().split("[security]")
    tokens, analyzers = sections[1].split("[[analyzers]]", 1)
    whole = f"{sections[0]}[[analyzers]]{analyzers}[security]{tokens}"  # tokens last, as people have it
    before = fastdist.analyzers()
    fastdist.config.write_text(whole.partition(ending)[0] if ending else "")
    status, _, body = request(fastdist.port, "POST", "/admin/reload")
    assert status == 422
    assert all("left out" in error["detail"] for error in json.loads(body)["errors"])
    assert [row["endpoint"] for row in fastdist.analyzers().values()] == [row["endpoint"] for row in before.values()]
    assert (status_of_post(fastdist), status_of_post(fastdist, **TOKEN)) == (401, 202)
    fastdist.config.write_text(whole)
    assert request(fastdist.port, "POST", "/admin/reload")[0] == 200


def test_sighup_on_empty_file_is_refused(mocks, serve):
    fastdist = serve(mocks, SECURITY)
    fastdist.config.write_text("")
    fastdist.signal(signal.SIGHUP)
    assert "left out" in fastdist.line_with("the new configuration cannot be used")
    assert status_of_post(fastdist) == 401


def test_tokens_set_to_empty_list_are_gone(mocks, serve):
    fastdist = serve(mocks, SECURITY)
    fastdist.config.write_text(fastdist.config.read_text().replace('["a-token-of-a-test"]', "[]"))
    fastdist.signal(signal.SIGHUP)
    wait_until(lambda: status_of_post(fastdist) == 202, "POST /logs is open")


ADMIN = {"Authorization": "Bearer a-secret-of-an-administrator"}
BY = f"127.0.0.1, token {hashlib.sha256(b'a-secret-of-an-administrator').hexdigest()[:8]}"


def reload(fastdist):
    status, _, body = request(fastdist.port, "POST", "/admin/reload", headers=ADMIN)
    return status, json.loads(body)


def metric(fastdist, name):
    text = request(fastdist.port, "GET", "/metrics")[2].decode()
    return float(next(line for line in text.splitlines() if line.startswith(f"{name} ")).split()[1])


def edit(fastdist, before, after):
    text = fastdist.config.read_text()
    assert before in text
    fastdist.config.write_text(text.replace(before, after, 1))


def test_reload_says_what_has_changed(mocks, serve):
    fastdist = serve(mocks, {"security": {"admin_tokens": ["a-secret-of-an-administrator"]}, "retry": {"base": "50ms"}})
    started = fastdist.stats()["configuration"]
    assert (started["file"], started["lastReloadAt"], started["lastReloadSuccessful"]) == (
        str(fastdist.config),
        None,
        True,
    )
    weight = b'{"weight": 5}'
    assert request(fastdist.port, "PATCH", "/analyzers/A1", weight, ADMIN)[0] == 200
    edit(fastdist, "weight = 0.1", "weight = 0.6")
    edit(fastdist, "weight = 0.4", "weight = 0.5")
    edit(fastdist, 'base = "50ms"', 'base = "60ms"')
    for times in (1, 2):
        status, done = reload(fastdist)
        changed = [("analyzers[A1].weight", "0.1", "0.6"), ("analyzers[A2].weight", "0.4", "0.5")]
        assert status == 200
        assert [tuple(each.values()) for each in done["changed"]] == (changed if times == 1 else [])
        assert (done["masked"], done["needsRestart"]) == (["A1"], ["retry.base"])
        state = fastdist.stats()["configuration"]
        assert (state["masked"], state["needsRestart"], state["lastReloadSuccessful"]) == (["A1"], ["retry.base"], True)
    first = json.loads(fastdist.line_with('"configuration reloaded"'))
    assert (first["by"], first["masked"], first["needs_restart"]) == ([BY], ["A1"], ["retry.base"])
    assert [tuple(each.values()) for each in first["changed"]] == changed
    line = json.loads(fastdist.line_with('"analyzer changed"'))
    assert (line["by"], line["before"]["weight"], line["after"]["weight"]) == (BY, 0.1, 5.0)
    assert "a-secret-of" not in fastdist.output
    assert request(fastdist.port, "DELETE", "/analyzers/A1/override", headers=ADMIN)[0] == 200
    wait_until(lambda: fastdist.stats()["configuration"]["masked"] == [], "nothing is masked")
    assert fastdist.analyzers()["A1"]["weight"] == 0.6


def test_failed_reload_shows_until_one_works(mocks, serve):
    fastdist = serve(mocks, {"security": {"admin_tokens": ["a-secret-of-an-administrator"]}})
    before = metric(fastdist, "fastdist_config_last_reload_success_timestamp_seconds")
    assert metric(fastdist, "fastdist_config_last_reload_successful") == 1
    edit(fastdist, "weight = 0.4", "weight = -4")
    status, document = reload(fastdist)
    lines = fastdist.config.read_text().splitlines()
    fault = {
        "pointer": "/analyzers/1/weight",
        "detail": "analyzers[1].weight: must be >= 0",
        "file": str(fastdist.config),
        "line": lines.index("weight = -4") + 1,
    }
    assert (status, document["errors"]) == (422, [fault])
    state = fastdist.stats()["configuration"]
    assert (state["lastReloadSuccessful"], state["errors"]) == (False, [fault])
    assert metric(fastdist, "fastdist_config_last_reload_successful") == 0
    line = json.loads(fastdist.line_with("the new configuration cannot be used"))
    assert line["problems"] == [f"{fault['detail']} ({fastdist.config}:{fault['line']})"]
    assert line["by"] == [BY]
    assert metric(fastdist, "fastdist_config_last_reload_success_timestamp_seconds") == before
    edit(fastdist, "weight = -4", "weight = 4")
    fastdist.signal(signal.SIGHUP)
    wait_until(lambda: metric(fastdist, "fastdist_config_last_reload_successful") == 1, "it was mended")
    assert metric(fastdist, "fastdist_config_last_reload_success_timestamp_seconds") > before
    assert json.loads(fastdist.line_with('"configuration reloaded"'))["by"] == ["SIGHUP"]
    state = fastdist.stats()["configuration"]
    assert (state["lastReloadSuccessful"], state["errors"]) == (True, [])
