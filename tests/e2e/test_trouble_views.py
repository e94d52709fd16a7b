"""Troubles as they happen: all views of a running service show one list, and what is answered agrees with it."""

from __future__ import annotations

import io
import json
import re
import signal
from datetime import UTC, datetime

import pytest
from manager import Manager
from rich.console import Console
from support import Distributor, get_json, kill_worker, request, wait_until

from fastdist.client.connection import Target
from fastdist.client.top import Watcher
from fastdist.client.top_view import render
from fastdist.supervisor.problems import COUNTED

LARGE = b'{"emitterId":"e","messages":[{"message":"%s"}]}' % (b"x" * 100_000)
QUEUE = {"durability": "disk", "capacity": "2MiB"}


@pytest.fixture
def manager(tmp_path):
    return Manager(str(tmp_path / "notify"))


@pytest.fixture
def fastdist(tmp_path, mocks, manager):
    mocks.start_anew()
    settings = {"queue": QUEUE, "server": {"workers": 1}}
    few = {name: mocks.endpoints[name] for name in ("A1", "A2", "A4")}
    fastdist = Distributor(tmp_path, few, settings, NOTIFY_SOCKET=manager.name)
    yield fastdist
    fastdist.kill_all()
    mocks.start_anew()


def listed(fastdist):
    return get_json(fastdist.port, "/health")["problems"]


def shown_by_top(fastdist):
    out = io.StringIO()
    frame = Watcher(Target.parse(f"http://127.0.0.1:{fastdist.port}", None)).look()
    Console(file=out, width=1000, color_system=None).print(render(frame, 1000))
    lines = [line.strip() for line in out.getvalue().splitlines()]
    return [re.sub(r" \(\d+ \w+\)$", "", line) for line in lines if line.startswith(("ERROR", "WARNING", "NOTICE"))]


def logged(fastdist):
    """Return the keys of what has begun and not ended, as the log has it."""
    lasting = []
    for line in list(fastdist.lines):
        said = json.loads(line) if line.startswith("{") else {}
        key = (said.get("problem"), said.get("subject"))
        if key[0] and said["message"].startswith("resolved: "):
            lasting.remove(key)
        elif key[0]:
            assert key not in lasting, f"{key} has begun already"
            lasting.append(key)
    return set(lasting)


def status_of(manager):
    return next(text for text in reversed(manager.messages) if text.startswith("STATUS="))


def views_agree(fastdist, manager):
    """Whether all views show one list, at one moment."""
    before = listed(fastdist)
    others = shown_by_top(fastdist), status_of(manager), logged(fastdist)
    if listed(fastdist) != before:
        return None
    top = [f"{problem['level'].upper()}: {problem['detail']}" for problem in before]
    parts = [problem["detail"] for problem in before]
    status = f"{others[1].split('; ')[0]}{''.join(f'; {part}' for part in parts)}"
    keys = {(problem["code"], problem["subject"]) for problem in before if problem["code"] not in COUNTED}
    settling = {key for key in others[2] - keys if key[0] in {"queue_nearly_full", "queue_full", "storage_failing"}}
    return before if others == (top, status, keys | settling) else None


# ---- what happens, and whether packets are taken then


def one_offline(_, mocks):
    mocks.set("A2", unhealthy=True)


def all_offline(fastdist, mocks):
    mocks.set_all(refuse=True)
    fastdist.wait_for_states("offline")


def full(fastdist, mocks):
    all_offline(fastdist, mocks)
    wait_until(lambda: fastdist.post(LARGE)[0] == 503, "the queue is full")


def nearly_full(fastdist, mocks):
    all_offline(fastdist, mocks)
    for _ in range(18):
        assert fastdist.post(LARGE)[0] == 202


def refusing(fastdist, mocks):
    mocks.set_all(status=422)
    for _ in range(40):
        fastdist.post()


def unwritable_dead_letters(fastdist, mocks):
    (fastdist.folder / "data" / "dead-letters").write_text("in the place of the folder")
    mocks.set_all(status=422)
    for _ in range(20):
        assert fastdist.post()[0] == 202


def renamed(fastdist, _):
    (fastdist.folder / "data").rename(fastdist.folder / "moved")


def set_aside(fastdist, _):
    (fastdist.folder / "data" / "ring-7.fdq.damaged-1a2b3c4d").write_bytes(b"")


def draining(fastdist, _):
    assert request(fastdist.port, "PATCH", "/analyzers/A1", b'{"state":"draining"}')[0] == 200


def bad_file(fastdist, _):
    fastdist.config.write_text(fastdist.config.read_text().replace("weight = 0.4", "weight = -4"))
    fastdist.signal(signal.SIGHUP)


def other_port(fastdist, _):
    fastdist.config.write_text(fastdist.config.read_text().replace("[queue]", "[retry]\nbase = 1\n[queue]"))
    assert request(fastdist.port, "POST", "/admin/reload")[0] == 200


def crashes(fastdist, _):
    for times in range(1, 4):
        kill_worker(fastdist.worker_pids()[0])
        fastdist.wait_for_lines("worker exited, restarting", times)
        wait_until(lambda: _is_running(fastdist), "it is there again")


def _is_running(fastdist):
    try:
        return get_json(fastdist.port, "/health")["workers"]["running"] == 1
    except (OSError, AssertionError):
        return False


def malformed(fastdist, _):
    assert fastdist.post(b"[]")[0] == 400


CASES = {
    "analyzer_offline": (one_offline, 202),
    "no_analyzer": (all_offline, 202),
    "queue_nearly_full": (nearly_full, 202),
    "queue_full": (full, 503),
    "analyzer_refusing": (refusing, 202),
    "packets_dead_lettered": (refusing, 202),
    "dead_letters_failing": (unwritable_dead_letters, 202),
    "storage_failing": (renamed, 503),
    "queue_file_set_aside": (set_aside, 202),
    "analyzer_draining": (draining, 202),
    "reload_failed": (bad_file, 202),
    "restart_needed": (other_port, 202),
    "worker_restarting": (crashes, 202),
    "requests_rejected": (malformed, 202),
}


@pytest.mark.parametrize("code", CASES)
def test_views_of_a_trouble_agree(fastdist, manager, mocks, code):
    assert listed(fastdist) == []
    happens, answer = CASES[code]
    happens(fastdist, mocks)
    wait_until(lambda: code in {problem["code"] for problem in listed(fastdist)}, f"{code} is listed")
    wait_until(lambda: views_agree(fastdist, manager), "all views show one list")
    rejected = fastdist.stats()["rejected"]["storage"]
    body = LARGE if code == "queue_full" else b'{"emitterId":"e","messages":[{"message":"m"}]}'
    assert fastdist.post(body)[0] == answer
    status, _, document = request(fastdist.port, "GET", "/ready")
    assert status == (200 if answer == 202 else 503)
    health = get_json(fastdist.port, "/health")
    details = {problem["detail"] for problem in health["problems"]}
    assert answer == 202 or json.loads(document)["detail"] in details
    assert (health["storage"] == "failing") == (code == "storage_failing")
    assert fastdist.stats()["rejected"]["storage"] == rejected + (code == "storage_failing")


def test_what_is_over_leaves_the_list(fastdist, manager, mocks):
    mocks.set("A2", unhealthy=True)
    draining(fastdist, mocks)
    set_aside(fastdist, mocks)
    wait_until(lambda: len(listed(fastdist)) == 3, "three problems")
    since = {problem["code"]: problem["since"] for problem in listed(fastdist)}
    assert fastdist.analyzers()["A2"]["since"] == since["analyzer_offline"]
    wait_until(lambda: views_agree(fastdist, manager), "all views show one list")
    begun = {problem["code"]: problem["since"] for problem in listed(fastdist)}
    assert all(datetime.fromisoformat(moment) <= datetime.now(UTC) for moment in begun.values())
    mocks.set("A2", unhealthy=False)
    assert request(fastdist.port, "DELETE", "/analyzers/A1/override")[0] == 200
    (fastdist.folder / "data" / "ring-7.fdq.damaged-1a2b3c4d").unlink()
    wait_until(lambda: listed(fastdist) == [], "nothing is wrong")
    wait_until(lambda: views_agree(fastdist, manager) == [], "no view shows anything")
    for title in ("analyzer offline", "analyzer draining", "queue file set aside"):
        assert fastdist.output.count(f'"resolved: {title}"') == 1
    assert status_of(manager) == "STATUS=1 of 1 workers running, 3 of 3 analyzers online"
