"""Reading 64 replies that came in one read, and settling their packets; beside llhttp, which only reads them."""

from __future__ import annotations

import httptools
import pytest
from way import OK, Way

REPLIES = 64
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
EXPRESS = (
    b"HTTP/1.1 200 OK\r\nX-Powered-By: Express\r\nContent-Type: application/json; charset=utf-8\r\n"
    b'Content-Length: 2\r\nETag: W/"2-vyGp6PvFo4RvsFtPoIWeCReyIC8"\r\nDate: Thu, 26 Nov 2026 05:45:00 GMT\r\n'
    b"Connection: keep-alive\r\nKeep-Alive: timeout=5\r\n\r\n{}"
)
KINDS = {"short": OK, "chunked": CHUNKED, "of Express": EXPRESS}


@pytest.mark.parametrize("name", KINDS)
def test_reading_and_settling(benchmark, name):
    way = Way(REPLIES, analyzers=1, mode="single", pipeline=REPLIES, connections=1)
    (connection,) = way.dispatcher.pools[0].connections
    replies = KINDS[name] * REPLIES

    def send():
        way.loop.busy.clear()
        way.accept()
        way.loop.run()
        assert connection.in_flight() == REPLIES

    benchmark.group = f"{REPLIES} replies, {name}"
    benchmark.pedantic(connection.data_received, args=(replies,), setup=send, rounds=1000, warmup_rounds=20)
    assert connection.in_flight() == 0
    assert way.ring.undone == 0


class Nothing:
    def __init__(self):
        self.complete = 0

    def on_message_complete(self):
        self.complete += 1


@pytest.mark.parametrize("name", KINDS)
def test_llhttp(benchmark, name):
    counter = Nothing()
    parser, replies = httptools.HttpResponseParser(counter), KINDS[name] * REPLIES
    benchmark.group = f"{REPLIES} replies, {name}"
    benchmark(parser.feed_data, replies)
    assert counter.complete
    assert counter.complete % REPLIES == 0
