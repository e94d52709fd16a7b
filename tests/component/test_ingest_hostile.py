"""What no client should send: no exception, no packet without its 202, no request that another parser reads otherwise.

The second opinion is llhttp (by way of httptools). Where it is the stricter one without need, HARMLESS says so.
"""

from __future__ import annotations

import contextlib
import random
import re

import httptools
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from ingest_harness import BODY, CONTINUE, Service, corpus, head, post, read_answers

from fastdist.exchange import Request
from fastdist.protocols.base import Refused, finish
from fastdist.protocols.encodings import decode
from fastdist.worker.ingest import IngestProtocol

CORPUS = corpus()
STREAMS = [data for name, data in CORPUS.items() if name != "packet, encoded"]  # whose packet is not what was sent

# ---- a second opinion

# What llhttp refuses and we read (how its objections begin), and why no harm comes of it.
HARMLESS = {
    "Invalid HTTP version": "a higher minor version is read as the highest known (RFC 9110, 2.5)",
    "Invalid char in url": "bytes beyond ASCII in a target: no path here has any",
    "Invalid characters in url": "the same",
    "Invalid character in chunk extensions": "extensions are read over up to CR LF, whatever they are",
    "Data after `Connection: close`": "Proxy-Connection means nothing",
}


class Recorder(IngestProtocol):
    """Keeps every answer it composes with the request it belongs to; packets it accepts show in the ring."""

    def __init__(self, intake, emitters):
        super().__init__(intake, emitters)
        self.composed = []
        self._read = None

    def handle(self, method, target, head, body):
        self._read = (method, target, body)
        answer = super().handle(method, target, head, body)
        self._read = None
        return answer

    def conversion_of(self, body):
        if self.route is not None:
            self._read = (*self.request[:2], body)
        return super().conversion_of(body)

    def respond(self, *args):
        data = super().respond(*args)
        self.composed.append((data, self._read))
        if self.brings:
            self._read = None
        return data


def requests_read(service, connection):
    """Return (method, target, body) of every request in its order; None for one that was refused unread."""
    taken = service.packets()
    ours = [packet for packet in taken if b'"protocol":"' not in packet.body]
    packets, connection.of_agents = iter(ours), len(taken) - len(ours)
    written, composed = connection.written, iter(connection.protocol.composed)
    requests, upcoming = [], next(composed, None)
    while written:
        if written.startswith(CONTINUE):
            written = written.removeprefix(CONTINUE)
        elif upcoming is not None and written.startswith(upcoming[0]):
            requests.append(upcoming[1])
            written, upcoming = written.removeprefix(upcoming[0]), next(composed, None)
        else:
            accepted = re.match(rb"HTTP/1\.1 202 .*?\r\nContent-Length: (\d+).*?\r\n\r\n", written, re.DOTALL)
            end = accepted.end() + int(accepted[1])
            (answer,) = read_answers(written[:end], agents=True)
            packet = next(packets)
            assert packet.id == answer.id
            requests.append((*LOGS, packet.body))
            written = written[end:]
    assert upcoming is None
    assert next(packets, None) is None
    return requests


class SecondOpinion:
    """What llhttp makes of a stream: the requests it found whole, and what it then had to object to.

    ``decoded``: bodies by what they are decoded to, of those that say that they are encoded.
    """

    def __init__(self, data: bytes) -> None:
        self.requests: list[tuple[str, str, bytes]] = []
        self.decoded: dict[bytes, set[bytes]] = {}
        self._codings: list[str] = []
        self.objection = self._target = ""
        self._body = b""
        self._parser = httptools.HttpRequestParser(self)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.requests.pop()  # without its body, although the server may stay with HTTP/1.1
            self.objection = "upgrade"
        except httptools.HttpParserInvalidMethodError:
            self.objection = "method"
        except httptools.HttpParserError as error:
            self.objection = str(error)

    def on_url(self, url: bytes) -> None:
        self._target += url.decode("latin-1")

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-encoding":
            self._codings.append(value.decode("latin-1"))

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        headers = {"content-encoding": ", ".join(self._codings)}
        if self._codings:
            with contextlib.suppress(Refused):
                whole = finish(decode(Request("POST", "/logs", headers, self._body, "", 0), 1 << 20))
                self.decoded.setdefault(self._body, set()).add(whole)
            self._codings = []
        self.requests.append((self._parser.get_method().decode(), self._target, self._body))
        self._target, self._body = "", b""

    def agrees(self, requests: list[tuple[str, str, bytes] | None]) -> bool:
        """Whether these requests are the same, up to the first that there is an objection to and no harm in."""
        for request, (method, target, body) in zip(requests, self.requests, strict=False):
            path = re.sub(r"^https?://[^/?#]+", "", target, flags=re.IGNORECASE)
            if request is not None and request[:2] == LOGS:
                path = path.partition("?")[0]
            if not path.startswith("/"):
                path = target if method == "CONNECT" else "*" if method == "OPTIONS" else "/"
            bodies = {body, *self.decoded.get(body, ())}
            if request is not None and (request[:2] != (method, path) or request[2] not in bodies):
                return False
        beyond = requests[len(self.requests) :]
        if not beyond or beyond[0] is None:
            return True
        unknown_method = self.objection == "method" and beyond[0][0] not in METHODS
        return unknown_method or self.objection == "upgrade" or self.objection.startswith(tuple(HARMLESS))


LOGS = ("POST", "/logs")
METHODS = [
    "DELETE",
    "GET",
    "HEAD",
    "POST",
    "PUT",
    "CONNECT",
    "OPTIONS",
    "TRACE",
    "PATCH",
    "PURGE",
    "SEARCH",
    "LINK",
    "UNLINK",
]
PIECES = st.sampled_from(
    [
        b"\r",
        b"\n",
        b"\r\n",
        b"\r\n\r\n",
        b" ",
        b"\t",
        b"\x00",
        b"\x0b",
        b"\x7f",
        b"\x80",
        b"\xff",
        b",",
        b";",
        b":",
        b'"',
        b"\\",
        b"0",
        b"1",
        b"5",
        b"-",
        b"+",
        b"x",
        b"0x",
        b"chunked",
        b"identity",
        b"gzip, ",
        b"0\r\n\r\n",
        b"/",
        b"?",
        b"#",
        b"*",
        b"@",
        b"[",
        b"]",
        b"%",
        b"%4",
        b"//",
        b"HTTP/1.1",
        b"HTTP/1.0",
        b"http://",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /logs HTTP/1.1\r\n",
    ]
)
LINES = st.sampled_from(
    [
        b"Content-Length: 5",
        b"Content-Length: 0",
        b"Content-Length : 5",
        b"Content-Length: 5, 5",
        b"content-length:5",
        b"Transfer-Encoding: chunked",
        b"Transfer-Encoding: gzip",
        b"Transfer-Encoding : chunked",
        b"Transfer-Encoding:",
        b"transfer-encoding:chunked",
        b"Transfer-Encoding: chunked, identity",
        b"Transfer-Encoding: xchunked",
        b"Host: y",
        b"Connection: close",
        b"Connection: keep-alive",
        b" folded",
        b"",
        b"X",
        b"Expect: 100-continue",
        b"Expect: y",
    ]
)
MUTATIONS = st.tuples(
    st.sampled_from(["set", "insert", "delete", "line", "repeat", "move", "truncate"]), st.floats(0, 1), PIECES, LINES
)


def mutated(data, mutations):
    for how, where, piece, line in mutations:
        at = int(where * (len(data) - 1)) if data else 0
        lines = data.split(b"\r\n")
        number = int(where * (len(lines) - 1))
        if how == "set":
            data = data[:at] + piece + data[at + len(piece) :]
        elif how == "insert":
            data = data[:at] + piece + data[at:]
        elif how == "delete":
            data = data[:at] + data[at + len(piece) :]
        elif how == "truncate":
            data = data[:at]
        else:
            if how == "line":
                lines.insert(number, line)
            elif how == "repeat":
                lines.insert(number, lines[number])
            else:
                lines.append(lines.pop(number))
            data = b"\r\n".join(lines)
    return data


TRAILERS = re.compile(rb"(\r\n0+(?:;[^\r\n]*)?\r\n)(?:[^\r\n]+\r\n)+(?=\r\n)")


@pytest.fixture(scope="module")
def recording():
    return Service(validation="none", max_header=1024, max_body=4096, protocol=Recorder)


@settings(
    max_examples=25 * settings().max_examples,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@example([post(first="POST http://logs.ex#mple:3000/logs?a=b")], [])
@example([post(first="POST http://logs.example:b/logs")], [])
@example([post(first="POST http://user@logs.example/logs")], [])
@example([post(first="POST http://[::1/logs")], [])
@example([post(first="POST /logs#")], [])
@example([head("CONNECT logs.example:80#")], [])
@example([head("CONNECT `.b:80")], [])
@example([head("DELETE z/stats")], [])
@example([corpus()["packet, encoded"]], [])
@given(st.lists(st.sampled_from(STREAMS), min_size=1, max_size=3), st.lists(MUTATIONS, max_size=4))
def test_llhttp_reads_all_we_read_the_same(recording, streams, mutations):
    data = mutated(b"".join(streams), mutations)
    connection = recording.ask(data)
    requests, second = requests_read(recording, connection), SecondOpinion(data)
    connection.lose()
    if not second.agrees(requests):
        second = SecondOpinion(TRAILERS.sub(rb"\1", data))  # which llhttp takes for headers, and we drop
    assert second.agrees(requests), (data, requests, second.requests, second.objection)


# ---- in numbers


def spoil(chance, data):
    """Return a request made worse in one of many ways."""
    how = chance.randrange(8)
    if how == 0:
        return data[: chance.randrange(len(data))]
    if how == 1:
        return chance.randbytes(chance.randrange(1, 2000))
    if how == 2:
        at = chance.randrange(len(data))
        return data[:at] + data[at : at + chance.randrange(1, 20)] * chance.randrange(2, 400) + data[at:]
    if how == 3:
        other = chance.choice(STREAMS)
        return data[: chance.randrange(len(data))] + other[chance.randrange(len(other)) :]
    if how == 4:
        lines = data.split(b"\r\n")
        chance.shuffle(lines)
        return b"\r\n".join(lines)
    spoilt = bytearray(data)
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(spoilt))
        if how == 5:
            spoilt[at] ^= 1 << chance.randrange(8)
        elif how == 6:
            spoilt[at] = chance.choice(b'\r\n\t \0:,;0159"\\\x7f\xff')
        else:
            del spoilt[at]
    return bytes(spoilt)


@pytest.mark.parametrize("seed", range(4))
def test_malformed_leave_only_responses(seed):
    chance = random.Random(seed)
    service = Service(max_header=1024, max_body=4096, protocol=Recorder, security={"cors_origins": ("*",)})
    accepted = 0
    for number in range(5000):
        data = spoil(chance, chance.choice(STREAMS))
        cut = chance.randrange(len(data) + 1)
        connection = service.connect().send(data[:cut], data[cut:])
        for answer, _ in connection.protocol.composed:
            read_answers(answer, "HEAD" if answer.endswith(b"\r\n\r\n") else "POST", agents=True)
        accepted += sum(request is not None and request[:2] == LOGS for request in requests_read(service, connection))
        accepted += connection.of_agents
        if not connection.open:
            written = connection.written
            connection.protocol.data_received(post())
            assert connection.written == written
        connection.wait(1000)
        assert not connection.open or connection.transport.aborted
        connection.lose()
        if number % 500 == 0:
            assert service.ask(post()).answer().status == 202
            assert service.bodies() == [BODY]
            accepted += 1
    assert not service.ring.undone
    assert service.accepted == accepted > 100
    assert sum(service.rejected.values()) > 1000
    assert service.ask(post()).answer().status == 202


def test_random_bytes_after_a_valid_prefix():
    """The parser is in every state it has when the garbage comes."""
    chance = random.Random(5)
    service = Service(max_header=1024, max_body=4096, protocol=Recorder)
    good = (
        post(BODY, "Expect: 100-continue", "Prefer: a=b") + CORPUS["chunk extensions, trailers"] + head("GET /health")
    )
    for place in range(len(good)):
        connection = service.connect().send(good[:place], chance.randbytes(50), b"\r\n\r\n")
        requests_read(service, connection)
        connection.lose()
    assert not service.ring.undone
