"""``fastdist send`` against a distributor and analyzers: every line arrives, once, whatever happens in between."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter

import pytest
from support import get_json, wait_until

FASTDIST = [sys.executable, "-m", "fastdist"]
QUIET_LINES = 20_000


@pytest.fixture
def keeping(mocks):
    """Analyzers that keep the packets they are given."""
    mocks.set_all(keep=True)
    yield mocks
    mocks.set_all(keep=False)


@pytest.fixture
def log(tmp_path):
    return tmp_path / "app.log"


@pytest.fixture
def offset_file(tmp_path):
    return tmp_path / "app.offset"


def fill(log, count, start=0):
    """Append lines, each unlike any other, as text and as JSON."""
    with log.open("ab") as file:
        for number in range(start, start + count):
            text = f"request {number} took {number % 97} ms; caf\u00e9"
            line = text if number % 2 else json.dumps({"message": text, "level": "info", "metadata": {"n": number}})
            file.write(f"{line}\n".encode())


def expected(count):
    return {f"request {number} took {number % 97} ms; caf\u00e9": 1 for number in range(count)}


def kept(mocks):
    """Return {packet id: packet}, over all analyzers."""
    bodies = {}
    for name in mocks.ids:
        bodies |= get_json(mocks.control_port, f"/control/{name}/bodies")
    return bodies


def arrived(mocks):
    """Return {message: times it arrived}, each packet counted once; and the packets that arrived more than once."""
    delivered = mocks.delivered()  # first: a packet is kept before it is acknowledged
    bodies = kept(mocks)
    messages = Counter(message["message"] for name in delivered for message in bodies[name]["messages"])
    return dict(messages), {name: times for name, times in delivered.items() if times > 1}


def arguments(fastdist, log, *options):
    return *FASTDIST, "send", log, "--url", f"http://127.0.0.1:{fastdist.port}", *options


def offset_in(file):
    text = file.read_text() if file.exists() else ""
    return json.loads(text)["offset"] if text else 0


def test_every_line_arrives_once(keeping, serve, run, log):
    fastdist = serve(keeping)
    fill(log, QUIET_LINES)
    send = run(*arguments(fastdist, log))
    assert send.wait() == 0, send.output
    assert f"sent {QUIET_LINES} messages in 40 packets" in send.output
    fastdist.wait_at_rest()
    assert arrived(keeping) == (expected(QUIET_LINES), {})
    assert fastdist.stats()["messages"]["delivered"] == QUIET_LINES


def test_emitter_and_position_are_passed_on(keeping, serve, run, log):
    fastdist = serve(keeping, {"server": {"validation": "strict"}})
    log.write_text('plain\n{"message":"own","level":"warn","n":1}\n')
    send = run(*arguments(fastdist, log, "--emitter", "web-42", "--level", "info", "--source", "shop", "--stamp"))
    assert send.wait() == 0, send.output
    fastdist.wait_at_rest()
    ((name, body),) = kept(keeping).items()
    assert name.endswith("-0")
    assert (body["emitterId"], body["metadata"]) == ("web-42", {"file": "app.log", "offset": 0})
    plain, own = body["messages"]
    assert (plain["message"], plain["level"], plain["source"]) == ("plain", "info", "shop")
    assert (own["message"], own["level"], own["n"]) == ("own", "warn", 1)


def test_standard_input_is_sent(keeping, shared, log):
    fastdist = shared()
    fill(log, 2000)
    with log.open("rb") as stdin:
        done = subprocess.run(
            [*map(str, arguments(fastdist, "-"))], stdin=stdin, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("sent 2000 messages in 4 packets")
    fastdist.wait_at_rest()
    assert arrived(keeping) == (expected(2000), {})


def test_a_pipe_whose_lines_trickle(keeping, shared):
    fastdist = shared()
    send = subprocess.Popen([*map(str, arguments(fastdist, "-"))], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    send.stdin.write(b"first\n")
    send.stdin.flush()
    wait_until(lambda: arrived(keeping)[0] == {"first": 1}, "the first line, without waiting for more")
    send.stdin.write(b"second\nlast")
    send.stdin.close()
    assert send.wait(30) == 0
    fastdist.wait_at_rest()
    assert arrived(keeping) == ({"first": 1, "second": 1, "last": 1}, {})


@pytest.mark.slow
def test_distributor_restart_loses_nothing(keeping, serve, run, log, offset_file):
    """SIGTERM lets requests under way finish: no packet is in doubt."""
    disk = {"queue": {"durability": "disk"}}
    fastdist = serve(keeping, disk)
    port = fastdist.port
    fill(log, 30_000)
    send = run(*arguments(fastdist, log, "--batch", "20", "--concurrency", "2", "--offset-file", offset_file))
    refused = "the distributor cannot be reached: Connection refused; trying again"
    for stops, count in enumerate((200, 600), 1):
        wait_until(lambda least=count: sum(keeping.delivered().values()) >= least, "some are delivered")
        assert send.process.poll() is None, f"too quick to be interrupted: {send.output}"
        assert fastdist.stop() == 0
        wait_until(lambda least=stops: send.output.count(refused) >= least, "send says that it is refused")
        fastdist = serve(keeping, disk, port=port)
    assert send.wait(90) == 0, send.output
    fastdist.wait_at_rest()
    messages, doubled = arrived(keeping)
    assert messages == expected(30_000)
    assert doubled == {}
    assert offset_in(offset_file) == log.stat().st_size


@pytest.mark.slow
def test_killed_distributor_repeats_same_ids(keeping, serve, run, log):
    disk = {"queue": {"durability": "disk"}}
    fastdist = serve(keeping, disk)
    port = fastdist.port
    fill(log, 30_000)
    send = run(*arguments(fastdist, log, "--batch", "20", "--concurrency", "2"))
    wait_until(lambda: sum(keeping.delivered().values()) >= 300, "some are delivered")
    fastdist.kill_all()
    fastdist = serve(keeping, disk, port=port)
    assert send.wait(90) == 0, send.output
    fastdist.wait_at_rest()
    assert arrived(keeping)[0] == expected(30_000)


def test_a_rate_limit_is_kept_to(keeping, serve, run, log):
    fastdist = serve(keeping, {"limits": {"rate": 30, "burst": 5}})
    fill(log, 500)
    send = run(*arguments(fastdist, log, "--batch", "10"))
    assert send.wait() == 0, send.output
    assert "the distributor answers 429 (" in send.output
    stats = fastdist.wait_at_rest()
    assert stats["rejected"]["rateLimited"] > 0
    assert stats["packets"]["accepted"] == 50
    retries = next(int(line.split()[1]) for line in send.lines if line.startswith("retries:"))
    assert retries == stats["packets"]["rejected"]
    assert arrived(keeping) == (expected(500), {})


def test_a_full_queue_is_waited_for(keeping, serve, run, log):
    fastdist = serve(keeping, {"queue": {"capacity": "2MiB"}, "server": {"workers": 1}})
    keeping.set_all(refuse=True)
    fastdist.wait_for_states("offline")
    fill(log, 40_000)
    send = run(*arguments(fastdist, log))
    wait_until(lambda: fastdist.stats()["rejected"]["queueFull"] > 0, "the queue is full")
    send.line_with("the distributor answers 503 (")
    keeping.set_all(refuse=False)
    assert send.wait() == 0, send.output
    fastdist.wait_at_rest()
    assert arrived(keeping) == (expected(40_000), {})


@pytest.mark.slow
def test_killed_send_resumes_where_it_was(keeping, shared, run, log, offset_file):
    """Whatever was under way when it was killed may be there twice: under the same ids, and that is all."""
    fastdist = shared()
    count = 0
    for kill in range(3):
        fill(log, 20_000, count)
        count += 20_000
        before = offset_in(offset_file)
        send = run(*arguments(fastdist, log, "--batch", "10", "--concurrency", "4", "--offset-file", offset_file))
        wait_until(lambda so_far=before: offset_in(offset_file) > so_far, "it has come some way")
        send.signal(signal.SIGKILL)
        send.wait()
        assert offset_in(offset_file) < log.stat().st_size, f"kill {kill} came too late"
        fastdist.wait_at_rest()
        noted = offset_in(offset_file)
        there, _ = arrived(keeping)
        acknowledged = log.read_bytes()[:noted].count(b"\n")
        assert set(list(expected(count))[:acknowledged]) <= there.keys(), "what is noted has arrived"
    send = run(*arguments(fastdist, log, "--batch", "10", "--concurrency", "4", "--offset-file", offset_file))
    assert send.wait() == 0, send.output
    fastdist.wait_at_rest()
    messages, doubled = arrived(keeping)
    assert messages == expected(count)
    assert len(doubled) <= 3 * 4 * 4, "no more than the windows of three runs"


def test_next_run_sends_what_was_appended(keeping, shared, run, log, offset_file):
    fastdist = shared()
    for run_number in range(3):
        fill(log, 700, run_number * 700)
        send = run(*arguments(fastdist, log, "--offset-file", offset_file))
        assert send.wait() == 0, send.output
        assert "sent 700 messages" in send.output
        assert f"all is accepted up to byte {log.stat().st_size}, as {offset_file} says" in send.output
    fastdist.wait_at_rest()
    assert arrived(keeping) == (expected(2100), {})


def test_rotation_between_runs_loses_nothing(keeping, shared, run, log, offset_file):
    fastdist = shared()
    fill(log, 500)
    assert run(*arguments(fastdist, log, "--offset-file", offset_file)).wait() == 0
    fill(log, 500, 500)
    log.rename(log.with_name("app.log.1"))
    fill(log, 500, 1000)
    send = run(*arguments(fastdist, log, "--offset-file", offset_file))
    assert send.wait() == 0, send.output
    assert "was rotated; sending the rest of the old one from app.log.1 first" in send.output
    assert "sent 1000 messages" in send.output
    fastdist.wait_at_rest()
    assert arrived(keeping) == (expected(1500), {})


@pytest.mark.slow
def test_log_is_followed_over_rotations(keeping, shared, run, log, offset_file):
    fastdist = shared()
    fill(log, 100)
    send = run(*arguments(fastdist, log, "--follow", "--offset-file", offset_file))
    wait_until(lambda: len(arrived(keeping)[0]) == 100, "what is there")
    fill(log, 100, 100)
    wait_until(lambda: len(arrived(keeping)[0]) == 200, "what is appended")
    old = log.rename(log.with_name("app.log.1"))
    fill(old, 50, 200)
    fill(log, 50, 250)
    send.line_with("was rotated; going on with the new one")
    wait_until(lambda: len(arrived(keeping)[0]) == 300, "what is in both")
    wait_until(lambda: offset_in(offset_file) == log.stat().st_size, "it is noted")
    send.signal(signal.SIGTERM)
    assert send.wait() == 0, send.output
    assert "sent 300 messages" in send.output
    fastdist.wait_at_rest()
    assert arrived(keeping) == (expected(300), {})


@pytest.mark.slow
def test_two_rotations_between_looks_seen(keeping, shared, run, log, offset_file):
    fastdist = shared()
    fill(log, 100)
    send = run(*arguments(fastdist, log, "--follow", "--offset-file", offset_file))
    wait_until(lambda: len(arrived(keeping)[0]) == 100, "what is there")
    for number in (1, 2):
        if number == 2:
            log.with_name("app.log.1").rename(log.with_name("app.log.2"))
        log.rename(log.with_name("app.log.1"))
        fill(log, 200, 200 * number - 100)
    wait_until(lambda: len(arrived(keeping)[0]) == 500, "what is in all three")
    send.signal(signal.SIGTERM)
    assert send.wait() == 0, send.output
    assert "was rotated; going on with app.log.1, which came next" in send.output
    fastdist.wait_at_rest()
    assert arrived(keeping) == (expected(500), {})


def test_file_names_need_not_be_utf_8(keeping, shared, run, tmp_path):
    fastdist = shared()
    log, offset_file = (tmp_path / os.fsdecode(name) for name in (b"caf\xe9.log", b"caf\xe9.offset"))
    fill(log, 100)
    for _ in range(2):
        send = run(*arguments(fastdist, log, "--offset-file", offset_file))
        assert send.wait() == 0, send.output
    assert offset_in(offset_file) == log.stat().st_size
    fastdist.wait_at_rest()
    assert arrived(keeping) == (expected(100), {})


@pytest.mark.slow
def test_ctrl_c_ends_it_in_good_order(keeping, shared, run, log, offset_file):
    fastdist = shared()
    fill(log, 30_000)
    send = run(*arguments(fastdist, log, "--batch", "20", "--concurrency", "2", "--offset-file", offset_file))
    wait_until(lambda: offset_in(offset_file) > 0, "it has come some way")
    send.signal(signal.SIGINT)
    assert send.wait() == 130, send.output
    assert "stopping when the requests in flight are answered" in send.output
    assert f"all is accepted up to byte {offset_in(offset_file)}, as" in send.output
    assert "Traceback" not in send.output
    assert 0 < offset_in(offset_file) < log.stat().st_size
    send = run(*arguments(fastdist, log, "--batch", "20", "--offset-file", offset_file))
    assert send.wait() == 0, send.output
    fastdist.wait_at_rest()
    assert arrived(keeping) == (expected(30_000), {}), "nothing was in doubt"


def test_a_second_ctrl_c_ends_it_at_once(run, log, offset_file):
    """Also when the distributor takes the request and never answers."""

    def accept(listener):
        """Return a connection with a packet on it; whatever else knocks at this port is not meant for us."""
        while True:
            connection, _ = listener.accept()
            if connection.recv(65536).startswith(b"POST /logs "):
                return connection
            connection.close()

    with socket.create_server(("127.0.0.1", 0)) as silent:
        log.write_text("one\n")
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        send = run(*FASTDIST, "send", log, "--url", url, "--offset-file", offset_file)
        with accept(silent):
            send.signal(signal.SIGINT)
            send.line_with("once more ends it at once")
            send.signal(signal.SIGINT)
            assert send.wait(20) == 130
    assert "ended at once" in send.output
    assert "Traceback" not in send.output
    assert json.loads(offset_file.read_text()) | {"offset": 0, "planned": [4]} == json.loads(offset_file.read_text())


def test_pipe_is_sent_before_it_ends(keeping, shared):
    fastdist = shared()
    send = subprocess.Popen(
        [*map(str, arguments(fastdist, "-"))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    send.stdin.write(b"".join(b"line %d\n" % number for number in range(100)))
    send.stdin.flush()
    wait_until(lambda: arrived(keeping)[0], "it reads")
    send.stdin.write(b"the last\n")
    send.stdin.flush()
    send.send_signal(signal.SIGINT)
    output, _ = send.communicate(timeout=30)
    assert send.returncode == 130, output
    fastdist.wait_at_rest()
    assert arrived(keeping)[0].keys() == {f"line {number}" for number in range(100)} | {"the last"}


def test_distributors_refusal_ends_send(keeping, serve, run, log, offset_file):
    fastdist = serve(keeping, {"server": {"validation": "strict"}})
    stamped = '{"message":"m","level":"info","timestamp":"2026-01-02T03:04:05Z"}\n'
    log.write_text(stamped * 10 + "no time\n" + stamped * 10)
    send = run(*arguments(fastdist, log, "--batch", "5", "--concurrency", "1", "--offset-file", offset_file))
    assert send.wait() == 4
    bad = len(stamped) * 10
    assert f"refuses the 5 messages of bytes {bad} to {bad + 8 + 4 * len(stamped)}: 400 (" in send.output
    assert "/messages/0/timestamp" in send.output
    assert offset_in(offset_file) == bad
    fastdist.wait_at_rest()
    assert sum(arrived(keeping)[0].values()) == 10


def test_packets_too_large_for_distributor(keeping, serve, run, log, offset_file):
    fastdist = serve(keeping, {"server": {"max_body": "80KiB"}})
    fill(log, 5000)
    send = run(*arguments(fastdist, log, "--batch", "5000", "--offset-file", offset_file))
    assert send.wait() == 4
    assert ": 413 (" in send.output
    assert "try a smaller --batch-bytes" in send.output
    assert offset_in(offset_file) == 0
    send = run(*arguments(fastdist, log, "--batch", "5000", "--batch-bytes", "64KiB", "--offset-file", offset_file))
    assert send.wait() == 0, send.output
    fastdist.wait_at_rest()
    assert arrived(keeping)[0] == expected(5000)


def test_wrong_token_is_named_as_the_cause(keeping, serve, run, log):
    fastdist = serve(keeping, {"security": {"tokens": ["secret-token"]}})
    fill(log, 10)
    send = run(*arguments(fastdist, log))
    assert send.wait() == 4
    assert "answers 401" in send.output
    assert "give one with --token" in send.output
    assert run(*arguments(fastdist, log), FASTDIST_TOKEN="secret-token").wait() == 0
    assert run(*arguments(fastdist, log, "--token", "secret-token")).wait() == 0
    fastdist.wait_at_rest()
    messages, doubled = arrived(keeping)
    assert messages == expected(10)
    assert set(doubled.values()) == {2}, "a log that is sent again is sent under the same ids"


def test_hostile_lines_arrive_without_loss(keeping, shared, run, log):
    """What is not UTF-8, over-long, or nearly JSON: the bytes can be had back from what an analyzer is given."""
    import base64  # noqa: PLC0415  (here only)

    lines = [
        b"caf\xe9",
        b"\x00\x01\x02",
        b"x" * 300_000,
        '{"message":"ü","n":'.encode() + b"1" * 50 + b"}",
        b'{"message":"half \\ud800"}',
        b'{"message":"a"}],"x":[{}',
        b"[" * 500,
        "😀€".encode() * 50_000,
        b'{"a":1}',
        b"\xff" * 200_000,
    ]
    log.write_bytes(b"\r\n".join(lines) + b"\n")
    fastdist = shared()
    send = run(*arguments(fastdist, log))
    assert send.wait() == 0, send.output
    fastdist.wait_at_rest()
    packets = sorted(kept(keeping).values(), key=lambda body: body["metadata"]["offset"])
    had, end = [], None
    for message in (message for body in packets for message in body["messages"]):
        meta = message.get("metadata", {})
        raw = base64.b64decode(meta["bytesBase64"]) if "bytesBase64" in meta else message["message"].encode()
        part = meta.get("part")
        if part and part["offset"] == end:
            had[-1] += raw
        else:
            had.append(raw)
        end = part["offset"] + part["bytes"] if part else None
    for sent, got in zip(lines, had, strict=True):
        assert got == (json.loads(sent)["message"].encode() if sent.startswith('{"message":"ü'.encode()) else sent)


def test_https_with_a_private_certificate(keeping, serve, run, log, tmp_path):
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=logs"
    files = ["-addext", "subjectAltName=IP:127.0.0.1", "-out", str(certificate), "-keyout", str(key)]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    fastdist = serve(keeping, {"security": {"tls_cert": str(certificate), "tls_key": str(key)}})
    fill(log, 100)
    url = f"https://127.0.0.1:{fastdist.port}"
    send = run(*FASTDIST, "send", log, "--url", url)
    assert send.wait() == 4
    assert "certificate verify failed" in send.output
    send = run(*FASTDIST, "send", log, "--url", url, "--ca-file", certificate)
    assert send.wait() == 0, send.output
    wait_until(lambda: arrived(keeping) == (expected(100), {}), "all arrive")
    top = run(*FASTDIST, "top", "--once", "--url", url, "--ca-file", certificate)
    assert top.wait() == 0, top.output
    assert "delivered 1 " in top.output
    assert fastdist.stop() == 0
