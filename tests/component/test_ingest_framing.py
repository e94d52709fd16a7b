"""HTTP's traps: whatever two parsers might read differently is refused and ends the connection."""

from __future__ import annotations

import pytest
from ingest_harness import BODY, Service, chunk, head, keyed, post, post_chunked

HOST_NAMES_NONE = "a Host header that names no host"
NO_HOSTS = [  # neither in a Host header nor in a target
    ":",
    ":80",
    "a,b",
    "a@b",
    "a:80@b",
    "user:word@a",
    "a\\b",
    '"a"',
    "<a>",
    "a\xe9",
    "\x80",
    "{a}",
    "a|b",
    "a^b",
    "a:b",
    "a:80:80",
    "a:65536",
    "a:4294967376",
    "a:99999999999999999999",
    "a:-1",
    "a:+80",
    "a:0x50",
    "a%",
    "a%2",
    "a%2g",
    "%:80",
    "[]",
    "[",
    "]",
    "[::1",
    "::1",
    "[::1]80",
    "[::1]:x",
    "[::1]]",
    "[[::1]]",
    "a[::1]",
    "[::1]a",
    "[a]",
    "[192.0.2.1]",
    "[1::2::3]",
    "[1:2:3:4:5:6:7]",
    "[1:2:3:4:5:6:7:8:9]",
    "[fe80::1%eth0]",
    "[fe80::1%25eth0]",
    "[v1.a]",
    f"[{'0' * 100}::1]",
    f"[::{'1' * 5000}]",
]
NO_HEADERS = ["a b", "a/b", "a?b", "a#b", "a\tb", "http://a", "a, a"]  # not in a Host header
BAD_CODING = "the only transfer coding understood is chunked"
BAD_CHUNKS = "its chunks are broken"
PARSERS_WORDS = None  # what is wrong is said in the words of httptools
CONTROLS = [*range(9), *range(10, 32), 127]


@pytest.fixture(scope="module")
def service():
    return Service()


def assert_refused(service, data, detail, status=400):
    """What is sent is answered like this, brings no packet, and is the last that is read on its connection."""
    before = service.rejected.get("malformed", 0)
    connection = service.ask(keyed("before") + data, keyed("after"))
    first, answer = connection.answers()
    assert first.id == "before"
    assert answer.status == status
    prefix = "the request is not HTTP: " if status == 400 else ""
    assert answer.json["detail"].startswith(prefix)
    assert answer.json["detail"] != prefix
    assert detail in (PARSERS_WORDS, answer.json["detail"].removeprefix(prefix))
    assert answer.closes
    assert connection.transport.half_closed  # closed for good when the emitter has had time to read the answer
    assert not connection.transport.closed
    assert service.rejected["malformed"] == before + 1
    assert [packet.id for packet in service.packets()] == ["before"]
    connection.lose()


def assert_read(service, data, bodies=(BODY,)):
    """What is sent is packets with these bodies, and so is what follows."""
    connection = service.ask(data + post(b'{"emitterId":"next","messages":[{"message":""}]}'))
    assert connection.statuses == [202] * (len(bodies) + 1)
    *stored, last = service.bodies()
    assert stored == list(bodies)
    assert b"next" in last
    assert connection.open
    connection.lose()


# ---- length and coding

LENGTH = f"Content-Length: {len(BODY)}"


@pytest.mark.parametrize(
    ("lines", "status", "detail"),
    [
        ([LENGTH, "Transfer-Encoding: chunked"], 400, PARSERS_WORDS),
        (["Transfer-Encoding: chunked", LENGTH], 400, PARSERS_WORDS),
        (["Content-Length: 0", "Transfer-Encoding: chunked"], 400, PARSERS_WORDS),
        ([LENGTH, LENGTH], 400, PARSERS_WORDS),
        ([LENGTH, "content-length: 3"], 400, PARSERS_WORDS),
        (["Content-Length: 0", LENGTH], 400, PARSERS_WORDS),
        *[
            ([f"Content-Length:{value}"], 400, PARSERS_WORDS)
            for value in (
                "",
                " ",
                " 5, 5",
                "5,",
                ",5",
                "+5",
                "-5",
                "-0",
                "0x5",
                "5 5",
                "1 0",
                "5.0",
                "5e1",
                "\xb2",
                "5;",
            )
        ],
        (["Transfer-Encoding: chunked, chunked"], 400, PARSERS_WORDS),
        (["Transfer-Encoding: chunked", "Transfer-Encoding: chunked"], 400, PARSERS_WORDS),
        (["Transfer-Encoding: chunked, gzip"], 400, PARSERS_WORDS),
        (["Transfer-Encoding: chunked", "Transfer-Encoding: identity"], 400, PARSERS_WORDS),
        (["Transfer-Encoding: chunked", "Transfer-Encoding:"], 400, PARSERS_WORDS),
        (["Transfer-Encoding:"], 400, PARSERS_WORDS),
        (["Transfer-Encoding: chunked,"], 400, PARSERS_WORDS),
        (["Transfer-Encoding: ,"], 400, PARSERS_WORDS),
        (["Transfer-Encoding: gzip, chunked"], 501, BAD_CODING),
        (["Transfer-Encoding: , chunked"], 501, BAD_CODING),
        *[
            ([f"Transfer-Encoding: {value}"], 400, PARSERS_WORDS)
            for value in (
                "identity",
                "gzip",
                "xchunked",
                "chunkedx",
                "chunked;q=1",
                '"chunked"',
                "chunked chunked",
                "chunk",
            )
        ],
        (["Transfer-Encoding: gzip", "Transfer-Encoding: chunked"], 501, BAD_CODING),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
def test_refused_lengths_and_codings(service, lines, status, detail):
    assert_refused(service, head("POST /logs", *lines) + chunk(BODY) + b"0\r\n\r\n", detail, status)


def test_a_coding_in_http_1_0_is_refused(service):
    before = head("POST /logs HTTP/1.0", "Connection: keep-alive", "Transfer-Encoding: chunked")
    assert_refused(service, before + chunk(BODY) + b"0\r\n\r\n", "Transfer-Encoding in HTTP/1.0")


@pytest.mark.parametrize("value", [f"000{len(BODY)}", f"{'0' * 5000}{len(BODY)}", f"\t {len(BODY)} \t"])
def test_lengths_that_are_read(service, value):
    assert_read(service, head("POST /logs", f"Content-Length:{value}") + BODY)


@pytest.mark.parametrize("value", ["chunked", "CHUNKED", "Chunked", " \tchunked "])
def test_codings_that_are_read(service, value):
    assert_read(service, head("POST /logs", f"Transfer-Encoding:{value}") + chunk(BODY) + b"0\r\n\r\n")


@pytest.mark.parametrize("value", ["9" * 18, "9" * 19, "9223372036854775808", "18446744073709551615"])
def test_huge_lengths_do_not_wrap_around(service, value):
    connection = service.ask(head("POST /logs", f"Content-Length: {value}"), BODY)
    assert connection.answer().status == 413
    assert connection.transport.half_closed
    assert not service.ring.undone


@pytest.mark.parametrize("value", ["18446744073709551616", "9" * 20, "9" * 400])
def test_lengths_above_64_bits_are_invalid(service, value):
    assert_refused(service, head("POST /logs", f"Content-Length: {value}"), PARSERS_WORDS)


# ---- lines


@pytest.mark.parametrize("byte", CONTROLS)
@pytest.mark.parametrize("place", ["value", "start of a value", "name", "target", "method", "version", "host"])
def test_control_character_in_head_refused(service, place, byte):
    control = chr(byte)
    data = {
        "value": head("POST /logs", f"X: a{control}b"),
        "start of a value": head("POST /logs", f"X:{control}"),
        "name": head("POST /logs", f"X{control}Y: a"),
        "target": head(f"POST /lo{control}gs HTTP/1.1"),
        "method": head(f"PO{control}ST /logs HTTP/1.1"),
        "version": head(f"POST /logs HTTP/1.1{control}"),
        "host": head("POST /logs", host=f"a{control}b"),
    }[place]
    assert_refused(service, data, PARSERS_WORDS)


@pytest.mark.parametrize(
    "data",
    [
        b"POST /logs HTTP/1.1\nHost: x\r\n\r\n",
        b"POST /logs HTTP/1.1\r\nHost: x\n\r\n",
        b"POST /logs HTTP/1.1\r\nHost: x\r\nA: b\nContent-Length: 5\r\n\r\n",
        b"POST /logs HTTP/1.1\r\nHost: x\r\n\n",
        b"POST /logs HTTP/1.1\nHost: x\n\n",
        b"POST /logs HTTP/1.1\rHost: x\r\r",
        b"POST /logs HTTP/1.1\r\nHost: x\r\n\rPOST",
        b"POST /logs HTTP/1.1\r\nHost: x\r\nA: b\r\r\n\r\n",
        b"POST /logs HTTP/1.1\r\r\nHost: x\r\n\r\n",
        b"POST /logs HTTP/1.1\r\nHost: x\r\r\n\r\n",
        b"\nPOST /logs HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\rPOST /logs HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\r\n\nPOST /logs HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS client: no line ever ends
        b"\x00",
    ],
)
def test_bare_cr_and_bare_lf_are_refused(service, data):
    assert_refused(service, data, PARSERS_WORDS)


@pytest.mark.parametrize(
    ("lines", "detail"),
    [
        (["A: b", " c"], PARSERS_WORDS),
        (["A: b", "\tc"], PARSERS_WORDS),
        (["Content-Length : 5"], PARSERS_WORDS),
        (["Content-Length\t: 5"], PARSERS_WORDS),
        (["Transfer-Encoding : chunked"], PARSERS_WORDS),
        ([": a"], PARSERS_WORDS),
        (["A"], PARSERS_WORDS),
        (["A b: c"], PARSERS_WORDS),
        *[([f"A{character}: c"], PARSERS_WORDS) for character in '"(),/;<=>?@[\\]{}\x80\xe9\xff'],
    ],
)
def test_invalid_header_lines_are_refused(service, lines, detail):
    assert_refused(service, head("POST /logs", *lines), detail)


def test_space_before_header_is_refused(service):
    for space in (" ", "\t"):
        data = f"POST /logs HTTP/1.1\r\n{space}Host: x\r\n\r\n".encode()
        assert_refused(service, data, PARSERS_WORDS)


@pytest.mark.parametrize("value", ["", "\t", "a\tb", "\x80\xff", "é", '"', ": :", "a" * 1000])
def test_header_values_that_are_read(service, value):
    assert_read(service, post(BODY, f"X-Any:{value}"))


def test_header_name_takes_any_token_char(service):
    assert_read(service, post(BODY, "!#$%&'*+-.^_`|~09azAZ: x"))


# ---- request line


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("POST /logs HTTP/2.0", 505),
        ("POST /logs HTTP/0.9", 505),
        ("PRI * HTTP/2.0", 505),
        ("POST /logs HTTP/1.2", 505),
        ("POST /logs HTTP/3.0", 505),
        ("POST /l\xf6gs HTTP/1.1", 400),
        ("POST /logs http/1.1", 400),
        ("POST /logs HTTP/1.1 ", 400),
        ("POST /logs HTTP/1.10", 400),
        ("POST /logs HTTP/1,1", 400),
        ("POST /logs HTTP/1.x", 400),
        ("POST /logs HTTP/+1.1", 400),
        ("POST /logs HTTP 1.1", 400),
        ("POST /logs ICE/1.0", 400),
        ("POST /logs  HTTP/1.1", 400),
        ("POST /lo gs HTTP/1.1", 400),
        ("POST /logs HTTP/", 400),
        ("POST  /logs HTTP/1.1", 400),
        ("POST\t/logs HTTP/1.1", 400),
        ("POST /logs\tHTTP/1.1", 400),
        (" POST /logs HTTP/1.1", 400),
        ("POST HTTP/1.1", 400),
        ("POST", 400),
        ("PO:ST /logs HTTP/1.1", 400),
        ("POST logs HTTP/1.1", 400),
        ("POST * HTTP/1.1", 400),
        ("GET logs.example:80 HTTP/1.1", 400),
        ("POST http:///logs HTTP/1.1", 400),
        ("POST http://?a/logs HTTP/1.1", 400),
        ("POST https:// HTTP/1.1", 400),
        ('POST http://logs"example/logs HTTP/1.1', 400),
        ("POST http://user@logs.example/logs HTTP/1.1", 400),
        ("POST ftp://logs.example/logs HTTP/1.1", 400),
        ("POST /logs# HTTP/1.1", 400),
        ("POST /logs?a#b HTTP/1.1", 400),
        ("POST # HTTP/1.1", 400),
        ("POST http://logs.ex#mple:3000/logs?a=b HTTP/1.1", 400),
        ("POST http://logs.example#/logs HTTP/1.1", 400),
        ("POST http://logs.example/logs#x HTTP/1.1", 400),
        ("OPTIONS *# HTTP/1.1", 400),
        ("CONNECT logs.example:80#x HTTP/1.1", 400),
        *[(f"POST http://{host}/logs HTTP/1.1", 400) for host in NO_HOSTS],
        *[(f"CONNECT {host} HTTP/1.1", 400) for host in NO_HOSTS],
        ("CONNECT /logs HTTP/1.1", 400),
        ("CONNECT http://logs.example/ HTTP/1.1", 400),
        ("DELETE logs.example:80 HTTP/1.1", 400),
        ("BREW coffee HTTP/1.1", 400),
        ("BREW * HTTP/1.1", 400),
        ("PUT x/logs HTTP/1.1", 400),
        ("PATCH http://a@b/analyzers/A1 HTTP/1.1", 400),
        ("OPTIONS http://a:b HTTP/1.1", 400),
        ("OPTIONS https://a:b?c HTTP/1.1", 400),
    ],
)
def test_request_lines_that_are_refused(service, line, status):
    data = f"{line}\r\nHost: x\r\n\r\n".encode("latin-1")
    assert_refused(service, data, PARSERS_WORDS, status)


@pytest.mark.parametrize("empty_lines", [1, 2, 50])
def test_leading_empty_lines_are_skipped(service, empty_lines):
    assert_read(service, b"\r\n" * empty_lines + post() + b"\r\n" * empty_lines)


def test_empty_lines_alone_are_idle(service):
    connection = service.ask(b"\r\n", b"\r", b"\n", b"\r\n\r\n")
    assert connection.protocol.idle()
    connection.send(b"\r")
    assert not connection.protocol.idle()
    assert connection.written == b""


@pytest.mark.parametrize("pieces", [[b"\r~"], [b"\r", b"~"], [b"\r\n\r", b"GET / HTTP/1.1\r\n"], [b"\r", b"\r"]])
def test_half_an_empty_line_is_no_request(service, pieces):
    connection = service.ask(*pieces)
    assert connection.statuses == [400]
    assert not connection.open


@pytest.mark.parametrize("pieces", [[b"\r\n" * 101], [b"\r\n"] * 101, [b"\r", b"\n"] * 101])
def test_endless_empty_lines_are_no_request(service, pieces):
    connection = service.ask(b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n", b"\r\n" * 100, post(), *pieces)
    assert connection.statuses == [404, 202, 400]
    assert len(service.bodies()) == 1
    assert b"more than 100 empty lines" in connection.written
    assert not connection.open


# ---- Host


@pytest.mark.parametrize(
    ("lines", "detail"),
    [
        ([], "no Host header"),
        (["Host: a", "Host: a"], "more than one Host header"),
        (["Host: a", "hOST: b"], "more than one Host header"),
        (["Host:", "Host:"], "more than one Host header"),
        *[([f"Host: {host}"], HOST_NAMES_NONE) for host in (*NO_HOSTS, *NO_HEADERS)],
    ],
)
def test_hosts_that_are_refused(service, lines, detail):
    assert_refused(service, post(BODY, *lines, host=None), detail)


@pytest.mark.parametrize(
    "host",
    [
        "x",
        "x:",
        "x:0",
        "logs.example:3000",
        "logs.example.:0065535",
        f"x:{'0' * 5000}80",
        "[2001:db8::1]:80",
        "[::]",
        "[::ffff:192.0.2.1]:",
        "a%20b",
        "%C3%a4",
        "under_score",
        "192.0.2.1",
        "!$&'()*+;=-._~",
    ],
)
def test_hosts_that_are_read(service, host):
    assert_read(service, post(host=host))
    assert_read(service, post(first=f"POST http://{host}/logs"))


def test_empty_host_suits_target_without_one(service):
    assert_read(service, post(host=""))


def test_http_1_0_has_at_most_one_host(service):
    assert_read(service, post(BODY, "Connection: keep-alive", first="POST /logs HTTP/1.0", host=None))
    assert_refused(service, post(BODY, "Host: y", first="POST /logs HTTP/1.0"), "more than one Host header")


# ---- chunks


@pytest.mark.parametrize(
    "chunks",
    [
        b"\r\n",
        b"g\r\n",
        b"0x5\r\n",
        b"+5\r\nabcde\r\n",
        b"-1\r\n",
        b"-0\r\n\r\n",
        b" 5\r\nabcde\r\n",
        b"5 \r\nabcde\r\n",
        b"5\t;a=b\r\nabcde\r\n",
        b"5 5\r\nabcde\r\n",
        b"5,5\r\nabcde\r\n",
        b"5.0\r\nabcde\r\n",
        b";a=b\r\n",
        b"5;\r\nabcde\r\n",
        b"5; a\r\nabcde\r\n",
        b"5;a=\xe9\r\nabcde\r\n",
        b"5\nabcde\r\n",
        b"5\rabcde\r\n",
        b"5\r\r\nabcde\r\n",
        b"5;a\nabcde\r\n",
        b"5;a\rb\r\nabcde\r\n",
        b"5;a\x00\r\nabcde\r\n",
        b"5;a\x7f\r\nabcde\r\n",
        b"5\r\nabcde",
        b"5\r\nabcde\n",
        b"5\r\nabcde\r\r\n",
        b"5\r\nabcdef\r\n",
        b"5\r\nabcde0\r\n\r\n",
        b"5\r\nabcde\r\n0\r\nA: b\n\r\n",
        b"5\r\nabcde\r\n0\r\nA: b\r\n\n",
        b"5\r\nabcde\r\n0\r\nA: b\rC: d\r\n\r\n",
        b"5\r\nabcde\r\n0\r\nA: \x00\r\n\r\n",
        b"5\r\nabcde\r\n0\r\n\n",
        b"5\r\nabcde\r\n0\r\n\rx",
        b"5\r\nabcde\r\n0\r\n A: b\r\n\r\n",
        b"5\r\nabcde\r\n0\r\nA : b\r\n\r\n",
        b"5\r\nabcde\r\n0\r\nA\r\n\r\n",
        b"5\r\nabcde\r\n0\r\n: b\r\n\r\n",
        b"5\r\nabcde\r\n0\r\nA: b\r\n c\r\n\r\n",
        b"5\r\nabcde\r\n0\n\r\n",
        b"5\r\nabcde\r\n0\r\nContent-Length: 3\r\n\r\n",
    ],
)
def test_chunks_that_are_refused(service, chunks):
    assert_refused(service, head("POST /logs", "Transfer-Encoding: chunked") + chunks + b"0\r\n\r\n", BAD_CHUNKS)


@pytest.mark.parametrize(
    "chunks",
    [
        b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY),
        b"%X\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY),
        b"%015x\r\n%b\r\n000000\r\n\r\n" % (len(BODY), BODY),
        b"".join(map(chunk, (bytes([byte]) for byte in BODY))) + b"0\r\n\r\n",
        b'%x;a=b;c="d;\\"";e\r\n%b\r\n0;f\r\n\r\n' % (len(BODY), BODY),
        b"%021x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY),
        b"%x\r\n%b\r\n0\r\nX-Sum: 1\r\nEmpty:\r\n\r\n" % (len(BODY), BODY),
        b"%x\r\n%b\r\n0\r\nHost: y\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n" % (len(BODY), BODY),
        b"%x\r\n%b\r\n0\r\nIdempotency-Key: trailer\r\nAuthorization: Bearer x\r\n\r\n" % (len(BODY), BODY),
    ],
)
def test_chunks_have_no_extensions_trailers(service, chunks):
    assert_read(service, head("POST /logs", "Transfer-Encoding: chunked") + chunks)


def test_a_trailer_is_no_header(service):
    connection = service.ask(post_chunked(BODY, end=b"0\r\nIdempotency-Key: trailer\r\nConnection: close\r\n\r\n"))
    assert connection.answer().id != "trailer"
    assert connection.open
    assert service.packets()[0].id == connection.answer().id


@pytest.mark.parametrize(
    "line", [b"Connection: close", b"Proxy-Connection: close", b"Connection: upgrade\r\nUpgrade: h2c"]
)
def test_body_after_a_fatal_trailer_is_read(service, line):
    data = post_chunked(BODY, end=b"0\r\n" + line + b"\r\n\r\n")
    assert service.ask(data * 2 + post()).statuses == [202, 202, 202]
    assert service.ask(data, data, post()).statuses == [202, 202, 202]
    assert service.bodies() == [BODY] * 6


# ---- smuggling: what hides in a body or behind a broken request is never read

HIDDEN = keyed("hidden")


@pytest.mark.parametrize(
    "data",
    [
        head("POST /logs", "Content-Length: 6", "Transfer-Encoding: chunked") + b"0\r\n\r\n" + HIDDEN,
        head("POST /logs", "Transfer-Encoding: chunked", "Content-Length: 4") + b"1\r\nZ\r\n0\r\n\r\n" + HIDDEN,
        head("POST /logs", "Transfer-Encoding : chunked", f"Content-Length: {len(HIDDEN) + 5}") + b"0\r\n\r\n" + HIDDEN,
        head("POST /logs", "Transfer-Encoding: xchunked", f"Content-Length: {len(HIDDEN) + 5}") + b"0\r\n\r\n" + HIDDEN,
        head("POST /logs", "Transfer-Encoding:\x0bchunked", f"Content-Length: {len(HIDDEN)}") + HIDDEN,
        head("POST /logs", "X: x\nTransfer-Encoding: chunked", f"Content-Length: {len(HIDDEN)}") + HIDDEN,
        head("POST /logs", "Transfer-Encoding:", " chunked", f"Content-Length: {len(HIDDEN)}") + HIDDEN,
        head("POST /logs", "Content-Length: 0", f"Content-Length: {len(HIDDEN)}") + HIDDEN,
        head("POST /logs", f"Content-Length: {len(HIDDEN)}", "Content-Length: 0") + HIDDEN,
        head("POST /logs", f"Content-Length: 0,{len(HIDDEN)}") + HIDDEN,
        head("POST /logs", "Content-Length: 0\x00", "A: b") + HIDDEN,
        post_chunked(b"Z", end=b"0\n\r\n") + HIDDEN,
        head("POST /logs", "Transfer-Encoding: chunked") + b"1;a\nb\r\nZ\r\n0\r\n\r\n" + HIDDEN,
        head("POST /logs", "Transfer-Encoding: chunked") + b"100000000\r\n" + HIDDEN,
        post(HIDDEN),
        post_chunked(HIDDEN),
        post(HIDDEN, "Content-Type: text/plain"),
        post_chunked(HIDDEN, lines=("Content-Encoding: br",)),
        post(HIDDEN, first="GET /health"),
        post(HIDDEN, first="PUT /nowhere"),
        head("POST /logs HTTP/1.0", "Connection: close", "Content-Length: 1") + b"x" + HIDDEN,
        head("POST /logs", "Connection: close") + HIDDEN,
        head("POST /logs", "Expect: 100-continue", "Content-Type: a/b", f"Content-Length: {len(HIDDEN)}") + HIDDEN,
        head("POST /logs", "Expect: x", f"Content-Length: {len(HIDDEN)}") + HIDDEN,
    ],
)
def test_nothing_hidden_is_read(service, data):
    connection = service.ask(data)
    assert len(connection.answers()) <= 1
    assert not service.ring.undone
    connection.lose()
