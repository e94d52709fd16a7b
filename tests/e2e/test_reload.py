"""A reload while the service runs: of a file that is empty, half-written, or gone."""

from __future__ import annotations

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
