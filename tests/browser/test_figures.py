"""What the dashboard shows is what the service says, and it says when something is wrong."""

from __future__ import annotations

import os
import re
import signal

import pytest
from support import BODY, WEIGHTS, Emitter, get_json, request, wait_until

MILLISECONDS = {"µs": 0.001, "ms": 1, "s": 1000, "min": 60_000}
SIZES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
NONE_ONLINE = "No analyzer is online."


def number(text):
    return int(text.replace(",", ""))


def milliseconds(text):
    """Return what a time such as "1 min 5 s" or "9.61 ms" is, None for a dash."""
    if text == "–":
        return None
    parts = re.findall(r"([\d.,]+) (\S+)", text)
    return sum(float(value.replace(",", "")) * MILLISECONDS[unit] for value, unit in parts)


def percent(text):
    return float(text.removesuffix(" %"))


def member(document, path):
    for key in path.split("."):
        document = document[key]
    return document


def value_of(text, kind):
    """Return the number that a figure's text means, and how exact it is."""
    if kind == "bytes":
        value, unit = text.split(" ")
        return float(value.replace(",", "")) * SIZES[unit], SIZES[unit] * (0.51 if "." not in value else 0.051)
    if kind in ("duration", "estimate"):
        return milliseconds(text) / 1000, 1.0
    if kind == "rate":
        return float(text.replace(",", "")), 0.6
    return number(text), 0


def assert_figures(page, documents):
    """Every figure on the page is the one of the document it names."""
    shown = page.run(
        "return [...document.querySelectorAll('[data-figure]')].map("
        "(e) => [e.dataset.figure, e.dataset.as ?? 'count', e.textContent])"
    )
    assert len(shown) > 25
    for figure, kind, text in shown:
        name, _, path = figure.partition(":")
        expected = member(documents[name], path)
        if path == "uptimeSeconds":
            continue  # it has moved on
        if kind == "text":
            assert text == str(expected), figure
        else:
            value, exactness = value_of(text, kind)
            assert value == pytest.approx(expected, abs=exactness), (figure, text, expected)


def assert_analyzers(page, stats, analyzers):
    for row in stats["analyzers"]:
        full, cells = analyzers[row["id"]], page.cells(row["id"])
        for label, key in (
            ("Delivered", "delivered"),
            ("Failed", "failed"),
            ("Retried", "retried"),
            ("In flight", "inFlight"),
        ):
            assert number(cells[label]) == row[key], (row["id"], label)
        shares = re.match(r"([\d.]+ %) of ([\d.]+ %)", cells["Share"])
        assert percent(shares[1]) == pytest.approx(row["actualShare"] * 100, abs=0.051)
        assert percent(shares[2]) == pytest.approx(row["targetShare"] * 100, abs=0.051)
        assert float(cells["Weight"]) == full["weight"]
        for name in ("p50", "p99"):
            expected = full["latencyMs"][name]
            assert milliseconds(cells[name]) == pytest.approx(expected, rel=0.01, abs=0.0006)


def assert_the_rest(page, stats):
    for name, latency in stats["latencyMs"].items():
        shown = [milliseconds(cell.text) for cell in page.all(f"[data-latency={name}]")]
        expected = [latency[key] for key in ("p50", "p90", "p99", "p999", "max")]
        assert shown == pytest.approx(expected, rel=0.01, abs=0.0006)
    for worker in stats["workers"]:
        cells = {each.get_attribute("data-label"): each.text for each in page.all(f"[data-worker='{worker['id']}'] td")}
        assert number(cells["Accepted"]) == worker["accepted"]
        assert number(cells["Delivered"]) == worker["delivered"]
        assert number(cells["Restarts"]) == worker["restarts"]
        assert cells["State"].lower() == worker["state"]
        assert milliseconds(cells["Loop lag, max"]) >= 0
    reasons = dict(zip(*([e.text for e in page.all(f"#reasons {tag}")] for tag in ("dt", "dd")), strict=True))
    assert reasons == {"malformed": "2", "unsupported media type": "1"}


def test_figures_are_those_of_the_service(page, mocks, fresh):
    page.open(fresh.port)
    Emitter(fresh.port, connections=8).send(1500)
    assert [fresh.post(b"{")[0] for _ in range(2)] == [400, 400]
    assert request(fresh.port, "POST", "/logs", BODY, {"Content-Type": "text/plain"})[0] == 415
    fresh.wait_at_rest()
    mocks.set_all(status=400)
    assert [fresh.post()[0] for _ in range(3)] == [202] * 3
    stats = fresh.wait_at_rest()
    wait_until(lambda: fresh.stats()["rates"] == {"acceptedPerSecond": 0, "deliveredPerSecond": 0}, "no rate is left")
    wait_until(lambda: page.text("[data-figure='stats:rates.deliveredPerSecond']") == "0", "no rate is shown")
    stats = fresh.stats()
    documents = {
        "stats": stats,
        "queue": get_json(fresh.port, "/queue"),
        "health": get_json(fresh.port, "/health"),
    }
    assert stats["packets"]["delivered"] == 1500
    assert_figures(page, documents)
    assert_analyzers(page, stats, fresh.analyzers())
    assert_the_rest(page, stats)


def test_rates_and_lines_follow_the_traffic(page, fastdist):
    page.open(fastdist.port)
    emitter = Emitter(fastdist.port, connections=4, pause=0.02).start()

    def busy():
        shown = value_of(page.text("[data-figure='stats:rates.acceptedPerSecond']"), "rate")[0]
        said = fastdist.stats()["rates"]["acceptedPerSecond"]
        return shown > 20 and shown == pytest.approx(said, rel=0.2)

    wait_until(busy, "the rate shown is the one of /stats")
    wait_until(lambda: len(page.attribute("#throughput path.in", "d").split("L")) > 3, "a line is drawn")
    for name in WEIGHTS:
        wait_until(lambda name=name: float(page.cells(name)["Packets/s"]) > 0, f"{name} is seen to take packets")
    emitter.stop()


def test_protocols_are_shown_once_they_come(page, fresh):
    page.open(fresh.port)
    page.wait_for_level("ok")
    assert page.one("#protocols-card").is_displayed() is False
    lines = b'{"message":"one"}\n{"message":"two"}\n'
    assert request(fresh.port, "POST", "/ingest", lines, {"Content-Type": "application/x-ndjson"})[0] == 200
    page.wait_for_text("#protocols", "json")
    shown = [cell.text for cell in page.all("[data-protocol=json] td")]
    assert shown[1:] == ["2", "1", "0"]
    assert page.all("[data-protocol=otlp]") == []
    assert request(fresh.port, "POST", "/v1/logs", b"{", {"Content-Type": "application/json"})[0] == 400
    page.wait_for_text("#protocols", "otlp")
    assert [cell.text for cell in page.all("[data-protocol=otlp] td")][1:] == ["0", "1", "1"]
    wait_until(lambda: page.all("[data-protocol=json] td")[0].text == "0", "the rate is of the last seconds")


def test_page_says_when_all_is_well(page, fresh):
    fresh.wait_for_states("online")
    page.open(fresh.port)
    page.wait_for_level("ok")
    assert page.text("#conditions") == "All well. 4 of 4 analyzers online, 2 of 2 workers running, packets are taken."
    assert page.driver.title == "fastdist"


def test_a_killed_analyzer_shows_offline(page, mocks, fastdist):
    page.open(fastdist.port)
    page.wait_for_level("ok")
    mocks.set("A2", refuse=True)
    page.wait_for_state("A2", "offline")
    page.wait_for_level("warning")
    assert page.cells("A2")["State"].startswith("Offline since ")
    assert "refused" in page.cells("A2")["State"]
    assert "gets 0 % now" in page.cells("A2")["Share"]
    assert page.text("#conditions").startswith("A2 is offline. ")
    assert " Since " in page.text("#conditions")
    assert "refused" in page.text("#conditions")
    assert page.driver.title == "A2 is offline – fastdist"
    assert page.text("#analyzers-note") == "3 of 4 analyzers online"
    mocks.set("A2", refuse=False)
    page.wait_for_state("A2", "online")
    page.wait_for_level("ok")


def test_no_analyzer_at_all(page, mocks, fastdist):
    page.open(fastdist.port)
    mocks.set_all(refuse=True)
    page.wait_for_level("error")
    page.wait_for_text("#conditions", NONE_ONLINE)
    assert fastdist.post()[0] == 202
    page.wait_for_text("[data-figure='stats:packets.queued']", "1")
    page.wait_for_text("[data-figure='queue:estimatedDrainSeconds']", "nothing is delivered")
    mocks.set_all(refuse=False)
    page.wait_for_level("ok")


def test_full_queue_is_shown_on_the_page(page, mocks, serve):
    mocks.set_all(refuse=True)
    fastdist = serve(mocks, {"server": {"workers": 1}, "queue": {"capacity": "1MiB"}})
    fastdist.wait_for_states("offline")
    page.open(fastdist.port)
    large = b'{"emitterId":"e","messages":[{"message":"%s"}]}' % (b"x" * 100_000)
    wait_until(lambda: fastdist.post(large)[0] == 503, "the queue is full")
    page.wait_for_text("#conditions", "The queue is full.")
    page.wait_for_text("#conditions", f"{NONE_ONLINE} Nothing is delivered.")
    assert "accepted" not in page.text("#conditions")
    page.wait_for_text("#conditions", "Requests were rejected within the last minute. Queue full.")
    wait_until(lambda: percent(page.text("#fill-percent")) > 80, "the fill is shown")
    assert page.attribute("#banner", "data-level") == "error"


def test_a_worker_that_was_killed(page, fastdist):
    page.open(fastdist.port)
    os.kill(fastdist.worker_pids()[1], signal.SIGKILL)
    shown = page.wait_for_text("[data-worker='1']", "ended by signal SIGKILL")
    page.wait_for_text("[data-worker='1']", "Running")
    assert re.search(r"SIGKILL 1 ", shown), "one restart"
    page.wait_for_level("ok")


def test_service_gone_and_back_is_shown(page, mocks, fresh, serve):
    page.forgiven = ["ERR_CONNECTION", "ERR_EMPTY_RESPONSE"]
    page.open(fresh.port)
    fresh.kill_all()
    page.wait_for_text("#conditions", "Disconnected. The service does not answer;")
    assert "All figures are those of" in page.text("#conditions")
    assert page.text("#live").startswith("disconnected")
    assert "stale" in page.one("body").get_attribute("class").split()
    serve(mocks, port=fresh.port)
    page.wait_for_level("ok")
    assert page.text("#live").startswith("live")
    assert page.one("body").get_attribute("class") == ""


def test_a_service_that_hangs(page, fresh):
    page.open(fresh.port)
    pids = fresh.worker_pids()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        page.wait_for_text("#conditions", "Disconnected. The service does not answer;")
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    page.wait_for_level("ok")


def test_hidden_page_requests_nothing(page, fastdist):
    page.open(fastdist.port)
    hide = "Object.defineProperty(document, 'hidden', {value: %s, configurable: true});"
    page.run(hide % "true" + "document.dispatchEvent(new Event('visibilitychange'))")
    asked = "return performance.getEntriesByType('resource').length"

    def asks_no_more():
        before, uptime = page.run(asked), fastdist.stats()["uptimeSeconds"]
        wait_until(lambda: fastdist.stats()["uptimeSeconds"] > uptime + 2.5, "time passes")
        return page.run(asked) == before

    wait_until(asks_no_more, "nothing is asked for any more")
    page.run(hide % "false" + "document.dispatchEvent(new Event('visibilitychange'))")
    seen = page.run(asked)
    wait_until(lambda: page.run(asked) > seen, "it asks again")


def test_last_dead_letters_are_listed(page, mocks, fresh):
    page.open(fresh.port)
    wait_until(lambda: page.text("#live-word") == "live", "it is live")
    assert not page.all("#dead-letters-card")[0].is_displayed()
    mocks.set_all(status=422)
    for each in range(25):
        assert fresh.post(Idempotency_Key=f"p-{each}")[0] == 202
    fresh.wait_at_rest()
    mocks.set_all(status=None)
    there = sum(1 for _ in fresh.dead_letters())

    def shown():
        return page.run("return [...document.querySelectorAll('#dead-letters-last tr')].map((e) => e.dataset.packet)")

    last = lambda: [each["id"] for each in get_json(fresh.port, "/dead-letters")["last"]]  # noqa: E731
    wait_until(lambda: shown() == last() and len(shown()) == min(there, 20), "the last 20 are shown")
    counts = [number(cell.text) for cell in page.all("#dead-letters-counts [data-count=packets]")]
    assert sum(counts) == there
    assert page.text("#dead-letters-note").startswith(f"{there} dead letters in ")
    assert "newsletter" not in page.text("#dead-letters-card"), "no packet is"
